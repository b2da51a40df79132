"""Writes a checkpoint into an object store: marked as unfinished until everything is there.

Arrays go straight to the store; files are written into the mirror and uploaded at the end, those
that say that the checkpoint is complete after all others. What an error leaves is deleted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_convert.errors import TargetError
from gemma_convert.files.unfinished import JOURNAL, UNFINISHED
from gemma_convert.progress import Progress
from gemma_convert.stores.remote.mirror import Mirror, find_mirror, list_objects
from gemma_convert.stores.remote.object_store import ObjectURL, reached

UPLOADS = 4
DELETIONS = 8

_LAST = (
    "model.safetensors.index.json",
    "config.json",
    "metadata.yaml",
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
)
"""Files that make a folder a checkpoint, in the order in which they are uploaded."""


def target_mirror(target: Path) -> Mirror | None:
    """The mirror that stands for a target; None for a local one."""
    found = find_mirror(target)
    return None if found is None else found[0]


def check_remote_target(mirror: Mirror, *, overwrite: bool) -> None:
    """Raises TargetError where something is at the place that may not be replaced."""
    with reached(mirror.place, TargetError):
        found = list_objects(mirror.store, mirror.place)
    if not found or (overwrite and JOURNAL in found):
        return
    if JOURNAL in found:
        raise TargetError(
            "An unfinished conversion is there, or one that is still running.",
            where=mirror.place,
            do="replace it with --overwrite where it does not run any more",
        )
    raise TargetError(
        "The target exists.",
        where=mirror.place,
        found=f"{len(found)} objects",
        do="choose another target, or delete them yourself; in an object store --overwrite "
        "replaces only an unfinished conversion",
    )


@contextmanager
def staged_objects(mirror: Mirror, *, overwrite: bool) -> Iterator[str]:
    """The mark of the conversion that is begun here; TargetError where it cannot be.

    What was written is deleted where the block ends with an error.
    """
    check_remote_target(mirror, overwrite=overwrite)
    mark, place = uuid.uuid4().hex, mirror.place.joined(JOURNAL)
    with reached(mirror.place, TargetError):
        if overwrite:
            _delete(mirror)
        try:
            _mark(mirror.store, place, mark)
        except FileExistsError:
            raise TargetError(
                "Another run is writing this target.",
                where=mirror.place,
                do="wait for it, or choose another target",
            ) from None
    try:
        yield mark
    except BaseException:
        with contextlib.suppress(Exception):  # what is left stays marked as unfinished
            if _is_ours(mirror.store, place, mark):
                _delete(mirror)
        raise


def upload(mirror: Mirror, mark: str, progress: Progress) -> None:
    """Uploads what was written into a mirror and takes the mark away; or raises TargetError."""
    store, place = mirror.store, mirror.place.joined(JOURNAL)
    names = list(_written(mirror.folder))
    last = sorted((n for n in names if _rank(n)), key=lambda name: (_rank(name), name))
    first = [name for name in names if not _rank(name)]

    def put(name: str) -> None:
        with reached(mirror.place.joined(name), TargetError):
            store.put_file(str(mirror.folder / name), mirror.place.joined(name).path)
        progress.advance((mirror.folder / name).stat().st_size, name)

    with ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload") as pool:
        for _ in pool.map(put, first):
            pass
    for name in last:
        put(name)
    with reached(mirror.place, TargetError):
        ours = _is_ours(store, place, mark)
        if ours:
            store.rm_file(place.path)
    if not ours:
        raise TargetError(
            "The target was removed, or another run took it, while it was written.",
            where=mirror.place,
            do="leave the target alone until the conversion ends, then start again",
        )


def upload_bytes(mirror: Mirror) -> int:
    """Bytes of the files that `upload` uploads."""
    return sum((mirror.folder / name).stat().st_size for name in _written(mirror.folder))


def _written(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            name = Path(root, file).relative_to(folder).as_posix()
            if name not in UNFINISHED:
                yield name


def _rank(name: str) -> int:
    """0 for what is uploaded first; files of the sidecar complete nothing."""
    file = name.rpartition("/")[2]
    return 0 if name.startswith("hf/") or file not in _LAST else 1 + _LAST.index(file)


def _mark(store: Any, place: ObjectURL, mark: str) -> None:
    text = json.dumps({"unfinished": "a conversion by gemma-convert", "run": mark})
    store.pipe_file(place.path, text.encode(), mode="create")


def _is_ours(store: Any, place: ObjectURL, mark: str) -> bool:
    try:
        return mark.encode() in store.cat_file(place.path)
    except FileNotFoundError:
        return False


def _delete(mirror: Mirror) -> None:
    """Deletes everything at the place, the mark last."""
    names = list_objects(mirror.store, mirror.place)
    marked = names.pop(JOURNAL, None) is not None
    paths = [mirror.place.joined(name).path for name in names]
    with ThreadPoolExecutor(DELETIONS, thread_name_prefix="delete") as pool:
        for _ in pool.map(mirror.store.rm_file, paths):
            pass
    if marked:
        mirror.store.rm_file(mirror.place.joined(JOURNAL).path)
