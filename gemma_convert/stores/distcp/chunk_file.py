"""One chunk in a `.distcp` file: a zip file of torch.save that holds a tensor's values as they are.

Format: `torch/serialization.py` of PyTorch 2.13: `data.pkl` says the storage, its shape and its
strides, `data/<key>` is the storage, stored and not compressed, `byteorder` its order of bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from math import prod
from typing import Any

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import SourceError, short
from gemma_convert.stores.distcp.metadata import Chunk
from gemma_convert.stores.distcp.plain_pickle import Made, Named, Persistent, read_plain
from gemma_convert.stores.open_files import OpenFiles

MOST_DIRECTORY_BYTES = 1 << 20
"""Of a zip file's directory and of a pickle that says one tensor; both take some hundred bytes."""

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_ALLOWED = {_REBUILD, "collections.OrderedDict", *(f"torch.{name}" for name in _STORAGES)}
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def values_start(files: OpenFiles, chunk: Chunk, spec: TensorSpec, name: str) -> int:
    """The byte of the chunk's file at which its values begin, in the order of its sizes.

    Raises SourceError where the chunk does not hold what the metadata say of the tensor `name`.
    """
    where = f"{files.folder / chunk.file}, tensor {name} from {list(chunk.offsets)} on"
    try:
        with zipfile.ZipFile(_Window(files, chunk)) as archive:
            key, offset = _storage(_small(archive, "data.pkl"), chunk, spec, where)
            if _small(archive, "byteorder", b"little").strip() != b"little":
                raise _BrokenError("values in another order of bytes")
            entry = _entry(archive, f"data/{key}")
    except (_BrokenError, zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _broken(where, error) from None
    except (struct.error, KeyError, IndexError, RuntimeError, EOFError, OverflowError) as error:
        raise _broken(where, error) from None
    head = files.read(chunk.file, chunk.start + entry.header_offset, _LOCAL_HEADER.size)
    if len(head) < _LOCAL_HEADER.size or head[:4] != b"PK\x03\x04":
        raise _broken(where, "no header of a stored file")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
    start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    needed = (offset + prod(chunk.sizes)) * spec.itemsize
    if entry.file_size < needed or start + entry.file_size > chunk.length:
        raise _broken(where, f"{entry.file_size} bytes where {needed} are needed")
    return int(chunk.start + start + offset * spec.itemsize)


class _BrokenError(Exception):
    """A chunk that is not what torch.save writes."""


def _broken(where: str, found: object) -> SourceError:
    return SourceError(
        "A chunk of the checkpoint is broken, or was written in another format.",
        where=where,
        expected="a tensor as torch.save writes it, contiguous",
        found=short(str(found)),
        do="save the checkpoint again",
    )


def _storage(pickled: bytes, chunk: Chunk, spec: TensorSpec, where: str) -> tuple[str, int]:
    """The key of the storage of a chunk, and the element of it that is its first."""
    value = read_plain(pickled, _ALLOWED, where)
    if not isinstance(value, Made) or str(value.kind) != _REBUILD or len(value.arguments) < 4:
        raise _BrokenError("what is no tensor")
    storage, offset, sizes, strides = value.arguments[:4]
    kind, key = _storage_key(storage)
    if _STORAGES[kind] != spec.dtype or sizes != chunk.sizes:
        raise _BrokenError(f"{_STORAGES[kind]} {short(sizes)}")
    if type(offset) is not int or offset < 0:
        raise _BrokenError(f"the offset {short(offset)}")
    if prod(chunk.sizes) and not _contiguous(sizes, strides):
        raise _BrokenError(f"the strides {short(strides)}")
    return key, offset


def _storage_key(storage: Any) -> tuple[str, str]:
    """The kind of a storage, and its key among those of the file."""
    key = storage.key if isinstance(storage, Persistent) else None
    if not isinstance(key, tuple) or len(key) < 3 or key[0] != "storage":
        raise _BrokenError("what has no storage")
    kind, name = key[1:3]
    if not isinstance(kind, Named) or kind.name not in _STORAGES or not isinstance(name, str):
        raise _BrokenError("a storage of another kind")
    return kind.name, name


def _contiguous(sizes: tuple[int, ...], strides: object) -> bool:
    """Whether elements lie in the order of the sizes; the stride of one element says nothing."""
    if not isinstance(strides, tuple) or len(strides) != len(sizes):
        return False
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The one file `name` in the archive's folder, which is neither compressed nor encrypted."""
    found = [entry for entry in archive.infolist() if entry.filename.partition("/")[2] == name]
    if len(found) != 1:
        raise _BrokenError(f"{len(found)} files {name}")
    (entry,) = found
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _BrokenError(f"{name}, compressed or encrypted")
    if entry.header_offset < 0:
        raise _BrokenError(f"{name} before the beginning")
    return entry


def _small(archive: zipfile.ZipFile, name: str, default: bytes | None = None) -> bytes:
    """The contents of a small file; `default` where there is none."""
    if default is not None and not any(
        entry.filename.partition("/")[2] == name for entry in archive.infolist()
    ):
        return default
    entry = _entry(archive, name)
    if entry.file_size > MOST_DIRECTORY_BYTES:
        raise _BrokenError(f"{entry.file_size} bytes of {name}")
    return archive.read(entry)


class _Window(io.RawIOBase):
    """A chunk as a file of its own, of which only little is read at once."""

    def __init__(self, files: OpenFiles, chunk: Chunk) -> None:
        super().__init__()
        self._files, self._chunk, self._place = files, chunk, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._place, self._chunk.length)[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._place = base + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._chunk.length - self._place, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > MOST_DIRECTORY_BYTES:
            raise _BrokenError(f"a directory of {count} bytes")
        start = self._chunk.start + self._place
        data = self._files.read(self._chunk.file, start, count) if count else b""
        self._place += len(data)
        return data
