"""A folder's path as tensorstore and Orbax take it: absolute, without `..`, and in UTF-8."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path


def without_parents(path: Path) -> Path:
    """`path` without `..`, whose folder is where the system finds it; as it was typed without any.

    What the last name of the path is a link to stays a link.
    """
    if ".." not in path.parts:
        return path
    if path.name == "..":
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def library_path(folder: Path) -> Path:
    """A path of a folder or file, which exists, that the libraries take.

    They know nothing but UTF-8, and tensorstore refuses a backslash, and two slashes that a path
    begins with; what could mean something else to one of them goes by a link.
    """
    folder = without_parents(folder.absolute())
    folder = Path("/", *folder.parts[1:])
    return folder if _taken(folder) else _link(folder)


def _taken(path: Path) -> bool:
    return str(path).isprintable() and "\\" not in str(path)


@cache
def _link(folder: Path) -> Path:
    """A link to a folder or file in a temporary folder of this process."""
    usual = Path(tempfile.gettempdir())
    links = tempfile.mkdtemp(prefix="gemma-convert-", dir=usual if _taken(usual) else "/tmp")
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    link = Path(links, "checkpoint")
    link.symlink_to(folder)
    return link
