"""Values on their way back to Hugging Face: what was scaled is divided, what was lost put back."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from math import prod

import numpy as np

from gemma_convert.arrays.dtypes import numpy_dtype
from gemma_convert.arrays.values import (
    Array,
    convert,
    count_rounded,
    keep_exact,
    keep_originals,
    pieces,
    restore_exactly,
)
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.casting import Losses
from gemma_convert.mapping.plan import SourceTensor
from gemma_convert.mapping.region import Box, Ranges, RegionCopy


class Restorer:
    """What native values give back, with the original's where these still convert to them."""

    def __init__(self, original: Original) -> None:
        self._original = original
        self._sorted: dict[str, tuple[Array, Array]] = {}
        self._lock = threading.Lock()

    def fill(self, origin: str, box: Box, native: Array, values: Array, scale: float | None) -> int:
        """Fills `values` with a box of the original's tensor `origin`, piece by piece.

        `native` has the values that the native side holds of the box, in the same order; both are
        contiguous. How many of these do not come again of what is written.
        """
        lengths = tuple(length for _, length in box)
        native, values, lost = native.reshape(lengths), values.reshape(lengths), 0
        for piece in pieces(lengths):
            part = tuple(
                (start + span.start, span.stop - span.start)
                for (start, _), span in zip(box, piece, strict=True)
            )
            back = self._restore(origin, part, native[(..., *piece)], values.dtype.name, scale)
            lost += count_rounded(native[(..., *piece)], back, scale)
            convert(back, values[(..., *piece)], None)
        return lost

    def _restore(
        self, origin: str, box: Box, native: Array, dtype: str, scale: float | None
    ) -> Array:
        """Values [lengths of `box`] in `dtype` of the original's tensor `origin`.

        `native` has the values that the native side holds of the box, in the same order.
        """
        back = restore_exactly(native, dtype, scale)
        spec = self._original.specs[origin]
        if scale is not None:
            keep_exact(native, back, spec.dtype, scale)
        if scale is not None and self._original.holds(origin):
            stored = self._original.read_box(origin, box).reshape(back.shape)
            keep_originals(stored, native, back, scale)
            return back
        places, originals = self._exceptions(origin, box)
        if len(places):
            flat = back.reshape(-1)
            kept = flat[places]
            stored = originals.view(numpy_dtype(spec.dtype))
            keep_originals(stored, native.reshape(-1)[places], kept, scale)
            flat[places] = kept
        return back

    def _exceptions(self, origin: str, box: Box) -> tuple[Array, Array]:
        """Places in the box, flat, and the original bits of values that were kept one by one."""
        places, originals = self._in_order(origin)
        if not len(places):
            return places, originals
        shape = self._original.specs[origin].shape
        row = prod(shape[1:])
        start, count = box[0] if box else (0, 1)
        first, last = np.searchsorted(places, [start * row, (start + count) * row])
        places, originals = places[first:last], originals[first:last]
        index = np.unravel_index(places, shape)
        inside = np.ones(len(places), bool)
        for one, (begin, length) in zip(index, box, strict=True):
            inside &= (one >= begin) & (one < begin + length)
        within = tuple(one[inside] - begin for one, (begin, _) in zip(index, box, strict=True))
        lengths = tuple(length for _, length in box)
        return np.ravel_multi_index(within, lengths), originals[inside]

    def _in_order(self, origin: str) -> tuple[Array, Array]:
        with self._lock:
            if origin not in self._sorted:
                nothing = np.empty(0, np.int64), np.empty(0, np.uint8)
                places, originals = self._original.exceptions.get(origin, nothing)
                order = np.argsort(places, kind="stable")
                self._sorted[origin] = places[order], originals[order]
            return self._sorted[origin]


class Restoring:
    """The values of an export. `origins` has the original's name of each exported tensor.

    `rounded` counts the values of each source that do not give the native ones again, by exported
    tensor.
    """

    def __init__(self, original: Original, origins: Mapping[str, str]) -> None:
        self._restorer, self._origins = Restorer(original), origins
        self.rounded: dict[str, dict[str, int]] = {}
        self.losses: dict[str, Losses] = {}
        self._lock = threading.Lock()

    @property
    def rounded_by_tensor(self) -> dict[str, int]:
        """Exported tensor → how many of its values are rounded."""
        totals: Counter[str] = Counter()
        for counts in self.rounded.values():
            totals.update(counts)
        return dict(totals)

    def fill(
        self, copy: RegionCopy, ranges: Ranges, part: Array, values: Array, source: SourceTensor
    ) -> None:
        """Fills `values` with what the native `part` gives, both in the export's order of axes."""
        if copy.scale is None and values.dtype == part.dtype:
            convert(part, values, None)
            return
        name, box = copy.target.tensor, copy.target.box(ranges)
        native = np.ascontiguousarray(part)
        lost = self._restorer.fill(self._origins[name], box, native, values, copy.scale)
        if lost:
            with self._lock:
                counts = self.rounded.setdefault(source.region.tensor, {})
                counts[name] = counts.get(name, 0) + lost

    def notes(self, name: str) -> dict[str, int] | None:
        """What a later run that continues this one must know of a source."""
        return self.rounded.get(name, {})

    def take(self, name: str, notes: Mapping[str, int]) -> None:
        """Takes over what an earlier run has noted of a source."""
        if notes:
            self.rounded[name] = dict(notes)
