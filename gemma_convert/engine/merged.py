"""A Hugging Face checkpoint with an adapter merged into it, as the tensors of one checkpoint.

A merged value is weight + scaling · (B · A), computed in float64 and rounded once to the dtype of
the weight; batched experts are merged one by one. Rows are taken in pieces that begin at fixed
places, so that it does not depend on how the tensor is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.engine.adapter_pairs import AdapterPairs
from gemma_convert.engine.transfer import HuggingFaceTensors
from gemma_convert.errors import SourceError
from gemma_convert.mapping.plan import SourceTensor
from gemma_convert.mapping.region import Ranges
from gemma_convert.model.adapter import Adapter

PIECE_VALUES = 1 << 20
"""Most values that are in memory in float64; a piece has one row at the least."""


class MergedTensors:
    """The tensors of `base`, with what the `pairs` of an adapter add to them."""

    def __init__(self, base: HuggingFaceTensors, pairs: AdapterPairs) -> None:
        self._base, self._pairs = base, pairs
        self._merged = frozenset(pairs.weights)

    @property
    def adapter(self) -> Adapter:
        """What was merged."""
        return self._pairs.adapter

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._base.specs

    @property
    def merged(self) -> list[str]:
        """The names of the tensors that the adapter changes."""
        return self._pairs.weights

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` with a tensor's merged bytes from `offset` on."""
        self._base.read_block(source, ranges, offset, data)
        self._add(source.region.tensor, offset, data)

    def in_order(self, name: str) -> bool:
        """Every tensor is read in the order of its bytes."""
        return self._base.in_order(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one is asked for."""
        offset = 0
        for piece in self._base.pieces(name):
            self._add(name, offset, np.frombuffer(piece, np.uint8))
            offset += len(piece)
            yield piece

    def check_unchanged(self) -> None:
        """Raises SourceError where the model or the adapter has changed since it was opened."""
        self._base.check_unchanged()
        self._pairs.check_unchanged()

    def _add(self, name: str, offset: int, data: Array) -> None:
        """Adds to the bytes `data`, which begin at byte `offset` of a tensor [experts out in].

        Raises SourceError where a value becomes one that is no number, or is beyond its dtype.
        """
        if name not in self._merged:
            return
        spec = self.specs[name]
        values, first = data.view(numpy_dtype(spec.dtype)), offset // spec.itemsize
        for expert, rows, begin in _pieces(spec.shape, first, first + values.size):
            a, b = self._pairs.factors(name, expert)
            with np.errstate(over="ignore", invalid="ignore"):
                delta = (b[rows] @ a).reshape(-1)
                low, high = max(first, begin), min(first + values.size, begin + delta.size)
                part = values[low - first : high - first]
                changed = part.astype(np.float64)
                changed += self.adapter.scaling * delta[low - begin : high - begin]
                merged = changed.astype(part.dtype)
            lost = ~np.isfinite(merged)
            if lost.any() and np.isfinite(part[lost]).any():
                raise _not_finite(name, spec.dtype)
            part[...] = merged


def _not_finite(name: str, dtype: str) -> SourceError:
    return SourceError(
        "A merged value is not finite, and that of the base model is.",
        where=f"tensor {name}",
        expected=f"finite values of {dtype}",
        do="look for NaN and for matrices that are too large in the adapter; where they are right, "
        "merge into a base model of bfloat16 or float32",
    )


def _pieces(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[int, slice, int]]:
    """The pieces of a weight that have values from `first` up to `last`, by the order of all.

    Each is the number of an expert, 0 of a weight without, rows of it, and the number of the first
    value.
    """
    outputs, width = shape[-2:]
    rows = max(1, PIECE_VALUES // width)
    for expert in range(first // (outputs * width), -(-last // (outputs * width))):
        for top in range(0, outputs, rows):
            begin, bottom = (expert * outputs + top) * width, min(outputs, top + rows)
            if begin < last and first < (expert * outputs + bottom) * width:
                yield expert, slice(top, bottom), begin
