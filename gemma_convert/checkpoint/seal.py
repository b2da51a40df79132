"""The seal of a checkpoint: what every file of it was when it was complete.

The manifest lists each file below the checkpoint's folder but itself: its size, and the sha256 of
the bytes at its beginning that the checksums of regions and tensors say nothing of. Of most files
that is all of it; of safetensors files it is the header; of chunks that hold nothing but values it
is nothing. What the store itself says of an array inside an OCDBT database has a digest as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_convert.checkpoint.manifest import OLDER, PLACE
from gemma_convert.errors import SourceError, some
from gemma_convert.files.confined import check_confined
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.output import counted
from gemma_convert.stores.remote.mirror import RemoteFile, find_mirror, remote_file

ValueFile = Callable[[Path], "ValuesFrom | None"]
"""A file → from where on it holds values of arrays; None for a file that holds none."""

PIECE_BYTES = 16 << 20

CARRIED = "hf/gemma-convert/carried.safetensors"

ADDED, MISSING = "was added", "is missing"
CHANGED = "has changed since it was written"

DATABASE = "manifest.ocdbt"


OWN_MARKS = ".gemma-convert."
"""Names of what we keep in a folder only while it is being built begin so."""


@dataclass(frozen=True)
class SealedFile:
    """What one file was: its size in bytes, and the sha256 of all of it.

    A file that holds values of arrays has a digest of the bytes before `values_from`.
    """

    size: int
    sha256: str
    values_from: int | None


def seal_files(root: Path, value_file: ValueFile) -> dict[str, dict[str, object]]:
    """Relative name → entry of every file below `root` but the manifest."""
    return {
        name: asdict(_sealed(file, value_file(root / name)))
        for name, file in sorted(_listed(root).items())
        if name != PLACE and not name.startswith(OWN_MARKS)
    }


def _sealed(file: _File, values: ValuesFrom | None) -> SealedFile:
    head = None
    if values is not None:
        head = file.size if values.byte is None else values.byte
    return SealedFile(file.size, file.digest(head), head)


def sealed_files(manifest: Mapping[str, Any]) -> dict[str, SealedFile]:
    """Relative name → what the file was, by a manifest of version 2."""
    return {
        name: SealedFile(entry["size"], entry["sha256"], entry["values_from"])
        for name, entry in manifest.get("files", {}).items()
    }


def damage(root: Path, manifest: Mapping[str, Any], below: str = "") -> dict[str, str]:
    """Relative name → how a file below `root` differs from the seal.

    It is gone, has another size or other bytes, or was added; only names that begin with `below`
    are looked at. A manifest of version 1 knows the digests of the original's other files, and
    nothing else. Raises SourceError where something leads out of the folder.
    """
    listed = _listed(root)
    if manifest.get("schema") == OLDER:
        kept = manifest.get("files_sha256", {})
        found = dict(_differing(listed, {f"hf/{n}": (None, None, d) for n, d in kept.items()}))
    else:
        files = sealed_files(manifest)
        facts = {n: (file.size, file.values_from, file.sha256) for n, file in files.items()}
        wanted = {name: fact for name, fact in facts.items() if name.startswith(below)}
        found = dict(_differing(listed, wanted))
        found |= {name: ADDED for name in listed if name not in files and name != PLACE}
    return {name: how for name, how in sorted(found.items()) if name.startswith(below)}


def _differing(
    listed: Mapping[str, _File], wanted: Mapping[str, tuple[int | None, int | None, str]]
) -> Iterator[tuple[str, str]]:
    """(name, how) of files that are not what is `wanted`: size, bytes that count, digest."""
    for name, (size, head, digest) in wanted.items():
        file = listed.get(name)
        if file is None:
            yield name, MISSING
        elif size is not None and file.size != size:
            yield name, f"has {file.size} bytes instead of {size}"
        elif file.digest(head) != digest:
            yield name, CHANGED


def refuse_damage(
    root: Path, manifest: Mapping[str, Any], accept: Sequence[str], below: str = ""
) -> dict[str, str]:
    """The files below `root` that were added to what is sealed, with the word for it.

    Raises SourceError where a sealed file is not what it was, unless `accept` names it. Values in
    the files of arrays are left to those who read the arrays, since a model may be trained.
    """
    refuse_unfinished(root)
    files = sealed_files(manifest) if manifest.get("schema") != OLDER else {}
    kept = f"{PLACE.partition('/')[0]}/"
    values = {
        n for n, file in files.items() if file.values_from is not None and not n.startswith(kept)
    }
    folders = {name.rpartition("/")[0] for name in values}
    everything = damage(root, manifest, below)
    found = {
        name: how
        for name, how in everything.items()
        if name not in values or _is_broken(name, how, everything)
        if how != ADDED or name.rpartition("/")[0] not in folders
    }
    added = {name: how for name, how in found.items() if how == ADDED}
    refused = [f"{name} {how}" for name, how in found.items() if name not in {*added, *accept}]
    if refused:
        raise SourceError(
            "The checkpoint is damaged: a file was changed or lost after it was written.",
            where=root,
            found=some(refused, between="; "),
            do=("convert the original again", "continue with --accept-damage NAME"),
        )
    return added


def _is_broken(name: str, how: str, everything: Mapping[str, str]) -> bool:
    """Whether a file of values is not as another writer would have left it.

    It is gone; or it belongs to a database whose root says that it is what it was, and has another
    length.
    """
    folder = name.rpartition("/")[0]
    root = f"{folder.removesuffix('d')}{DATABASE}"
    if folder.rpartition("/")[2] == "d":
        return how != CHANGED and root not in everything
    return how == MISSING


def refuse_carried(
    root: Path, manifest: Mapping[str, Any], checksums: Mapping[str, str], accept: Sequence[str]
) -> None:
    """Raises SourceError where a carried tensor that was read has another checksum than sealed.

    Nothing where `accept` names the file of the carried tensors.
    """
    tensors = manifest.get("tensors", {})
    wrong = [
        name
        for name, found in checksums.items()
        if name in tensors
        and tensors[name]["kept"] == "carried"
        and tensors[name]["xxh3_128"] != found
    ]
    if wrong and CARRIED not in accept:
        raise SourceError(
            "The checkpoint is damaged: tensors in the sidecar were changed.",
            where=root / CARRIED,
            found=f"{counted(len(wrong), 'tensor')}, such as {wrong[0]}",
            do=("convert the original again", f"continue with --accept-damage {CARRIED}"),
        )


@dataclass(frozen=True)
class _File:
    """One file of a checkpoint: where it is here, or the object that it is in a store."""

    path: Path
    size: int
    remote: RemoteFile | None = None

    def digest(self, head: int | None) -> str:
        """sha256 of the file, or of its first `head` bytes."""
        digest = hashlib.sha256()
        for piece in _pieces(self.path, self.remote, head):
            digest.update(piece)
        return digest.hexdigest()


def _listed(root: Path) -> dict[str, _File]:
    """Relative name → every file below `root`; a link counts as the file that it leads to.

    Raises SourceError for a link that leads out of `root`, and for what is no file.
    """
    check_confined(root)
    here = {name: _File(root / name, size) for name, size in _walk(root, "")}
    found = find_mirror(root)
    if found is None:
        return here
    mirror, below = found
    start = f"{below}/" if below else ""
    stored = {
        name.removeprefix(start): _File(root / name, entry.size, RemoteFile(mirror, name, entry))
        for name, entry in (mirror.entries or mirror.listed()).items()
        if name.startswith(start) and name not in mirror.held
    }
    return here | stored


def _walk(root: Path, below: str) -> Iterator[tuple[str, int]]:
    for entry in os.scandir(root / below):
        name = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{name}/")
        else:
            with contextlib.suppress(OSError):  # a link to nothing, or to itself, is no file
                yield name, entry.stat().st_size


def file_pieces(path: Path, head: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, wherever it is, or its first `head` bytes."""
    yield from _pieces(path, remote_file(path), head)


def _pieces(path: Path, remote: RemoteFile | None, head: int | None) -> Iterator[bytes]:
    if head == 0:
        return
    if remote is not None:
        size = remote.entry.size if head is None else min(head, remote.entry.size)
        for start in range(0, size, PIECE_BYTES):
            yield remote.read(start, min(PIECE_BYTES, size - start))
        return
    with path.open("rb") as reader:
        left = head
        while piece := reader.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
            yield piece
            left = None if left is None else left - len(piece)
