"""Weights that a layout has in one array: an adapter changes all of them, or none."""

from __future__ import annotations

from collections.abc import Collection

from gemma_convert.errors import UsageError
from gemma_convert.mapping.inventory import HFTensor, indices
from gemma_convert.mapping.rows import NativeRow, Table
from gemma_convert.model.architecture import Architecture


def check_partners(
    tensor: HFTensor,
    row: NativeRow,
    architecture: Architecture,
    table: Table,
    source: Collection[str],
) -> None:
    """Raises UsageError where `source` lacks a matrix that shares an array with one it has."""
    name = tensor.row.name(architecture.text_only)
    along = [axis for axis in name.axes if axis not in row.native.pattern.axes]
    for other in indices(along, architecture, row.where):
        partner = name.render({**tensor.index, **other}, table.inventory.spellings)
        if partner not in source:
            raise UsageError(
                f"The layout {table.layout} has one array for several weights, and this adapter "
                "changes some of them alone.",
                where=f"tensor {tensor.name}",
                expected=f"{partner} as well",
                do="merge the adapter into its base model with --merge",
            )
