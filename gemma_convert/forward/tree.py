"""A layout's own tree: nested dicts of arrays, and what is known of them without reading any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gemma_convert.errors import SourceError

Tree: TypeAlias = Mapping[str, Any]
"""Nested dicts whose leaves are arrays; bfloat16 is ml_dtypes' bfloat16."""


@dataclass(frozen=True)
class ArrayFacts:
    """Shape and dtype of one stored array, known without reading it."""

    shape: tuple[int, ...]
    dtype: str


def array_facts(tree: Any, path: str = "") -> Iterator[tuple[str, ArrayFacts]]:
    """Shape and dtype of every leaf of `tree` that has a shape, by its path with slashes.

    A key that holds a slash stands in single quotes.
    """
    if isinstance(tree, Mapping):
        for name, below in tree.items():
            key = f"'{name}'" if "/" in name else name
            yield from array_facts(below, f"{path}/{key}" if path else key)
    elif getattr(tree, "shape", None) is not None:
        yield path, ArrayFacts(tuple(tree.shape), np.dtype(tree.dtype).name)


def chosen(
    tree: Tree, modules: Sequence[str] | None, lacking: Callable[[str], SourceError]
) -> Tree:
    """What `tree` has of `modules`, its keys, or all of it for None.

    `lacking` makes the error of a module that is not there.
    """
    for module in modules or ():
        if module not in tree:
            raise lacking(module)
    return {name: tree[name] for name in (modules or tree)}


def named(level: Any) -> str:
    """Names of the keys that stand at one level of a tree, the first few of them."""
    names = ", ".join(sorted(map(str, level))[:8]) if isinstance(level, Mapping) else "no dict"
    return names or "nothing"
