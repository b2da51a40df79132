"""Converts a checkpoint: config → plan → transfer → sidecar, published when complete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from gemma_convert.api.arguments import public
from gemma_convert.arrays.dtypes import Choice, DTypePolicy, ScaledChoice
from gemma_convert.checkpoint.accounted import beside_native
from gemma_convert.engine.casting import Casting
from gemma_convert.engine.memory import block_bytes
from gemma_convert.engine.process_results import TransferResult
from gemma_convert.engine.processes import Processes
from gemma_convert.engine.publishing import Publication
from gemma_convert.engine.resumable import ResumableTransfer
from gemma_convert.engine.target import check_apart, check_order, check_space, check_target
from gemma_convert.errors import UsageError
from gemma_convert.mapping.table import load_table
from gemma_convert.progress import Listener, Progress
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.orbax.zarr_metadata import Compression
from gemma_convert.stores.remote.locations import check_remote_options, local, local_target
from gemma_convert.tasks.completed import conversion_stands
from gemma_convert.tasks.conversion import Conversion
from gemma_convert.tasks.conversion_sidecar import write_sidecar
from gemma_convert.tasks.conversion_source import ConversionOptions, plan_conversion
from gemma_convert.tasks.equal_tensors import check_equal
from gemma_convert.tasks.reports import ToNativeReport


@public
def to_native(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "maxtext",
    framework_version: str | None = None,
    like: str | Path | None = None,
    base: str | Path | None = None,
    merge: bool = False,
    scan_layers: bool = False,
    dtype: Choice = "keep",
    scaled_dtype: ScaledChoice = "float32",
    text_only: bool = False,
    ocdbt: bool = True,
    compression: Compression = "none",
    memory: int | None = None,
    accept_damage: Sequence[str] = (),
    ignore_facts: Sequence[str] = (),
    settings: Sequence[str] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Listener | None = None,
    processes: Processes | None = None,
) -> ToNativeReport:
    """Converts a checkpoint to a native layout and returns a report.

    `source` is a Hugging Face checkpoint, a PEFT adapter, or a native checkpoint of any layout: a
    folder, `owner/name` on the hub, or an `s3://` or `gs://` URL. `target` is a folder or such a
    URL; a folder appears, and a URL is no longer marked as unfinished, when the checkpoint is
    complete. `like` names the Hugging Face original of a native source without a sidecar, and
    `settings` (files, or KEY=VALUE) the config that its framework used, by default the file in the
    checkpoint. `framework_version` is one that the layout supports, by default its first. `base` is
    the base model of an adapter, by default the one in its config; `merge` merges the adapter into
    it. `memory` limits the memory for tensors in bytes, 512 MiB by default. `processes` is what the
    options of `to-native` for several processes make; leave it out. `progress` is called with each
    `ProgressEvent`. Raises SourceError, TargetError or UsageError with one clear message, and
    GemmaConvertError for an error of another process; then nothing is left behind.
    """
    started = time.monotonic()
    load_table(layout, framework_version)
    options = ConversionOptions(
        layout=layout,
        version=framework_version,
        like=like,
        base=base,
        merge=merge,
        policy=DTypePolicy(dtype, scaled_dtype),
        form=OrbaxFormat(ocdbt, compression),
        scanned=scan_layers,
        text_only=text_only,
        block_bytes=block_bytes(memory),
        accept=accept_damage,
        ignored_facts=ignore_facts,
        settings=settings,
    )
    with ExitStack() as stack:
        processes = stack.enter_context(processes or Processes())
        output = local_target(target, stack)
        check_remote_options(output, resume=resume, processes=processes.count)
        folder = local(source, stack, headers=dry_run)
        check_order(folder, output)
        job = plan_conversion(folder, output, options, stack)
        publication = Publication(
            output, beside_native, overwrite, resume, progress, processes=processes
        )
        return _run(job, publication, started, dry_run)


def _run(
    job: Conversion, publication: Publication, started: float, dry_run: bool
) -> ToNativeReport:
    """The report of a conversion that has come to its end, or is only planned."""
    if publication.processes.count > 1 and not job.layout.divisible:
        raise UsageError(
            f"A {job.layout.name} checkpoint cannot be written by several processes.",
            do=f"convert to {job.layout.name} with one process",
        )
    if dry_run:
        return job.report(TransferResult(), started, dry_run=True)
    for source in (job.source, *([] if job.base is None else [job.base])):
        check_apart(source, job.target)
    if publication.resume and conversion_stands(job):
        report = job.report(TransferResult(), started, dry_run=False)
        return replace(report, already_complete=True, bytes_per_second=0.0)
    if publication.processes.leads:
        check_target(job.target, overwrite=publication.overwrite)
        check_space(job.target, job.needed_bytes())
        check_equal(job.plan, job.tensors, job.source)
    result = _convert(job, publication)
    return job.report(result, started, dry_run=False)


def _convert(job: Conversion, publication: Publication) -> TransferResult:
    """Checksums and losses, when the checkpoint stands under its name."""
    transfer = ResumableTransfer(
        job.plan,
        job.tensors,
        Casting(job.plan.rounded),
        lambda folder, part: job.layout.create(folder, job.plan, job.form, part),
        {"form": asdict(job.form), "version": job.plan.version, **job.identity},
        publication.processes,
    )

    def write(folder: Path, bar: Progress) -> TransferResult:
        result = transfer.write(folder, bar)
        if publication.processes.leads:
            write_sidecar(job, folder, result, transfer, bar)
        return result

    carried = sum(job.tensors.specs[name].nbytes for name in job.plan.carried)
    total = transfer.share_bytes + carried
    return publication.publish(transfer.key, "convert", total, write)
