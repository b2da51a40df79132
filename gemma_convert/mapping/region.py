"""Regions of arrays over named axes, copies between two regions, and the blocks they are run in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

Box = tuple[tuple[int, int], ...]
"""(start, length) for each dimension of an array."""

Ranges = Mapping[str, tuple[int, int]]
"""axis → (start, stop), for the axes that a block restricts."""


def slices(box: Box) -> tuple[slice, ...]:
    """The index of a box in its array."""
    return tuple(slice(start, start + length) for start, length in box)


def contiguous(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether the values of `box` stand next to each other in an array of `shape` in C order."""
    places = zip(box, shape, strict=True)
    rest = itertools.dropwhile(lambda place: place[0][1] == 1, places)
    return all(length == size for (_, length), size in list(rest)[1:])


def flat_place(box: Box, shape: tuple[int, ...]) -> int:
    """The place of a box's first value in an array of `shape` in C order."""
    flat = 0
    for (start, _), size in zip(box, shape, strict=True):
        flat = flat * size + start
    return flat


def runs(box: Box, shape: tuple[int, ...]) -> tuple[int, Iterator[int]]:
    """Length of the pieces without gaps that a box is made of, and where each begins."""
    whole = len(shape)
    while whole and box[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    outer = box[: max(whole - 1, 0)]
    strides = [prod(shape[place + 1 :]) for place in range(len(shape))]
    inner = box[whole - 1] if whole else (0, 1)
    stride = strides[whole - 1] if whole else prod(shape)
    spans = [
        range(start * step, (start + length) * step, step)
        for (start, length), step in zip(outer, strides, strict=False)
    ]
    first = inner[0] * stride
    return inner[1] * stride, (first + sum(place) for place in itertools.product(*spans))


class NotABoxError(ValueError):
    """A region is not one box of the array, since an outer axis of a group is not fixed."""


@dataclass(frozen=True, slots=True)
class Extent:
    """One axis in a dimension: its length, and the index `at` which a copy holds it, if fixed."""

    axis: str
    size: int
    at: int | None = None

    def range(self, ranges: Ranges) -> tuple[int, int]:
        if self.at is not None:
            return self.at, self.at + 1
        return ranges.get(self.axis, (0, self.size))


@dataclass(frozen=True)
class Region:
    """A part of one tensor: every dimension is a group of extents, slowest first."""

    tensor: str
    dims: tuple[tuple[Extent, ...], ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(prod(extent.size for extent in dim) for dim in self.dims)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The free axes, slowest first: those that the copy runs over."""
        return tuple(extent.axis for extent in self.extents if extent.at is None)

    @property
    def extents(self) -> Iterator[Extent]:
        return itertools.chain.from_iterable(self.dims)

    def box(self, ranges: Ranges) -> Box:
        """The box of the tensor that the region takes, restricted to `ranges`.

        Raises NotABoxError where the part is not one box.
        """
        return tuple(_span(dim, ranges) for dim in self.dims)

    def parts(self, ranges: Ranges) -> Iterator[Ranges]:
        """`ranges`, cut so that each part of the region is one box of the tensor.

        Where an axis is restricted, those before it in its group are taken one by one.
        """
        single: list[Extent] = []
        for dim in self.dims:
            cut = [place for place, extent in enumerate(dim) if not _is_whole(extent, ranges)]
            single += [e for e in dim[: cut[-1]] if e.at is None] if cut else []
        spans = [[(at, at + 1) for at in range(*extent.range(ranges))] for extent in single]
        for combination in itertools.product(*spans):
            axes = (extent.axis for extent in single)
            yield {**ranges, **dict(zip(axes, combination, strict=True))}

    def lengths(self, ranges: Ranges) -> tuple[int, ...]:
        """Length of every free axis under `ranges`, slowest first."""
        spans = (extent.range(ranges) for extent in self.extents if extent.at is None)
        return tuple(stop - start for start, stop in spans)

    def meets(self, ranges: Ranges) -> bool:
        """Whether the fixed axes lie within `ranges`."""
        return all(
            ranges[extent.axis][0] <= extent.at < ranges[extent.axis][1]
            for extent in self.extents
            if extent.at is not None and extent.axis in ranges
        )


def _is_whole(extent: Extent, ranges: Ranges) -> bool:
    low, high = extent.range(ranges)
    return high - low == extent.size


def _span(dim: tuple[Extent, ...], ranges: Ranges) -> tuple[int, int]:
    start, length, stride, whole = 0, 1, 1, True
    for extent in reversed(dim):
        low, high = extent.range(ranges)
        if not whole and high - low != 1:
            raise NotABoxError(" ".join(extent.axis for extent in dim))
        start += low * stride
        length *= high - low
        stride *= extent.size
        whole = whole and high - low == extent.size
    return start, length


@dataclass(frozen=True)
class RegionCopy:
    """target region = source region, its axes permuted, multiplied by `scale` if any."""

    row: str
    source: Region
    target: Region
    scale: float | None

    def parts(self, ranges: Ranges) -> Iterator[Ranges]:
        """The parts of a block that the copy takes, each one box of its target."""
        if self.source.meets(ranges):
            yield from self.target.parts(ranges)

    @cached_property
    def permutation(self) -> tuple[int, ...]:
        """Places of the target's free axes among the source's."""
        return tuple(self.source.axes.index(axis) for axis in self.target.axes)


def selection(copy: RegionCopy, block: Ranges, part: Ranges | None = None) -> tuple[Any, ...]:
    """Index of a copy's part in a block that has one dimension for every axis of the source tensor.

    `block` says where the block begins; `part`, within it, restricts the free axes further.
    """
    places: list[Any] = []
    for extent in copy.source.extents:
        first = block.get(extent.axis, (0, 0))[0]
        start, stop = extent.range(part if part is not None else block)
        places.append(slice(start - first, stop - first) if extent.at is None else start - first)
    return (*places, ...)


def split_steps(
    region: Region, itemsize: int, limit: int, leading: frozenset[str]
) -> dict[str, int]:
    """axis → step, for cutting a tensor along its slowest axes into pieces of up to `limit` bytes.

    `region` has every axis of the tensor. An axis that is not in `leading` is not the first of its
    group on the other side, so its step divides its length: pieces are then whole chunks there.
    """
    steps: dict[str, int] = {}
    extents = list(region.extents)
    inner = prod(extent.size for extent in extents) * itemsize
    for extent in extents:
        if inner <= limit:
            break
        inner //= extent.size
        most = max(1, limit // inner) if inner else extent.size
        divisor = max(d for d in range(1, min(most, extent.size) + 1) if extent.size % d == 0)
        keep = 2 * divisor >= most or extent.axis not in leading
        steps[extent.axis] = divisor if keep else most
        if most > 1:
            break
    return steps


def blocks(region: Region, steps: Mapping[str, int]) -> Iterator[Ranges]:
    """The ranges of every block of a tensor; the first axis of `steps` is the slowest."""
    extents = {extent.axis: extent for extent in region.extents}
    cut = [extents[axis] for axis in steps]
    spans: Sequence[list[tuple[int, int]]] = [
        [
            (start, min(start + steps[extent.axis], extent.size))
            for start in range(0, extent.size, steps[extent.axis])
        ]
        for extent in cut
    ]
    for combination in itertools.product(*spans):
        yield {extent.axis: span for extent, span in zip(cut, combination, strict=True)}


def chunk_shape(region: Region, steps: Mapping[str, int]) -> tuple[int, ...]:
    """The chunk of the target array that makes every block of `region` whole chunks."""
    return tuple(
        prod(
            1 if extent.at is not None else min(steps.get(extent.axis, extent.size), extent.size)
            for extent in dim
        )
        for dim in region.dims
    )
