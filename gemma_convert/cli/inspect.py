"""`gemma-convert inspect`: what is this checkpoint, and is it all there?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gemma_convert.cli.options import AsJson
from gemma_convert.errors import some
from gemma_convert.mapping.table import HUGGINGFACE

if TYPE_CHECKING:
    from gemma_convert.output import Facts
    from gemma_convert.tasks.inspect import Coverage, InspectReport

SHOWN = 5


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint in any supported layout: a folder, owner/name, or a URL.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint contains: layout, model, parameters, dtypes, sizes, missing tensors.

    \b
    Examples:
      gemma-convert inspect out
      gemma-convert inspect gemma-4-E2B-it --json
    """
    from gemma_convert.output import show, show_json
    from gemma_convert.tasks.inspect import inspect

    report = inspect(path)
    if as_json:
        show_json(report.as_json())
    else:
        show(_table(report))


def _table(report: InspectReport) -> Facts:
    from gemma_convert.output import Facts, counted, human_bytes

    table = Facts()
    form = ", scanned" if report.scanned else ""
    step = "" if report.step is None else f", step {report.step}"
    table.add_row("layout", (_adapter(report) or report.layout) + form + step)
    layers = "? layers" if not report.layers else counted(report.layers, "layer")
    table.add_row("model", f"{report.family or 'unknown'}, {layers}")
    if report.adapter is None:
        table.add_row("towers", ", ".join(report.towers) or "none")
    table.add_row("tensors", f"{report.tensors}, {human_bytes(report.bytes)}")
    table.add_row("parameters", f"{report.parameters:,}")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report.dtypes.items())
    table.add_row("dtypes", dtypes)
    if report.extras:
        table.add_row("not part of the model", ", ".join(report.extras))
    if report.converted_by:
        table.add_row("converted by", report.converted_by)
    if report.lossy_rows:
        table.add_row("lossy", ", ".join(report.lossy_rows))
    for label, text in _coverage(report.coverage):
        table.add_row(label, text)
    return table


def _adapter(report: InspectReport) -> str | None:
    """Rank, alpha and base model of an adapter, as far as it says them; None of a model."""
    adapter = report.adapter
    if adapter is None:
        return None
    alpha = "unknown" if adapter.alpha is None else f"{adapter.alpha:g}"
    kind = "PEFT" if report.layout == HUGGINGFACE else report.layout
    base = "" if report.base_model is None else f", base {report.base_model}"
    return f"{kind} adapter, rank {adapter.rank}, alpha {alpha}{base}"


def _coverage(coverage: Coverage | None) -> list[tuple[str, str]]:
    if coverage is None:
        return [("coverage", "unknown: there is no config.json to compare with")]
    if coverage.complete:
        return [
            (
                "coverage",
                f"complete: all {coverage.expected} tensors are listed, with the right shapes",
            )
        ]
    rows = []
    for label in ("missing", "unexpected", "misshapen"):
        names: tuple[str, ...] = getattr(coverage, label)
        if names:
            words = "wrong shape" if label == "misshapen" else label
            rows.append((words, f"{len(names)}: {some(names, SHOWN)}"))
    return rows
