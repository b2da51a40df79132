"""Converts a checkpoint: config → plan → transfer → sidecar, published when complete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from gemma_convert.arrays.dtypes import Choice, DTypePolicy, ScaledChoice
from gemma_convert.checkpoint import sidecar
from gemma_convert.engine.huggingface_view import plan_relayout
from gemma_convert.engine.memory import block_bytes
from gemma_convert.engine.process_results import TransferResult
from gemma_convert.engine.processes import Processes
from gemma_convert.engine.publishing import ProgressFactory
from gemma_convert.engine.staging import check_apart, check_space, check_target
from gemma_convert.errors import UsageError
from gemma_convert.files.identity import Unchanged
from gemma_convert.layouts.opening import open_checkpoint
from gemma_convert.layouts.registry import is_native, load_layout
from gemma_convert.mapping.config_keys import check_keys
from gemma_convert.mapping.plan import plan_to_native
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import load_config, read_architecture
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.output import shown
from gemma_convert.stores.orbax.writer import Compression, OrbaxFormat
from gemma_convert.stores.remote.locations import check_remote_options, local, local_target
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.tasks.completed import conversion_stands
from gemma_convert.tasks.conversion import Conversion, Inherited
from gemma_convert.tasks.reports import ToNativeReport


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
    memory: int | None = None,
    accept_damage: Sequence[str] = (),
    ignore_facts: Sequence[str] = (),
    settings: Sequence[str] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressFactory | None = None,
    processes: Processes | None = None,
) -> ToNativeReport:
    """A report of the conversion of a checkpoint into a native layout.

    `source` is a Hugging Face checkpoint, or a native one of any layout: a folder, `owner/name` on
    the hub, or a URL of an object store (`gemma_convert.stores.remote.locations`); `like` names the
    Hugging Face original of one that has no sidecar, and `settings` (files, or KEY=VALUE) what its
    framework was told, if not what lies beside it. `target`, a folder or such a URL, appears, or
    is no longer marked as unfinished, when everything is in it. About `memory` bytes of anonymous
    memory are taken, 512 MiB by default. Several `processes` that share file systems,
    each of which makes the same call, divide the work. Raises SourceError, TargetError or
    UsageError with one clear message, and GemmaConvertError for what another process met; then
    nothing is left behind.
    """
    started = time.monotonic()
    policy, form = DTypePolicy(dtype, scaled_dtype), OrbaxFormat(ocdbt, compression)
    load_table(layout)
    limit = block_bytes(memory)
    with ExitStack() as stack:
        processes = stack.enter_context(processes or Processes())
        output = local_target(target, stack)
        check_remote_options(output, resume=resume, processes=processes.count)
        folder = local(source, stack, headers=dry_run)
        if is_native(folder):
            job = _from_native(
                folder,
                output,
                stack,
                layout=layout,
                like=None if like is None else local(like, stack),
                policy=policy,
                scanned=scan_layers,
                text_only=text_only,
                form=form,
                limit=limit,
                accept=accept_damage,
                settings=settings,
            )
        else:
            if like is not None:
                raise UsageError("--like is for a native SRC; this one is its own original.")
            if settings:
                raise UsageError("--settings are for a native SRC; this one has its config.json.")
            job = _from_huggingface(
                folder,
                output,
                stack,
                layout=layout,
                policy=policy,
                scanned=scan_layers,
                text_only=text_only,
                form=form,
                limit=limit,
                ignore_facts=ignore_facts,
            )
        job.plan = replace(job.plan, ignored_facts=tuple(ignore_facts))
        job.layout.settings(job.plan, job.target)  # what cannot be told is refused before any work
        job.processes = processes
        if processes.count > 1 and not job.layout.divisible:
            raise UsageError(
                f"A {layout} checkpoint cannot be written by several processes.",
                do=f"convert to {layout} with one process",
            )
        if dry_run:
            return job.report(TransferResult(), started, dry_run=True)
        check_apart(folder, output)
        if resume and conversion_stands(job):
            report = job.report(TransferResult(), started, dry_run=False)
            return replace(report, already_complete=True, bytes_per_second=0.0)
        if processes.leads:
            check_target(output, overwrite=overwrite)
            check_space(output, job.needed_bytes())
        result = job.run(overwrite=overwrite, resume=resume, progress=progress)
        return job.report(result, started, dry_run=False)


def _from_huggingface(
    source: Path,
    target: Path,
    stack: ExitStack,
    *,
    layout: str,
    policy: DTypePolicy,
    scanned: bool,
    text_only: bool,
    form: OrbaxFormat,
    limit: int | None,
    ignore_facts: Sequence[str],
) -> Conversion:
    found, others = sidecar.other_files(source, [])
    weights = (name for name in others if name.endswith(".safetensors") and "/" not in name)
    unchanged = Unchanged(source, [*found, *weights])
    architecture = read_architecture(source)
    check_keys(load_config(source), architecture.text_only, ignore_facts, source / CONFIG)
    reader = stack.enter_context(SafetensorsFolder(source))
    plan = plan_to_native(
        architecture,
        load_table(layout),
        reader.specs,
        policy,
        scanned=scanned,
        text_only=text_only,
        block_bytes=limit,
        where=str(source),
    )
    files, listed = sidecar.other_files(source, [shard.file for shard in reader.shards])
    shards = [(shard.file, shard.size, shard.modified) for shard in reader.shards]
    return Conversion(
        source=source,
        target=target,
        layout=load_layout(layout),
        plan=plan,
        tensors=reader,
        shards=reader.shards,
        root=source,
        files=files,
        listed=listed,
        form=form,
        identity={"source": shards, "files": unchanged.files},
        inherited=Inherited(),
        naming=reader.naming,
        unchanged=unchanged,
    )


def _from_native(
    source: Path,
    target: Path,
    stack: ExitStack,
    *,
    layout: str,
    like: Path | None,
    policy: DTypePolicy,
    scanned: bool,
    text_only: bool,
    form: OrbaxFormat,
    limit: int | None,
    accept: Sequence[str],
    settings: Sequence[str],
) -> Conversion:
    checkpoint = open_checkpoint(
        source, like, stack, block_bytes=limit, accept=accept, settings=settings
    )
    native, original = checkpoint.native, checkpoint.original
    plan, view = plan_relayout(
        native, original, layout, policy, scanned=scanned, text_only=text_only
    )
    if checkpoint.facts is not None:
        plan = replace(plan, architecture=checkpoint.facts.architecture)
    listed = original.manifest.get("not_carried")
    lossy = original.manifest.get("lossy_rows")
    return Conversion(
        source=source,
        target=target,
        layout=load_layout(layout),
        plan=plan,
        tensors=view,
        shards=original.shards,
        root=original.folder,
        files=original.files,
        listed=list(map(str, listed)) if isinstance(listed, list) else [],
        form=form,
        identity={"native": shown(native.folder), "state": native.fingerprint},
        inherited=Inherited(
            checksums=original.checksums,
            lossy_rows=lossy if isinstance(lossy, list) else [],
            exceptions={name: e for name, e in original.exceptions.items() if name in view.raw},
            rounded=view.rounded,
        ),
        naming=original.naming,
        unchanged=Unchanged(original.folder, original.files),
        checkpoint=checkpoint,
        native_arrays=view.arrays(plan.sources),
    )
