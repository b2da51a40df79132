"""Converts a checkpoint: config → plan → transfer → sidecar, published when complete."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from gemma_convert.config import read_architecture
from gemma_convert.dtypes import Choice, DTypePolicy, ScaledChoice
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.from_huggingface import FromHuggingFace
from gemma_convert.mapping.plan import plan_to_native
from gemma_convert.mapping.table import load_table
from gemma_convert.native_source import open_native
from gemma_convert.publishing import ProgressFactory
from gemma_convert.relayout import Relayout, plan_relayout
from gemma_convert.reports import ToNativeReport
from gemma_convert.stores import sidecar
from gemma_convert.stores.orbax import Compression, OrbaxFormat
from gemma_convert.stores.orbax_reader import find_items
from gemma_convert.stores.original import open_original
from gemma_convert.stores.safetensors import INDEX, SINGLE, SafetensorsFolder
from gemma_convert.stores.staging import check_apart, check_space, check_target
from gemma_convert.transfer import TransferResult


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
    job: FromHuggingFace | Relayout
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
            job = Relayout(source, items, target, native, original, plan, blocks, form)
        else:
            if like is not None:
                raise UsageError("--like is for a native SRC; this one is its own original.")
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
            job = FromHuggingFace(source, target, plan, reader, files, listed, form)
        if dry_run:
            return job.report(TransferResult(), started, dry_run=True)
        check_apart(source, target)
        check_target(target, overwrite=overwrite)
        check_space(target, job.needed_bytes())
        result = job.run(overwrite=overwrite, resume=resume, progress=progress)
        return job.report(result, started, dry_run=False)


def is_native(source: Path) -> bool:
    """Whether a folder holds a native checkpoint rather than Hugging Face files."""
    if any((source / name).exists() for name in (SINGLE, INDEX)):
        return False
    try:
        find_items(source)
    except SourceError:
        return False
    return True
