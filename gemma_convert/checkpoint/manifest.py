"""The manifest of a converted checkpoint: written last, sealed by its own digest, checked once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.files.json_file import parse_object, read_regular
from gemma_convert.stores.safetensors.reader import plain_name

MANIFEST = "manifest.json"
PLACE = "hf/gemma-convert/manifest.json"
"""Where the manifest lies below the folder of a checkpoint."""

SCHEMA = "gemma-convert/manifest/3"
SEALED = (SCHEMA, "gemma-convert/manifest/2")
"""The second knows no version of the framework: it is the first one of the layout's table."""

OLDER = "gemma-convert/manifest/1"
"""It knows no digests of headers, exceptions, the framework's files and its own."""

MAX_BYTES = 256 << 20

_SEAL = ',\n "sha256": "{}"\n}}\n'


def write_manifest(path: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest; its last line is the sha256 of all bytes before it."""
    text = json.dumps({"schema": SCHEMA, **manifest}, indent=1).removesuffix("\n}")
    seal = _SEAL.format(hashlib.sha256(text.encode("ascii")).hexdigest())
    path.write_text(text + seal, encoding="ascii")


def read_manifest(checkpoint: Path, *, damaged: bool = False) -> dict[str, Any] | None:
    """The manifest of a converted checkpoint, or None where it has no sidecar.

    Raises SourceError for a manifest that is not one, and, unless it may be `damaged`, for one that
    is not what was written.
    """
    path = checkpoint / PLACE
    try:
        data = read_regular(path, "The manifest", MAX_BYTES)
    except FileNotFoundError:
        return None
    manifest = parse_object(data, "The manifest", path)
    if manifest.get("schema") not in (*SEALED, OLDER):
        raise SourceError(
            "The manifest has a version that this release cannot read.",
            where=path,
            expected=", ".join((*SEALED, OLDER)),
            found=short(manifest.get("schema")),
        )
    check_manifest(manifest, path)
    if not damaged and manifest["schema"] in SEALED and not is_sealed(data):
        raise SourceError(
            "The manifest was changed after the checkpoint was written.",
            where=path,
            do=("convert the original again", f"continue with --accept-damage {PLACE}"),
        )
    return manifest


def is_sealed(data: bytes) -> bool:
    """Whether the last line of a manifest is the digest of what stands before it."""
    seal = _SEAL.format("0" * 64)
    body = data[: -len(seal)]
    return data[len(body) :] == _SEAL.format(hashlib.sha256(body).hexdigest()).encode("ascii")


def check_manifest(manifest: Mapping[str, Any], where: Path) -> None:
    """Raises SourceError where an entry is not what we write, or names a file elsewhere."""
    version = manifest.get("framework_version")
    if not isinstance(version, str | None):
        raise _malformed(where, "framework_version", version)
    adapter = manifest.get("adapter")
    if adapter is not None and not _adapter(adapter):
        raise _malformed(where, "adapter", adapter)
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


def _adapter(facts: Any) -> bool:
    alpha = facts.get("alpha") if isinstance(facts, dict) else None
    return isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha < math.inf


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


def _sealed_file(entry: tuple[str, Any]) -> bool:
    name, facts = entry
    return (
        _file((name, ""))
        and isinstance(facts, dict)
        and isinstance(facts.get("sha256"), str)
        and _size(facts.get("size"))
        and (facts.get("values_from", "") is None or _size(facts.get("values_from")))
    )


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
    "files": _sealed_file,
    "array_metadata": lambda entry: isinstance(entry[1], str),
    "regions": _regions,
}
