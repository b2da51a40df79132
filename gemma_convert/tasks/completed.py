"""Whether the target of a run stands already: one that is continued and had come to its end.

That is proved as `verify` proves it, by reading both sides. The same proof tells an export that may
be replaced from somebody's checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.accounted import Strangers, beside_huggingface
from gemma_convert.checkpoint.manifest import read_manifest
from gemma_convert.errors import GemmaConvertError, TargetError
from gemma_convert.files.receipt import contents, has_receipt
from gemma_convert.layouts.registry import is_native, open_native
from gemma_convert.tasks.conversion import Conversion
from gemma_convert.tasks.export_plan import Export
from gemma_convert.tasks.verify import verify


def conversion_stands(job: Conversion) -> bool:
    """Whether the target of `job` is what it would write; False where nothing, or another, is."""
    if not _folder(job.target):
        return False
    try:
        return _same_native(job)
    except (GemmaConvertError, OSError):
        return False


def export_stands(target: Path, native: Path, export: Export, settings: Sequence[str]) -> bool:
    """Whether `target` is the export of `native` that is asked for."""
    if not _folder(target):
        return False
    try:
        headers = all(
            (target / shard.file).stat().st_size == shard.size
            and sidecar.head(target / shard.file, len(shard.header)) == shard.header
            for shard in export.shards
        )
        edited = all(
            (target / name).read_bytes() == text.encode() for name, text in export.edited.items()
        )
        return headers and edited and verify(target, against=native, settings=settings).passed
    except (GemmaConvertError, OSError):
        return False


def strangers_of_export(native: Path, export: Export, settings: Sequence[str]) -> Strangers:
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
        if not export_stands(folder, native, export, settings):
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
