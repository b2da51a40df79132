"""What is asked of a target before anything is written: free, apart from the source, with room."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePath, PurePosixPath

from gemma_convert.checkpoint.accounted import Strangers, beside_native
from gemma_convert.errors import SourceError, TargetError, some
from gemma_convert.stores.remote.mirror import find_mirror
from gemma_convert.stores.remote.target import check_remote_target, target_mirror


def check_target(target: Path, *, overwrite: bool, strangers: Strangers = beside_native) -> None:
    """Raises TargetError where `target` may not be written or replaced."""
    mirror = target_mirror(target)
    if mirror is not None:
        return check_remote_target(mirror, overwrite=overwrite)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise TargetError(
            "The target exists.",
            where=target,
            do="choose another target, or replace it with --overwrite",
        )
    if target.is_symlink() or not target.is_dir():
        raise TargetError("The target is not a folder, so it is not replaced.", where=target)
    try:
        others = strangers(target) if any(target.iterdir()) else []
    except OSError as error:
        raise TargetError(
            "The target cannot be read, so it is not replaced.",
            where=target,
            found=error.strerror,
            do="choose another target",
        ) from None
    if others:
        raise TargetError(
            "The target holds what belongs to no checkpoint, so it is not replaced.",
            where=target,
            found=some(others),
            do="move it away, or choose another target",
        )


def check_order(source: Path, target: Path) -> None:
    """Raises SourceError where there is no source but a target, as if they had been swapped."""
    if not source.exists() and target_mirror(target) is None and target.exists():
        raise SourceError(
            "There is no such checkpoint.",
            where=source,
            do=f"give a checkpoint; {target}, which was given as the target, exists: if the two "
            "were swapped, name it first",
        )


def check_apart(source: Path, target: Path) -> None:
    """Raises TargetError where source and target lie in one another."""
    inside = _in_store(source) or source.resolve()
    outside = _in_store(target) or target.absolute().parent.resolve() / target.name
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise TargetError(
            "Source and target lie in one another.",
            where=target,
            found=f"source {source}",
            do="choose a target beside the source",
        )


def _in_store(path: Path) -> PurePath | None:
    """The place in an object store that a folder stands for; None for one on this machine."""
    found = find_mirror(path)
    return None if found is None else PurePosixPath(f"{found[0].place.joined(found[1])}")


def check_space(target: Path, needed: int) -> None:
    """Raises TargetError where the file system of `target` has fewer than `needed` bytes free."""
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TargetError(
            "There is not enough space for the target.",
            where=folder,
            expected=f"{needed:,} bytes free",
            found=f"{free:,} bytes",
            do="free some space, or choose a target on another file system",
        )
