"""Writes safetensors shards region by region: header first, space reserved, then values in place.

Shards are mapped, so that a part of a tensor may be written in any layout; written pages are let go
soon, and space is reserved beforehand, since a full disk kills a process that writes through a map.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.files.new_file import MODE
from gemma_convert.stores.safetensors.header import (
    StoredTensor,
    library_order,
    parse_header,
    safetensors_header,
)

LET_GO_BYTES = 32 << 20


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
        self._maps: dict[str, mmap.mmap] = {}
        self._descriptors: dict[str, int] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._written = 0
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

    def write(self, name: str, start: int, values: Array) -> None:
        """Writes contiguous `values` over the tensor's elements from `start` on."""
        tensor = self._tensors[name]
        data = values.reshape(-1).view(np.uint8).data
        place = tensor.start + start * tensor.spec.itemsize
        while data:
            count = os.pwrite(self._descriptors[tensor.file], data, place)
            data, place = data[count:], place + count

    def let_go(self, count: int) -> None:
        """Says that `count` bytes more were written; now and then their pages are let go."""
        self._written += count
        if self._written >= LET_GO_BYTES:
            self._written = 0
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
