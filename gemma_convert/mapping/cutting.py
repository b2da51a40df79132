"""How a stored array is cut for reading: along whole chunks, so that each is decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gemma_convert.mapping.region import Extent, RegionCopy

Dims = tuple[tuple[Extent, ...], ...]


@dataclass(frozen=True)
class Cut:
    """axis → step, slowest first, and the bytes of decoded chunks that several blocks share."""

    steps: dict[str, int]
    cache_bytes: int


def cut_by_chunks(
    copies: Sequence[RegionCopy],
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    itemsize: int,
    limit: int,
) -> Cut:
    """The cut of an array of this `shape` and `chunk` for `copies`, whose source it is.

    A block is a part of one copy, of up to `limit` bytes where the chunks let it. Parts of several
    copies that lie in one chunk follow one another: it is kept decoded meanwhile.
    """
    dims = copies[0].source.dims
    steps: dict[str, int] = {}
    sizes: dict[str, int] = {}
    lengths = []
    for extents, size, step in zip(dims, shape, chunk, strict=True):
        found = _cut(extents, min(step, size))
        if found is None:
            lengths.append(prod(extent.size for extent in extents if extent.at is None))
            continue
        axis, inner, count = found
        steps[axis.axis], sizes[axis.axis] = count, axis.size
        lengths.append(count * inner)
    shared = any(
        any(extent.at is not None for extent in extents) and step > 1 and len(extents) == 1
        for extents, step in zip(dims, chunk, strict=True)
    )
    if not shared:
        _grow(dims, steps, sizes, lengths, itemsize, limit)
    slab = prod(
        steps[extents[0].axis] if len(extents) == 1 and extents[0].at is None else size
        for extents, size in zip(dims, shape, strict=True)
    )
    fixed = {extent.axis: 1 for dim in dims for extent in dim if extent.at is not None}
    return Cut(steps | fixed, slab * itemsize + (1 << 20) if shared else 0)


def _grow(
    dims: Dims,
    steps: dict[str, int],
    sizes: dict[str, int],
    lengths: list[int],
    itemsize: int,
    limit: int,
) -> None:
    """Takes several chunks at once, while they stay within a block."""
    for place in reversed(range(len(dims))):
        found = _cut(dims[place], lengths[place])
        if found is None:
            continue
        axis, inner = found[0].axis, found[1]
        others = prod(lengths[:place] + lengths[place + 1 :]) * itemsize * inner
        count = max(1, limit // max(1, others * steps[axis]))
        steps[axis] = min(sizes[axis], steps[axis] * count)
        lengths[place] = steps[axis] * inner


def _cut(extents: tuple[Extent, ...], step: int) -> tuple[Extent, int, int] | None:
    """Where a dimension is cut: its first free axis, the length below it, and how many at a time.

    `step` is the length of a chunk. None where chunks and values of that axis do not line up.
    """
    place = next((at for at, extent in enumerate(extents) if extent.at is None), None)
    if place is None:
        return None
    below = extents[place + 1 :]
    inner = prod(extent.size for extent in below)
    aligned = bool(inner and step) and not (step % inner and inner % step)
    if any(extent.at is not None for extent in below) or not aligned:
        return None
    return extents[place], inner, min(max(1, step // inner), extents[place].size)
