"""Two reports beside each other as one HTML page, in the dress of a report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from gemma_convert.logits.comparison import ReportComparison, Side
from gemma_convert.logits.comparison_table import (
    HEAD,
    Row,
    figure_rows,
    part_rows,
    sequence_rows,
)
from gemma_convert.logits.html_page import page, plain, scrolling, sentence
from gemma_convert.version import __version__


def comparison_page(found: ReportComparison, written: datetime) -> str:
    """The page: verdict, what is worse, figures, parts, sequences, and of what the reports are."""
    body = "".join(
        (
            _head(found),
            "<main>",
            _section("figures", "Figures", figure_rows(found)),
            _section(
                "parts",
                "Error of each part / its rounding error",
                part_rows(found),
            ),
            _section("sequences", "Largest KL of each sequence", sequence_rows(found)),
            _sides(found),
            f"</main><footer><p>Written {written:%Y-%m-%d %H:%M} UTC by gemma-convert "
            f"{plain(__version__)}.</p></footer>",
        )
    )
    return page(f"{found.verdict}: two reports compared", body)


def _head(found: ReportComparison) -> str:
    kind, sign = ("pass", "✓") if found.passed else ("fail", "✗")
    lead = "".join(f'<p class="lead">{plain(sentence(one))}.</p>' for one in found.worse)
    if found.passed:
        said = "No figure beyond its limit has grown, and no part fails that did not fail before."
        lead = f'<p class="lead">{said}</p>'
    unlike = "".join(f"<li>The two checks differ: {plain(one)}.</li>" for one in found.unlike)
    return (
        f'<header class="{kind}"><p class="kicker">gemma-convert compare-reports</p>'
        f'<p class="badge"><span aria-hidden="true">{sign}</span> '
        f"{plain(found.before.verdict)} → {plain(found.after.verdict)}</p>"
        f'<h1 id="verdict">{plain(found.verdict)}</h1>{lead}'
        + (f'<ul class="warnings">{unlike}</ul>' if unlike else "")
        + "</header>"
    )


def _section(name: str, title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>'
        f"{scrolling(_table(rows, 'number'), f'Table of {name}')}</section>"
    )


def _table(rows: Sequence[tuple[str, ...]], kind: str) -> str:
    """A table with a name before each row, its cells of the class `kind`."""
    columns = HEAD[1 : len(rows[0])]
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name in columns)
    lines = "".join(
        f'<tr><th scope="row">{plain(name)}</th>'
        + "".join(f'<td class="{kind}">{plain(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _sides(found: ReportComparison) -> str:
    sides = (found.before, found.after)
    names = dict.fromkeys(name for one in sides for name in one.versions)
    rows = [
        ("report", *(one.path for one in sides)),
        ("checkpoint", *(one.checkpoint for one in sides)),
        ("verdict", *(one.verdict for one in sides)),
        *((name, *(_version(one, name) for one in sides)) for name in names),
    ]
    return (
        '<section aria-labelledby="sides"><h2 id="sides">The two checks</h2>'
        f"{scrolling(_table(rows, 'side'), 'Table of the two checks')}</section>"
    )


def _version(side: Side, name: str) -> str:
    return side.versions.get(name, "")
