"""Memory that is used again and again: fresh pages cost more than the copy that fills them."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np

from gemma_convert.arrays.values import Array


class ThreadBuffer:
    """One buffer for each thread that asks."""

    def __init__(self) -> None:
        self._local = threading.local()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array with any values, good until this thread asks for the next one."""
        size = prod(shape) * dtype.itemsize
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < size:
            self._local.buffer = buffer = np.empty(size, np.uint8)
        array: Array = buffer[:size].view(dtype).reshape(shape)
        return array
