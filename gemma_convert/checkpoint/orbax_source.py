"""An Orbax tree as a native source, under the names of its layout's table."""

from __future__ import annotations

from collections.abc import Mapping

from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.stores.orbax.reader import (
    OrbaxArray,
    OrbaxTree,
    array_metadata,
    converted_by,
    open_array,
)


def orbax_source(
    layout: str, tree: OrbaxTree, stored: Mapping[str, str], *, scanned: bool
) -> NativeSource:
    """The arrays of `tree` that `stored` names: name in the table → name on disk."""

    def read(name: str, cache_bytes: int) -> OrbaxArray:
        return open_array(tree, stored[name], cache_bytes)

    used = set(stored.values())
    return NativeSource(
        layout=layout,
        folder=tree.folder,
        specs={name: tree.arrays[path] for name, path in stored.items()},
        chunks={name: tree.chunks[path] for name, path in stored.items()},
        opener=read,
        scanned=scanned,
        array_metadata=lambda: array_metadata(tree),
        converted=converted_by(tree.folder) is not None,
        beside=(*(name for name in tree.arrays if name not in used), *tree.others),
    )
