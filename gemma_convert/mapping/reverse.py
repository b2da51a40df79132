"""A plan read from right to left: native arrays → the Hugging Face tensors of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.mapping.cutting import Cut, cut_by_chunks
from gemma_convert.mapping.plan import Plan, SourceTensor, TargetTensor, block_limit
from gemma_convert.mapping.region import Extent, Region, RegionCopy, split_steps
from gemma_convert.mapping.table import HUGGINGFACE


@dataclass(frozen=True)
class Wanted:
    """The tensors of an export, under the names that it gives them.

    names: the original's → the export's; stored: tensors that the original's files supply, the
    export's → the original's; equal: tensors that the native side has once → the one that it has.
    """

    specs: Mapping[str, TensorSpec]
    names: Mapping[str, str]
    stored: Mapping[str, str]
    equal: Mapping[str, str]


@dataclass(frozen=True)
class Arrays:
    """The stored arrays of a native checkpoint: name → spec, and chunk."""

    specs: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[int, ...]]


def reverse_plan(
    plan: Plan,
    arrays: Arrays,
    wanted: Wanted,
    stored_specs: Mapping[str, TensorSpec],
    limit: int | None,
) -> tuple[Plan, dict[str, int]]:
    """The plan from native arrays to the tensors of an export, and array → bytes to keep decoded.

    `plan` made the arrays from the original; `stored_specs` are the original's stored tensors, by
    its names. Blocks are those that were written, as long as the chunks are still the planned ones,
    or any part can be read, and a block has at most `limit` bytes.
    """
    most = block_limit(limit)
    origins = {copy.target.tensor: copy.source.tensor for copy in plan.copies}
    sources: dict[str, SourceTensor] = {}
    caches: dict[str, int] = {}
    for name, copies in _copies_by_array(plan, wanted).items():
        spec = arrays.specs[name]
        steps = _written_steps(plan, name, origins[name], copies)
        cut = _cut(plan.targets[name], steps, copies, spec, arrays.chunks[name], most)
        sources[name] = SourceTensor(spec, _whole(copies[0].source), tuple(copies), cut.steps)
        caches[name] = cut.cache_bytes
    for tensor, origin in wanted.stored.items():
        sources[origin] = _stored(origin, tensor, stored_specs[origin], most)
    targets = {
        name: TargetTensor(spec, (1,) * len(spec.shape), None, HUGGINGFACE)
        for name, spec in wanted.specs.items()
    }
    nothing: dict[str, str] = {}
    back = replace(
        plan,
        layout=HUGGINGFACE,
        sources=sources,
        targets=targets,
        carried=nothing,
        tied=nothing,
        shared=nothing,
    )
    return back, caches


def _copies_by_array(plan: Plan, wanted: Wanted) -> dict[str, list[RegionCopy]]:
    """Array, in the order of the native tree → its copies into tensors that are exported."""
    again: dict[str, list[str]] = {}
    for twin, other in wanted.equal.items():
        again.setdefault(other, []).append(twin)
    groups: dict[str, list[RegionCopy]] = {name: [] for name in plan.targets}
    for copy in plan.copies:
        name = wanted.names.get(copy.source.tensor)
        if name is None:
            continue
        for target in (name, *again.get(name, ())):
            region = Region(target, copy.source.dims)
            groups[copy.target.tensor].append(RegionCopy(copy.row, copy.target, region, copy.scale))
    return {name: copies for name, copies in groups.items() if copies}


def _cut(
    planned: TargetTensor,
    steps: dict[str, int],
    copies: Sequence[RegionCopy],
    spec: TensorSpec,
    chunk: tuple[int, ...],
    limit: int,
) -> Cut:
    block = _block_bytes(_whole(copies[0].source), steps, spec.itemsize)
    fits = block <= limit or planned.gathered
    if fits and (chunk == planned.chunk or set(chunk) == {1}):
        return Cut(steps, 0)
    return cut_by_chunks(copies, spec.shape, chunk, spec.itemsize, limit)


def _written_steps(
    plan: Plan, name: str, origin: str, copies: Sequence[RegionCopy]
) -> dict[str, int]:
    """The steps in which an array was written: whole where it was gathered, else by copy."""
    if plan.targets[name].gathered:
        return {}
    extents = list(copies[0].source.extents)
    free = {extent.axis for extent in extents if extent.at is None}
    steps = {axis: step for axis, step in plan.sources[origin].steps.items() if axis in free}
    return steps | {extent.axis: 1 for extent in extents if extent.at is not None}


def _block_bytes(region: Region, steps: Mapping[str, int], itemsize: int) -> int:
    first = {axis: (0, step) for axis, step in steps.items()}
    count = itemsize
    for length in region.lengths(first):
        count *= length
    return count


def _whole(region: Region) -> Region:
    """The region with every axis free: the whole array."""
    dims = tuple(tuple(Extent(e.axis, e.size) for e in dim) for dim in region.dims)
    return Region(region.tensor, dims)


def _stored(origin: str, name: str, spec: TensorSpec, limit: int) -> SourceTensor:
    """A tensor that the original's files supply, copied as it is."""
    dims = tuple((Extent(f"dim_{place}", size),) for place, size in enumerate(spec.shape))
    region = Region(origin, dims)
    copy = RegionCopy(HUGGINGFACE, region, Region(name, dims), None)
    steps = split_steps(region, spec.itemsize, limit, frozenset(region.axes))
    return SourceTensor(spec, region, (copy,), steps)
