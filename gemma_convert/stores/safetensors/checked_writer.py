"""Shards whose tensors have checksums when they are written, most without being read again."""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import xxhash

from gemma_convert.arrays.buffers import ThreadBuffer
from gemma_convert.arrays.values import Array
from gemma_convert.mapping.region import Box, contiguous, flat_place
from gemma_convert.stores.safetensors.writer import OutputShard, SafetensorsWriter

PIECE_BYTES = 4 << 20


class _Running:
    """The checksum of a tensor's bytes up to `position`; `early` has start → end of later ones."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        self.position = 0
        self.early: dict[int, int] = {}
        self.lock = threading.Lock()


class CheckedWriter(SafetensorsWriter):
    """Shards that take values, and have the checksum of each tensor when it is complete.

    Bytes that come in their order are counted on their way. Those that come before their turn, or
    in pieces apart, are read again from the file, which is still in the system's cache.
    """

    def __init__(self, folder: Path, shards: Sequence[OutputShard]) -> None:
        super().__init__(folder, shards)
        self._running: defaultdict[str, _Running] = defaultdict(_Running)
        self._buffer = ThreadBuffer()

    def write(self, name: str, box: Box, values: Array) -> Future[None]:
        """Writes `values` [lengths of `box`], which are contiguous."""
        done = super().write(name, box, values)
        shape, running = self.spec(name).shape, self._running[name]
        if contiguous(box, shape):
            start = flat_place(box, shape) * values.itemsize
            with running.lock:
                if start == running.position:
                    running.digest.update(values.reshape(-1).view(np.uint8).data)
                    running.position += values.nbytes
                    while running.position in running.early:
                        self._read(name, running, running.early[running.position])
                else:
                    running.early[start] = start + values.nbytes
        return done

    def checksum(self, name: str) -> str:
        """xxh3_128 of the whole tensor, which is complete."""
        running = self._running[name]
        with running.lock:
            self._read(name, running, self.spec(name).nbytes)
            return running.digest.hexdigest()

    def _read(self, name: str, running: _Running, end: int) -> None:
        """Counts the bytes up to `end`, from the file."""
        tensor = self._tensors[name]
        while running.position < end:
            size = min(PIECE_BYTES, end - running.position)
            data = self._buffer.array((size,), np.dtype(np.uint8)).data
            place = tensor.start + running.position
            count = os.preadv(self._descriptors[tensor.file], [data], place)
            if not count:
                raise OSError(errno.EIO, "it became shorter while it was written")
            running.digest.update(data[:count])
            running.position += count
