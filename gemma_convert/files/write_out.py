"""Data on its way to the disk while more of it is made: the sync at the end then has less to do."""

from __future__ import annotations

import contextlib
import os


def start_write_out(descriptor: int, offset: int, length: int) -> None:
    """Asks the system to begin to write these bytes of a file to the disk, and does not wait.

    Linux does so where it is told that they are not needed soon (posix_fadvise(2)); pages that are
    on their way stay in its cache. Nothing happens on other systems, and on file systems that take
    no such advice.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
