"""Proves a checkpoint by reading all of it again: against its seal, its original or its source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_convert.api.arguments import public
from gemma_convert.engine.comparing import Comparison
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.layouts.registry import is_native
from gemma_convert.model.adapter import is_adapter
from gemma_convert.output import shown
from gemma_convert.progress import Listener
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.weights import is_huggingface
from gemma_convert.tasks.verify_export import verify_export
from gemma_convert.tasks.verify_original import verify_original
from gemma_convert.tasks.verify_seal import verify_seal
from gemma_convert.tasks.verify_tensors import verify_tensors

THE_SEAL = "the manifest's checksums"


@dataclass(frozen=True)
class VerifyReport:
    """What was compared: the numbers of tensors (`checked`) and other files, and their bytes.

    `different` has the name of everything that differs, and how it differs; `notes` are sentences
    about what could not be compared.
    """

    path: str
    against: str
    checked: int
    files: int
    bytes: int
    different: dict[str, str]
    notes: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.different

    def as_json(self) -> dict[str, object]:
        """The report for `--json`."""
        return {"schema": "gemma-convert/verify/2", **asdict(self), "passed": self.passed}


@public
def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    like: str | Path | None = None,
    base: str | Path | None = None,
    settings: Sequence[str] = (),
    progress: Listener | None = None,
) -> VerifyReport:
    """Reads the checkpoint at `path` again, compares every value, and returns a report.

    A native checkpoint is compared with the checksums in its manifest: every array, tensor and
    file. With a Hugging Face folder as `against`, arrays and sidecar are also compared with that,
    bit for bit. An exported Hugging Face folder is compared, tensors and files, with what `to_hf`
    would write from the native checkpoint `against` with these `settings`, and with the original
    `like` where that has no sidecar; with another Hugging Face folder it is compared tensor by
    tensor. Each may be a folder, `owner/name` on the hub, or an `s3://` or `gs://` URL. `progress`
    is called with each `ProgressEvent`. Raises SourceError where one of them cannot be read or the
    two do not belong together.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        folder = local(path, stack)
        other = None if against is None else local(against, stack)
        original = None if like is None else local(like, stack)
        model = None if base is None else local(base, stack)
        found = Comparison()
        try:
            _compare(folder, other, original, model, settings, found, progress)
        except SourceError as error:
            if not found.different:
                raise
            found.differ(shown(error.where or folder), error.what)
        return VerifyReport(
            path=shown(folder),
            against=THE_SEAL if other is None else shown(other),
            checked=len(found.names),
            files=found.files,
            bytes=found.bytes,
            different=found.different,
            notes=tuple(found.notes),
            seconds=time.monotonic() - started,
        )


def _compare(
    folder: Path,
    other: Path | None,
    like: Path | None,
    base: Path | None,
    settings: Sequence[str],
    found: Comparison,
    progress: Listener | None,
) -> None:
    if like is not None:
        _check_like(folder, other, like)
    if base is not None and (other is None or is_huggingface(folder) or not is_adapter(other)):
        raise UsageError("--base is for an adapter.", do="name the adapter with --against as well")
    if settings and (other is None or not is_huggingface(folder)):
        raise UsageError(
            "--settings are for verifying an export against its native checkpoint.",
            do="name the export, and its native checkpoint with --against",
        )
    if not is_huggingface(folder):
        if other is not None and not is_huggingface(other) and is_native(other):
            raise _native_against(other)
        verify_seal(folder, other, found, progress)
        if other is not None:
            verify_original(folder, other, base, found, progress)
    elif other is None:
        raise UsageError(
            "A Hugging Face folder has no manifest, so it needs a checkpoint to be compared with.",
            do="name the native checkpoint, or another Hugging Face one, with --against",
        )
    elif is_huggingface(other):
        if settings:
            raise UsageError("--settings are for a native checkpoint; these have a config.json.")
        verify_tensors(folder, other, found, progress)
    else:
        verify_export(folder, other, like, settings, found, progress)


def _check_like(folder: Path, other: Path | None, like: Path) -> None:
    """Raises UsageError where nothing would be compared with `like`."""
    if other is None or is_huggingface(other) or not is_huggingface(folder):
        raise UsageError(
            "--like is for verifying an export against a native checkpoint without a sidecar.",
            do="name the export, with --against its native checkpoint, with --like the original",
        )
    if like.exists() and like.samefile(folder):
        raise UsageError(
            "--like names the export itself, which would be compared with itself.",
            where=like,
            do="name the original that the native checkpoint was converted from",
        )


def _native_against(other: Path) -> UsageError:
    return UsageError(
        "A native checkpoint is compared with a Hugging Face checkpoint.",
        where=other,
        found="a native checkpoint",
        do="export it with to-hf and name the export with --against, or name the Hugging Face "
        "checkpoint that both were made from; without --against the manifest's checksums are "
        "compared",
    )
