"""Checkpoints on the Hugging Face hub: the files that a conversion needs, in the hub's own cache.

Token, cache and endpoint are huggingface_hub's: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.files.confined import check_confined
from gemma_convert.model.huggingface_files import CONFIG, INDEX, SINGLE
from gemma_convert.output import named
from gemma_convert.stores.remote.announced import check_announced
from gemma_convert.stores.remote.mirror import WEIGHT_SUFFIXES, mirroring
from gemma_convert.stores.remote.object_store import ObjectURL
from gemma_convert.stores.safetensors.reader import read_index

_REPOSITORY = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_.-]{1,96})(?:@([^@\s]{1,255}))?", re.ASCII
)
_REFUSED = (401, 403)
_CONVERTED = ("metadata.yaml", "hf/gemma-convert")
_ORBAX = "_METADATA"
_WEIGHTS = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]
_LIBRARIES = ("httpx", "httpcore", "huggingface_hub", "hf_xet")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at a revision: a branch, a tag or a commit; None is the default."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def repository(text: str) -> Repository | None:
    """The repository that a text such as `owner/name@revision` names; None where there is none."""
    match = _REPOSITORY.fullmatch(text)
    if match is None or ".." in match[1] or "--" in match[1] or match[1].endswith((".", "-")):
        return None
    return Repository(match[1], match[2])


def snapshot(wanted: Repository, stack: ExitStack, *, config_only: bool) -> Path:
    """The snapshot of a repository in the hub's cache, downloaded where it is not there yet.

    Weights are those that the index names, or model.safetensors; other formats are left where they
    are. Raises SourceError where it cannot be had, or is not what the hub announced.
    """
    if config_only:
        return _download(wanted, wanted.revision, stack, allow=[CONFIG])
    folder = _download(wanted, wanted.revision, stack, ignore=_WEIGHTS)
    folder = _download(wanted, folder.name, stack, allow=_weights(folder))
    check_announced(folder)
    return folder


def headers_alone(wanted: Repository, stack: ExitStack) -> Path:
    """A mirror of a repository: the small files, and weights that are read by ranges.

    Where the cache has the weights already, or nothing may be asked for, it is the snapshot, and so
    it is with Orbax's arrays. Raises SourceError where it cannot be had.
    """
    from huggingface_hub import HfFileSystem, constants

    folder = _download(wanted, wanted.revision, stack, ignore=_WEIGHTS)
    weights = _weights(folder)
    cached = constants.HF_HUB_OFFLINE or all((folder / name).exists() for name in weights)
    if cached or any(folder.rglob(_ORBAX)):
        return _download(wanted, folder.name, stack, allow=weights)
    owner, name = wanted.name.split("/")
    place = ObjectURL("", owner, f"{name}@{folder.name}")
    store = _Ranges(wanted, HfFileSystem(skip_instance_cache=True))
    mirror = stack.enter_context(mirroring(place, store))
    for alias in (Path(place.path), mirror.folder):
        stack.enter_context(named(alias, str(wanted)))
    mirror.entries = {
        name: entry
        for name, entry in mirror.listed().items()
        if any(fnmatchcase(name, pattern) for pattern in weights)
    }
    ignored = shutil.ignore_patterns(*_WEIGHTS)
    try:
        shutil.copytree(folder, mirror.folder, ignore=ignored, dirs_exist_ok=True)
        for name in mirror.entries:
            (mirror.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (mirror.folder / name).touch()
    except OSError as error:
        raise SourceError(
            "The repository's small files cannot be copied.",
            where=wanted,
            found=short(str(error)),
            do="check free space in the folder for temporary files",
        ) from None
    return mirror.folder


@dataclass(frozen=True)
class _Ranges:
    """What a mirror asks of its store, for a repository; `store` is huggingface_hub's."""

    wanted: Repository
    store: Any

    def find(self, path: str, *, detail: bool) -> Mapping[str, Mapping[str, Any]]:
        with _asking(self.wanted):
            return dict(self.store.find(path, detail=detail))

    def cat_ranges(
        self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int], *, on_error: str
    ) -> list[bytes]:
        """The bytes of every range, and none beside them; always raises what goes wrong."""
        del on_error
        with _asking(self.wanted):
            return [
                self.store.cat_file(path, start, end, cache_type="none")
                for path, start, end in zip(paths, starts, ends, strict=True)
            ]


def _weights(folder: Path) -> list[str]:
    """Patterns of the weight files of a snapshot that has all other files."""
    if (folder / INDEX).exists():
        return [glob.escape(shard) for shard in sorted(set(read_index(folder / INDEX).values()))]
    converted = any((folder / mark).exists() for mark in _CONVERTED)
    return ["*.safetensors"] if converted else [SINGLE]


def _download(
    wanted: Repository,
    revision: str | None,
    stack: ExitStack,
    *,
    allow: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """The folder with the files that the patterns choose; `revision` may be the commit found."""
    from huggingface_hub import snapshot_download

    with _asking(wanted):
        folder = snapshot_download(
            wanted.name,
            revision=revision,
            allow_patterns=None if allow is None else list(allow),
            ignore_patterns=None if ignore is None else list(ignore),
            library_name="gemma-convert",
        )
    stack.enter_context(named(Path(folder), str(wanted)))
    check_confined(Path(folder))
    return Path(folder)


@contextmanager
def _asking(wanted: Repository) -> Iterator[None]:
    """Turns what huggingface_hub raises inside into one message."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, (OSError, ValueError))
        if not known and not type(error).__module__.startswith(_LIBRARIES):
            raise
        raise _not_had(wanted, error) from None


def _not_had(wanted: Repository, error: Exception) -> SourceError:
    """The message about a repository that cannot be downloaded."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    what = "The checkpoint cannot be downloaded from the hub."
    do = "try again: files that have come are kept"
    if isinstance(error, errors.RevisionNotFoundError):
        what = "The repository has no such revision."
        do = "name a branch, a tag or a commit that is on its page"
    elif isinstance(error, errors.GatedRepoError) or status in _REFUSED:
        what = "The hub does not give this repository to you."
        do = "accept the licence on its page, then log in: hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "There is no such folder here, and no such repository on the hub."
        do = "check the name; for a private repository log in first: hf auth login"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        what = "There is no such folder here, and the hub cannot be asked for such a repository."
        do = f"check the network and HF_HUB_OFFLINE; hf download {wanted.name} fetches it first"
    lines = str(error).strip().splitlines()
    found = lines[0].removeprefix("Got: ") if lines else type(error).__name__
    return SourceError(what, where=wanted, found=short(found), do=do)
