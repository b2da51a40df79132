"""What one of several processes has done, left in the staged folder for the one that finishes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.original import read_exceptions
from gemma_convert.engine.casting import Losses, listed_values
from gemma_convert.mapping.region import Box

Regions = dict[str, dict[Box, str]]
"""array → the regions written, each with its checksum."""

_NAME = ".gemma-convert.part-{}"
_RESULT = "result.json"


@dataclass
class TransferResult:
    """Checksums (xxh3_128) of the source tensors, and the losses of those that have any."""

    checksums: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)

    @property
    def exceptions(self) -> int:
        """How many single values are listed that do not come back."""
        return sum(len(places) for losses in self.losses.values() for places in losses.places)


def leave_part(folder: Path, index: int, result: TransferResult, regions: Regions) -> None:
    """Writes what process `index` has transferred."""
    part = folder / _NAME.format(index)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    listed = listed_values(result.losses)
    if listed:
        sidecar.write_exceptions(part, listed)
    values = {
        "checksums": result.checksums,
        "losses": {name: [one.count, one.whole] for name, one in result.losses.items()},
        "regions": {name: list(boxes.items()) for name, boxes in regions.items()},
    }
    (part / _RESULT).write_text(json.dumps(values), encoding="utf-8")


def take_part(
    folder: Path, index: int, specs: Mapping[str, TensorSpec]
) -> tuple[TransferResult, Regions]:
    """What process `index` left, taken out of the folder."""
    part = folder / _NAME.format(index)
    values = json.loads((part / _RESULT).read_text(encoding="utf-8"))
    listed = read_exceptions(part, specs)
    losses = {
        name: Losses(
            count,
            [listed[name][0]] if name in listed else [],
            [listed[name][1]] if name in listed else [],
            whole,
        )
        for name, (count, whole) in values["losses"].items()
    }
    regions = {
        name: {tuple((start, length) for start, length in box): digest for box, digest in boxes}
        for name, boxes in values["regions"].items()
    }
    shutil.rmtree(part)
    return TransferResult(values["checksums"], losses), regions
