"""Which files a check was about: checksums that cost little, however large the checkpoint is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_convert.checkpoint.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from gemma_convert.checkpoint.sidecar import sidecar_root
from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import parse_json, read_regular
from gemma_convert.logits.golden import weight_files

_MANIFEST = "hf/gemma-convert/manifest.json"
_NATIVE_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "metadata.yaml")


@dataclass(frozen=True)
class Fingerprint:
    """The sha256 of a file, or of the parts of it that `what` names.

    `side` is original or native. What is sampled are 64 pieces spread evenly over a file, as a
    golden file has them.
    """

    side: str
    file: str
    what: str
    sha256: str


def fingerprints(hf: Path, native: Path) -> tuple[Fingerprint, ...]:
    """Fingerprints of the original in `hf` and the native checkpoint in `native`.

    The manifest of a conversion, which may stand up to two folders above, is there with the mapping
    tables that it names. Files that are missing, or cannot be read, are left out.
    """
    return (
        *_whole("original", hf, ("config.json",)),
        *_weights("original", hf),
        *_whole("native", native, _NATIVE_FILES),
        *_weights("native", native),
        *_manifest(native),
    )


def _whole(side: str, folder: Path, names: tuple[str, ...]) -> Iterator[Fingerprint]:
    for name in names:
        content = _content(folder / name)
        if content is not None:
            yield Fingerprint(side, name, "whole file", hashlib.sha256(content).hexdigest())


def _weights(side: str, folder: Path) -> Iterator[Fingerprint]:
    try:
        files = weight_files(folder)
    except SourceError:
        return
    for file in files:
        yield Fingerprint(side, file.name, "header", file.header)
        yield Fingerprint(side, file.name, "samples", file.samples)


def _manifest(native: Path) -> Iterator[Fingerprint]:
    root = sidecar_root(native)
    content = None if root is None else _content(root / _MANIFEST)
    if content is None:
        return
    yield Fingerprint("native", _MANIFEST, "whole file", hashlib.sha256(content).hexdigest())
    for table, digest in _tables(content).items():
        yield Fingerprint("native", str(table), "mapping table", str(digest))


def _tables(manifest: bytes) -> dict[object, object]:
    try:
        found = parse_json(manifest)["mapping_sha256"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(path: Path) -> bytes | None:
    try:
        return read_regular(path, path.name, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError, SourceError):
        return None
