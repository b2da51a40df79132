"""Writes safetensors shards region by region: header first, space reserved, then values in place.

Shards are mapped, so that a part of a tensor may be written in any layout; written pages are let go
soon, and space is reserved beforehand, since a full disk kills a process that writes through a map.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma_convert.arrays.checksums import checksum
from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array, bits
from gemma_convert.files.new_file import MODE
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.files.write_out import start_write_out
from gemma_convert.mapping.region import Box, runs, slices
from gemma_convert.stores.safetensors.header import (
    StoredTensor,
    library_order,
    parse_header,
    safetensors_header,
)

LET_GO_BYTES = 32 << 20

SHORT_RUN_BYTES = 4 << 10
"""Shorter pieces are written through the map: a call of the system for each would cost more."""


@dataclass(frozen=True)
class OutputShard:
    """One file to be written: its header, length word included, and where its tensors lie."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.spec.nbytes for tensor in self.tensors)


def output_shard(
    file: str,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
    stored: Mapping[str, str] | None = None,
) -> OutputShard:
    """One file with its tensors in the order of the safetensors library.

    `stored` has the names that tensors have in the file, where they are not those of `specs`.
    """
    names = {(stored or {}).get(name, name): name for name in specs}
    ordered = library_order({in_file: specs[name] for in_file, name in names.items()})
    header = safetensors_header(ordered, metadata)
    size = len(header) + sum(spec.nbytes for spec in ordered.values())
    tensors = parse_header(header, size, file, Path(file))
    return OutputShard(file, header, tuple(replace(t, name=names[t.name]) for t in tensors))


class SafetensorsWriter:
    """Open shards that take values; use as a context manager. A full disk is an OSError."""

    def __init__(self, folder: Path, shards: Sequence[OutputShard]) -> None:
        self.regions: dict[str, dict[Box, str]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._descriptors: dict[str, int] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._headers = {folder / shard.file: len(shard.header) for shard in shards}
        self._written = 0
        self._lock = threading.Lock()
        try:
            for shard in shards:
                self._open(folder, shard)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, folder: Path, shard: OutputShard) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(folder / shard.file, flags, MODE)
        self._descriptors[shard.file] = descriptor
        os.pwrite(descriptor, shard.header, 0)
        os.ftruncate(descriptor, shard.size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, shard.size)
        self._maps[shard.file] = mmap.mmap(descriptor, shard.size)
        self._tensors |= {tensor.name: tensor for tensor in shard.tensors}

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):  # an array in a traceback keeps its map open
                mapped.close()

    def spec(self, name: str) -> TensorSpec:
        return self._tensors[name].spec

    def array(self, name: str) -> Array:
        """The tensor in its file, writable. Drop it before the writer is closed."""
        tensor = self._tensors[name]
        flat = np.frombuffer(
            self._maps[tensor.file], np.uint8, count=tensor.spec.nbytes, offset=tensor.start
        )
        return flat.view(numpy_dtype(tensor.spec.dtype)).reshape(tensor.spec.shape)

    def write(self, name: str, box: Box, values: Array) -> Future[None]:
        """Writes `values` [lengths of `box`], which are contiguous: long runs one by one."""
        self.regions.setdefault(name, {})[box] = checksum(values)
        tensor = self._tensors[name]
        run, places = runs(box, tensor.spec.shape)
        if run * values.itemsize < SHORT_RUN_BYTES:
            bits(self.array(name))[slices(box)] = bits(values)
            self._let_go(values.nbytes)
        else:
            flat = values.reshape(-1)
            for number, place in enumerate(places):
                self._put(tensor, place, flat[number * run : (number + 1) * run])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def holds(self, name: str, regions: Mapping[Box, str]) -> bool:
        """Whether the regions of a tensor have these checksums; if so they count as written."""
        array = self.array(name)
        for box, expected in regions.items():
            part = array[slices(box)]
            if checksum(part) != expected:
                return False
            self._let_go(part.nbytes)
        self.regions.setdefault(name, {}).update(regions)
        return True

    def complete(self, started_ns: int, parts: int = 1) -> None:
        """Files whose headers stand need nothing more."""

    def value_file(self, path: Path) -> ValuesFrom | None:
        """Where the values of tensors begin in one of the files; None for any other file."""
        return ValuesFrom(self._headers[path]) if path in self._headers else None

    def array_metadata(self) -> dict[str, str]:
        """Nothing: what is said of tensors stands in the headers."""
        return {}

    def _put(self, tensor: StoredTensor, start: int, values: Array) -> None:
        data = values.view(np.uint8).data
        place = tensor.start + start * tensor.spec.itemsize
        descriptor = self._descriptors[tensor.file]
        with self._lock:  # the system lets one write to a file at a time, and others spin
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], place + done)
        start_write_out(descriptor, place, len(data))

    def _let_go(self, count: int) -> None:
        """Says that `count` bytes more were written; now and then their pages are let go."""
        self._written += count
        if self._written >= LET_GO_BYTES:
            self._written = 0
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
