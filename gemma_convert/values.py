"""Values on their way: cast and scaled without a silent change, and checked by going back.

bfloat16 → float32 is a shift of bits, since a library's cast may flush denormals or rewrite NaNs. A
scaled value is multiplied in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_convert.dtypes import exact, numpy_dtype

Array = NDArray[Any]

_TILE = 256


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
    _widen(target, back)
    with np.errstate(invalid="ignore"):
        if scale is not None:
            np.divide(back, np.float32(scale), out=back)
        return back if dtype == "float32" else back.astype(numpy_dtype(dtype))


def restore_exactly(values: Array, dtype: str, scale: float | None) -> Array:
    """`values` in the dtype of the Hugging Face side; equal dtypes keep their bits."""
    if scale is None and values.dtype == numpy_dtype(dtype):
        return values
    return restore(values, dtype, scale)


def keep_originals(stored: Array, native: Array, back: Array, scale: float | None) -> None:
    """Puts `stored` into `back` where it still converts to the native values, bit for bit."""
    again = np.empty(native.shape, native.dtype)
    convert(stored, again, scale)
    np.copyto(bits(back), bits(stored), where=bits(again) == bits(native))


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


def _copy_bits(source: Array, target: Array) -> None:
    """target = source, in tiles where the fastest axes of the two differ."""
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        np.copyto(target, source)
        return
    fast = min(range(source.ndim), key=lambda axis: (abs(source.strides[axis]), -axis))
    for at in range(0, source.shape[fast], _TILE):
        rows = [slice(None)] * source.ndim
        rows[fast] = slice(at, at + _TILE)
        for column in range(0, source.shape[-1], _TILE):
            rows[-1] = slice(column, column + _TILE)
            np.copyto(target[tuple(rows)], source[tuple(rows)])
