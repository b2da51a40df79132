"""Reading checkpoints in tests, by the libraries that own the formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def flatten(tree: dict, keys: tuple[str, ...] = ()) -> dict[tuple[str, ...], np.ndarray]:
    """Path → leaf of a nested dict."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, (*keys, key))
        else:
            flat[*keys, key] = np.asarray(value)
    return flat


def restore(items: Path) -> dict[str, np.ndarray]:
    """Path below params/params → array, restored by Orbax."""
    import jax
    import orbax.checkpoint as ocp

    params = {"params": listed_tree(items)["params"]}
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params)
    wanted = ocp.args.PyTreeRestore(params, restore_args=kinds, partial_restore=True)
    restored = ocp.PyTreeCheckpointer().restore(items, args=wanted)
    return {"/".join(keys): value for keys, value in flatten(restored["params"]["params"]).items()}


def listed_tree(items: Path) -> dict:
    """The nested dict that an Orbax item folder lists, without reading its arrays' metadata."""
    tree: dict = {}
    for entry in json.loads((items / "_METADATA").read_text())["tree_metadata"].values():
        *keys, last = (part["key"] for part in entry["key_metadata"])
        branch = tree
        for key in keys:
            branch = branch.setdefault(key, {})
        branch[last] = 0
    return tree


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """Name → array of every safetensors file in `folder`, read by the safetensors library."""
    import ml_dtypes
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if str(tensor.dtype) == "torch.bfloat16":
                    import torch

                    tensors[name] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                else:
                    tensors[name] = tensor.numpy()
    return tensors


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays have one dtype, one shape and the same bits."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )
