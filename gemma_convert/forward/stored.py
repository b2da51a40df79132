"""One array of an Orbax checkpoint, left in its file until a part of it is asked for.

Opened by tensorstore, the library that Orbax itself reads with, and never by our own store: a check
that read an array with the code that wrote it would hide that code's mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_convert.errors import SourceError
from gemma_convert.files.library_path import library_path
from gemma_convert.stores.orbax.reader import UNREADABLE

if TYPE_CHECKING:
    import tensorstore as ts


class StoredArray:
    """An array in a file: indexed with slices and numbers it stays there, with an array it is read.

    `numpy.asarray` reads all that is left of it. Raises SourceError where a value cannot be read.
    """

    def __init__(self, where: str, store: ts.TensorStore) -> None:
        self._where, self._store = where, store

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its axes."""
        return tuple(self._store.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype; bfloat16 is ml_dtypes' bfloat16."""
        return np.dtype(self._store.dtype.numpy_dtype)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Lengths of what is decoded at once."""
        shape = self._store.chunk_layout.read_chunk.shape or self.shape
        return tuple(int(chunk or length) for chunk, length in zip(shape, self.shape, strict=True))

    @property
    def chunk_rows(self) -> int:
        """How many entries of the first axis are decoded at once."""
        return self.chunk_shape[0]

    @property
    def T(self) -> StoredArray:  # noqa: N802
        """A view of this array with its axes in the opposite order, as numpy's and JAX' have it."""
        return StoredArray(self._where, self._store.T)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """A view of this array, or the rows of integers `index` [*places] as [*places *rest]."""
        if isinstance(index, np.ndarray):
            return self._gathered(index)
        import tensorstore as ts

        return StoredArray(self._where, self._store[index][ts.d[:].translate_to[0]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("an array in a file cannot be had without a copy")
        with _errors(self._where):
            values = np.asarray(self._store.read(order="C").result())
        return values if dtype is None else values.astype(dtype)

    def _gathered(self, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Each chunk that has a row among them is decoded once, one after the other."""
        rows, place = np.unique(index, return_inverse=True)
        if rows.size and not 0 <= rows[0] <= rows[-1] < len(self):
            raise IndexError(f"rows {rows[0]} to {rows[-1]} of {len(self)}")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        starts = np.flatnonzero(np.diff(rows // self.chunk_rows, prepend=-1))
        stops = np.append(starts[1:], len(rows))[: len(starts)]
        for start, stop in zip(starts, stops, strict=True):
            with _errors(self._where):
                found[start:stop] = self._store.oindex[rows[start:stop]].read().result()
        return found[place.reshape(index.shape)]


def read(array: Any) -> Any:
    """`array` itself, or its values where it is still in a file."""
    return np.asarray(array) if isinstance(array, StoredArray) else array


def read_all(tree: Any) -> Any:
    """`tree`, an array or nested dicts of arrays, with all values read."""
    if isinstance(tree, Mapping):
        return {name: read_all(below) for name, below in tree.items()}
    return read(tree)


def open_stored(folder: Path, name: str, ocdbt: bool, zarr3: bool) -> StoredArray:
    """The array that Orbax calls `name` in the item folder `folder`; raises SourceError.

    `ocdbt` and `zarr3` are what the folder's `_METADATA` says of its format.
    """
    import tensorstore as ts

    path = library_path(folder)
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{path}/{name}/"}
    if ocdbt:
        base = {"driver": "file", "path": f"{path}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
    where = f"{folder}, array {name}"
    with _errors(where):
        return StoredArray(where, ts.open(spec, open=True, read=True, context=_context()).result())


@cache
def _context() -> Any:
    """Chunks are decoded one at a time: that many of them are in memory, and no cache is kept."""
    import tensorstore as ts

    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 1},
            "file_io_concurrency": {"limit": 4},
        }
    )


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise SourceError(
            "An array of the checkpoint is missing or broken.",
            where=where,
            found=(str(error) or type(error).__name__).splitlines()[0][:300],
        ) from None
