"""Exports a native checkpoint to Hugging Face: the same tables read from right to left."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gemma_convert.api.arguments import public
from gemma_convert.arrays.dtypes import Choice
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_original import AdapterBase
from gemma_convert.checkpoint.native import NativeReader, plan_native
from gemma_convert.engine.memory import block_bytes
from gemma_convert.engine.publishing import Publication
from gemma_convert.engine.restoring import Restoring
from gemma_convert.engine.resumable import SPARE_BYTES, ResumableTransfer
from gemma_convert.engine.target import check_apart, check_order, check_space, check_target
from gemma_convert.engine.transfer import WORKERS
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.files.identity import Unchanged
from gemma_convert.layouts.opening import Checkpoint, open_checkpoint
from gemma_convert.output import shown
from gemma_convert.progress import Listener, Progress
from gemma_convert.stores.remote.locations import check_remote_options, local, local_target
from gemma_convert.stores.safetensors.checked_writer import CheckedWriter
from gemma_convert.stores.safetensors.writer import OutputShard
from gemma_convert.tasks.completed import export_stands, strangers_of_export
from gemma_convert.tasks.export_plan import ExportOptions, KVShared, plan_export, reversed_plan
from gemma_convert.tasks.reports import peak_memory


@dataclass(frozen=True)
class ToHFReport:
    """What an export wrote. `identical` counts the tensors that match the manifest's checksums.

    `sealed` says whether the checkpoint has a manifest with checksums, `changed_arrays` which
    arrays differ from them (trained since, or damaged), `added_files` which files were added since
    the conversion and were not copied. `changed_facts` has each key of config.json in which the
    framework's settings differ from the original, and how; the value of the settings is written.
    `merged` says that an adapter was merged into the original when it was converted: what is
    restored, and has checksums, is that model.
    `made_from_settings` says that there was no original, and config.json was made from the
    settings.
    """

    source: str
    target: str
    layout: str
    scanned: bool
    family: str
    dry_run: bool
    tensors: int
    tensors_from_original: int
    bytes_written: int
    shards: tuple[str, ...]
    rounded: dict[str, int]
    identical: int
    different: tuple[str, ...]
    unchecked: int
    sealed: bool
    changed_arrays: tuple[str, ...]
    added_files: tuple[str, ...]
    changed_facts: dict[str, str]
    merged: bool
    made_from_settings: bool
    largest_decode_bytes: int
    files: tuple[str, ...]
    seconds: float
    bytes_per_second: float
    peak_memory_bytes: int
    unexplained: tuple[str, ...] = ()
    """Tensors that differ from their checksums although the arrays do not, and nothing rounds them.

    The checkpoint is damaged, manifest included, or a mapping table is wrong.
    """
    step: int | None = None
    """Of a training checkpoint in step folders: the step that was exported."""
    already_complete: bool = False
    """With `resume`: the target existed already, and equals what this run would have written."""

    @property
    def bit_for_bit(self) -> bool:
        """Whether every tensor is known to equal the original's, bit for bit."""
        return not self.dry_run and self.identical == self.tensors and not self.changed_arrays

    def as_json(self) -> dict[str, object]:
        """The report for `--json`."""
        return {"schema": "gemma-convert/to-hf/2", **asdict(self), "bit_for_bit": self.bit_for_bit}


@public
def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    base: str | Path | None = None,
    alpha: float | None = None,
    dtype: Choice = "keep",
    max_shard_size: int | None = None,
    kv_shared: KVShared = "keep",
    text_only: bool = False,
    memory: int | None = None,
    accept_damage: Sequence[str] = (),
    settings: Sequence[str] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Listener | None = None,
) -> ToHFReport:
    """Exports a native checkpoint to Hugging Face and returns a report.

    `like` names the original, or a converted checkpoint of it; by default the sidecar of `source`
    is used. Each may be a folder or an `s3://` or `gs://` URL, and what is read may be `owner/name`
    on the hub. Files that differ from their checksums in the manifest are refused, unless
    `accept_damage` names them. Where the framework's `settings` (files, or KEY=VALUE; by default
    the file in the checkpoint) differ from config.json, their values are written. An adapter
    without a sidecar becomes a PEFT adapter of the model `base`, scaled by `alpha` / rank.
    `progress` is called with each `ProgressEvent`. Raises SourceError, TargetError or UsageError
    with one clear message; then nothing is left behind.
    """
    started = time.monotonic()
    options = ExportOptions(dtype, max_shard_size, kv_shared, text_only)
    with ExitStack() as stack:
        output = local_target(target, stack)
        check_remote_options(output, resume=resume)
        folder = local(source, stack)
        check_order(folder, output)
        original = None if like is None else local(like, stack)
        model = _adapter_base(base, alpha, stack)

        def opened(stack: ExitStack) -> _Job:
            checkpoint = open_checkpoint(
                folder,
                original,
                stack,
                block_bytes=block_bytes(memory),
                accept=accept_damage,
                settings=settings,
                base=model,
            )
            return _Job(folder, output, checkpoint, options)

        job = opened(stack)
        if dry_run:
            return job.report(started, dry_run=True)
        check_apart(folder, output)
        check_apart(job.checkpoint.original.folder, output)
        if resume and export_stands(output, opened):
            report = job.report(started, dry_run=False)
            return replace(report, already_complete=True, bytes_per_second=0.0)
        strangers = strangers_of_export(job.export, opened)
        check_target(output, overwrite=overwrite, strangers=strangers)
        files = job.export.file_bytes(job.checkpoint.original.folder)
        check_space(output, job.export.nbytes + files + SPARE_BYTES)
        publication = Publication(output, strangers, overwrite, resume, progress, receipt=True)
        total = job.transfer.share_bytes
        publication.publish(job.transfer.key, "export", total, job.write)
        return job.report(started, dry_run=False)


def _adapter_base(
    base: str | Path | None, alpha: float | None, stack: ExitStack
) -> AdapterBase | None:
    if base is None:
        if alpha is not None:
            raise UsageError("--alpha is for an adapter whose model is named with --base.")
        return None
    return AdapterBase(local(base, stack, config_only=True), str(base), alpha)


class _Job:
    """One export: the plan read from right to left, into the shards."""

    def __init__(
        self, source: Path, target: Path, checkpoint: Checkpoint, options: ExportOptions
    ) -> None:
        self.source, self.target, self.options = source, target, options
        self.checkpoint = checkpoint = _with_told_towers(checkpoint, options.text_only)
        native, original = checkpoint.native, checkpoint.original
        self.plan = plan_native(native, original)
        self.export = plan_export(self.plan, original, options, checkpoint.facts)
        back, caches, origins = reversed_plan(self.plan, native, original, self.export)
        self.values = Restoring(original, origins)
        self.checks = _Checks(original.checksums, origins)
        self.unchanged = Unchanged(original.folder, original.files)
        shards = self.export.shards
        identity = {
            "native": (shown(native.folder), native.fingerprint),
            "original": (shown(original.folder.absolute()), self.unchanged.files),
            "shards": [(s.file, hashlib.sha256(s.header).hexdigest()) for s in shards],
        }
        self.transfer = ResumableTransfer(
            back,
            NativeReader(native, original, caches),
            self.values,
            lambda folder, _: _ExportWriter(folder, shards, self.checks),
            identity,
        )

    def write(self, folder: Path, progress: Progress) -> None:
        """Writes every shard and every other file into `folder`."""
        sidecar.copy_files(self.checkpoint.original.folder, folder, self.export.files)
        for name, text in self.export.edited.items():
            (folder / name).write_bytes(text.encode())
        self.checkpoint.check_carried(self.transfer.write(folder, progress).checksums)
        sources = self.transfer.plan.sources
        self.checkpoint.read_rest(n for n in sources if n in self.checkpoint.native.specs)
        self.unchanged.check()

    def _changed_facts(self) -> dict[str, str]:
        """None where there is no original that could say something else."""
        facts = self.checkpoint.facts
        return {} if facts is None or self.checkpoint.original.made else dict(facts.changed)

    def report(self, started: float, *, dry_run: bool) -> ToHFReport:
        """The report of this export."""
        seconds = time.monotonic() - started
        checkpoint, export = self.checkpoint, self.export
        return ToHFReport(
            source=shown(self.source),
            target=shown(self.target),
            layout=self.plan.layout,
            scanned=self.plan.scanned,
            family=self.plan.architecture.family,
            dry_run=dry_run,
            tensors=len(export.names),
            tensors_from_original=len(export.stored),
            bytes_written=export.nbytes,
            shards=tuple(shard.file for shard in export.shards),
            rounded=self.values.rounded_by_tensor,
            identical=self.checks.identical,
            different=tuple(self.checks.different),
            unchecked=self.checks.unchecked,
            sealed=checkpoint.arrays is not None,
            changed_arrays=checkpoint.changed_arrays,
            added_files=checkpoint.added_files,
            changed_facts=self._changed_facts(),
            merged=bool((checkpoint.original.manifest.get("adapter") or {}).get("merged")),
            made_from_settings=checkpoint.original.made and checkpoint.native.adapter is None,
            largest_decode_bytes=checkpoint.native.largest_chunk(list(self.plan.targets)),
            files=tuple(sorted({*map(str, export.files), *export.edited})),
            seconds=seconds,
            bytes_per_second=0.0 if dry_run else export.nbytes / seconds,
            peak_memory_bytes=peak_memory(),
            unexplained=() if dry_run else self._unexplained(),
            step=checkpoint.native.step,
        )

    def _unexplained(self) -> tuple[str, ...]:
        """Nothing where it is another conversion's manifest that has the tensors' checksums."""
        checkpoint, manifest = self.checkpoint, self.checkpoint.original.manifest
        root = sidecar.sidecar_root(checkpoint.native.folder)
        own = root is not None and checkpoint.original.folder == root / sidecar.FOLDER
        if not own or checkpoint.accepted or checkpoint.changed_arrays:
            return ()
        if self.options.dtype != "keep":
            return ()
        rounded = {row["tensor"] for row in manifest.get("lossy_rows", [])}
        different = self.checks.different
        return tuple(name for name in different if self.checks.origins[name] not in rounded)


def _with_told_towers(checkpoint: Checkpoint, text_only: bool) -> Checkpoint:
    """The checkpoint without its towers where settings alone describe it: they do not say all."""
    if not checkpoint.original.made or not checkpoint.native.towers:
        return checkpoint
    if not text_only:
        raise SourceError(
            "The original of this checkpoint is unknown, and with it the config of its towers.",
            where=checkpoint.native.folder,
            do=("name the original with --like", "export the language model only: --text-only"),
        )
    return replace(checkpoint, native=checkpoint.native.without_towers())


@dataclass
class _Checks:
    """Every exported tensor against the checksum that the manifest has of the original's.

    `origins` are the exported tensors' names in the original.
    """

    known: Mapping[str, str]
    origins: Mapping[str, str]
    identical: int = 0
    unchecked: int = 0
    different: list[str] = field(default_factory=list)

    def compare(self, name: str, checksum: str) -> None:
        known = self.known.get(self.origins[name])
        if known is None:
            self.unchecked += 1
        elif checksum == known:
            self.identical += 1
        else:
            self.different.append(name)


class _ExportWriter(CheckedWriter):
    """The shards of an export, compared with the manifest when they are complete."""

    def __init__(self, folder: Path, shards: Sequence[OutputShard], checks: _Checks) -> None:
        super().__init__(folder, shards)
        self._shards, self._checks = shards, checks

    def complete(self, started_ns: int, parts: int = 1) -> None:
        """Compares every tensor."""
        del started_ns, parts
        names = [tensor.name for shard in self._shards for tensor in shard.tensors]
        with ThreadPoolExecutor(WORKERS) as pool:
            for name, checksum in zip(names, pool.map(self.checksum, names), strict=True):
                self._checks.compare(name, checksum)
