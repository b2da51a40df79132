"""Checkpoints as arrays, and how far two are from one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face checkpoint, as safetensors reads it."""
    from safetensors.numpy import load_file

    return {
        name: tensor
        for file in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def tree(items: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint of parameters, as Orbax reads it."""
    import jax
    from orbax import checkpoint

    found = checkpoint.PyTreeCheckpointer().restore(items.absolute())
    leaves: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def different(theirs: Arrays, ours: Arrays) -> float:
    """How many arrays of theirs ours has not, or with another shape, dtype or bit."""
    same = [
        name
        for name, array in theirs.items()
        if name in ours
        and ours[name].shape == array.shape
        and ours[name].dtype == array.dtype
        and ours[name].tobytes() == array.tobytes()
    ]
    if not theirs:
        raise ValueError("there are no arrays")
    return len(theirs) - len(same)


def furthest(found: Arrays, expected: Arrays) -> float:
    """The largest difference of a value found, as a share of the largest of its array."""
    shares = [
        np.max(abs(array - expected[name])) / np.max(abs(expected[name]))
        for name, array in found.items()
    ]
    return float(max(shares))
