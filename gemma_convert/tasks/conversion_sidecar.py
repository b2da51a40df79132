"""The sidecar of a conversion: all that the arrays do not hold, and the seal of the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import KEPT_BASE
from gemma_convert.checkpoint.manifest import PLACE, write_manifest
from gemma_convert.checkpoint.seal import seal_files
from gemma_convert.engine.casting import listed_values
from gemma_convert.engine.process_results import TransferResult
from gemma_convert.engine.resumable import ResumableTransfer
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.mapping.table import HUGGINGFACE, table_file
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.progress import Progress
from gemma_convert.stores.safetensors.header import safetensors_header
from gemma_convert.tasks.conversion import Conversion
from gemma_convert.version import __version__


def write_sidecar(
    job: Conversion,
    root: Path,
    result: TransferResult,
    transfer: ResumableTransfer,
    progress: Progress,
) -> None:
    """Writes the sidecar beside the arrays in `root`, which are complete.

    Raises SourceError where the source has changed, or is a checkpoint that is damaged.
    """
    folder = root / sidecar.FOLDER
    own = folder / sidecar.OWN
    own.mkdir(parents=True)
    _carry_other_dtypes(job, result)
    digests = sidecar.copy_files(job.original.folder, folder, job.original.files)
    sidecar.write_headers(own, job.original.shards)
    if job.original.base_config is not None:
        (own / KEPT_BASE).mkdir()
        (own / KEPT_BASE / CONFIG).write_bytes(job.original.base_config)
    names = job.carried(result)
    specs = {name: spec for name, spec in job.tensors.specs.items() if name in names}
    carried = sidecar.write_carried(own, specs, job.tensors.pieces, progress)
    exceptions = {**job.exceptions, **listed_values(result.losses)}
    if exceptions:
        sidecar.write_exceptions(own, exceptions)
    _check_source(job, {**result.checksums, **carried})
    for name, text in job.layout.settings_files(job.plan, job.target).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    manifest = _manifest(job, result, carried, digests)
    write_manifest(root / PLACE, {**manifest, **_seal(root, transfer, specs)})


def _carry_other_dtypes(job: Conversion, result: TransferResult) -> None:
    """Single values are kept in the original's dtype; a tensor in another is carried whole."""
    originals = job.original.specs
    for name, losses in result.losses.items():
        if losses.places and job.tensors.specs[name] != originals[name]:
            losses.carry_whole()


def _check_source(job: Conversion, checksums: Mapping[str, str]) -> None:
    """Raises SourceError where what was read is not what stands there, or was sealed."""
    if job.checkpoint is not None:
        job.checkpoint.check_carried(checksums)
        job.checkpoint.read_rest(job.native_arrays)
    job.tensors.check_unchanged()
    job.unchanged.check()


def _seal(
    root: Path, transfer: ResumableTransfer, carried: Mapping[str, TensorSpec]
) -> dict[str, object]:
    def value_file(path: Path) -> ValuesFrom | None:
        if path == root / sidecar.FOLDER / sidecar.OWN / sidecar.CARRIED:
            return ValuesFrom(len(safetensors_header(carried)))
        return transfer.value_file(path)

    return {
        "regions": {name: list(boxes.items()) for name, boxes in transfer.regions.items()},
        "array_metadata": transfer.array_metadata,
        "files": seal_files(root, value_file),
    }


def _manifest(
    job: Conversion, result: TransferResult, carried: Mapping[str, str], digests: Mapping[str, str]
) -> dict[str, object]:
    """All but the seal; `carried` and `digests` are of carried tensors and files."""
    plan, before = job.plan, job.original.manifest.get("lossy_rows", [])
    return {
        "tool": f"gemma-convert {__version__}",
        "layout": plan.layout,
        "framework_version": plan.version,
        "scanned": plan.scanned,
        "family": plan.architecture.family,
        "dtype": plan.policy.dtype,
        "scaled_dtype": plan.policy.scaled,
        "compression": job.form.compression,
        "settings": _settings(job),
        "adapter": job.adapter(),
        "ignored_facts": list(plan.ignored_facts),
        "names": list(job.original.naming.wrappers),
        "mapping_sha256": _mapping_digests(plan.layout),
        "lossy_rows": [*before, *map(asdict, job.lossy_rows(result))],
        "exceptions": result.exceptions,
        "shards": [
            {"file": shard.file, "size": shard.size, "header": f"{shard.file}.header"}
            for shard in job.original.shards
        ],
        "tensors": _tensors(job, result, carried),
        "carried_why": plan.carried,
        "tied": plan.tied,
        "shared": plan.shared,
        "filled": {name: target.fill for name, target in plan.filled.items()},
        "files_sha256": digests,
        "not_carried": list(job.not_carried),
    }


def _settings(job: Conversion) -> dict[str, str]:
    """How the framework loads the checkpoint, but for where it lies."""
    settings = job.layout.settings(job.plan, job.target)
    return {key: text for key, text in settings.items() if str(job.target) not in text}


def _mapping_digests(layout: str) -> dict[str, str]:
    files = [table_file(name) for name in (HUGGINGFACE, layout)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _tensors(
    job: Conversion, result: TransferResult, carried: Mapping[str, str]
) -> dict[str, dict[str, object]]:
    """Every tensor of the original: what it is, where it is kept, and its checksum."""
    return {
        name: {
            "dtype": (job.tensors.specs[name] if name in carried else spec).dtype,
            "shape": list(spec.shape),
            "kept": _kept(job, name, carried),
            "xxh3_128": carried.get(name) or _checksum(job, name, spec, result),
        }
        for name, spec in job.original.specs.items()
    }


def _kept(job: Conversion, name: str, carried: Mapping[str, str]) -> str:
    for how, names in (("tied", job.plan.tied), ("shared", job.plan.shared), ("carried", carried)):
        if name in names:
            return how
    return "converted"


def _checksum(job: Conversion, name: str, spec: TensorSpec, result: TransferResult) -> str | None:
    """Checksum of the original's tensor, where it is known."""
    known = job.original.checksums.get(name)
    if known is None and job.tensors.specs[name] == spec:
        return result.checksums.get(job.plan.equal.get(name, name))
    return known
