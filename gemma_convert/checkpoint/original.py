"""The Hugging Face original of a native checkpoint: its folder, or what its sidecar keeps of it.

It supplies what the native side does not hold: config and tokenizer, the headers of the shards, the
carried tensors, and values that do not come back from the native dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import KEPT_BASE, architecture_of, named_folder
from gemma_convert.checkpoint.manifest import MANIFEST, read_manifest
from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import read_object, read_regular
from gemma_convert.mapping.region import Box
from gemma_convert.model.adapter import is_adapter
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import read_config
from gemma_convert.model.huggingface_files import INDEX
from gemma_convert.stores.safetensors.header import MAX_HEADER_BYTES, parse_header
from gemma_convert.stores.safetensors.naming import Naming, find_naming
from gemma_convert.stores.safetensors.reader import (
    MAX_INDEX_BYTES,
    SafetensorsFolder,
    named_shards,
)
from gemma_convert.stores.tensor_folder import Shard, TensorFolder
from gemma_convert.stores.weights import is_huggingface, open_weights

MAX_EXCEPTIONS_BYTES = 1 << 30
"""One per cent of the largest tensor of a published model has a sixth of this."""


@dataclass
class Original:
    """An open original. `stored` reads tensors that are at hand: all, or the carried ones."""

    folder: Path
    architecture: Architecture
    shards: tuple[Shard, ...]
    naming: Naming
    files: list[Path]
    stored: TensorFolder | None
    exceptions: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The manifest of the sidecar; empty for a Hugging Face folder."""
    base_config: bytes | None = None
    """Of an adapter: config.json of its base model."""
    made: bool = False
    """Whether there is no original, and settings alone say what it would have been."""

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stored is not None:
            self.stored.close()

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Name → spec of every tensor of the original, in file order."""
        return {tensor.name: tensor.spec for shard in self.shards for tensor in shard.tensors}

    def holds(self, name: str) -> bool:
        """Whether the tensor's values are at hand."""
        return self.stored is not None and name in self.stored.tensors

    def read_bytes(self, name: str, offset: int, data: Array) -> None:
        """Fills `data` with the bytes of a tensor from `offset` on, if it is at hand."""
        stored = self.at_hand(name)
        stored.read_into(stored.tensors[name], offset, data.data)

    def at_hand(self, name: str) -> TensorFolder:
        """The reader of a tensor's values; raises SourceError where they are not at hand."""
        if self.stored is None or name not in self.stored.tensors:
            raise SourceError(
                "A tensor of the original is neither in the native checkpoint nor in the sidecar.",
                where=self.folder,
                found=name,
                do=("name the original with --like", "leave the tensor out: --text-only"),
            )
        return self.stored

    def read_box(self, name: str, box: Box) -> Array:
        """The values in `box` of a tensor that is at hand; whole rows of it are read."""
        spec = self.at_hand(name).specs[name]
        (start, count), *inner = box or [(0, 1)]
        row = prod(spec.shape[1:])
        rows = np.empty(count * row, numpy_dtype(spec.dtype))
        self.read_bytes(name, start * row * spec.itemsize, rows.view(np.uint8))
        shaped = rows.reshape(count, *spec.shape[1:]) if spec.shape else rows.reshape(())
        within = (slice(None), *(slice(first, first + length) for first, length in inner))
        return shaped[within] if spec.shape else shaped


def open_original(native: Path, like: Path | None, base: Path | None = None) -> Original:
    """The original of the native checkpoint `native`: what `like` names, or else its own sidecar.

    `like` is a Hugging Face folder or a converted checkpoint with a sidecar. Raises SourceError
    where there is neither.
    """
    if like is not None and is_huggingface(like):
        return _from_folder(like, base or _kept_base(sidecar.sidecar_root(native)))
    if like is not None and not like.is_dir():
        raise SourceError("There is no such checkpoint.", where=like)
    root = sidecar.sidecar_root(native if like is None else like)
    if root is None:
        raise SourceError(
            "The Hugging Face original is unknown: the checkpoint has no sidecar.",
            where=native if like is None else like,
            expected=f"{sidecar.FOLDER}/config.json beside the checkpoint",
            do=(
                "name the original, or a converted checkpoint of it, with --like",
                "for the text model alone, name what the framework was told with --settings",
            ),
        )
    return _from_sidecar(root)


def _from_folder(folder: Path, base: Path | None) -> Original:
    reader = open_weights(folder)
    try:
        files, _ = sidecar.other_files(folder, reader.own_files)
        base = (base or named_folder(folder)) if is_adapter(folder) else None
        architecture = architecture_of(folder, reader.specs, base)
        config = None if base is None else read_config(base)
    except BaseException:
        reader.close()
        raise
    shards, naming = reader.shards, reader.naming
    return Original(folder, architecture, shards, naming, files, reader, base_config=config)


def _from_sidecar(root: Path) -> Original:
    folder = root / sidecar.FOLDER
    own = folder / sidecar.OWN
    manifest = read_manifest(root, damaged=True)
    if manifest is None:
        raise SourceError("The sidecar has no manifest.", where=own, expected=MANIFEST)
    headers = tuple(_shard(own, entry) for entry in manifest["shards"])
    naming = find_naming((tensor.name for shard in headers for tensor in shard.tensors), own)
    shards = named_shards(headers, naming)
    checksums = {
        name: entry["xxh3_128"]
        for name, entry in manifest.get("tensors", {}).items()
        if entry["xxh3_128"] is not None
    }
    kept = sorted(map(Path, manifest.get("files_sha256", {})))
    files = [file for file in kept if (folder / file).is_file()]
    stored = None
    if (own / sidecar.CARRIED).exists():
        stored = SafetensorsFolder(own, [sidecar.CARRIED])
    try:
        names = [tensor.name for shard in shards for tensor in shard.tensors]
        base = _kept_base(root)
        architecture = architecture_of(folder, names, base)
        config = None if base is None else read_config(base)
        original = Original(folder, architecture, shards, naming, files, stored, base_config=config)
        exceptions = read_exceptions(own, original.specs)
    except BaseException:
        if stored is not None:
            stored.close()
        raise
    return replace(original, exceptions=exceptions, checksums=checksums, manifest=manifest)


def _kept_base(root: Path | None) -> Path | None:
    """The folder with config.json of an adapter's base model; None where no adapter was kept."""
    base = None if root is None else root / sidecar.FOLDER / sidecar.OWN / KEPT_BASE
    return base if base is not None and base.is_dir() else None


def _shard(own: Path, entry: Mapping[str, Any]) -> Shard:
    """A shard as its kept header describes it; the file itself is not there."""
    file, size = entry["file"], entry["size"]
    path = own / sidecar.HEADERS / f"{file}.header"
    try:
        header = read_regular(path, "A kept header", MAX_HEADER_BYTES + 8)
    except FileNotFoundError as error:
        raise SourceError(
            "The stored header of a safetensors file cannot be read.",
            where=path,
            found=error.strerror,
        ) from None
    return Shard(file, header, parse_header(header, size, file, path), size, 0)


def read_exceptions(own: Path, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Array, Array]]:
    """tensor → places and original bits of values that do not come back from the native dtype."""
    if not (own / sidecar.EXCEPTIONS).exists():
        return {}
    exceptions = {}
    with SafetensorsFolder(own, [sidecar.EXCEPTIONS]) as reader:
        _check_exceptions(reader, specs)
        for name in {name.rpartition("/")[0] for name in reader.tensors}:
            places, originals = (_whole(reader, f"{name}/{part}") for part in ("index", "bits"))
            if places.size and not 0 <= places.min() <= places.max() < specs[name].size:
                raise _malformed(reader.folder, name)
            exceptions[name] = places, originals
    return exceptions


def _check_exceptions(reader: SafetensorsFolder, specs: Mapping[str, TensorSpec]) -> None:
    """Raises SourceError where the file does not hold index and bits of values of tensors."""
    if sum(spec.nbytes for spec in reader.specs.values()) > MAX_EXCEPTIONS_BYTES:
        raise _malformed(reader.folder, f"more than {MAX_EXCEPTIONS_BYTES} bytes")
    for name in {name.rpartition("/")[0] for name in reader.tensors}:
        spec, places = specs.get(name), reader.specs.get(f"{name}/index")
        if (
            spec is None
            or places is None
            or len(places.shape) != 1
            or places.dtype != "int64"
            or reader.specs.get(f"{name}/bits")
            != TensorSpec(f"uint{8 * spec.itemsize}", places.shape)
        ):
            raise _malformed(reader.folder, name)


def _whole(reader: SafetensorsFolder, name: str) -> Array:
    tensor = reader.tensors[name]
    values = np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
    reader.read_into(tensor, 0, values.view(np.uint8).data)
    return values


def _malformed(own: Path, found: str) -> SourceError:
    return SourceError(
        "The file with the original bits of some values is malformed.",
        where=own / sidecar.EXCEPTIONS,
        found=found,
    )


def index_metadata(folder: Path) -> dict[str, object]:
    """The `metadata` of the original's index, empty where there is none."""
    try:
        index = read_object(folder / INDEX, "The index", MAX_INDEX_BYTES)
    except (FileNotFoundError, SourceError):
        return {}
    metadata = index.get("metadata")
    return metadata if isinstance(metadata, dict) else {}
