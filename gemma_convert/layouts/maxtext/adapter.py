"""MaxText's adapters: two matrices an array, in a tree of their own, as qwix names them.

Its fine-tuning saves them as an NNX state, from which `lora.lora_restore_path` takes them again;
rank and alpha stand in the metadata of a step where its trainer has written them
(`save_checkpoint` in common/checkpointing.py, `sync_lora_metadata` in utils/lora_utils.py, 0.2.5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import read_object
from gemma_convert.layouts.maxtext.names import STEP_METADATA
from gemma_convert.model.adapter import Adapter, StoredAdapter

A, B = "_lora_a", "_lora_b"
VALUE = "/value"
_MATRIX = re.compile(rf"decoder/.*kernel({A}|{B})")
_LAYER = re.compile(r"layers_(\d+)/")
_MAX_BYTES = 1 << 20


def matrices(names: Mapping[str, str]) -> dict[str, str]:
    """Name in the table → name on disk, of an adapter's tree; empty where there is no adapter.

    `names` are those of a model's tree → those on disk.
    """
    return {name + VALUE: path for name, path in names.items() if _MATRIX.fullmatch(name)}


def stored_adapter(items: Path, specs: Mapping[str, TensorSpec]) -> StoredAdapter:
    """Rank and alpha of the adapter with these arrays; alpha is None where nobody has written it.

    Raises SourceError for metadata that cannot be read, or of another rank.
    """
    ranks = {spec.shape[-1] for name, spec in specs.items() if name.endswith(A + VALUE)}
    told = _told(items)
    rank, alpha = told.get("lora_rank"), told.get("lora_alpha")
    if len(ranks) != 1 or rank not in {None, 0, *ranks}:
        raise SourceError(
            "The matrices of the adapter are not of one rank.",
            where=items,
            expected="one rank for all" if rank is None else f"rank {rank}, by the step's metadata",
            found=", ".join(map(str, sorted(ranks))) or "no matrix A",
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha <= 0:
        alpha = None
    return StoredAdapter(ranks.pop(), alpha)


def _told(items: Path) -> Mapping[str, object]:
    for folder in (items, items.parent):
        try:
            metadata = read_object(folder / STEP_METADATA, "Orbax' metadata", _MAX_BYTES)
        except FileNotFoundError:
            continue
        custom = metadata.get("custom_metadata")
        told = custom.get("lora") if isinstance(custom, dict) else None
        if isinstance(told, dict):
            return told
    return {}


def told_adapter(adapter: Adapter) -> dict[str, object]:
    """What the metadata of a step says of an adapter."""
    return {"lora": {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}}


def adapter_settings(adapter: Adapter, names: Iterable[str], items: Path) -> dict[str, str]:
    """Setting → value, under which MaxText's fine-tuning goes on with the adapter in `items`."""
    return {
        "lora.enable_lora": "true",
        "lora.lora_rank": str(adapter.rank),
        "lora.lora_alpha": repr(adapter.alpha),
        "lora.lora_module_path": module_path(names),
        "lora.lora_restore_path": str(items),
    }


def module_path(names: Iterable[str]) -> str:
    """The regular expression of the modules that have these matrices, and of no others.

    MaxText demands a matrix for each module that it finds.
    """
    modules: dict[str, set[int]] = {}
    for name in names:
        layer = _LAYER.search(name)
        if name.endswith(A + VALUE) and layer is not None:
            module = name[layer.end() :].rpartition("/kernel")[0]
            modules.setdefault(module, set()).add(int(layer[1]))
    by_layers = sorted((sorted(layers), module) for module, layers in modules.items())
    parts = []
    for layers, group in groupby(by_layers, lambda entry: entry[0]):
        found = "|".join(module for _, module in group)
        parts.append(f"layers_({'|'.join(map(str, layers))})/({found})")
    return f"decoder/({'|'.join(parts)})"
