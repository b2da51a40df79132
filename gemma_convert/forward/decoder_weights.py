"""What a layout gives the decoder of its tree: its arrays, and the products over their axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import jax
import numpy as np

from gemma_convert.forward.sharding import Axes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Params: TypeAlias = Mapping[str, Any]
Norm: TypeAlias = Literal[
    "pre_attention",
    "query",
    "key",
    "post_attention",
    "pre_dense",
    "post_dense",
    "pre_experts",
    "post_experts",
    "post_feed_forward",
    "post_per_layer",
]
"""A layer's norms by their places. `post_dense` and those of the experts are a mixture's alone."""


class LayerWeights(Protocol):
    """One layer's arrays, a pytree, and the products over their axes."""

    def scale(self, norm: Norm) -> Float[Array, " size"]:
        """The weight of a norm."""

    def query(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length heads head_dim"]:
        """Projected queries."""

    def key_value(
        self, hidden: Float[Array, "batch length embed"], owns_value: bool
    ) -> tuple[
        Float[Array, "batch length kv_heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
    ]:
        """Projected keys and values; the keys twice where the layer projects no values."""

    def attended(
        self, mixed: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length embed"]:
        """The output projection of attention."""

    def dense(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        """The gated feed-forward that every token goes through."""

    def router_scale(self) -> Float[Array, " embed"]:
        """What the router's input is multiplied with, by component."""

    def router_scores(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length experts"]:
        """The router's projection."""

    def per_expert_scale(self) -> Float[Array, " experts"]:
        """What each expert's weight is multiplied with."""

    def experts(self) -> Any:
        """All experts' kernels, a pytree of arrays that have the experts first."""

    def expert(
        self, kernels: Any, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        """The gated feed-forward of one expert, whose `kernels` are a slice of `experts()`."""

    def per_layer_gate(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length ple"]:
        """The projection that gates the per-layer embedding."""

    def per_layer_out(
        self, gated: Float[Array, "batch length ple"]
    ) -> Float[Array, "batch length embed"]:
        """The projection of the gated per-layer embedding."""

    def scalar(self) -> Float[Array, " 1"]:
        """What the layer's output is multiplied with."""


class DecoderWeights(Protocol):
    """A whole tree: what stands beside the layers, and each layer's arrays."""

    def embedding(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        """Rows of the token embedding × √embed, gathered where the table is: it is never moved."""

    def per_layer_rows(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length layers ple"]:
        """Rows of the per-layer embedding, unscaled."""

    def per_layer_context(
        self, embedded: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length layers ple"]:
        """Projection of the embedded prompt into all layers' embeddings, unscaled."""

    def per_layer_scale(self) -> Float[Array, " ple"]:
        """The weight of the norm behind `per_layer_context`."""

    def layer(self, index: int) -> LayerWeights:
        """One layer's arrays, where they are stored."""

    def layer_axes(self, index: int) -> Mapping[str, Axes]:
        """The names of the axes of a layer's arrays, by path below it."""

    def final_scale(self) -> Float[Array, " embed"]:
        """The weight of the norm behind the layers."""


def at(params: Params, *keys: str) -> jax.Array:
    """The array at `keys` of a nested dict, left where and as it is."""
    found: Any = params
    for key in keys:
        found = found[key]
    array: jax.Array = found
    return array
