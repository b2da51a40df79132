"""Runs a plan: reads each source tensor once, in file order, in bounded blocks; writes regions.

One thread reads and takes checksums; a small pool transposes, casts and hands regions to the
writer. Buffers are few and reused, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, Protocol

import numpy as np
import xxhash

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.engine.casting import Losses
from gemma_convert.mapping.plan import Plan, SourceTensor
from gemma_convert.mapping.region import Box, Ranges, RegionCopy, blocks, selection, slices
from gemma_convert.progress import Progress
from gemma_convert.stores.orbax.writer import write_error

WORKERS = 2
SOURCE_BUFFERS = 3
TARGET_BUFFERS = 3


class BlockReader(Protocol):
    """Something that gives blocks of the source tensors of a plan."""

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` (bytes) with the block that begins at byte `offset` of the tensor."""

    def in_order(self, name: str) -> bool:
        """Whether the blocks of a source come in the order of its bytes: it has a checksum then."""

    def check_unchanged(self) -> None:
        """Raises SourceError where the source has changed since it was opened."""


class HuggingFaceTensors(BlockReader, Protocol):
    """The tensors of a Hugging Face checkpoint, in whatever form they are stored."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name → spec of every tensor, in file order."""

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one is asked for."""


class Writer(Protocol):
    """A store that takes regions: `write` gives a future of the commit."""

    def write(self, name: str, box: Box, values: Array) -> Any: ...


class Values(Protocol):
    """What happens to values on their way."""

    @property
    def losses(self) -> dict[str, Losses]:
        """Source tensors with values that do not come back."""

    def fill(
        self, copy: RegionCopy, ranges: Ranges, part: Array, values: Array, source: SourceTensor
    ) -> None:
        """Fills `values` with what `part` becomes; both have the target's order of free axes."""

    def notes(self, name: str) -> dict[str, int] | None:
        """What is to be known of a finished source; None where it must be read again."""

    def take(self, name: str, notes: Mapping[str, int]) -> None:
        """Takes over the notes of an earlier run on a source that it had finished."""


class _Buffers:
    """A fixed number of reusable buffers of one size, whose memory is taken when they are used.

    One that grew would leave holes in the heap behind it.
    """

    def __init__(self, count: int, size: int) -> None:
        self._free: queue.LifoQueue[Array] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(np.empty(size, np.uint8))

    def take(self) -> Array:
        """The free buffer that was used last; waits for one."""
        return self._free.get()

    def give(self, buffer: Array) -> None:
        self._free.put(buffer)


class Transfer:
    """Runs one plan from a reader into a writer; `values` says what happens on the way.

    `finished(name, checksum)` is called when all regions of a source tensor are committed, except
    for those that go into gathered targets.
    """

    def __init__(
        self,
        plan: Plan,
        reader: BlockReader,
        writer: Writer,
        values: Values,
        progress: Progress,
        finished: Callable[[str, str], None] | None = None,
    ) -> None:
        self.plan, self.reader, self.writer = plan, reader, writer
        self.values, self.progress, self._finished = values, progress, finished
        self._open: Counter[str] = Counter()
        self.checksums: dict[str, str] = {}
        read, written = largest_blocks(plan)
        self._sources = _Buffers(SOURCE_BUFFERS, read)
        self._targets = _Buffers(TARGET_BUFFERS, written)
        self._gathered: dict[str, tuple[Array, int]] = {}
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._failure: BaseException | None = None
        self._pending: set[Any] = set()

    def run(self) -> dict[str, str]:
        """Checksums (xxh3_128) of the source tensors, when every region is committed.

        One that is not read in the order of its bytes has an empty one.

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
        return self.checksums

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
        digest, offset, ordered = xxhash.xxh3_128(), 0, self.reader.in_order(name)
        self._hold(name)
        for ranges in blocks(source.region, source.steps):
            size = prod(source.region.lengths(ranges)) * source.spec.itemsize
            buffer = self._sources.take()
            piece = buffer[:size]
            self.reader.read_block(source, ranges, offset, piece)
            if ordered:
                digest.update(piece.data)
            offset += size
            self._hold(name)
            yield ranges, buffer
            self.progress.advance(size, name)
        self.checksums[name] = digest.hexdigest() if ordered else ""
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
            self.plan.targets[copy.target.tensor].gathered
            for copy in self.plan.sources[name].copies
        )
        if ended and self._finished and not gathered:
            self._finished(name, self.checksums[name])

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
            for part in copy.parts(ranges):
                values = block[selection(copy, ranges, part)].transpose(copy.permutation)
                self._write(copy, part, values, source)

    def _write(self, copy: RegionCopy, ranges: Ranges, part: Array, source: SourceTensor) -> None:
        target = self.plan.targets[copy.target.tensor]
        dtype = numpy_dtype(target.spec.dtype)
        box = copy.target.box(ranges)
        shape = tuple(length for _, length in box)
        if target.gathered:
            values = np.empty(part.shape, dtype)
            self.values.fill(copy, ranges, part, values, source)
            self._gather(copy, target.spec.shape, box, values.reshape(shape))
            return
        size = part.size * dtype.itemsize
        buffer = self._targets.take()
        try:
            values = buffer[:size].view(dtype).reshape(part.shape)
            self.values.fill(copy, ranges, part, values, source)
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
            whole[slices(box)] = values
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

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._failed.set()


def largest_blocks(plan: Plan) -> tuple[int, int]:
    """Bytes of the largest block that is read, and of the largest that is written at once."""
    read = written = 0
    for source in plan.sources.values():
        first = {axis: (0, step) for axis, step in source.steps.items()}
        count = prod(source.region.lengths(first))
        read = max(read, count * source.spec.itemsize)
        targets = (plan.targets[copy.target.tensor] for copy in source.copies)
        sizes = (count * target.spec.itemsize for target in targets if not target.gathered)
        written = max(written, *sizes, 0)
    return read, written
