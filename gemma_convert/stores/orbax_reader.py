"""Reads Orbax checkpoints with tensorstore: the tree without its values, and arrays by region.

Works on what Orbax, MaxText and the gemma library write: OCDBT or one folder an array, zarr 2 or 3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.dtypes import TensorSpec
from gemma_convert.errors import SourceError
from gemma_convert.mapping.notation import join_path, split_path
from gemma_convert.mapping.region import Box
from gemma_convert.stores.journal import UNFINISHED
from gemma_convert.stores.raw_chunks import Places, RawChunks, ocdbt_places, raw_chunks
from gemma_convert.values import Array, bits

METADATA = "_METADATA"
MAX_METADATA_BYTES = 256 << 20

ITEMS = ("items", "default")
"""Names of the item in a step folder: MaxText's, and that of Orbax' CheckpointManager."""

STATE = ("opt_state", "nnx_aux")
"""Where a training checkpoint keeps what is no parameter."""

_WITHOUT_ARRAY = ("Dict", "List", "None", "Tuple", "NamedTuple")


@dataclass(frozen=True)
class OrbaxTree:
    """The arrays of one item folder: name (a path in the tables' notation) → spec, and chunk.

    `others` are arrays of optimizer and random state: named, never opened.
    """

    folder: Path
    arrays: dict[str, TensorSpec]
    chunks: dict[str, tuple[int, ...]]
    others: tuple[str, ...]
    ocdbt: bool
    zarr3: bool
    places: Places | None
    """Where the values of an OCDBT store lie; None where every chunk has its own file."""


def find_items(path: Path) -> Path:
    """The folder that holds the Orbax tree: `path`, its item folder, or that of its highest step.

    The result is absolute, as Orbax asks for. Raises SourceError where there is no such folder.
    """
    path = path.absolute()
    for folder in (path, *path.parents[:2]):
        if any((folder / name).exists() for name in UNFINISHED):
            raise SourceError(
                "This is an unfinished conversion.",
                where=folder,
                do="run the conversion again with --resume",
            )
    for folder in (path, *(path / item for item in ITEMS)):
        if (folder / METADATA).is_file():
            return folder
    steps = sorted(
        (int(folder.name), folder / item)
        for folder in (path.iterdir() if path.is_dir() else ())
        if folder.name.isascii() and folder.name.isdecimal()
        for item in ITEMS
    )
    complete = [items for _, items in steps if (items / METADATA).is_file()]
    if complete:
        return complete[-1]
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) if path.is_dir() else None
    raise SourceError(
        "There is no Orbax checkpoint here.",
        where=path,
        expected="<step>/items/_METADATA, items/_METADATA or _METADATA",
        found=found or "nothing",
        do="give the folder that was written, its step folder, or the items folder in that",
    )


def read_orbax_tree(folder: Path) -> OrbaxTree:
    """The arrays of an Orbax item folder; raises SourceError where it is not one."""
    metadata = _load_metadata(folder / METADATA)
    ocdbt, zarr3 = bool(metadata.get("use_ocdbt")), bool(metadata.get("use_zarr3"))
    names: list[str] = []
    others: list[str] = []
    for entry in metadata["tree_metadata"].values():
        try:
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            kind = entry["value_metadata"]["value_type"]
        except (KeyError, TypeError):
            raise SourceError(
                "Orbax' metadata is malformed.", where=folder / METADATA, found=str(entry)[:200]
            ) from None
        if kind not in _WITHOUT_ARRAY:
            (others if keys[0] in STATE else names).append(join_path(keys))
    arrays, chunks = _specs(folder, names, ocdbt, zarr3)
    places = ocdbt_places(folder) if ocdbt else None
    return OrbaxTree(folder, arrays, chunks, tuple(others), ocdbt, zarr3, places)


def _load_metadata(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise SourceError("Orbax' metadata is too large to be metadata.", where=path)
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            "Orbax' metadata cannot be read.", where=path, found=error.strerror
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceError("Orbax' metadata is not valid JSON.", where=path, found=error) from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise SourceError("Orbax' metadata has no tree.", where=path)
    return metadata


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
        where = tuple(slice(start, start + length) for start, length in box)
        try:
            values = (self.store[where] if where else self.store).read(order="C").result()
        except ValueError as error:
            raise _broken(self.folder, self.name, error) from None
        return np.asarray(values)


def open_array(tree: OrbaxTree, name: str, cache_bytes: int = 0) -> OrbaxArray:
    """One array of a tree. `cache_bytes` keeps decoded chunks, for one that is read in slices."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    try:
        store = _open(tree.folder, name, tree.ocdbt, tree.zarr3, context).result()
    except ValueError as error:
        raise _broken(tree.folder, name, error) from None
    spec = tree.arrays[name]
    metadata = store.spec().to_json().get("metadata", {})
    raw = raw_chunks(tree.folder, _key(name), metadata, spec.itemsize, tree.places)
    return OrbaxArray(name, tree.folder, spec, tree.chunks[name], store, raw)


def _specs(
    folder: Path, names: Sequence[str], ocdbt: bool, zarr3: bool
) -> tuple[dict[str, TensorSpec], dict[str, tuple[int, ...]]]:
    import tensorstore as ts

    context = ts.Context()
    opened = {name: _open(folder, name, ocdbt, zarr3, context) for name in names}
    specs, chunks = {}, {}
    for name, future in opened.items():
        try:
            array = future.result()
        except ValueError as error:
            raise _broken(folder, name, error) from None
        specs[name] = TensorSpec(array.dtype.name, tuple(array.shape))
        chunks[name] = tuple(array.chunk_layout.read_chunk.shape or array.shape)
    return specs, chunks


def _open(folder: Path, name: str, ocdbt: bool, zarr3: bool, context: Any) -> Any:
    import tensorstore as ts

    key, folder = _key(name), folder.absolute()
    store: dict[str, Any] = {"driver": "file", "path": f"{folder}/{key}/"}
    if ocdbt:
        base = {"driver": "file", "path": f"{folder}/"}
        store = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
    return ts.open(spec, open=True, read=True, context=context)


def _key(name: str) -> str:
    return ".".join(split_path(name))


def _broken(folder: Path, name: str, error: Exception) -> SourceError:
    return SourceError(
        "An array of the checkpoint is missing or broken.",
        where=f"{folder}, array {name}",
        found=str(error).splitlines()[0][:300],
    )
