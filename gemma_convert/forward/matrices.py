"""The matrices of an adapter in an Orbax tree, as qwix names them: layer by layer, in their files.

Names: `LoraProvider` in `qwix/_src/providers/lora.py`, qwix 0.1.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from gemma_convert.checkpoint.qwix import A, B
from gemma_convert.errors import SourceError, some
from gemma_convert.forward.orbax_tree import OrbaxItems
from gemma_convert.forward.tree import Tree

Pair: TypeAlias = tuple[Any, Any]


def layer_matrices(found: OrbaxItems, layer: str) -> dict[int, dict[str, Pair]]:
    """Layer → path below it of an array → its matrices A and B, left in their files.

    `layer` is how the path of a layer begins, up to its number. Raises SourceError where a matrix
    lacks its partner, or belongs to no layer.
    """
    below = re.compile(rf"{re.escape(layer)}(\d+)/(.+)", re.ASCII)
    layers: dict[int, dict[str, Pair]] = {}
    outside = []
    for path, pair in _pairs(found, found.opened(found.tree)):
        place = below.fullmatch(path)
        if place is None:
            outside.append(path)
        else:
            layers.setdefault(int(place[1]), {})[place[2]] = pair
    if outside:
        raise SourceError(
            "The adapter has matrices that belong to no single layer, which are not run.",
            where=found.folder,
            expected=f"matrices below {layer}0, {layer}1 …",
            found=some(outside),
            do="check an adapter of the modules in single layers",
        )
    return layers


def _pairs(found: OrbaxItems, level: Tree, path: str = "") -> Iterator[tuple[str, Pair]]:
    """Path of an array → its matrices, of all below `level`, which stands at `path`."""
    for name in sorted({key[: -len(A)] for key in level if key.endswith((A, B))}):
        both = name + A, name + B
        held = [key for key in both if key in level]
        if len(held) == 1:
            raise SourceError(
                "A matrix of the adapter lacks its partner.",
                where=found.folder,
                expected=" and ".join(path + key for key in both),
                found=path + held[0],
            )
        yield path + name, (level[both[0]], level[both[1]])
    for key, below in level.items():
        if isinstance(below, Mapping):
            yield from _pairs(found, below, f"{path}{key}/")
