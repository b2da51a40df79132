"""What pages share: a frame that lets nothing in, tables, and text from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

from gemma_convert.output import printable

BEGINNING = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
"""How every report begins."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
"""The page is full of a model's text: whatever stands in it, the browser runs and loads nothing."""


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML, `title` text."""
    style = files("gemma_convert.logits").joinpath("html_report.css").read_text(encoding="utf-8")
    return (
        f'{BEGINNING}<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{plain(title)}, logit-check</title>"
        f"<style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


def plain(text: str) -> str:
    """Text as HTML on one line, without what does anything."""
    return escape(printable(text))


def sentence(text: str) -> str:
    """Text that begins with a capital letter, and is otherwise as it was."""
    return text[:1].upper() + text[1:]


def scrolling(content: str, name: str) -> str:
    """A box of its own for what may be wider than the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{content}</div>'


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], kind: str = "plain") -> str:
    """A table of texts, of the class `kind`."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{plain(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>'
