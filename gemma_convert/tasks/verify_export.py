"""An exported Hugging Face folder against the export that its native source gives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from gemma_convert.arrays.dtypes import CONVERTED, Choice, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.native import NativeReader, plan_native
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.comparing import Comparing, Comparison
from gemma_convert.engine.restoring import Restoring
from gemma_convert.engine.transfer import Transfer
from gemma_convert.files.confined import NEVER_READ
from gemma_convert.layouts.opening import Checkpoint, open_checkpoint
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box
from gemma_convert.model.adapter import is_adapter
from gemma_convert.model.config import read_architecture
from gemma_convert.output import counted
from gemma_convert.progress import Listener, working
from gemma_convert.stores.remote.mirror import file_size
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.tasks.export_plan import Export, ExportOptions, plan_export, reversed_plan


def verify_export(
    path: Path,
    native: Path,
    like: Path | None,
    settings: Sequence[str],
    found: Comparison,
    progress: Listener | None,
) -> None:
    """Compares every tensor and every file of the export at `path` with what `native` gives.

    `like` is the original of a checkpoint without a sidecar. Where neither is there, what only an
    original has is not compared.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(SafetensorsFolder(path))
        known = like is not None or sidecar.sidecar_root(native) is not None
        checkpoint = open_checkpoint(native, like if known else path, stack, settings=settings)
        text_only = not is_adapter(path) and read_architecture(path).text_only
        if text_only and not known:
            checkpoint = replace(checkpoint, native=checkpoint.native.without_towers())
        plan = plan_native(checkpoint.native, checkpoint.original)
        export = _export_of(reader, plan, checkpoint, text_only)
        left_out = () if known else tuple(export.stored)
        compare_tensors(checkpoint, plan, export, reader, found, left_out, progress)
        if known:
            compare_files(path, checkpoint.original, export, found)
        else:
            found.notes.append(_without_original(is_adapter(path), len(left_out)))
        if checkpoint.changed_arrays:
            place = "of the native checkpoint"
            count = len(checkpoint.changed_arrays)
            arrays = counted(count, f"array {place} has", f"arrays {place} have")
            found.notes.append(
                f"{arrays} changed since the conversion (trained, or damaged). "
                f"{'It was compared as it is' if count == 1 else 'They were compared as they are'}."
            )


def _without_original(adapter: bool, tensors: int) -> str:
    """What could not be compared of the export of a checkpoint without a sidecar."""
    if adapter:
        return (
            "The native adapter has no sidecar, so adapter_config.json, and with it alpha, was not "
            "compared."
        )
    left_out = (
        f" {tensors} tensors that the native checkpoint does not have were not compared either."
        if tensors
        else ""
    )
    return (
        "The native checkpoint has no sidecar, so config.json, tokenizer and other files were not "
        f"compared.{left_out} Name the original with --like to compare them."
    )


def _export_of(
    reader: SafetensorsFolder, plan: Plan, checkpoint: Checkpoint, text_only: bool
) -> Export:
    """The export with the options that the folder shows to have been given."""
    original, facts = checkpoint.original, checkpoint.facts
    there = set(reader.tensors)
    cut = text_only and not original.architecture.text_only
    options = ExportOptions(text_only=cut)
    kept = plan_export(plan, original, options, facts)
    dtypes = {
        spec.dtype
        for shard in kept.shards
        for tensor in shard.tensors
        if (spec := reader.specs.get(tensor.name, tensor.spec)) != tensor.spec
        and spec.dtype in CONVERTED
    }
    dtype = cast(Choice, dtypes.pop() if len(dtypes) == 1 else "keep")
    whole = set(kept.names.values()) <= there
    options = replace(options, dtype=dtype, kv_shared="keep" if whole else "omit")
    export = plan_export(plan, original, options, facts)
    groups = [[tensor.name for tensor in shard.tensors] for shard in reader.shards]
    planned = [{tensor.name for tensor in shard.tensors} for shard in export.shards]
    if [set(group) for group in groups] == planned or there != set(export.names.values()):
        return export
    return plan_export(plan, original, replace(options, groups=groups), facts)


def compare_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    export: Export,
    reader: SafetensorsFolder,
    found: Comparison,
    left_out: Collection[str] = (),
    progress: Listener | None = None,
) -> None:
    """The tensors that the export would have, and those that stand in the folder.

    Of those that are `left_out` only shape and dtype are compared.
    """
    native, original = checkpoint.native, checkpoint.original
    back, caches, origins = reversed_plan(plan, native, original, export)
    for name, target in back.targets.items():
        if name not in reader.tensors:
            found.differ(name, "is missing")
        elif reader.specs[name] != target.spec:
            spec = reader.specs[name]
            found.differ(name, f"is {spec.dtype} {list(spec.shape)}, not {target.spec.dtype}")
        elif name not in left_out:
            found.note(name, target.spec.nbytes)
    for name in reader.tensors:
        if name not in back.targets:
            found.differ(name, "is not a tensor of this export")
    without = {*found.different, *left_out}
    sources = {
        name: replace(
            source, copies=tuple(c for c in source.copies if c.target.tensor not in without)
        )
        for name, source in back.sources.items()
    }
    values = Restoring(original, origins)

    def read(name: str, box: Box) -> Array:
        tensor = reader.tensors[name]
        values = np.empty([length for _, length in box], numpy_dtype(tensor.spec.dtype))
        reader.read_box(tensor, box, values)
        return values

    with working(progress, "verify", back.source_bytes) as shown_bar:
        rest = replace(back, sources={n: s for n, s in sources.items() if s.copies})
        blocks = NativeReader(native, original, caches)
        Transfer(rest, blocks, Comparing(read, found), values, shown_bar).run()


def compare_files(path: Path, original: Original, export: Export, found: Comparison) -> None:
    """The headers of the shards, the other files, and what nobody wrote."""
    for shard in export.shards:
        file = path / shard.file
        with_header = file.is_file() and sidecar.head(file, len(shard.header)) == shard.header
        if not with_header or file_size(file) != shard.size:
            found.differ(shard.file, "has another header than the export")
    for file in export.files:
        _compare_bytes(path, str(file), sidecar.sha256(original.folder / file), found)
    for name, text in export.edited.items():
        _compare_bytes(path, name, hashlib.sha256(text.encode()).hexdigest(), found)
    ours = {*map(str, export.files), *export.edited, *(shard.file for shard in export.shards)}
    for name in _files(path, ""):
        if name not in ours:
            found.differ(name, "is not a file of this export")


def _compare_bytes(path: Path, name: str, digest: str, found: Comparison) -> None:
    if not (path / name).is_file():
        found.differ(name, "is missing")
        return
    found.note_file(file_size(path / name))
    if sidecar.sha256(path / name) != digest:
        found.differ(name, "differs from the export")


def _files(folder: Path, below: str) -> Iterator[str]:
    for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in NEVER_READ:
                yield from _files(folder, f"{below}{entry.name}/")
        else:
            yield f"{below}{entry.name}"
