"""Builds an output folder out of sight, so that it can be continued, and then publishes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from gemma_convert.errors import TargetError
from gemma_convert.output import NoProgress, Progress
from gemma_convert.stores import sidecar
from gemma_convert.stores.journal import matches, remove_journal
from gemma_convert.stores.orbax import sync_folder
from gemma_convert.stores.staging import StagedFolder

ProgressFactory = Callable[[str, int], AbstractContextManager[Progress]]

T = TypeVar("T")


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
) -> T:
    """What `write(folder, progress)` returns, when that folder stands under the name `target`.

    With `resume` the folder is what an interrupted run with the same `key` left. Raises TargetError
    where it cannot be written; then nothing is left behind.
    """
    with (
        StagedFolder(target, overwrite=overwrite, resume=resume) as staged,
        progress(title, total) if progress else nullcontext(NoProgress()) as bar,
    ):
        try:
            if resume and not matches(staged.folder, key):
                staged.clear()
            sidecar.remove(staged.folder)
            result = write(staged.folder, bar)
            sync_folder(staged.folder)
        except OSError as error:
            raise TargetError(
                "The target cannot be written.",
                where=target,
                found=error.strerror or error,
                do="check free space and permissions of the target",
            ) from error
        remove_journal(staged.folder)
        staged.publish()
    return result
