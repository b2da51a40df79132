"""Whether a native tree has the arrays that a forward pass reads; the error names those it lacks.

Which arrays those are is written out by hand for each tree, not taken from a mapping table: a tree
that does not fit is refused by name before anything runs, rather than by a line of einsum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from gemma_convert.errors import SourceError, some
from gemma_convert.forward.sharding import Axes
from gemma_convert.forward.tree import ArrayFacts
from gemma_convert.model.architecture import Layer, TextArchitecture

Shape: TypeAlias = tuple[int, ...]


def lengths(text: TextArchitecture, layer: Layer | None = None) -> dict[str, int]:
    """Axis → its length, with the axes of `layer` where one is given."""
    found = {
        "vocab": text.vocab,
        "ple_vocab": text.ple_vocab,
        "embed": text.embed,
        "ple": text.ple,
        "layers": len(text.layers),
        "layers_ple": len(text.layers) * text.ple,
        "experts": text.experts,
        "expert_mlp": text.expert_mlp,
        "kv": 2,
        "gate_up": 2,
        "one": 1,
    }
    if layer is not None:
        found |= {
            "heads": layer.heads,
            "kv_heads": layer.kv_heads,
            "head_dim": layer.head_dim,
            "mlp": layer.mlp,
        }
    return found


def shape_of(axes: Axes, length: Mapping[str, int]) -> Shape:
    """The lengths of `axes`."""
    return tuple(length[axis] for axis in axes)


def check_fit(
    facts: Mapping[str, ArrayFacts],
    wanted: Mapping[str, Shape],
    layer_prefix: str,
    text: TextArchitecture,
    where: Path,
) -> None:
    """Nothing where `facts` have every array that is `wanted`, in its shape, and no layer beyond.

    `layer_prefix` is what stands before a layer's number in its path. Raises SourceError that names
    the arrays.
    """
    wrong = [
        f"{path} is {_found(facts.get(path))} instead of {list(shape)}"
        for path, shape in wanted.items()
        if path not in facts or facts[path].shape != shape
    ]
    beyond = _layers_beyond(facts, layer_prefix, len(text.layers))
    wrong += [f"{path} is one layer too many" for path in beyond]
    if wrong:
        raise SourceError(
            "The native tree does not fit config.json.",
            where=where,
            expected=f"the arrays of a model with {len(text.layers)} layers, embed {text.embed}, "
            f"vocab {text.vocab}",
            found=some(wrong, between="; "),
            do="give the config.json of the model that was converted, or convert it again",
        )


def _found(facts: ArrayFacts | None) -> str:
    return "missing" if facts is None else str(list(facts.shape))


def _layers_beyond(facts: Mapping[str, ArrayFacts], prefix: str, layers: int) -> Iterator[str]:
    numbers = (re.match(rf"{re.escape(prefix)}(\d+)/", path, re.ASCII) for path in facts)
    for number in sorted({int(found[1]) for found in numbers if found}):
        if number >= layers:
            yield f"{prefix}{number}"
