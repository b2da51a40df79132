"""Reads safetensors checkpoints by region: one file, or shards with an index.

Files here are read with pread, those in object stores by ranges of bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_convert.arrays.buffers import ThreadBuffer
from gemma_convert.arrays.dtypes import numpy_dtype
from gemma_convert.arrays.values import bits
from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import parse_json, read_object
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.mapping.region import Box, contiguous, runs, slices
from gemma_convert.model.huggingface_files import ADAPTER, INDEX, SINGLE
from gemma_convert.stores.open_files import OpenFiles
from gemma_convert.stores.remote.temporary import temporary_bytes
from gemma_convert.stores.safetensors.header import StoredTensor, parse_header, read_header
from gemma_convert.stores.safetensors.naming import Naming, find_naming, renamed
from gemma_convert.stores.tensor_folder import PIECE_BYTES, Shard, TensorFolder

MAX_INDEX_BYTES = 16 << 20

SHORT_ROW_BYTES = 8 << 10
"""Of shorter rows whole ones are read: a call of the system for a part of each costs more."""

WINDOW_BYTES = 4 << 20
"""Of whole rows that are read at once."""

FETCHED_BYTES = 2 << 30
"""Of tensors in object stores that are kept in temporary files."""


def named_shards(shards: Sequence[Shard], naming: Naming) -> tuple[Shard, ...]:
    """The shards with their tensors under the names that the tables have; headers stay verbatim."""
    if naming.plain:
        return tuple(shards)
    return tuple(replace(shard, tensors=renamed(shard.tensors, naming)) for shard in shards)


class SafetensorsFolder(TensorFolder):
    """An open safetensors checkpoint: one file, or shards with an index; or just the named `files`.

    `tensors` is in file order, of a whole checkpoint under the names that the tables have
    (`stores.naming`). Names in an index must be plain file names; where links may lead is asked
    before (`stores.confined`).
    """

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._files = OpenFiles(folder)
        self._lock = threading.Lock()
        self._fetched: dict[str, NDArray[np.uint8]] = {}
        self._buffer = ThreadBuffer()
        try:
            weight_map, whole = None, files is None
            if files is None:
                files, weight_map = _weight_files(folder)
            shards = tuple(self._open(file) for file in files)
            self.opened = {shard.file: (shard.size, shard.modified) for shard in shards}
            found = _collect(shards, weight_map, folder)
            self.naming = find_naming(found, folder) if whole else Naming({}, ())
            if not self.naming.plain:
                _refuse_mlx(shards, folder)
            self.shards = named_shards(shards, self.naming)
            self.tensors = {tensor.name: tensor for tensor in _all_tensors(self.shards)}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._fetched.clear()

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        what = f"tensor {tensor.name}"
        self._files.read_into(tensor.file, tensor.start + offset, buffer, what)

    def read_box(self, tensor: StoredTensor, box: Box, values: NDArray[Any]) -> None:
        """Fills `values` [lengths of `box`], which are contiguous, with a part of the tensor.

        Nothing is read through a map, which would end the process where a file becomes shorter.
        Raises SourceError there, and where the file cannot be read.
        """
        if not values.size:
            return
        shape, itemsize = tensor.spec.shape, values.itemsize
        flat = values.reshape(-1).view(np.uint8)
        run, places = runs(box, shape)
        if contiguous(box, shape):
            self.read_into(tensor, next(places) * itemsize, flat.data)
        elif tensor.file in self._files.remote:
            np.copyto(bits(values), bits(self._fetch(tensor)[slices(box)]))
        elif prod(shape[1:]) * itemsize < SHORT_ROW_BYTES:
            self._read_rows(tensor, box, values)
        else:
            starts = (tensor.start + place * itemsize for place in places)
            what = f"tensor {tensor.name}"
            self._files.read_pieces(tensor.file, starts, run * itemsize, flat.data, what)

    def _read_rows(self, tensor: StoredTensor, box: Box, values: NDArray[Any]) -> None:
        """Reads whole rows, and takes what lies in `box`."""
        (first, count), *inner = box
        row = prod(tensor.spec.shape[1:]) * values.itemsize
        step = max(1, WINDOW_BYTES // row)
        within = slices(tuple(inner))
        for start in range(0, count, step):
            number = min(step, count - start)
            rows = self._buffer.array((number, *tensor.spec.shape[1:]), values.dtype)
            data = rows.reshape(-1).view(np.uint8).data
            self.read_into(tensor, (first + start) * row, data)
            np.copyto(bits(values[start : start + number]), bits(rows[(slice(None), *within)]))

    def _fetch(self, tensor: StoredTensor) -> NDArray[Any]:
        """A tensor of an object store, in a temporary file.

        It is kept until others that were fetched since fill `FETCHED_BYTES`.
        """
        folder = self._files.remote[tensor.file].mirror.folder
        with self._lock:
            data = self._fetched.pop(tensor.name, None)
            if data is None:
                data = temporary_bytes(tensor.spec.nbytes, folder)
                for start in range(0, data.size, PIECE_BYTES):
                    self.read_into(tensor, start, data[start : start + PIECE_BYTES].data)
            self._fetched[tensor.name] = data
            while len(self._fetched) > 1 and self._fetched_bytes > FETCHED_BYTES:
                self._fetched.pop(next(iter(self._fetched)))
        return data.view(numpy_dtype(tensor.spec.dtype)).reshape(tensor.spec.shape)

    @property
    def _fetched_bytes(self) -> int:
        return sum(data.size for data in self._fetched.values())

    def _open(self, file: str) -> Shard:
        path, files = self.folder / file, self._files
        size, modified = files.open(file)
        header = read_header(lambda start, count: files.read(file, start, count), size, path)
        return Shard(file, header, parse_header(header, size, file, path), size, modified)


def _weight_files(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The shards of a checkpoint, and the index's weight map where there is one."""
    if not folder.is_dir():
        raise SourceError(
            "There is no such folder." if not folder.exists() else "The source is not a folder.",
            where=folder,
            do="give the folder of a Hugging Face checkpoint",
        )
    refuse_unfinished(folder)
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [SINGLE], None
    index = folder / INDEX
    if index.exists() or index.is_symlink():
        weight_map = read_index(index)
        return sorted(set(weight_map.values())), weight_map
    if (folder / ADAPTER).is_file():
        return [ADAPTER], None
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    raise SourceError(
        "The folder holds no safetensors checkpoint.",
        where=folder,
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(others[:3]) or None,
        do="give a folder with safetensors weights; pickled weights are never read",
    )


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index, whose files lie beside it; SourceError where it is malformed."""
    try:
        index = read_object(path, "The index", MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise SourceError("The index is a link to nothing.", where=path) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("The index has no weight_map.", where=path)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not plain_name(file):
            raise SourceError(
                "The index names a file that is not a plain file name.",
                where=f"{path}, tensor {name!r}",
                found=short(repr(file) if isinstance(file, str) else file),
                do="an index may only name shards in its own folder",
            )
    return weight_map


def plain_name(file: str) -> bool:
    """Whether a name is that of a shard in its own folder: no path, nothing unprintable."""
    return (
        file.endswith(".safetensors")
        and not set(file) & {"/", "\\", "\0"}
        and file == Path(file).name
        and file.isprintable()
    )


def _collect(
    shards: tuple[Shard, ...], weight_map: Mapping[str, str] | None, folder: Path
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for tensor in _all_tensors(shards):
        if tensor.name in tensors:
            raise SourceError(
                "A tensor stands in two shards.",
                where=folder,
                found=f"{tensor.name} in {tensors[tensor.name].file} and {tensor.file}",
            )
        tensors[tensor.name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise SourceError(
                "A shard does not hold a tensor that the index places there.",
                where=folder / file,
                expected=name,
                do="download the checkpoint again; index and shards do not belong together",
            )
    return tensors


def _refuse_mlx(shards: Sequence[Shard], folder: Path) -> None:
    """Raises SourceError for MLX's files, whose names are like those of older checkpoints.

    MLX lays out some tensors in its own way, in shapes that may be the same; its files say
    `"format": "mlx"` in their metadata.
    """
    for shard in shards:
        metadata = parse_json(shard.header[8:]).get("__metadata__") or {}
        if metadata.get("format") == "mlx":
            raise SourceError(
                "This is an export of MLX, which names and lays out tensors in its own way.",
                where=folder / shard.file,
                found='"format": "mlx" in the metadata',
                do="convert the original checkpoint",
            )


def _all_tensors(shards: tuple[Shard, ...]) -> Iterator[StoredTensor]:
    for shard in shards:
        yield from shard.tensors
