"""Runs a plan: reads each source tensor once, in file order, in bounded blocks; writes regions.

One thread reads and takes checksums; a small pool transposes, casts and hands regions to the
writer. Buffers are few and reused, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np
import xxhash

from gemma_convert.arrays.dtypes import numpy_dtype
from gemma_convert.arrays.values import Array, bits, convert, lost_places, may_lose
from gemma_convert.mapping.plan import GATHER_BYTES, Plan, SourceTensor
from gemma_convert.mapping.region import Box, Ranges, RegionCopy, blocks, selection
from gemma_convert.output import Progress
from gemma_convert.stores.orbax.writer import write_error

WORKERS = 2
SOURCE_BUFFERS = 3
TARGET_BUFFERS = 4

EXCEPTION_SHARE = 0.01
"""Above this share of values that do not come back, a tensor's original is carried whole."""


class BlockReader(Protocol):
    """Something that gives blocks of Hugging Face tensors, in the order of their bytes."""

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` (bytes) with the block that begins at byte `offset` of the tensor."""

    def check_unchanged(self) -> None:
        """Raises SourceError where the source has changed since it was opened."""


class Writer(Protocol):
    """A store that takes regions: `write` gives a future of the commit."""

    def write(self, name: str, box: Box, values: Array) -> Any: ...


@dataclass
class Losses:
    """Values of one source tensor that do not come back bit for bit from its target."""

    count: int = 0
    places: list[Array] = field(default_factory=list)
    originals: list[Array] = field(default_factory=list)
    whole: bool = False
    """Too many to list, so that the original is carried whole."""


@dataclass
class TransferResult:
    """Checksums (xxh3_128) of the source tensors, and the losses of those that have any."""

    checksums: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)


class _Buffers:
    """A fixed number of reusable buffers; `take` waits for a free one."""

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[Array] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(np.empty(0, np.uint8))

    def take(self, size: int) -> Array:
        buffer = self._free.get()
        return buffer if buffer.size >= size else np.empty(size, np.uint8)

    def give(self, buffer: Array) -> None:
        self._free.put(buffer)


class Transfer:
    """Runs one plan from an open safetensors folder into a writer.

    `finished(name, checksum)` is called when all regions of a source tensor are committed, except
    for those that go into gathered targets. Values that do not come back are listed with their
    original bits; where the dtype policy rounds a tensor by its nature (`plan.rounded`) they are
    only counted.
    """

    def __init__(
        self,
        plan: Plan,
        reader: BlockReader,
        writer: Writer,
        progress: Progress,
        finished: Callable[[str, str], None] | None = None,
    ) -> None:
        self.plan, self.reader, self.writer = plan, reader, writer
        self.progress, self._finished = progress, finished
        self._open: Counter[str] = Counter()
        self.result = TransferResult()
        self._sources, self._targets = _Buffers(SOURCE_BUFFERS), _Buffers(TARGET_BUFFERS)
        self._gathered: dict[str, tuple[Array, int]] = {}
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._failure: BaseException | None = None
        self._pending: set[Any] = set()

    def run(self) -> TransferResult:
        """Checksums and losses, when every region is committed.

        Raises SourceError where the source cannot be read or changes, TargetError where the target
        cannot be written.
        """
        try:
            with ThreadPoolExecutor(WORKERS, thread_name_prefix="transfer") as pool:
                for name, source in self.plan.sources.items():
                    for ranges, buffer in self._read(name, source):
                        pool.submit(self._guarded, source, ranges, buffer)
                        if self._failure is not None:
                            raise self._failure
        except BaseException as error:
            self._fail(error)
        self._drain()
        if self._failure is not None:
            raise self._failure
        self.reader.check_unchanged()
        return self.result

    def _drain(self) -> None:
        """Waits until no write is under way, so that nothing writes behind our back."""
        while True:
            with self._lock:
                waiting = list(self._pending)
            if not waiting:
                return
            for future in waiting:
                with contextlib.suppress(Exception):
                    future.result()

    def _read(self, name: str, source: SourceTensor) -> Iterator[tuple[Ranges, Array]]:
        digest, offset = xxhash.xxh3_128(), 0
        self._hold(name)
        for ranges in blocks(source.region, source.steps):
            size = prod(source.region.lengths(ranges)) * source.spec.itemsize
            buffer = self._sources.take(size)
            piece = buffer[:size]
            self.reader.read_block(source, ranges, offset, piece)
            digest.update(piece.data)
            offset += size
            self._hold(name)
            yield ranges, buffer
            self.progress.advance(size, name)
        self.result.checksums[name] = digest.hexdigest()
        self._release(name)

    def _hold(self, name: str) -> None:
        """One thing more must end before a source tensor is finished."""
        with self._lock:
            self._open[name] += 1

    def _release(self, name: str) -> None:
        with self._lock:
            self._open[name] -= 1
            ended = not self._open[name] and not self._failed.is_set()
        gathered = any(
            self.plan.targets[copy.target.tensor].spec.nbytes <= GATHER_BYTES
            for copy in self.plan.sources[name].copies
        )
        if ended and self._finished and not gathered and name not in self.result.losses:
            self._finished(name, self.result.checksums[name])

    def _guarded(self, source: SourceTensor, ranges: Ranges, buffer: Array) -> None:
        try:
            if not self._failed.is_set():
                self._convert(source, ranges, buffer)
        except BaseException as error:
            self._fail(error)
        finally:
            self._sources.give(buffer)
            self._release(source.region.tensor)

    def _convert(self, source: SourceTensor, ranges: Ranges, buffer: Array) -> None:
        lengths = source.region.lengths(ranges)
        dtype = numpy_dtype(source.spec.dtype)
        block = buffer[: prod(lengths) * dtype.itemsize].view(dtype).reshape(lengths)
        for copy in source.copies:
            if copy.source.meets(ranges):
                part = block[selection(copy, ranges)].transpose(copy.permutation)
                self._write(copy, ranges, part, source)

    def _write(self, copy: RegionCopy, ranges: Ranges, part: Array, source: SourceTensor) -> None:
        target = self.plan.targets[copy.target.tensor].spec
        dtype = numpy_dtype(target.dtype)
        box = copy.target.box(ranges)
        shape = tuple(length for _, length in box)
        if target.nbytes <= GATHER_BYTES:
            values = np.empty(part.shape, dtype)
            convert(part, values, copy.scale)
            self._note_losses(copy, ranges, part, values, source)
            self._gather(copy, target.shape, box, values.reshape(shape))
            return
        size = part.size * dtype.itemsize
        buffer = self._targets.take(size)
        try:
            values = buffer[:size].view(dtype).reshape(part.shape)
            convert(part, values, copy.scale)
            self._note_losses(copy, ranges, part, values, source)
            future = self.writer.write(copy.target.tensor, box, values.reshape(shape))
        except BaseException:
            self._targets.give(buffer)
            raise
        self._follow(future, copy, buffer)

    def _gather(self, copy: RegionCopy, shape: tuple[int, ...], box: Box, values: Array) -> None:
        """Puts a part into a small target, and writes the target when its last part is there."""
        name = copy.target.tensor
        with self._lock:
            whole, missing = self._gathered.pop(name, (np.empty(shape, values.dtype), prod(shape)))
            whole[tuple(slice(at, at + length) for at, length in box)] = values
            missing -= values.size
            if missing:
                self._gathered[name] = whole, missing
                return
        everything = tuple((0, length) for length in shape)
        self._follow(self.writer.write(name, everything, whole), copy, None)

    def _follow(self, future: Any, copy: RegionCopy, buffer: Array | None) -> None:
        """Gives the buffer back when the write is committed, and notes a failure."""
        self._hold(copy.source.tensor)
        with self._lock:
            self._pending.add(future)

        def done(finished: Any) -> None:
            error = finished.exception()
            if error is not None:
                self._fail(write_error(error, copy.target.tensor))
            if buffer is not None:
                self._targets.give(buffer)
            self._release(copy.source.tensor)
            with self._lock:
                self._pending.discard(future)

        future.add_done_callback(done)

    def _note_losses(
        self, copy: RegionCopy, ranges: Ranges, part: Array, values: Array, source: SourceTensor
    ) -> None:
        if not may_lose(source.spec.dtype, values.dtype.name, copy.scale):
            return
        places = lost_places(part, values, copy.scale)
        if not len(places):
            return
        with self._lock:
            losses = self.result.losses.setdefault(copy.source.tensor, Losses())
            losses.count += len(places)
            if losses.whole or copy.source.tensor in self.plan.rounded:
                return
            if losses.count > EXCEPTION_SHARE * source.spec.size:
                losses.whole = True
                losses.places.clear()
                losses.originals.clear()
                return
            losses.places.append(_flat_places(copy, ranges, places, source))
            losses.originals.append(bits(part)[tuple(places.T)])

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._failed.set()


def _flat_places(copy: RegionCopy, ranges: Ranges, places: Array, source: SourceTensor) -> Array:
    """Places in the target's order of axes → flat indices into the source tensor."""
    by_axis = dict(zip(copy.target.axes, places.T, strict=True))
    flat = np.zeros(len(places), np.int64)
    for extent in copy.source.extents:
        start = extent.range(ranges)[0]
        value = start + by_axis[extent.axis] if extent.at is None else extent.at
        flat = flat * extent.size + value
    return flat
