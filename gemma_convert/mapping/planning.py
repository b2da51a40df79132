"""Table × Architecture × source headers → a plan. No tensor is read here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec, widest
from gemma_convert.errors import MappingError, UsageError
from gemma_convert.mapping.adapted import no_place
from gemma_convert.mapping.coverage import check_source, check_targets
from gemma_convert.mapping.inventory import HFTensor, axis_size, hf_tensors, indices, shape_of
from gemma_convert.mapping.notation import Index, View
from gemma_convert.mapping.partners import check_partners
from gemma_convert.mapping.placement import place, scanned_placement
from gemma_convert.mapping.plan import (
    Plan,
    SourceTensor,
    TargetTensor,
    block_limit,
    is_small,
)
from gemma_convert.mapping.region import (
    Extent,
    NotABoxError,
    Region,
    RegionCopy,
    chunk_shape,
    split_steps,
)
from gemma_convert.mapping.rows import NativeRow, Placement, Table
from gemma_convert.model.architecture import Architecture
from gemma_convert.output import counted


def plan_to_native(
    architecture: Architecture,
    table: Table,
    source: Mapping[str, TensorSpec],
    policy: DTypePolicy,
    *,
    scanned: bool = False,
    text_only: bool = False,
    block_bytes: int | None = None,
    where: str = "the checkpoint",
) -> Plan:
    """The plan from a Hugging Face checkpoint, given its headers, to a native layout.

    Raises SourceError for missing, unexpected or misshapen tensors, UsageError for a placement that
    this model does not have and for a model that the layout cannot hold, MappingError where the
    table leaves a hole or copies twice.
    """
    _refuse(architecture, table, where)
    placement = scanned_placement(table, architecture) if scanned else None
    expected = {tensor.name: tensor for tensor in hf_tensors(architecture, table.inventory)}
    check_source(expected, source, where)
    copies: dict[str, list[RegionCopy]] = {}
    carried: dict[str, str] = {}
    tied: dict[str, str] = {}
    shared: dict[str, str] = {}
    for name in source:
        tensor = expected[name]
        if tensor.tied is not None:
            tied[name] = _tied_name(tensor.tied, tensor.row.where, architecture, table)
            continue
        row, reason = _find_row(tensor, architecture, table, text_only)
        if row is not None and architecture.adapter is not None:
            check_partners(tensor, row, architecture, table, source)
        if row is None:
            carried[name] = reason
        elif row.share is not None and tensor.index[row.share]:
            shared[name] = _first_of_share(tensor, row.share, architecture, table)
        else:
            copies[name] = _copies(tensor, row, architecture, table, placement)
    targets = _targets(copies, source, policy)
    check_targets(
        [copy for group in copies.values() for copy in group],
        {name: target.spec.shape for name, target in targets.items()},
    )
    widths = _widths(copies, source, targets)
    sources = {
        name: _source(name, group, source[name], widths[group[0].row], block_limit(block_bytes))
        for name, group in copies.items()
    }
    return Plan(
        layout=table.layout,
        scanned=scanned,
        architecture=architecture,
        policy=policy,
        sources=sources,
        targets=_chunked(targets, sources) | _filled(expected, source, architecture, table, policy),
        carried=carried,
        tied=tied,
        shared=shared,
        version=table.version,
    )


def _refuse(architecture: Architecture, table: Table, where: str) -> None:
    """Raises UsageError for a model that the layout cannot hold, naming what has no place."""
    refusals = [entry for entry in table.refused if entry.when.holds(architecture, {})]
    if not refusals:
        return
    names = {name for entry in refusals for name in entry.names}
    tensors = hf_tensors(architecture, table.inventory)
    placeless = sum(tensor.row.view.pattern.text in names for tensor in tensors)
    lost = counted(placeless, "tensor")
    no_place = f"no place for {lost}: {', '.join(sorted(names))}" if names else None
    raise UsageError(
        "; ".join(entry.why for entry in refusals) + ".",
        where=where,
        expected=f"a model that {table.layout} can hold",
        found=f"{architecture.family}" + (f", {no_place}" if no_place else ""),
        do="choose another layout with --format",
    )


def _first_of_share(tensor: HFTensor, axis: str, architecture: Architecture, table: Table) -> str:
    name = tensor.row.name(architecture.text_only)
    return name.render({**tensor.index, axis: 0}, table.inventory.spellings)


def _filled(
    expected: Mapping[str, HFTensor],
    source: Mapping[str, TensorSpec],
    architecture: Architecture,
    table: Table,
    policy: DTypePolicy,
) -> dict[str, TargetTensor]:
    """Arrays that the native side wants and the source lacks, in the source's usual dtype."""
    (usual, _), *_ = Counter(spec.dtype for spec in source.values()).most_common(1)
    targets = {}
    for name, tensor in expected.items():
        if name in source or tensor.required or tensor.tied is not None:
            continue
        if all(row.fill is None for row in table.rows_of(tensor.row)):
            continue
        row, _ = _find_row(tensor, architecture, table, text_only=False)
        if row is not None and row.fill is not None:
            shape = shape_of(row.native, architecture, tensor.index)
            spec = TensorSpec(policy.target(usual, scaled=False, where=name), shape)
            chunk = shape if is_small(spec) else (1, *shape[1:])
            target = row.native.pattern.render(tensor.index, table.spellings)
            targets[target] = TargetTensor(spec, chunk, None, row.where, row.fill)
    return targets


def _find_row(
    tensor: HFTensor, architecture: Architecture, table: Table, text_only: bool
) -> tuple[NativeRow | None, str]:
    """The row that converts a tensor, or why the tensor is carried."""
    rows = [row for row in table.rows_of(tensor.row) if row.when.holds(architecture, tensor.index)]
    if len(rows) > 1:
        raise MappingError(
            "Two rows convert the same tensor.",
            where=" and ".join(row.where for row in rows),
            found=tensor.name,
        )
    if rows and text_only and rows[0].tower is not None:
        return None, "the towers are carried on request (--text-only)"
    if rows:
        return rows[0], ""
    for entry in table.carried:
        if entry.matches(tensor.row) and entry.when.holds(architecture, tensor.index):
            return None, entry.why
    if architecture.adapter is not None:
        raise no_place(table, tensor.name)
    raise MappingError(
        "No row converts this tensor, and nothing says why it would be carried.",
        where=f"{table.layout}.toml",
        found=tensor.name,
    )


def _tied_name(tied: str, where: str, architecture: Architecture, table: Table) -> str:
    row = table.inventory.row(tied)
    if row is None:
        raise MappingError("`tied` names no row.", where=where, found=tied)
    return row.name(architecture.text_only).render({}, table.inventory.spellings)


def _copies(
    tensor: HFTensor,
    row: NativeRow,
    architecture: Architecture,
    table: Table,
    placement: Placement | None,
) -> list[RegionCopy]:
    """One copy for each native tensor that takes a part of the Hugging Face tensor."""
    scale = None
    if row.scale is not None:
        scale = math.sqrt(axis_size(row.scale, architecture, tensor.index, row.where))
    named = [axis for axis in row.native.pattern.axes if axis not in tensor.index]
    copies = []
    for extra in indices(named, architecture, row.where):
        index = {**tensor.index, **extra}
        source = Region(tensor.name, _dims(row.hf.view, architecture, index, extra))
        placed = place(row.native, index, architecture, table, placement)
        inside = {
            axis: value for axis, value in index.items() if axis not in row.native.pattern.axes
        }
        dims = _dims(row.native, architecture, index, inside)
        target = Region(placed.name, placed.put_in(dims))
        copies.append(RegionCopy(row.where, source, target, scale))
    return copies


def _dims(
    view: View, architecture: Architecture, index: Index, fixed: Index
) -> tuple[tuple[Extent, ...], ...]:
    where = str(view)
    return tuple(
        tuple(
            Extent(axis, axis_size(axis, architecture, index, where), fixed.get(axis))
            for axis in dim
        )
        for dim in view.dims
    )


def _targets(
    copies: Mapping[str, list[RegionCopy]], source: Mapping[str, TensorSpec], policy: DTypePolicy
) -> dict[str, TargetTensor]:
    targets: dict[str, TargetTensor] = {}
    for name, group in copies.items():
        for copy in group:
            dtype = policy.target(source[name].dtype, scaled=copy.scale is not None, where=name)
            shape, before = copy.target.shape, targets.get(copy.target.tensor)
            if before is not None:
                dtype = widest(before.spec.dtype, dtype)
                if before.spec.shape != shape:
                    raise MappingError(
                        "Two copies disagree about the shape of their target.",
                        where=copy.row,
                        expected=before.spec.shape,
                        found=f"{copy.target.tensor} {shape}",
                    )
            targets[copy.target.tensor] = TargetTensor(
                TensorSpec(dtype, shape), shape, copy.scale, copy.row
            )
    return targets


def _widths(
    copies: Mapping[str, list[RegionCopy]],
    source: Mapping[str, TensorSpec],
    targets: Mapping[str, TargetTensor],
) -> dict[str, int]:
    """row → bytes of its widest element on either side: one width, so that blocks are alike."""
    widths: dict[str, int] = {}
    for name, group in copies.items():
        sizes = [targets[copy.target.tensor].spec.itemsize for copy in group]
        row = group[0].row
        widths[row] = max(widths.get(row, 0), source[name].itemsize, *sizes)
    return widths


def _source(
    name: str,
    copies: list[RegionCopy],
    spec: TensorSpec,
    width: int,
    limit: int,
) -> SourceTensor:
    whole = Region(
        name,
        tuple(tuple(Extent(e.axis, e.size) for e in dim) for dim in copies[0].source.dims),
    )
    leading = frozenset.intersection(
        *(frozenset(dim[0].axis for dim in copy.target.dims if dim) for copy in copies)
    )
    steps = split_steps(whole, width, limit, leading)
    first = {axis: (0, step) for axis, step in steps.items()}
    for copy in copies:
        try:
            copy.source.box({}), copy.target.box(first)
        except NotABoxError as error:
            raise MappingError(
                "The parts of a tensor are not boxes of its target.", where=copy.row, found=error
            ) from None
    return SourceTensor(spec, whole, tuple(copies), steps)


def _chunked(
    targets: Mapping[str, TargetTensor], sources: Mapping[str, SourceTensor]
) -> dict[str, TargetTensor]:
    """The targets with their chunks: whole where they are gathered, else one block's part."""
    chunked = dict(targets)
    for source in sources.values():
        for copy in source.copies:
            target = targets[copy.target.tensor]
            if not is_small(target.spec):
                chunk = chunk_shape(copy.target, source.steps)
                chunked[copy.target.tensor] = TargetTensor(
                    target.spec, chunk, target.scale, target.row
                )
    return chunked
