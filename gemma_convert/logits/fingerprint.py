"""Which files a check was about: checksums that cost little, however large the checkpoint is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_convert.checkpoint.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from gemma_convert.checkpoint.sidecar import sidecar_root
from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import parse_json, read_regular
from gemma_convert.logits.golden import weight_files
from gemma_convert.model.adapter import ADAPTER_CONFIG
from gemma_convert.model.huggingface_files import CONFIG

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


def fingerprints(
    hf: Path, native: Path, adapter: Path | None = None, native_adapter: Path | None = None
) -> tuple[Fingerprint, ...]:
    """Fingerprints of the original in `hf` and the native checkpoint in `native`.

    The manifest of a conversion, which may stand up to two folders above, is there with the mapping
    tables that it names. Files that are missing, or cannot be read, are left out. Those of adapters
    of both stand below `adapter/`.
    """
    of_adapters = (
        *(() if adapter is None else _original(adapter)),
        *(() if native_adapter is None else _native(native_adapter)),
    )
    below = (replace(one, file=f"adapter/{one.file}") for one in of_adapters)
    return *_original(hf), *_native(native), *below


def _original(folder: Path) -> Iterator[Fingerprint]:
    yield from _whole("original", folder, (CONFIG, ADAPTER_CONFIG))
    yield from _weights("original", folder)


def _native(folder: Path) -> Iterator[Fingerprint]:
    yield from _whole("native", folder, _NATIVE_FILES)
    yield from _weights("native", folder)
    yield from _manifest(folder)


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
