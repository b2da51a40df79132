"""Whether the target of a run stands already: one that is continued and had come to its end.

That is proved as `verify` proves it, by reading both sides. The same proof tells an export that may
be replaced from somebody's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeAlias

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.accounted import Strangers, beside_huggingface
from gemma_convert.checkpoint.manifest import read_manifest
from gemma_convert.engine.comparing import Comparison
from gemma_convert.errors import GemmaConvertError, TargetError
from gemma_convert.files.receipt import contents, has_receipt
from gemma_convert.layouts.opening import Checkpoint
from gemma_convert.layouts.registry import is_native, open_native
from gemma_convert.mapping.plan import Plan
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.tasks.conversion import Conversion
from gemma_convert.tasks.export_plan import Export
from gemma_convert.tasks.verify import verify
from gemma_convert.tasks.verify_export import compare_files, compare_tensors


class PlannedExport(Protocol):
    """What an export reads, and what it writes."""

    checkpoint: Checkpoint
    plan: Plan
    export: Export


Opened: TypeAlias = Callable[[ExitStack], PlannedExport]
"""Opens and plans an export once more: an open checkpoint notes which arrays have been read."""


def conversion_stands(job: Conversion) -> bool:
    """Whether the target of `job` is what it would write; False where nothing, or another, is."""
    if not _folder(job.target):
        return False
    try:
        return _same_native(job)
    except (GemmaConvertError, OSError):
        return False


def export_stands(target: Path, opened: Opened) -> bool:
    """Whether `target` is what an export would write, to the last bit of every file."""
    if not _folder(target):
        return False
    found = Comparison()
    try:
        with ExitStack() as stack:
            ours = opened(stack)
            reader = stack.enter_context(SafetensorsFolder(target))
            compare_files(target, ours.checkpoint.original, ours.export, found)
            if not found.different:
                compare_tensors(ours.checkpoint, ours.plan, ours.export, reader, found)
        return not found.different
    except (GemmaConvertError, OSError):
        return False


def strangers_of_export(export: Export, opened: Opened) -> Strangers:
    """What an older export in a folder holds beside the files that this one writes.

    It raises TargetError where the folder is none: it has no receipt of one, and is not what this
    run would write.
    """
    names = (*map(str, export.files), *export.edited, *(shard.file for shard in export.shards))
    proved: set[bytes] = set()

    def strangers(folder: Path) -> list[str]:
        others = beside_huggingface(folder, names)
        if others or has_receipt(folder) or contents(folder) in proved:
            return others
        if not export_stands(folder, opened):
            raise TargetError(
                "The target is a Hugging Face checkpoint that is not an unchanged export of "
                "gemma-convert, so --overwrite does not replace it.",
                where=folder,
                do="choose another target, or remove it yourself",
            )
        proved.add(contents(folder))
        return []

    return strangers


def _folder(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink()


def _same_native(job: Conversion) -> bool:
    manifest = read_manifest(job.target)
    if manifest is None:
        return False
    plan = job.plan
    facts = {
        "layout": plan.layout,
        "framework_version": plan.version,
        "scanned": plan.scanned,
        "dtype": plan.policy.dtype,
        "scaled_dtype": plan.policy.scaled,
        "compression": job.form.compression,
    }
    if any(manifest.get(key) != value for key, value in facts.items()):
        return False
    with open_native(job.target) as native:
        wanted = {name: target.spec for name, target in plan.targets.items()}
        ocdbt = any(job.target.rglob("manifest.ocdbt")) if job.layout.streams else job.form.ocdbt
        if dict(native.specs) != wanted or ocdbt != job.form.ocdbt:
            return False
    listed = {str(file): sidecar.sha256(job.original.folder / file) for file in job.original.files}
    if manifest.get("files_sha256") != listed:
        return False
    if not is_native(job.source):
        return verify(job.target, against=job.source, base=job.base).passed
    known = {name: entry["xxh3_128"] for name, entry in manifest["tensors"].items()}
    ours = dict(job.original.checksums)
    return bool(ours) and known == ours and verify(job.target).passed and verify(job.source).passed
