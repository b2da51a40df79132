"""Two reports beside each other: the rows of their tables, and the tables for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gemma_convert.logits.comparison import Change, ReportComparison, shown

if TYPE_CHECKING:
    from rich.console import RenderableType

HEAD = ("", "before", "after", "change")
_SHARES = frozenset({"top-1 agreement", "top-10 agreement"})
_ALIKE = 0.005
"""Ratios nearer to one are no change in three digits."""

Row = tuple[str, str, str, str]


def figure_rows(found: ReportComparison) -> list[Row]:
    """The figures of the whole runs."""
    return [_row(one) for one in found.figures]


def sequence_rows(found: ReportComparison) -> list[Row]:
    """The largest KL of each sequence."""
    return [_row(one) for one in found.sequences]


def part_rows(found: ReportComparison) -> list[Row]:
    """Each kind of part: how many times its rounding it is off at most, and how many fail."""
    return [
        (
            one.name,
            _times(one.before, len(one.failed_before)),
            _times(one.after, len(one.failed_after)),
            _ratio(one.before, one.after),
        )
        for one in found.parts
    ]


def _row(one: Change) -> Row:
    if one.name not in _SHARES:
        return one.name, shown(one.before), shown(one.after), _ratio(one.before, one.after)
    before, after = ("" if each is None else f"{each:.2%}" for each in (one.before, one.after))
    if one.before is None or one.after is None or one.before == one.after:
        return one.name, before, after, ""
    return one.name, before, after, f"{100 * (one.after - one.before):+.2f} points"


def _times(value: float | None, failing: int) -> str:
    if value is None:
        return ""
    times = f"{value:,.1f} ×" if math.isfinite(value) else "NaN"
    return f"{failing} failed, {times}" if failing else times


def _ratio(before: float | None, after: float | None) -> str:
    if not before or after is None or not math.isfinite(before) or not math.isfinite(after):
        return ""
    ratio = after / before
    return "" if abs(ratio - 1) < _ALIKE else f"× {ratio:.3g}"


def render(found: ReportComparison) -> RenderableType:
    """The verdict, what is worse, the two checks, figures, parts and sequences, for rich."""
    from rich.console import Group
    from rich.text import Text

    colour = "green" if found.passed else "red"
    named = {
        "": figure_rows(found),
        "each part, error / rounding": part_rows(found),
        "largest KL of": sequence_rows(found),
    }
    tables = [_table(name, rows) for name, rows in named.items() if rows]
    return Group(
        Text(found.verdict, style=f"bold {colour}"),
        *(Text(f"✗ {one}", style="red") for one in found.worse),
        Text(f"before  {found.before.path}: {found.before.verdict}", style="dim"),
        Text(f"after   {found.after.path}: {found.after.verdict}", style="dim"),
        *(one for table in tables for one in ("", table)),
        *(Text(f"! the two checks differ: {one}", style="yellow") for one in found.unlike),
    )


def _table(name: str, rows: list[Row]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from gemma_convert.output import printable

    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for number, head in enumerate((name, *HEAD[1:])):
        table.add_column(head, justify="right" if number else "left", header_style="dim")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
