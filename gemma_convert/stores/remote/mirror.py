"""Mirrors: temporary local folders that stand for checkpoints in object stores.

A mirror has every object of its place under its relative name: small files with their contents,
weights and arrays as empty placeholders, so that reading one by mistake fails instead of giving
zeros. Who needs their bytes asks here. Which folder is a mirror is known to this process alone: no
file of a checkpoint can make us use the network.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.files.library_path import library_path
from gemma_convert.output import named
from gemma_convert.stores.remote.object_store import (
    ObjectURL,
    file_system,
    kvstore_spec,
    plain_key,
    reached,
)

WEIGHT_SUFFIXES = {
    ".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".pt", ".pth",
    ".safetensors",
}  # fmt: skip

RANGE_BYTES = 4 << 20
"""Read by one request; the requests of a block run together."""


_TAGS = ("ETag", "etag", "generation", "blob_id", "md5Hash")


@dataclass(frozen=True)
class Entry:
    """One object as it was listed; `tag` is the store's own mark of its contents."""

    size: int
    tag: str


@dataclass
class Mirror:
    """The folder that stands for `place`. `entries` were listed when it was opened.

    `held` are those that the folder has the contents of. A target's mirror has no entries.
    """

    folder: Path
    place: ObjectURL
    store: Any
    entries: Mapping[str, Entry] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def listed(self, below: str = "") -> dict[str, Entry]:
        """Relative name → entry of the objects that are there now; SourceError where it fails."""
        place = self.place.joined(below)
        with reached(place, SourceError):
            return {
                "/".join(part for part in (below, name) if part): entry
                for name, entry in list_objects(self.store, place).items()
            }


@dataclass(frozen=True)
class RemoteFile:
    """One object that a placeholder stands for."""

    mirror: Mirror
    name: str
    entry: Entry

    @property
    def url(self) -> ObjectURL:
        return self.mirror.place.joined(self.name)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `start` on, by several requests at a time.

        Raises SourceError where the object has become shorter or cannot be read.
        """
        places = range(start, start + len(buffer), RANGE_BYTES)
        ends = [min(place + RANGE_BYTES, start + len(buffer)) for place in places]
        with reached(self.url, SourceError):
            pieces = self.mirror.store.cat_ranges(
                [self.url.path] * len(ends), [*places], ends, on_error="raise"
            )
        for place, end, piece in zip(places, ends, pieces, strict=True):
            if len(piece) != end - place:
                raise SourceError(
                    "The source became shorter while it was read.",
                    where=self.url,
                    do="leave the source alone until the conversion ends, then start again",
                )
            buffer[place - start : end - start] = piece

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on."""
        data = bytearray(count)
        self.read_into(start, memoryview(data))
        return bytes(data)

    def now(self) -> Entry:
        """The object as it is now; SourceError where it is not there any more."""
        with reached(self.url, SourceError):
            return entry_of(self.mirror.store.info(self.url.path))


_MIRRORS: dict[Path, Mirror] = {}


def find_mirror(path: Path) -> tuple[Mirror, str] | None:
    """The mirror that `path` lies in, and its name there; None for what is really local."""
    if not _MIRRORS:
        return None
    path = path.absolute()
    for folder in (path, *path.parents):
        if folder in _MIRRORS:
            relative = path.relative_to(folder).as_posix()
            return _MIRRORS[folder], "" if relative == "." else relative
    return None


def remote_file(path: Path) -> RemoteFile | None:
    """The object that the placeholder at `path` stands for; None for a file that is here."""
    found = find_mirror(path)
    if found is None:
        return None
    mirror, name = found
    entry = mirror.entries.get(name)
    return None if entry is None or name in mirror.held else RemoteFile(mirror, name, entry)


def file_size(path: Path) -> int:
    """Bytes of a file, wherever it is."""
    found = remote_file(path)
    return path.stat().st_size if found is None else found.entry.size


def kvstore(folder: Path, below: str = "") -> dict[str, Any]:
    """tensorstore's spec of `folder`, here or in an object store, or of `below` (`name/`) in it."""
    found = find_mirror(folder.absolute())
    if found is None:
        return {"driver": "file", "path": f"{library_path(folder)}/{below}"}
    mirror, name = found
    return kvstore_spec(mirror.place.joined(name).joined(below.rstrip("/")))


def remote_fingerprint(folder: Path, *, now: bool) -> str | None:
    """A digest of names, sizes and tags below a mirrored folder: as listed, or as they are `now`.

    None for a local folder.
    """
    found = find_mirror(folder)
    if found is None:
        return None
    mirror, name = found
    below = f"{name}/" if name else ""
    entries = mirror.listed(name) if now else mirror.entries
    listed = sorted(
        (key, entry.size, entry.tag) for key, entry in entries.items() if key.startswith(below)
    )
    return hashlib.sha256(repr(listed).encode()).hexdigest()


@contextmanager
def mirroring(place: ObjectURL, store: Any = None) -> Iterator[Mirror]:
    """An empty mirror of a place in `store`, its scheme's by default; its folder goes at the end.

    The folders around it are ours as well: readers look there for a sidecar.
    """
    with tempfile.TemporaryDirectory(prefix="gemma-convert-", ignore_cleanup_errors=True) as top:
        folder = Path(top).resolve() / "above" / "above" / "mirror"
        folder.mkdir(parents=True)
        mirror = Mirror(folder, place, file_system(place.scheme) if store is None else store)
        _MIRRORS[folder] = mirror
        try:
            with named(folder, str(place)):
                yield mirror
        finally:
            del _MIRRORS[folder]


def list_objects(store: Any, place: ObjectURL) -> dict[str, Entry]:
    """Relative name → entry of every object below a place; "" is the object of that very name.

    Raises SourceError for a name that is no path below a folder.
    """
    names = {}
    for path, info in store.find(place.path, detail=True).items():
        if info["type"] != "file" or path.endswith("/"):
            continue
        if path != place.path and not path.startswith(f"{place.path}/"):
            continue
        name = path.removeprefix(place.path).removeprefix("/")
        if name and not plain_key(name):
            raise SourceError("The name of an object is no path.", where=place, found=repr(path))
        names[name] = entry_of(info)
    return names


def entry_of(info: Mapping[str, Any]) -> Entry:
    """An entry from what a store says of an object."""
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
    return Entry(int(info["size"]), tag)
