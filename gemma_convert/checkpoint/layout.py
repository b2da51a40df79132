"""What a native layout is beside its mapping table: where it lies on disk, and who loads it.

`OrbaxLayout` and `SafetensorsLayout` have what layouts of one kind share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.native_folder import NativeFolder
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box
from gemma_convert.stores.orbax.writer import OrbaxFormat


class NativeStore(Protocol):
    """A native checkpoint that is being written, all of its arrays declared."""

    regions: dict[str, dict[Box, str]]
    """array → the regions written, each with its checksum."""

    def write(self, name: str, box: Box, values: Array) -> Any:
        """A future of the commit of `values` into `box`; `values` must not change before it."""

    def holds(self, name: str, regions: Mapping[Box, str]) -> bool:
        """Whether the regions of an array have these checksums; if so they count as written."""

    def complete(self, started_ns: int, parts: int = 1) -> None:
        """Writes what makes the arrays a checkpoint, when all `parts` of them are written."""

    def close(self) -> None:
        """Lets go of open files, whether it was completed or not."""

    def value_file(self, path: Path) -> ValuesFrom | None:
        """Where values begin of which the regions' checksums say all; None for any other file."""

    def array_metadata(self) -> dict[str, str]:
        """Array → sha256 of what the store says of it, where that has no file of its own."""


class Layout(Protocol):
    """One native layout."""

    @property
    def name(self) -> str:
        """The name that `--format` and the mapping table have for it."""

    @property
    def framework(self) -> str:
        """What loads it, for people."""

    @property
    def divisible(self) -> bool:
        """Whether several processes may write one checkpoint."""

    @property
    def streams(self) -> bool:
        """Whether arrays go straight into an object store, without local space for them."""

    def find(self, folder: NativeFolder) -> Path | None:
        """Where a checkpoint of this layout lies in `folder`; None where there is none."""

    def open(self, where: Path) -> NativeSource:
        """The checkpoint that `find` found; raises SourceError where it cannot be read."""

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> NativeStore:
        """An empty checkpoint in `folder`, or the one that an interrupted run left there.

        `part` is the number of the process that writes; 0 is the one that completes it.
        """

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        """Setting → value: how the framework is told to load what was written to `target`."""

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        """Name → text of files beside the arrays that the framework takes as its settings."""

    def check_metadata(self, folder: Path, plan: Plan) -> dict[str, str]:
        """Where the files beside the arrays are not what `plan` asks for: place → how."""
