"""A plan, or a table as it stands, as entries to be read, searched and compared.

The axes of an entry are written as in the tables. An axis that a part of a tensor is fixed at is
followed by its value, spelled as the layout spells it: `[kv=key kv_heads embed head_dim]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.mapping.inventory import HFTensor, hf_tensors, shape_of
from gemma_convert.mapping.notation import UNIT, Condition, Spellings, parse_condition
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Region, RegionCopy
from gemma_convert.mapping.rows import NativeRow, Table

Kind = Literal["converted", "filled", "shared", "tied", "carried"]

_NUMBER = re.compile(r"(\d+)")
_TIED = parse_condition("tied")


@dataclass(frozen=True)
class Side:
    """One tensor as one layout has it; `axes` are those of the part that an entry is about."""

    name: str
    axes: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Entry:
    """One part of one tensor, and where it is on the other side.

    A tensor that goes into several arrays has an entry for each; so has an array that several
    tensors go into. `scale` is what the native values are multiplied by, the root of the length of
    `scale_axis`. `fill` is what the array holds where the source lacks the tensor. `equals` is the
    tensor that is stored in place of a shared or tied one. `why` says why a tensor is carried or an
    array is filled.
    """

    kind: Kind
    row: str
    hf: Side | None
    native: Side | None
    scale: float | None = None
    scale_axis: str | None = None
    fill: int | None = None
    equals: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class TableEntry:
    """One row of a table as it stands. `native` and `why` are None where they do not apply."""

    kind: Literal["converted", "tied", "carried", "refused", "stacked"]
    hf: str | None
    native: str | None = None
    when: str = ""
    optional: str | None = None
    scale: str | None = None
    share: str | None = None
    fill: int | None = None
    equals: str | None = None
    why: str | None = None


def list_tensors(plan: Plan, table: Table, source: Mapping[str, TensorSpec]) -> tuple[Entry, ...]:
    """An entry for every part of every tensor of `source`, and for every array filled in.

    `plan` was made of `table` and `source`. They are sorted by the Hugging Face name, layer 2
    before layer 10, so that two listings can be compared line by line.
    """
    expected = {tensor.name: tensor for tensor in hf_tensors(plan.architecture, table.inventory)}
    rows = {row.where: row for row in table.rows}
    entries = [
        entry
        for name in source
        for entry in _tensor_entries(plan, table, rows, expected[name], source[name])
    ]
    entries += _filled(plan, table, rows, expected, source)
    return tuple(sorted(entries, key=_order))


def list_table(table: Table) -> tuple[TableEntry, ...]:
    """The rows of a table as they stand: placeholders in names, conditions in words of facts."""
    return (*_rows(table), *_exceptions(table))


def condition_text(*conditions: Condition) -> str:
    """The conjunction of conditions as a table writes it, each fact once; empty means always."""
    terms = dict.fromkeys(term for condition in conditions for term in condition.terms)
    return " & ".join(fact if wanted else f"!{fact}" for fact, wanted in terms)


def _tensor_entries(
    plan: Plan, table: Table, rows: Mapping[str, NativeRow], tensor: HFTensor, spec: TensorSpec
) -> Iterator[Entry]:
    name = tensor.name
    whole = Side(name, tensor.row.view.shape_text, spec.shape, spec.dtype)
    if name in plan.carried:
        yield Entry("carried", tensor.row.where, whole, None, why=plan.carried[name])
    elif name in plan.equal:
        copy = plan.sources[plan.equal[name]].copies[0]
        kind: Kind = "tied" if name in plan.tied else "shared"
        native = _native_side(copy, plan, table)
        yield Entry(kind, copy.row, whole, native, equals=plan.equal[name])
    else:
        for copy in plan.sources[name].copies:
            row = rows[copy.row]
            axes = _axes(copy.source, table.inventory.spellings)
            yield Entry(
                kind="converted",
                row=copy.row,
                hf=Side(name, axes, spec.shape, spec.dtype),
                native=_native_side(copy, plan, table),
                scale=copy.scale,
                scale_axis=row.scale,
                fill=None if tensor.required else row.fill,
            )


def _native_side(copy: RegionCopy, plan: Plan, table: Table) -> Side:
    spec = plan.targets[copy.target.tensor].spec
    axes = _axes(copy.target, table.spellings)
    return Side(copy.target.tensor, axes, spec.shape, spec.dtype)


def _axes(region: Region, spellings: Spellings) -> str:
    dims = []
    for dim in region.dims:
        words = []
        for extent in dim:
            names = spellings.get(extent.axis)
            value = "" if extent.at is None else f"={names[extent.at] if names else extent.at}"
            words.append(extent.axis + value)
        dims.append(f"({' '.join(words)})" if len(words) > 1 else words[0] if words else UNIT)
    return " ".join(dims)


def _filled(
    plan: Plan,
    table: Table,
    rows: Mapping[str, NativeRow],
    expected: Mapping[str, HFTensor],
    source: Mapping[str, TensorSpec],
) -> Iterator[Entry]:
    """An entry for each array that is filled in, with the tensors that the source lacks for it."""
    absent: dict[str, list[HFTensor]] = {}
    for tensor in expected.values():
        if tensor.name not in source:
            for row in table.rows_of(tensor.row):
                if row.when.holds(plan.architecture, tensor.index):
                    array = row.native.pattern.render(tensor.index, table.spellings)
                    absent.setdefault(array, []).append(tensor)
    for name, target in plan.filled.items():
        row, tensors = rows[target.row], absent[name]
        shape = shape_of(row.native, plan.architecture, tensors[0].index)
        native = Side(name, row.native.shape_text, shape, target.spec.dtype)
        names = " and ".join(tensor.name for tensor in tensors)
        why = f"the source lacks {names}"
        yield Entry("filled", target.row, None, native, fill=target.fill, why=why)


def _order(entry: Entry) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Names in the order of people: numbers by their size. An array filled in comes last."""
    hf = entry.hf.name if entry.hf is not None else "~"
    native = "" if entry.native is None else f"{entry.native.name} {entry.native.axes}"
    return _natural(hf), _natural(native)


def _natural(name: str) -> list[tuple[int, str]]:
    parts = _NUMBER.split(name)
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)]


def _rows(table: Table) -> Iterator[TableEntry]:
    for row in table.rows:
        hf = row.hf
        optional = None if hf.optional is None else condition_text(hf.optional)
        when = condition_text(hf.when, row.when)
        yield TableEntry(
            kind="converted",
            hf=str(hf.view),
            native=str(row.native),
            when=when,
            optional=optional,
            scale=row.scale,
            share=row.share,
            fill=row.fill,
        )
    for hf in table.inventory.rows:
        if hf.tied is not None:
            when = condition_text(hf.when, _TIED)
            yield TableEntry("tied", str(hf.view), when=when, equals=hf.tied)


def _exceptions(table: Table) -> Iterator[TableEntry]:
    for entry in table.carried:
        yield TableEntry("carried", entry.name, when=condition_text(entry.when), why=entry.why)
    for refusal in table.refused:
        for name in refusal.names or (None,):
            yield TableEntry("refused", name, when=condition_text(refusal.when), why=refusal.why)
    for placement in table.placements.values():
        for condition, why in placement.refused:
            yield TableEntry("refused", None, when=condition_text(condition), why=f"scanned: {why}")
        for stack in placement.stacks:
            where = f"{' '.join(stack.index)} after {placement.after} dimension(s)"
            yield TableEntry(
                "stacked",
                None,
                native=f"{stack.start}* → {stack.end}*",
                when=condition_text(stack.when),
                why=f"scanned: axes {where}",
            )
