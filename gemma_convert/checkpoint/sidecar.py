"""The sidecar `hf/` beside a converted checkpoint: all that the native side does not hold.

hf/                           the original's other files, byte for byte (config, tokenizer, …)
hf/gemma-convert/manifest.json
hf/gemma-convert/headers/     each shard's header verbatim
hf/gemma-convert/carried.safetensors     tensors without a place in the layout
hf/gemma-convert/exceptions.safetensors  values that do not come back: index and original bits
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.manifest import check_manifest
from gemma_convert.errors import SourceError, short
from gemma_convert.files.confined import NEVER_READ, check_confined
from gemma_convert.files.json_file import read_object
from gemma_convert.output import Progress
from gemma_convert.stores.remote.mirror import WEIGHT_SUFFIXES, remote_file
from gemma_convert.stores.safetensors.header import safetensors_header, write_safetensors
from gemma_convert.stores.safetensors.reader import Shard

FOLDER = "hf"
OWN = "gemma-convert"
MANIFEST = "manifest.json"
CARRIED = "carried.safetensors"
EXCEPTIONS = "exceptions.safetensors"
HEADERS = "headers"

MANIFEST_SCHEMA = "gemma-convert/manifest/1"
MAX_MANIFEST_BYTES = 64 << 20

COPY_BYTES = 16 << 20

_SKIPPED_FOLDERS = {*NEVER_READ, OWN}


def remove(checkpoint: Path) -> None:
    """Removes a sidecar that an interrupted run left half-written."""
    if (checkpoint / FOLDER).is_dir():
        shutil.rmtree(checkpoint / FOLDER)


def other_files(folder: Path, shards: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(files to carry, names that are listed and not carried), relative to `folder`.

    Carried are files, which links may lead to (`stores.confined` has looked where); not carried
    are weights in other formats, caches, version control, and links to nothing.
    """
    carried: list[Path] = []
    listed: list[str] = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        skipped = [name for name in sorted(folders) if name in _SKIPPED_FOLDERS]
        listed += [f"{(here / name).relative_to(folder)}/" for name in skipped]
        folders[:] = sorted(set(folders).difference(skipped))
        for name in sorted(files):
            path = here / name
            relative = path.relative_to(folder)
            if relative.name in shards and relative.parent == Path():
                continue
            if path.suffix in WEIGHT_SUFFIXES or not path.is_file():
                listed.append(str(relative))
            else:
                carried.append(relative)
    return carried, listed


def copy_files(source: Path, target: Path, files: Sequence[Path]) -> dict[str, str]:
    """Copies files byte for byte; name → sha256."""
    digests = {}
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).unlink(missing_ok=True)
        digest = hashlib.sha256()
        with (target / file).open("xb") as writer:
            for piece in _pieces(source / file):
                digest.update(piece)
                writer.write(piece)
        digests[str(file)] = digest.hexdigest()
    return digests


def sha256(file: Path) -> str:
    """The sha256 of a file, wherever it is."""
    digest = hashlib.sha256()
    for piece in _pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    remote = remote_file(path)
    if remote is not None:
        for start in range(0, remote.entry.size, COPY_BYTES):
            yield remote.read(start, min(COPY_BYTES, remote.entry.size - start))
        return
    try:
        with path.open("rb") as reader:
            while piece := reader.read(COPY_BYTES):
                yield piece
    except OSError as error:
        raise SourceError(
            "A file of the source cannot be read.", where=path, found=error.strerror
        ) from None


def write_headers(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes each shard's header verbatim, length word included."""
    (folder / HEADERS).mkdir(parents=True)
    for shard in shards:
        (folder / HEADERS / f"{shard.file}.header").write_bytes(shard.header)


def write_carried(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    pieces: Callable[[str], Iterator[memoryview]],
    progress: Progress,
) -> dict[str, str]:
    """Streams tensors into carried.safetensors; name → checksum (xxh3_128).

    `pieces(name)` gives the bytes of a tensor from its first to its last.
    """
    if not specs:
        return {}
    checksums = {}
    with (folder / CARRIED).open("xb") as file:
        file.write(safetensors_header(specs))
        for name in specs:
            digest = xxhash.xxh3_128()
            for piece in pieces(name):
                digest.update(piece)
                file.write(piece)
                progress.advance(len(piece), name)
            checksums[name] = digest.hexdigest()
    return checksums


def write_exceptions(folder: Path, values: Mapping[str, tuple[Array, Array]]) -> None:
    """Writes index [count] int64 and original bits [count] of values that do not come back."""
    arrays: dict[str, Array] = {}
    for name, (places, originals) in values.items():
        arrays[f"{name}/index"] = places.astype("<i8")
        arrays[f"{name}/bits"] = originals
    write_safetensors(folder / EXCEPTIONS, arrays)


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Writes manifest.json."""
    text = json.dumps({"schema": MANIFEST_SCHEMA, **manifest}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="ascii")


def sidecar_root(native: Path) -> Path | None:
    """The folder of a converted checkpoint whose sidecar belongs to `native`, or None.

    Raises SourceError where something in the sidecar leads out of it (`stores.confined`).
    """
    native = native.absolute()
    roots = (native, native.parent, native.parent.parent)
    root = next((root for root in roots if (root / FOLDER / OWN).is_dir()), None)
    if root is not None:
        check_confined(root, FOLDER)
    return root


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a converted checkpoint, or None where it has no sidecar.

    Raises SourceError for a manifest that is not one.
    """
    path = checkpoint / FOLDER / OWN / MANIFEST
    try:
        manifest = read_object(path, "The manifest", MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise SourceError(
            "The manifest is of another version.",
            where=path,
            expected=MANIFEST_SCHEMA,
            found=short(manifest.get("schema")),
        )
    check_manifest(manifest, path)
    return manifest
