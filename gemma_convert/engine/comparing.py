"""A store that compares: what a conversion would write against what stands there already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from gemma_convert.arrays.values import PIECE_VALUES, Array, bits
from gemma_convert.mapping.region import Box
from gemma_convert.output import counted

Read = Callable[[str, Box], Array]
"""Name and box → the values that stand there."""


@dataclass
class Comparison:
    """What has been compared so far; used from several threads."""

    names: set[str] = field(default_factory=set)
    files: int = 0
    bytes: int = 0
    different: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, name: str, count: int) -> None:
        """A tensor of `count` bytes is compared."""
        with self._lock:
            if name not in self.names:
                self.names.add(name)
                self.bytes += count

    def note_file(self, count: int) -> None:
        """A file of `count` bytes is compared that holds no values of tensors."""
        with self._lock:
            self.files += 1
            self.bytes += count

    def differ(self, name: str, how: str) -> None:
        """Something differs; the first way in which it does is kept."""
        with self._lock:
            self.different.setdefault(name, how)


class Comparing:
    """Takes the regions of a plan, and notes in `found` the arrays in which bits differ."""

    def __init__(self, read: Read, found: Comparison) -> None:
        self._read, self._found = read, found

    def write(self, name: str, box: Box, values: Array) -> Future[None]:
        """Compares `values` with what stands in `box`."""
        present = self._read(name, box)
        self._found.note(name, 0)
        if present.dtype != values.dtype:
            self._found.differ(name, f"has dtype {present.dtype.name} instead of {values.dtype}")
        else:
            count = _different(bits(present).reshape(-1), bits(values).reshape(-1))
            if count:
                where = [start for start, _ in box]
                differ = counted(count, "value differs", "values differ")
                self._found.differ(name, f"{differ} in the region at {where}")
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _different(one: Array, other: Array) -> int:
    """How many values of two flat arrays differ."""
    places = range(0, one.size, PIECE_VALUES)
    cuts = [slice(place, place + PIECE_VALUES) for place in places]
    return sum(int(np.count_nonzero(one[cut] != other[cut])) for cut in cuts)
