"""What layouts share whose checkpoints are safetensors files: writing them and reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.layout import NativeStore
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.native_folder import NativeFolder
from gemma_convert.errors import SourceError
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.safetensors.header import StoredTensor, library_order
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.safetensors.writer import SafetensorsWriter, output_shard


class SafetensorsLayout:
    """A layout of one safetensors file, `file`, by whose name its checkpoints are known.

    The name of an array in the table is its name in the file.
    """

    name: str
    file: str
    divisible = False
    streams = False

    def find(self, folder: NativeFolder) -> Path | None:
        return folder.path if (folder.path / self.file).is_file() else None

    def open(self, where: Path) -> NativeSource:
        refuse_unfinished(where)
        return safetensors_source(self.name, SafetensorsFolder(where, [self.file]))

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> NativeStore:
        del form, part
        specs = {name: target.spec for name, target in plan.targets.items()}
        return SafetensorsStore(folder, {self.file: specs})

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        del plan, target
        return {}

    def check_metadata(self, folder: Path, plan: Plan) -> dict[str, str]:
        del folder, plan
        return {}


class SafetensorsStore(SafetensorsWriter):
    """The files of a checkpoint, written region by region.

    `files` has the arrays of each by its name; they stand in it in the order of the library.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, TensorSpec]]) -> None:
        self.folder = folder
        self.files = {file: library_order(specs) for file, specs in files.items()}
        super().__init__(folder, [output_shard(file, specs) for file, specs in self.files.items()])

    def complete(self, started_ns: int, parts: int = 1) -> None:
        """The files are complete when they are closed."""
        del started_ns, parts
        self.close()


@dataclass(frozen=True)
class SafetensorsArray:
    """One tensor of a checkpoint: any part of it can be read, and nothing is decoded."""

    reader: SafetensorsFolder
    tensor: StoredTensor

    @property
    def spec(self) -> TensorSpec:
        return self.tensor.spec

    @property
    def chunk(self) -> tuple[int, ...]:
        return (1,) * len(self.spec.shape)

    def read(self, box: Box, into: Array | None = None) -> Array:
        """The values in `box`, a new array or `into`; SourceError where they cannot be read."""
        shape = self.spec.shape
        if len(box) != len(shape) or any(
            start < 0 or start + length > size
            for (start, length), size in zip(box, shape, strict=True)
        ):
            raise SourceError(
                "A tensor has an unexpected shape.",
                where=f"{self.reader.folder}, tensor {self.tensor.name}",
                found=list(shape),
            )
        values = into
        if values is None:
            values = np.empty([length for _, length in box], numpy_dtype(self.spec.dtype))
        self.reader.read_box(self.tensor, box, values)
        return values


def safetensors_source(
    layout: str, reader: SafetensorsFolder, *, converted: bool = False
) -> NativeSource:
    """All tensors that `reader` has, under their own names; it is closed with the source.

    `converted` says that the checkpoint's own metadata has `CONVERTER` in it.
    """

    def read(name: str, cache_bytes: int) -> SafetensorsArray:
        del cache_bytes
        return SafetensorsArray(reader, reader.tensors[name])

    return NativeSource(
        layout=layout,
        folder=reader.folder,
        specs=reader.specs,
        chunks={name: (1,) * len(spec.shape) for name, spec in reader.specs.items()},
        opener=read,
        scanned=False,
        converted=converted,
        release=reader.close,
    )
