"""What layouts share whose checkpoints are Orbax trees: only the names in a tree are their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from gemma_convert.checkpoint.native import NativeSource
from gemma_convert.checkpoint.native_folder import NativeFolder
from gemma_convert.errors import SourceError, some
from gemma_convert.mapping.notation import join_path, split_path
from gemma_convert.mapping.plan import Plan
from gemma_convert.stores.orbax.reader import (
    OrbaxArray,
    OrbaxTree,
    array_metadata,
    is_converted,
    open_array,
    read_orbax_tree,
)
from gemma_convert.stores.orbax.wrapped import RANDOM, unwrapped


class OrbaxLayout(ABC):
    """A layout on Orbax; `stored` tells its trees from those of others."""

    name: str
    divisible = True
    streams = True

    @abstractmethod
    def stored(self, arrays: Iterable[str]) -> Mapping[str, str]:
        """Name in the table → name on disk, of the parameters among the arrays of a tree.

        Nothing where the tree is not of this layout.
        """

    def scanned(self, arrays: Iterable[str]) -> bool:
        """Whether layers are stacked, by the names that `stored` has of a tree."""
        del arrays
        return False

    def version(self, arrays: Iterable[str]) -> str | None:
        """The version of the framework that a tree is for, by the names that `stored` has of it.

        None where they fit the first one that the layout's table knows.
        """
        del arrays
        return None

    def find(self, folder: NativeFolder) -> Path | None:
        found = [tree for tree, arrays in folder.trees.items() if self.stored(arrays)]
        if len(found) > 1:
            raise SourceError(
                "The checkpoint has several Orbax items that could be the model.",
                where=folder.path,
                expected="one",
                found=some([str(tree) for tree in found]),
                do=f"give the path of one of them, such as {found[0]}",
            )
        return found[0] if found else None

    def open(self, where: Path) -> NativeSource:
        tree = read_orbax_tree(where)
        stored = self.stored(tree.arrays)
        scanned, version = self.scanned(stored), self.version(stored)
        return orbax_source(self.name, tree, stored, scanned=scanned, version=version)

    def settings_files(self, plan: Plan, target: Path) -> dict[str, str]:
        del plan, target
        return {}

    def check_metadata(self, folder: Path, plan: Plan) -> dict[str, str]:
        del folder, plan
        return {}


def bare_names(arrays: Iterable[str], *roots: str) -> dict[str, str]:
    """Name of an array in the model's own tree → its name in a tree that may wrap that.

    `roots` are how names of the model begin, whole keys of them. Raises SourceError where there are
    several such trees (`stores.orbax.wrapped`).
    """
    found = unwrapped(map(split_path, arrays), [split_path(root) for root in roots])
    return {join_path(name): join_path(path) for name, path in found.items()}


def orbax_source(
    layout: str,
    tree: OrbaxTree,
    stored: Mapping[str, str],
    *,
    scanned: bool,
    version: str | None = None,
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
        converted=is_converted(tree.folder),
        beside=(*(_beside(name) for name in tree.arrays if name not in used), *tree.others),
        version=version,
    )


def _beside(name: str) -> str:
    """What an array is that is no parameter: random state stands among those in NNX."""
    return RANDOM if RANDOM in split_path(name) else name
