"""The Hugging Face original of a native checkpoint: its folder, or what its sidecar keeps of it.

It supplies what the native side does not hold: config and tokenizer, the headers of the shards, the
carried tensors, and values that do not come back from the native dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_convert.architecture import Architecture
from gemma_convert.config import read_architecture
from gemma_convert.dtypes import TensorSpec, numpy_dtype
from gemma_convert.errors import SourceError
from gemma_convert.stores import sidecar
from gemma_convert.stores.safetensors import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    Shard,
    plain_name,
)
from gemma_convert.stores.safetensors_header import parse_header
from gemma_convert.values import Array


@dataclass
class Original:
    """An open original. `stored` reads tensors that are at hand: all, or the carried ones."""

    folder: Path
    architecture: Architecture
    shards: tuple[Shard, ...]
    files: list[Path]
    stored: SafetensorsFolder | None
    exceptions: Mapping[str, tuple[Array, Array]]
    checksums: Mapping[str, str]
    manifest: Mapping[str, object]
    """The manifest of the sidecar; empty for a Hugging Face folder."""

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stored is not None:
            self.stored.close()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name → spec of every tensor of the original, in file order."""
        return {tensor.name: tensor.spec for shard in self.shards for tensor in shard.tensors}

    def holds(self, name: str) -> bool:
        """Whether the tensor's values are at hand."""
        return self.stored is not None and name in self.stored.tensors

    def read(self, name: str, start: int, count: int) -> Array:
        """Elements `start` to `start + count` of a tensor that is at hand, flat."""
        if self.stored is None or name not in self.stored.tensors:
            raise SourceError(
                "A tensor of the original is not at hand.", where=self.folder, found=name
            )
        tensor = self.stored.tensors[name]
        dtype = numpy_dtype(tensor.spec.dtype)
        values = np.empty(count, dtype)
        self.stored.read_into(tensor, start * dtype.itemsize, values.view(np.uint8).data)
        return values


def open_original(native: Path, like: Path | None) -> Original:
    """The original of the native checkpoint `native`: what `like` names, or else its own sidecar.

    `like` is a Hugging Face folder or a converted checkpoint with a sidecar. Raises SourceError
    where there is neither.
    """
    if like is not None and any((like / name).exists() for name in (SINGLE, INDEX)):
        return _from_folder(like)
    if like is not None and not like.is_dir():
        raise SourceError("There is no such checkpoint.", where=like)
    root = sidecar.sidecar_root(native if like is None else like)
    if root is None:
        raise SourceError(
            "Nothing says what the Hugging Face original was: there is no sidecar.",
            where=native if like is None else like,
            expected=f"{sidecar.FOLDER}/config.json beside the checkpoint",
            do="name the original, or a converted checkpoint of it, with --like",
        )
    return _from_sidecar(root)


def _from_folder(folder: Path) -> Original:
    reader = SafetensorsFolder(folder)
    try:
        files, _ = sidecar.other_files(folder, [shard.file for shard in reader.shards])
        architecture = read_architecture(folder)
    except BaseException:
        reader.close()
        raise
    return Original(folder, architecture, reader.shards, files, reader, {}, {}, {})


def _from_sidecar(root: Path) -> Original:
    folder = root / sidecar.FOLDER
    own = folder / sidecar.OWN
    manifest = sidecar.read_manifest(root)
    if manifest is None:
        raise SourceError("The sidecar has no manifest.", where=own, expected=sidecar.MANIFEST)
    shards = tuple(_shard(own, entry) for entry in _list(manifest, "shards", own))
    tensors = manifest.get("tensors")
    checksums = {
        str(name): entry["xxh3_128"]
        for name, entry in (tensors.items() if isinstance(tensors, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("xxh3_128"), str)
    }
    files, _ = sidecar.other_files(folder, [])
    stored = None
    if (own / sidecar.CARRIED).exists():
        stored = SafetensorsFolder(own, [sidecar.CARRIED])
    architecture = read_architecture(folder)
    specs = {tensor.name: tensor.spec for shard in shards for tensor in shard.tensors}
    exceptions = read_exceptions(own, specs)
    return Original(folder, architecture, shards, files, stored, exceptions, checksums, manifest)


def _list(manifest: Mapping[str, object], key: str, own: Path) -> list[object]:
    values = manifest.get(key)
    if not isinstance(values, list):
        raise SourceError("The manifest is malformed.", where=own / sidecar.MANIFEST, found=key)
    return values


def _shard(own: Path, entry: object) -> Shard:
    """A shard as its kept header describes it; the file itself is not there."""
    where = own / sidecar.MANIFEST
    if not isinstance(entry, dict):
        raise SourceError("The manifest is malformed.", where=where, found=str(entry)[:200])
    file, size = entry.get("file"), entry.get("size")
    if not isinstance(file, str) or not plain_name(file) or not isinstance(size, int):
        raise SourceError("The manifest is malformed.", where=where, found=str(entry)[:200])
    path = own / sidecar.HEADERS / f"{file}.header"
    try:
        header = path.read_bytes()
    except OSError as error:
        raise SourceError(
            "A kept header cannot be read.", where=path, found=error.strerror
        ) from None
    return Shard(file, header, parse_header(header, size, file, path), size, 0)


def read_exceptions(own: Path, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Array, Array]]:
    """tensor → places and original bits of values that do not come back from the native dtype."""
    if not (own / sidecar.EXCEPTIONS).exists():
        return {}
    with SafetensorsFolder(own, [sidecar.EXCEPTIONS]) as reader:
        arrays = {}
        for name, tensor in reader.tensors.items():
            values = np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
            reader.read_into(tensor, 0, values.view(np.uint8).reshape(-1).data)
            arrays[name] = values
    exceptions = {}
    for name in {name.rpartition("/")[0] for name in arrays}:
        places, originals = arrays.get(f"{name}/index"), arrays.get(f"{name}/bits")
        spec = specs.get(name)
        if (
            spec is None
            or places is None
            or originals is None
            or places.dtype != np.int64
            or originals.dtype != np.dtype(f"u{spec.itemsize}")
            or places.ndim != 1
            or places.shape != originals.shape
            or (places.size and not 0 <= places.min() <= places.max() < spec.size)
        ):
            raise SourceError(
                "The kept exceptions are malformed.", where=own / sidecar.EXCEPTIONS, found=name
            )
        exceptions[name] = places, originals
    return exceptions


def index_metadata(folder: Path) -> dict[str, object]:
    """The `metadata` of the original's index, empty where there is none."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    metadata = index.get("metadata") if isinstance(index, dict) else None
    return metadata if isinstance(metadata, dict) else {}
