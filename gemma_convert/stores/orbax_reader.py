"""Reads the tree of an Orbax checkpoint with tensorstore: names, shapes and dtypes, no values.

Works on what Orbax, MaxText and the gemma library write: OCDBT or one folder an array, zarr 2 or 3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_convert.dtypes import TensorSpec
from gemma_convert.errors import SourceError
from gemma_convert.mapping.notation import join_path

METADATA = "_METADATA"
MAX_METADATA_BYTES = 256 << 20

_WITHOUT_ARRAY = ("Dict", "List", "None", "Tuple", "NamedTuple")


@dataclass(frozen=True)
class OrbaxTree:
    """The arrays of one item folder: name (a path in the tables' notation) → spec."""

    folder: Path
    arrays: dict[str, TensorSpec]
    ocdbt: bool
    zarr3: bool


def find_items(path: Path) -> Path:
    """The folder that holds the Orbax tree: `path`, its `items`, or that of its highest step.

    The result is absolute, as Orbax asks for. Raises SourceError where there is no such folder.
    """
    path = path.absolute()
    for folder in (path, path / "items"):
        if (folder / METADATA).is_file():
            return folder
    steps = sorted(
        (int(folder.name), folder / "items")
        for folder in (path.iterdir() if path.is_dir() else ())
        if folder.name.isascii() and folder.name.isdecimal()
    )
    complete = [items for _, items in steps if (items / METADATA).is_file()]
    if complete:
        return complete[-1]
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) if path.is_dir() else None
    raise SourceError(
        "There is no Orbax checkpoint here.",
        where=path,
        expected="<step>/items/_METADATA, items/_METADATA or _METADATA",
        found=found or "nothing",
        do="give the folder that was written, its step folder, or the items folder in that",
    )


def read_orbax_tree(folder: Path) -> OrbaxTree:
    """The arrays of an Orbax item folder; raises SourceError where it is not one."""
    metadata = _load_metadata(folder / METADATA)
    ocdbt, zarr3 = bool(metadata.get("use_ocdbt")), bool(metadata.get("use_zarr3"))
    names: dict[str, str] = {}
    for entry in metadata["tree_metadata"].values():
        try:
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            kind = entry["value_metadata"]["value_type"]
        except (KeyError, TypeError):
            raise SourceError(
                "Orbax' metadata is malformed.", where=folder / METADATA, found=str(entry)[:200]
            ) from None
        if kind not in _WITHOUT_ARRAY:
            names[join_path(keys)] = ".".join(keys)
    return OrbaxTree(folder, _specs(folder, names, ocdbt, zarr3), ocdbt, zarr3)


def _load_metadata(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise SourceError("Orbax' metadata is too large to be metadata.", where=path)
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            "Orbax' metadata cannot be read.", where=path, found=error.strerror
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceError("Orbax' metadata is not valid JSON.", where=path, found=error) from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise SourceError("Orbax' metadata has no tree.", where=path)
    return metadata


def _specs(folder: Path, names: dict[str, str], ocdbt: bool, zarr3: bool) -> dict[str, TensorSpec]:
    import tensorstore as ts

    context = ts.Context()
    folder = folder.absolute()
    opened = {}
    for name, key in names.items():
        store: dict[str, Any] = {"driver": "file", "path": f"{folder}/{key}/"}
        if ocdbt:
            base = {"driver": "file", "path": f"{folder}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
        opened[name] = ts.open(spec, open=True, read=True, context=context)
    specs = {}
    for name, future in opened.items():
        try:
            array = future.result()
        except ValueError as error:
            raise SourceError(
                "An array of the checkpoint is missing or broken.",
                where=f"{folder}, array {name}",
                found=str(error).splitlines()[0][:300],
            ) from None
        specs[name] = TensorSpec(array.dtype.name, tuple(array.shape))
    return specs
