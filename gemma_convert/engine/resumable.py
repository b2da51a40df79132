"""Runs one plan into a native store, so that an interrupted run can be continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.arrays.dtypes import numpy_dtype
from gemma_convert.checkpoint.layout import NativeStore
from gemma_convert.engine.journal import Journal, journal_key
from gemma_convert.engine.process_results import Regions, TransferResult, leave_part, take_part
from gemma_convert.engine.processes import Processes
from gemma_convert.engine.transfer import BlockReader, Transfer, Values
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.files.write_out import sync_folder
from gemma_convert.mapping.plan import Plan, TargetTensor
from gemma_convert.mapping.region import Box, blocks
from gemma_convert.mapping.split import split_sources
from gemma_convert.progress import Progress
from gemma_convert.version import __version__

SPARE_BYTES = 16 << 20
"""Asked for beside the tensors: metadata of the store, manifest, headers."""


@dataclass
class ResumableTransfer:
    """One plan on its way into the store that `create(folder, part)` opens.

    `source` identifies what is read and how it is stored, for resuming. Of several `processes` each
    transfers its share of the source tensors; the one that leads completes the checkpoint.
    """

    plan: Plan
    reader: BlockReader
    values: Values
    create: Callable[[Path, int], NativeStore]
    source: Mapping[str, object]
    processes: Processes = field(default_factory=Processes)
    regions: Regions = field(default_factory=dict)
    array_metadata: Mapping[str, str] = field(default_factory=dict)
    value_file: Callable[[Path], ValuesFrom | None] = lambda _: None
    """As the store says it, once all is written."""

    @property
    def key(self) -> str:
        """What must be the same for an interrupted run to be continued."""
        targets = {
            name: (target.spec.dtype, target.spec.shape, target.chunk, target.scale)
            for name, target in self.plan.targets.items()
        }
        copies = [(copy.source.tensor, copy.target.tensor) for copy in self.plan.copies]
        return journal_key(
            {
                "version": __version__,
                "layout": self.plan.layout,
                "targets": targets,
                "copies": copies,
                "source": self.source,
                "processes": self.processes.count,
            }
        )

    @property
    def share_bytes(self) -> int:
        """Bytes of the source tensors that this process transfers."""
        return sum(self.plan.sources[name].spec.nbytes for name in self._share())

    def _share(self) -> Collection[str]:
        return split_sources(self.plan, self.processes.count)[self.processes.index]

    def write(self, folder: Path, progress: Progress) -> TransferResult:
        """Checksums and losses, when the checkpoint is complete but for its sidecar.

        A process that does not lead returns those of its own share, once it is durable.
        """
        started = time.time_ns()
        index = self.processes.index
        with (
            closing(Journal(folder, self.key, index)) as journal,
            closing(self.create(folder, index)) as store,
        ):
            result = self._transfer(journal, store, folder, progress)
            if not index:
                store.complete(started, self.processes.count)
                self.array_metadata, self.value_file = store.array_metadata(), store.value_file
        return result

    def _transfer(
        self, journal: Journal, store: NativeStore, folder: Path, progress: Progress
    ) -> TransferResult:
        """Checksums and losses, when every array is written."""
        done = self._resume(journal, store, progress)
        checksums = self._rest(done, journal, store, progress)
        result = TransferResult(checksums | done, self.values.losses)
        self.regions = store.regions
        index, count = self.processes.index, self.processes.count
        if index:
            leave_part(folder, index, result, self.regions)
        self.processes.step()
        if index:
            sync_folder(folder)
        self.processes.step()
        if index:
            return result
        specs = {name: source.spec for name, source in self.plan.sources.items()}
        for other in range(1, count):
            self._add(result, *take_part(folder, other, specs))
        for name, target in self.plan.filled.items():
            for box, values in filling(target):
                store.write(name, box, values).result()
        return result

    def _rest(
        self, done: Mapping[str, str], journal: Journal, store: NativeStore, progress: Progress
    ) -> dict[str, str]:
        """Transfers what is not done of this process's share; the checksums of its sources."""

        def finished(name: str, checksum: str) -> None:
            notes = self.values.notes(name)
            if notes is None:
                return
            regions = {
                array: [[box, store.regions[array][box]] for box in boxes]
                for array, boxes in self._boxes(name).items()
            }
            journal.add({"tensor": name, "checksum": checksum, "notes": notes, "regions": regions})

        share = self._share()
        rest = {n: s for n, s in self.plan.sources.items() if n in share and n not in done}
        plan = replace(self.plan, sources=rest)
        return Transfer(plan, self.reader, store, self.values, progress, finished).run()

    def _add(self, result: TransferResult, other: TransferResult, regions: Regions) -> None:
        """Adds what another process has transferred."""
        result.checksums |= other.checksums
        result.losses |= other.losses
        for name, boxes in regions.items():
            self.regions.setdefault(name, {}).update(boxes)

    def _resume(self, journal: Journal, store: NativeStore, progress: Progress) -> dict[str, str]:
        """Source tensors that an earlier run had finished, with their checksums.

        What the journal says is believed only where every region, read again, has its checksum.
        """
        done = {}
        for entry in journal.entries:
            name, regions, notes = str(entry.get("tensor")), entry.get("regions"), _notes(entry)
            if not isinstance(entry.get("checksum"), str) or not isinstance(regions, dict):
                continue
            if name not in self.plan.sources or notes is None:
                continue
            boxes = self._boxes(name)
            stored = {array: _parse(listed) for array, listed in regions.items()}
            if {array: set(found) for array, found in stored.items()} != {
                array: set(found) for array, found in boxes.items()
            }:
                continue
            if all(store.holds(array, found) for array, found in stored.items()):
                done[name] = str(entry.get("checksum"))
                self.values.take(name, notes)
                progress.advance(self.plan.sources[name].spec.nbytes, name)
        return done

    def _boxes(self, name: str) -> dict[str, list[Box]]:
        """array → the boxes that a source tensor is written to."""
        source = self.plan.sources[name]
        boxes: dict[str, list[Box]] = {}
        for ranges in blocks(source.region, source.steps):
            for copy in source.copies:
                for part in copy.parts(ranges):
                    boxes.setdefault(copy.target.tensor, []).append(copy.target.box(part))
        return boxes


def filling(target: TargetTensor) -> Iterator[tuple[Box, Any]]:
    """The chunks of an array that is filled with one value, and what stands in each."""
    values = np.full(target.chunk, target.fill, numpy_dtype(target.spec.dtype))
    rest = tuple((0, length) for length in target.spec.shape[1:])
    for start in range(0, target.spec.shape[0], target.chunk[0]):
        yield ((start, target.chunk[0]), *rest), values


def _parse(listed: Any) -> dict[Box, str]:
    """Regions as the journal lists them; an empty dict where they are not regions."""
    try:
        return {
            tuple((int(start), int(length)) for start, length in box): str(checksum)
            for box, checksum in listed
        }
    except (TypeError, ValueError):
        return {}


def _notes(entry: Mapping[str, Any]) -> dict[str, int] | None:
    """What the journal notes of a source; None where it is no such thing."""
    notes = entry.get("notes")
    valid = isinstance(notes, dict) and all(isinstance(count, int) for count in notes.values())
    return notes if valid else None
