"""Reads safetensors checkpoints by region: one file, or shards with an index.

Files here are read with pread, those in object stores by ranges of bytes.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import parse_json, read_object
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.stores.remote.mirror import RemoteFile, remote_file
from gemma_convert.stores.safetensors.header import StoredTensor, parse_header, read_header
from gemma_convert.stores.safetensors.naming import Naming, find_naming, renamed

if TYPE_CHECKING:
    from gemma_convert.mapping.plan import SourceTensor
    from gemma_convert.mapping.region import Ranges

from gemma_convert.model.huggingface_files import ADAPTER, INDEX, SINGLE

MAX_INDEX_BYTES = 16 << 20

PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header verbatim, its tensors in the order of their bytes."""

    file: str
    header: bytes
    """The first bytes of the file, length word included, up to the data."""
    tensors: tuple[StoredTensor, ...]
    size: int
    modified: int | str
    """Nanoseconds of a file here, the store's own tag of an object."""


def named_shards(shards: Sequence[Shard], naming: Naming) -> tuple[Shard, ...]:
    """The shards with their tensors under the names that the tables have; headers stay verbatim."""
    if naming.plain:
        return tuple(shards)
    return tuple(replace(shard, tensors=renamed(shard.tensors, naming)) for shard in shards)


class SafetensorsFolder:
    """An open safetensors checkpoint: one file, or shards with an index; or just the named `files`.

    Use as a context manager. `tensors` is in file order, of a whole checkpoint under the names that
    the tables have (`stores.naming`). Names in an index must be plain file names; where links may
    lead is asked before (`stores.confined`).
    """

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._remote: dict[str, RemoteFile] = {}
        self._fetched: dict[str, NDArray[Any]] = {}
        try:
            weight_map, whole = None, files is None
            if files is None:
                files, weight_map = _weight_files(folder)
            shards = tuple(self._open(file) for file in files)
            found = _collect(shards, weight_map, folder)
            self.naming = find_naming(found, folder) if whole else Naming({}, ())
            if not self.naming.plain:
                _refuse_mlx(shards, folder)
            self.shards = named_shards(shards, self.naming)
            self.tensors = {tensor.name: tensor for tensor in _all_tensors(self.shards)}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._fetched.clear()

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `offset` on.

        Raises SourceError where the file has become shorter or cannot be read.
        """
        if tensor.file in self._remote:
            self._remote[tensor.file].read_into(tensor.start + offset, buffer)
            return
        descriptor, done = self._descriptors[tensor.file], 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], tensor.start + offset + done)
            except OSError as error:
                raise SourceError(
                    "The source cannot be read.",
                    where=f"{self.folder / tensor.file}, tensor {tensor.name}",
                    found=error.strerror,
                ) from None
            if not count:
                raise SourceError(
                    "The source became shorter while it was read.",
                    where=f"{self.folder / tensor.file}, tensor {tensor.name}",
                    do="leave the source alone until the conversion ends, then start again",
                )
            done += count

    def read_block(
        self, source: SourceTensor, ranges: Ranges, offset: int, data: NDArray[Any]
    ) -> None:
        """Fills `data` with a tensor's bytes from `offset` on: a block lies in one piece."""
        del ranges
        self.read_into(self.tensors[source.region.tensor], offset, data.data)

    def in_order(self, name: str) -> bool:
        """Every tensor is read in the order of its bytes."""
        return name in self.tensors

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces that are valid until the next one is asked for."""
        tensor = self.tensors[name]
        buffer = memoryview(bytearray(min(PIECE_BYTES, tensor.spec.nbytes)))
        for offset in range(0, tensor.spec.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, tensor.spec.nbytes - offset)]
            self.read_into(tensor, offset, piece)
            yield piece

    def checksum(self, name: str) -> str:
        """xxh3_128 of a whole tensor."""
        digest = xxhash.xxh3_128()
        for piece in self.pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    def mapped(self, tensor: StoredTensor) -> NDArray[Any]:
        """The tensor as a read-only view of its file, for files that nobody else changes.

        One in an object store is fetched, once, into a temporary file.
        """
        if not tensor.spec.size:
            return np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
        if tensor.file in self._remote:
            data = self._fetch(tensor)
        else:
            path = self.folder / tensor.file
            data = np.memmap(path, np.uint8, "r", tensor.start, tensor.spec.nbytes)
        return np.asarray(data).view(numpy_dtype(tensor.spec.dtype)).reshape(tensor.spec.shape)

    def _fetch(self, tensor: StoredTensor) -> NDArray[Any]:
        with self._lock:
            if tensor.name not in self._fetched:
                with tempfile.TemporaryFile(dir=self._remote[tensor.file].mirror.folder) as file:
                    file.truncate(tensor.spec.nbytes)
                    data = np.memmap(file, np.uint8, "r+", 0, tensor.spec.nbytes)
                for start in range(0, data.size, PIECE_BYTES):
                    self.read_into(tensor, start, data[start : start + PIECE_BYTES].data)
                self._fetched[tensor.name] = data
            return self._fetched[tensor.name]

    def check_unchanged(self) -> None:
        """Raises SourceError where a shard is not what it was when it was opened."""
        for shard in self.shards:
            size, modified = self._now(shard.file)
            if (size, modified) != (shard.size, shard.modified):
                raise SourceError(
                    "The source changed while it was read.",
                    where=self.folder / shard.file,
                    expected=f"{shard.size} bytes, untouched",
                    found=f"{size} bytes",
                    do="leave the source alone until the conversion ends, then start again",
                )

    def _now(self, file: str) -> tuple[int, int | str]:
        """Size and time, or tag, of a shard as it is now."""
        if file in self._remote:
            entry = self._remote[file].now()
            return entry.size, entry.tag
        status = os.fstat(self._descriptors[file])
        return status.st_size, status.st_mtime_ns

    def _open(self, file: str) -> Shard:
        path = self.folder / file
        remote = remote_file(path)
        if remote is None:
            self._descriptors[file] = _open_file(path)
            size, modified = self._now(file)
        else:
            self._remote[file] = remote
            size, modified = remote.entry.size, remote.entry.tag
        header = read_header(lambda start, count: self._read(file, start, count), size, path)
        return Shard(file, header, parse_header(header, size, file, path), size, modified)

    def _read(self, file: str, start: int, count: int) -> bytes:
        if file in self._remote:
            return self._remote[file].read(start, count)
        try:
            return os.pread(self._descriptors[file], count, start)
        except OSError as error:
            raise SourceError(
                "A shard cannot be read.", where=self.folder / file, found=error.strerror
            ) from None


def _open_file(path: Path) -> int:
    """A descriptor of a regular file; SourceError where it is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SourceError(
            "A shard is missing.",
            where=path,
            do="download the whole checkpoint; the index names this file",
        ) from None
    except OSError as error:
        raise SourceError("A shard cannot be opened.", where=path, found=error.strerror) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError("A shard is not a file.", where=path)
    return descriptor


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
