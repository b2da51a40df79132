"""Prompts → hidden states: the Gemma 4 language model in JAX, whatever tree its weights come from.

Where a tree keeps its arrays, and over which axes, is its own module's: `DecoderWeights` and
`LayerWeights` are what such a module gives. Arithmetic:
`transformers/models/gemma4/modeling_gemma4.py` (5.23). A layer is embed → layer → head: layers may
be fed one at a time. Weights and activations are of `dtype`; norms, rotary angles, softmax, router
and logits are float32, and float32 products are float32 on every accelerator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.forward.arithmetic import attend, gelu, rms_norm, rotary, routing, visible
from gemma_convert.forward.native_model import Batched, Dtype
from gemma_convert.forward.prompt import Prompt
from gemma_convert.forward.sharding import Axes, place, place_all, replicated
from gemma_convert.model.architecture import Layer, Rope, TextArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Params: TypeAlias = Mapping[str, Any]
KeysAndValues: TypeAlias = tuple[jax.Array, jax.Array]
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


@dataclass(frozen=True)
class Kind:
    """What a layer is compiled for: its facts without its number, so that few kinds are compiled.

    `window` is None where attention reaches back to the first token.
    """

    window: int | None
    rope: Rope
    owns_value: bool
    norm_epsilon: float
    experts_per_token: int


def final_hidden(
    weights: DecoderWeights, text: TextArchitecture, prompts: Sequence[Prompt], dtype: Dtype
) -> list[Float[Array, "batch length embed"]]:
    """What the head is given [batch length embed], for each of `prompts`."""
    states: list[jax.Array] = []
    for states in stages(weights, text, prompts, dtype):  # noqa: B007
        pass
    return states


def stages(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompts: Sequence[Prompt],
    dtype: Dtype,
    handed: Batched[jax.Array] | None = None,
) -> Iterator[list[Float[Array, "batch length embed"]]]:
    """The states of `prompts` [batch length embed]: embedded, behind each layer, behind the norm.

    Every layer's weights are read and put on the devices once, for all prompts, and dropped before
    its states are given, which are whole on every device. Layers and norm are run on `handed`
    states too, which are asked for before each of them; those that share keys and values then
    attend to those that were made of handed states.
    """
    states = [embed(weights, text, prompt, dtype) for prompt in prompts]
    inputs = [
        per_layer_inputs(weights, text, prompt, state) if text.ple else None
        for prompt, state in zip(prompts, states, strict=True)
    ]
    sources = {facts.kv_source for facts in text.layers if not facts.owns_kv}
    images = [
        place(prompt.images) if text.bidirectional_images and prompt.images is not None else None
        for prompt in prompts
    ]
    kept: dict[tuple[int, int], KeysAndValues] = {}
    kept_of_handed: dict[tuple[int, int], KeysAndValues] = {}
    yield list(states)
    for facts in text.layers:
        mine = place_all(weights.layer(facts.index), weights.layer_axes(facts.index))
        run = partial(_run_layer, mine, facts, kind_of(text, facts), inputs, images, sources)
        if handed is not None:
            handed.outputs = run([state.astype(dtype) for state in handed.inputs], kept_of_handed)
        states = run(states, kept)
        del mine, run
        yield list(states)
    norm = partial(rms_norm, scale=weights.final_scale(), epsilon=text.norm_epsilon)
    if handed is not None:
        handed.outputs = [norm(state.astype(dtype)) for state in handed.inputs]
    yield [norm(state) for state in states]


def _run_layer(
    weights: LayerWeights,
    facts: Layer,
    kind: Kind,
    per_layer: Sequence[jax.Array | None],
    images: Sequence[jax.Array | None],
    sources: Collection[int],
    states: Sequence[jax.Array],
    kept: dict[tuple[int, int], KeysAndValues],
) -> list[jax.Array]:
    """The states of all prompts behind one layer; `kept` are keys and values that are shared."""
    after = []
    for number, (state, ple) in enumerate(zip(states, per_layer, strict=True)):
        out, keys_values = layer(
            weights,
            state,
            None if ple is None else ple[:, :, facts.index],
            None if facts.owns_kv else kept[number, facts.kv_source],
            images[number] if facts.sliding else None,
            kind,
        )
        if facts.index in sources:
            kept[number, facts.index] = keys_values
        after.append(out)
    return after


def kind_of(text: TextArchitecture, facts: Layer) -> Kind:
    """The static facts that one compiled `layer` serves."""
    return Kind(
        window=text.window if facts.sliding else None,
        rope=text.rope_sliding if facts.sliding else text.rope_full,
        owns_value=facts.owns_value,
        norm_epsilon=text.norm_epsilon,
        experts_per_token=text.experts_per_token,
    )


def embed(
    weights: DecoderWeights, text: TextArchitecture, prompt: Prompt, dtype: Dtype
) -> Float[Array, "batch length embed"]:
    """Embedded tokens [batch length embed]; soft tokens stand in for them as they are."""
    rows = weights.embedding(prompt.ids(text.pad_token)).astype(dtype)
    if prompt.soft is None or prompt.images is None:
        return rows
    soft = place(prompt.soft).astype(dtype)
    return jnp.where(place(prompt.images)[..., None] != 0, soft, rows)


def per_layer_inputs(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompt: Prompt,
    embedded: Float[Array, "batch length embed"],
) -> Float[Array, "batch length layers ple"]:
    """Per-layer embeddings [batch length layers ple]: what the token is, and what the context says.

    Both parts of transformers' `get_per_layer_inputs` and `project_per_layer_inputs`.
    """
    rows = weights.per_layer_rows(prompt.ids(text.pad_token))
    token = rows.astype(embedded.dtype) * np.sqrt(text.ple).astype(np.float32)
    context = replicated(weights.per_layer_context(embedded)) * np.float32(text.embed**-0.5)
    context = rms_norm(context, weights.per_layer_scale(), text.norm_epsilon)
    both: jax.Array = (context + token) * np.float32(2**-0.5)
    return both.astype(embedded.dtype)


@partial(jax.jit, static_argnames=("kind",))
def layer(
    weights: LayerWeights,
    hidden: Float[Array, "batch length embed"],
    per_layer: Float[Array, "batch length ple"] | None,
    shared: KeysAndValues | None,
    images: Int[Array, "batch length"] | None,
    kind: Kind,
) -> tuple[Float[Array, "batch length embed"], KeysAndValues]:
    """The layer's output [batch length embed], and the keys and values that it attended to.

    `shared` are the keys and values of the layer that this one shares them with; `images` the
    images whose tokens see each other both ways.
    """
    norm = partial(_norm, weights, kind)
    normed = norm("pre_attention", hidden)
    attended, keys_values = attention(weights, normed, shared, images, kind)
    hidden = hidden + norm("post_attention", attended)
    fed = weights.dense(norm("pre_dense", hidden))
    if kind.experts_per_token:
        sparse = experts(weights, norm("pre_experts", hidden), router(weights, hidden, kind))
        fed = norm("post_dense", fed) + norm("post_experts", sparse)
    hidden = hidden + norm("post_feed_forward", fed)
    if per_layer is not None:
        gated = gelu(weights.per_layer_gate(hidden)) * per_layer
        hidden = hidden + norm("post_per_layer", weights.per_layer_out(gated))
    return replicated(hidden * weights.scalar().astype(hidden.dtype)), keys_values


def attention(
    weights: LayerWeights,
    hidden: Float[Array, "batch length embed"],
    shared: KeysAndValues | None,
    images: Int[Array, "batch length"] | None,
    kind: Kind,
) -> tuple[Float[Array, "batch length embed"], KeysAndValues]:
    """Attention's output [batch length embed], and keys, values [batch length kv_heads head_dim].

    Where there is no value kernel, the projected keys before their norm are the values.
    """
    query = rotary(_norm(weights, kind, "query", weights.query(hidden)), kind.rope)
    if shared is None:
        key, value = weights.key_value(hidden, kind.owns_value)
        key = rotary(_norm(weights, kind, "key", key), kind.rope)
        shared = key, rms_norm(value, None, kind.norm_epsilon)
    mixed = attend(query, *shared, visible(hidden.shape[1], kind.window, images))
    return weights.attended(mixed), shared


def router(
    weights: LayerWeights, hidden: Float[Array, "batch length embed"], kind: Kind
) -> Float[Array, "batch length experts"]:
    """Weight of each expert [batch length experts] in float32, zero for all but the best."""
    precise = hidden.astype(jnp.float32)
    normed = rms_norm(precise, weights.router_scale(), kind.norm_epsilon)
    scores = weights.router_scores(normed * np.float32(hidden.shape[-1] ** -0.5))
    return routing(scores, weights.per_expert_scale(), kind.experts_per_token)


def experts(
    weights: LayerWeights,
    hidden: Float[Array, "batch length embed"],
    shares: Float[Array, "batch length experts"],
) -> Float[Array, "batch length embed"]:
    """Sum of the experts' outputs by `shares` [batch length embed], one expert after the other.

    Every expert sees every token: more work than routing, no token dropped, and no more memory than
    one expert takes.
    """

    def add(total: Any, expert: Any) -> tuple[Any, None]:
        kernels, share = expert
        out = weights.expert(kernels, hidden)
        return total + out.astype(jnp.float32) * share[..., None], None

    steps = weights.experts(), jnp.moveaxis(shares, -1, 0)
    total, _ = jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), steps)
    return total.astype(hidden.dtype)


def _norm(weights: LayerWeights, kind: Kind, name: Norm, x: jax.Array) -> jax.Array:
    return rms_norm(x, weights.scale(name), kind.norm_epsilon)
