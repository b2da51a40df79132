"""Builds an output folder out of sight, so that it can be continued, and then publishes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.accounted import Strangers
from gemma_convert.engine.journal import matches, remove_journals
from gemma_convert.engine.processes import OneProcess, Processes, Watched
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
    processes = processes or OneProcess()
    if processes.index:
        return _contribute(write, target, processes)
    with (
        StagedFolder(target, overwrite=overwrite, resume=resume, strangers=strangers) as staged,
        progress_bar(progress, title, total) as bar,
    ):
        with _told(target, processes):
            if resume and not matches(staged.folder, key):
                staged.clear()
            sidecar.remove(staged.folder)
            processes.wait("made")
            result = write(staged.folder, Watched(bar, processes))
            sync_folder(staged.folder)
        remove_journals(staged.folder, processes.count)
        if receipt:
            leave_receipt(staged.folder)
        staged.publish()
    processes.wait("published")
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
        _told(mirror.folder, OneProcess()),
        staged_objects(mirror, overwrite=overwrite) as mark,
    ):
        with progress_bar(progress, title, total) as bar:
            result = write(mirror.folder, bar)
        with progress_bar(progress, "upload", upload_bytes(mirror)) as bar:
            upload(mirror, mark, bar)
    return result


def _contribute(write: Callable[[Path, Progress], T], target: Path, processes: Processes) -> T:
    """What `write` returns in a process that does not lead, when the target is published."""
    processes.wait("made")
    folder = staged_folder(target)
    with _told(target, processes):
        if not folder.is_dir():
            raise TargetError(
                "The target's folder is not that of the process that leads.",
                where=folder,
                do="choose a target on a file system that all processes share",
            )
        result = write(folder, Watched(NoProgress(), processes))
    processes.wait("published")
    return result


@contextmanager
def _told(target: Path, processes: Processes) -> Iterator[None]:
    """What the user, and the other processes, are told of an error, before the folder goes."""
    try:
        yield
    except BaseException as error:
        if processes.index:
            processes.check()  # the other's failure, if it came first, may be why this one fails
        processes.fail(error)
        if not isinstance(error, OSError):
            raise
        raise TargetError(
            "The target cannot be written.",
            where=target,
            found=error.strerror or error,
            do="check free space and permissions of the target",
        ) from error
