"""Writes one plan into an Orbax step folder, so that an interrupted run can be continued."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.dtypes import TensorSpec
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box, blocks
from gemma_convert.output import Progress
from gemma_convert.stores.journal import Journal, journal_key
from gemma_convert.stores.orbax import OrbaxFormat, OrbaxWriter, write_step_metadata
from gemma_convert.transfer import BlockReader, Transfer, TransferResult
from gemma_convert.version import __version__

STEP, ITEMS = "0", "items"

SPARE_BYTES = 16 << 20
"""Asked for beside the tensors: metadata of the store, manifest, headers."""

Regions = Mapping[Box, str]


@dataclass
class Step:
    """One plan on its way into `0/items`. `source` identifies what is read, for resuming."""

    plan: Plan
    reader: BlockReader
    form: OrbaxFormat
    source: Mapping[str, object]
    regions: dict[str, dict[Box, str]] = field(default_factory=dict)

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
                "targets": targets,
                "copies": copies,
                "form": asdict(self.form),
                "source": self.source,
            }
        )

    def write(self, folder: Path, progress: Progress) -> TransferResult:
        """Checksums and losses, when the step folder is complete but for its sidecar."""
        started = time.time_ns()
        journal = Journal(folder, self.key)
        writer = OrbaxWriter(folder / STEP / ITEMS, self.form)
        writer.declare(
            {name: (target.spec, target.chunk) for name, target in self.plan.targets.items()}
            | {"step": (TensorSpec("int32", ()), ())}
        )
        done = self._resume(journal, writer, progress)

        def finished(name: str, checksum: str) -> None:
            regions = {
                array: [[box, writer.regions[array][box]] for box in boxes]
                for array, boxes in self._boxes(name).items()
            }
            journal.add({"tensor": name, "checksum": checksum, "regions": regions})

        rest = {name: s for name, s in self.plan.sources.items() if name not in done}
        transfer = Transfer(
            replace(self.plan, sources=rest), self.reader, writer, progress, finished
        )
        result = transfer.run()
        result.checksums |= done
        writer.write("step", (), np.zeros((), np.int32)).result()
        writer.finish(
            {
                "step": {"value_type": "scalar", "skip_deserialize": False},
                "opt_state": {"value_type": "Dict", "skip_deserialize": True},
            }
        )
        write_step_metadata(folder / STEP, ITEMS, {"scan_layers": self.plan.scanned}, started)
        journal.close()
        self.regions = writer.regions
        return result

    def _resume(self, journal: Journal, writer: OrbaxWriter, progress: Progress) -> dict[str, str]:
        """Source tensors that an earlier run had finished, with their checksums.

        What the journal says is believed only where every region, read again, has its checksum.
        """
        done = {}
        for entry in journal.entries:
            name, regions = str(entry.get("tensor")), entry.get("regions")
            if name not in self.plan.sources or not isinstance(regions, dict):
                continue
            boxes = self._boxes(name)
            stored = {array: _parse(listed) for array, listed in regions.items()}
            if {array: set(found) for array, found in stored.items()} != {
                array: set(found) for array, found in boxes.items()
            }:
                continue
            if all(writer.holds(array, found) for array, found in stored.items()):
                done[name] = str(entry.get("checksum"))
                progress.advance(self.plan.sources[name].spec.nbytes, name)
        return done

    def _boxes(self, name: str) -> dict[str, list[Box]]:
        """array → the boxes that a source tensor is written to."""
        source = self.plan.sources[name]
        boxes: dict[str, list[Box]] = {}
        for ranges in blocks(source.region, source.steps):
            for copy in source.copies:
                if copy.source.meets(ranges):
                    boxes.setdefault(copy.target.tensor, []).append(copy.target.box(ranges))
        return boxes


def _parse(listed: Any) -> dict[Box, str]:
    """Regions as the journal lists them; an empty dict where they are not regions."""
    try:
        return {
            tuple((int(start), int(length)) for start, length in box): str(checksum)
            for box, checksum in listed
        }
    except (TypeError, ValueError):
        return {}
