"""A new file beside the one whose name it will take, with the mode that the umask gives."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

MODE = 0o666
"""Of which the system takes away what the umask says, as for every file that a shell makes."""


def new_sibling(path: Path) -> tuple[int, Path]:
    """(descriptor, path) of an empty file in the folder of `path`, to be written and renamed.

    `tempfile` would make one that nobody else may ever read. Raises OSError.
    """
    sibling = path.with_name(f".{secrets.token_hex(8)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(sibling, flags, MODE), sibling
