"""The sidecar `hf/` beside a converted checkpoint: all that the native side does not hold.

hf/                           the original's other files, byte for byte (config, tokenizer, …)
hf/gemma-convert/manifest.json
hf/gemma-convert/headers/     each shard's header verbatim
hf/gemma-convert/carried.safetensors     tensors without a place in the layout
hf/gemma-convert/exceptions.safetensors  values that do not come back: index and original bits
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.seal import file_pieces
from gemma_convert.errors import SourceError
from gemma_convert.files.confined import NEVER_READ, check_confined
from gemma_convert.progress import Progress
from gemma_convert.stores.remote.mirror import WEIGHT_SUFFIXES
from gemma_convert.stores.safetensors.header import safetensors_header, write_safetensors
from gemma_convert.stores.tensor_folder import Shard

FOLDER = "hf"
OWN = "gemma-convert"
CARRIED = "carried.safetensors"
EXCEPTIONS = "exceptions.safetensors"
HEADERS = "headers"

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
    try:
        yield from file_pieces(path)
    except OSError as error:
        raise SourceError(
            "A file of the source cannot be read.", where=path, found=error.strerror
        ) from None


def head(file: Path, count: int) -> bytes:
    """The first `count` bytes of a file, wherever it is."""
    return b"".join(file_pieces(file, count))


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
