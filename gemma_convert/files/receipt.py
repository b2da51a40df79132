"""What says that a folder is an export of ours: a note on the folder, and in none of its files.

An export has the original's files and no other, so the note is an extended attribute: a digest of
every name, size and time below the folder. It stays when the folder is renamed, and no longer
matches when a file is changed, added or taken away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

_NAME = "user.gemma-convert.export"


def leave_receipt(folder: Path) -> None:
    """Notes what is in `folder` now, where its file system keeps extended attributes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setxattr(folder, _NAME, contents(folder))


def has_receipt(folder: Path) -> bool:
    """Whether the note on `folder` is of what is in it now."""
    if sys.platform != "linux":
        return False
    try:
        return os.getxattr(folder, _NAME) == contents(folder)
    except OSError:
        return False


def contents(folder: Path) -> bytes:
    """A digest of the names, sizes and times of the files below `folder`, in hex."""
    digest = hashlib.sha256()
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(root, name)
            status = path.lstat()
            entry = os.fsencode(path.relative_to(folder))
            digest.update(b"%s\0%d %d\n" % (entry, status.st_size, status.st_mtime_ns))
    return digest.hexdigest().encode()
