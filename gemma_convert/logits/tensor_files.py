"""The weights that transformers would load, read by its names for them and one by one.

Names in the files are not always those of the modules (12B's are not): `conversion_mapping.py` of
transformers says which become which.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.library_path import library_path
from gemma_convert.logits.changes import Changes
from gemma_convert.stores.safetensors.naming import find_naming
from gemma_convert.stores.safetensors.reader import read_index

if TYPE_CHECKING:
    import torch

from gemma_convert.model.huggingface_files import INDEX, SINGLE

MAPPED_BYTES = 256 << 20
"""So much is read of files until they are mapped anew: their pages count as resident memory."""


class TensorFiles:
    """The safetensors files of a checkpoint: shapes, and parts of tensors in float32.

    Tensors go by their names in `model`; those of an adapter are given with its `changes`. Raises
    SourceError for files that cannot be read.
    """

    def __init__(self, hf: Path, model: Any, changes: Changes | None = None) -> None:
        self._hf, self._mapped, self._changes = hf, 0, changes
        self._changed: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._places: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with told_by_library("The original checkpoint cannot be read.", hf):
            renamed = renaming(model)
            stored: dict[str, str] = {}
            for path in _listed(hf):
                stored |= dict.fromkeys(self._file(path).keys(), path)
            for name, key in find_naming(stored, hf).stored.items():
                path, place = stored[key], renamed(name)
                self._places[place] = path, key
                if changes is not None and name in changes.weights:
                    self._changed[place] = name
                self.shapes[place] = tuple(self._file(path).get_slice(key).get_shape())

    def read(
        self, name: str, rows: slice | torch.Tensor | None = None, device: Any = None
    ) -> torch.Tensor:
        """A tensor, or rows of it: the file is mapped into memory, so no other rows are read."""
        import torch

        path, key = self._places[name]
        with told_by_library("The original checkpoint cannot be read.", self._hf):
            tensor: torch.Tensor = self._file(path).get_tensor(key)
            part = tensor if rows is None else tensor[rows]
            value = part.to(device=device, dtype=torch.float32, copy=True)
        if self._changes is not None and name in self._changed:
            self._changes.add(self._changed[name], value, rows)
        self._mapped += part.nbytes
        if self._mapped > MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        return value

    def _file(self, path: str) -> Any:
        """A file, mapped into memory, where pages that were read stay until it is closed."""
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(library_path(self._hf) / path, framework="pt")
        return self._open[path]


def renaming(model: Any) -> Callable[[str], str]:
    """Name in the files → name in `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings = get_model_conversion_mapping(model)

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return renamed


def _listed(hf: Path) -> list[str]:
    if (hf / SINGLE).is_file() or not (hf / INDEX).is_file():
        return [SINGLE]
    return sorted(set(read_index(hf / INDEX).values()))
