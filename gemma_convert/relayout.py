"""Native → native: one tree into another form, bits copied, by way of the rows they share.

Both trees are views of the same Hugging Face tensors, so a block of such a tensor is put together
from the one and taken apart into the other. It is neither cast nor scaled: equal scales cancel.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.dtypes import DTypePolicy, TensorSpec, widest
from gemma_convert.mapping.plan import Plan, plan_to_native
from gemma_convert.mapping.table import load_table
from gemma_convert.native_source import NativeBlocks, NativeSource, plan_native
from gemma_convert.output import Progress
from gemma_convert.publishing import ProgressFactory, publish
from gemma_convert.reports import ToNativeReport, native_report
from gemma_convert.step import SPARE_BYTES, Step
from gemma_convert.stores import sidecar
from gemma_convert.stores.orbax import OrbaxFormat
from gemma_convert.stores.original import Original
from gemma_convert.transfer import TransferResult
from gemma_convert.version import __version__


@dataclass
class Relayout:
    """One conversion between two native forms, with the sidecar of the original."""

    source: Path
    items: Path
    target: Path
    native: NativeSource
    original: Original
    plan: Plan
    reader: NativeBlocks
    form: OrbaxFormat

    def needed_bytes(self) -> int:
        """Bytes that the target may take."""
        kept = (file for file in self.original.folder.rglob("*") if file.is_file())
        return self.plan.target_bytes + sum(file.stat().st_size for file in kept) + SPARE_BYTES

    def run(
        self, *, overwrite: bool, resume: bool, progress: ProgressFactory | None
    ) -> TransferResult:
        """Checksums of the tensors in the dtypes of the native tree, when all is written."""
        status = (self.items / "_METADATA").stat()
        source = {"items": str(self.items), "size": status.st_size, "time": status.st_mtime_ns}
        step = Step(self.plan, self.reader, self.form, source)

        def write(folder: Path, bar: Progress) -> TransferResult:
            result = step.write(folder, bar)
            self._write_sidecar(folder / sidecar.FOLDER, step)
            return result

        return publish(
            self.target,
            step.key,
            write,
            title=f"to {self.plan.layout}",
            total=self.plan.source_bytes,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )

    def report(self, result: TransferResult, started: float, *, dry_run: bool) -> ToNativeReport:
        """The report of this conversion."""
        report = native_report(self.source, self.target, self.plan, result, started, dry_run)
        carried = self.plan.carried
        return replace(
            report,
            tensors_carried=len(carried),
            bytes_carried=sum(self.original.specs[name].nbytes for name in carried),
            carried_why=dict(Counter(carried.values())),
            files_carried=tuple(map(str, self.original.files)),
        )

    def _write_sidecar(self, folder: Path, step: Step) -> None:
        """The original's sidecar once more, with a manifest of this tree."""
        own, kept = folder / sidecar.OWN, self.original.folder / sidecar.OWN
        own.mkdir(parents=True)
        sidecar.copy_files(self.original.folder, folder, self.original.files)
        if kept.is_dir():
            files = [file.relative_to(kept) for file in sorted(kept.rglob("*")) if file.is_file()]
            sidecar.copy_files(kept, own, [f for f in files if f.name != sidecar.MANIFEST])
            old = json.loads((kept / sidecar.MANIFEST).read_text(encoding="utf-8"))
        else:
            old = self._fresh_sidecar(own)
        regions = {name: list(boxes.items()) for name, boxes in step.regions.items()}
        sidecar.write_manifest(
            own,
            {
                **old,
                "tool": f"gemma-convert {__version__}",
                "layout": self.plan.layout,
                "scanned": self.plan.scanned,
                "regions": regions,
            },
        )

    def _fresh_sidecar(self, own: Path) -> Mapping[str, object]:
        """What the sidecar of a Hugging Face folder says, without checksums of trained values."""
        (own / sidecar.HEADERS).mkdir()
        for shard in self.original.shards:
            (own / sidecar.HEADERS / f"{shard.file}.header").write_bytes(shard.header)
        carried: dict[str, str] = {}
        if self.original.stored is not None:
            from gemma_convert.output import NoProgress

            carried = sidecar.write_carried(
                own, self.original.stored, list(self.plan.carried), NoProgress()
            )
        return {
            "family": self.plan.architecture.family,
            "lossy_rows": [],
            "exceptions": 0,
            "shards": [
                {"file": shard.file, "size": shard.size, "header": f"{shard.file}.header"}
                for shard in self.original.shards
            ],
            "tensors": {
                name: {
                    "dtype": spec.dtype,
                    "shape": list(spec.shape),
                    "kept": "carried" if name in carried else "converted",
                    "xxh3_128": carried.get(name),
                }
                for name, spec in self.original.specs.items()
            },
            "carried_why": dict(self.plan.carried),
            "tied": dict(self.plan.tied),
            "files_sha256": {},
            "not_carried": [],
        }


def plan_relayout(
    native: NativeSource, original: Original, items: Path, policy: DTypePolicy, scanned: bool
) -> tuple[Plan, NativeBlocks]:
    """The plan from one native form to another, and the blocks that it reads.

    Raises SourceError where the tree is not that of the original's config.json.
    """
    before = plan_native(native, original, items)
    specs = dict(original.specs)
    for name, source in before.sources.items():
        dtypes = [native.specs[copy.target.tensor].dtype for copy in source.copies]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = widest(dtype, other)
        specs[name] = TensorSpec(dtype, source.spec.shape)
    after = plan_to_native(
        original.architecture,
        load_table(before.layout),
        specs,
        _Unscaled(policy.dtype, policy.scaled),
        scanned=scanned,
        text_only=not any("vision_encoder" in name for name in native.specs),
        where=str(items),
    )
    place = {array: number for number, array in enumerate(before.targets)}
    order = sorted(
        after.sources, key=lambda name: place[before.sources[name].copies[0].target.tensor]
    )
    sources = {
        name: replace(
            after.sources[name],
            copies=tuple(replace(copy, scale=None) for copy in after.sources[name].copies),
        )
        for name in order
    }
    targets = {name: replace(target, scale=None) for name, target in after.targets.items()}
    plan = replace(after, sources=sources, targets=targets)
    return plan, NativeBlocks(native, before)


class _Unscaled(DTypePolicy):
    """Between native trees a scaled row keeps its dtype, unless it is to be rounded."""

    def target(self, source: str, *, scaled: bool, where: str) -> str:
        plain = super().target(source, scaled=False, where=where)
        if not scaled:
            return plain
        return "bfloat16" if self.scaled == "bfloat16" else source
