"""What a conversion reads and what is asked of it: a Hugging Face checkpoint, or a native one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.arrays.dtypes import DTypePolicy
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import architecture_of, named_folder
from gemma_convert.checkpoint.adapter_original import AdapterBase
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.adapter_pairs import AdapterPairs
from gemma_convert.engine.huggingface_view import plan_relayout
from gemma_convert.engine.merged import MergedTensors
from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.files.identity import Unchanged
from gemma_convert.layouts.opening import open_checkpoint
from gemma_convert.layouts.registry import is_native, load_layout
from gemma_convert.mapping.adapted import refuse_experts, table_of
from gemma_convert.mapping.config_keys import check_keys
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.model.adapter import is_adapter, read_adapter
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import load_config, read_architecture, read_config
from gemma_convert.model.foreign import refuse_foreign_folder
from gemma_convert.model.huggingface_files import CONFIG, INDEX
from gemma_convert.output import note, shown
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.tensor_folder import TensorFolder
from gemma_convert.stores.weights import is_distcp, is_huggingface, open_weights
from gemma_convert.tasks.conversion import Conversion

WEIGHTS = (".safetensors", ".distcp")
"""Files of weights that a conversion may read."""


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
    adapted, native = is_adapter(source), is_native(source)
    if options.merge and not adapted:
        raise UsageError("--merge is for a source that is a PEFT adapter.", found=source)
    if options.base is not None and not adapted and not native:
        raise UsageError("--base is for a source that is an adapter.", found=source)
    if native:
        job = _from_native(source, target, options, stack)
    elif options.like is not None and not is_distcp(source):
        raise UsageError(
            "--like is for a native source; this one is a Hugging Face checkpoint already."
        )
    elif options.settings:
        raise UsageError("--settings are for a native source; this one has its config.json.")
    elif adapted:
        job = (_merged if options.merge else _of_adapter)(source, target, options, stack)
    else:
        job = _from_huggingface(source, target, options, stack)
    job.plan = replace(job.plan, ignored_facts=tuple(options.ignored_facts))
    job.layout.settings(job.plan, job.target)  # what cannot be told is refused before any work
    _check_effect(options, job)
    job.plan = replace(job.plan, ignored_facts=tuple(_in_the_way(job)))
    return job


def _check_effect(options: ConversionOptions, job: Conversion) -> None:
    """Raises UsageError for options of arrays that this checkpoint will not have."""
    table = table_of(options.layout, job.original.architecture, options.version)
    scaled = any(row.scale is not None for row in table.rows)
    if options.policy.scaled != DTypePolicy().scaled and not scaled:
        raise UsageError(
            "--scaled-dtype is for arrays that are stored scaled; this checkpoint will have none.",
            where=f"layout {options.layout}",
            do="leave it out; --dtype is the dtype of all other arrays",
        )
    if options.form != OrbaxFormat() and not job.layout.streams:
        raise UsageError(
            "--no-ocdbt and --compression are for Orbax arrays; this layout has none.",
            where=f"layout {options.layout}",
            do="leave them out",
        )


def _in_the_way(job: Conversion) -> Iterator[str]:
    """Those of the ignored keys of config.json without which this would be refused."""
    text_only, where = job.plan.architecture.text_only, job.original.folder
    for key in job.plan.ignored_facts:
        base = job.original.base_config
        config = load_config(where) if base is None else json.loads(base)
        others = tuple(one for one in job.plan.ignored_facts if one != key)
        try:
            check_keys(config, text_only, others, where)
            job.layout.settings(replace(job.plan, ignored_facts=others), job.target)
        except SourceError:
            yield key
        else:
            note(f"--ignore-fact {short(key)}: nothing is refused because of that key", "warning")


def _from_huggingface(
    source: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    """The conversion of a model; `like` describes one whose folder holds tensors alone."""
    refuse_foreign_folder(source)
    like = source if options.like is None else _described(local(options.like, stack))
    if like == source and is_distcp(source) and not (source / CONFIG).exists():
        raise SourceError(
            "The model of this torch.distributed checkpoint is unknown: it has no config.json.",
            where=source,
            do="name the original with --like, or put its config.json and tokenizer here",
        )
    unchanged = _unchanged(source, like)
    architecture = read_architecture(like)
    check_keys(load_config(like), architecture.text_only, options.ignored_facts, like / CONFIG)
    reader = stack.enter_context(open_weights(source))
    original = _original(like, source, architecture, reader)
    return _conversion(source, target, options, original, reader, unchanged)


def _of_adapter(
    source: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    """The conversion of an adapter by itself."""
    if options.text_only:
        raise UsageError("An adapter has no towers to leave out.", do="drop --text-only")
    base = _base(source, options, stack, config_only=True)
    unchanged = _unchanged(source, source)
    text_only = read_architecture(base).text_only
    check_keys(load_config(base), text_only, options.ignored_facts, base / CONFIG)
    reader = stack.enter_context(open_weights(source))
    architecture = architecture_of(source, reader.specs, base)
    refuse_experts(table_of(options.layout, architecture, options.version), reader.specs)
    original = _original(source, source, architecture, reader)
    original.base_config = read_config(base)
    job = _conversion(source, target, options, original, reader, unchanged)
    job.base = base
    return job


def _merged(
    adapter: Path, target: Path, options: ConversionOptions, stack: ExitStack
) -> Conversion:
    """The conversion of an adapter's base model, the adapter merged into it on the way."""
    base = _base(adapter, options, stack, config_only=False)
    job = _from_huggingface(base, target, replace(options, base=None, merge=False), stack)
    facts = read_adapter(adapter)
    matrices = stack.enter_context(open_weights(adapter))
    merged = MergedTensors(job.tensors, AdapterPairs(job.tensors.specs, matrices, facts))
    job.source, job.base = adapter, base
    job.tensors, job.merged = merged, merged
    job.identity = {**job.identity, "adapter": _opened(matrices), "scaling": facts.scaling}
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


def _adapter_base(base: str | Path, stack: ExitStack) -> AdapterBase:
    return AdapterBase(local(base, stack, config_only=True), str(base))


def _unchanged(source: Path, like: Path) -> Unchanged:
    found, others = sidecar.other_files(source, [])
    weights = [name for name in others if name.endswith(WEIGHTS) and "/" not in name]
    beside = [] if like == source else [like / name for name in sidecar.other_files(like, [])[0]]
    return Unchanged(source, [*found, *weights, *beside])


def _original(
    like: Path, source: Path, architecture: Architecture, reader: TensorFolder
) -> Original:
    """The original whose files are those of `like`, and whose tensors are those of `source`."""
    left_out = [*reader.own_files, *([INDEX] if like != source else [])]
    files, _ = sidecar.other_files(like, left_out)
    return Original(like, architecture, reader.shards, reader.naming, files, reader)


def _conversion(
    source: Path,
    target: Path,
    options: ConversionOptions,
    original: Original,
    reader: TensorFolder,
    unchanged: Unchanged,
) -> Conversion:
    plan = plan_to_native(
        original.architecture,
        table_of(options.layout, original.architecture, options.version),
        reader.specs,
        options.policy,
        scanned=options.scanned,
        text_only=options.text_only,
        block_bytes=options.block_bytes,
        where=str(source),
    )
    _, not_carried = sidecar.other_files(source, reader.own_files)
    return Conversion(
        source=source,
        target=target,
        layout=load_layout(options.layout),
        form=options.form,
        original=original,
        plan=plan,
        tensors=reader,
        not_carried=[*not_carried, *reader.beside],
        identity={"source": _opened(reader), "files": unchanged.files},
        unchanged=unchanged,
    )


def _opened(reader: TensorFolder) -> list[tuple[object, ...]]:
    return [(file, *facts) for file, facts in reader.opened.items()]


def _described(like: Path) -> Path:
    """The folder of a Hugging Face checkpoint, or of what a converted one keeps of its own."""
    root = None if is_huggingface(like) else sidecar.sidecar_root(like)
    return like if root is None else root / sidecar.FOLDER


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
        base=None if options.base is None else _adapter_base(options.base, stack),
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
