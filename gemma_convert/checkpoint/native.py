"""A native checkpoint as a source: its arrays under the names of its table, read by region."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

from gemma_convert.arrays.buffers import ThreadBuffer
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.original import Original
from gemma_convert.errors import SourceError
from gemma_convert.mapping.plan import BLOCK_BYTES, Plan, plan_to_native
from gemma_convert.mapping.region import Box, Extent, Ranges, RegionCopy, selection
from gemma_convert.mapping.table import load_table
from gemma_convert.stores.remote.mirror import remote_fingerprint

WORKERS, MOST_WAITING = 2, 8


class StoredArray(Protocol):
    """One open array of a store: its spec, and the chunk that is decoded at once."""

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def chunk(self) -> tuple[int, ...]: ...

    def read(self, box: Box, into: Array | None = None) -> Array:
        """The values in `box`, a new array or `into`; SourceError where they cannot be read."""


@dataclass(frozen=True)
class NativeSource:
    """The arrays of a native checkpoint: name in the table → spec, and chunk.

    `opener(name, cache_bytes)` opens one, parts of up to `block_bytes` are read at once,
    `fingerprint` is that of its folder when it was opened, and `beside` are arrays that are no
    parameters. Use as a context manager.
    """

    layout: str
    folder: Path
    specs: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[int, ...]]
    opener: Callable[[str, int], StoredArray]
    scanned: bool
    beside: tuple[str, ...] = ()
    block_bytes: int | None = None
    fingerprint: str = ""
    release: Callable[[], None] = lambda: None

    def __enter__(self) -> NativeSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check_unchanged(self) -> None:
        """Raises SourceError where the checkpoint has changed since it was opened."""
        if fingerprint(self.folder, now=True) != self.fingerprint:
            raise SourceError(
                "The source changed while it was read.",
                where=self.folder,
                do="leave the source alone until the conversion ends, then start again",
            )

    @property
    def towers(self) -> bool:
        """Whether the vision or audio tower is in the checkpoint."""
        return any(load_table(self.layout).in_tower(name) for name in self.specs)

    def without_towers(self) -> NativeSource:
        """The source without its vision and audio towers."""
        table = load_table(self.layout)
        text = {name: spec for name, spec in self.specs.items() if not table.in_tower(name)}
        return replace(self, specs=text)

    def largest_chunk(self, names: Sequence[str]) -> int:
        """Bytes of the largest chunk of the named arrays; a chunk is decoded at once."""
        sizes = (prod(self.chunks[name]) * self.specs[name].itemsize for name in names)
        return max(sizes, default=0)

    def open_whole(self, name: str, cache_bytes: int) -> StoredArray:
        """One array, to be read in any boxes."""
        return self.opener(name, cache_bytes)

    def open(self, name: str, copies: list[RegionCopy]) -> NativeArray:
        """One array, to be read region by region as `copies` (native side: target) need it."""
        array = self.opener(name, 0)
        reading = _Reading(copies, array, self.block_bytes or BLOCK_BYTES)
        if reading.cache_bytes:
            array = self.opener(name, reading.cache_bytes)
        return NativeArray(array, reading)


@dataclass(frozen=True)
class NativeArray:
    """One open array and the ranges in which it is read."""

    array: StoredArray
    reading: _Reading

    def ranges(self) -> Iterator[Ranges]:
        return self.reading.ranges()

    def read(self, box: Box, buffer: ThreadBuffer) -> Array:
        """The values in `box`, in the thread's buffer; SourceError where they cannot be read."""
        shape = tuple(length for _, length in box)
        return self.array.read(box, buffer.array(shape, numpy_dtype(self.array.spec.dtype)))


class _Reading:
    """How an array is cut for reading: along whole chunks, so that each is decoded once."""

    def __init__(self, copies: list[RegionCopy], array: StoredArray, limit: int) -> None:
        dims = copies[0].target.dims
        shape, chunk = array.spec.shape, array.chunk
        self._steps: dict[str, tuple[int, int]] = {}
        lengths = []
        for extents, size, step in zip(dims, shape, chunk, strict=True):
            cut = _cut(extents, min(step, size))
            if cut is not None:
                axis, inner, count = cut
                self._steps[axis.axis] = (count, axis.size)
                lengths.append(count * inner)
            else:
                free = prod(extent.size for extent in extents if extent.at is None)
                lengths.append(free)
        shared = any(
            any(extent.at is not None for extent in extents) and step > 1 and len(extents) == 1
            for extents, step in zip(dims, chunk, strict=True)
        )
        if not shared:
            self._grow(dims, lengths, array.spec.itemsize, limit)
        slab = prod(
            self._steps[extents[0].axis][0] if len(extents) == 1 and extents[0].at is None else size
            for extents, size in zip(dims, shape, strict=True)
        )
        self.cache_bytes = slab * array.spec.itemsize + (1 << 20) if shared else 0

    def _grow(self, dims: Any, lengths: list[int], itemsize: int, limit: int) -> None:
        """Takes several chunks at once, while they stay within a block."""
        for place in reversed(range(len(dims))):
            cut = _cut(dims[place], lengths[place])
            if cut is None:
                continue
            axis, inner, _ = cut
            step, size = self._steps[axis.axis]
            others = prod(lengths[:place] + lengths[place + 1 :]) * itemsize * inner
            count = max(1, limit // max(1, others * step))
            step = min(size, step * count)
            self._steps[axis.axis] = (step, size)
            lengths[place] = step * inner

    def ranges(self) -> Iterator[Ranges]:
        spans = [
            [(start, min(start + step, size)) for start in range(0, size, step)]
            for step, size in self._steps.values()
        ]
        for combination in itertools.product(*spans):
            yield dict(zip(self._steps, combination, strict=True))


def _cut(extents: tuple[Extent, ...], step: int) -> tuple[Extent, int, int] | None:
    """Where a dimension is cut: its first free axis, the length below it, and how many at a time.

    `step` is the length of a chunk. None where chunks and values of that axis do not line up.
    """
    place = next((at for at, extent in enumerate(extents) if extent.at is None), None)
    if place is None:
        return None
    below = extents[place + 1 :]
    inner = prod(extent.size for extent in below)
    aligned = bool(inner and step) and not (step % inner and inner % step)
    if any(extent.at is not None for extent in below) or not aligned:
        return None
    return extents[place], inner, min(max(1, step // inner), extents[place].size)


def plan_native(native: NativeSource, original: Original) -> Plan:
    """The plan that makes the native tree from the original; read from right to left it exports.

    Raises SourceError where the tree is not that of the original's config.json.
    """
    plan = plan_to_native(
        original.architecture,
        load_table(native.layout),
        original.specs,
        DTypePolicy(),
        scanned=native.scanned,
        text_only=not native.towers,
        block_bytes=native.block_bytes,
        where=str(original.folder),
    )
    missing = [name for name in plan.targets if name not in native.specs]
    unknown = [name for name in native.specs if name not in plan.targets]
    if missing or unknown:
        raise SourceError(
            "The native tree is not that of the original's config.json.",
            where=f"{native.folder} and {original.folder}",
            expected=f"{len(plan.targets)} arrays" + (f", such as {missing[0]}" if missing else ""),
            found=f"{len(native.specs)} arrays" + (f", such as {unknown[0]}" if unknown else ""),
            do="name the Hugging Face checkpoint of the same model with --like",
        )
    for name, planned in plan.targets.items():
        if native.specs[name].shape != planned.spec.shape:
            raise SourceError(
                "The native tree is not that of the original's config.json: a shape differs.",
                where=f"{native.folder}, array {name}",
                expected=list(planned.spec.shape),
                found=list(native.specs[name].shape),
                do="name the Hugging Face checkpoint of the same model with --like",
            )
    return plan


def fingerprint(folder: Path, *, now: bool = False) -> str:
    """A digest of the names, sizes and times of all files below `folder`.

    Of an object store it is as it was listed, or, at some cost, as it is `now`.
    """
    remote = remote_fingerprint(folder, now=now)
    if remote is not None:
        return remote
    found = []
    for root, _, files in os.walk(folder):
        for file in files:
            path = Path(root, file)
            status = path.lstat()
            found.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


Action = Callable[[RegionCopy, Ranges, Array], None]


def copies_by_array(plan: Plan) -> dict[str, list[RegionCopy]]:
    """Native array → the copies that it takes part in."""
    groups: dict[str, list[RegionCopy]] = {}
    for copy in plan.copies:
        groups.setdefault(copy.target.tensor, []).append(copy)
    return groups


def for_each_part(
    native: NativeSource,
    groups: Mapping[str, list[RegionCopy]],
    action: Action,
    finished: Callable[[str], None] | None = None,
) -> None:
    """Calls `action(copy, ranges, values)` for every part of every array, on a few threads.

    `groups` has the copies of each array, whose native side is their target; `values` has one
    dimension for each free axis of that side and lasts as long as the call. Every chunk is decoded
    once. `finished(name)` is
    called when all parts of an array are done.
    """

    buffer = ThreadBuffer()

    def run(array: NativeArray, copy: RegionCopy, ranges: Ranges) -> None:
        values = array.read(copy.target.box(ranges), buffer)
        action(copy, ranges, values.reshape(copy.target.lengths(ranges)))

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="native") as pool:
        jobs: set[Future[None]] = set()
        waiting: list[str] = []
        for name, copies in groups.items():
            array = native.open(name, copies)
            for ranges in array.ranges():
                for copy in copies:
                    jobs = _finish(jobs, WORKERS)
                    jobs.add(pool.submit(run, array, copy, ranges))
            waiting.append(name)
            if array.reading.cache_bytes or len(waiting) > MOST_WAITING:
                jobs, waiting = _finish(jobs, 0), _tell(waiting, finished)
        _finish(jobs, 0)
        _tell(waiting, finished)


def _tell(names: list[str], finished: Callable[[str], None] | None) -> list[str]:
    if finished is not None:
        for name in names:
            finished(name)
    return []


def _finish(jobs: set[Future[None]], most: int) -> set[Future[None]]:
    """Waits until at most `most` jobs are under way; raises what a job raised."""
    while len(jobs) > most:
        done, jobs = wait(jobs, return_when=FIRST_COMPLETED)
        for job in done:
            job.result()
    return jobs


def source_part(copy: RegionCopy, ranges: Ranges, tensor: Array) -> Array:
    """The part of a Hugging Face tensor that `copy` and `ranges` take, in the native order of axes.

    `tensor` may be a block of the whole one, as long as `ranges` counts from its beginning.
    """
    sizes = [extent.size for extent in copy.source.extents]
    if sizes and tensor.shape and tensor.size != prod(sizes):
        sizes[0] = tensor.size // prod(sizes[1:])
    part: Array = tensor.reshape(sizes)[selection(copy, {}, ranges)]
    return part.transpose(copy.permutation)
