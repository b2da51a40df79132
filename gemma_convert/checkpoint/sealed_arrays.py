"""Arrays that are compared with the seal while they are read, whoever reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from gemma_convert.arrays.checksums import checksum
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.arrays.values import Array
from gemma_convert.checkpoint.native import NativeSource, StoredArray
from gemma_convert.errors import SourceError
from gemma_convert.mapping.region import Box


class SealedArrays:
    """The arrays of `native`, of which `manifest` has checksums by region.

    `native` here reads as before; each region that is read as it was written is compared.
    `different` says of each array that is not as it was sealed how it differs.
    """

    def __init__(self, native: NativeSource, manifest: Mapping[str, Any]) -> None:
        self.different: dict[str, str] = {}
        self._regions = {
            name: {tuple((at, length) for at, length in box): digest for box, digest in regions}
            for name, regions in manifest.get("regions", {}).items()
        }
        self._left = {name: dict(regions) for name, regions in self._regions.items()}
        self._opener = native.opener
        self._specs = native.specs
        self._lock = threading.Lock()
        self.native = replace(native, opener=self._open)

    @property
    def names(self) -> list[str]:
        """The arrays that have checksums."""
        return list(self._regions)

    def _open(self, name: str, cache_bytes: int) -> StoredArray:
        array = self._opener(name, cache_bytes)
        return _Compared(array, name, self) if name in self._left else array

    def compare(self, name: str, box: Box, values: Array) -> None:
        """Compares the regions that lie in a box, as far as they were not compared before."""
        with self._lock:
            left = self._left[name]
            inside = [box] if box in left else [region for region in left if _within(region, box)]
            regions = {region: left.pop(region) for region in inside}
        for region, expected in regions.items():
            part = values if region == box else values[_slices(region, box)]
            if checksum(part) != expected:
                self._differ(name, f"differs from its checksum at {[at for at, _ in region]}")

    def read_rest(
        self, names: Iterable[str], advance: Callable[[int, str], None] = lambda *_: None
    ) -> None:
        """Reads and compares the regions of these arrays that nobody has read."""
        for name in names:
            if name not in self._regions:
                self._differ(name, "is not in the manifest")
                continue
            sizes = (prod(length for _, length in box) for box in self._regions[name])
            if sum(sizes) != self._specs[name].size:
                self._differ(name, "has another shape than when it was written")
                continue
            self._read_rest(name, advance)

    def _read_rest(self, name: str, advance: Callable[[int, str], None]) -> None:
        array = self._opener(name, 0)
        for box in list(self._left[name]):
            try:
                values = array.read(box)
            except SourceError as error:
                self._differ(name, f"cannot be read: {error.found}")
                return
            self.compare(name, box, values)
            advance(values.nbytes, name)

    def _differ(self, name: str, how: str) -> None:
        with self._lock:
            self.different.setdefault(name, how)


def _within(region: Box, box: Box) -> bool:
    return all(
        start >= first and start + length <= first + count
        for (start, length), (first, count) in zip(region, box, strict=True)
    )


def _slices(region: Box, box: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - first, start - first + length)
        for (start, length), (first, _) in zip(region, box, strict=True)
    )


@dataclass(frozen=True)
class _Compared:
    """One open array, whose boxes are compared as they are read."""

    array: StoredArray
    name: str
    seal: SealedArrays

    @property
    def spec(self) -> TensorSpec:
        return self.array.spec

    @property
    def chunk(self) -> tuple[int, ...]:
        return self.array.chunk

    def read(self, box: Box, into: Array | None = None) -> Array:
        """The values in `box`, a new array or `into`; SourceError where they cannot be read."""
        values = self.array.read(box, into)
        self.seal.compare(self.name, box, values)
        return values
