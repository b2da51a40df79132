"""What a source is that is no Gemma 4 checkpoint, and what to do with it.

Recognised are PEFT adapters, drafters, other models of the family, single towers, and exports of
other programs. Names: `adapter_config.json` and `lora_A` of PEFT, the `model_type`s of transformers
5.23, `.gguf` of llama.cpp, `quantization` of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import read_object
from gemma_convert.model.adapter import ADAPTER_CONFIG
from gemma_convert.model.huggingface_files import ADAPTER, INDEX, SINGLE

_ADAPTER_WEIGHTS = (ADAPTER, "adapter_model.bin")
_MAX_ADAPTER_BYTES = 16 << 20

_ADAPTED = (
    "base_layer",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
_QUANTIZED = ("weight_scale", "weight_scale_inv", "scales", "biases", "weight_packed", "qweight")

_PACKED = ("int", "uint", "float8", "float4")
"""How dtypes begin that hold quantized weights."""

_ORIGINAL = "convert the original bfloat16 checkpoint"
_MERGE = (
    "merge it into its base model first, with merge_and_unload() and save_pretrained() of PEFT, "
    "and convert what that saved"
)
_ADAPTER = (
    "convert it with to-native, or with to-native --merge put it into its base model; this command "
    "takes models"
)
_GIVE = "give a folder with a Gemma 4 E2B, E4B, 12B, 26B-A4B or 31B checkpoint"

_DRAFTERS = {
    "gemma4_assistant": "a drafter, which proposes tokens to a Gemma 4 model and reads its cache",
    "gemma4_unified_assistant": "a drafter, which proposes tokens to Gemma 4 12B",
}
"""model_type → which model's drafter it is."""

_NO_DRAFTERS = (
    "give it to transformers as it is, as the assistant of its model: no framework that is "
    "converted to here has a place for a drafter"
)

_PARTS = {
    "gemma4_vision": "the vision tower of a Gemma 4 model by itself",
    "gemma4_audio": "the audio tower of a Gemma 4 model by itself",
    "gemma4_unified_vision": "the vision embedder of Gemma 4 12B by itself",
    "gemma4_unified_audio": "the audio embedder of Gemma 4 12B by itself",
}
"""model_type → which part of a Gemma 4 model it is."""

_OTHERS = {
    "embedding_gemma2": "an EmbeddingGemma 2 model, which gives vectors and no logits",
    "diffusion_gemma": "a DiffusionGemma model",
    "gemma3n": "a Gemma 3n model",
    "gemma3": "a Gemma 3 model",
    "gemma2": "a Gemma 2 model",
    "gemma": "a Gemma 1 model",
    "t5gemma": "a T5Gemma model",
    "t5gemma2": "a T5Gemma 2 model",
    "paligemma": "a PaliGemma model",
    "recurrent_gemma": "a RecurrentGemma model",
    "shieldgemma2": "a ShieldGemma 2 model",
    "vaultgemma": "a VaultGemma model",
}
"""model_type, without the `_text` of a text model alone → which other model it is."""


def refuse_foreign_folder(folder: Path) -> None:
    """Nothing where `folder` may be a checkpoint. Raises SourceError for an adapter or GGUF."""
    if folder.suffix == ".gguf" and folder.is_file():
        raise _gguf(folder, folder.name)
    if not folder.is_dir() or any((folder / name).exists() for name in (SINGLE, INDEX)):
        return
    adapter = next((name for name in _ADAPTER_WEIGHTS if (folder / name).exists()), None)
    alone = (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists()
    if adapter is not None or alone:
        raise SourceError(
            "This is an adapter of PEFT: changes to the weights of another checkpoint.",
            where=folder,
            expected=f"{SINGLE} or {INDEX}",
            found=", ".join([adapter or ADAPTER_CONFIG, *_adapter_facts(folder)]),
            do=_ADAPTER if adapter == ADAPTER else _MERGE,
        )
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".gguf")
    if files:
        raise _gguf(folder, ", ".join(files[:3]))


def refuse_foreign_config(config: Mapping[str, Any], model_type: str, where: Path) -> None:
    """Nothing where the config may be a Gemma 4 model's. Raises SourceError for a known other.

    A `quantization_config` says nothing: checkpoints of quantization-aware training carry one
    beside weights that are not quantized. What is quantized the tensors tell.
    """
    if config.get("quantization") is not None:
        raise SourceError(
            "This is a quantized export of MLX, which holds packed integers instead of the "
            "weights.",
            where=f"{where}, key quantization",
            found="quantization",
            do=_ORIGINAL,
        )
    at = f"{where}, key model_type"
    if model_type in _DRAFTERS:
        what = f"This is {_DRAFTERS[model_type]}."
        raise SourceError(what, where=at, found=model_type, do=_NO_DRAFTERS)
    if model_type in _PARTS:
        raise SourceError(
            f"This is {_PARTS[model_type]}.",
            where=at,
            found=model_type,
            do="convert the whole model that it belongs to; it needs no conversion of its own",
        )
    other = _OTHERS.get(model_type) or _OTHERS.get(model_type.removesuffix("_text"))
    if other is not None:
        raise SourceError(
            f"This is {other}, and gemma-convert converts Gemma 4.",
            where=at,
            found=model_type,
            do=_GIVE,
        )


def refuse_foreign_tensors(dtypes: Mapping[str, str], where: str) -> None:
    """Nothing where tensors may be Gemma 4's, by name and dtype. SourceError for a known other."""
    for name, dtype in dtypes.items():
        parts = name.split(".")
        if not set(_ADAPTED).isdisjoint(parts):
            raise SourceError(
                "These are the weights of a PEFT model whose adapter is not merged.",
                where=where,
                found=name,
                do=_MERGE,
            )
        packed = parts[-1].endswith(("weight", "_proj")) and dtype.startswith(_PACKED)
        if parts[-1] in _QUANTIZED or packed:
            raise SourceError(
                "This is a quantized export, which holds packed integers instead of the weights.",
                where=where,
                found=name if parts[-1] in _QUANTIZED else f"{name} in {dtype}",
                do=_ORIGINAL,
            )


def _adapter_facts(folder: Path) -> list[str]:
    """What adapter_config.json says of kind and base, as far as it can be read."""
    try:
        config = read_object(folder / ADAPTER_CONFIG, ADAPTER_CONFIG, _MAX_ADAPTER_BYTES)
    except (FileNotFoundError, SourceError):
        return []
    words = {"kind": "peft_type", "base model": "base_model_name_or_path"}
    return [f"{word} {short(config[key])}" for word, key in words.items() if config.get(key)]


def _gguf(where: Path, found: str) -> SourceError:
    return SourceError(
        "This is a GGUF export for llama.cpp, whose weights are packed in formats of its own.",
        where=where,
        expected="safetensors files and config.json",
        found=found,
        do=_ORIGINAL,
    )
