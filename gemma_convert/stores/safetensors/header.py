"""The header of a safetensors file: read strictly, and written as the library writes it.

Format: https://huggingface.co/docs/safetensors, section Format: eight bytes little-endian length,
a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gemma_convert.arrays.dtypes import SAFETENSORS_NAMES, SAFETENSORS_SPELLINGS, TensorSpec
from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import parse_json

MAX_HEADER_BYTES = 16 << 20
"""The library allows 100 MB; the largest header of a published Gemma 4 has a thirtieth of this."""

MAX_DIMENSIONS = 32
MAX_SIZE = 1 << 59
"""Elements: what numpy can say of an array, zero-size ones included."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: its spec, and where its bytes begin in the file."""

    name: str
    spec: TensorSpec
    file: str
    start: int


def library_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors as the safetensors library orders them: widest dtype first, then by name."""
    return dict(sorted(specs.items(), key=lambda entry: (-entry[1].itemsize, entry[0])))


def safetensors_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length word and header of a file whose tensors lie in the order of `specs`."""
    entries: dict[str, object] = {
        "__metadata__": dict({"format": "pt"} if metadata is None else metadata)
    }
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
    given = {name: TensorSpec(array.dtype.name, array.shape) for name, array in arrays.items()}
    specs = library_order(given)
    with path.open("xb") as file:
        file.write(safetensors_header(specs))
        for name in specs:
            file.write(arrays[name].tobytes())


def read_header(read: Callable[[int, int], bytes], size: int, path: Path) -> bytes:
    """The length word and the JSON header of one file of `size` bytes, verbatim.

    `read(start, count)` gives its bytes, fewer at its end.
    """
    word = read(0, min(8, size))
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
    return word + read(8, length)


def parse_header(header: bytes, size: int, file: str, path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a file of `size` bytes, in the order of their bytes, given its header.

    They must fill the file without gaps. Raises SourceError, naming `path`, where they do not.
    """
    entries = _load_header(header, path)
    _check_metadata(entries.get("__metadata__", {}), path)
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
    if int.from_bytes(header[:8], "little") != len(header) - 8:
        raise SourceError(
            "A header has another length than it says.",
            where=path,
            expected=f"{int.from_bytes(header[:8], 'little')} bytes",
            found=f"{len(header) - 8} bytes",
        )
    try:
        entries = parse_json(header[8:])
        if isinstance(entries, dict) and not all(map(_text, entries)):
            raise ValueError("a name is not Unicode")
    except (ValueError, RecursionError) as error:
        raise SourceError(
            "The header of a shard is not valid JSON.", where=path, found=error
        ) from None
    if not isinstance(entries, dict):
        raise SourceError("The header of a shard is not a JSON object.", where=path)
    return entries


def _check_metadata(metadata: object, path: Path) -> None:
    """Metadata are texts: https://huggingface.co/docs/safetensors, section Format."""
    if isinstance(metadata, dict) and all(map(_text, (*metadata, *metadata.values()))):
        return
    raise SourceError(
        "The metadata of a shard are not texts.",
        where=f"{path}, __metadata__",
        found=short(metadata),
    )


def _text(value: object) -> bool:
    """Whether a value is a string that is Unicode: JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)


def _parse_entry(name: str, entry: object, path: Path) -> tuple[TensorSpec, int, int]:
    where = f"{path}, tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SourceError("A header entry is not dtype, shape and data_offsets.", where=where)
    spelling = entry["dtype"]
    dtype = SAFETENSORS_NAMES.get(spelling) if isinstance(spelling, str) else None
    if dtype is None:
        raise SourceError("A tensor has an unknown dtype.", where=where, found=short(spelling))
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not _sizes(shape)
        or not _sizes(offsets)
        or len(offsets) != 2
        or len(shape) > MAX_DIMENSIONS
        or prod(length or 1 for length in shape) >= MAX_SIZE
    ):
        raise SourceError(
            "A header entry is malformed.", where=where, found=f"{short(shape)} at {short(offsets)}"
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
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE
        for value in values
    )
