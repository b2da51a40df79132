"""Adapters as qwix puts them into a model: two arrays beside that of a weight, in one tree.

Names and shapes: `LoraProvider` in `qwix/_src/providers/lora.py`, qwix 0.1.8. Rank is the last
dimension of every A; alpha stands nowhere in the tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.errors import SourceError

A, B = "_lora_a", "_lora_b"
VALUE = "/value"
MATRIX = f"({A}|{B})"
"""How the name of a matrix ends, as a regular expression."""

_NUMBER = re.compile(r"\d+")


def rank_of(items: Path, specs: Mapping[str, TensorSpec], told: object = None) -> int:
    """The rank of the matrices with these specs; `told` is what the metadata of a step say.

    Raises SourceError where they are not of one rank, or of another.
    """
    shapes = [spec.shape for name, spec in specs.items() if name.endswith(A + VALUE)]
    ranks = {shape[-1] if shape else 0 for shape in shapes}
    if len(ranks) != 1 or 0 in ranks or told not in {None, 0, *ranks}:
        raise SourceError(
            "The matrices of the adapter are not of one rank.",
            where=items,
            expected="one rank above 0" if told is None else f"rank {told}, by the step's metadata",
            found=", ".join(map(str, sorted(ranks))) or "no matrix A",
        )
    return ranks.pop()


def modules(names: Iterable[str], layer: str) -> str:
    """The regular expression of the modules that have these matrices, and of no others.

    `layer` is how the path of a layer begins, up to its number. A module for which there is no
    matrix must not be named: a framework that restores demands one of each.
    """
    layers: dict[str, set[int]] = {}
    others: set[str] = set()
    for name in names:
        if not name.endswith(A + VALUE):
            continue
        module = name.rpartition("/")[0].rpartition("/")[0]
        number = _NUMBER.match(module.removeprefix(layer))
        if module.startswith(layer) and number is not None:
            inside = module[len(layer) + number.end() + 1 :]
            layers.setdefault(inside, set()).add(int(number[0]))
        else:
            others.add(module)
    parts = []
    by_layers = sorted((sorted(found), module) for module, found in layers.items())
    for found, group in groupby(by_layers, lambda entry: entry[0]):
        inside = "|".join(module for _, module in group)
        parts.append(f"{layer}({'|'.join(map(str, found))})/({inside})")
    return "|".join([*sorted(others), *parts])
