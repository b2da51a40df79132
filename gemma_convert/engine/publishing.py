"""Builds an output folder out of sight, so that it can be continued, and then publishes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.accounted import Strangers
from gemma_convert.engine.journal import matches, remove_journals
from gemma_convert.engine.processes import CHECK_S, Processes
from gemma_convert.engine.staging import StagedFolder, staged_folder
from gemma_convert.errors import TargetError
from gemma_convert.files.receipt import leave_receipt
from gemma_convert.output import NoProgress, Progress
from gemma_convert.stores.orbax.writer import sync_folder
from gemma_convert.stores.remote.mirror import Mirror
from gemma_convert.stores.remote.target import staged_objects, target_mirror, upload, upload_bytes

ProgressFactory = Callable[[str, int], AbstractContextManager[Progress]]

T = TypeVar("T")


def progress_bar(
    progress: ProgressFactory | None, title: str, total: int
) -> AbstractContextManager[Progress]:
    """A bar over `total` bytes, or one that shows nothing."""
    return progress(title, total) if progress else nullcontext(NoProgress())


def publish(
    target: Path,
    key: str,
    write: Callable[[Path, Progress], T],
    *,
    title: str,
    total: int,
    overwrite: bool,
    resume: bool,
    progress: ProgressFactory | None,
    strangers: Strangers,
    receipt: bool = False,
    processes: Processes | None = None,
) -> T:
    """What `write(folder, progress)` returns, when that folder stands under the name `target`.

    With `resume` the folder is what an interrupted run with the same `key` left. Of several
    `processes` the one that leads makes and publishes the folder. With `receipt` the folder itself
    says what was written into it (`stores.receipt`). Raises TargetError where it
    cannot be written, or holds what `strangers` tells; then nothing is left behind.
    """
    mirror = target_mirror(target)
    if mirror is not None:
        return _publish_remotely(
            mirror, write, title=title, total=total, overwrite=overwrite, progress=progress
        )
    processes = processes or Processes()
    if not processes.leads:
        return _contribute(write, target, processes)
    with (
        StagedFolder(target, overwrite=overwrite, resume=resume, strangers=strangers) as staged,
        progress_bar(progress, title, total) as bar,
    ):
        with _told(target, processes):
            if resume and not matches(staged.folder, key):
                staged.clear()
            sidecar.remove(staged.folder)
            processes.step()
            result = write(staged.folder, _Watched(bar, processes))
            sync_folder(staged.folder)
        remove_journals(staged.folder, processes.count)
        if receipt:
            leave_receipt(staged.folder)
        staged.publish()
    processes.step()
    return result


def _publish_remotely(
    mirror: Mirror,
    write: Callable[[Path, Progress], T],
    *,
    title: str,
    total: int,
    overwrite: bool,
    progress: ProgressFactory | None,
) -> T:
    """What `write` returns, when all that it wrote is in the object store."""
    with (
        _told(mirror.folder, Processes()),
        staged_objects(mirror, overwrite=overwrite) as mark,
    ):
        with progress_bar(progress, title, total) as bar:
            result = write(mirror.folder, bar)
        with progress_bar(progress, "upload", upload_bytes(mirror)) as bar:
            upload(mirror, mark, bar)
    return result


def _contribute(write: Callable[[Path, Progress], T], target: Path, processes: Processes) -> T:
    """What `write` returns in a process that does not lead, when the target is published."""
    processes.step()
    folder = staged_folder(target)
    with _told(target, processes):
        if not folder.is_dir():
            raise TargetError(
                "The target's folder is not that of the process that leads.",
                where=folder,
                do="choose a target on a file system that all processes share",
            )
        result = write(folder, _Watched(NoProgress(), processes))
    processes.step()
    return result


class _Watched:
    """A progress bar that looks now and then whether the other processes are still there."""

    def __init__(self, bar: Progress, processes: Processes) -> None:
        self._bar, self._processes = bar, processes
        self._next = 0.0

    def advance(self, count: int, name: str) -> None:
        """Notes `count` bytes more; raises what `Processes.check` raises."""
        self._bar.advance(count, name)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + CHECK_S
            self._processes.check()


@contextmanager
def _told(target: Path, processes: Processes) -> Iterator[None]:
    """What the user, and the other processes, are told of an error, before the folder goes."""
    with processes:
        try:
            yield
        except OSError as error:
            raise TargetError(
                "The target cannot be written.",
                where=target,
                found=error.strerror or error,
                do="check free space and permissions of the target",
            ) from error
