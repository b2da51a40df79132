"""The weights of a Hugging Face checkpoint, in whichever format a folder holds them."""

from __future__ import annotations

from pathlib import Path

from gemma_convert.model.huggingface_files import ADAPTER, INDEX, SINGLE
from gemma_convert.stores.distcp.metadata import FILE as METADATA
from gemma_convert.stores.distcp.reader import DistcpFolder
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.tensor_folder import TensorFolder


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds weights under Hugging Face names."""
    return _is_safetensors(folder) or is_distcp(folder)


def is_distcp(folder: Path) -> bool:
    """Whether the weights in a folder are those of torch's distributed checkpoint."""
    return (folder / METADATA).is_file() and not _is_safetensors(folder)


def _is_safetensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SINGLE, INDEX, ADAPTER))


def open_weights(folder: Path) -> TensorFolder:
    """The weights in a folder; raises SourceError where there are none, or they are broken."""
    return DistcpFolder(folder) if is_distcp(folder) else SafetensorsFolder(folder)
