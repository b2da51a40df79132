"""A native checkpoint as a source: its arrays under the names of its table, read by region."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Protocol

from gemma_convert.arrays.dtypes import CONVERTED, DTypePolicy, TensorSpec, numpy_dtype
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.original import Original
from gemma_convert.errors import SourceError
from gemma_convert.files.identity import Unchanged
from gemma_convert.mapping.adapted import table_of
from gemma_convert.mapping.plan import Plan, SourceTensor
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.region import Box, Ranges
from gemma_convert.mapping.table import load_table
from gemma_convert.model.adapter import StoredAdapter
from gemma_convert.output import counted
from gemma_convert.stores.remote.mirror import remote_fingerprint

_ANOTHER_ORIGINAL = (
    "name the Hugging Face checkpoint of the same model with --like",
    "name the Hugging Face checkpoint of the same model with --against",
)


class StoredArray(Protocol):
    """One open array of a store: its spec, and the chunk that is decoded at once."""

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def chunk(self) -> tuple[int, ...]: ...

    def read(self, box: Box, into: Array | None = None) -> Array:
        """The values in `box`, a new array or `into`; SourceError where they cannot be read."""


@dataclass(frozen=True)
class NativeSource:
    """The arrays of a native checkpoint: name in the table → spec, and chunk.

    `opener(name, cache_bytes)` opens one, parts of up to `block_bytes` are read at once,
    `fingerprint` is that of its folder when it was opened, and `beside` are arrays that are no
    parameters. `version` is that of the framework that it is for, None for the layout's first one.
    Use as a context manager.
    """

    layout: str
    folder: Path
    specs: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[int, ...]]
    opener: Callable[[str, int], StoredArray]
    scanned: bool
    beside: tuple[str, ...] = ()
    array_metadata: Callable[[], Mapping[str, str]] = dict
    """Array on disk → sha256 of what the store says of it, where that has no file of its own."""
    converted: bool = False
    """Whether its own files say that it was converted, so that it had a sidecar."""
    block_bytes: int | None = None
    fingerprint: str = ""
    version: str | None = None
    adapter: StoredAdapter | None = None
    """Of an adapter, whose arrays are its matrices: its rank, and alpha if it says that."""
    step: int | None = None
    """Of a training checkpoint: the step that was saved."""
    release: Callable[[], None] = lambda: None

    def __enter__(self) -> NativeSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check_unchanged(self) -> None:
        """Raises SourceError where the checkpoint has changed since it was opened."""
        if fingerprint(self.folder, now=True) != self.fingerprint:
            raise SourceError(
                "The source changed while it was read.",
                where=self.folder,
                do="leave the source alone until the conversion ends, then start again",
            )

    @property
    def towers(self) -> bool:
        """Whether the vision or audio tower is in the checkpoint."""
        table = load_table(self.layout, self.version)
        return any(table.in_tower(name) for name in self.specs)

    def without_towers(self) -> NativeSource:
        """The source without its vision and audio towers."""
        table = load_table(self.layout, self.version)
        text = {name: spec for name, spec in self.specs.items() if not table.in_tower(name)}
        return replace(self, specs=text)

    def largest_chunk(self, names: Sequence[str]) -> int:
        """Bytes of the largest chunk of the named arrays; a chunk is decoded at once."""
        sizes = (prod(self.chunks[name]) * self.specs[name].itemsize for name in names)
        return max(sizes, default=0)


def _example(names: Sequence[str], unmatched: Sequence[str]) -> str:
    return counted(len(names), "array") + (f", such as {unmatched[0]}" if unmatched else "")


def plan_native(native: NativeSource, original: Original) -> Plan:
    """The plan that makes the native tree from the original; read from right to left it exports.

    Raises SourceError where the tree is not that of the original's config.json.
    """
    plan = plan_to_native(
        original.architecture,
        table_of(native.layout, original.architecture, native.version),
        original.specs,
        DTypePolicy(),
        scanned=native.scanned,
        text_only=not native.towers,
        block_bytes=native.block_bytes,
        where=str(original.folder),
    )
    missing = [name for name in plan.targets if name not in native.specs]
    unknown = [name for name in native.specs if name not in plan.targets]
    if missing or unknown:
        raise SourceError(
            "The arrays of the native checkpoint do not match the original's config.json.",
            where=f"{native.folder} and {original.folder}",
            expected=_example(list(plan.targets), missing),
            found=_example(list(native.specs), unknown),
            do=_ANOTHER_ORIGINAL,
        )
    for name, planned in plan.targets.items():
        if native.specs[name].shape != planned.spec.shape:
            raise SourceError(
                "An array of the native checkpoint does not have the shape that config.json says.",
                where=f"{native.folder}, array {name}",
                expected=list(planned.spec.shape),
                found=list(native.specs[name].shape),
                do=_ANOTHER_ORIGINAL,
            )
        if native.specs[name].dtype not in CONVERTED:
            raise SourceError(
                "An array of the native checkpoint has a dtype that weights do not have.",
                where=f"{native.folder}, array {name}",
                expected=", ".join(CONVERTED),
                found=native.specs[name].dtype,
                do="give the checkpoint from before it was quantized or widened",
            )
    return plan


def fingerprint(folder: Path, *, now: bool = False) -> str:
    """A digest of the names and identities of all files below `folder`.

    Of an object store it is as it was listed, or, at some cost, as it is `now`. Raises SourceError
    where a folder cannot be listed.
    """
    remote = remote_fingerprint(folder, now=now)
    if remote is not None:
        return remote
    try:
        files = sorted(Unchanged(folder).files.items())
    except OSError as error:
        raise SourceError(
            "The source cannot be read.", where=error.filename or folder, found=error.strerror
        ) from None
    return hashlib.sha256(repr(files).encode()).hexdigest()


class NativeReader:
    """Blocks of native arrays for a plan read from right to left, each chunk decoded once.

    `cache_bytes` is how much of an array to keep decoded; the sources that are no arrays are
    tensors that the original supplies.
    """

    def __init__(
        self, native: NativeSource, original: Original, cache_bytes: Mapping[str, int]
    ) -> None:
        self._native, self._original, self._cache_bytes = native, original, cache_bytes
        self._array = lru_cache(1)(lambda name: native.opener(name, cache_bytes[name]))

    def read_block(self, source: SourceTensor, ranges: Ranges, offset: int, data: Array) -> None:
        """Fills `data` (bytes) with the block `ranges` of an array or of a supplied tensor."""
        name = source.region.tensor
        if name not in self._cache_bytes:
            self._original.read_bytes(name, offset, data)
            return
        box = source.region.box(ranges)
        shape = tuple(length for _, length in box)
        self._array(name).read(box, data.view(numpy_dtype(source.spec.dtype)).reshape(shape))

    def in_order(self, name: str) -> bool:
        """Only what the original supplies is read in the order of its bytes."""
        return name not in self._cache_bytes

    def check_unchanged(self) -> None:
        """Raises SourceError where the checkpoint has changed since it was opened."""
        self._native.check_unchanged()
