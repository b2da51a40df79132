"""One conversion to a native layout, with the sidecar of everything that has no place there.

The source is a view of a Hugging Face checkpoint: its files, or a native checkpoint seen as one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.accounted import beside_native
from gemma_convert.checkpoint.layout import Layout
from gemma_convert.checkpoint.manifest import PLACE, write_manifest
from gemma_convert.checkpoint.seal import seal_files
from gemma_convert.engine.casting import Casting, Losses
from gemma_convert.engine.process_results import TransferResult
from gemma_convert.engine.processes import Processes
from gemma_convert.engine.publishing import ProgressFactory, publish
from gemma_convert.engine.resumable import SPARE_BYTES, ResumableTransfer
from gemma_convert.engine.transfer import HuggingFaceTensors
from gemma_convert.files.identity import Unchanged
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.layouts.opening import Checkpoint
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.table import HUGGINGFACE, table_file
from gemma_convert.output import Progress, shown
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.remote.mirror import file_size, find_mirror
from gemma_convert.stores.safetensors.header import safetensors_header
from gemma_convert.stores.safetensors.naming import Naming
from gemma_convert.stores.safetensors.reader import Shard
from gemma_convert.tasks.equal_tensors import check_equal
from gemma_convert.tasks.reports import (
    LossyRow,
    ToNativeReport,
    exceptions,
    lossy_rows,
    native_report,
)
from gemma_convert.version import __version__


@dataclass(frozen=True)
class Inherited:
    """What a native source passes on of the sidecar that it had itself.

    `rounded` counts, while the source is read, values whose root cannot be divided away exactly.
    """

    checksums: Mapping[str, str] = field(default_factory=dict)
    lossy_rows: Sequence[Mapping[str, Any]] = ()
    exceptions: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    rounded: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Conversion:
    """One conversion. `files` are relative to `root`; `identity` tells the source from others.

    Where the source is a native `checkpoint`, `native_arrays` are those that are read of it.
    """

    source: Path
    target: Path
    layout: Layout
    plan: Plan
    tensors: HuggingFaceTensors
    shards: Sequence[Shard]
    root: Path
    files: Sequence[Path]
    listed: Sequence[str]
    form: OrbaxFormat
    identity: Mapping[str, object]
    inherited: Inherited
    naming: Naming
    unchanged: Unchanged
    checkpoint: Checkpoint | None = None
    native_arrays: Sequence[str] = ()
    processes: Processes = field(default_factory=Processes)

    def needed_bytes(self) -> int:
        """Bytes that the target may take; tensors that may have to be carried count twice.

        Where the target is an object store these are the ones that are written here beforehand.
        """
        at_risk = (
            name
            for name, source in self.plan.sources.items()
            if source.spec.dtype == "float32" and name not in self.plan.rounded
            if any(copy.scale is not None for copy in source.copies)
        )
        carried = sum(self._spec(name).nbytes for name in (*self.plan.carried, *at_risk))
        files = sum(file_size(self.root / file) for file in self.files)
        elsewhere = self.layout.streams and find_mirror(self.target) is not None
        arrays = 0 if elsewhere else self.plan.target_bytes
        return arrays + carried + files + SPARE_BYTES

    def run(
        self, *, overwrite: bool, resume: bool, progress: ProgressFactory | None
    ) -> TransferResult:
        """Checksums and losses, when the checkpoint stands under its name."""
        leads = not self.processes.index
        if leads:
            check_equal(self.plan, self.tensors, self.source)
        carried = sum(self._spec(name).nbytes for name in self.plan.carried)
        transfer = ResumableTransfer(
            self.plan,
            self.tensors,
            Casting(self.plan.rounded),
            lambda folder, part: self.layout.create(folder, self.plan, self.form, part),
            {"form": asdict(self.form), **self.identity},
            self.processes,
        )

        def write(folder: Path, bar: Progress) -> TransferResult:
            result = transfer.write(folder, bar)
            if leads:
                self._write_sidecar(folder, result, transfer, bar)
            return result

        return publish(
            self.target,
            transfer.key,
            write,
            title=f"to {self.plan.layout}",
            total=transfer.share_bytes + carried,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            strangers=beside_native,
            processes=self.processes,
        )

    def _write_sidecar(
        self, root: Path, result: TransferResult, transfer: ResumableTransfer, progress: Progress
    ) -> None:
        """Writes all that the arrays do not hold, and the seal of the whole checkpoint."""
        folder = root / sidecar.FOLDER
        own = folder / sidecar.OWN
        own.mkdir(parents=True)
        self._carry_other_dtypes(result)
        digests = sidecar.copy_files(self.root, folder, self.files)
        sidecar.write_headers(own, self.shards)
        whole = [name for name, losses in result.losses.items() if losses.whole]
        specs = {
            name: spec
            for name, spec in self.tensors.specs.items()
            if name in self.plan.carried or name in whole
        }
        checksums = sidecar.write_carried(own, specs, self.tensors.pieces, progress)
        listed = {
            name: (np.concatenate(losses.places), np.concatenate(losses.originals))
            for name, losses in result.losses.items()
            if losses.places
        }
        if listed or self.inherited.exceptions:
            sidecar.write_exceptions(own, {**self.inherited.exceptions, **listed})
        if self.checkpoint is not None:
            self.checkpoint.check_carried({**result.checksums, **checksums})
            self.checkpoint.read_rest(self.native_arrays)
        self.tensors.check_unchanged()
        self.unchanged.check()
        for name, text in self.layout.settings_files(self.plan, self.target).items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        carried = own / sidecar.CARRIED

        def value_file(path: Path) -> ValuesFrom | None:
            if path == carried:
                return ValuesFrom(len(safetensors_header(specs)))
            return transfer.value_file(path)

        manifest = self._manifest(result, checksums, digests)
        regions = {name: list(boxes.items()) for name, boxes in transfer.regions.items()}
        seal = {
            "regions": regions,
            "array_metadata": transfer.array_metadata,
            "files": seal_files(root, value_file),
        }
        write_manifest(root / PLACE, manifest | seal)

    def _carry_other_dtypes(self, result: TransferResult) -> None:
        """Single values are kept in the original's dtype; a tensor in another is carried whole."""
        headers = {tensor.name: tensor.spec for shard in self.shards for tensor in shard.tensors}
        for name, losses in result.losses.items():
            if losses.places and self._spec(name) != headers[name]:
                losses.whole = True
                losses.places.clear()
                losses.originals.clear()

    def _spec(self, name: str) -> TensorSpec:
        return self.tensors.specs[name]

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
            "compression": self.form.compression,
            "settings": self._settings(),
            "ignored_facts": list(plan.ignored_facts),
            "names": list(self.naming.wrappers),
            "mapping_sha256": _mapping_digests(plan.layout),
            "lossy_rows": [
                *self.inherited.lossy_rows,
                *(asdict(row) for row in self._lossy_rows(result)),
            ],
            "exceptions": exceptions(result),
            "shards": [
                {"file": shard.file, "size": shard.size, "header": f"{shard.file}.header"}
                for shard in self.shards
            ],
            "tensors": {
                tensor.name: {
                    "dtype": (
                        self._spec(tensor.name) if tensor.name in carried else tensor.spec
                    ).dtype,
                    "shape": list(tensor.spec.shape),
                    "kept": self._kept(tensor.name, result.losses.get(tensor.name)),
                    "xxh3_128": carried.get(tensor.name)
                    or self._checksum(tensor.name, tensor.spec, result),
                }
                for shard in self.shards
                for tensor in shard.tensors
            },
            "carried_why": plan.carried,
            "tied": plan.tied,
            "shared": plan.shared,
            "filled": {name: target.fill for name, target in plan.filled.items()},
            "files_sha256": digests,
            "not_carried": list(self.listed),
        }

    def _settings(self) -> dict[str, str]:
        """How the framework loads the checkpoint, but for where it lies."""
        settings = self.layout.settings(self.plan, self.target)
        return {key: text for key, text in settings.items() if str(self.target) not in text}

    def _checksum(self, name: str, spec: TensorSpec, result: TransferResult) -> str | None:
        """Checksum of the original's tensor, where it is known."""
        known = self.inherited.checksums.get(name)
        if known is None and self._spec(name) == spec:
            return result.checksums.get(self.plan.equal.get(name, name))
        return known

    def _lossy_rows(self, result: TransferResult) -> tuple[LossyRow, ...]:
        divided = (
            LossyRow(name, name, "divided by a root again", count)
            for name, count in self.inherited.rounded.items()
        )
        return (*lossy_rows(self.plan, result), *divided)

    def _kept(self, name: str, losses: Losses | None) -> str:
        if name in self.plan.tied:
            return "tied"
        if name in self.plan.shared:
            return "shared"
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
            self.source, self.target, self.plan, self.layout, result, started, dry_run=dry_run
        )
        return replace(
            report,
            source=shown(self.source),
            target=shown(self.target),
            settings={key: shown(value) for key, value in report.settings.items()},
            lossy_rows=self._lossy_rows(result),
            tensors_carried=len(carried),
            bytes_carried=sum(self._spec(name).nbytes for name in carried),
            carried_why=dict(Counter(carried.values())),
            files_carried=tuple(map(str, self.files)),
            not_carried=tuple(self.listed),
            sealed=self.checkpoint is not None and self.checkpoint.arrays is not None,
            changed_arrays=() if self.checkpoint is None else self.checkpoint.changed_arrays,
        )


def _mapping_digests(layout: str) -> dict[str, str]:
    files = [table_file(name) for name in (HUGGINGFACE, layout)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
