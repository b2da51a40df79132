"""Local folders that stand for another place, and the name that people know each of them by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES: dict[str, str] = {}


@contextmanager
def named(folder: Path, name: str) -> Iterator[None]:
    """While this lasts, messages and reports say `name` for `folder`."""
    before = _NAMES.get(str(folder))
    _NAMES[str(folder)] = name
    try:
        yield
    finally:
        if before is None:
            _NAMES.pop(str(folder), None)
        else:
            _NAMES[str(folder)] = before


def shown(place: object) -> str:
    """A path, or a text with paths, in which folders that stand for others have their names."""
    text = str(place)
    for folder, name in sorted(_NAMES.items(), key=lambda entry: -len(entry[0])):
        text = text.replace(folder, name)
    return text
