"""The names that transformers and PEFT give to the files of a checkpoint."""

from pathlib import Path

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a Hugging Face checkpoint, or an adapter's."""
    return any((folder / name).exists() for name in (SINGLE, INDEX, ADAPTER))
