"""The gemma library's parameter tree, read by Orbax: the nested dict that the library loads.

Layout of the folder: what `gm.ckpts.save_params` of google/gemma 4.1.0 writes. Dense feed-forward
kernels, which may be stored bare, come out as `{"w": kernel}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.forward.orbax_tree import OrbaxItems, orbax_items
from gemma_convert.forward.tree import ArrayFacts, Tree, array_facts, chosen, named
from gemma_convert.layouts.gemma_jax.names import EMBEDDING
from gemma_convert.mapping.notation import split_path


def tree_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree, by path with slashes; reads no array."""
    with _items(items) as found:
        return dict(array_facts(_dense_below_w(found.tree)))


def restore_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tree as numpy arrays of the stored dtypes.

    `modules` names the keys to read (`forward.text_modules` leaves the towers out); None reads all.
    Raises SourceError where the tree is not nested as the library has it or lacks a module.
    """
    with _items(items) as found:
        return _dense_below_w(found.restored(_chosen(found, modules)))


def open_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with _items(items) as found:
        return _dense_below_w(found.opened(_chosen(found, modules)))


def _items(items: Path) -> AbstractContextManager[OrbaxItems]:
    return orbax_items(items, split_path(EMBEDDING))


def _chosen(found: OrbaxItems, modules: Sequence[str] | None) -> Tree:
    return chosen(found.tree, modules, lambda name: _without(found, name))


def _without(found: OrbaxItems, module: str) -> SourceError:
    return SourceError(
        "This is not the gemma library's parameter tree.",
        where=found.folder,
        expected=f"{module} in a tree of nested dicts",
        found=named(found.tree),
    )


def _dense_below_w(tree: Tree) -> Tree:
    """The tree with `{"w": kernel}` for every kernel of a dense feed-forward that stands bare."""
    return {
        name: _layer_below_w(below) if re.fullmatch(r"layer_\d+", name, re.ASCII) else below
        for name, below in tree.items()
    }


def _layer_below_w(layer: Any) -> Any:
    if not isinstance(layer, Mapping):
        return layer
    found = dict(layer)
    for branch in found.keys() & {"mlp", "mlp2"}:
        if isinstance(found[branch], Mapping):
            found[branch] = {
                name: {"w": below}
                if name in ("gating_einsum", "linear") and not isinstance(below, Mapping)
                else below
                for name, below in found[branch].items()
            }
    return found
