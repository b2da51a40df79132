"""`gemma-convert mappings`: the tables, and what they make of every tensor of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_convert.cli.options import LAYOUTS, AsJson, FrameworkVersion
from gemma_convert.mapping.declared import layout_names

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gemma_convert.mapping.fact_listing import FactEntry
    from gemma_convert.mapping.listing import Entry, Side, TableEntry
    from gemma_convert.tasks.mappings import FormatSummary, MappingsReport


def _published() -> list[str]:
    from gemma_convert.published import published_names

    return list(published_names())


def command(
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar=LAYOUTS,
            help="Native layout; without it all layouts are listed.",
            autocompletion=layout_names,
        ),
    ] = None,
    framework_version: FrameworkVersion = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="A published model (e2b, e4b, 12b, 26b-a4b, 31b), a checkpoint, or a config.json.",
            autocompletion=_published,
        ),
    ] = None,
    scan_layers: Annotated[
        bool,
        typer.Option(
            "--scan-layers/--no-scan-layers",
            help="The scanned form of MaxText: layers are stacked into one array.",
            rich_help_panel="Form",
        ),
    ] = False,
    facts: Annotated[
        bool, typer.Option("--facts", help="List the keys of config.json instead of the tensors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List where every tensor goes: both names, axes, shapes and dtypes, side by side.

    Without --model the mapping table of the layout is listed as it is written; without --format
    there is one line for each layout. The published models are built in, so no file is needed.
    In a file or a pipe the fields are separated by tabs.

    \b
    Examples:
      gemma-convert mappings --format maxtext --facts
      gemma-convert mappings --format gemma-jax --model e2b
      gemma-convert mappings --format maxtext --model 31b --scan-layers --json
    """
    from gemma_convert.output import show, show_json
    from gemma_convert.tasks.mappings import list_mappings

    report = list_mappings(
        layout, model, framework_version=framework_version, scan_layers=scan_layers, facts=facts
    )
    if as_json:
        show_json(report.as_json())
        return
    header, rows = _fields(report)
    if sys.stdout.isatty():
        show(_table(report) if report.tensors else _grid(header, rows))
        return
    for line in (header, *rows):
        show("\t".join(line))


def _fields(report: MappingsReport) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The names of the fields, and the fields of every line."""
    if report.tensors:
        return _TENSOR_FIELDS, [_tensor_fields(entry) for entry in report.tensors]
    if report.facts:
        return _FACT_FIELDS, [_fact_fields(entry) for entry in report.facts]
    if report.rows:
        return _ROW_FIELDS, [_row_fields(row) for row in report.rows]
    header = _FORMAT_FIELDS if report.model is None else _MODEL_FIELDS
    return header, [_format_fields(entry, report.model is None) for entry in report.formats]


_TENSOR_FIELDS = (
    *("kind", "huggingface", "axes", "shape", "dtype"),
    *("native", "axes", "shape", "dtype", "note"),
)
_ROW_FIELDS = ("kind", "huggingface", "native", "when", "note")
_FACT_FIELDS = ("kind", "config.json", "native", "model", "framework", "note")
_FORMAT_FIELDS = ("format", "framework", "rows", "scans", "refuses")
_MODEL_FIELDS = ("format", "tensors", "equal", "carried", "arrays", "filled", "size", "refused")


def _tensor_fields(entry: Entry) -> Sequence[str]:
    return (entry.kind, *_side(entry.hf), *_side(entry.native), "; ".join(_notes(entry)))


def _side(side: Side | None) -> Sequence[str]:
    if side is None:
        return ("", "", "", "")
    return (side.name, f"[{side.axes}]", _shape(side.shape), side.dtype)


def _shape(shape: Iterable[int]) -> str:
    return f"[{' '.join(map(str, shape))}]"


def _notes(entry: Entry) -> Iterator[str]:
    if entry.scale is not None:
        yield f"× √{entry.scale_axis} = {entry.scale:.9g}"
    if entry.fill is not None:
        filled = f"filled with {entry.fill}"
        yield filled if entry.kind == "filled" else f"{filled} where it is absent"
    if entry.equals is not None:
        yield f"equal to {entry.equals}"
    if entry.why is not None:
        yield entry.why


def _fact_fields(entry: FactEntry) -> Sequence[str]:
    framework = entry.fixed if entry.kind == "built in" else entry.named
    values = ("" if value is None else str(value) for value in (entry.value, framework))
    return (entry.kind, entry.hf, entry.native or "", *values, entry.why or "")


def _row_fields(row: TableEntry) -> Sequence[str]:
    return (row.kind, row.hf or "", row.native or "", row.when, "; ".join(_row_notes(row)))


def _row_notes(row: TableEntry) -> Iterator[str]:
    if row.scale is not None:
        yield f"× √{row.scale}"
    if row.optional is not None:
        yield f"may be absent where {row.optional}"
    if row.fill is not None:
        yield f"filled with {row.fill} where it is absent"
    if row.share is not None:
        yield f"one for all of {row.share}, which are equal"
    if row.equals is not None:
        yield f"equal to {row.equals}, or absent"
    if row.why is not None:
        yield row.why


def _format_fields(entry: FormatSummary, without_model: bool) -> Sequence[str]:
    from gemma_convert.output import human_bytes

    why = "; ".join(entry.refused)
    if without_model:
        scans = "yes" if entry.scans else "no"
        return (entry.format, entry.framework, str(entry.rows), scans, why)
    sizes = entry.model
    if sizes is None:
        return (entry.format, "", "", "", "", "", "", why)
    counts = (sizes.tensors, sizes.equal, sizes.carried, sizes.arrays, sizes.filled)
    return (entry.format, *map(str, counts), human_bytes(sizes.bytes), why)


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _table(report: MappingsReport) -> RenderableType:
    """Two columns, the Hugging Face tensor and the native one; below each name what it is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("Hugging Face", report.format or "native"):
        table.add_column(name, overflow="fold", ratio=1)
    for entry in report.tensors:
        notes = "; ".join(_notes(entry))
        table.add_row(Text(entry.hf.name if entry.hf else ""), _native_text(entry, notes))
        below = [" ".join(_side(side)[1:]) for side in (entry.hf, entry.native)]
        if entry.native is not None and notes:
            below[1] += f"  {notes}"
        table.add_row(*(Text(text, style="dim") for text in below))
    return table


def _native_text(entry: Entry, notes: str) -> RenderableType:
    from rich.text import Text

    if entry.native is None:
        return Text(f"{entry.kind}: {notes}", style="yellow")
    return Text(entry.native.name)
