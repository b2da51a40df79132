"""MaxText's adapters: two matrices an array, in a tree of their own, as qwix names them.

Its fine-tuning saves them as an NNX state, from which `lora.lora_restore_path` takes them again;
rank and alpha stand in the metadata of a step where its trainer has written them
(`save_checkpoint` in common/checkpointing.py, `sync_lora_metadata` in utils/lora_utils.py, 0.2.5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.qwix import MATRIX, VALUE, modules, rank_of
from gemma_convert.files.json_file import read_object
from gemma_convert.layouts.maxtext.names import STEP_METADATA
from gemma_convert.model.adapter import Adapter, StoredAdapter

_DECODER = "decoder/"
_MATRIX = re.compile(rf"{_DECODER}.*kernel{MATRIX}")
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
    told = _told(items)
    alpha = told.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha <= 0:
        alpha = None
    return StoredAdapter(rank_of(items, specs, told.get("lora_rank")), alpha)


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
    """The regular expression of the modules that have these matrices, and of no others."""
    inside = (name.removeprefix(_DECODER) for name in names)
    return f"{_DECODER}({modules(inside, 'layers_')})"
