"""Data on its way to the disk while more of it is made, and the sync at the end: less is left."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SYNCS = 8
"""At once: a file system's journal takes what many wait for in one go."""


def start_write_out(descriptor: int, offset: int, length: int) -> None:
    """Asks the system to begin to write these bytes of a file to the disk, and does not wait.

    Linux does so where it is told that they are not needed soon (posix_fadvise(2)); pages that are
    on their way stay in its cache. Nothing happens on other systems, and on file systems that take
    no such advice.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Makes everything below `folder` durable: one fsync for each file and each folder."""
    paths = [Path(root, name) for root, _, files in os.walk(folder) for name in (*files, "")]
    with ThreadPoolExecutor(SYNCS, thread_name_prefix="sync") as pool:
        for _ in pool.map(sync_path, paths):
            pass


def sync_path(path: Path) -> None:
    """Makes one file, or the names in one folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NewFiles:
    """The files of a folder that a library writes: each is written out when it is there."""

    def __init__(self, folder: Path, unfinished: str) -> None:
        """Names that end in `unfinished` are those of files that are still being written."""
        self._folder, self._unfinished = folder, unfinished
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def start_write_out(self) -> None:
        """Begins with those that were not there before."""
        with self._lock, contextlib.suppress(OSError):
            for name in {path.name for path in self._folder.iterdir()} - self._known:
                if name.endswith(self._unfinished):
                    continue
                self._known.add(name)
                descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    start_write_out(descriptor, 0, 0)
                finally:
                    os.close(descriptor)
