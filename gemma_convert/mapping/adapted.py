"""The tables of an adapter, which follow from those of the weights that it changes.

PEFT has two matrices for a linear weight `name.weight [out in]`: `name.lora_A.weight [rank in]`
and `name.lora_B.weight [out rank]` (`peft/tuners/lora/layer.py`, PEFT 0.21). A layout says in
`[adapter]` of its table how it names and shapes them; which axes go in and which come out is what
the row of the weight says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

from gemma_convert.errors import UsageError, some
from gemma_convert.mapping.notation import Condition, Pattern, View
from gemma_convert.mapping.rows import (
    AdapterForm,
    CarriedRow,
    HFRow,
    Inventory,
    NativeRow,
    Placement,
    Table,
)
from gemma_convert.mapping.table import load_inventory, load_table
from gemma_convert.model.adapter import of_experts
from gemma_convert.model.architecture import Architecture

ALWAYS = Condition()
RANK = ("rank",)
_WEIGHT = ".weight"
_NO_LINEAR = ("embed_tokens", "embed_tokens_per_layer", "lm_head")
"""Two-dimensional weights that are looked up, not multiplied, and the head that is one of them."""


def table_of(layout: str, architecture: Architecture, version: str | None = None) -> Table:
    """The table of a layout, for a version of its framework, for a model or for an adapter of it.

    Raises UsageError where the layout has no place for adapters.
    """
    table = load_table(layout, version)
    return table if architecture.adapter is None else adapter_table(layout, version)


def inventory_of(architecture: Architecture) -> Inventory:
    """Every tensor of the Hugging Face layout, of a model or of an adapter of it."""
    return load_inventory() if architecture.adapter is None else adapter_inventory()


@cache
def adapter_inventory() -> Inventory:
    """The matrices A and B of every linear weight; each weight may go without."""
    inventory = load_inventory()
    rows = (pair for row in inventory.rows if _is_linear(row) for pair in _pair(row))
    return Inventory(tuple(rows), inventory.spellings)


@cache
def adapter_table(layout: str, version: str | None = None) -> Table:
    """The table of a layout for adapters.

    Raises UsageError where the layout has no place for them.
    """
    table = load_table(layout, version)
    form = table.adapter
    if form is None:
        raise UsageError(
            f"The layout {layout} has no place for an adapter"
            + (f": {table.no_adapter}." if table.no_adapter else "."),
            do=("merge it into its base model with --merge", "choose another layout with --format"),
        )
    inventory = adapter_inventory()
    targets = [row for row in table.rows if row.hf.view.pattern.text in form.targets]
    unread = (_unread(row, form) for row in targets if row.fill is not None)
    rows = (pair for row in targets for pair in _native_pair(row, form, inventory))
    carried = (pair for row in (*table.carried, *unread) for pair in _carried_pair(row, inventory))
    scanned = {} if form.scanned is None else {"scanned": _never(form.scanned)}
    return replace(
        table,
        rows=tuple(rows),
        carried=tuple(carried),
        refused=(),
        placements=scanned,
        inventory=inventory,
    )


def no_place(table: Table, tensor: str) -> UsageError:
    """What is said of a matrix that the layout of an adapter's table has no place for."""
    assert table.adapter is not None
    return UsageError(
        f"The layout {table.layout} has no place for a part of this adapter.",
        where=f"tensor {tensor}",
        expected=f"matrices of {some(list(table.adapter.targets), 3)}",
        do=("merge the adapter into its base model with --merge", "train one of these alone"),
    )


def refuse_experts(table: Table, tensors: Iterable[str]) -> None:
    """Nothing where no tensor of an adapter is one of batched experts.

    Raises UsageError that says why the layout has no place for it.
    """
    for name in tensors:
        if of_experts(name.rpartition(".lora_")[0]) is not None:
            form = table.adapter
            raise UsageError(
                f"The layout {table.layout} has no place for an adapter of batched experts.",
                where=f"tensor {name}",
                expected=None if form is None else form.experts,
                do="merge the adapter into its base model with --merge",
            )


def _is_linear(row: HFRow) -> bool:
    name = row.view.pattern.text
    module = name.removesuffix(_WEIGHT).rpartition(".")[2]
    return name.endswith(_WEIGHT) and len(row.view.dims) == 2 and module not in _NO_LINEAR


def _pair(row: HFRow) -> Iterator[HFRow]:
    outputs, inputs = row.view.dims
    for letter, dims in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
        yield HFRow(
            view=View(_matrix(row.view.pattern, letter), dims),
            when=row.when,
            optional=ALWAYS,
            tied=None,
            text_only_name=_matrix(row.text_only_name, letter),
            where=f"{row.where}, lora_{letter}",
            together=_matrix(row.view.pattern, "").text,
        )


def _matrix(pattern: Pattern, letter: str) -> Pattern:
    return Pattern(pattern.text.removesuffix(_WEIGHT) + f".lora_{letter}{_WEIGHT}")


def _native_pair(row: NativeRow, form: AdapterForm, inventory: Inventory) -> Iterator[NativeRow]:
    """The two matrices of an array.

    Of one that has several weights along an axis, A is one for all, and B has that axis.
    """
    order = [axis for dim in row.native.dims for axis in dim]
    inputs = tuple(axis for axis in order if axis in row.hf.view.dims[1])
    outputs = tuple(axis for axis in order if axis not in inputs)
    along = next((axis for axis in outputs if axis not in row.hf.view.dims[0]), None)
    when = row.when if row.fill is None else row.when & ~_optional(row)
    array = form.array(row.native.pattern.text)
    for letter, view, share in (("A", form.a, along), ("B", form.b, None)):
        hf = inventory.row(_matrix(row.hf.view.pattern, letter).text)
        assert hf is not None
        name = Pattern(view.name.replace("{array}", array))
        dims = view.dims(inputs=inputs, outputs=outputs)
        where = f"{row.where}, lora_{letter}"
        native = View(name, dims)
        yield replace(row, hf=hf, native=native, when=when, share=share, fill=None, where=where)


def _optional(row: NativeRow) -> Condition:
    assert row.hf.optional is not None
    return row.hf.optional


def _unread(row: NativeRow, form: AdapterForm) -> CarriedRow:
    """An array that is filled in where its weight is absent is one that nothing reads there."""
    assert form.unread is not None
    return CarriedRow(row.hf.view.pattern.text, _optional(row), form.unread, row.where)


def _carried_pair(row: CarriedRow, inventory: Inventory) -> Iterator[CarriedRow]:
    """What nothing reads of a weight, nothing reads of its adapter."""
    for letter in "AB":
        name = _matrix(Pattern(row.name), letter).text
        if row.name.endswith(_WEIGHT) and inventory.row(name) is not None:
            yield replace(row, name=name)


def _never(why: str) -> Placement:
    """A placement of scanned layers that no adapter has."""
    return Placement("scanned", "layers", 0, ((ALWAYS, why),), ())
