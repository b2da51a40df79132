"""What the manifest of a converted checkpoint may say: checked once, so that nobody asks again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.stores.safetensors.reader import plain_name


def check_manifest(manifest: Mapping[str, Any], where: Path) -> None:
    """Raises SourceError where an entry is not what we write, or names a file elsewhere."""
    for key, valid in {**_LISTS, **_MAPPINGS}.items():
        kind = dict if key in _MAPPINGS else list
        entries = manifest.get(key, None if key == "shards" else kind())
        if not isinstance(entries, kind):
            raise _malformed(where, key, entries)
        for entry in entries.items() if isinstance(entries, dict) else entries:
            if not valid(entry):
                raise _malformed(where, key, entry)


def _malformed(where: Path, key: str, found: object) -> SourceError:
    return SourceError(
        "The manifest is malformed.",
        where=f"{where}, key {key}",
        found=short(found),
        do="convert the original again",
    )


def _shard(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and plain_name(entry["file"])
        and _size(entry.get("size"))
    )


def _tensor(entry: tuple[str, Any]) -> bool:
    _, facts = entry
    return (
        isinstance(facts, dict)
        and isinstance(facts.get("kept"), str)
        and isinstance(facts.get("dtype"), str)
        and isinstance(facts.get("xxh3_128", 0), str | None)
    )


def _file(entry: tuple[str, Any]) -> bool:
    name, digest = entry
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(digest, str)


def _regions(entry: tuple[str, Any]) -> bool:
    _, regions = entry
    return isinstance(regions, list) and all(
        isinstance(region, list)
        and len(region) == 2
        and isinstance(region[0], list)
        and all(isinstance(span, list) and len(span) == 2 for span in region[0])
        and all(_size(number) for span in region[0] for number in span)
        and isinstance(region[1], str)
        for region in regions
    )


def _size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


_LISTS: Mapping[str, Callable[[Any], bool]] = {
    "shards": _shard,
    "lossy_rows": lambda row: isinstance(row, dict) and isinstance(row.get("tensor"), str),
    "not_carried": lambda name: isinstance(name, str),
}
_MAPPINGS: Mapping[str, Callable[[Any], bool]] = {
    "tensors": _tensor,
    "files_sha256": _file,
    "regions": _regions,
}
