"""Output that appears under its final name only when it is complete.

Everything is written into a hidden sibling, `.NAME.partial`, which is renamed at the end. A lock
keeps a second run away; an interrupted run leaves nothing under the final name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path, PurePath, PurePosixPath
from types import TracebackType

from gemma_convert.errors import TargetError
from gemma_convert.stores.remote import find_mirror
from gemma_convert.stores.remote_target import check_remote_target, target_mirror
from gemma_convert.stores.unfinished import LOCK


class StagedFolder:
    """A folder that is built as a sibling of `target` and renamed into place by `publish`.

    Use as a context manager: leaving it without `publish` removes what was written, unless the run
    was interrupted and may be resumed. `resume` keeps what an earlier run left. Raises TargetError
    where `target` exists (unless `overwrite`), or another run builds it.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.target = target.absolute()
        self.folder = staged_folder(self.target)
        self.overwrite, self.resume = overwrite, resume
        self._lock: int | None = None
        self._published = False

    def __enter__(self) -> StagedFolder:
        check_target(self.target, overwrite=self.overwrite)
        made = not os.path.lexists(self.folder)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.is_symlink():
                raise TargetError(
                    "A link stands where the output is to be built.",
                    where=self.folder,
                    do="remove the link",
                )
            self.folder.mkdir(exist_ok=True)
            self._take_lock()
            if self.resume:
                self._refuse_links()
            else:
                self.clear()
        except OSError as error:
            self._unlock()
            if made:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise TargetError(
                "The target cannot be written.", where=self.folder, found=error.strerror
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published and not (kind and issubclass(kind, KeyboardInterrupt)):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def clear(self) -> None:
        """Removes what an earlier run left in the folder."""
        for entry in self.folder.iterdir():
            if entry.name != LOCK:
                _remove(entry)

    def publish(self) -> None:
        """Renames the finished folder to its final name; an old one is removed only afterwards.

        Raises TargetError where it is not the folder that was begun.
        """
        self._check_ours()
        (self.folder / LOCK).unlink()
        old = self.target.with_name(f".{self.target.name}.replaced")
        try:
            if self.overwrite and os.path.lexists(self.target):
                _remove(old)
                self.target.rename(old)
            self.folder.rename(self.target)
        except OSError as error:
            if os.path.lexists(old) and not os.path.lexists(self.target):
                old.rename(self.target)
            raise TargetError(
                "The finished output cannot be renamed.", where=self.target, found=error.strerror
            ) from None
        self._published = True
        _sync(self.target.parent)
        _remove(old)

    def _refuse_links(self) -> None:
        """What an interrupted run left has no links: through one we would write elsewhere."""
        for root, folders, files in os.walk(self.folder):
            for path in (Path(root, name) for name in (*folders, *files)):
                mode = path.lstat().st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    self._unlock()
                    raise TargetError(
                        "A link or a pipe stands where the output is to be built.",
                        where=path,
                        do="remove it",
                    )

    def _check_ours(self) -> None:
        """A folder that was removed comes back when a file is written, without what was in it."""
        lock = self.folder / LOCK
        if self._lock is None or not (
            lock.exists() and os.path.samestat(os.fstat(self._lock), lock.stat())
        ):
            raise TargetError(
                "The target was removed while it was written.",
                where=self.folder,
                do="leave the folder alone until the conversion ends, then start again",
            )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EACCES}:
                raise
            self._published = True  # what lies there belongs to the other run
            self._unlock()
            raise TargetError(
                "Another run is writing this target.",
                where=self.target,
                do="wait for it, or choose another target",
            ) from None


def staged_folder(target: Path) -> Path:
    """Where `target` is built."""
    return target.absolute().with_name(f".{target.name}.partial")


def check_target(target: Path, *, overwrite: bool) -> None:
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
    if any(target.iterdir()) and not _is_checkpoint(target):
        raise TargetError(
            "The target is not a checkpoint, so it is not replaced.",
            where=target,
            do="choose another target, or remove it yourself",
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


def _is_checkpoint(folder: Path) -> bool:
    marks = (
        "_METADATA",
        "_CHECKPOINT_METADATA",
        "config.json",
        "metadata.yaml",
        "hf/gemma-convert",
    )
    return any((folder / mark).exists() for mark in marks) or any(
        (entry / "items" / "_METADATA").exists() for entry in folder.iterdir() if entry.is_dir()
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
