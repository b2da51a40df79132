"""Text of tokens for people: what cannot be seen, or does something, is shown as a sign."""

from __future__ import annotations

import unicodedata

from gemma_convert.output import printable

_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_CARRIER = "◌"


def visible(text: str) -> str:
    """A token's text with signs for line breaks and tabs, and escapes as `printable` has them.

    A mark that belongs to the letter before it stands on a circle, and no text is ∅.
    """
    shown = "".join(_SIGNS.get(one) or printable(one) for one in text)
    if not shown:
        return "∅"
    return f"{_CARRIER}{shown}" if unicodedata.category(shown[0]).startswith("M") else shown
