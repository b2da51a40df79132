"""Fast-LLM's own format on disk: safetensors files, and `metadata.yaml` that says what they are.

Facts: Fast-LLM 0.4.0 writes and loads it. A file is closed when it has taken 2^32 parameters; a
tensor is never split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.layout import CONVERTER
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.errors import SourceError, short
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.layouts.fast_llm.metadata import (
    METADATA,
    differences,
    fast_llm_metadata,
    read_metadata,
    write_metadata,
)
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box
from gemma_convert.stores.orbax.writer import OrbaxFormat
from gemma_convert.stores.safetensors.header import StoredTensor, library_order
from gemma_convert.stores.safetensors.reader import SafetensorsFolder, plain_name
from gemma_convert.stores.safetensors.writer import SafetensorsWriter, output_shard

FILE_PARAMETERS = 1 << 32


class FastLLM:
    name = "fast-llm"
    framework = "Fast-LLM"
    divisible = False
    streams = False

    def create(self, folder: Path, plan: Plan, form: OrbaxFormat, part: int = 0) -> FastLLMWriter:
        del form, part
        return FastLLMWriter(folder, plan)

    def settings(self, plan: Plan, target: Path) -> dict[str, str]:
        del plan
        return {
            "pretrained.path": str(target.absolute()),
            "pretrained.format": "fast_llm",
            "pretrained.model_weights": "true",
        }

    def check_metadata(self, folder: Path, plan: Plan) -> dict[str, str]:
        found = read_metadata(folder)
        expected = fast_llm_metadata(plan.architecture, {})
        if isinstance(config := found.get("config"), dict):
            config.pop("distributed", None)
        for part in (found, expected):
            part.pop("fast_llm_version", None)
            part.pop("metadata", None)
        return {f"{METADATA}: {path}": how for path, how in differences(expected, found)}


class FastLLMWriter(SafetensorsWriter):
    """The files of a checkpoint, and metadata.yaml when they are complete."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        specs = {name: target.spec for name, target in plan.targets.items()}
        self._files = {
            f"model_{number}.safetensors": library_order(group)
            for number, group in enumerate(_files(specs))
        }
        super().__init__(folder, [output_shard(file, group) for file, group in self._files.items()])

    def complete(self, started_ns: int, parts: int = 1) -> None:
        del started_ns, parts
        self.close()
        state_index = {name: file for file, group in self._files.items() for name in group}
        write_metadata(self._folder, fast_llm_metadata(self._plan.architecture, state_index))


@dataclass(frozen=True)
class FastLLMArray:
    """One tensor of a checkpoint, read by rows; nothing needs to be decoded at once."""

    reader: SafetensorsFolder
    tensor: StoredTensor

    @property
    def spec(self) -> TensorSpec:
        return self.tensor.spec

    @property
    def chunk(self) -> tuple[int, ...]:
        return (1, *self.spec.shape[1:])

    def read(self, box: Box, into: Array | None = None) -> Array:
        """The values in `box`, a new array or `into`; SourceError where they cannot be read."""
        shape = self.spec.shape
        if len(box) != len(shape) or any(
            start < 0 or start + length > size
            for (start, length), size in zip(box, shape, strict=True)
        ):
            raise SourceError(
                "A tensor has another shape than it is read with.",
                where=f"{self.reader.folder}, tensor {self.tensor.name}",
                found=list(shape),
            )
        values = into
        if values is None:
            values = np.empty([length for _, length in box], numpy_dtype(self.spec.dtype))
        rows, row_size = _rows(values), prod(shape[1:])
        start, count = box[0] if box else (0, 1)
        inner_start, inner = box[1] if len(box) > 1 else (0, 1)
        if inner == row_size:
            rows = rows.reshape(1, -1)
            count = 1
        for number in range(count):
            offset = ((start + number) * row_size + inner_start) * self.spec.itemsize
            self.reader.read_into(self.tensor, offset, rows[number].data)
        return values


def is_fast_llm(path: Path) -> bool:
    """Whether a folder holds a checkpoint in Fast-LLM's own format."""
    return (path / METADATA).is_file()


def fast_llm_source(folder: Path) -> NativeSource:
    """The checkpoint in `folder`; raises SourceError where it cannot be read."""
    refuse_unfinished(folder)
    metadata = read_metadata(folder)
    index = metadata.get("metadata", {})
    index = index.get("state_index") if isinstance(index, dict) else None
    if not isinstance(index, dict) or not index:
        raise SourceError("metadata.yaml has no state_index.", where=folder / METADATA)
    for name, file in index.items():
        if not isinstance(name, str) or not isinstance(file, str) or not plain_name(file):
            raise SourceError(
                "The state_index names a file that is not a plain file name.",
                where=f"{folder / METADATA}, tensor {short(name)}",
                found=short(file),
            )
    reader = SafetensorsFolder(folder, sorted(set(index.values())))
    astray = [
        name
        for name in {*index, *reader.tensors}
        if name not in reader.tensors or index.get(name) != reader.tensors[name].file
    ]
    if astray:
        reader.close()
        raise SourceError(
            "The files do not hold the tensors that the state_index says.",
            where=folder,
            found=f"{len(astray)} tensors, such as {min(astray)}",
        )

    def read(name: str, cache_bytes: int) -> FastLLMArray:
        del cache_bytes
        return FastLLMArray(reader, reader.tensors[name])

    return NativeSource(
        layout=FastLLM.name,
        folder=folder,
        specs=reader.specs,
        chunks={name: (1, *spec.shape[1:]) for name, spec in reader.specs.items()},
        opener=read,
        scanned=False,
        converted=CONVERTER in metadata.get("metadata", {}),
        release=reader.close,
    )


def _files(specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    group: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        group[name] = spec
        if sum(spec.size for spec in group.values()) >= FILE_PARAMETERS:
            yield group
            group = {}
    if group:
        yield group


def _rows(values: Array) -> Array:
    return values.reshape(-1).view(np.uint8).reshape(len(values) if values.ndim else 1, -1)
