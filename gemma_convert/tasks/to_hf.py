"""Exports a native checkpoint to Hugging Face: the same tables read from right to left."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import xxhash

from gemma_convert.arrays.buffers import ThreadBuffer
from gemma_convert.arrays.dtypes import Choice, numpy_dtype
from gemma_convert.arrays.values import (
    Array,
    bits,
    convert,
    count_rounded,
    keep_exact,
    keep_originals,
    restore_exactly,
)
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.native import (
    NativeSource,
    copies_by_array,
    for_each_part,
    plan_native,
    source_part,
)
from gemma_convert.checkpoint.original import Original, open_original
from gemma_convert.engine.journal import Journal, journal_key
from gemma_convert.engine.memory import block_bytes
from gemma_convert.engine.publishing import ProgressFactory, publish
from gemma_convert.engine.staging import check_apart, check_space, check_target
from gemma_convert.layouts.registry import open_native
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Ranges, RegionCopy
from gemma_convert.output import Progress, shown
from gemma_convert.stores.remote.locations import check_remote_options, local, local_target
from gemma_convert.stores.safetensors.writer import SafetensorsWriter
from gemma_convert.tasks.completed import export_stands, strangers_of_export
from gemma_convert.tasks.export_plan import Export, KVShared, plan_export
from gemma_convert.tasks.reports import peak_memory
from gemma_convert.version import __version__

PIECE_BYTES = 16 << 20
SHORT_RUN_BYTES = 4 << 10
SPARE_BYTES = 4 << 20


@dataclass(frozen=True)
class ToHFReport:
    """What an export did. `identical` counts tensors whose checksum is the manifest's."""

    source: str
    target: str
    layout: str
    scanned: bool
    family: str
    dry_run: bool
    tensors: int
    tensors_from_original: int
    bytes_written: int
    shards: tuple[str, ...]
    rounded: dict[str, int]
    identical: int
    different: tuple[str, ...]
    unchecked: int
    largest_decode_bytes: int
    files: tuple[str, ...]
    seconds: float
    bytes_per_second: float
    peak_memory_bytes: int
    already_complete: bool = False
    """With `resume`: the target was there, and is what this run would have written."""

    @property
    def bit_for_bit(self) -> bool:
        """Whether every tensor is known to equal the original's, bit for bit."""
        return not self.dry_run and self.identical == self.tensors

    def as_json(self) -> dict[str, object]:
        """The report for `--json`."""
        return {"schema": "gemma-convert/to-hf/1", **asdict(self), "bit_for_bit": self.bit_for_bit}


def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    dtype: Choice = "keep",
    max_shard_size: int | None = None,
    kv_shared: KVShared = "keep",
    text_only: bool = False,
    memory: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressFactory | None = None,
) -> ToHFReport:
    """A report of the export of a native checkpoint to Hugging Face.

    `like` names the original, or a converted checkpoint of it; by default the sidecar of `source`
    says what the original was. Each may be a folder or in an object store, and what is read also
    on the hub (`gemma_convert.stores.remote.locations`). Raises SourceError, TargetError or
    UsageError with one clear message; then nothing is left behind.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        output = local_target(target, stack)
        check_remote_options(output, resume=resume)
        folder = local(source, stack)
        named = None if like is None else local(like, stack)
        native = stack.enter_context(open_native(folder, block_bytes(memory)))
        original = stack.enter_context(open_original(native.folder, named))
        plan = plan_native(native, original)
        export = plan_export(plan, original, dtype, max_shard_size, kv_shared, text_only)
        job = _Export(native, original, plan, export)
        strangers = strangers_of_export(folder, original, export)
        if not dry_run:
            check_apart(folder, output)
            check_apart(original.folder, output)
            if resume and export_stands(output, folder, original, export):
                report = job.report(folder, output, started, dry_run=False)
                return replace(report, already_complete=True, bytes_per_second=0.0)
            check_target(output, overwrite=overwrite, strangers=strangers)
            check_space(output, export.nbytes + export.file_bytes(original.folder) + SPARE_BYTES)
            publish(
                output,
                job.key,
                job.write,
                title="to huggingface",
                total=export.nbytes,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
                strangers=strangers,
                receipt=True,
            )
        return job.report(folder, output, started, dry_run=dry_run)


class _Export:
    """One export: native arrays in, tensors of the shards out."""

    def __init__(
        self, native: NativeSource, original: Original, plan: Plan, export: Export
    ) -> None:
        self.native, self.original, self.plan, self.export = native, original, plan, export
        self.rounded: dict[str, int] = {}
        self.identical = 0
        self.different: list[str] = []
        self.unchecked = 0
        self._lock = threading.Lock()
        self._buffer = ThreadBuffer()
        self.largest_decode = native.largest_chunk(list(plan.targets))

    def write(self, folder: Path, progress: Progress) -> None:
        """Writes every shard and every other file into `folder`."""
        sidecar.copy_files(self.original.folder, folder, self.export.files)
        for name, text in self.export.edited.items():
            (folder / name).write_bytes(text.encode())
        journal = Journal(folder, self.key)
        with SafetensorsWriter(folder, self.export.shards) as writer:
            groups = self._groups()
            for name in self._resume(journal, writer, progress):
                del groups[name]

            def write(copy: RegionCopy, ranges: Ranges, values: Array) -> None:
                self._write_part(copy, ranges, values, writer, progress)

            def finished(name: str) -> None:
                copies = copies_of[name]
                names = {self.export.names[copy.source.tensor] for copy in copies}
                rounded = {n: self.rounded[n] for n in names if n in self.rounded}
                checksums = [_part_checksum(copy, writer, self.export.names) for copy in copies]
                journal.add({"array": name, "rounded": rounded, "checksums": checksums})

            copies_of = dict(groups)
            for_each_part(self.native, groups, write, finished)
            for name, origin in self.export.stored.items():
                self._write_stored(name, origin, writer, progress)
            for name, origin in self.export.equal.items():
                self._write_equal(name, origin, writer, progress)
            self.native.check_unchanged()
            self._apply_exceptions(writer)
            self._check(writer)

    @property
    def key(self) -> str:
        """What must be the same for an interrupted export to be continued."""
        return journal_key(
            {
                "version": __version__,
                "native": (shown(self.native.folder), self.native.fingerprint),
                "original": shown(self.original.folder.absolute()),
                "shards": [
                    (shard.file, hashlib.sha256(shard.header).hexdigest())
                    for shard in self.export.shards
                ],
            }
        )

    def _groups(self) -> dict[str, list[RegionCopy]]:
        """Native array → its copies into tensors that are exported."""
        names = self.export.names
        groups = {
            array: [copy for copy in copies if copy.source.tensor in names]
            for array, copies in copies_by_array(self.plan).items()
        }
        return {array: copies for array, copies in groups.items() if copies}

    def _resume(self, journal: Journal, writer: SafetensorsWriter, progress: Progress) -> list[str]:
        """Arrays that an earlier run had exported, if their parts, read again, are the same."""
        done = []
        groups = self._groups()
        for entry in journal.entries:
            name, rounded = str(entry.get("array")), entry.get("rounded")
            copies = groups.get(name, [])
            checksums = [_part_checksum(copy, writer, self.export.names) for copy in copies]
            if not isinstance(rounded, dict) or not all(
                isinstance(n, int) for n in rounded.values()
            ):
                continue
            if copies and checksums == entry.get("checksums"):
                done.append(name)
                for tensor, count in rounded.items():
                    self.rounded[tensor] = count
                progress.advance(self.plan.targets[name].spec.nbytes, name)
        return done

    def _write_part(
        self,
        copy: RegionCopy,
        ranges: Ranges,
        values: Array,
        writer: SafetensorsWriter,
        progress: Progress,
    ) -> None:
        """Puts one part of a native array into its place in a Hugging Face tensor."""
        name = self.export.names[copy.source.tensor]
        dtype = writer.spec(name).dtype
        back = restore_exactly(values, dtype, copy.scale)
        if copy.scale is not None:
            keep_exact(values, back, self.original.specs[copy.source.tensor].dtype, copy.scale)
        if copy.scale is not None and self.original.holds(copy.source.tensor):
            self._keep_originals(copy, ranges, values, back)
        lost = count_rounded(values, back, copy.scale)
        self._put(copy, ranges, back, writer)
        if lost:
            with self._lock:
                self.rounded[name] = self.rounded.get(name, 0) + lost
        with self._lock:
            progress.advance(back.nbytes, name)

    def _put(
        self, copy: RegionCopy, ranges: Ranges, values: Array, writer: SafetensorsWriter
    ) -> None:
        """Writes values in the native order of axes: long runs one by one, short ones mapped."""
        name = self.export.names[copy.source.tensor]
        run, places = copy.source.runs(ranges)
        if run * values.itemsize < SHORT_RUN_BYTES:
            convert(values, source_part(copy, ranges, writer.array(name)), None)
            with self._lock:
                writer.let_go(values.nbytes)
            return
        ordered = values.transpose(np.argsort(copy.permutation))
        if not ordered.flags.c_contiguous:
            ordered = self._buffer.array(ordered.shape, values.dtype)
            convert(values.transpose(np.argsort(copy.permutation)), ordered, None)
        flat = ordered.reshape(-1)
        for number, place in enumerate(places):
            writer.write(name, place, flat[number * run : (number + 1) * run])

    def _keep_originals(self, copy: RegionCopy, ranges: Ranges, values: Array, back: Array) -> None:
        """Where the original still converts to the native value, it is what comes back."""
        spec = self.original.specs[copy.source.tensor]
        if copy.permutation != tuple(range(len(copy.permutation))) or back.dtype.name != spec.dtype:
            return
        row = prod(spec.shape[1:])
        start, stop = ranges.get(copy.source.axes[0], (0, spec.shape[0]))
        rows = self.original.read(copy.source.tensor, start * row, (stop - start) * row)
        inner = {axis: span for axis, span in ranges.items() if axis != copy.source.axes[0]}
        stored = source_part(copy, inner, rows.reshape(stop - start, *spec.shape[1:]))
        keep_originals(stored, values, back, copy.scale)

    def _write_stored(
        self, name: str, origin: str, writer: SafetensorsWriter, progress: Progress
    ) -> None:
        """Copies a tensor that the original has and the native side has not."""
        spec, dtype = self.original.specs[origin], numpy_dtype(writer.spec(name).dtype)
        step = max(1, PIECE_BYTES // spec.itemsize)
        for start in range(0, spec.size, step):
            values = self.original.read(origin, start, min(step, spec.size - start))
            piece = np.empty(values.shape, dtype)
            convert(values, piece, None)
            writer.write(name, start, piece)
            lost = count_rounded(values, piece, None)
            if lost:
                self.rounded[name] = self.rounded.get(name, 0) + lost
            progress.advance(piece.nbytes, name)

    def _write_equal(
        self, name: str, origin: str, writer: SafetensorsWriter, progress: Progress
    ) -> None:
        """A tied output head is the embedding once more; shared bounds are alike."""
        source = writer.array(origin).reshape(-1)
        step = max(1, PIECE_BYTES // source.itemsize)
        for start in range(0, source.size, step):
            writer.write(name, start, source[start : start + step])
            writer.let_go(step * source.itemsize)
            progress.advance(min(step, source.size - start) * source.itemsize, name)

    def _apply_exceptions(self, writer: SafetensorsWriter) -> None:
        """Puts back values that the native dtype could not hold, where they are still theirs."""
        for origin, (places, originals) in self.original.exceptions.items():
            name, source = self.export.names.get(origin), self.plan.sources.get(origin)
            if name is None or source is None:
                continue
            copy, dtype = source.copies[0], writer.spec(name).dtype
            stored = originals.view(numpy_dtype(source.spec.dtype))
            native = np.empty(
                stored.shape, numpy_dtype(self.native.specs[copy.target.tensor].dtype)
            )
            convert(stored, native, copy.scale)
            back = restore_exactly(native, dtype, copy.scale)
            wanted = np.empty(stored.shape, numpy_dtype(dtype))
            convert(stored, wanted, None)
            flat = bits(writer.array(name).reshape(-1))
            ours = flat[places] == bits(back)
            flat[places[ours]] = bits(wanted)[ours]
            counted = count_rounded(native[ours], back[ours], copy.scale)
            if counted:
                self.rounded[name] -= counted
                self.rounded = {key: count for key, count in self.rounded.items() if count}

    def _check(self, writer: SafetensorsWriter) -> None:
        """Compares every tensor with the checksum that the manifest has of it."""
        renamed = {new: old for old, new in self.export.names.items()}
        for shard in self.export.shards:
            for tensor in shard.tensors:
                known = self.original.checksums.get(renamed[tensor.name])
                if known is None:
                    self.unchecked += 1
                elif _checksum(writer, tensor.name) == known:
                    self.identical += 1
                else:
                    self.different.append(tensor.name)

    def report(self, source: Path, target: Path, started: float, *, dry_run: bool) -> ToHFReport:
        """The report of this export."""
        seconds = time.monotonic() - started
        return ToHFReport(
            source=shown(source),
            target=shown(target),
            layout=self.plan.layout,
            scanned=self.plan.scanned,
            family=self.plan.architecture.family,
            dry_run=dry_run,
            tensors=len(self.export.names),
            tensors_from_original=len(self.export.stored),
            bytes_written=self.export.nbytes,
            shards=tuple(shard.file for shard in self.export.shards),
            rounded=self.rounded,
            identical=self.identical,
            different=tuple(self.different),
            unchecked=self.unchecked,
            largest_decode_bytes=self.largest_decode,
            files=tuple(sorted({*map(str, self.export.files), *self.export.edited})),
            seconds=seconds,
            bytes_per_second=0.0 if dry_run else self.export.nbytes / seconds,
            peak_memory_bytes=peak_memory(),
        )


def _part_checksum(copy: RegionCopy, writer: SafetensorsWriter, names: Mapping[str, str]) -> str:
    """Checksum of the part of a Hugging Face tensor that one copy writes, read from its file."""
    part = source_part(copy, {}, writer.array(names[copy.source.tensor]))
    part = part.transpose(np.argsort(copy.permutation))
    digest = xxhash.xxh3_128()
    rows = part.reshape(1) if not part.ndim else part
    for row in rows if part.ndim > 1 else [rows]:
        digest.update(np.ascontiguousarray(row).reshape(-1).view(np.uint8).data)
    writer.let_go(part.nbytes)
    return digest.hexdigest()


def _checksum(writer: SafetensorsWriter, name: str) -> str:
    digest, data = xxhash.xxh3_128(), writer.array(name).reshape(-1).view(np.uint8)
    for start in range(0, data.size, PIECE_BYTES):
        digest.update(data[start : start + PIECE_BYTES].data)
        writer.let_go(PIECE_BYTES)
    return digest.hexdigest()
