"""The marks of a checkpoint that is still being written, here and in object stores."""

from __future__ import annotations

from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.output import shown

JOURNAL = ".gemma-convert.journal"
LOCK = ".gemma-convert.lock"

UNFINISHED = (JOURNAL, LOCK)
"""Files that a folder holds only while it is being built."""


def refuse_unfinished(folder: Path) -> None:
    """Raises SourceError where `folder` holds what a run that did not end has left."""
    if any((folder / name).exists() for name in UNFINISHED):
        remote = "://" in shown(folder)
        raise SourceError(
            "This is an unfinished conversion.",
            where=folder,
            do=f"run the conversion again with {'--overwrite' if remote else '--resume'}",
        )
