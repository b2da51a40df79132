"""Converts a checkpoint: config → plan → transfer → sidecar, published when complete."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from gemma_convert.config import read_architecture
from gemma_convert.dtypes import Choice, DTypePolicy, ScaledChoice, TensorSpec
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.mapping.plan import Plan, plan_to_native
from gemma_convert.mapping.table import HUGGINGFACE, load_table, mappings_folder
from gemma_convert.native_source import open_native
from gemma_convert.output import Progress
from gemma_convert.relayout import Relayout, plan_relayout
from gemma_convert.settings import maxtext_settings
from gemma_convert.step import ITEMS, STEP, ProgressFactory, Regions, Step, publish_step
from gemma_convert.stores import sidecar
from gemma_convert.stores.orbax import Compression, OrbaxFormat
from gemma_convert.stores.orbax_reader import find_items
from gemma_convert.stores.original import open_original
from gemma_convert.stores.safetensors import INDEX, SINGLE, SafetensorsFolder
from gemma_convert.stores.staging import check_apart, check_space, check_target
from gemma_convert.transfer import Losses, TransferResult
from gemma_convert.version import __version__

SPARE_BYTES = 16 << 20
"""Asked for beside the tensors: metadata of the store, manifest, headers."""


@dataclass(frozen=True)
class LossyRow:
    """A row whose values were rounded: `values` of them do not come back bit for bit."""

    row: str
    tensor: str
    reason: str
    values: int


@dataclass(frozen=True)
class ToNativeReport:
    """What a conversion did, or with `dry_run` what it would do."""

    source: str
    target: str
    layout: str
    scanned: bool
    family: str
    dry_run: bool
    tensors_converted: int
    bytes_read: int
    arrays_written: int
    bytes_written: int
    tensors_carried: int
    bytes_carried: int
    carried_why: dict[str, int]
    tied: tuple[str, ...]
    lossy_rows: tuple[LossyRow, ...]
    exceptions: int
    files_carried: tuple[str, ...]
    not_carried: tuple[str, ...]
    settings: dict[str, str]
    seconds: float
    bytes_per_second: float
    peak_memory_bytes: int
    plan: Plan | None = None

    def as_json(self) -> dict[str, object]:
        """The report for `--json`; the plan's arrays are listed on a dry run."""
        values = asdict(replace(self, plan=None))
        del values["plan"]
        if self.plan is not None and self.dry_run:
            values["arrays"] = {
                name: {
                    "dtype": target.spec.dtype,
                    "shape": target.spec.shape,
                    "chunk": target.chunk,
                }
                for name, target in self.plan.targets.items()
            }
        return {"schema": "gemma-convert/to-native/1", **values}


def to_native(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "maxtext",
    like: str | Path | None = None,
    scan_layers: bool = False,
    dtype: Choice = "keep",
    scaled_dtype: ScaledChoice = "float32",
    text_only: bool = False,
    ocdbt: bool = True,
    compression: Compression = "none",
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressFactory | None = None,
) -> ToNativeReport:
    """A report of the conversion of a checkpoint into a native layout.

    `source` is a Hugging Face folder, or a native checkpoint, whose bits are then copied; `like`
    names the Hugging Face original of one that has no sidecar. `target` appears when everything is
    in it. Raises SourceError, TargetError or UsageError with one clear message; then nothing is
    left behind.
    """
    started, source, target = time.monotonic(), Path(source), Path(target)
    policy, form = DTypePolicy(dtype, scaled_dtype), OrbaxFormat(ocdbt, compression)
    job: _Job | _NativeJob
    with ExitStack() as stack:
        if is_native(source):
            if text_only:
                raise UsageError(
                    "--text-only needs a Hugging Face source.", do="export it with to-hf first"
                )
            items = find_items(source)
            original = stack.enter_context(
                open_original(source, None if like is None else Path(like))
            )
            native = open_native(items)
            plan, blocks = plan_relayout(native, original, items, policy, scan_layers)
            relayout = Relayout(items, target, native, original, plan, blocks, form)
            job = _NativeJob(source, target, plan, relayout)
        else:
            architecture = read_architecture(source)
            reader = stack.enter_context(SafetensorsFolder(source))
            plan = plan_to_native(
                architecture,
                load_table(layout),
                reader.specs,
                policy,
                scanned=scan_layers,
                text_only=text_only,
                where=str(source),
            )
            files, listed = sidecar.other_files(source, [shard.file for shard in reader.shards])
            job = _Job(source, target, plan, reader, files, listed, form)
        if dry_run:
            return job.report(TransferResult(), started, dry_run=True)
        check_apart(source, target)
        check_target(target, overwrite=overwrite)
        check_space(target, job.needed_bytes())
        result = job.run(overwrite=overwrite, resume=resume, progress=progress)
        return job.report(result, started, dry_run=False)


@dataclass
class _Job:
    """One conversion into an Orbax step folder with its sidecar."""

    source: Path
    target: Path
    plan: Plan
    reader: SafetensorsFolder
    files: Sequence[Path]
    listed: Sequence[str]
    form: OrbaxFormat

    def needed_bytes(self) -> int:
        """Bytes that the target may take; tensors that may have to be carried count twice."""
        at_risk = (
            name
            for name, source in self.plan.sources.items()
            if source.spec.dtype == "float32" and name not in self.plan.rounded
            if any(copy.scale is not None for copy in source.copies)
        )
        carried = sum(self._spec(name).nbytes for name in (*self.plan.carried, *at_risk))
        files = sum((self.source / file).stat().st_size for file in self.files)
        return self.plan.target_bytes + carried + files + SPARE_BYTES

    def run(
        self, *, overwrite: bool, resume: bool, progress: ProgressFactory | None
    ) -> TransferResult:
        carried = sum(self._spec(name).nbytes for name in self.plan.carried)
        self._check_tied()
        source = [(shard.file, shard.size, shard.modified_ns) for shard in self.reader.shards]
        headers = [hashlib.sha256(shard.header).hexdigest() for shard in self.reader.shards]
        step = Step(self.plan, self.reader, self.form, {"source": source, "headers": headers})

        def write(folder: Path, bar: Progress) -> TransferResult:
            result = step.write(folder, bar)
            self._write_sidecar(folder / sidecar.FOLDER, result, step.regions, bar)
            return result

        return publish_step(
            step,
            self.target,
            write,
            self.plan.source_bytes + carried,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )

    def _write_sidecar(
        self,
        folder: Path,
        result: TransferResult,
        regions: Mapping[str, Regions],
        progress: Progress,
    ) -> None:
        own = folder / sidecar.OWN
        own.mkdir(parents=True)
        digests = sidecar.copy_files(self.source, folder, self.files)
        sidecar.write_headers(own, self.reader)
        whole = [name for name, losses in result.losses.items() if losses.whole]
        names = [name for name in self.reader.tensors if name in self.plan.carried or name in whole]
        checksums = sidecar.write_carried(own, self.reader, names, progress)
        self.reader.check_unchanged()
        listed = {
            name: (np.concatenate(losses.places), np.concatenate(losses.originals))
            for name, losses in result.losses.items()
            if losses.places
        }
        if listed:
            sidecar.write_exceptions(own, listed)
        manifest = self._manifest(result, checksums, digests)
        listed_regions = {name: list(boxes.items()) for name, boxes in regions.items()}
        sidecar.write_manifest(own, manifest | {"regions": listed_regions})

    def _check_tied(self) -> None:
        """Raises SourceError where a tied tensor differs from the one that it must equal."""
        for name, other in self.plan.tied.items():
            if not _same_bytes(self.reader, name, other):
                raise SourceError(
                    "The output head is not tied to the embedding; no layout has a place for it.",
                    where=self.source,
                    expected=f"{name} equal to {other}, bit for bit",
                    found="different values",
                )

    def _spec(self, name: str) -> TensorSpec:
        return self.reader.tensors[name].spec

    def _manifest(
        self, result: TransferResult, carried: dict[str, str], digests: dict[str, str]
    ) -> dict[str, object]:
        plan = self.plan
        return {
            "tool": f"gemma-convert {__version__}",
            "layout": plan.layout,
            "scanned": plan.scanned,
            "family": plan.architecture.family,
            "dtype": plan.policy.dtype,
            "scaled_dtype": plan.policy.scaled,
            "mapping_sha256": _mapping_digests(plan.layout),
            "lossy_rows": [asdict(row) for row in _lossy_rows(plan, result)],
            "exceptions": _exceptions(result),
            "shards": [
                {"file": shard.file, "size": shard.size, "header": f"{shard.file}.header"}
                for shard in self.reader.shards
            ],
            "tensors": {
                name: {
                    "dtype": tensor.spec.dtype,
                    "shape": list(tensor.spec.shape),
                    "kept": self._kept(name, result.losses.get(name)),
                    "xxh3_128": result.checksums.get(name) or carried.get(name),
                }
                for name, tensor in self.reader.tensors.items()
            },
            "carried_why": plan.carried,
            "tied": plan.tied,
            "files_sha256": digests,
            "not_carried": list(self.listed),
        }

    def _kept(self, name: str, losses: Losses | None) -> str:
        if name in self.plan.tied:
            return "tied"
        if name in self.plan.carried or (losses is not None and losses.whole):
            return "carried"
        return "converted"

    def report(self, result: TransferResult, started: float, *, dry_run: bool) -> ToNativeReport:
        """The report of this conversion."""
        carried = dict(self.plan.carried) | {
            name: "its values do not come back from the stored dtype"
            for name, losses in result.losses.items()
            if losses.whole
        }
        report = _report(self.source, self.target, self.plan, result, started, dry_run=dry_run)
        return replace(
            report,
            tensors_carried=len(carried),
            bytes_carried=sum(self._spec(name).nbytes for name in carried),
            carried_why=dict(Counter(carried.values())),
            files_carried=tuple(map(str, self.files)),
            not_carried=tuple(self.listed),
        )


@dataclass
class _NativeJob:
    """One conversion between native forms; its sidecar is the original's."""

    source: Path
    target: Path
    plan: Plan
    relayout: Relayout

    def needed_bytes(self) -> int:
        """Bytes that the target may take."""
        folder = self.relayout.original.folder
        kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return self.plan.target_bytes + kept + SPARE_BYTES

    def run(
        self, *, overwrite: bool, resume: bool, progress: ProgressFactory | None
    ) -> TransferResult:
        return self.relayout.run(overwrite=overwrite, resume=resume, progress=progress)

    def report(self, result: TransferResult, started: float, *, dry_run: bool) -> ToNativeReport:
        """The report of this conversion."""
        report = _report(self.source, self.target, self.plan, result, started, dry_run=dry_run)
        return replace(
            report,
            tensors_carried=len(self.plan.carried),
            bytes_carried=sum(
                self.relayout.original.specs[name].nbytes for name in self.plan.carried
            ),
            carried_why=dict(Counter(self.plan.carried.values())),
            files_carried=tuple(map(str, self.relayout.original.files)),
        )


def _report(
    source: Path,
    target: Path,
    plan: Plan,
    result: TransferResult,
    started: float,
    *,
    dry_run: bool,
) -> ToNativeReport:
    """The parts of a report that the plan and the transfer tell."""
    seconds = time.monotonic() - started
    multimodal = any(name.startswith("params/params/vision_encoder/") for name in plan.targets)
    items = target.absolute() / STEP / ITEMS
    return ToNativeReport(
        source=str(source),
        target=str(target),
        layout=plan.layout,
        scanned=plan.scanned,
        family=plan.architecture.family,
        dry_run=dry_run,
        tensors_converted=len(plan.sources),
        bytes_read=plan.source_bytes,
        arrays_written=len(plan.targets),
        bytes_written=plan.target_bytes,
        tensors_carried=0,
        bytes_carried=0,
        carried_why={},
        tied=tuple(plan.tied),
        lossy_rows=_lossy_rows(plan, result),
        exceptions=_exceptions(result),
        files_carried=(),
        not_carried=(),
        settings=maxtext_settings(
            plan.architecture, items, scanned=plan.scanned, multimodal=multimodal
        ),
        seconds=seconds,
        bytes_per_second=0.0 if dry_run else plan.source_bytes / seconds,
        peak_memory_bytes=peak_memory(),
        plan=plan,
    )


def is_native(source: Path) -> bool:
    """Whether a folder holds a native checkpoint rather than Hugging Face files."""
    if any((source / name).exists() for name in (SINGLE, INDEX)):
        return False
    try:
        find_items(source)
    except SourceError:
        return False
    return True


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _lossy_rows(plan: Plan, result: TransferResult) -> tuple[LossyRow, ...]:
    """Rows that the dtype policy rounds, with the number of values that do not come back."""
    return tuple(
        LossyRow(plan.sources[name].copies[0].row, name, reason, _lost(result, name))
        for name, reason in plan.rounded.items()
    )


def _lost(result: TransferResult, name: str) -> int:
    losses = result.losses.get(name)
    return losses.count if losses is not None else 0


def _exceptions(result: TransferResult) -> int:
    return sum(len(places) for losses in result.losses.values() for places in losses.places)


def _mapping_digests(layout: str) -> dict[str, str]:
    files = [mappings_folder() / f"{name}.toml" for name in (HUGGINGFACE, layout)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _same_bytes(reader: SafetensorsFolder, name: str, other: str) -> bool:
    left, right = reader.tensors[name], reader.tensors[other]
    if left.spec != right.spec:
        return False
    size = sidecar.COPY_BYTES
    one, two = memoryview(bytearray(size)), memoryview(bytearray(size))
    for offset in range(0, left.spec.nbytes, size):
        length = min(size, left.spec.nbytes - offset)
        reader.read_into(left, offset, one[:length])
        reader.read_into(right, offset, two[:length])
        if one[:length] != two[:length]:
            return False
    return True
