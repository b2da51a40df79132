"""Runs the commands of a framework's script; needs nothing but Python, in any environment."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path


def run(words: list[str], *commands: Callable[..., None]) -> int:
    """How many of the commands in `words`, set apart by `+`, failed: each is a name and paths."""
    known = {one.__name__: one for one in commands}
    failed = 0
    while words:
        end = words.index("+") if "+" in words else len(words)
        name, *paths = words[:end]
        words = words[end + 1 :]
        try:
            known[name](*map(Path, paths))
        except Exception:
            traceback.print_exc()
            failed += 1
    return failed
