"""Reports in files of their own, which appear under their names only when they are complete."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gemma_convert.errors import TargetError, UsageError
from gemma_convert.files.new_file import new_sibling
from gemma_convert.logits.report import LogitReport

_BEGINNING_BYTES = 16 << 10


@dataclass(frozen=True)
class ReportFiles:
    """The files that a check is asked to write, each None where it is not."""

    html: Path | None = None
    junit: Path | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Nothing where all can be written. Raises UsageError or TargetError else."""
        asked = [path for path in (self.html, self.junit) if path is not None]
        if len({path.absolute() for path in asked}) < len(asked):
            raise UsageError("--report and --junit name the same file.", found=self.html)
        for path in asked:
            check_report_file(path, overwrite=self.overwrite)

    def write(self, report: LogitReport) -> None:
        """Writes them. Raises TargetError where one cannot be written."""
        from gemma_convert.logits.html_report import html_report
        from gemma_convert.logits.junit import junit

        now = datetime.now(UTC)
        for path, make in ((self.html, html_report), (self.junit, junit)):
            if path is not None:
                write_report_file(path, make(report, now), overwrite=self.overwrite)


def check_report_file(path: Path, *, overwrite: bool) -> None:
    """Nothing where a report can be written to `path`: to be asked before the work begins.

    Raises TargetError where `path` exists (unless `overwrite`), is a folder or a device, or its
    folder is missing or cannot be written to.
    """
    if os.path.lexists(path):
        if not overwrite:
            raise TargetError("The report exists already.", where=path, do="add --overwrite")
        if path.is_symlink() or not path.is_file():
            raise TargetError(
                "The target exists and is not a file, so it is not replaced.",
                where=path,
            )
        if not _is_report(path):
            raise TargetError(
                "The target exists and is not a report of logit-check, so it is not replaced.",
                where=path,
                do="choose another name, or remove it yourself",
            )
    if not path.parent.is_dir():
        raise TargetError("The folder of the report does not exist.", where=path.parent)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def _is_report(path: Path) -> bool:
    """Whether a file is empty, or begins as one of our reports does."""
    from gemma_convert.logits.html_page import BEGINNING
    from gemma_convert.logits.junit import SUITE

    try:
        with path.open("rb") as file:
            found = file.read(_BEGINNING_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise _cannot_write(path, error) from error
    page = found.startswith(BEGINNING) and ", logit-check</title>" in found
    return not found or page or found.startswith(f'<testsuite name="{SUITE}"')


def write_report_file(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes `text` in UTF-8 as `path`, by a sibling that is renamed.

    Raises TargetError as `check_report_file` does, and where there is no room.
    """
    check_report_file(path, overwrite=overwrite)
    partial: Path | None = None
    try:
        descriptor, partial = new_sibling(path)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> TargetError:
    return TargetError(
        "The report cannot be written.",
        where=path,
        found=error.strerror or error,
        do="check free space and permissions of its folder",
    )
