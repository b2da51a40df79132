"""A report as a compact table for a terminal, with the KL of each sequence's tokens as a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.report_lines import (
    arithmetic_line,
    compared_line,
    drift_line,
    mistake_lines,
    native_line,
    noise_line,
    not_run_line,
    parts_line,
)
from gemma_convert.logits.scale import figure, log_range
from gemma_convert.logits.sparkline import Sparkline
from gemma_convert.logits.tokens import worst_first
from gemma_convert.output import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_SPARKLINES = 12


def render(report: LogitReport) -> RenderableType:
    """A compact table of the report, for rich, with the KL of each sequence's tokens as a line."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = "green" if report.passed and report.proof else "yellow" if report.passed else "red"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", max_width=24, no_wrap=True, overflow="ellipsis")
    lines.add_column(no_wrap=True)
    lines.add_column()
    lines.add_row()
    for name, value, sparkline in _sparklines(report):
        lines.add_row(Text(printable(name)), value, sparkline)
    warnings = [Text(f"! {warning}", style="yellow") for warning in report.warnings]
    return Group(Text(report.verdict, style=f"bold {colour}"), table, lines, *warnings)


def _sparklines(report: LogitReport) -> list[tuple[str, str, Sparkline | str]]:
    """Name, largest value and line of each sequence, of the worst where they are many."""
    span = log_range([kl for one in report.checked for kl in one.compared], report.limit)
    order = worst_first([one.kl_max for one in report.checked])
    kept = sorted(order[:_MOST_SPARKLINES])
    head = f"by position, from 1e{span.low} to 1e{span.high}"
    rows: list[tuple[str, str, Sparkline | str]] = [("", "KL max", head)] if kept else []
    rows += [
        (one.name, figure(one.kl_max), Sparkline(one.kl, span, report.limit))
        for one in (report.checked[number] for number in kept)
    ]
    if len(order) > len(kept):
        rows.append((f"and {len(order) - len(kept)} more", "", "all of them better"))
    if report.drift is not None:
        drift, tolerance = report.drift, report.drift.tolerance
        stages = drift.stages
        span = log_range(list(stages.values()), tolerance)
        worst = figure(stages[list(stages)[worst_first(list(stages.values()))[0]]])
        rows.append(("drift by layer", worst, Sparkline(list(stages.values()), span, tolerance)))
    return rows


def _lines(report: LogitReport) -> list[tuple[str, str]]:
    found, worst, local = report.divergence, report.divergence.worst, report.local
    text = "" if worst.text is None else f" {worst.text!r}"
    place = f"{printable(worst.sequence)}, position {worst.position}"
    return [
        ("KL max", f"{found.kl_max:.2e}   limit {report.limit:.0e} ({report.limit_reason})"),
        ("worst token", f"{place}: id {worst.token}{text}"),
        ("KL p99, mean", f"{found.kl_p99:.2e}, {found.kl_mean:.2e}"),
        (
            "agreement",
            f"top-1 {found.top1_agreement:.2%}, top-10 {found.topk_overlap:.2%}, largest logit "
            f"difference {found.max_logit_difference:.2e}",
        ),
        *([("drift", drift_line(report.drift))] if report.drift is not None else []),
        ("parts of layers", parts_line(report)),
        *([("probable cause", "\n".join(mistake_lines(local)))] if local and local.failed else []),
        *([("noise floor", noise_line(report))] if report.noise_floor is not None else []),
        ("compared", compared_line(report)),
        *([("not run", not_run_line(report))] if report.towers_not_run else []),
        ("reference", f"{report.reference}, float32, {report.reference_device}"),
        ("native", native_line(report)),
        ("arithmetic", arithmetic_line(report)),
        (
            "time, memory",
            f"{report.seconds:.1f} s, {report.peak_memory_bytes / 1e9:.1f} GB at most"
            + (", both models whole" if report.whole_model else ", layer by layer"),
        ),
    ]
