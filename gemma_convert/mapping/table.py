"""mappings/*.toml → typed rows. The tables are data; this module only reads and checks them.

Unknown keys, unknown axes or facts, an axis used twice, a row whose two sides do not use the same
axes, and names that stand twice are errors that name the file, the row and the reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemma_convert.errors import MappingError, UsageError
from gemma_convert.mapping.adapter_form import adapter_form
from gemma_convert.mapping.declared import declaration, is_own, module_folder, package
from gemma_convert.mapping.notation import Pattern, axis_of, parse_view
from gemma_convert.mapping.record import Record
from gemma_convert.mapping.rows import (
    CarriedRow,
    Files,
    HFRow,
    Inventory,
    NativeRow,
    Placement,
    Refusal,
    Stack,
    Table,
    possible,
)
from gemma_convert.mapping.versions import versioned

HUGGINGFACE = "huggingface"

TOWERS = ("vision", "audio")

_KEYS = [
    "layout",
    "versions",
    "files",
    "spellings",
    "carried",
    "refused",
    "placement",
    "adapter",
    "no_adapter",
    "section",
    "fact",
    "models",
    "named",
]


def mappings_folder() -> Path:
    """The folder of the tables: inside the installed wheel, or at the top of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "mappings"
    return installed if installed.is_dir() else package.parent / "mappings"


@cache
def load_inventory() -> Inventory:
    """The Hugging Face inventory, read once."""
    return parse_inventory(*read_toml(table_file(HUGGINGFACE)))


@cache
def load_table(layout: str, version: str | None = None) -> Table:
    """The table of a native layout for a version of its framework, its first by default.

    Raises UsageError where there is no such layout or version, or another package's table is wrong.
    """
    declared, file = declaration(layout), table_file(layout)
    try:
        return _checked_table(layout, file, version)
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


def _checked_table(layout: str, file: Path, version: str | None) -> Table:
    table = parse_table(*read_toml(file), load_inventory(), version)
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
    top = Record(data, file).only("layout", "spellings", "section", "fact")
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


def parse_table(
    data: Mapping[str, Any], file: str, inventory: Inventory, version: str | None = None
) -> Table:
    """The table in the parsed TOML of a native layout; its rows are joined to the inventory's.

    Rows that the `version` has not are left out.
    """
    top, chosen = versioned(data, file, version)
    top.only(*_KEYS)
    rows = possible(
        row for section in top.records("section") for row in _native_rows(section, inventory)
    )
    carried = possible(_carried_row(record, inventory) for record in top.records("carried"))
    refused = possible(_refusal(record, inventory) for record in top.records("refused"))
    without = {name for refusal in refused for name in refusal.names}
    forms = top.table("placement")
    placements = {name: _placement(name, forms.table(name)) for name in forms.values}
    table = Table(
        layout=top.text("layout"),
        version=chosen.name,
        rows=rows,
        carried=carried,
        refused=refused,
        spellings=top.spellings(),
        placements=placements,
        files=_files(top.table("files")) if top.has("files") else None,
        inventory=inventory,
        adapter=adapter_form(top.table("adapter"), rows) if top.has("adapter") else None,
        no_adapter=top.text("no_adapter") if top.has("no_adapter") else None,
    )
    for row in inventory.rows:
        mapped = row.view.pattern.text in without or any(native.hf is row for native in rows)
        if not mapped and not any(entry.matches(row) for entry in carried):
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
    if not needed and not allowed:
        raise record.error("`needed` or `allowed` has a pattern.")
    return Files(needed, allowed)


def _refuse_twice(names: list[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, where in names:
        if name in seen:
            raise MappingError(
                "A name stands twice.", where=f"{where} and {seen[name]}", found=name
            )
        seen[name] = where


def read_toml(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), path.name
    except (OSError, ValueError, RecursionError) as error:
        raise MappingError(
            "A mapping table cannot be read.", where=path.name, found=error
        ) from None
