"""Nothing outside a checkpoint's folder is read: what stands in it, and where its links lead.

The folder that somebody names may be a link itself. Below it a link leads to a file in the folder,
or, in a snapshot of the hub's cache, to a file among the blobs of that repository:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from gemma_convert.errors import SourceError

NEVER_READ = frozenset({".git", ".cache", "__pycache__", "lost+found"})
"""Folders in which other programs keep what is no checkpoint's."""

_INSTEAD = "put what it leads to in its place, or remove it"


def check_confined(folder: Path, below: str = "", passed_over: Collection[str] = ()) -> None:
    """Nothing where all that stands in `folder` is a folder, a file, or a link to a file in it.

    With `below` that is asked of this name in it and of what lies there. Folders whose name is
    `passed_over` are not looked into. Raises SourceError for links that lead elsewhere, for
    linked folders, and for pipes, sockets and devices, which could be read without end.
    """
    root = Path(os.path.realpath(folder))
    if below and not _is_folder(folder / below, root):
        return
    waiting = [folder / below]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = Path(entry.path)
                    if _is_folder(path, root) and entry.name not in passed_over:
                        waiting.append(path)
        except OSError as error:
            raise SourceError(
                "The checkpoint cannot be read.", where=error.filename, found=error.strerror
            ) from None


def _is_folder(path: Path, root: Path) -> bool:
    """Whether a folder stands there; raises SourceError for what must not be read."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        _check_link(path, root)
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SourceError(
            "The checkpoint holds something that is not a file.", where=path, do="remove it"
        )
    return stat.S_ISDIR(mode)


def _check_link(link: Path, root: Path) -> None:
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(root) and not _is_blob(link, target):
        raise SourceError(
            "A symbolic link in the checkpoint points outside its folder.",
            where=link,
            expected=f"a file below {root}",
            found=target,
            do=_INSTEAD,
        )
    if target.exists() and not target.is_file():
        raise SourceError(
            "A symbolic link in the checkpoint does not point to a file.",
            where=link,
            found=target,
            do=_INSTEAD,
        )


def _is_blob(link: Path, target: Path) -> bool:
    """Whether `target` is a blob of the hub's cache, and `link` lies in a snapshot there."""
    repository = target.parent.parent
    here = Path(os.path.realpath(link.parent))
    return (
        target.parent == repository / "blobs"
        and here.is_relative_to(repository / "snapshots")
        and here != repository / "snapshots"
    )
