"""Temporary files for what was fetched, and one message where they have no room."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_convert.errors import TargetError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def with_room() -> Iterator[None]:
    """Raises TargetError where what the block writes into temporary folders has no room there."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise TargetError(
            "There is no room for temporary files.",
            where=tempfile.gettempdir(),
            found=error.strerror,
            do="make room there, or let TMPDIR name a folder that has it",
        ) from None


def temporary_bytes(count: int, folder: Path) -> NDArray[np.uint8]:
    """`count` bytes of a file in `folder` that has no name, and goes when they go.

    They are reserved, since a full disk kills a process that writes through a map. Raises
    TargetError where there is no room for them.
    """
    with with_room(), tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(count)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, count)
        return np.asarray(np.memmap(file, np.uint8, "r+", 0, count))
