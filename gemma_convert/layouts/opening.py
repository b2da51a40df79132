"""One way to open a native checkpoint: its arrays, its original, and the seal of both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_original import AdapterBase, adapter_original
from gemma_convert.checkpoint.manifest import PLACE, read_manifest
from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.original import Original, open_original
from gemma_convert.checkpoint.seal import refuse_carried, refuse_damage
from gemma_convert.checkpoint.sealed_arrays import SealedArrays
from gemma_convert.checkpoint.text_original import dtype_of, text_original
from gemma_convert.errors import UsageError
from gemma_convert.files.given_settings import GivenSettings, given_settings
from gemma_convert.layouts.registry import open_native, read_facts, read_settings
from gemma_convert.mapping.config_from_settings import config_from_settings
from gemma_convert.mapping.declared import layout_names
from gemma_convert.mapping.native_facts import NativeFacts
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import load_config
from gemma_convert.model.huggingface_files import CONFIG
from gemma_convert.stores.weights import is_huggingface


@dataclass(frozen=True)
class Checkpoint:
    """A native checkpoint that is open for reading.

    `arrays` compares what is read with the seal; None where the checkpoint has none. `settings` are
    those that its framework was told, if not what lies beside it. `added_files` are those that
    nobody sealed, `accepted` those that may be damaged.
    """

    native: NativeSource
    original: Original
    arrays: SealedArrays | None
    settings: GivenSettings
    added_files: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @cached_property
    def facts(self) -> NativeFacts | None:
        """The model as the framework was told it; None where nobody has told it anything.

        Raises SourceError for settings that cannot be read, or are those of another model.
        """
        where = self.original.folder / CONFIG
        if self.native.adapter is not None:
            return None
        folder, config = self.native.folder, load_config(where)
        facts = read_facts(folder, config, where, self.settings, usual=False)
        if facts is None or not facts.settings.written:
            return None
        facts.check_single()
        return facts

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
        refuse_damage(root, manifest, _settings(root, manifest))


def _settings(root: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The settings files that a checkpoint has, by the table of its layout."""
    if manifest.get("layout") not in layout_names():
        return []
    files = load_table(manifest["layout"]).files
    patterns = () if files is None or files.needed else files.allowed
    return [
        name
        for name in manifest.get("files", {})
        if any(re.fullmatch(pattern, name) for pattern in patterns) and (root / name).is_file()
    ]


def open_checkpoint(
    path: Path,
    like: Path | None,
    stack: ExitStack,
    *,
    block_bytes: int | None = None,
    accept: Sequence[str] = (),
    settings: Sequence[str] = (),
    base: AdapterBase | None = None,
) -> Checkpoint:
    """The checkpoint at `path` of whatever layout, open until `stack` is closed.

    `like` names its original; by default its sidecar says what that was. `settings` are what its
    framework was told (files, or KEY=VALUE), if not what lies beside it. Raises SourceError where
    a file of the checkpoint or of its original is not what was sealed, unless `accept` names it;
    settings may be edited, not lost. Where there is no original, `settings` say what the text
    model is, or `base` what the model of an adapter is.
    """
    added: dict[str, str] = {}
    root = sidecar.sidecar_root(path)
    manifest = None if root is None else read_manifest(root, damaged=PLACE in accept)
    if root is not None and manifest is not None:
        added = refuse_damage(root, manifest, (*accept, *_settings(root, manifest)))
    native = stack.enter_context(open_native(path, block_bytes))
    if like is not None and not is_huggingface(like):
        other = sidecar.sidecar_root(like)
        if other is not None and other != root:
            theirs = read_manifest(other, damaged=PLACE in accept)
            added |= refuse_damage(other, theirs or {}, accept, sidecar.FOLDER + "/")
    given = given_settings(settings)
    made = None
    if like is None and root is None and native.adapter is not None:
        made = adapter_original(native, base, stack)
    elif base is not None:
        raise UsageError(
            "--base is for an adapter that has no sidecar.", where=path, do="leave out --base"
        )
    elif like is None and root is None and given:
        made = _text_original(native, given, stack)
    original = made or stack.enter_context(open_original(native.folder, like))
    arrays = None
    if manifest is not None:
        arrays = SealedArrays(native, manifest)
        native = arrays.native
    return Checkpoint(native, original, arrays, given, tuple(added), tuple(accept))


def _text_original(native: NativeSource, given: GivenSettings, stack: ExitStack) -> Original | None:
    """The text model that settings describe; None where nobody has told the framework anything."""
    told = read_settings(native.folder, given, None)
    if told is None or not told[1].written:
        return None
    dtype = dtype_of(native)
    return text_original(config_from_settings(*told, dtype), dtype, stack)
