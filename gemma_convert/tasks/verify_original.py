"""A native checkpoint against its original: what a conversion gives, and the sidecar."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from gemma_convert.arrays.checksums import checksum_of
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.adapter_base import named_folder
from gemma_convert.checkpoint.native import NativeSource, StoredArray, plan_native
from gemma_convert.checkpoint.original import Original, open_original, read_exceptions
from gemma_convert.engine.adapter_pairs import AdapterPairs
from gemma_convert.engine.casting import Casting, listed_values
from gemma_convert.engine.comparing import Comparing, Comparison
from gemma_convert.engine.merged import MergedTensors
from gemma_convert.engine.resumable import filling
from gemma_convert.engine.transfer import HuggingFaceTensors, Transfer
from gemma_convert.errors import SourceError
from gemma_convert.layouts.registry import open_native
from gemma_convert.mapping.plan import Plan
from gemma_convert.mapping.region import Box
from gemma_convert.model.adapter import is_adapter, read_adapter
from gemma_convert.progress import Listener, working
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.weights import open_weights
from gemma_convert.tasks.verify_seal import compare_carried, verify_metadata

OPEN_ARRAYS, CACHE_BYTES = 2, 48 << 20
"""How many arrays stay open, and what each may keep decoded of chunks that are not ours."""


def verify_original(
    path: Path,
    source: Path,
    base: Path | None,
    found: Comparison,
    progress: Listener | None,
) -> None:
    """Compares the arrays and the sidecar of the native checkpoint at `path` with `source`.

    Of an adapter `base` is the model, if not the one that it names; where the checkpoint is a
    model, it is compared with that model, the adapter merged into it.
    """
    with ExitStack() as stack:
        native = stack.enter_context(open_native(path))
        merged = is_adapter(source) and native.adapter is None
        folder = (base or named_folder(source)) if merged else source
        reader: HuggingFaceTensors = stack.enter_context(open_weights(folder))
        if merged:
            matrices = stack.enter_context(open_weights(source))
            pairs = AdapterPairs(reader.specs, matrices, read_adapter(source))
            reader = MergedTensors(reader, pairs)
        original = stack.enter_context(open_original(native.folder, folder, base))
        plan = _stored_plan(plan_native(native, original), native)
        stored, casting = _Stored(native, plan, found), Casting(plan.rounded)
        writer = Comparing(stored.read, found)
        with working(progress, "verify", plan.source_bytes) as shown_bar:
            Transfer(plan, reader, writer, casting, shown_bar).run()
        for name, target in plan.filled.items():
            for box, values in filling(target):
                writer.write(name, box, values)
        for name, other in plan.equal.items():
            found.note(name, reader.specs[name].nbytes)
            if checksum_of(reader.pieces(name)) != checksum_of(reader.pieces(other)):
                found.differ(name, f"is not {other}")
        verify_metadata(native, plan, found)
        root = sidecar.sidecar_root(native.folder)
        if root is not None:
            own = root / sidecar.FOLDER / sidecar.OWN
            _compare_files(root / sidecar.FOLDER, folder, original, found)
            whole = [name for name, losses in casting.losses.items() if losses.whole]

            def same(carried: SafetensorsFolder, name: str) -> bool:
                alike = carried.specs[name] == reader.specs[name]
                return alike and carried.checksum(name) == checksum_of(reader.pieces(name))

            compare_carried(own, [*plan.carried, *whole], same, found)
            _compare_exceptions(own, original, casting, found)


def _stored_plan(plan: Plan, native: NativeSource) -> Plan:
    """The plan with the dtypes that the arrays really have."""
    targets = {
        name: replace(target, spec=TensorSpec(native.specs[name].dtype, target.spec.shape))
        for name, target in plan.targets.items()
    }
    return replace(plan, targets=targets, policy=DTypePolicy())


class _Stored:
    """The arrays of a native checkpoint, opened when a value is asked for; few stay open.

    One box is read at a time, since tensorstore holds it twice meanwhile.
    """

    def __init__(self, native: NativeSource, plan: Plan, found: Comparison) -> None:
        def opened(name: str) -> StoredArray:
            ours = native.chunks[name] == plan.targets[name].chunk
            return native.opener(name, 0 if ours else CACHE_BYTES)

        self._array = lru_cache(OPEN_ARRAYS)(opened)
        self._found, self._lock = found, threading.Lock()

    def read(self, name: str, box: Box) -> Array:
        """The values in a box of an array."""
        with self._lock:
            array = self._array(name)
            self._found.note(name, array.spec.nbytes)
            return array.read(box)


def _compare_files(folder: Path, source: Path, original: Original, found: Comparison) -> None:
    """The other files and the headers of the shards."""
    for file in original.files:
        kept = folder / file
        if not kept.is_file() or sidecar.sha256(kept) != sidecar.sha256(source / file):
            found.differ(f"{sidecar.FOLDER}/{file}", "differs from the source")
    for shard in original.shards:
        name = f"{sidecar.FOLDER}/{sidecar.OWN}/{sidecar.HEADERS}/{shard.file}.header"
        header = folder.parent / name
        if not header.is_file() or header.read_bytes() != shard.header:
            found.differ(name, "differs from the source")


def _compare_exceptions(own: Path, original: Original, casting: Casting, found: Comparison) -> None:
    """The single values that do not come back from the arrays."""
    try:
        kept = read_exceptions(own, original.specs)
    except SourceError as error:
        found.differ(sidecar.EXCEPTIONS, error.what)
        return
    for name, ours in listed_values(casting.losses).items():
        theirs = kept.get(name)
        if theirs is None or not _equal(theirs, ours):
            found.differ(sidecar.EXCEPTIONS, f"lacks original values of {name}")


def _equal(one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    """Whether both list the same values, in whatever order."""
    (left, a), (right, b) = one, other
    first, second = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    return np.array_equal(left[first], right[second]) and np.array_equal(a[first], b[second])
