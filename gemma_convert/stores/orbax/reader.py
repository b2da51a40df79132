"""Reads Orbax checkpoints with tensorstore: the tree without its values, and arrays by region.

Works on what Orbax, MaxText and the gemma library write: OCDBT or one folder an array, zarr 2 or 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array, bits
from gemma_convert.errors import SourceError, short
from gemma_convert.files.confined import check_confined
from gemma_convert.files.json_file import read_object
from gemma_convert.mapping.notation import join_path, split_path
from gemma_convert.mapping.region import Box, slices
from gemma_convert.stores.orbax.finding import METADATA
from gemma_convert.stores.orbax.raw_chunks import Places, RawChunks, ocdbt_places, raw_chunks
from gemma_convert.stores.orbax.writer import ocdbt_metadata
from gemma_convert.stores.remote.mirror import find_mirror, kvstore
from gemma_convert.version import CONVERTER

MAX_METADATA_BYTES = 64 << 20

REMOTE_CACHE_BYTES = 64 << 20
"""For the index of an object store's arrays, which would be fetched anew for every chunk."""

STATE = ("opt_state", "nnx_aux")
"""Where a training checkpoint keeps what is no parameter."""

UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, OSError)
"""What tensorstore raises for arrays that are broken, or of a kind that it does not have."""

_WITHOUT_ARRAY = ("Dict", "List", "None", "Tuple", "NamedTuple")


@dataclass(frozen=True)
class _Form:
    """How arrays are stored; `complete` says that no chunk may be left out, not even zeros."""

    ocdbt: bool
    zarr3: bool
    complete: bool


@dataclass(frozen=True)
class OrbaxTree:
    """The arrays of one item folder: name (a path in the tables' notation) → spec, and chunk.

    `others` are arrays of optimizer and random state: named, never opened.
    """

    folder: Path
    arrays: dict[str, TensorSpec]
    chunks: dict[str, tuple[int, ...]]
    others: tuple[str, ...]
    form: _Form
    context: Any
    """tensorstore's, which the arrays of an object store share."""
    places: Places | None
    """Where the values of an OCDBT store lie; None where chunks have files, or are not here."""


def read_orbax_tree(folder: Path) -> OrbaxTree:
    """The arrays of an Orbax item folder; raises SourceError where it is not one."""
    metadata = _load_metadata(folder / METADATA)
    check_confined(folder)
    ocdbt, zarr3 = bool(metadata.get("use_ocdbt")), bool(metadata.get("use_zarr3"))
    names, others = _names(metadata, folder)
    form = _Form(ocdbt, zarr3, bool(metadata.get("store_array_data_equal_to_fill_value")))
    context = _context(REMOTE_CACHE_BYTES if find_mirror(folder) else 0)
    arrays, chunks = _specs(folder, names, form, context)
    places = ocdbt_places(folder) if ocdbt and find_mirror(folder) is None else None
    return OrbaxTree(folder, arrays, chunks, tuple(others), form, context, places)


def array_names(folder: Path) -> list[str]:
    """The names of an item folder's arrays, of which none is opened; raises SourceError."""
    names, _ = _names(_load_metadata(folder / METADATA), folder)
    return names


def _names(metadata: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """The arrays of a tree, and those of optimizer and random state."""
    names: list[str] = []
    others: list[str] = []
    for entry in metadata["tree_metadata"].values():
        try:
            keys = [_checked(key["key"]) for key in entry["key_metadata"]]
            kind = entry["value_metadata"]["value_type"]
            first = keys[0]
        except (LookupError, TypeError, ValueError):
            raise SourceError(
                "Orbax' metadata is malformed.", where=folder / METADATA, found=short(entry)
            ) from None
        if kind not in _WITHOUT_ARRAY:
            (others if first in STATE else names).append(join_path(keys))
    return names, others


def _load_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = read_object(path, "Orbax' metadata", MAX_METADATA_BYTES)
    except FileNotFoundError:
        raise SourceError("Orbax' metadata is missing.", where=path) from None
    if not isinstance(metadata.get("tree_metadata"), dict):
        raise SourceError("Orbax' metadata has no tree.", where=path)
    return metadata


def _checked(key: object) -> str:
    """A key of the tree; ValueError where it is none, or would name a file outside the folder."""
    text = str(key) if isinstance(key, int) else key
    if not isinstance(text, str) or not text.isprintable() or "'" in text:
        raise ValueError(key)
    if {"", ".", ".."} & {*text.split("/")}:
        raise ValueError(key)
    return text


@dataclass(frozen=True)
class OrbaxArray:
    """One open array: its spec, and the chunk that is decoded at once."""

    name: str
    folder: Path
    spec: TensorSpec
    chunk: tuple[int, ...]
    store: Any
    raw: RawChunks | None

    def read(self, box: Box, into: Array | None = None) -> Array:
        """The values in `box`, a new array or `into`; SourceError where they cannot be read.

        Without `into` tensorstore reads, as the frameworks do.
        """
        if into is None:
            return self._read(box)
        if self.raw is None or not self.raw.read(box, into):
            bits(into)[...] = bits(self._read(box))
        return into

    def _read(self, box: Box) -> Array:
        try:
            values = (self.store[slices(box)] if box else self.store).read(order="C").result()
        except UNREADABLE as error:
            raise _broken(self.folder, self.name, error) from None
        return np.asarray(values)


def open_array(tree: OrbaxTree, name: str, cache_bytes: int = 0) -> OrbaxArray:
    """One array of a tree. `cache_bytes` keeps decoded chunks, for one that is read in slices."""
    remote = find_mirror(tree.folder) is not None
    shared = remote and cache_bytes <= REMOTE_CACHE_BYTES
    context = tree.context if shared else _context(cache_bytes)
    try:
        store = _open(tree.folder, name, tree.form, context).result()
    except UNREADABLE as error:
        raise _broken(tree.folder, name, error) from None
    spec = tree.arrays[name]
    metadata = store.spec().to_json().get("metadata", {})
    raw = None
    if not remote:
        raw = raw_chunks(tree.folder, _key(name), metadata, spec.itemsize, tree.places)
    return OrbaxArray(name, tree.folder, spec, tree.chunks[name], store, raw)


def array_metadata(tree: OrbaxTree) -> dict[str, str]:
    """Array → sha256 of its zarr metadata, where that has no file of its own."""
    if not tree.form.ocdbt:
        return {}
    return ocdbt_metadata(tree.folder, [*tree.arrays, *tree.others], tree.form.zarr3, tree.context)


def is_converted(items: Path) -> bool:
    """Whether the metadata of an item folder, or of its step, says that we converted it."""
    for folder in (items, items.parent):
        try:
            path = folder / "_CHECKPOINT_METADATA"
            metadata = read_object(path, "Orbax' metadata", MAX_METADATA_BYTES)
        except (FileNotFoundError, SourceError):
            continue
        custom = metadata.get("custom_metadata")
        if isinstance(custom, dict) and CONVERTER in custom:
            return True
    return False


def _context(cache_bytes: int) -> Any:
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


def _specs(
    folder: Path, names: Sequence[str], form: _Form, context: Any
) -> tuple[dict[str, TensorSpec], dict[str, tuple[int, ...]]]:
    opened = {name: _open(folder, name, form, context) for name in names}
    specs, chunks = {}, {}
    for name, future in opened.items():
        try:
            array = future.result()
            numpy_dtype(array.dtype.name)
        except UNREADABLE as error:
            raise _broken(folder, name, error) from None
        specs[name] = TensorSpec(array.dtype.name, tuple(array.shape))
        chunks[name] = tuple(array.chunk_layout.read_chunk.shape or array.shape)
        _check_chunk(folder, name, specs[name], chunks[name])
    return specs, chunks


def _check_chunk(folder: Path, name: str, spec: TensorSpec, chunk: tuple[int, ...]) -> None:
    """Raises SourceError for a chunk larger than its array, which nobody writes.

    A chunk is decoded at once: so no more memory is taken than the array, whose shape is checked
    before it is read, and tensorstore ends the process where there is not enough.
    """
    if any(length > max(size, 1) for length, size in zip(chunk, spec.shape, strict=True)):
        raise SourceError(
            "The chunks of an array are larger than the array.",
            where=f"{folder}, array {name}",
            expected=f"at most {list(spec.shape)}",
            found=list(chunk),
        )


def _open(folder: Path, name: str, form: _Form, context: Any) -> Any:
    import tensorstore as ts

    below = f"{_key(name)}/"
    spec: dict[str, Any] = {
        "driver": "zarr3" if form.zarr3 else "zarr",
        "kvstore": {"driver": "ocdbt", "base": kvstore(folder), "path": below}
        if form.ocdbt
        else kvstore(folder, below),
        "fill_missing_data_reads": not form.complete,
    }
    if find_mirror(folder) is not None:
        spec |= {"recheck_cached_data": False, "recheck_cached_metadata": False}
    return ts.open(spec, open=True, read=True, context=context)


def _key(name: str) -> str:
    return ".".join(split_path(name))


def _broken(folder: Path, name: str, error: Exception) -> SourceError:
    return SourceError(
        "An array of the checkpoint is missing or broken.",
        where=f"{folder}, array {name}",
        found=short((str(error) or type(error).__name__).splitlines()[0]),
    )
