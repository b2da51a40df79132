"""Builds an output folder out of sight, so that it can be continued, and then publishes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.accounted import Strangers
from gemma_convert.engine.journal import matches, remove_journals
from gemma_convert.engine.processes import CHECK_S, Processes
from gemma_convert.engine.staging import StagedFolder, staged_folder
from gemma_convert.errors import TargetError
from gemma_convert.files.receipt import leave_receipt
from gemma_convert.files.write_out import sync_folder
from gemma_convert.progress import Listener, NoProgress, Progress, Task, working
from gemma_convert.stores.remote.mirror import Mirror
from gemma_convert.stores.remote.target import staged_objects, target_mirror, upload, upload_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Publication:
    """An output that is built out of sight, and then takes the name `target`.

    With `resume` the folder is what an interrupted run with the same key left, with `receipt` it
    says itself what was written into it (`files.receipt`). Of several `processes` the one that
    leads makes and publishes the folder.
    """

    target: Path
    strangers: Strangers
    overwrite: bool
    resume: bool
    progress: Listener | None
    receipt: bool = False
    processes: Processes = field(default_factory=Processes)

    def publish(self, key: str, task: Task, total: int, write: Callable[[Path, Progress], T]) -> T:
        """What `write(folder, progress)` returns, when that folder stands under the name.

        Of its `task` a listener is told, of which `total` bytes are to be done.
        Raises TargetError where it cannot be written, or holds what `strangers` tells; then nothing
        is left behind.
        """
        mirror = target_mirror(self.target)
        if mirror is not None:
            return self._publish_remotely(mirror, task, total, write)
        if not self.processes.leads:
            return self._contribute(write)
        staged = StagedFolder(
            self.target, overwrite=self.overwrite, resume=self.resume, strangers=self.strangers
        )
        with staged, working(self.progress, task, total) as bar:
            with _told(self.target, self.processes):
                if self.resume and not matches(staged.folder, key):
                    staged.clear()
                sidecar.remove(staged.folder)
                self.processes.step()
                result = write(staged.folder, _Watched(bar, self.processes))
                sync_folder(staged.folder)
            remove_journals(staged.folder, self.processes.count)
            if self.receipt:
                leave_receipt(staged.folder)
            staged.publish()
        self.processes.step()
        return result

    def _publish_remotely(
        self, mirror: Mirror, task: Task, total: int, write: Callable[[Path, Progress], T]
    ) -> T:
        """What `write` returns, when all that it wrote is in the object store."""
        with (
            _told(mirror.folder, self.processes),
            staged_objects(mirror, overwrite=self.overwrite) as mark,
        ):
            with working(self.progress, task, total) as bar:
                result = write(mirror.folder, bar)
            with working(self.progress, "upload", upload_bytes(mirror)) as bar:
                upload(mirror, mark, bar)
        return result

    def _contribute(self, write: Callable[[Path, Progress], T]) -> T:
        """What `write` returns in a process that does not lead, when the target is published."""
        self.processes.step()
        folder = staged_folder(self.target)
        with _told(self.target, self.processes):
            if not folder.is_dir():
                raise TargetError(
                    "The target's folder is not that of the process that leads.",
                    where=folder,
                    do="choose a target on a file system that all processes share",
                )
            result = write(folder, _Watched(NoProgress(), self.processes))
        self.processes.step()
        return result


class _Watched:
    """Progress that looks now and then whether the other processes are still there."""

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
