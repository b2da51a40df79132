"""A safetensors file → its tree, left in the file until an array is used.

The library checks the file; our own store is never used here, as for trees of Orbax.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.library_path import library_path
from gemma_convert.forward.tree import ArrayFacts, Tree, array_facts, chosen, named

LIBRARIES = ("jax", "safetensors")
"""What a tree in such a file is run with, for the report."""

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_LENGTH = 8


def tree_facts(file: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree in `file`, by path with slashes; reads no array."""
    return dict(array_facts(open_tree(file)))


def open_tree(file: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tensors of `file` as nested dicts, whose keys are the parts of a name between slashes.

    Each is a numpy array over the mapped file, of which only what is used is read. `modules` names
    the first keys to open; None opens all. Raises SourceError where the file cannot be read, has a
    tensor of another dtype than floats, or lacks a module.
    """
    from safetensors import safe_open

    unreadable = told_by_library("safetensors cannot read this file.", file)
    with unreadable, safe_open(library_path(file), framework="numpy"):
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    values = np.memmap(file, np.uint8, "r")[_LENGTH + length :]
    tree: dict[str, Any] = {}
    for name, facts in header.items():
        *outer, last = name.split("/")
        level = tree
        for key in outer:
            level = level.setdefault(key, {})
        level[last] = _array(values, facts, f"{file}, tensor {name}")
    return chosen(tree, modules, lambda name: _lacks(file, name, tree))


def _array(values: np.ndarray[Any, Any], facts: Any, where: str) -> np.ndarray[Any, Any]:
    dtype = _DTYPES.get(facts["dtype"])
    if dtype is None:
        raise SourceError(
            "A tensor of the model is not of floating-point numbers.",
            where=where,
            expected=", ".join(_DTYPES),
            found=facts["dtype"],
        )
    start, stop = facts["data_offsets"]
    array: np.ndarray[Any, Any] = values[start:stop].view(dtype).reshape(facts["shape"])
    return array


def _lacks(file: Path, module: str, tree: Tree) -> SourceError:
    return SourceError(
        "A part of the model is missing in the file.",
        where=file,
        expected=module,
        found=named(tree),
    )
