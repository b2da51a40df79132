"""Where a checkpoint is kept, and the local folder that stands for it.

A source is a folder, a repository on the hub (`owner/name` or `owner/name@revision`) or a URL of an
object store; a target is a folder or such a URL.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path

from gemma_convert.errors import SourceError, TargetError, UsageError
from gemma_convert.files.confined import NEVER_READ, check_confined
from gemma_convert.files.library_path import without_parents
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.stores.remote.hub import headers_alone, repository, snapshot
from gemma_convert.stores.remote.mirror import find_mirror, mirroring
from gemma_convert.stores.remote.object_store import is_url, parse_url
from gemma_convert.stores.remote.source import mirror_source

_URL_AS_PATH = re.compile(r"^(s3|gs):/(?=[^/])")


def local(
    source: str | Path,
    stack: ExitStack,
    *,
    config_only: bool = False,
    headers: bool = False,
    whole: bool = False,
) -> Path:
    """The folder or file that stands for `source` until `stack` ends.

    That is a local path itself, the hub's snapshot, or a mirror of an object store. With
    `config_only` nothing but config.json is fetched; with `headers` no tensor will be read, so
    that the hub's weights need not come; with `whole` every file must be here, which those of an
    object store are not. Raises SourceError or UsageError where it cannot be had, and where
    something in it would lead out of it (`stores.confined`).
    """
    text = _text(source)
    if is_url(text):
        place = parse_url(text)
        if whole:
            raise SourceError(
                "This command reads local files alone.",
                where=place,
                do="copy the checkpoint to a local folder first",
            )
        return mirror_source(place, stack, _is_config if config_only else None)
    named = None if os.path.lexists(source) else repository(text)
    if named is not None and headers:
        return headers_alone(named, stack)
    if named is None:
        path = without_parents(Path(source))
        if path.is_dir():
            check_confined(path, passed_over=NEVER_READ)
        return path
    return snapshot(named, stack, config_only=config_only)


def local_target(target: str | Path, stack: ExitStack) -> Path:
    """The folder that stands for `target` until `stack` ends: itself, or an empty mirror.

    Raises TargetError for a bucket without a prefix, UsageError for another URL.
    """
    text = _text(target)
    if not is_url(text):
        path = without_parents(Path(target))
        return path if path.name else Path(os.path.realpath(path))  # `.` has a name elsewhere
    place = parse_url(text)
    if not place.key:
        raise TargetError(
            "A target is a place inside a bucket.",
            where=place,
            do=f"add a name, such as {place}/out",
        )
    return stack.enter_context(mirroring(place)).folder


def check_remote_options(target: Path, *, resume: bool, processes: int = 1) -> None:
    """Raises UsageError for what cannot be done in an object store."""
    if find_mirror(target) is None:
        return
    if resume:
        raise UsageError(
            "A conversion into an object store is not continued.",
            where=target,
            do="leave out --resume; --overwrite replaces what an interrupted run has left",
        )
    if processes > 1:
        raise UsageError(
            "A checkpoint in an object store is written by one process.",
            where=target,
            do="start one process alone, or choose a target on a shared file system",
        )


def _text(place: str | Path) -> str:
    """What was typed: `Path` makes one slash of the two in a URL."""
    return _URL_AS_PATH.sub(r"\1://", str(place)) if isinstance(place, Path) else place


def _is_config(name: str) -> bool:
    return name.rpartition("/")[2] == CONFIG
