"""A native checkpoint seen as the Hugging Face checkpoint that an export of it would give.

Native → native is then a conversion like any other. Both trees are views of the same Hugging Face
tensors, so a block of such a tensor is put together from the one and taken apart into the other.
Where both scale it alike it is neither cast nor scaled, and bits are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

import numpy as np

from gemma_convert.arrays.buffers import ThreadBuffer
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec, numpy_dtype, widest
from gemma_convert.arrays.values import Array, convert
from gemma_convert.checkpoint.native import NativeSource, StoredArray, plan_native
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.restoring import Restorer
from gemma_convert.mapping.cutting import cut_by_chunks
from gemma_convert.mapping.plan import Plan, SourceTensor, block_limit
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.region import Ranges, RegionCopy, blocks, selection
from gemma_convert.mapping.rows import Table

OPEN_ARRAYS = 4
"""Only the last few stay open, since their decoded chunks are kept."""


@dataclass
class HuggingFaceView:
    """`plan` makes the native checkpoint from the original; here it is read from right to left.

    `specs` are the tensors as they are given, `raw` those whose scale is left on them. Tensors that
    the native side does not hold come from the original. `rounded` counts values that do not give
    the native ones again.
    """

    native: NativeSource
    original: Original
    plan: Plan
    specs: Mapping[str, TensorSpec]
    raw: frozenset[str]
    rounded: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        native, copies = self.native, _copies_by_array(self.plan)
        self._array = lru_cache(OPEN_ARRAYS)(lambda name: _open(native, name, copies[name]))
        self._buffer = ThreadBuffer()
        self._restorer = Restorer(self.original)

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` with the block `ranges` of one tensor, which begins at byte `offset`."""
        name = self._stored(source.region.tensor)
        if name not in self.plan.sources:
            self.original.read_bytes(name, offset, data)
            return
        scale = None if name in self.raw else self.plan.sources[name].copies[0].scale
        values = data.view(numpy_dtype(source.spec.dtype)).reshape(source.region.lengths(ranges))
        if scale is None:
            self._assemble(name, ranges, values)
            return
        dtype = native_dtype(self.native, self.plan.sources[name])
        scaled = np.empty(values.shape, numpy_dtype(dtype))
        self._assemble(name, ranges, scaled)
        box = source.region.box(ranges)
        lost = self._restorer.fill(name, box, scaled, values, scale)
        if lost:
            self.rounded[name] = self.rounded.get(name, 0) + lost

    def in_order(self, name: str) -> bool:
        """Every tensor is put together in the order of its bytes."""
        return name in self.specs

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one is asked for."""
        name = self._stored(name)
        planned = self.plan.sources.get(name)
        if planned is None:
            yield from self.original.at_hand(name).pieces(name)
            return
        source, offset = replace(planned, spec=self.specs[name]), 0
        for ranges in blocks(source.region, source.steps):
            size = prod(source.region.lengths(ranges)) * source.spec.itemsize
            data = np.empty(size, np.uint8)
            self.read_block(source, ranges, offset, data)
            offset += data.size
            yield data.data

    def arrays(self, names: Iterable[str]) -> list[str]:
        """The native arrays that these tensors are put together from."""
        stored = map(self._stored, names)
        sources = (self.plan.sources[name] for name in stored if name in self.plan.sources)
        return sorted({copy.target.tensor for source in sources for copy in source.copies})

    def check_unchanged(self) -> None:
        """Raises SourceError where the checkpoint has changed since it was opened."""
        self.native.check_unchanged()

    def _stored(self, name: str) -> str:
        """The tensor whose values the native side has for this one."""
        return self.plan.equal.get(name, name)

    def _assemble(self, name: str, ranges: Ranges, block: Array) -> None:
        """Fills `block`, which has the tensor's own order of axes, with native values."""
        for copy in self.plan.sources[name].copies:
            if copy.source.meets(ranges):
                array, box = self._array(copy.target.tensor), copy.target.box(ranges)
                shape = tuple(length for _, length in box)
                values = array.read(box, self._buffer.array(shape, numpy_dtype(array.spec.dtype)))
                part = block[selection(copy, ranges)].transpose(copy.permutation)
                convert(values.reshape(part.shape), part, None)


def _open(native: NativeSource, name: str, copies: Sequence[RegionCopy]) -> StoredArray:
    spec, limit = native.specs[name], block_limit(native.block_bytes)
    cut = cut_by_chunks(copies, spec.shape, native.chunks[name], spec.itemsize, limit)
    return native.opener(name, cut.cache_bytes)


def _copies_by_array(plan: Plan) -> dict[str, list[RegionCopy]]:
    """Native array → its copies, read from right to left."""
    groups: dict[str, list[RegionCopy]] = {}
    for copy in plan.copies:
        back = RegionCopy(copy.row, copy.target, copy.source, copy.scale)
        groups.setdefault(copy.target.tensor, []).append(back)
    return groups


def native_dtype(native: NativeSource, source: SourceTensor) -> str:
    """The dtype that holds every value of a Hugging Face tensor as the native side has it."""
    first, *others = (native.specs[copy.target.tensor].dtype for copy in source.copies)
    for other in others:
        first = widest(first, other)
    return first


def plan_relayout(
    native: NativeSource,
    original: Original,
    table: Table,
    policy: DTypePolicy,
    *,
    scanned: bool,
    text_only: bool,
) -> tuple[Plan, HuggingFaceView]:
    """The plan from one native checkpoint to another, by its `table`, and the view that it reads.

    Towers that the source carries in its sidecar go where the new layout has a place for them,
    unless layout and version stay the same. Raises SourceError where the tree is not that of the
    original's config.json.
    """
    before = plan_native(native, original)
    same = (table.layout, table.version) == (native.layout, before.version)
    text_only = text_only or (same and not native.towers)

    def plan(specs: Mapping[str, TensorSpec], policy: DTypePolicy) -> Plan:
        return plan_to_native(
            original.architecture,
            table,
            specs,
            policy,
            scanned=scanned,
            text_only=text_only,
            block_bytes=native.block_bytes,
            where=str(native.folder),
        )

    wanted = plan(original.specs, DTypePolicy()).sources
    raw = frozenset(
        name
        for name, source in before.sources.items()
        if name in wanted and source.copies[0].scale == wanted[name].copies[0].scale
    )
    specs = _specs(native, original, before, raw)
    after = plan(specs, _Raw(policy.dtype, policy.scaled, raw))
    view = HuggingFaceView(native, original, before, specs, raw)
    return replace(_unscaled(after, _in_order(before, after), raw), policy=policy), view


def _unscaled(plan: Plan, sources: Mapping[str, SourceTensor], raw: frozenset[str]) -> Plan:
    """The plan with these sources, of which `raw` ones are copied as they are."""
    unscaled = {copy.target.tensor for name in raw for copy in sources[name].copies}
    return replace(
        plan,
        sources={
            name: replace(source, copies=tuple(replace(copy, scale=None) for copy in source.copies))
            if name in raw
            else source
            for name, source in sources.items()
        },
        targets={
            name: replace(target, scale=None) if name in unscaled else target
            for name, target in plan.targets.items()
        },
    )


def _specs(
    native: NativeSource, original: Original, before: Plan, raw: frozenset[str]
) -> dict[str, TensorSpec]:
    """The Hugging Face tensors in the dtypes that they have here.

    A tensor whose root is divided away has the dtype of its values in the sidecar, or that of the
    original, unless others left theirs.
    """
    specs = dict(original.specs)
    found = {name: native_dtype(native, source) for name, source in before.sources.items()}
    scaled = {name for name, source in before.sources.items() if source.copies[0].scale is not None}
    trained = any(found[name] != specs[name].dtype for name in found if name not in scaled)
    for name, dtype in found.items():
        if name in raw or name not in scaled or trained:
            specs[name] = TensorSpec(dtype, specs[name].shape)
        elif original.holds(name):
            specs[name] = original.at_hand(name).specs[name]
    for name in filter(original.holds, before.carried):
        specs[name] = original.at_hand(name).specs[name]
    for name, other in before.equal.items():
        specs[name] = specs[other]
    return specs


def _in_order(before: Plan, after: Plan) -> dict[str, SourceTensor]:
    """What is read, in the order in which the native source has it; the original's last."""
    place = {array: number for number, array in enumerate(before.targets)}

    def order(name: str) -> int:
        source = before.sources.get(name)
        return len(place) if source is None else place[source.copies[0].target.tensor]

    return {name: after.sources[name] for name in sorted(after.sources, key=order)}


@dataclass(frozen=True)
class _Raw(DTypePolicy):
    """Where bits are copied a scaled row keeps its dtype, unless it is to be rounded."""

    raw: frozenset[str] = frozenset()

    def target(self, source: str, *, scaled: bool, where: str) -> str:
        raw = scaled and where in self.raw
        target = super().target(source, scaled=scaled and not raw, where=where)
        return target if not raw else "bfloat16" if self.scaled == "bfloat16" else source
