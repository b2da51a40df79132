"""What tells a file from another one that took its name: for sources that must not change."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gemma_convert.errors import SourceError

Identity = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, and the times in ns of the last change of contents and of inode."""


class Unchanged:
    """The files of a source as they were when it was opened: relative name → identity."""

    def __init__(self, folder: Path, files: Iterable[str | Path] | None = None) -> None:
        """Of all files below `folder`, or of the named ones."""
        self.folder = folder
        self._named = None if files is None else sorted(map(str, files))
        self.files = self._now()

    def _now(self) -> dict[str, Identity]:
        names = _below(self.folder, "") if self._named is None else self._named
        found = {}
        for name in names:
            try:
                status = (self.folder / name).stat()
            except OSError:
                found[name] = (0, 0, -1, 0, 0)
                continue
            times = status.st_mtime_ns, status.st_ctime_ns
            found[name] = (status.st_dev, status.st_ino, status.st_size, *times)
        return found

    def check(self) -> None:
        """Raises SourceError where a file was changed, replaced, removed or added meanwhile."""
        now = self._now()
        changed = [name for name in {*self.files, *now} if self.files.get(name) != now.get(name)]
        if changed:
            raise SourceError(
                "The source changed while it was read.",
                where=self.folder / min(changed),
                do="leave the source alone until the conversion ends, then start again",
            )


def _below(folder: Path, name: str) -> Iterator[str]:
    for entry in os.scandir(folder / name):
        inner = f"{name}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _below(folder, f"{inner}/")
        else:
            yield inner
