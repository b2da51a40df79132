"""Tunix' adapters: the matrices that qwix puts into its model, saved without the model.

`CheckpointManager.save` of google-tunix 0.1.7 with `save_only_lora_params`, as `PeftTrainer` calls
it for such a model; neither writes down how the adapter is scaled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gemma_convert.checkpoint.qwix import MATRIX, VALUE, modules
from gemma_convert.model.adapter import Adapter

_MATRIX = re.compile(rf"(layers/\d+|embedder)/.*{MATRIX}", re.ASCII)


def matrices(arrays: Iterable[str]) -> dict[str, str]:
    """Name in the table → name on disk, of the matrices among the arrays of a tree."""
    named = ((path.removesuffix(VALUE), path) for path in arrays)
    return {name + VALUE: path for name, path in named if _MATRIX.fullmatch(name)}


def adapter_settings(adapter: Adapter, names: Iterable[str], target: Path) -> dict[str, str]:
    """Setting → value: the model with places for the adapter in `target`, and what fills them.

    That is said of a model with the parameters of the base model.
    """
    rule = f"rank={adapter.rank}, alpha={adapter.alpha!r}"
    provider = f'qwix.LoraProvider(module_path="{modules(names, "layers/")}", {rule})'
    inputs = "rngs=nnx.Rngs(0), **model.get_model_input()"
    restore = "maybe_restore(model, restore_only_lora_params=True)"
    return {
        "model": f"qwix.apply_lora_to_model(model, {provider}, {inputs})",
        "params": f'CheckpointManager("{target.absolute()}").{restore}',
    }
