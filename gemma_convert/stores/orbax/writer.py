"""Writes Orbax checkpoints array by array, region by region, straight through tensorstore.

Arrays are declared first and regions written as they come, so no array is ever whole in memory. The
data goes into the root store of the item (one OCDBT store, or one zarr v2 folder an array), which
Orbax, MaxText and the gemma library restore as they are; `_METADATA` is Orbax's own JSON
(`orbax/checkpoint/_src/metadata/tree.py`), written by hand so that a conversion needs no JAX.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_convert.arrays.checksums import checksum
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import TargetError
from gemma_convert.files.value_file import ValuesFrom
from gemma_convert.files.write_out import NewFiles
from gemma_convert.mapping.notation import split_path
from gemma_convert.mapping.region import Box, slices
from gemma_convert.stores.orbax.raw_chunks import RawChunks, raw_chunks
from gemma_convert.stores.orbax.zarr_metadata import Compression, zarr2, zarr3
from gemma_convert.stores.remote.mirror import find_mirror, kvstore
from gemma_convert.version import CONVERTER, __version__

_CHUNK = re.compile(r"\d+(\.\d+)*", re.ASCII)
_BEING_WRITTEN = ".__lock"
"""How tensorstore's files end until they get their names."""

_DICT_KEY = 2
"""orbax.checkpoint KeyType.DICT."""


@dataclass(frozen=True)
class OrbaxFormat:
    """How arrays are stored: in one OCDBT store, or as one zarr v2 folder an array."""

    ocdbt: bool = True
    compression: Compression = "none"
    zarr3: bool = True
    """zarr v3 where the store is OCDBT; else zarr v2."""

    @property
    def uses_zarr3(self) -> bool:
        return self.ocdbt and self.zarr3


class OrbaxWriter:
    """Writes one Orbax item folder: `declare` every array, `write` regions, then `write_tree`.

    Of several processes each has its `part`. Chunks in files of their own go where they belong; an
    OCDBT store is written by one process alone, so the others have their own below it, as Orbax
    has them, and `merge` takes these into the one of part 0.
    """

    def __init__(self, folder: Path, form: OrbaxFormat, part: int = 0) -> None:
        import tensorstore as ts

        self._ts = ts
        self.folder, self.form, self._part = folder, form, part
        folder.mkdir(parents=True, exist_ok=True)
        self._context = ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})
        local = form.ocdbt and find_mirror(folder) is None
        data = folder / (f"ocdbt.process_{part}/d" if part else "d")
        self._data = NewFiles(data, _BEING_WRITTEN) if local else None
        self._arrays: dict[str, Any] = {}
        self._raw: dict[str, RawChunks] = {}
        self._layouts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.regions: dict[str, dict[Box, str]] = {}
        """array → the regions written, each with its checksum."""

    def declare(self, arrays: Mapping[str, tuple[TensorSpec, tuple[int, ...]]]) -> None:
        """Creates every array, given its name (a path in the tables' notation), spec and chunk."""
        transaction = self._ts.Transaction() if self.form.ocdbt else None
        opened = {
            name: self._ts.open(
                self._spec(name, spec, chunk),
                open=True,
                create=True,
                context=self._context,
                transaction=transaction,
            )
            for name, (spec, chunk) in arrays.items()
        }
        try:
            stores = {name: future.result() for name, future in opened.items()}
            if transaction is not None:
                transaction.commit_async().result()
        except ValueError as error:
            raise write_error(error, self.folder) from None
        self._layouts |= {
            ".".join(split_path(name)): (spec.shape, chunk)
            for name, (spec, chunk) in arrays.items()
        }
        self._arrays |= {name: store.with_transaction(None) for name, store in stores.items()}
        if not self.form.ocdbt and find_mirror(self.folder) is None:
            self._raw |= self._raw_chunks(arrays)

    def _raw_chunks(
        self, arrays: Mapping[str, tuple[TensorSpec, tuple[int, ...]]]
    ) -> dict[str, RawChunks]:
        """The arrays whose chunks are files of plain values, written without a library."""
        chunks = {
            name: raw_chunks(
                self.folder,
                ".".join(split_path(name)),
                zarr2(spec, chunk, self.form.compression),
                spec.itemsize,
                None,
            )
            for name, (spec, chunk) in arrays.items()
        }
        return {name: found for name, found in chunks.items() if found is not None}

    def holds(self, name: str, regions: Mapping[Box, str]) -> bool:
        """Whether the regions of an array have these checksums; if so they count as written."""
        array = self._arrays.get(name)
        if array is None:
            return False
        for box, expected in regions.items():
            view = array[slices(box)]
            try:
                if checksum(np.asarray(view.read().result())) != expected:
                    return False
            except ValueError:
                return False
        self.regions.setdefault(name, {}).update(regions)
        return True

    def write(self, name: str, box: Box, values: NDArray[np.generic]) -> Any:
        """A future of the commit of `values` into `box`; `values` must not change before it."""
        self.regions.setdefault(name, {})[box] = checksum(values)
        raw = self._raw.get(name)
        if raw is not None and raw.write(box, values):
            done: Future[None] = Future()
            done.set_result(None)
            return done
        view = self._arrays[name][slices(box)] if box else self._arrays[name]
        future = view.write(values, can_reference_source_data_indefinitely=True).commit
        future.force()
        if self._data is not None:
            files = self._data
            future.add_done_callback(lambda _: files.start_write_out())
        return future

    def merge(self, parts: int) -> None:
        """Takes what the other parts have written into the store; their data stays in its files."""
        if not self.form.ocdbt:
            return
        try:
            root = self._ts.KvStore.open(self._kvstore("", 0), context=self._context).result()
            for part in range(1, parts):
                self._check_part(part)
                transaction = self._ts.Transaction(atomic=True)
                spec = self._kvstore("", part)
                other = self._ts.KvStore.open(spec, context=self._context).result()
                other.experimental_copy_range_to(root.with_transaction(transaction)).result()
                transaction.commit_async().result()
        except ValueError as error:
            raise write_error(error, self.folder) from None

    def _check_part(self, part: int) -> None:
        """Raises TargetError where a part is not there: tensorstore would take it as empty."""
        manifest = self.folder / f"ocdbt.process_{part}" / "manifest.ocdbt"
        if not manifest.is_file():
            raise TargetError(
                "What another process has written is not there.",
                where=manifest,
                do="choose a target on a file system that all processes share",
            )

    def close(self) -> None:
        """Lets go of the arrays."""
        self._arrays.clear()

    def value_file(self, path: Path) -> ValuesFrom | None:
        """What a file holds of the arrays' values; None for a file that holds none.

        All of a file counts where the checksums of regions do not say everything: the database's
        root, compressed chunks, and chunks that reach beyond their array.
        """
        if not path.is_relative_to(self.folder):
            return None
        folder, _, file = path.relative_to(self.folder).as_posix().rpartition("/")
        if self.form.ocdbt:
            data = folder.rpartition("/")[2] == "d"
            return ValuesFrom(0 if data else None) if data or file == "manifest.ocdbt" else None
        if folder not in self._layouts or not _CHUNK.fullmatch(file):
            return None
        shape, chunk = self._layouts[folder]
        inside = self.form.compression == "none" and all(
            (int(at) + 1) * step <= size
            for at, size, step in zip(file.split("."), shape, chunk, strict=False)
        )
        return ValuesFrom(0 if inside and shape else None)

    def array_metadata(self) -> dict[str, str]:
        """Array → sha256 of its zarr metadata, where that has no file of its own.

        Nothing of a database in an object store, which checks the objects that it keeps.
        """
        if not self.form.ocdbt or find_mirror(self.folder) is not None:
            return {}
        return ocdbt_metadata(self.folder, list(self._arrays), self.form.uses_zarr3, self._context)

    def write_tree(self, extra: Mapping[str, Mapping[str, object]]) -> None:
        """Writes `_METADATA`; `extra` are leaves without arrays (name → value_metadata)."""
        leaves: dict[str, Mapping[str, object]] = {
            name: {"value_type": "np.ndarray", "skip_deserialize": False} for name in self._arrays
        }
        leaves |= extra
        metadata = {
            "tree_metadata": {
                str(keys): {
                    "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
                    "value_metadata": dict(leaves[name]),
                }
                for name, keys in ((name, split_path(name)) for name in leaves)
            },
            "use_ocdbt": self.form.ocdbt,
            "use_zarr3": self.form.uses_zarr3,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self.folder / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")

    def _spec(self, name: str, spec: TensorSpec, chunk: tuple[int, ...]) -> dict[str, Any]:
        store = self._kvstore(".".join(split_path(name)) + "/", self._part)
        metadata = zarr3 if self.form.uses_zarr3 else zarr2
        return {
            "driver": "zarr3" if self.form.uses_zarr3 else "zarr",
            "kvstore": store,
            "metadata": metadata(spec, chunk, self.form.compression),
            "store_data_equal_to_fill_value": True,
        }

    def _kvstore(self, path: str, part: int) -> dict[str, Any]:
        if not self.form.ocdbt:
            return kvstore(self.folder, path)
        base = kvstore(self.folder, f"ocdbt.process_{part}/" if part else "")
        return {"driver": "ocdbt", "base": base, "path": path}


def ocdbt_metadata(folder: Path, names: Iterable[str], zarr3: bool, context: Any) -> dict[str, str]:
    """Array → sha256 of what an OCDBT database holds of it beside its values."""
    import tensorstore as ts

    spec = {"driver": "ocdbt", "base": kvstore(folder)}
    database = ts.KvStore.open(spec, context=context).result()
    file = "zarr.json" if zarr3 else ".zarray"
    read = {name: database.read(".".join(split_path(name)) + f"/{file}") for name in names}
    return {
        name: hashlib.sha256(future.result().value).hexdigest() for name, future in read.items()
    }


def write_error(error: BaseException, where: object) -> TargetError:
    """What the user is told when tensorstore cannot write."""
    return TargetError(
        "The target cannot be written.",
        where=where,
        found=str(error).splitlines()[0][:300],
        do="check free space and permissions of the target",
    )


def write_checkpoint_metadata(
    folder: Path,
    handlers: str | Mapping[str, str],
    custom: Mapping[str, object],
    started_ns: int,
) -> None:
    """Writes `_CHECKPOINT_METADATA` and Orbax's success markers.

    `handlers` is the handler of an item folder, or item → handler of a step folder.
    """
    metadata = {
        "item_handlers": handlers,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started_ns,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {**custom, CONVERTER: __version__},
    }
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
    items = () if isinstance(handlers, str) else handlers
    for part in (*(folder / item for item in items), folder):
        (part / "commit_success.txt").write_text(
            "Checkpoint commit was successful.\n", encoding="utf-8"
        )
