"""Reads safetensors checkpoints by region with pread; nothing is mapped, nothing is unpickled.

Format: https://huggingface.co/docs/safetensors, section Format: eight bytes little-endian length,
a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gemma_convert.dtypes import SAFETENSORS_NAMES, SAFETENSORS_SPELLINGS, TensorSpec, numpy_dtype
from gemma_convert.errors import SourceError
from gemma_convert.stores.journal import NAME as JOURNAL
from gemma_convert.stores.staging import LOCK

if TYPE_CHECKING:
    from gemma_convert.mapping.plan import SourceTensor
    from gemma_convert.mapping.region import Ranges

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

UNFINISHED = (LOCK, JOURNAL)
"""Files that a folder holds only while it is being built."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: its spec, and where its bytes begin in the file."""

    name: str
    spec: TensorSpec
    file: str
    start: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header verbatim, its tensors in the order of their bytes."""

    file: str
    header: bytes
    """The first bytes of the file, length word included, up to the data."""
    tensors: tuple[StoredTensor, ...]
    size: int
    modified_ns: int


class SafetensorsFolder:
    """An open safetensors checkpoint: one file, or shards with an index; or just the named `files`.

    Use as a context manager. `tensors` is in file order. Symbolic links to shards are followed, as
    a snapshot in the hub's cache needs; names in an index must be plain file names.
    """

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        try:
            weight_map = None
            if files is None:
                files, weight_map = _weight_files(folder)
            self.shards = tuple(self._open(file) for file in files)
            self.tensors = _collect(self.shards, weight_map, folder)
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

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `offset` on.

        Raises SourceError where the file has become shorter or cannot be read.
        """
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

    def mapped(self, tensor: StoredTensor) -> NDArray[Any]:
        """The tensor as a read-only view of its file, for files that nobody else changes."""
        if not tensor.spec.size:
            return np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
        data = np.memmap(self.folder / tensor.file, np.uint8, "r", tensor.start, tensor.spec.nbytes)
        return np.asarray(data).view(numpy_dtype(tensor.spec.dtype)).reshape(tensor.spec.shape)

    def check_unchanged(self) -> None:
        """Raises SourceError where a shard is not what it was when it was opened."""
        for shard in self.shards:
            now = os.fstat(self._descriptors[shard.file])
            if (now.st_size, now.st_mtime_ns) != (shard.size, shard.modified_ns):
                raise SourceError(
                    "The source changed while it was read.",
                    where=self.folder / shard.file,
                    expected=f"{shard.size} bytes, untouched",
                    found=f"{now.st_size} bytes",
                    do="leave the source alone until the conversion ends, then start again",
                )

    def _open(self, file: str) -> Shard:
        path = self.folder / file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise SourceError(
                "A shard is missing.",
                where=path,
                do="download the whole checkpoint; the index names this file",
            ) from None
        except OSError as error:
            raise SourceError(
                "A shard cannot be opened.", where=path, found=error.strerror
            ) from None
        self._descriptors[file] = descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("A shard is not a file.", where=path)
        header = _read_header(descriptor, status.st_size, path)
        tensors = parse_header(header, status.st_size, file, path)
        return Shard(file, header, tensors, status.st_size, status.st_mtime_ns)


def read_shard_specs(path: Path) -> dict[str, TensorSpec]:
    """Name → spec of the tensors in one safetensors file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        tensors = parse_header(_read_header(descriptor, size, path), size, path.name, path)
    finally:
        os.close(descriptor)
    return {tensor.name: tensor.spec for tensor in tensors}


def safetensors_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """The length word and header of a file whose tensors lie in the order of `specs`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": SAFETENSORS_SPELLINGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [place, place + spec.nbytes],
        }
        place += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a new file with small arrays, as the safetensors library orders them.

    That is by size of the dtype, largest first, then by name; the bytes equal the library's.
    """
    ordered = dict(sorted(arrays.items(), key=lambda entry: (-entry[1].itemsize, entry[0])))
    specs = {name: TensorSpec(array.dtype.name, array.shape) for name, array in ordered.items()}
    with path.open("xb") as file:
        file.write(safetensors_header(specs))
        for array in ordered.values():
            file.write(array.tobytes())


def _weight_files(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The shards of a checkpoint, and the index's weight map where there is one."""
    if not folder.is_dir():
        raise SourceError(
            "There is no such folder." if not folder.exists() else "The source is not a folder.",
            where=folder,
            do="give the folder of a Hugging Face checkpoint",
        )
    if any((folder / name).exists() for name in UNFINISHED):
        raise SourceError(
            "This is an unfinished conversion.",
            where=folder,
            do="run the conversion again with --resume",
        )
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [SINGLE], None
    index = folder / INDEX
    if index.exists() or index.is_symlink():
        weight_map = _read_index(index)
        return sorted(set(weight_map.values())), weight_map
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


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise SourceError("The index is too large to be an index.", where=path)
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError("The index cannot be read.", where=path, found=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise SourceError("The index is not valid JSON.", where=path, found=error) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("The index has no weight_map.", where=path)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise SourceError(
                "The index names a file that is not a plain file name.",
                where=f"{path}, tensor {name!r}",
                found=repr(file),
                do="an index may only name shards in its own folder",
            )
    return weight_map


def _plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and not set(file) & {"/", "\\", "\0"}
        and file == Path(file).name
        and file.isprintable()
    )


def _read_header(descriptor: int, size: int, path: Path) -> bytes:
    """The length word and the JSON header of one file, verbatim."""
    word = os.pread(descriptor, 8, 0)
    length = int.from_bytes(word, "little")
    if len(word) < 8 or length > size - 8:
        raise SourceError(
            "A shard is truncated: its header does not fit into the file.",
            where=path,
            expected=f"a header of {length} bytes" if len(word) == 8 else "at least 8 bytes",
            found=f"{size} bytes",
            do="download the file again",
        )
    if length > MAX_HEADER_BYTES:
        raise SourceError("A header is absurdly long.", where=path, found=f"{length} bytes")
    return word + os.pread(descriptor, length, 8)


def parse_header(header: bytes, size: int, file: str, path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a file of `size` bytes, in the order of their bytes, given its header.

    They must fill the file without gaps. Raises SourceError, naming `path`, where they do not.
    """
    entries = _load_header(header, path)
    tensors: list[tuple[int, int, StoredTensor]] = []
    data = size - len(header)
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        spec, begin, end = _parse_entry(name, entry, path)
        if end > data:
            raise SourceError(
                "A shard is truncated: a tensor lies beyond the end of the file.",
                where=f"{path}, tensor {name}",
                expected=f"{len(header) + end} bytes",
                found=f"{size} bytes",
                do="download the file again",
            )
        tensors.append((begin, end, StoredTensor(name, spec, file, len(header) + begin)))
    tensors.sort(key=lambda entry: entry[:2])
    place = 0
    for begin, end, tensor in tensors:
        if begin != place:
            raise SourceError(
                "The tensors of a shard overlap or leave a gap.",
                where=f"{path}, tensor {tensor.name}",
                expected=f"data from byte {place}",
                found=f"data from byte {begin}",
            )
        place = end
    if place != data:
        raise SourceError(
            "A shard has bytes after its last tensor.", where=path, expected=place, found=data
        )
    return tuple(tensor for _, _, tensor in tensors)


def _load_header(header: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key stands twice")
        return values

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        entries = json.loads(
            header[8:].decode("utf-8"), object_pairs_hook=once, parse_constant=refuse
        )
    except (ValueError, RecursionError) as error:
        raise SourceError(
            "The header of a shard is not valid JSON.", where=path, found=error
        ) from None
    if not isinstance(entries, dict):
        raise SourceError("The header of a shard is not a JSON object.", where=path)
    return entries


def _parse_entry(name: str, entry: object, path: Path) -> tuple[TensorSpec, int, int]:
    where = f"{path}, tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SourceError("A header entry is not dtype, shape and data_offsets.", where=where)
    dtype = SAFETENSORS_NAMES.get(str(entry["dtype"]))
    if dtype is None:
        raise SourceError("A tensor has an unknown dtype.", where=where, found=entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise SourceError(
            "A header entry is malformed.", where=where, found=f"{shape} at {offsets}"[:200]
        )
    spec = TensorSpec(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise SourceError(
            "A tensor has not the bytes that its shape needs.",
            where=where,
            expected=f"{spec.nbytes} bytes for {list(shape)} {dtype}",
            found=f"{end - begin} bytes",
        )
    return spec, begin, end


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
        for value in values
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


def _all_tensors(shards: tuple[Shard, ...]) -> Iterator[StoredTensor]:
    for shard in shards:
        yield from shard.tensors
