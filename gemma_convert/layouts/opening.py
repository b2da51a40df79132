"""One way to open a native checkpoint: its arrays, its original, and the seal of both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.manifest import PLACE, read_manifest
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.original import Original, is_huggingface, open_original
from gemma_convert.checkpoint.seal import refuse_carried, refuse_damage
from gemma_convert.checkpoint.sealed_arrays import SealedArrays
from gemma_convert.layouts.registry import open_native
from gemma_convert.mapping.declared import layout_names
from gemma_convert.mapping.table import load_table


@dataclass(frozen=True)
class Checkpoint:
    """A native checkpoint that is open for reading.

    `arrays` compares what is read with the seal; None where the checkpoint has none. `added_files`
    are those that nobody sealed, `accepted` those that may be damaged.
    """

    native: NativeSource
    original: Original
    arrays: SealedArrays | None
    added_files: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    def check_carried(self, checksums: Mapping[str, str]) -> None:
        """Raises SourceError where carried tensors with these checksums are not the sealed ones."""
        root = self.original.folder.parent
        refuse_carried(root, self.original.manifest, checksums, self.accepted)

    def read_rest(self, names: Iterable[str]) -> None:
        """Reads what nobody has read of these arrays, so that all of each is compared."""
        if self.arrays is not None:
            self.arrays.read_rest(names)

    @property
    def changed_arrays(self) -> tuple[str, ...]:
        """Arrays that were read and are not what was sealed: trained, or damaged."""
        return () if self.arrays is None else tuple(sorted(self.arrays.different))


def check_seal(path: Path) -> None:
    """Nothing where the files of the native checkpoint at `path` are what was sealed, or unsealed.

    Raises SourceError for others. Values of arrays are not read, and settings may be edited, not
    lost: who runs the checkpoint runs it by them.
    """
    root = sidecar.sidecar_root(path)
    manifest = None if root is None else read_manifest(root)
    if root is not None and manifest is not None:
        settings = [name for name in _settings(manifest) if (root / name).is_file()]
        refuse_damage(root, manifest, settings)


def _settings(manifest: Mapping[str, Any]) -> list[str]:
    """The settings files of a checkpoint, by the table of its layout."""
    if manifest.get("layout") not in layout_names():
        return []
    files = load_table(manifest["layout"]).files
    patterns = () if files is None or files.needed else files.allowed
    names = manifest.get("files", {})
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]


def open_checkpoint(
    path: Path,
    like: Path | None,
    stack: ExitStack,
    *,
    block_bytes: int | None = None,
    accept: Sequence[str] = (),
) -> Checkpoint:
    """The checkpoint at `path` of whatever layout, open until `stack` is closed.

    `like` names its original; by default its sidecar says what that was. Raises SourceError where
    a file of the checkpoint or of its original is not what was sealed, unless `accept` names it.
    """
    added: dict[str, str] = {}
    root = sidecar.sidecar_root(path)
    manifest = None if root is None else read_manifest(root, damaged=PLACE in accept)
    if root is not None and manifest is not None:
        added = refuse_damage(root, manifest, accept)
    native = stack.enter_context(open_native(path, block_bytes))
    if like is not None and not is_huggingface(like):
        other = sidecar.sidecar_root(like)
        if other is not None and other != root:
            theirs = read_manifest(other, damaged=PLACE in accept)
            added |= refuse_damage(other, theirs or {}, accept, sidecar.FOLDER + "/")
    original = stack.enter_context(open_original(native.folder, like))
    arrays = None
    if manifest is not None:
        arrays = SealedArrays(native, manifest)
        native = arrays.native
    return Checkpoint(native, original, arrays, tuple(added), tuple(accept))
