"""mappings/*.toml → typed rows. The tables are data; this module only reads and checks them.

Unknown keys, unknown axes or facts, an axis used twice, a row whose two sides do not use the same
axes, and names that stand twice are errors that name the file, the row and the reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gemma_convert.errors import MappingError, UsageError
from gemma_convert.mapping.declared import declaration, is_own, module_folder, package
from gemma_convert.mapping.notation import (
    Condition,
    Pattern,
    Spellings,
    View,
    axis_of,
    parse_view,
)
from gemma_convert.mapping.record import Record

HUGGINGFACE = "huggingface"

TOWERS = ("vision", "audio")


@dataclass(frozen=True)
class HFRow:
    """One family of Hugging Face tensors; where `optional` holds, a tensor may be absent."""

    view: View
    when: Condition
    optional: Condition | None
    tied: str | None
    text_only_name: Pattern
    where: str

    def name(self, text_only: bool) -> Pattern:
        return self.text_only_name if text_only else self.view.pattern


@dataclass(frozen=True)
class NativeRow:
    """The two views of one parameter.

    The native side is larger by the root of axis `scale`; the Hugging Face tensors along axis
    `share` are one on the native side; `fill` is there what an absent optional tensor leaves open.
    """

    hf: HFRow
    native: View
    when: Condition
    scale: str | None
    share: str | None
    fill: int | None
    tower: str | None
    where: str

    def __str__(self) -> str:
        return f"{self.hf.view} | {self.native}"


@dataclass(frozen=True)
class CarriedRow:
    """Hugging Face rows that a layout has no place for; a `name` ending in `*` is a prefix."""

    name: str
    when: Condition
    why: str
    where: str

    def matches(self, row: HFRow) -> bool:
        text = row.view.pattern.text
        return text.startswith(self.name[:-1]) if self.name.endswith("*") else text == self.name


@dataclass(frozen=True)
class Refusal:
    """Models that a layout cannot hold, why, and the Hugging Face rows that it has no place for."""

    when: Condition
    why: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """Layers that a placement stacks into one array: paths below `start` move below `end`."""

    when: Condition
    start: str
    end: str
    index: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where stacking axes go: after the first `after` dimensions of every array of a stack."""

    name: str
    axis: str
    after: int
    refused: tuple[tuple[Condition, str], ...]
    stacks: tuple[Stack, ...]


@dataclass(frozen=True)
class Files:
    """What a checkpoint consists of that is no Orbax tree, as patterns of names in its folder.

    A file for each that is `needed` is always there, one that is `allowed` may be.
    """

    needed: tuple[str, ...]
    allowed: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """mappings/huggingface.toml: every tensor of the Hugging Face layout."""

    rows: tuple[HFRow, ...]
    spellings: Spellings

    def row(self, name: str) -> HFRow | None:
        return next((row for row in self.rows if row.view.pattern.text == name), None)


@dataclass(frozen=True)
class Table:
    """One native layout: rows, what it carries and refuses, spellings of axes, placements.

    `files` is None for a layout whose checkpoints are Orbax trees.
    """

    layout: str
    rows: tuple[NativeRow, ...]
    carried: tuple[CarriedRow, ...]
    refused: tuple[Refusal, ...]
    spellings: Spellings
    placements: Mapping[str, Placement]
    files: Files | None
    inventory: Inventory

    @cached_property
    def _rows_by_hf(self) -> Mapping[str, tuple[NativeRow, ...]]:
        rows: dict[str, tuple[NativeRow, ...]] = {}
        for row in self.rows:
            name = row.hf.view.pattern.text
            rows[name] = (*rows.get(name, ()), row)
        return rows

    @cached_property
    def _tower_names(self) -> tuple[str, ...]:
        texts = {row.native.pattern.text for row in self.rows if row.tower is not None}
        return tuple(text.partition("{")[0] for text in texts)

    def in_tower(self, name: str) -> bool:
        """Whether a native array belongs to the vision or audio tower."""
        return name.startswith(self._tower_names)

    def rows_of(self, hf: HFRow) -> tuple[NativeRow, ...]:
        """The rows that convert a Hugging Face row; at most one of them holds at a place."""
        return self._rows_by_hf.get(hf.view.pattern.text, ())


def mappings_folder() -> Path:
    """The folder of the tables: inside the installed wheel, or at the top of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "mappings"
    return installed if installed.is_dir() else package.parent / "mappings"


@cache
def load_inventory() -> Inventory:
    """The Hugging Face inventory, read once."""
    return parse_inventory(*_read(table_file(HUGGINGFACE)))


@cache
def load_table(layout: str) -> Table:
    """The table of a native layout, read once.

    Raises UsageError where there is no such layout, or where another package's table is wrong.
    """
    declared, file = declaration(layout), table_file(layout)
    try:
        return _checked_table(layout, file)
    except MappingError as error:
        if is_own(declared):
            raise
        raise UsageError(
            f"The table of the layout `{layout}` cannot be used.",
            where=f"package {package(declared)}, {error.where}",
            expected=error.expected,
            found=f"{error.what} {error.found or ''}".rstrip(),
            do=f"repair or remove the package {package(declared)}",
        ) from None


def _checked_table(layout: str, file: Path) -> Table:
    table = parse_table(*_read(file), load_inventory())
    if table.layout != layout:
        raise MappingError(
            "The table is that of another layout.",
            where=file.name,
            expected=f'layout = "{layout}"',
            found=table.layout,
        )
    return table


def table_file(layout: str) -> Path:
    """The file of a layout's table: that of another package's lies beside its module.

    Raises UsageError where there is no such layout.
    """
    name = f"{layout.replace('-', '_')}.toml"
    if layout == HUGGINGFACE:
        return mappings_folder() / name
    declared = declaration(layout)
    return (mappings_folder() if is_own(declared) else module_folder(declared)) / name


def parse_inventory(data: Mapping[str, Any], file: str) -> Inventory:
    """The inventory in the parsed TOML of huggingface.toml."""
    top = Record(data, file).only("layout", "spellings", "section")
    spellings = top.spellings()
    rows = []
    for section in top.records("section"):
        section.only("prefix", "text_only_prefix", "when", "rows")
        prefix = section.text("prefix")
        text_only = section.text("text_only_prefix", prefix)
        for record in section.records("rows"):
            record.only("name", "when", "optional", "tied")
            name = record.text("name")
            view = record.checked(parse_view, prefix + name)
            short = record.checked(parse_view, text_only + name).pattern
            if short.axes != view.pattern.axes:
                raise record.error(
                    "The text-only name has other placeholders.", expected=prefix, found=text_only
                )
            rows.append(
                HFRow(
                    view=view,
                    when=section.condition("when") & record.condition("when", view.pattern),
                    optional=record.condition("optional", view.pattern)
                    if record.has("optional")
                    else None,
                    tied=record.text("tied") if record.has("tied") else None,
                    text_only_name=short,
                    where=record.where,
                )
            )
    _refuse_twice([(row.view.pattern.text, row.where) for row in rows])
    return Inventory(tuple(rows), spellings)


def parse_table(data: Mapping[str, Any], file: str, inventory: Inventory) -> Table:
    """The table in the parsed TOML of a native layout; its rows are joined to the inventory's."""
    top = Record(data, file).only(
        "layout", "files", "spellings", "carried", "refused", "placement", "section"
    )
    rows = [row for section in top.records("section") for row in _native_rows(section, inventory)]
    carried = tuple(_carried_row(record, inventory) for record in top.records("carried"))
    refused = tuple(_refusal(record, inventory) for record in top.records("refused"))
    without = {name for refusal in refused for name in refusal.names}
    forms = top.table("placement")
    placements = {name: _placement(name, forms.table(name)) for name in forms.values}
    table = Table(
        layout=top.text("layout"),
        rows=tuple(rows),
        carried=carried,
        refused=refused,
        spellings=top.spellings(),
        placements=placements,
        files=_files(top.table("files")) if top.has("files") else None,
        inventory=inventory,
    )
    for row in inventory.rows:
        mapped = row.view.pattern.text in without or any(native.hf is row for native in rows)
        if not mapped and row.tied is None and not any(entry.matches(row) for entry in carried):
            raise MappingError(
                "A Hugging Face row is neither mapped nor carried nor refused.",
                where=f"{file}, for {row.where}",
                found=str(row.view),
                do="add a row, or an entry under `carried` that says why there is no place for it",
            )
    return table


def _native_rows(section: Record, inventory: Inventory) -> Iterator[NativeRow]:
    section.only("tower", "when", "hf", "native", "rows")
    tower = section.text("tower") if section.has("tower") else None
    if tower is not None and tower not in TOWERS:
        raise section.error("An unknown tower.", expected=", ".join(TOWERS), found=tower)
    for record in section.records("rows"):
        record.only("hf", "native", "when", "scale", "share", "fill")
        name = section.text("hf") + record.text("hf")
        hf = inventory.row(name)
        if hf is None:
            raise record.error(
                "The row names a tensor that huggingface.toml does not list.", found=name
            )
        native = record.checked(parse_view, section.text("native") + record.text("native"))
        scale = record.checked(axis_of, record.text("scale"), name) if record.has("scale") else None
        share = _share(record, hf)
        axes = set(hf.view.axes) - {share}
        if set(native.axes) != axes:
            raise record.error(
                "The two sides of the row do not use the same axes.",
                expected=" ".join(sorted(axes)),
                found=" ".join(sorted(native.axes)),
            )
        when = section.condition("when") & record.condition("when", hf.view.pattern)
        fill = _fill(record, hf)
        yield NativeRow(hf, native, when, scale, share, fill, tower, record.where)


def _share(record: Record, hf: HFRow) -> str | None:
    if not record.has("share"):
        return None
    axis = record.checked(axis_of, record.text("share"), hf.view.pattern.text)
    if axis not in hf.view.pattern.axes:
        raise record.error(
            "`share` is an axis that stands in the Hugging Face name.",
            expected=" ".join(hf.view.pattern.axes),
            found=axis,
        )
    return axis


def _fill(record: Record, hf: HFRow) -> int | None:
    if not record.has("fill"):
        return None
    fill = record.values["fill"]
    if type(fill) is not int or fill not in (0, 1):
        raise record.error("`fill` is 0 or 1.", found=fill)
    if hf.optional is None:
        raise record.error("Only an optional tensor can be filled in.", found=str(hf.view))
    return fill


def _refusal(record: Record, inventory: Inventory) -> Refusal:
    record.only("when", "why", "hf")
    names = record.values.get("hf", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise record.error("`hf` is a list of names.", found=names)
    for name in names:
        if inventory.row(name) is None:
            raise record.error("The entry names no tensor of huggingface.toml.", found=name)
    return Refusal(record.condition("when"), record.text("why"), tuple(names))


def _carried_row(record: Record, inventory: Inventory) -> CarriedRow:
    record.only("hf", "when", "why")
    row = CarriedRow(record.text("hf"), record.condition("when"), record.text("why"), record.where)
    if not any(row.matches(hf) for hf in inventory.rows):
        raise record.error("The entry names no tensor of huggingface.toml.", found=row.name)
    return row


def _placement(name: str, record: Record) -> Placement:
    record.only("axis", "after", "refused", "stacks")
    stacks = []
    for stack in record.records("stacks"):
        stack.only("when", "from", "to", "index")
        index = tuple(stack.text("index").split())
        if not index or not set(index) <= {"block", "position"}:
            raise stack.error("A stack is indexed by `block` or `block position`.", found=index)
        stacks.append(
            Stack(
                stack.condition("when", Pattern(stack.text("from"))),
                stack.text("from"),
                stack.text("to"),
                index,
            )
        )
    refused = tuple(
        (entry.only("when", "why").condition("when"), entry.text("why"))
        for entry in record.records("refused")
    )
    after = record.values.get("after")
    if not isinstance(after, int) or isinstance(after, bool) or after < 0:
        raise record.error("`after` is a number of dimensions.", found=after)
    axis = record.checked(axis_of, record.text("axis"), name)
    return Placement(name, axis, after, refused, tuple(stacks))


def _files(record: Record) -> Files:
    record.only("needed", "allowed")
    needed, allowed = (record.patterns(key) for key in ("needed", "allowed"))
    if not needed:
        raise record.error("`needed` has a pattern, by which a checkpoint is known.")
    return Files(needed, allowed)


def _refuse_twice(names: list[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, where in names:
        if name in seen:
            raise MappingError(
                "A name stands twice.", where=f"{where} and {seen[name]}", found=name
            )
        seen[name] = where


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), path.name
    except (OSError, ValueError, RecursionError) as error:
        raise MappingError(
            "A mapping table cannot be read.", where=path.name, found=error
        ) from None
