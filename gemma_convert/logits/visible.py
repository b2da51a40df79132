"""Text of tokens for people: what cannot be seen, or does something, is shown as a sign."""

from __future__ import annotations

import unicodedata

_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_CARRIER = "◌"


def printable(text: str) -> str:
    """`text` on one line: controls, marks of direction, lone surrogates and the like as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def visible(text: str) -> str:
    """A token's text with signs for line breaks and tabs, and escapes as `printable` has them.

    A mark that belongs to the letter before it stands on a circle, and no text is ∅.
    """
    shown = "".join(_SIGNS.get(one) or printable(one) for one in text)
    if not shown:
        return "∅"
    return f"{_CARRIER}{shown}" if unicodedata.category(shown[0]).startswith("M") else shown


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
