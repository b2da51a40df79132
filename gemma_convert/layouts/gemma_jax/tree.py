"""The gemma library's parameter tree, read by Orbax: the nested dict that the library loads.

Layout of the folder: what `gm.ckpts.save_params` of google/gemma 4.1.0 writes. Dense feed-forward
kernels, which may be stored bare, come out as `{"w": kernel}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.forward.orbax_tree import orbax_items
from gemma_convert.forward.tree import ArrayFacts, Tree, array_facts, chosen, named


def tree_facts(items: Path) -> dict[str, ArrayFacts]:
    """Shapes and dtypes of the tree, by path with slashes; reads no array."""
    with orbax_items(items) as found:
        return dict(array_facts(_dense_below_w(_checked(found.metadata, items))))


def restore_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The tree as numpy arrays of the stored dtypes.

    `modules` names the keys to read (`forward.text_modules` leaves the towers out); None reads all.
    Raises SourceError where the tree has a `params` wrapper, is not nested as the library has it or
    lacks a module.
    """
    with orbax_items(items) as found:
        return _dense_below_w(found.restored(_modules(found.metadata, items, modules)))


def open_tree(items: Path, modules: Sequence[str] | None = None) -> Tree:
    """The same tree with every array left in its file, as a StoredArray."""
    with orbax_items(items) as found:
        return _dense_below_w(found.opened(_modules(found.metadata, items, modules)))


def _modules(metadata: Any, items: Path, modules: Sequence[str] | None) -> Tree:
    tree = _checked(metadata, items)
    return chosen(tree, modules, lambda name: _unlike(items, name, tree))


def _checked(tree: Any, items: Path) -> Tree:
    if not isinstance(tree, Mapping) or not isinstance(tree.get("embedder"), Mapping):
        raise _unlike(items, "embedder", tree)
    return dict(tree)


def _unlike(items: Path, missing: str, level: Any) -> SourceError:
    wrapped = isinstance(level, Mapping) and "params" in level
    return SourceError(
        "This is not the gemma library's parameter tree.",
        where=items,
        expected=f"{missing} in a tree of nested dicts",
        found=named(level),
        do="save what stands below params, which is what the library loads" if wrapped else None,
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
