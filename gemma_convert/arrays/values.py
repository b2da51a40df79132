"""Values on their way: cast and scaled without a silent change, and checked by going back.

bfloat16 → float32 is a shift of bits, since a library's cast may flush denormals or rewrite NaNs. A
scaled value is multiplied in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_convert.arrays.dtypes import exact, numpy_dtype

Array = NDArray[Any]

_TILE_ROWS = 256
_TILE_ROW_BYTES = 1 << 10
_TILE_GAP = 32
"""Values between two rows of the scratch, so that they are no power of two apart."""

PIECE_VALUES = 1 << 16
"""Values that are cast, scaled and compared at once, so that they stay in the processor's cache."""

_SMALL = 1 << 12
"""Values of a matrix that is turned at once."""


def convert(source: Array, target: Array, scale: float | None) -> None:
    """Fills `target` with `source` cast to its dtype, multiplied by `scale` in float32 first.

    Both have one shape; `source` may be a transposed view. Equal dtypes copy bits.
    """
    if target.dtype == source.dtype and scale is None:
        _copy_bits(bits(source), bits(target))
    elif target.dtype == np.float32:
        _widen(source, target)
        if scale is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(target, np.float32(scale), out=target)
    else:
        wide = np.empty(source.shape, np.float32)
        convert(source, wide, scale)
        target[...] = wide.astype(target.dtype)


def restore(target: Array, dtype: str, scale: float | None) -> Array:
    """The values that `target` gives when it is converted back to `dtype`."""
    back = np.empty(target.shape, np.float32)
    with np.errstate(invalid="ignore"):
        if scale is not None and target.dtype == np.float32:
            np.divide(target, np.float32(scale), out=back)
        else:
            _widen(target, back)
            if scale is not None:
                np.divide(back, np.float32(scale), out=back)
        return back if dtype == "float32" else _narrow(back, dtype)


def restore_exactly(values: Array, dtype: str, scale: float | None) -> Array:
    """`values` in the dtype of the Hugging Face side; equal dtypes keep their bits."""
    if scale is None and values.dtype == numpy_dtype(dtype):
        return values
    return restore(values, dtype, scale)


def keep_originals(stored: Array, native: Array, back: Array, scale: float | None) -> None:
    """Puts `stored` into `back` where it still converts to the native values, bit for bit."""
    again = np.empty(native.shape, native.dtype)
    convert(stored, again, scale)
    kept = np.empty(back.shape, back.dtype)
    convert(stored, kept, None)
    np.copyto(bits(back), bits(kept), where=bits(again) == bits(native))


def keep_exact(native: Array, back: Array, dtype: str, scale: float) -> None:
    """Where a value of `dtype`, the original's, gives the native one, it is what comes back.

    A float32 quotient of such a product may be off in its last bit.
    """
    if back.dtype != numpy_dtype(dtype):
        keep_originals(restore(native, dtype, scale), native, back, scale)


def count_rounded(values: Array, back: Array, scale: float | None) -> int:
    """How many native `values` do not give themselves again when `back` is converted once more."""
    if scale is None and values.dtype == back.dtype:
        return 0
    again = np.empty(values.shape, values.dtype)
    convert(back, again, scale)
    return int(np.count_nonzero(bits(again) != bits(values)))


def may_lose(source: str, target: str, scale: float | None) -> bool:
    """Whether some value of dtype `source` may not come back from `target`."""
    return scale is not None or not exact(source, target)


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Boxes of an array, in C order and without gaps, each small enough for the cache."""
    steps = list(shape)
    for axis in range(len(shape)):
        inner = prod(shape[axis + 1 :])
        steps[axis] = min(shape[axis], max(1, PIECE_VALUES // max(1, inner)))
        if steps[axis] > 1:
            break
    starts = [range(0, size, max(1, step)) for size, step in zip(shape, steps, strict=True)]
    for place in itertools.product(*starts):
        ends = (min(at + step, size) for at, step, size in zip(place, steps, shape, strict=True))
        yield tuple(map(slice, place, ends))


def lost_places(source: Array, target: Array, scale: float | None) -> Array:
    """Places [count, dimensions] whose bits do not come back from `target`."""
    back = restore(target, source.dtype.name, scale)
    return np.argwhere(bits(back) != bits(source))


def bits(array: Array) -> Array:
    """The array as unsigned integers of the same width."""
    return array.view(f"u{array.dtype.itemsize}")


def _widen(source: Array, target: Array) -> None:
    """float32 target = source of any width; the bits of bfloat16 and float32 are kept."""
    if source.dtype == numpy_dtype("bfloat16"):
        np.left_shift(bits(source), 16, out=bits(target), dtype=np.uint32, casting="unsafe")
    elif source.dtype == np.float32:
        _copy_bits(bits(source), bits(target))
    else:
        target[...] = source


def _narrow(source: Array, dtype: str) -> Array:
    """float32 in a narrower dtype; a NaN that was a bfloat16 is it again, with its payload."""
    with np.errstate(over="ignore"):  # who asks counts what is not the same
        narrow = source.astype(numpy_dtype(dtype))
    nan = np.isnan(source)
    if dtype == "bfloat16" and nan.any():
        payload = nan & (bits(source) & 0xFFFF == 0)
        bits(narrow)[payload] = bits(source)[payload] >> 16
    return narrow


def _copy_bits(source: Array, target: Array) -> None:
    """target = source, matrix by matrix where the fastest axes of the two differ."""
    shape = _merged_shape(source, target)
    source, target = source.reshape(shape), target.reshape(shape)
    row, column = _fastest(target), _fastest(source)
    if row is None or column is None or row == column or shape[row] * shape[column] < _SMALL:
        np.copyto(target, source)
        return
    others: list[Sequence[Any]] = [
        (slice(None),) if axis in {row, column} else range(n) for axis, n in enumerate(shape)
    ]
    scratch = np.empty((_TILE_ROWS, _TILE_ROW_BYTES // target.itemsize + _TILE_GAP), target.dtype)
    for place in itertools.product(*others):
        pair = source[place], target[place]
        _transpose(*(pair if row < column else (pair[0].T, pair[1].T)), scratch)


def _transpose(source: Array, target: Array, scratch: Array) -> None:
    """target = source, two matrices; rows of the source and columns of the target are contiguous.

    Strips of rows go into `scratch` as they are and are turned there: rows that lie a power of two
    apart would drive one another out of the processor's cache.
    """
    width = scratch.shape[1] - _TILE_GAP
    for left in range(0, source.shape[1], width):
        for top in range(0, source.shape[0], _TILE_ROWS):
            tile = slice(top, top + _TILE_ROWS), slice(left, left + width)
            part = source[tile]
            strip = scratch[: part.shape[0], : part.shape[1]]
            np.copyto(strip, part)
            np.copyto(target[tile], strip)


def _merged_shape(source: Array, target: Array) -> list[int]:
    """The shape with every two axes made one that lie one inside the other in both arrays."""
    shape: list[int] = []
    outer: tuple[int, ...] = ()
    for length, *steps in zip(source.shape, source.strides, target.strides, strict=True):
        if length == 1:
            continue
        if shape and outer == tuple(step * length for step in steps):
            shape[-1] *= length
        else:
            shape.append(length)
        outer = tuple(steps)
    return shape


def _fastest(array: Array) -> int | None:
    """The axis whose neighbours lie next to each other in memory; None for a scalar."""
    long = [axis for axis in range(array.ndim) if array.shape[axis] > 1]
    return min(long, key=lambda axis: abs(array.strides[axis]), default=None)
