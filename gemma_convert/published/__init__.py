"""The published models' config.json, cut down to the keys that are read: one file a model."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent

_SIZE = re.compile(r"\d+")


def published_config(name: str) -> Path | None:
    """The config.json of the published model of that name, in whatever case; None for others."""
    return FOLDER / f"{name.lower()}.json" if name.lower() in published_names() else None


def published_names() -> tuple[str, ...]:
    """The names of the published models, small ones first."""
    names = [file.stem for file in FOLDER.glob("*.json")]
    return tuple(sorted(names, key=lambda name: int(_SIZE.findall(name)[0])))
