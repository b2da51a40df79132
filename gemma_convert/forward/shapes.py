"""Whether a native tree has the arrays that a forward pass reads; the error names those it lacks.

Which arrays those are is written out by hand for each tree, not taken from a mapping table: a tree
that does not fit is refused by name before anything runs, rather than by a line of einsum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TreeAxes:
    """The axes of the arrays in a tree whose layers stand apart.

    `outer` are those of a model outside of its layers, `layer` those of one layer below `prefix`
    and its number: (path, axes) of every array that the framework asks for.
    """

    prefix: str
    outer: Callable[[TextArchitecture], Iterable[tuple[str, Axes]]]
    layer: Callable[[TextArchitecture, Layer], Iterable[tuple[str, Axes]]]

    def check_shapes(
        self, facts: Mapping[str, ArrayFacts], text: TextArchitecture, where: Path
    ) -> None:
        """Nothing where every array is there and fits `text`; towers are not looked at.

        Raises SourceError that names the arrays that do not fit.
        """
        wanted = {path: shape_of(axes, lengths(text)) for path, axes in self.outer(text)}
        for layer in text.layers:
            for name, axes in self.layer(text, layer):
                path = f"{self.prefix}{layer.index}/{name}"
                wanted[path] = shape_of(axes, lengths(text, layer))
        check_fit(facts, wanted, self.prefix, text, where)

    def text_axes(self, text: TextArchitecture) -> dict[str, Axes]:
        """The axes of every array, by path."""
        found = dict(self.outer(text))
        for layer in text.layers:
            for name, axes in self.layer(text, layer):
                found[f"{self.prefix}{layer.index}/{name}"] = axes
        return found

    def layer_axes(self, text: TextArchitecture, layer: Layer) -> dict[str, Axes]:
        """The axes of a layer's arrays, by path below it."""
        return dict(self.layer(text, layer))


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
            "The arrays of the native checkpoint do not match config.json.",
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
