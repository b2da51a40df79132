"""Placements: where the stacking axes of scanned layers go. Rows know nothing of them."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_convert.errors import MappingError, UsageError
from gemma_convert.mapping.notation import Index, Pattern, View
from gemma_convert.mapping.region import Extent
from gemma_convert.mapping.rows import Placement, Stack, Table
from gemma_convert.model.architecture import Architecture

Dims = tuple[tuple[Extent, ...], ...]


@dataclass(frozen=True)
class Placed:
    """The name of a native tensor, and the stacking axes that go in after its first dimensions."""

    name: str
    stacking: tuple[Extent, ...] = ()
    after: int = 0

    def put_in(self, dims: Dims) -> Dims:
        """`dims` with one fixed dimension for each stacking axis."""
        stacked = tuple((extent,) for extent in self.stacking)
        return dims[: self.after] + stacked + dims[self.after :]


def scanned_placement(table: Table, architecture: Architecture) -> Placement:
    """The placement of scanned layers; raises UsageError, and says why, where there is none."""
    placement = table.placements.get("scanned")
    if placement is None:
        raise UsageError(f"The layout {table.layout} has no scanned form.", do="drop --scan-layers")
    for condition, why in placement.refused:
        if condition.holds(architecture, {}):
            raise UsageError(f"{why}.", found=architecture.family, do="use --no-scan-layers")
    depth, period = len(architecture.text.layers), architecture.text.period
    if period is None or depth % period:
        raise UsageError(
            "The number of layers is not a multiple of the scanned block.",
            expected=f"a multiple of {period} layers" if period else "a repeating pattern",
            found=f"{depth} layers",
            do="use --no-scan-layers",
        )
    return placement


def place(
    view: View,
    index: Index,
    architecture: Architecture,
    table: Table,
    placement: Placement | None,
) -> Placed:
    """Where one tensor of a native view goes, under a placement or without one."""
    pattern = view.pattern
    stack = None
    if placement is not None and placement.axis in pattern.axes:
        stack = _stack(placement, pattern, index, architecture)
    if placement is None or stack is None:
        return Placed(pattern.render(index, table.spellings))
    renamed = Pattern(stack.end + pattern.text.removeprefix(stack.start))
    return Placed(
        name=renamed.render(index, table.spellings),
        stacking=_extents(stack, index[placement.axis], architecture),
        after=min(placement.after, len(view.dims)),
    )


def _stack(
    placement: Placement, pattern: Pattern, index: Index, architecture: Architecture
) -> Stack:
    for stack in placement.stacks:
        if pattern.text.startswith(stack.start) and stack.when.holds(architecture, index):
            return stack
    raise MappingError(
        "No stack of the placement takes this layer.",
        where=f"placement {placement.name}",
        found=f"{pattern.text} at {dict(index)}",
    )


def _extents(stack: Stack, layer: int, architecture: Architecture) -> tuple[Extent, ...]:
    period = architecture.text.period
    if period is None:
        raise MappingError("A placement without a repeating block.", found=layer)
    block, position = divmod(layer, period)
    extents = {
        "block": Extent("block", len(architecture.text.layers) // period, block),
        "position": Extent("position", period - 1, position),
    }
    return tuple(extents[word] for word in stack.index)
