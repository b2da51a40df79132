"""What a conversion reads and what is asked of it: a Hugging Face checkpoint, or a native one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.arrays.dtypes import DTypePolicy
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import architecture_of, named_folder
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.huggingface_view import plan_relayout
from gemma_convert.engine.merged import MergedTensors
from gemma_convert.errors import UsageError
from gemma_convert.files.identity import Unchanged
from gemma_convert.layouts.opening import open_checkpoint
from gemma_convert.layouts.registry import is_native, load_layout
from gemma_convert.mapping.adapted import table_of
from gemma_convert.mapping.config_keys import check_keys
from gemma_convert.mapping.plan import plan_to_native
from gemma_convert.model.adapter import is_adapter, read_adapter
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import load_config, read_config
from gemma_convert.model.foreign import refuse_foreign_folder
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
    `base` is the model of a source that is an adapter, into which it is put with `merge`.
    """

    layout: str
    version: str | None
    like: str | Path | None
    base: str | Path | None
    merge: bool
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
    adapted = is_adapter(source)
    if (options.base is not None or options.merge) and not adapted:
        raise UsageError("--base and --merge are for a SRC that is an adapter.", found=source)
    if is_native(source):
        job = _from_native(source, target, options, stack)
    elif options.like is not None:
        raise UsageError("--like is for a native SRC; this one is its own original.")
    elif options.settings:
        raise UsageError("--settings are for a native SRC; this one has its config.json.")
    elif adapted and options.merge:
        job = _merged(source, target, options, stack)
    else:
        job = _from_huggingface(source, target, options, stack)
    job.plan = replace(job.plan, ignored_facts=tuple(options.ignored_facts))
    job.layout.settings(job.plan, job.target)  # what cannot be told is refused before any work
    return job


def _from_huggingface(
    source: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    """The conversion of a model, or of an adapter by itself."""
    if not is_adapter(source):
        refuse_foreign_folder(source)
    unchanged = _unchanged(source)
    reader = stack.enter_context(SafetensorsFolder(source))
    base = _base(source, options, stack, config_only=True) if is_adapter(source) else None
    architecture = architecture_of(source, reader.specs, base)
    described = base or source
    config = load_config(described)
    tied_inside = architecture.text_only and base is None
    check_keys(config, tied_inside, options.ignored_facts, described / CONFIG)
    job = _conversion(source, target, options, architecture, reader, unchanged)
    job.base_config = None if base is None else read_config(base)
    return job


def _merged(
    adapter: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    """The conversion of an adapter's base model, the adapter merged into it on the way."""
    base = _base(adapter, options, stack, config_only=False)
    job = _from_huggingface(base, target, replace(options, base=None, merge=False), stack)
    facts = read_adapter(adapter)
    matrices = stack.enter_context(SafetensorsFolder(adapter))
    assert isinstance(job.tensors, SafetensorsFolder)
    merged = MergedTensors(job.tensors, matrices, facts)
    job.tensors, job.merged = merged, merged
    sizes = [(shard.file, shard.size, shard.modified) for shard in matrices.shards]
    job.identity = {**job.identity, "adapter": sizes, "scaling": facts.scaling}
    return job


def _base(
    adapter: Path, options: ConversionOptions, stack: ExitStack, *, config_only: bool
) -> Path:
    """The folder of an adapter's base model, which the options name or else the adapter.

    Raises SourceError for an adapter that is not converted, whatever its model is.
    """
    read_adapter(adapter)
    if options.base is None:
        return named_folder(adapter)
    return local(options.base, stack, config_only=config_only)


def _unchanged(source: Path) -> Unchanged:
    found, others = sidecar.other_files(source, [])
    weights = (name for name in others if name.endswith(".safetensors") and "/" not in name)
    return Unchanged(source, [*found, *weights])


def _conversion(
    source: Path,
    target: Path,
    options: ConversionOptions,
    architecture: Architecture,
    reader: SafetensorsFolder,
    unchanged: Unchanged,
) -> Conversion:
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
