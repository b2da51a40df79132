"""MaxText's parameter tree, read by Orbax: the nested dict below params/params.

Layout of the folders: MaxText's `load_parameters_path` and its training checkpoints (August 2026).
Optimizer state is never read.
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
        return dict(array_facts(_below_params(found.metadata, items)))


def restore_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tree as numpy arrays of the stored dtypes.

    `modules` names the modules to read (`forward.text_modules` leaves the vision tower out); None
    reads all. Raises SourceError where the tree is not `params.params.<module>` or lacks a module.
    """
    with orbax_items(items) as found:
        wanted = _modules(found.metadata, items, modules)
        tree: Tree = found.restored({"params": {"params": wanted}})["params"]["params"]
        return tree


def open_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with orbax_items(items) as found:
        return found.opened(_modules(found.metadata, items, modules))


def _modules(metadata: Any, items: Path, modules: Sequence[str] | None) -> Tree:
    below = _below_params(metadata, items)
    return chosen(below, modules, lambda name: _unlike(items, f"params.params.{name}", below))


def _below_params(tree: Any, items: Path) -> Tree:
    outer = tree.get("params") if isinstance(tree, Mapping) else None
    if not isinstance(outer, Mapping):
        raise _unlike(items, "params", tree)
    inner = outer.get("params")
    if not isinstance(inner, Mapping) or not inner:
        raise _unlike(items, "params.params", outer)
    return dict(inner)


def _unlike(items: Path, missing: str, level: Any) -> SourceError:
    return SourceError(
        "This is not MaxText's parameter tree.",
        where=items,
        expected=f"{missing} in a tree params.params.<module>",
        found=named(level),
    )
