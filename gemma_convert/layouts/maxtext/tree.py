"""MaxText's parameter tree, read by Orbax: a nested dict of the modules of the model.

Layout of the folders: MaxText's `load_parameters_path` and its training checkpoints (August 2026),
and what its training after the first saves (0.2.5). Optimizer state is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.forward.matrices import Pair, layer_matrices
from gemma_convert.forward.orbax_tree import OrbaxItems, orbax_items
from gemma_convert.forward.tree import ArrayFacts, Tree, array_facts, chosen, named
from gemma_convert.layouts.maxtext.names import MODULES


def tree_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree, by path with slashes; reads no array."""
    with _items(items) as found:
        return dict(array_facts(found.tree))


def restore_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tree as numpy arrays of the stored dtypes.

    `modules` names the modules to read (`forward.text_modules` leaves the vision tower out); None
    reads all. Raises SourceError where the tree is not MaxText's or lacks a module.
    """
    with _items(items) as found:
        return found.restored(_chosen(found, modules))


def open_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with _items(items) as found:
        return found.opened(_chosen(found, modules))


def open_matrices(items: Path) -> dict[int, dict[str, Pair]]:
    """Layer → path below it of a kernel → its matrices, as `layer_matrices` has them."""
    with _items(items) as found:
        return layer_matrices(found, "decoder/layers_")


def _items(items: Path) -> AbstractContextManager[OrbaxItems]:
    return orbax_items(items, *((module,) for module in MODULES))


def _chosen(found: OrbaxItems, modules: Sequence[str] | None) -> Tree:
    return chosen(found.tree, modules, lambda name: _without(found, name))


def _without(found: OrbaxItems, module: str) -> SourceError:
    return SourceError(
        "This is not MaxText's parameter tree.",
        where=found.folder,
        expected=f"{module} among the modules of the model",
        found=named(found.tree),
    )
