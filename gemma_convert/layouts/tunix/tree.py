"""Tunix' parameter tree, read by Orbax: nested dicts, each parameter in the place of its `value`.

Layout of the folder: what the CheckpointManager of google-tunix 0.1.7 writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.forward.matrices import Pair, layer_matrices
from gemma_convert.forward.orbax_tree import OrbaxItems, orbax_items
from gemma_convert.forward.tree import ArrayFacts, Tree, array_facts, chosen, named
from gemma_convert.layouts.tunix.names import EMBEDDING
from gemma_convert.mapping.notation import split_path


def tree_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree, by path with slashes; reads no array."""
    with _items(items) as found:
        return dict(array_facts(found.tree))


def restore_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tree as numpy arrays of the stored dtypes.

    `modules` names the keys to read; None reads all. Raises SourceError where the tree is not
    nested as Tunix has it or lacks a module.
    """
    with _items(items) as found:
        return found.restored(_chosen(found, modules))


def open_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with _items(items) as found:
        return found.opened(_chosen(found, modules))


def open_matrices(items: Path) -> dict[int, dict[str, Pair]]:
    """Layer → path below it of an array → its matrices, as `layer_matrices` has them.

    An adapter is saved without the model.
    """
    with orbax_items(items, ("layers",), ("embedder",)) as found:
        return layer_matrices(found, "layers/")


def _items(items: Path) -> AbstractContextManager[OrbaxItems]:
    return orbax_items(items, split_path(EMBEDDING))


def _chosen(found: OrbaxItems, modules: Sequence[str] | None) -> Tree:
    return chosen(found.tree, modules, lambda name: _without(found, name))


def _without(found: OrbaxItems, module: str) -> SourceError:
    return SourceError(
        "This is not Tunix' parameter tree.",
        where=found.folder,
        expected=f"{module} in a tree of nested dicts",
        found=named(found.tree),
    )
