"""Tunix' parameter tree, read by Orbax: nested dicts, each parameter in the place of its `value`.

Layout of the folder: what the CheckpointManager of google-tunix 0.1.7 writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.forward.orbax_tree import orbax_items
from gemma_convert.forward.tree import ArrayFacts, Tree, array_facts, chosen, named


def tree_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree, by path with slashes; reads no array."""
    with orbax_items(items) as found:
        return dict(array_facts(_without_value(_checked(found.metadata, items))))


def restore_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tree as numpy arrays of the stored dtypes.

    `modules` names the keys to read; None reads all. Raises SourceError where the tree is not
    nested as Tunix has it or lacks a module.
    """
    with orbax_items(items) as found:
        return _without_value(found.restored(_modules(found.metadata, items, modules)))


def open_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with orbax_items(items) as found:
        return _without_value(found.opened(_modules(found.metadata, items, modules)))


def _modules(metadata: Any, items: Path, modules: Sequence[str] | None) -> Tree:
    tree = _checked(metadata, items)
    return chosen(tree, modules, lambda name: _unlike(items, name, tree))


def _checked(tree: Any, items: Path) -> Tree:
    for module in ("embedder", "layers"):
        if not isinstance(tree, Mapping) or not isinstance(tree.get(module), Mapping):
            raise _unlike(items, module, tree)
    return dict(tree)


def _unlike(items: Path, missing: str, level: Any) -> SourceError:
    return SourceError(
        "This is not Tunix' parameter tree.",
        where=items,
        expected=f"{missing} in a tree of nested dicts",
        found=named(level),
    )


def _without_value(tree: Tree) -> Tree:
    """The tree with every `{"value": array}` replaced by the array."""
    return {
        name: _parameter(below) if isinstance(below, Mapping) else below
        for name, below in tree.items()
    }


def _parameter(level: Mapping[str, Any]) -> Any:
    return level["value"] if set(level) == {"value"} else _without_value(level)
