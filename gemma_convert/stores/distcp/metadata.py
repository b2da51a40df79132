"""`.metadata` of torch's distributed checkpoint: which tensors there are, and where they lie.

Structure: `torch/distributed/checkpoint/metadata.py` and `filesystem.py` of PyTorch 2.1 to 2.13, as
`FileSystemWriter` pickles it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from gemma_convert.arrays.dtypes import SAFETENSORS_SPELLINGS, TensorSpec
from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import read_regular
from gemma_convert.stores.distcp.plain_pickle import Made, Named, read_plain

FILE = ".metadata"
SUFFIX = ".distcp"

MAX_BYTES = 256 << 20
MOST_DIMENSIONS = 8
MOST_SIZE = 1 << 59

_HERE = "torch.distributed.checkpoint.metadata"
_KINDS = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
)
_DTYPES = {f"torch.{name}": name for name in SAFETENSORS_SPELLINGS}
_ALLOWED = {
    "builtins.getattr",  # how Python 3.11.0 to 3.11.3 spell a member of an enumeration
    *(f"{_HERE}.{kind}" for kind in _KINDS),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *("torch.Size", "torch.strided", "torch.serialization._get_layout"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"),
    *("pathlib._local.WindowsPath", "collections.OrderedDict"),
    *_DTYPES,
}

Shape: TypeAlias = tuple[int, ...]
Keys: TypeAlias = tuple[str, ...]
_Key: TypeAlias = tuple[str, Shape]


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, from `offsets` on: a file of torch.save within `file`, from `start`."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class ListedTensor:
    """A tensor and the chunks that it consists of; `path` are the keys of its nested state."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]
    path: Keys


@dataclass(frozen=True)
class Listing:
    """The tensors of a checkpoint by their flat names, and the names of what is no tensor."""

    tensors: Mapping[str, ListedTensor]
    others: tuple[str, ...]


def read_metadata(folder: Path) -> Listing:
    """What the `.metadata` in `folder` lists; raises SourceError where it is anything else."""
    where = folder / FILE
    try:
        data = read_regular(where, "The metadata of the checkpoint", MAX_BYTES)
    except FileNotFoundError:
        raise SourceError("The metadata of the checkpoint are missing.", where=where) from None
    try:
        return _listing(read_plain(data, _ALLOWED, where))
    except _MalformedError as error:
        raise SourceError(
            "The metadata of the checkpoint are malformed.",
            where=where,
            found=short(str(error)),
            do="save the checkpoint again, with torch.distributed.checkpoint's FileSystemWriter",
        ) from None


class _MalformedError(Exception):
    """Metadata that are not what torch writes."""


def _listing(value: Any) -> Listing:
    facts = _state(value, "Metadata")
    paths = facts.get("planner_data")
    paths = paths if isinstance(paths, dict) else {}
    stored = _stored(facts.get("storage_data"))
    tensors: dict[str, ListedTensor] = {}
    others: list[str] = []
    for name, entry in _dict(facts.get("state_dict_metadata"), "state_dict_metadata").items():
        _text(name, "the name of a tensor")
        if _is(entry, "BytesStorageMetadata"):
            others.append(name)
        else:
            spec, parts = _tensor(entry, name)
            filled = (part for part in parts if prod(part[1]))  # a process may have had no part
            chunks = tuple(_chunk(name, *part, stored) for part in filled)
            tensors[name] = ListedTensor(spec, chunks, _path(paths.get(name), name))
    return Listing(tensors, tuple(others))


def _tensor(entry: Any, name: str) -> tuple[TensorSpec, list[tuple[Shape, Shape]]]:
    """The spec of a tensor, and the offsets and sizes of its chunks, which cover it once."""
    facts = _state(entry, "TensorStorageMetadata")
    shape = _size(facts.get("size"), name)
    dtype = _dtype(facts.get("properties"), name)
    parts: list[tuple[Shape, Shape]] = []
    for chunk in _list(facts.get("chunks"), f"chunks of {name}"):
        part = _state(chunk, "ChunkStorageMetadata")
        parts.append((_size(part.get("offsets"), name), _size(part.get("sizes"), name)))
    if not _covers(shape, parts):
        raise _MalformedError(f"the chunks of {name} do not cover {list(shape)} once")
    return TensorSpec(dtype, shape), parts


def _covers(shape: Shape, parts: list[tuple[Shape, Shape]]) -> bool:
    """Whether the boxes fill the shape, each place once.

    The sum of boxes is the whole if and only if their corners, with signs, add up to its corners.
    """
    if any(len(one) != len(shape) for part in parts for one in part) or not parts:
        return False
    whole = ((0,) * len(shape), shape)
    corners: Counter[Shape] = Counter()
    for (offsets, sizes), sign in (*((part, 1) for part in parts), (whole, -1)):
        if not prod(sizes):
            continue
        for ends in product((0, 1), repeat=len(shape)):
            corner = tuple(o + s * e for o, s, e in zip(offsets, sizes, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _chunk(
    name: str,
    offsets: Shape,
    sizes: Shape,
    stored: Mapping[_Key, tuple[str, int, int]],
) -> Chunk:
    place = stored.get((name, offsets))
    if place is None:
        raise _MalformedError(f"nothing says where {name} from {list(offsets)} on is stored")
    return Chunk(offsets, sizes, *place)


def _stored(value: Any) -> dict[_Key, tuple[str, int, int]]:
    """(name, offsets) of a chunk → file, start and length of what holds it."""
    found = {}
    for key, place in _dict(value, "storage_data").items():
        index, info = _state(key, "MetadataIndex"), _state(place, "_StorageInfo")
        name = _text(index.get("fqn"), "the name of a chunk")
        if index.get("offset") is None:
            continue  # what is no tensor
        if info.get("transform_descriptors"):
            raise _MalformedError(f"{name} is stored compressed, or otherwise transformed")
        file = _text(info.get("relative_path"), f"the file of {name}")
        if PurePath(file).name != file or "\\" in file or not file.endswith(SUFFIX):
            raise _MalformedError(f"{name} is to lie in {file!r}, which is no file beside this one")
        start, length = (_number(info.get(fact), name) for fact in ("offset", "length"))
        found[name, _size(index.get("offset"), name)] = file, start, length
    return found


def _path(value: Any, name: str) -> Keys:
    """The keys that a flat name stands for; the name itself where nothing says them."""
    if isinstance(value, tuple) and value and all(isinstance(key, str | int) for key in value):
        return tuple(map(str, value))
    return (name,)


def _dtype(properties: Any, name: str) -> str:
    if not _is(properties, "TensorProperties") or not isinstance(properties.state, tuple):
        raise _MalformedError(f"the properties of {name}")
    found = properties.state[0] if properties.state else None
    if not isinstance(found, Named) or str(found) not in _DTYPES:
        raise _MalformedError(f"the dtype of {name}: {found}")
    return _DTYPES[str(found)]


def _size(value: Any, name: str) -> Shape:
    """A torch.Size, which is made by its name with one tuple."""
    kind = getattr(value, "kind", None)
    if not isinstance(value, Made) or str(kind) != "torch.Size" or len(value.arguments) != 1:
        raise _MalformedError(f"a size or place of {name}")
    sizes = value.arguments[0]
    if not isinstance(sizes, tuple) or len(sizes) > MOST_DIMENSIONS:
        raise _MalformedError(f"a size or place of {name}")
    found = tuple(_number(size, name) for size in sizes)
    if prod(size or 1 for size in found) >= MOST_SIZE:
        raise _MalformedError(f"a size of {name}: {list(found)}")
    return found


def _number(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < MOST_SIZE:
        raise _MalformedError(f"a number of {name}: {short(value)}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _MalformedError(f"{what}: {short(value)}")
    return value


def _dict(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _MalformedError(f"{what}: {short(value)}")
    return value


def _list(value: Any, what: str) -> Iterator[Any]:
    if not isinstance(value, list):
        raise _MalformedError(f"{what}: {short(value)}")
    return iter(value)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, Made) and value.kind.name == kind


def _state(value: Any, kind: str) -> dict[Any, Any]:
    """The attributes of what would be a `kind`."""
    if not _is(value, kind):
        raise _MalformedError(f"{short(value)} in the place of {kind}")
    return _dict(value.state, kind)
