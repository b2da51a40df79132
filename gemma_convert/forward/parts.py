"""The parts that a layer is made of, and what each makes, noted while the layer runs.

Every operation of a layer lies between two of them, so where a layer differs, one of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Literal, TypeAlias, TypeVar

T = TypeVar("T")

Part: TypeAlias = Literal[
    "embedding",
    "per-layer inputs",
    "norm before attention",
    "queries",
    "keys",
    "values",
    "attention",
    "output projection",
    "norm behind attention",
    "sum behind attention",
    "norm before the MLP",
    "dense MLP",
    "norm behind the dense MLP",
    "router",
    "norm before the experts",
    "experts",
    "norm behind the experts",
    "sum of both branches",
    "norm behind the MLP",
    "sum behind the MLP",
    "per-layer gate",
    "per-layer projection",
    "norm behind the per-layer input",
    "output",
    "final norm",
    "head",
    "patch embedding",
    "pooled patches",
    "standardized patches",
    "subsampled frames",
    "first feed-forward",
    "light convolution",
    "second feed-forward",
    "projected frames",
    "norm before the projection",
    "soft tokens",
    "embedded soft tokens",
]
"""What is compared: queries, keys and values behind their norms and before they turn, attention
before its output projection, the share of each expert as the router's, and output behind the
layer's scalar. `norm behind the dense MLP`, the router, the experts and `sum of both branches` are
a mixture's alone; all else but embedding, per-layer inputs, final norm and head is of each layer.
From `patch embedding` on they are a tower's alone; its layers have those of a decoder layer too.
"""


class Taps(Generic[T]):
    """What each part of a layer makes; the layer goes on with `given` values where there are any.

    `instead` is called with the given value and the one that was made, and returns the one to go on
    with, in the shape and dtype of the second.
    """

    def __init__(self, given: Mapping[Part, T] | None, instead: Callable[[T, T], T]) -> None:
        self.made: dict[Part, T] = {}
        self._given, self._instead = given, instead

    def __call__(self, part: Part, value: T) -> T:
        """Notes what `part` made, and returns what the layer goes on with."""
        self.made[part] = value
        return value if self._given is None else self._instead(self._given[part], value)
