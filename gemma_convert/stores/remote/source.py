"""A checkpoint in an object store as a source: its mirror, with copies of what is read at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.files.unfinished import JOURNAL
from gemma_convert.mapping.declared import layout_names
from gemma_convert.mapping.table import load_table
from gemma_convert.stores.remote.mirror import (
    WEIGHT_SUFFIXES,
    Entry,
    Mirror,
    entry_of,
    list_objects,
    mirroring,
)
from gemma_convert.stores.remote.object_store import ObjectURL, file_system, reached
from gemma_convert.stores.remote.temporary import with_room

SMALL_BYTES = 64 << 20
"""What is larger is never copied into a mirror."""

DOWNLOADS = 8

_TREE = "_METADATA"
_DATABASE = "manifest.ocdbt"
_SIDECAR, _MANIFEST = "hf", "hf/gemma-convert/manifest.json"


def mirror_source(
    place: ObjectURL, stack: ExitStack, wanted: Callable[[str], bool] | None = None
) -> Path:
    """The folder, or the file, that stands for a place until `stack` ends.

    `wanted(name)` says which of the small files of a folder are copied; all by default. Raises
    SourceError where the place is empty, or cannot be reached.
    """
    store = file_system(place.scheme)
    with reached(place, SourceError):
        found = list_objects(store, place)
        single = "" in found
        levels = 1 if single else _levels(place, found)
        around = {} if single else _around(store, place, levels)
    if not found:
        raise SourceError("There is nothing at this place.", where=place, do="check the URL")
    root = place.up(levels)
    start = place.key.removeprefix(root.key).strip("/")
    names = {"/".join(part for part in (start, name) if part): e for name, e in found.items()}
    mirror = stack.enter_context(mirroring(root))
    mirror.entries = {**around, **names}
    _fill(mirror, (lambda _: True) if wanted is None or single else wanted)
    return mirror.folder / start


def _levels(place: ObjectURL, found: Mapping[str, Entry]) -> int:
    """How far above an Orbax item or step its sidecar may stand."""
    item = any(name.endswith(f"/{_TREE}") and name.count("/") == 1 for name in found)
    if not (item or _TREE in found) or _MANIFEST in found or not place.key:
        return 0
    return min(2, place.key.count("/") + 1)


def _around(store: Any, place: ObjectURL, levels: int) -> dict[str, Entry]:
    """What the places above have of the checkpoint: all of one with a sidecar, which seals it.

    Of others the mark of an unfinished conversion, and the settings.
    """
    root = place.up(levels)
    around: dict[str, Entry] = {}
    for level in range(1, levels + 1):
        above = place.up(level)
        below = above.key.removeprefix(root.key).strip("/")
        names = [name for name in (JOURNAL, _MANIFEST) if _exists(store, above.joined(name))]
        found = {name: Entry(0, "") for name in names}
        if _MANIFEST in names:
            found |= list_objects(store, above)
        else:
            found |= _settings(store, above)
        around |= {"/".join(part for part in (below, n) if part): e for n, e in found.items()}
    return around


def _settings(store: Any, place: ObjectURL) -> dict[str, Entry]:
    """The files of a place that the tables name as a framework's settings: name → entry."""
    tables = (load_table(layout).files for layout in layout_names())
    allowed = [pattern for files in tables if files is not None for pattern in files.allowed]

    def matching(below: str) -> Iterator[tuple[str, Entry]]:
        try:
            listed = store.ls(place.joined(below).path, detail=True)
        except (FileNotFoundError, PermissionError):
            return
        for info in listed:
            name = str(info["name"]).removeprefix(place.path).strip("/")
            if name == below or not any(re.fullmatch(pattern, name) for pattern in allowed):
                continue
            if info["type"] == "file":
                yield name, entry_of(info)
            elif not below:
                yield from matching(name)

    return dict(matching(""))


def _exists(store: Any, place: ObjectURL) -> bool:
    try:
        store.info(place.path)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def _fill(mirror: Mirror, wanted: Callable[[str], bool]) -> None:
    """Makes every file of a mirror: with its contents where it is small, else empty."""
    names = [PurePosixPath(name) for name in mirror.entries]
    items = sorted({name.parent for name in names if name.name == _TREE}, reverse=True)
    try:
        with with_room():
            for name in mirror.entries:
                (mirror.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (mirror.folder / name).touch()
    except OSError as error:
        raise SourceError(
            "The names of these objects are no tree of files.",
            where=mirror.place,
            found=error.strerror,
        ) from None
    mirror.held = {
        name
        for name, entry in mirror.entries.items()
        if entry.size <= SMALL_BYTES and not _is_weight(PurePosixPath(name), items) and wanted(name)
    }
    with ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="mirror") as pool:
        for _ in pool.map(lambda name: _download(mirror, name), sorted(mirror.held)):
            pass


def _download(mirror: Mirror, name: str) -> None:
    place, size = mirror.place.joined(name), mirror.entries[name].size
    with reached(place, SourceError):
        data = mirror.store.cat_file(place.path, start=0, end=size) if size else b""
    if len(data) != size:
        raise SourceError(
            "The source changed while it was read.",
            where=place,
            do="leave the source alone until the conversion ends, then start again",
        )
    with with_room():
        (mirror.folder / name).write_bytes(data)


def _is_weight(name: PurePosixPath, items: Sequence[PurePosixPath]) -> bool:
    """Whether an object is weights: by its suffix, or as part of an Orbax item's store.

    `items` has the folders of the items, inner ones before outer ones.
    """
    if name.suffix in WEIGHT_SUFFIXES:
        return True
    for item in items:
        if name.is_relative_to(item):
            inner = name.relative_to(item).parts
            if inner[0] == _SIDECAR:
                return False
            return len(inner) > 1 or inner[0] == _DATABASE
    return False
