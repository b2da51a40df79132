"""A native checkpoint against its own seal: every array, tensor and file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.manifest import OLDER, PLACE, is_sealed, read_manifest
from gemma_convert.checkpoint.native import NativeSource, plan_native
from gemma_convert.checkpoint.original import open_original
from gemma_convert.checkpoint.seal import CHANGED, damage, sealed_files
from gemma_convert.checkpoint.sealed_arrays import SealedArrays
from gemma_convert.engine.comparing import Comparison
from gemma_convert.errors import SourceError
from gemma_convert.files.unfinished import refuse_unfinished
from gemma_convert.layouts.registry import load_layout, open_native
from gemma_convert.mapping.plan import Plan
from gemma_convert.progress import Listener, working
from gemma_convert.stores.safetensors.reader import SafetensorsFolder


def verify_seal(
    path: Path, other: Path | None, found: Comparison, progress: Listener | None
) -> None:
    """Compares every part of a native checkpoint with its seal.

    Arrays are left out where there is the `other` checkpoint, against which they are compared.
    """
    root = sidecar.sidecar_root(path)
    manifest = None if root is None else read_manifest(root, damaged=True)
    if root is not None and manifest is not None:
        refuse_unfinished(root)
        _verify_files(root, manifest, found)
    with open_native(path) as native:
        if root is None or manifest is None:
            _without_seal(path, native, other, found)
            return
        _verify_array_metadata(native, manifest, found)
        if other is None:
            _verify_arrays(native, manifest, found, progress)
            with open_original(native.folder, None) as original:
                verify_metadata(native, plan_native(native, original), found)
    _verify_carried(root, manifest, found)


def _without_seal(path: Path, native: NativeSource, other: Path | None, found: Comparison) -> None:
    if native.converted:
        found.differ(
            f"{sidecar.FOLDER}/",
            "is missing: the sidecar with everything that the arrays do not have",
        )
    elif other is None:
        raise SourceError(
            "The checkpoint has no manifest, so it needs a checkpoint to be compared with.",
            where=path,
            do="name the Hugging Face source with --against",
        )


def _verify_files(root: Path, manifest: Mapping[str, Any], found: Comparison) -> None:
    """Every file, by the seal; the manifest by its own last line."""
    for name, how in damage(root, manifest).items():
        found.differ(name, how)
    if manifest["schema"] == OLDER:
        found.notes.append(
            "The manifest is of version 1, which has no digests of shard headers, single values, "
            "the framework's files and itself: these are not verified. Convert again to have them."
        )
        found.files += len(manifest.get("files_sha256", {}))
    elif not is_sealed((root / PLACE).read_bytes()):
        found.differ(PLACE, CHANGED)
    for file in sealed_files(manifest).values():
        if file.values_from is None:
            found.note_file(file.size)


def _verify_array_metadata(
    native: NativeSource, manifest: Mapping[str, Any], found: Comparison
) -> None:
    sealed = manifest.get("array_metadata", {})
    now = native.array_metadata() if sealed else {}
    for name, digest in sealed.items():
        if now.get(name) != digest:
            found.differ(name, "has other metadata than when it was written")


def _verify_arrays(
    native: NativeSource,
    manifest: Mapping[str, Any],
    found: Comparison,
    progress: Listener | None,
) -> None:
    arrays = SealedArrays(native, manifest)
    with working(
        progress, "verify", sum(spec.nbytes for spec in native.specs.values())
    ) as shown_bar:
        arrays.read_rest(native.specs, shown_bar.advance)
    for name, spec in native.specs.items():
        found.note(name, spec.nbytes)
    for name, how in arrays.different.items():
        found.differ(name, how)
    for name in arrays.names:
        if name not in native.specs and name not in native.beside:
            found.differ(name, "is missing")


def verify_metadata(native: NativeSource, plan: Plan, found: Comparison) -> None:
    """The files that tell the framework what the arrays are."""
    for place, how in load_layout(native.layout).check_metadata(native.folder, plan).items():
        found.differ(place, how)


def _verify_carried(root: Path, manifest: Mapping[str, Any], found: Comparison) -> None:
    """The carried tensors, by the manifest's checksums."""
    sealed = {
        name: entry["xxh3_128"]
        for name, entry in manifest.get("tensors", {}).items()
        if entry["kept"] == "carried"
    }
    own = root / sidecar.FOLDER / sidecar.OWN
    compare_carried(
        own, sealed, lambda tensors, name: tensors.checksum(name) == sealed[name], found
    )


def compare_carried(
    own: Path,
    names: Collection[str],
    same: Callable[[SafetensorsFolder, str], bool],
    found: Comparison,
) -> None:
    """The tensors `names` of the sidecar `own`; `same` says whether one is what it should be."""
    if not names:
        return
    try:
        carried = SafetensorsFolder(own, [sidecar.CARRIED])
    except SourceError as error:
        found.differ(sidecar.CARRIED, error.what)
        return
    with carried:
        for name in names:
            if name not in carried.tensors:
                found.differ(name, "is not carried")
                continue
            found.note(name, carried.specs[name].nbytes)
            if not same(carried, name):
                found.differ(name, "differs from the tensor that was carried")
