"""What a conversion reads and what is asked of it: a Hugging Face checkpoint, or a native one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.arrays.dtypes import DTypePolicy
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.huggingface_view import plan_relayout
from gemma_convert.errors import UsageError
from gemma_convert.files.identity import Unchanged
from gemma_convert.layouts.opening import open_checkpoint
from gemma_convert.layouts.registry import is_native, load_layout
from gemma_convert.mapping.adapted import table_of
from gemma_convert.mapping.config_keys import check_keys
from gemma_convert.mapping.plan import plan_to_native
from gemma_convert.model.config import load_config, read_architecture
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.output import shown
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.tasks.conversion import Conversion


@dataclass(frozen=True)
class ConversionOptions:
    """What is asked of a conversion; `like`, `accept` and `settings` are for a native source.

    `version` is that of the framework, None for the first one that the layout's table knows.
    """

    layout: str
    version: str | None
    like: str | Path | None
    policy: DTypePolicy
    form: OrbaxFormat
    scanned: bool
    text_only: bool
    block_bytes: int | None
    accept: Sequence[str]
    ignored_facts: Sequence[str]
    settings: Sequence[str]


def plan_conversion(
    source: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    """The conversion of `source`, which is open until `stack` is closed.

    Raises SourceError for a source that cannot be converted, UsageError for options that it or the
    layout does not take.
    """
    if is_native(source):
        job = _from_native(source, target, options, stack)
    elif options.like is not None:
        raise UsageError("--like is for a native SRC; this one is its own original.")
    elif options.settings:
        raise UsageError("--settings are for a native SRC; this one has its config.json.")
    else:
        job = _from_huggingface(source, target, options, stack)
    job.plan = replace(job.plan, ignored_facts=tuple(options.ignored_facts))
    job.layout.settings(job.plan, job.target)  # what cannot be told is refused before any work
    return job


def _from_huggingface(
    source: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    found, others = sidecar.other_files(source, [])
    weights = (name for name in others if name.endswith(".safetensors") and "/" not in name)
    unchanged = Unchanged(source, [*found, *weights])
    architecture = read_architecture(source)
    check_keys(load_config(source), architecture.text_only, options.ignored_facts, source / CONFIG)
    reader = stack.enter_context(SafetensorsFolder(source))
    plan = plan_to_native(
        architecture,
        table_of(options.layout, architecture, options.version),
        reader.specs,
        options.policy,
        scanned=options.scanned,
        text_only=options.text_only,
        block_bytes=options.block_bytes,
        where=str(source),
    )
    files, not_carried = sidecar.other_files(source, [shard.file for shard in reader.shards])
    shards = [(shard.file, shard.size, shard.modified) for shard in reader.shards]
    return Conversion(
        source=source,
        target=target,
        layout=load_layout(options.layout),
        form=options.form,
        original=Original(source, architecture, reader.shards, reader.naming, files, reader),
        plan=plan,
        tensors=reader,
        not_carried=not_carried,
        identity={"source": shards, "files": unchanged.files},
        unchanged=unchanged,
    )


def _from_native(
    source: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    checkpoint = open_checkpoint(
        source,
        None if options.like is None else local(options.like, stack),
        stack,
        block_bytes=options.block_bytes,
        accept=options.accept,
        settings=options.settings,
    )
    native, original = checkpoint.native, checkpoint.original
    plan, view = plan_relayout(
        native,
        original,
        table_of(options.layout, original.architecture, options.version),
        options.policy,
        scanned=options.scanned,
        text_only=options.text_only,
    )
    if checkpoint.facts is not None:
        plan = replace(plan, architecture=checkpoint.facts.architecture)
    return Conversion(
        source=source,
        target=target,
        layout=load_layout(options.layout),
        form=options.form,
        original=original,
        plan=plan,
        tensors=view,
        not_carried=original.manifest.get("not_carried", []),
        identity={"native": shown(native.folder), "state": native.fingerprint},
        unchanged=Unchanged(original.folder, original.files),
        checkpoint=checkpoint,
        native_arrays=view.arrays(plan.sources),
        exceptions={name: e for name, e in original.exceptions.items() if name in view.raw},
        rounded=view.rounded,
    )
