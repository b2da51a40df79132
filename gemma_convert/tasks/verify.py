"""Proves a converted checkpoint by reading it again: every region, carried tensor and kept file."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from gemma_convert.arrays.checksums import checksum
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec, rounds
from gemma_convert.arrays.values import Array, bits, convert, restore_exactly
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.native import (
    NativeSource,
    StoredArray,
    copies_by_array,
    for_each_part,
    plan_native,
    source_part,
)
from gemma_convert.checkpoint.original import open_original
from gemma_convert.engine.publishing import ProgressFactory
from gemma_convert.engine.resumable import filling
from gemma_convert.engine.transfer import Transfer
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.layouts.registry import load_layout, open_native
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box, Ranges, RegionCopy
from gemma_convert.model.huggingface_files import INDEX, SINGLE
from gemma_convert.output import NoProgress, Progress, shown
from gemma_convert.stores.remote.locations import local
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class VerifyReport:
    """What was read again. `different` names what is not as it should be, and how."""

    path: str
    against: str
    checked: int
    bytes: int
    different: dict[str, str]
    within_rounding: int
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.different

    def as_json(self) -> dict[str, object]:
        """The report for `--json`."""
        return {"schema": "gemma-convert/verify/1", **asdict(self), "passed": self.passed}


@dataclass
class Comparison:
    """What has been compared so far; used from several threads."""

    names: set[str] = field(default_factory=set)
    bytes: int = 0
    different: dict[str, str] = field(default_factory=dict)
    within_rounding: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def checked(self) -> int:
        return len(self.names)

    def note(self, name: str, count: int) -> None:
        """A tensor of `count` bytes is compared."""
        if name not in self.names:
            self.names.add(name)
            self.bytes += count

    def differ(self, name: str, how: str) -> None:
        """A tensor differs; the first way in which it does is kept."""
        self.names.add(name)
        self.different.setdefault(name, how)


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    progress: ProgressFactory | None = None,
) -> VerifyReport:
    """A report on whether the checkpoint at `path` is what it was converted from.

    A native checkpoint is compared with the Hugging Face folder `against`, bit for bit through the
    plan (within one rounding where the dtype rounds), or without one with the checksums of its
    manifest. An exported Hugging Face folder is compared with the native checkpoint `against`. Both
    may be folders, on the hub or in an object store (`gemma_convert.stores.remote.locations`).
    Raises SourceError where a side cannot be read or the two do not belong together.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        folder = local(path, stack)
        other = None if against is None else local(against, stack)
        found = _verify(folder, other, progress)
        return VerifyReport(
            path=shown(folder),
            against="the manifest's checksums" if other is None else shown(other),
            checked=found.checked,
            bytes=found.bytes,
            different=found.different,
            within_rounding=found.within_rounding,
            seconds=time.monotonic() - started,
        )


def _verify(path: Path, other: Path | None, progress: ProgressFactory | None) -> Comparison:
    if any((path / name).exists() for name in (SINGLE, INDEX)):
        if other is None:
            raise UsageError(
                "An exported Hugging Face folder is verified against its native source.",
                do="name the native checkpoint with --against",
            )
        return _verify_export(path, other, progress)
    if other is None:
        return _verify_manifest(path, progress)
    return _verify_native(path, other, progress)


def _verify_export(path: Path, native: Path, progress: ProgressFactory | None) -> Comparison:
    found = Comparison()
    with open_native(native) as whole, open_original(path, path) as exported:
        source = whole.without_towers() if exported.architecture.text_only else whole
        plan = plan_native(source, exported)
        with SafetensorsFolder(path) as reader, _bar(progress, "verify", plan.source_bytes) as bar:

            def compare(copy: RegionCopy, ranges: Ranges, values: Array) -> None:
                _compare_part(reader, copy, ranges, values, found, bar)

            for_each_part(source, copies_by_array(plan), compare)
            _compare_equal(reader, plan, found)
        _verify_carried_export(path, source.folder, found)
    return found


def _compare_equal(reader: SafetensorsFolder, plan: Plan, found: Comparison) -> None:
    """Tensors that the native side has once are alike on the Hugging Face side."""
    for name, other in plan.equal.items():
        found.note(name, reader.tensors[name].spec.nbytes)
        if _file_checksum(reader, name) != _file_checksum(reader, other):
            found.differ(name, f"is not {other}")


def _compare_part(
    reader: SafetensorsFolder,
    copy: RegionCopy,
    ranges: Ranges,
    values: Array,
    found: Comparison,
    bar: Progress,
) -> None:
    """Counts values of an export that are not the native ones, nor their nearest neighbours.

    A value is right where the native one converts to it, or where it converts to the native one.
    """
    tensor = reader.tensors[copy.source.tensor]
    part = source_part(copy, ranges, reader.mapped(tensor))
    back = restore_exactly(values, tensor.spec.dtype, copy.scale)
    wrong = bits(back) != bits(part)
    if wrong.any() or values.dtype != part.dtype or copy.scale is not None:
        again = np.empty(values.shape, values.dtype)
        convert(part, again, copy.scale)
        inexact = bits(again) != bits(values)
        wrong &= inexact
        with found.lock:
            found.within_rounding += int(np.count_nonzero(inexact & ~wrong))
    with found.lock:
        found.note(tensor.name, tensor.spec.nbytes)
        bar.advance(part.nbytes, tensor.name)
        if wrong.any():
            found.differ(tensor.name, f"{int(np.count_nonzero(wrong))} values differ")


def _verify_carried_export(path: Path, native: Path, found: Comparison) -> None:
    """Tensors that the native side does not hold, by the checksums of its manifest."""
    root = sidecar.sidecar_root(native)
    manifest = None if root is None else sidecar.read_manifest(root)
    entries = manifest.get("tensors") if manifest is not None else None
    if not isinstance(entries, dict):
        return
    with SafetensorsFolder(path) as reader:
        for name, entry in entries.items():
            tensor = reader.tensors.get(name)
            if tensor is None or entry["kept"] != "carried" or name in found.names:
                continue
            if tensor.spec.dtype == entry["dtype"]:
                found.note(name, tensor.spec.nbytes)
                if _file_checksum(reader, name) != entry["xxh3_128"]:
                    found.differ(name, "is not what the native checkpoint carries")


def _verify_manifest(path: Path, progress: ProgressFactory | None) -> Comparison:
    with open_native(path) as native:
        root = sidecar.sidecar_root(native.folder)
        manifest = None if root is None else sidecar.read_manifest(root)
        if root is None or manifest is None:
            raise SourceError(
                "There is no manifest to verify this checkpoint by.",
                where=path,
                do="name the Hugging Face source with --against",
            )
        found, regions = Comparison(), manifest.get("regions")
        if not isinstance(regions, dict):
            raise SourceError("The manifest has no checksums of regions.", where=root)
        total = sum(spec.nbytes for spec in native.specs.values())
        with _bar(progress, "verify", total) as bar:
            for name in regions:
                if name in native.specs:
                    _verify_regions(native, name, regions[name], found, bar)
                elif name not in native.beside:
                    found.differ(name, "is missing")
        for name in native.specs:
            if name not in regions:
                found.differ(name, "is not in the manifest")
        with open_original(native.folder, None) as original:
            _verify_metadata(native, plan_native(native, original), found)
    _verify_sidecar(root, manifest, found)
    return found


def _verify_metadata(native: NativeSource, plan: Plan, found: Comparison) -> None:
    """The files that tell the framework what the arrays are."""
    for place, how in load_layout(native.layout).check_metadata(native.folder, plan).items():
        found.differ(place, how)


def _verify_regions(
    native: NativeSource, name: str, regions: list[Any], found: Comparison, bar: Progress
) -> None:
    array = native.open_whole(name, 0)
    covered = 0
    for box, expected in regions:
        where: Box = tuple((int(start), int(length)) for start, length in box)
        try:
            values = array.read(where)
        except SourceError as error:
            found.differ(name, f"cannot be read: {error.found}")
            return
        covered += values.size
        bar.advance(values.nbytes, name)
        if checksum(values) != expected:
            found.differ(name, f"differs from its checksum at {[start for start, _ in where]}")
    found.note(name, array.spec.nbytes)
    if covered != array.spec.size:
        found.differ(name, "has another shape than when it was written")


def _verify_sidecar(root: Path, manifest: Mapping[str, Any], found: Comparison) -> None:
    """The carried tensors and the kept files, by the manifest's checksums."""
    folder = root / sidecar.FOLDER
    for name, expected in manifest.get("files_sha256", {}).items():
        file = folder / name
        if not file.is_file() or file.is_symlink():
            found.differ(f"{sidecar.FOLDER}/{name}", "is missing")
        elif sidecar.sha256(file) != expected:
            found.differ(f"{sidecar.FOLDER}/{name}", "is not what was kept")
    carried = [n for n, e in manifest.get("tensors", {}).items() if e["kept"] == "carried"]
    if not carried:
        return
    try:
        reader = SafetensorsFolder(folder / sidecar.OWN, [sidecar.CARRIED])
    except SourceError as error:
        found.differ(sidecar.CARRIED, error.what)
        return
    with reader:
        for name in carried:
            if name not in reader.tensors:
                found.differ(name, "is not carried any more")
                continue
            found.note(name, reader.tensors[name].spec.nbytes)
            if _file_checksum(reader, name) != manifest["tensors"][name]["xxh3_128"]:
                found.differ(name, "is not what was carried")


def _verify_native(path: Path, source: Path, progress: ProgressFactory | None) -> Comparison:
    found = Comparison()
    with (
        open_native(path) as native,
        SafetensorsFolder(source) as reader,
        open_original(native.folder, source) as original,
    ):
        plan = _stored_plan(plan_native(native, original), native)
        writer = _Comparer(native, plan, found)
        with _bar(progress, "verify", plan.source_bytes) as bar:
            Transfer(plan, reader, writer, bar).run()
        for name, target in plan.filled.items():
            for box, values in filling(target):
                writer.write(name, box, values)
        _compare_equal(reader, plan, found)
        _verify_metadata(native, plan, found)
        root = sidecar.sidecar_root(native.folder)
        if root is not None:
            _verify_kept(root, source, reader, plan, found)
    return found


def _stored_plan(plan: Plan, native: NativeSource) -> Plan:
    """The plan with the dtypes that the arrays really have."""
    targets = {
        name: replace(target, spec=TensorSpec(native.specs[name].dtype, target.spec.shape))
        for name, target in plan.targets.items()
    }
    return replace(plan, targets=targets, policy=DTypePolicy())


class _Comparer:
    """A writer that compares: what would be written against what is stored."""

    def __init__(self, native: NativeSource, plan: Plan, found: Comparison) -> None:
        self.native, self.plan, self.found = native, plan, found
        self._arrays: dict[str, StoredArray] = {}
        self._lock = threading.Lock()

    def write(self, name: str, box: Box, values: Array) -> Future[None]:
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = self.native.open_whole(name, CACHE_BYTES)
                self.found.note(name, self._arrays[name].spec.nbytes)
            array = self._arrays[name]
        future: Future[None] = Future()
        present = bits(array.read(box))
        count = int(np.count_nonzero(present != bits(values)))
        if count and self._rounded(name):
            near = np.abs(present.astype(np.int64) - bits(values).astype(np.int64))
            with self._lock:
                self.found.within_rounding += count - int(np.count_nonzero(near > 1))
            count = int(np.count_nonzero(near > 1))
        if count:
            with self._lock:
                where = [start for start, _ in box]
                self.found.differ(name, f"{count} values differ in the region at {where}")
        future.set_result(None)
        return future

    def _rounded(self, name: str) -> bool:
        target = self.plan.targets[name]
        return rounds("float32", target.spec.dtype, scaled=target.scale is not None) and (
            target.scale is not None
        )


def _verify_kept(
    root: Path, source: Path, reader: SafetensorsFolder, plan: Plan, found: Comparison
) -> None:
    """The sidecar against the source itself: carried tensors, and every other file."""
    folder = root / sidecar.FOLDER
    own = folder / sidecar.OWN
    files, _ = sidecar.other_files(source, [shard.file for shard in reader.shards])
    for file in files:
        kept = folder / file
        if not kept.is_file() or sidecar.sha256(kept) != sidecar.sha256(source / file):
            found.differ(f"{sidecar.FOLDER}/{file}", "is not the source's")
    for shard in reader.shards:
        header = own / sidecar.HEADERS / f"{shard.file}.header"
        if not header.is_file() or header.read_bytes() != shard.header:
            found.differ(f"{shard.file}.header", "is not the source's")
    if not plan.carried:
        return
    try:
        carried = SafetensorsFolder(own, [sidecar.CARRIED])
    except SourceError as error:
        found.differ(sidecar.CARRIED, error.what)
        return
    with carried:
        for name in plan.carried:
            if (
                name not in carried.tensors
                or carried.tensors[name].spec != reader.tensors[name].spec
            ):
                found.differ(name, "is not carried")
                continue
            found.note(name, reader.tensors[name].spec.nbytes)
            if _file_checksum(carried, name) != _file_checksum(reader, name):
                found.differ(name, "is carried with other values")


def _file_checksum(reader: SafetensorsFolder, name: str) -> str:
    digest = xxhash.xxh3_128()
    for piece in reader.pieces(name):
        digest.update(piece)
    return digest.hexdigest()


def _bar(progress: ProgressFactory | None, title: str, total: int) -> Any:
    from contextlib import nullcontext

    return progress(title, total) if progress else nullcontext(NoProgress())
