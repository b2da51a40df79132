"""Hugging Face → native: one conversion with the sidecar of everything that has no place."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from gemma_convert.dtypes import TensorSpec
from gemma_convert.errors import SourceError
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.table import HUGGINGFACE, mappings_folder
from gemma_convert.output import Progress
from gemma_convert.publishing import ProgressFactory, publish
from gemma_convert.reports import ToNativeReport, exceptions, lossy_rows, native_report
from gemma_convert.step import SPARE_BYTES, Regions, Step
from gemma_convert.stores import sidecar
from gemma_convert.stores.orbax import OrbaxFormat
from gemma_convert.stores.safetensors import SafetensorsFolder
from gemma_convert.transfer import Losses, TransferResult
from gemma_convert.version import __version__


@dataclass
class FromHuggingFace:
    """One conversion into an Orbax step folder with its sidecar."""

    source: Path
    target: Path
    plan: Plan
    reader: SafetensorsFolder
    files: Sequence[Path]
    listed: Sequence[str]
    form: OrbaxFormat

    def needed_bytes(self) -> int:
        """Bytes that the target may take; tensors that may have to be carried count twice."""
        at_risk = (
            name
            for name, source in self.plan.sources.items()
            if source.spec.dtype == "float32" and name not in self.plan.rounded
            if any(copy.scale is not None for copy in source.copies)
        )
        carried = sum(self._spec(name).nbytes for name in (*self.plan.carried, *at_risk))
        files = sum((self.source / file).stat().st_size for file in self.files)
        return self.plan.target_bytes + carried + files + SPARE_BYTES

    def run(
        self, *, overwrite: bool, resume: bool, progress: ProgressFactory | None
    ) -> TransferResult:
        carried = sum(self._spec(name).nbytes for name in self.plan.carried)
        self._check_tied()
        source = [(shard.file, shard.size, shard.modified_ns) for shard in self.reader.shards]
        headers = [hashlib.sha256(shard.header).hexdigest() for shard in self.reader.shards]
        step = Step(self.plan, self.reader, self.form, {"source": source, "headers": headers})

        def write(folder: Path, bar: Progress) -> TransferResult:
            result = step.write(folder, bar)
            self._write_sidecar(folder / sidecar.FOLDER, result, step.regions, bar)
            return result

        return publish(
            self.target,
            step.key,
            write,
            title=f"to {self.plan.layout}",
            total=self.plan.source_bytes + carried,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )

    def _write_sidecar(
        self,
        folder: Path,
        result: TransferResult,
        regions: Mapping[str, Regions],
        progress: Progress,
    ) -> None:
        own = folder / sidecar.OWN
        own.mkdir(parents=True)
        digests = sidecar.copy_files(self.source, folder, self.files)
        sidecar.write_headers(own, self.reader)
        whole = [name for name, losses in result.losses.items() if losses.whole]
        names = [name for name in self.reader.tensors if name in self.plan.carried or name in whole]
        checksums = sidecar.write_carried(own, self.reader, names, progress)
        self.reader.check_unchanged()
        listed = {
            name: (np.concatenate(losses.places), np.concatenate(losses.originals))
            for name, losses in result.losses.items()
            if losses.places
        }
        if listed:
            sidecar.write_exceptions(own, listed)
        manifest = self._manifest(result, checksums, digests)
        listed_regions = {name: list(boxes.items()) for name, boxes in regions.items()}
        sidecar.write_manifest(own, manifest | {"regions": listed_regions})

    def _check_tied(self) -> None:
        """Raises SourceError where a tied tensor differs from the one that it must equal."""
        for name, other in self.plan.tied.items():
            if not _same_bytes(self.reader, name, other):
                raise SourceError(
                    "The output head is not tied to the embedding; no layout has a place for it.",
                    where=self.source,
                    expected=f"{name} equal to {other}, bit for bit",
                    found="different values",
                )

    def _spec(self, name: str) -> TensorSpec:
        return self.reader.tensors[name].spec

    def _manifest(
        self, result: TransferResult, carried: dict[str, str], digests: dict[str, str]
    ) -> dict[str, object]:
        plan = self.plan
        return {
            "tool": f"gemma-convert {__version__}",
            "layout": plan.layout,
            "scanned": plan.scanned,
            "family": plan.architecture.family,
            "dtype": plan.policy.dtype,
            "scaled_dtype": plan.policy.scaled,
            "mapping_sha256": _mapping_digests(plan.layout),
            "lossy_rows": [asdict(row) for row in lossy_rows(plan, result)],
            "exceptions": exceptions(result),
            "shards": [
                {"file": shard.file, "size": shard.size, "header": f"{shard.file}.header"}
                for shard in self.reader.shards
            ],
            "tensors": {
                name: {
                    "dtype": tensor.spec.dtype,
                    "shape": list(tensor.spec.shape),
                    "kept": self._kept(name, result.losses.get(name)),
                    "xxh3_128": result.checksums.get(plan.tied.get(name, name))
                    or carried.get(name),
                }
                for name, tensor in self.reader.tensors.items()
            },
            "carried_why": plan.carried,
            "tied": plan.tied,
            "files_sha256": digests,
            "not_carried": list(self.listed),
        }

    def _kept(self, name: str, losses: Losses | None) -> str:
        if name in self.plan.tied:
            return "tied"
        if name in self.plan.carried or (losses is not None and losses.whole):
            return "carried"
        return "converted"

    def report(self, result: TransferResult, started: float, *, dry_run: bool) -> ToNativeReport:
        """The report of this conversion."""
        carried = dict(self.plan.carried) | {
            name: "its values do not come back from the stored dtype"
            for name, losses in result.losses.items()
            if losses.whole
        }
        report = native_report(
            self.source, self.target, self.plan, result, started, dry_run=dry_run
        )
        return replace(
            report,
            tensors_carried=len(carried),
            bytes_carried=sum(self._spec(name).nbytes for name in carried),
            carried_why=dict(Counter(carried.values())),
            files_carried=tuple(map(str, self.files)),
            not_carried=tuple(self.listed),
        )


def _mapping_digests(layout: str) -> dict[str, str]:
    files = [mappings_folder() / f"{name}.toml" for name in (HUGGINGFACE, layout)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _same_bytes(reader: SafetensorsFolder, name: str, other: str) -> bool:
    left, right = reader.tensors[name], reader.tensors[other]
    if left.spec != right.spec:
        return False
    size = sidecar.COPY_BYTES
    one, two = memoryview(bytearray(size)), memoryview(bytearray(size))
    for offset in range(0, left.spec.nbytes, size):
        length = min(size, left.spec.nbytes - offset)
        reader.read_into(left, offset, one[:length])
        reader.read_into(right, offset, two[:length])
        if one[:length] != two[:length]:
            return False
    return True
