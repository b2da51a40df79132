"""huggingface.toml × Architecture → the named tensors of one model, with their shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from gemma_convert.errors import MappingError
from gemma_convert.mapping.adapted import inventory_of
from gemma_convert.mapping.notation import Index, View
from gemma_convert.mapping.rows import HFRow, Inventory
from gemma_convert.model.architecture import MODEL_FACTS, Architecture


@dataclass(frozen=True)
class HFTensor:
    """One tensor that a model may have. `index` holds the axes that stand in its name."""

    name: str
    row: HFRow
    index: Index
    shape: tuple[int, ...]
    required: bool
    tied: str | None


def hf_tensors(architecture: Architecture, inventory: Inventory | None = None) -> list[HFTensor]:
    """Every tensor of the model in the Hugging Face layout, optional ones included."""
    inventory = inventory or inventory_of(architecture)
    return [
        tensor for row in inventory.rows for tensor in _row_tensors(row, architecture, inventory)
    ]


def huggingface_tensors(
    architecture: Architecture, kv_leftovers: bool
) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that a checkpoint holds, a tied lm_head apart.

    `kv_leftovers` asks for the keys and values of KV-shared layers too: published files have them.
    """
    return {
        tensor.name: tensor.shape
        for tensor in hf_tensors(architecture)
        if tensor.required or (kv_leftovers and tensor.tied is None)
    }


def _row_tensors(
    row: HFRow, architecture: Architecture, inventory: Inventory
) -> Iterator[HFTensor]:
    if not all(
        architecture.holds(fact, {}) is wanted
        for fact, wanted in row.when.terms
        if fact in MODEL_FACTS
    ):
        return
    name = row.name(architecture.text_only)
    for index in indices(name.axes, architecture, row.where):
        if row.when.holds(architecture, index):
            optional = row.optional is not None and row.optional.holds(architecture, index)
            tied = row.tied if architecture.text.tied else None
            yield HFTensor(
                name=name.render(index, inventory.spellings),
                row=row,
                index=index,
                shape=shape_of(row.view, architecture, index),
                required=not optional and tied is None,
                tied=tied,
            )


def indices(
    axes: Sequence[str], architecture: Architecture, where: str
) -> Iterator[dict[str, int]]:
    """Every combination of values of `axes`, the first axis slowest."""
    sizes = [axis_size(axis, architecture, {}, where) for axis in axes]
    for values in itertools.product(*map(range, sizes)):
        yield dict(zip(axes, values, strict=True))


def shape_of(view: View, architecture: Architecture, index: Index) -> tuple[int, ...]:
    """Shape of one tensor of a view."""
    where = str(view)
    return tuple(
        prod(axis_size(axis, architecture, index, where) for axis in dim) for dim in view.dims
    )


def axis_size(axis: str, architecture: Architecture, index: Index, where: str) -> int:
    """Length of an axis at a place; raises MappingError where the architecture has none for it."""
    size = architecture.size(axis, index)
    if size is None:
        raise MappingError(
            f"The axis `{axis}` has no size here.", where=where, found=f"index {dict(index)}"
        )
    return size
