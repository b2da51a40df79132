"""Reads and writes the uncompressed chunks of an Orbax array straight in their files.

tensorstore reads a chunk into fresh memory and copies it from there; one read into memory that is
used again and again takes about half the time. It writes one under another name, and renames that,
though nobody reads a checkpoint that is being made. Where chunks lie is zarr's business (a file
each), or that of OCDBT, whose tree `tensorstore.ocdbt.dump` shows. What is not plain is left to
tensorstore: compressed or missing chunks, other orders, values that stand in the tree itself.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_convert.arrays.values import Array
from gemma_convert.errors import SourceError
from gemma_convert.files.library_path import library_path
from gemma_convert.files.new_file import MODE
from gemma_convert.files.write_out import start_write_out
from gemma_convert.mapping.region import Box, contiguous, flat_place

_VALUE = re.compile(r"value:([^:%]*):([^:%]+):(\d+):(\d+)")


@dataclass(frozen=True)
class Place:
    """Where the bytes of one chunk lie: a file below the checkpoint's folder, first byte, length.

    `length` is None where the file has nothing else.
    """

    file: str
    offset: int
    length: int | None


Places = Mapping[str, Place]

Piece = tuple[tuple[int, ...], Box, Box]
"""A part of one chunk: the chunk's index, the box in the chunk, the box in what is asked for."""


@dataclass(frozen=True)
class RawChunks:
    """The chunks [*chunk] of one array [*shape]; `places` has those of an OCDBT store by key."""

    folder: Path
    key: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    itemsize: int
    separator: str
    prefix: str
    places: Places | None

    def read(self, box: Box, values: Array) -> bool:
        """Whether `values`, contiguous, were filled from `box`; False leaves it to tensorstore.

        Raises SourceError where a file that has the chunk cannot be read.
        """
        data = values.reshape(-1).view("u1").data
        pieces = list(self._pieces(box))
        return self._in_pieces(pieces, values.shape) and all(
            self._read_piece(index, inner, data, flat_place(outer, values.shape) * self.itemsize)
            for index, inner, outer in pieces
        )

    def write(self, box: Box, values: Array) -> bool:
        """Whether `values`, contiguous, stand in the files of the chunks; False where they may not.

        That is so where a part of a chunk is not one piece of its file. What no box fills of a
        chunk is zero, or what an interrupted run left there. Raises OSError.
        """
        data = values.reshape(-1).view("u1").data
        pieces = list(self._pieces(box))
        if not self._in_pieces(pieces, values.shape):
            return False
        for index, inner, outer in pieces:
            start = flat_place(outer, values.shape) * self.itemsize
            size = prod(length for _, length in inner) * self.itemsize
            self._write_piece(index, inner, data[start : start + size])
        return True

    def _in_pieces(self, pieces: Sequence[Piece], shape: tuple[int, ...]) -> bool:
        """Whether each piece is contiguous both in its chunk and in the values [*shape]."""
        return all(
            contiguous(inner, self.chunk) and contiguous(outer, shape) for _, inner, outer in pieces
        )

    def _write_piece(self, index: tuple[int, ...], inner: Box, data: memoryview) -> None:
        path = self.folder / self._name(index)
        size, offset = (
            prod(self.chunk) * self.itemsize,
            flat_place(inner, self.chunk) * self.itemsize,
        )
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        try:
            os.ftruncate(descriptor, size)
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
            start_write_out(descriptor, offset, len(data))
        finally:
            os.close(descriptor)

    def _pieces(self, box: Box) -> Iterator[Piece]:
        """The chunks that `box` meets: index, part in the chunk, part in the box."""
        spans = [
            range(start // chunk, -(-(start + length) // chunk))
            for (start, length), chunk in zip(box, self.chunk, strict=True)
        ]
        for index in itertools.product(*spans):
            inner, outer = [], []
            for at, (start, length), chunk in zip(index, box, self.chunk, strict=True):
                low, high = max(start, at * chunk), min(start + length, (at + 1) * chunk)
                inner.append((low - at * chunk, high - low))
                outer.append((low - start, high - low))
            yield index, tuple(inner), tuple(outer)

    def _read_piece(self, index: tuple[int, ...], inner: Box, data: memoryview, start: int) -> bool:
        place = self._place(index)
        if place is None:
            return False
        size = prod(self.chunk) * self.itemsize
        offset = flat_place(inner, self.chunk) * self.itemsize
        length = prod(length for _, length in inner) * self.itemsize
        try:
            descriptor = os.open(self.folder / place.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if (place.length or os.fstat(descriptor).st_size) != size:
                return False
            return _fill(descriptor, data[start : start + length], place.offset + offset)
        except OSError as error:
            raise SourceError(
                "The source cannot be read.", where=self.folder / place.file, found=error.strerror
            ) from None
        finally:
            os.close(descriptor)

    def _place(self, index: tuple[int, ...]) -> Place | None:
        key = self._name(index)
        return Place(key, 0, None) if self.places is None else self.places.get(key)

    def _name(self, index: tuple[int, ...]) -> str:
        name = self.separator.join([*([self.prefix] if self.prefix else []), *map(str, index)])
        return f"{self.key}/{name or '0'}"


def raw_chunks(
    folder: Path, key: str, metadata: Mapping[str, Any], itemsize: int, places: Places | None
) -> RawChunks | None:
    """The chunks of an array, from its zarr metadata; None where they are not the plain values."""
    zarr3 = metadata.get("zarr_format") == 3
    found = (_zarr3 if zarr3 else _zarr2)(metadata)
    if found is None:
        return None
    chunk, separator, prefix = found
    shape = tuple(metadata["shape"])
    if not shape or len(chunk) != len(shape) or not all((*chunk, *shape)):
        return None
    return RawChunks(folder, key, shape, chunk, itemsize, separator, prefix, places)


def _zarr2(metadata: Mapping[str, Any]) -> tuple[tuple[int, ...], str, str] | None:
    plain = (
        metadata.get("compressor") is None
        and not metadata.get("filters")
        and metadata.get("order") == "C"
        and not str(metadata.get("dtype")).startswith(">")
    )
    separator = metadata.get("dimension_separator", ".")
    return (tuple(metadata["chunks"]), separator, "") if plain else None


def _zarr3(metadata: Mapping[str, Any]) -> tuple[tuple[int, ...], str, str] | None:
    grid, encoding = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    plain = (
        metadata["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
        and grid["name"] == "regular"
        and encoding["name"] == "default"
    )
    separator = encoding.get("configuration", {}).get("separator", "/")
    return (tuple(grid["configuration"]["chunk_shape"]), separator, "c") if plain else None


def ocdbt_places(folder: Path) -> Places:
    """Key → where its value lies, for the values of an OCDBT store that stand in data files.

    Empty where the store is not as we know it: everything is then left to tensorstore.
    """
    import tensorstore as ts

    places: dict[str, Place] = {}
    seen: set[str] = set()
    try:
        base = ts.KvStore.open({"driver": "file", "path": f"{library_path(folder)}/"}).result()
        manifest = ts.ocdbt.dump(base).result()
        nodes = [(manifest["versions"][-1]["root"]["location"], b"")]
        while nodes:
            location, prefix = nodes.pop()
            if location in seen:
                return {}
            seen.add(location)
            for entry in ts.ocdbt.dump(base, location).result()["entries"]:
                if "location" in entry:
                    nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
                elif "indirect_value" in entry:
                    key = (prefix + entry["key"]).decode()
                    places[key] = _parse(entry["indirect_value"])
    except (LookupError, TypeError, ValueError, OSError):
        return {}
    return places


def _parse(location: str) -> Place:
    """A value's place; ValueError where it is not below the folder."""
    match = _VALUE.fullmatch(location)
    file = PurePosixPath(match[1] + match[2]) if match else PurePosixPath("/")
    if match is None or file.is_absolute() or ".." in file.parts:
        raise ValueError(location)
    return Place(str(file), int(match[3]), int(match[4]))


def _fill(descriptor: int, data: memoryview, offset: int) -> bool:
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if not count:
            return False
        done += count
    return True
