"""Values on their way to a native layout: cast and scaled, and what does not come back is kept."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gemma_convert.arrays.values import Array, bits, convert, lost_places, may_lose, pieces
from gemma_convert.mapping.plan import SourceTensor
from gemma_convert.mapping.region import Ranges, RegionCopy

EXCEPTION_SHARE = 0.01
"""Above this share of values that do not come back, a tensor's original is carried whole."""


@dataclass
class Losses:
    """Values of one source tensor that do not come back bit for bit from its target."""

    count: int = 0
    places: list[Array] = field(default_factory=list)
    originals: list[Array] = field(default_factory=list)
    whole: bool = False
    """Too many to list, so that the original is carried whole."""

    def carry_whole(self) -> None:
        """Lists none of them: the tensor's original is carried."""
        self.whole = True
        self.places.clear()
        self.originals.clear()


def listed_values(losses: Mapping[str, Losses]) -> dict[str, tuple[Array, Array]]:
    """Tensor → places and original bits of the values that are listed."""
    return {
        name: (np.concatenate(one.places), np.concatenate(one.originals))
        for name, one in losses.items()
        if one.places
    }


class Casting:
    """Casts and scales by the plan. `losses` has the source tensors that lose values.

    Values that do not come back are listed with their original bits; of tensors that the dtype
    policy rounds by its nature (`rounded`, tensor → how) they are only counted.
    """

    def __init__(self, rounded: Mapping[str, str]) -> None:
        self.losses: dict[str, Losses] = {}
        self._rounded = rounded
        self._lock = threading.Lock()

    def fill(
        self, copy: RegionCopy, ranges: Ranges, part: Array, values: Array, source: SourceTensor
    ) -> None:
        """Fills `values` with `part` of the source tensor, both in the target's order of axes."""
        if not may_lose(source.spec.dtype, values.dtype.name, copy.scale):
            convert(part, values, copy.scale)
            return
        for piece in pieces(part.shape):
            convert(part[(..., *piece)], values[(..., *piece)], copy.scale)
            places = lost_places(part[(..., *piece)], values[(..., *piece)], copy.scale)
            if len(places):
                starts = np.array([span.start for span in piece], np.int64)
                self._note(copy, ranges, part, places + starts, source)

    def _note(
        self, copy: RegionCopy, ranges: Ranges, part: Array, places: Array, source: SourceTensor
    ) -> None:
        name = copy.source.tensor
        with self._lock:
            losses = self.losses.setdefault(name, Losses())
            losses.count += len(places)
            if losses.whole or name in self._rounded:
                return
            if losses.count > EXCEPTION_SHARE * source.spec.size:
                losses.carry_whole()
                return
            losses.places.append(_flat_places(copy, ranges, places))
            losses.originals.append(bits(part)[tuple(places.T)])

    def notes(self, name: str) -> dict[str, int] | None:
        """Nothing of a tensor that loses no value; None of others, which are read again."""
        return None if name in self.losses else {}

    def take(self, name: str, notes: Mapping[str, int]) -> None:
        """Nothing is to be taken over from an earlier run."""
        del name, notes


def _flat_places(copy: RegionCopy, ranges: Ranges, places: Array) -> Array:
    """Places in the target's order of axes → flat indices into the source tensor."""
    by_axis = dict(zip(copy.target.axes, places.T, strict=True))
    flat = np.zeros(len(places), np.int64)
    for extent in copy.source.extents:
        start = extent.range(ranges)[0]
        value = start + by_axis[extent.axis] if extent.at is None else extent.at
        flat = flat * extent.size + value
    return flat
