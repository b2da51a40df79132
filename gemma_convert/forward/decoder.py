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
from gemma_convert.forward.parts import Part, Taps
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

    `window` is None where attention reaches back to the first token, and does not bound what
    tokens of one image see of it where images are `whole`.
    """

    window: int | None
    whole_images: bool
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
    its states are given, which are whole on every device. Each part is run on what is `handed` too,
    which is asked for before each stage; layers that share keys and values then attend to handed
    ones.
    """
    states = [embed(weights, text, prompt, dtype) for prompt in prompts]
    inputs = _all_per_layer_inputs(weights, text, prompts, states)
    sources = {facts.kv_source for facts in text.layers if not facts.owns_kv}
    images = [
        place(prompt.images) if text.bidirectional_images and prompt.images is not None else None
        for prompt in prompts
    ]
    kept: dict[tuple[int, int], KeysAndValues] = {}
    kept_of_handed: dict[tuple[int, int], KeysAndValues] = {}
    handed_inputs = inputs
    if handed is not None:
        handed_inputs = _hand_embedding(weights, text, prompts, states, inputs, handed)
    yield list(states)
    for facts in text.layers:
        mine = place_all(weights.layer(facts.index), weights.layer_axes(facts.index))
        run = partial(_run_layer, mine, facts, kind_of(text, facts), images, sources)
        parts: Sequence[Mapping[Part, jax.Array] | None] = [None] * len(prompts)
        if handed is not None:
            parts = handed.parts
            given = [state.astype(dtype) for state in handed.inputs]
            handed.give_back(run(handed_inputs, given, kept_of_handed, parts, True)[1])
        states, _ = run(inputs, states, kept, parts, False)
        del mine, run, parts
        yield list(states)
    norm = partial(rms_norm, scale=weights.final_scale(), epsilon=text.norm_epsilon)
    if handed is not None:
        handed.give_back([{"final norm": norm(state.astype(dtype))} for state in handed.inputs])
    yield [norm(state) for state in states]


def _hand_embedding(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompts: Sequence[Prompt],
    embedded: Sequence[jax.Array],
    inputs: Sequence[Any],
    handed: Batched[jax.Array],
) -> list[Any]:
    """Gives back what is made before the layers; the per-layer inputs that were handed.

    `embedded` and `inputs` are this side's own.
    """
    made: list[dict[Part, jax.Array]] = [{"embedding": state} for state in embedded]
    found = list(inputs)
    if text.ple:
        parts = handed.parts
        theirs = [
            part["embedding"].astype(state.dtype)
            for part, state in zip(parts, embedded, strict=True)
        ]
        ours = _all_per_layer_inputs(weights, text, prompts, theirs)
        for one, value in zip(made, ours, strict=True):
            one["per-layer inputs"] = value
        found = [
            part["per-layer inputs"].reshape(value.shape).astype(value.dtype)
            for part, value in zip(parts, inputs, strict=True)
        ]
    handed.give_back(made)
    return found


def _all_per_layer_inputs(
    weights: DecoderWeights,
    text: TextArchitecture,
    prompts: Sequence[Prompt],
    embedded: Sequence[jax.Array],
) -> list[Any]:
    """The per-layer inputs of each prompt, None of a model without."""
    if not text.ple:
        return [None] * len(prompts)
    pairs = zip(prompts, embedded, strict=True)
    return [per_layer_inputs(weights, text, prompt, state) for prompt, state in pairs]


def _run_layer(
    weights: LayerWeights,
    facts: Layer,
    kind: Kind,
    images: Sequence[jax.Array | None],
    sources: Collection[int],
    per_layer: Sequence[jax.Array | None],
    states: Sequence[jax.Array],
    kept: dict[tuple[int, int], KeysAndValues],
    given: Sequence[Mapping[Part, jax.Array] | None],
    instead: bool,
) -> tuple[list[jax.Array], list[Mapping[Part, jax.Array]]]:
    """The states of all prompts behind one layer, and what its parts made.

    `kept` are keys and values that are shared; for `given` and `instead` see `layer`.
    """
    after, made = [], []
    for number, (state, ple) in enumerate(zip(states, per_layer, strict=True)):
        out, keys_values, parts = layer(
            weights,
            state,
            None if ple is None else ple[:, :, facts.index],
            None if facts.owns_kv else kept[number, facts.kv_source],
            images[number] if facts.sliding or kind.whole_images else None,
            given[number],
            instead,
            kind,
        )
        if facts.index in sources:
            kept[number, facts.index] = keys_values
        after.append(out)
        made.append(parts)
    return after, made


def kind_of(text: TextArchitecture, facts: Layer) -> Kind:
    """The static facts that one compiled `layer` serves."""
    return Kind(
        window=text.window if facts.sliding else None,
        whole_images=text.whole_images,
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
    given: Mapping[Part, Float[Array, "batch length features"]] | None,
    instead: bool,
    kind: Kind,
) -> tuple[Float[Array, "batch length embed"], KeysAndValues, Mapping[Part, jax.Array]]:
    """The layer's output [batch length embed], and the keys and values that it attended to.

    `shared` are the keys and values of the layer that this one shares them with; `images` the
    images whose tokens see each other both ways. Where there are `given` values, what each part
    made is returned as well, and the next one goes on with the given `instead` of the made. Both
    ways are one compilation.
    """

    def chosen(value: jax.Array, made: jax.Array) -> jax.Array:
        return jnp.where(instead, value.reshape(made.shape).astype(made.dtype), made)

    tap = Taps(given, chosen)
    norm = partial(_norm, weights, kind)
    normed = tap("norm before attention", norm("pre_attention", hidden))
    attended, keys_values = attention(weights, normed, shared, images, kind, tap)
    hidden = hidden + tap("norm behind attention", norm("post_attention", attended))
    hidden = tap("sum behind attention", hidden)
    fed = weights.dense(tap("norm before the MLP", norm("pre_dense", hidden)))
    fed = tap("dense MLP", fed)
    if kind.experts_per_token:
        shares = tap("router", router(weights, hidden, kind))
        normed = tap("norm before the experts", norm("pre_experts", hidden))
        sparse = tap("experts", experts(weights, normed, shares))
        dense = tap("norm behind the dense MLP", norm("post_dense", fed))
        sparse = tap("norm behind the experts", norm("post_experts", sparse))
        fed = tap("sum of both branches", dense + sparse)
    hidden = hidden + tap("norm behind the MLP", norm("post_feed_forward", fed))
    if per_layer is not None:
        hidden = tap("sum behind the MLP", hidden)
        gated = tap("per-layer gate", gelu(weights.per_layer_gate(hidden)) * per_layer)
        projected = tap("per-layer projection", weights.per_layer_out(gated))
        projected = norm("post_per_layer", projected)
        hidden = hidden + tap("norm behind the per-layer input", projected)
    out = replicated(hidden * weights.scalar().astype(hidden.dtype))
    tap("output", out)
    return out, keys_values, {} if given is None else tap.made


def attention(
    weights: LayerWeights,
    hidden: Float[Array, "batch length embed"],
    shared: KeysAndValues | None,
    images: Int[Array, "batch length"] | None,
    kind: Kind,
    tap: Taps[jax.Array],
) -> tuple[Float[Array, "batch length embed"], KeysAndValues]:
    """Attention's output [batch length embed], and keys, values [batch length kv_heads head_dim].

    Where there is no value kernel, the projected keys before their norm are the values.
    """
    query = tap("queries", _norm(weights, kind, "query", weights.query(hidden)))
    if shared is None:
        key, value = weights.key_value(hidden, kind.owns_value)
        key = tap("keys", _norm(weights, kind, "key", key))
        value = tap("values", rms_norm(value, None, kind.norm_epsilon))
        shared = rotary(key, kind.rope), value
    seen = visible(hidden.shape[1], kind.window, images, kind.whole_images)
    mixed = tap("attention", attend(rotary(query, kind.rope), *shared, seen))
    return tap("output projection", weights.attended(mixed)), shared


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
