"""A native checkpoint as a source: its tree under the names of the tables, read by region.

Accepts what MaxText's converter and its training runs write: parameters below `params.params`
(Linen), or at the root with `.value` leaves (NNX), beside a step and optimizer state that are never
read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from gemma_convert.dtypes import DTypePolicy, TensorSpec, numpy_dtype
from gemma_convert.errors import SourceError
from gemma_convert.mapping.plan import BLOCK_BYTES, Plan, SourceTensor, plan_to_native
from gemma_convert.mapping.region import Box, Ranges, RegionCopy
from gemma_convert.mapping.table import load_table
from gemma_convert.stores.orbax_reader import OrbaxArray, OrbaxTree, open_array, read_orbax_tree
from gemma_convert.stores.original import Original
from gemma_convert.transfer import WORKERS, selection
from gemma_convert.values import Array, convert

OPEN_ARRAYS = 4
MOST_WAITING = 8

PARAMETERS = "params/params/"
_VALUE = "/value"
_RANDOM = "/rngs/"
_MODULES = ("token_embedder/", "decoder/", "vision_encoder/")


@dataclass(frozen=True)
class NativeSource:
    """The arrays of a native tree: name in the tables → spec, and the name they have on disk."""

    tree: OrbaxTree
    specs: Mapping[str, TensorSpec]
    stored: Mapping[str, str]

    @property
    def scanned(self) -> bool:
        return any("/scanned_blocks/" in name for name in self.specs)

    def without(self, module: str) -> NativeSource:
        """The source without one module of the tree, such as `vision_encoder/`."""
        start = PARAMETERS + module
        specs = {name: spec for name, spec in self.specs.items() if not name.startswith(start)}
        return replace(self, specs=specs)

    def largest_chunk(self, names: Sequence[str]) -> int:
        """Bytes of the largest chunk of the named arrays; a chunk is decoded at once."""
        chunks = (self.tree.chunks[self.stored[name]] for name in names)
        return max(
            (prod(c) * self.specs[n].itemsize for n, c in zip(names, chunks, strict=True)),
            default=0,
        )

    def open(self, name: str, copies: list[RegionCopy]) -> NativeArray:
        """One array, to be read region by region as `copies` (native side: target) need it."""
        array = open_array(self.tree, self.stored[name])
        reading = _Reading(copies, array)
        if reading.cache_bytes:
            array = open_array(self.tree, self.stored[name], reading.cache_bytes)
        return NativeArray(array, reading)


@dataclass(frozen=True)
class NativeArray:
    """One open array and the ranges in which it is read."""

    array: OrbaxArray
    reading: _Reading

    def ranges(self) -> Iterator[Ranges]:
        return self.reading.ranges()

    def read(self, box: Box) -> Array:
        """The values in `box`; raises SourceError where they cannot be read."""
        return self.array.read(box)


class _Reading:
    """How an array is cut for reading: along whole chunks, so that each is decoded once."""

    def __init__(self, copies: list[RegionCopy], array: OrbaxArray) -> None:
        dims = copies[0].target.dims
        shape, chunk = array.spec.shape, array.chunk
        self._steps: dict[str, tuple[int, int]] = {}
        lengths = []
        for extents, size, step in zip(dims, shape, chunk, strict=True):
            if len(extents) == 1 and extents[0].at is None:
                self._steps[extents[0].axis] = (min(step, size), size)
                lengths.append(min(step, size))
            else:
                free = prod(extent.size for extent in extents if extent.at is None)
                lengths.append(free)
        shared = any(
            any(extent.at is not None for extent in extents) and step > 1
            for extents, step in zip(dims, chunk, strict=True)
        )
        if not shared:
            self._grow(dims, lengths, array.spec.itemsize)
        slab = prod(
            self._steps[extents[0].axis][0] if len(extents) == 1 and extents[0].at is None else size
            for extents, size in zip(dims, shape, strict=True)
        )
        self.cache_bytes = slab * array.spec.itemsize + (1 << 20) if shared else 0

    def _grow(self, dims: Any, lengths: list[int], itemsize: int) -> None:
        """Takes several chunks at once, while they stay within a block."""
        for place in reversed(range(len(dims))):
            extents = dims[place]
            if len(extents) != 1 or extents[0].at is not None:
                continue
            step, size = self._steps[extents[0].axis]
            others = prod(lengths[:place] + lengths[place + 1 :]) * itemsize
            count = max(1, BLOCK_BYTES // max(1, others * step))
            step = min(size, step * count)
            self._steps[extents[0].axis] = (step, size)
            lengths[place] = step

    def ranges(self) -> Iterator[Ranges]:
        spans = [
            [(start, min(start + step, size)) for start in range(0, size, step)]
            for step, size in self._steps.values()
        ]
        for combination in itertools.product(*spans):
            yield dict(zip(self._steps, combination, strict=True))


def open_native(items: Path) -> NativeSource:
    """The native tree in an Orbax item folder, under the names of the mapping tables.

    Raises SourceError where it has no parameters in a form that is known.
    """
    tree = read_orbax_tree(items)
    stored = {name: name for name in tree.arrays if name.startswith(PARAMETERS)}
    if not stored:
        for name in tree.arrays:
            path = name.removeprefix("params/").removesuffix(_VALUE)
            if name.endswith(_VALUE) and path.startswith(_MODULES) and _RANDOM not in path:
                stored[PARAMETERS + path] = name
    if not stored:
        raise SourceError(
            "The checkpoint holds no MaxText parameters.",
            where=items,
            expected="params.params.<module>, or <module>….value",
            found=", ".join(sorted({name.split("/")[0] for name in tree.arrays})[:8]),
        )
    specs = {name: tree.arrays[path] for name, path in stored.items()}
    return NativeSource(tree, specs, stored)


def plan_native(native: NativeSource, original: Original, items: Path) -> Plan:
    """The plan that makes the native tree from the original; read from right to left it exports.

    Raises SourceError where the tree is not that of the original's config.json.
    """
    towers = any("vision_encoder" in name for name in native.specs)
    plan = plan_to_native(
        original.architecture,
        load_table("maxtext"),
        original.specs,
        DTypePolicy(),
        scanned=native.scanned,
        text_only=not towers,
        where=str(original.folder),
    )
    missing = [name for name in plan.targets if name not in native.specs]
    unknown = [name for name in native.specs if name not in plan.targets]
    if missing or unknown:
        raise SourceError(
            "The native tree is not that of the original's config.json.",
            where=f"{items} and {original.folder}",
            expected=f"{len(plan.targets)} arrays" + (f", such as {missing[0]}" if missing else ""),
            found=f"{len(native.specs)} arrays" + (f", such as {unknown[0]}" if unknown else ""),
            do="name the Hugging Face checkpoint of the same model with --like",
        )
    for name, planned in plan.targets.items():
        if native.specs[name].shape != planned.spec.shape:
            raise SourceError(
                "The native tree is not that of the original's config.json: a shape differs.",
                where=f"{items}, array {name}",
                expected=list(planned.spec.shape),
                found=list(native.specs[name].shape),
                do="name the Hugging Face checkpoint of the same model with --like",
            )
    return plan


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
    dimension for each free axis of that side. Every chunk is decoded once. `finished(name)` is
    called when all parts of an array are done.
    """

    def run(array: NativeArray, copy: RegionCopy, ranges: Ranges) -> None:
        values = array.read(copy.target.box(ranges))
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


class NativeBlocks:
    """Blocks of Hugging Face tensors put together from a native tree, in the dtype they have there.

    For native → native: values are neither cast nor scaled on the way, so that bits are copied.
    """

    def __init__(self, native: NativeSource, plan: Plan) -> None:
        self._native, self._copies = native, {n: s.copies for n, s in plan.sources.items()}
        self._groups = copies_by_array(plan)
        self._arrays: dict[str, NativeArray] = {}

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` with the block `ranges` of one tensor."""
        del offset
        block = data.view(numpy_dtype(source.spec.dtype)).reshape(source.region.lengths(ranges))
        for copy in self._copies[source.region.tensor]:
            if copy.source.meets(ranges):
                values = self._array(copy.target.tensor).read(copy.target.box(ranges))
                part = block[selection(copy, ranges)].transpose(copy.permutation)
                convert(values.reshape(part.shape), part, None)

    def _array(self, name: str) -> NativeArray:
        """The open array; only the last few stay open, since their decoded chunks are kept."""
        if name not in self._arrays:
            while len(self._arrays) >= OPEN_ARRAYS:
                self._arrays.pop(next(iter(self._arrays)))
            self._arrays[name] = self._native.open(name, self._groups[name])
        return self._arrays[name]

    def check_unchanged(self) -> None:
        return None
