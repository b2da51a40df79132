"""One conversion to a native layout: what is read, what becomes of it, and what is told of it.

The source is a view of a Hugging Face checkpoint: its files, or a native checkpoint seen as one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.layout import Layout
from gemma_convert.checkpoint.original import Original
from gemma_convert.engine.casting import Losses
from gemma_convert.engine.merged import MergedTensors
from gemma_convert.engine.process_results import TransferResult
from gemma_convert.engine.resumable import SPARE_BYTES
from gemma_convert.engine.transfer import HuggingFaceTensors
from gemma_convert.files.identity import Unchanged
from gemma_convert.layouts.opening import Checkpoint
from gemma_convert.mapping.plan import Plan
from gemma_convert.output import shown
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.remote.mirror import file_size, find_mirror
from gemma_convert.tasks.reports import LossyRow, ToNativeReport, peak_memory


@dataclass
class Conversion:
    """One conversion; `identity` tells the source from others, `not_carried` are files of it.

    Of a native source that is `checkpoint`, `native_arrays` are those that are read, `exceptions`
    those that stay true, and `rounded` counts, while it is read, values whose root cannot be
    divided away exactly. Of an adapter `base` is its model; `merged` are the tensors of a model
    into which one is merged.
    """

    source: Path
    target: Path
    layout: Layout
    form: OrbaxFormat
    original: Original
    plan: Plan
    tensors: HuggingFaceTensors
    not_carried: Sequence[str]
    identity: Mapping[str, object]
    unchanged: Unchanged
    checkpoint: Checkpoint | None = None
    native_arrays: Sequence[str] = ()
    exceptions: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    rounded: Mapping[str, int] = field(default_factory=dict)
    base: Path | None = None
    merged: MergedTensors | None = None

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
        carried = sum(self.tensors.specs[name].nbytes for name in (*self.plan.carried, *at_risk))
        files = sum(file_size(self.original.folder / file) for file in self.original.files)
        elsewhere = self.layout.streams and find_mirror(self.target) is not None
        arrays = 0 if elsewhere else self.plan.target_bytes
        return arrays + carried + files + SPARE_BYTES

    def carried(self, result: TransferResult) -> dict[str, str]:
        """The tensors that the sidecar carries whole, and why."""
        why = "its values do not come back from the stored dtype"
        lost = {name: why for name, losses in result.losses.items() if losses.whole}
        return {**self.plan.carried, **lost}

    def adapter(self) -> dict[str, object] | None:
        """Of a conversion with an adapter: its rank and alpha, and how many weights it changes."""
        merged = self.merged
        adapter = self.plan.architecture.adapter if merged is None else merged.adapter
        if adapter is None:
            return None
        weights = len(self.original.specs) // 2 if merged is None else len(merged.merged)
        told = {"rank": adapter.rank, "alpha": adapter.alpha}
        return {**told, "merged": merged is not None, "weights": weights}

    def _told_adapter(self) -> dict[str, object] | None:
        adapter = self.adapter()
        base = None if self.base is None else shown(self.base)
        return None if adapter is None else {**adapter, "base": base}

    def lossy_rows(self, result: TransferResult) -> tuple[LossyRow, ...]:
        """Rows that the dtype policy rounds, or that lose a root that they were multiplied by."""
        rounded = (
            LossyRow(
                self.plan.sources[name].copies[0].row,
                name,
                reason,
                result.losses.get(name, Losses()).count,
            )
            for name, reason in self.plan.rounded.items()
        )
        divided = (
            LossyRow(name, name, "divided by a root again", count)
            for name, count in self.rounded.items()
        )
        return (*rounded, *divided)

    def report(self, result: TransferResult, started: float, *, dry_run: bool) -> ToNativeReport:
        """The report of this conversion."""
        plan, checkpoint, carried = self.plan, self.checkpoint, self.carried(result)
        seconds = time.monotonic() - started
        return ToNativeReport(
            source=shown(self.source),
            target=shown(self.target),
            layout=plan.layout,
            scanned=plan.scanned,
            family=plan.architecture.family,
            dry_run=dry_run,
            tensors_converted=len(plan.sources),
            bytes_read=plan.source_bytes,
            arrays_written=len(plan.targets),
            bytes_written=plan.target_bytes,
            tensors_carried=len(carried),
            bytes_carried=sum(self.tensors.specs[name].nbytes for name in carried),
            carried_why=dict(Counter(carried.values())),
            tied=tuple(plan.tied),
            shared=len(plan.shared),
            filled=tuple(plan.filled),
            lossy_rows=self.lossy_rows(result),
            exceptions=result.exceptions,
            files_carried=tuple(map(str, self.original.files)),
            not_carried=tuple(self.not_carried),
            framework=" ".join(filter(None, (self.layout.framework, plan.version))),
            settings={
                key: shown(value) for key, value in self.layout.settings(plan, self.target).items()
            },
            seconds=seconds,
            bytes_per_second=0.0 if dry_run else plan.source_bytes / seconds,
            peak_memory_bytes=peak_memory(),
            sealed=checkpoint is not None and checkpoint.arrays is not None,
            adapter=self._told_adapter(),
            changed_arrays=() if checkpoint is None else checkpoint.changed_arrays,
            plan=plan,
        )
