"""Output that appears under its final name only when it is complete.

Everything is written into a hidden sibling, `.NAME.partial/new`, which takes the final name at the
end. A lock file beside `new` says that the sibling is ours and keeps a second run away; a sibling
without one belongs to somebody, and the next free name is taken. An interrupted run leaves nothing
under the final name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from gemma_convert.checkpoint.accounted import Strangers, beside_native
from gemma_convert.engine.target import check_target
from gemma_convert.errors import TargetError
from gemma_convert.files.exchange import exchange
from gemma_convert.files.unfinished import LOCK
from gemma_convert.files.write_out import sync_path

_NEW, _OLD = "new", "old"
_LONGEST_NAME = 200


class StagedFolder:
    """A folder that is built beside `target` and takes its name by `publish`.

    Use as a context manager: leaving it without `publish` removes what was written, unless the run
    was interrupted and may be resumed. `resume` keeps what an earlier run left. `strangers` tells
    what an old target holds that must not be replaced. Raises TargetError where `target` exists
    (unless `overwrite`), or another run builds it.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        strangers: Strangers = beside_native,
    ) -> None:
        self.target = target.absolute()
        self.overwrite, self.resume, self.strangers = overwrite, resume, strangers
        self._root = _own_or_free(self.target)
        self.folder = self._root / _NEW
        self._lock: int | None = None
        self._published = False

    def __enter__(self) -> StagedFolder:
        made = not os.path.lexists(self._root)
        if made:
            self._check_target()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._root.mkdir(exist_ok=True)
            self._take_lock()
            if not made:
                self._put_back()
                self._check_target()
            if self.resume:
                self._refuse_links()
            else:
                self.clear()
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            self._unlock()
            if made:
                shutil.rmtree(self._root, ignore_errors=True)
            raise TargetError(
                "The target cannot be written.", where=self._root, found=error.strerror
            ) from None
        except TargetError:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published and not (kind and issubclass(kind, KeyboardInterrupt)):
            with contextlib.suppress(OSError, TargetError):  # else the old one stays where it is
                self._put_back()
                shutil.rmtree(self._root, ignore_errors=True)
        self._unlock()

    def clear(self) -> None:
        """Removes what an earlier run left in the folder."""
        for entry in self._root.iterdir():
            if entry.name != LOCK:
                _remove(entry)
        self.folder.mkdir()

    def publish(self) -> None:
        """Gives the finished folder its final name; an old one is removed only afterwards.

        At any moment the old one or the new one stands under the name, where the system can
        exchange two names; elsewhere the next run puts the old one back. Raises TargetError where
        it is not the folder that was begun, or where somebody has put something into the old one.
        """
        self._check_ours()
        try:
            if self.overwrite and os.path.lexists(self.target):
                self._check_target()
                self._replace()
            else:
                self.folder.rename(self.target)
        except OSError as error:
            raise TargetError(
                "The finished output cannot be renamed.", where=self.target, found=error.strerror
            ) from None
        self._published = True
        sync_path(self.target.parent)
        shutil.rmtree(self._root, ignore_errors=True)

    def _replace(self) -> None:
        if exchange(self.folder, self.target):
            try:
                self._check_old(self.folder)
            except TargetError:
                exchange(self.folder, self.target)
                raise
            return
        old = self._root / _OLD
        self.target.rename(old)
        try:
            self._check_old(old)
            self.folder.rename(self.target)
        except (OSError, TargetError):
            self._put_back()
            raise

    def _check_old(self, old: Path) -> None:
        """Raises TargetError for what came into the old one just before it lost its name."""
        try:
            check_target(old, overwrite=True, strangers=self.strangers)
        except TargetError as error:
            raise TargetError(
                error.what, where=self.target, found=error.found, do=error.ways
            ) from None

    def _put_back(self) -> None:
        """Gives what was to be replaced its name again, after a run that ended between two renames.

        Raises TargetError where something else has taken the name meanwhile.
        """
        old = self._root / _OLD
        if not old.is_dir():
            return
        if not os.path.lexists(self.target):
            old.rename(self.target)
        elif self.folder.is_dir():
            raise TargetError(
                "What was to be replaced cannot be put back: something else has its name.",
                where=self.target,
                found=f"the old checkpoint in {old}",
                do="move one of them away",
            )
        else:
            _remove(old)

    def _check_target(self) -> None:
        check_target(self.target, overwrite=self.overwrite, strangers=self.strangers)

    def _refuse_links(self) -> None:
        """What an interrupted run left has no links: through one we would write elsewhere."""
        for root, folders, files in os.walk(self._root):
            for path in (Path(root, name) for name in (*folders, *files)):
                mode = path.lstat().st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    raise TargetError(
                        "A link or a pipe stands where the output is to be built.",
                        where=path,
                        do="remove it",
                    )

    def _check_ours(self) -> None:
        """A folder that was removed comes back when a file is written, without what was in it."""
        lock = self._root / LOCK
        if self._lock is None or not (
            lock.exists() and os.path.samestat(os.fstat(self._lock), lock.stat())
        ):
            raise TargetError(
                "The target was removed while it was written.",
                where=self._root,
                do="leave the folder alone until the conversion ends, then start again",
            )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self._root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EACCES}:
                raise
            self._published = True  # what lies there belongs to the other run
            raise TargetError(
                "Another run is writing this target.",
                where=self.target,
                do="wait for it, or choose another target",
            ) from None


def staged_folder(target: Path) -> Path:
    """Where the process that leads builds `target`."""
    return _own_or_free(target.absolute()) / _NEW


def _own_or_free(target: Path) -> Path:
    """The first sibling that a run of ours left, or that nobody has."""
    for sibling in _siblings(target):
        ours = not sibling.is_symlink() and (sibling / LOCK).is_file()
        if ours or not os.path.lexists(sibling):
            return sibling
    raise AssertionError("names do not end")


def _siblings(target: Path) -> Iterator[Path]:
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    yield target.with_name(f".{name}.partial")
    for number in itertools.count(2):
        yield target.with_name(f".{name}.partial-{number}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
