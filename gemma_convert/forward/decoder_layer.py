"""One layer of the decoder, compiled once for each kind of layer.

Weights and activations are of one dtype; norms, rotary angles, softmax and router are float32, and
float32 products are float32 on every accelerator. Arithmetic:
`transformers/models/gemma4/modeling_gemma4.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.forward.arithmetic import attend, gelu, rms_norm, rotary, routing, visible
from gemma_convert.forward.decoder_weights import LayerWeights, Norm
from gemma_convert.forward.parts import Part, Taps
from gemma_convert.forward.sharding import replicated
from gemma_convert.model.architecture import Layer, Rope, TextArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

KeysAndValues: TypeAlias = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Kind:
    """What a layer is compiled for: its facts without its number, so that few kinds are compiled.

    `window` is None where attention reaches back to the first token, and does not bound what
    tokens of one image see of it where images are `whole`. `weights` is the class of the layer's
    weights: JAX, up to 0.12.0 at least, takes registered dataclasses of two classes whose fields
    are equal for one, and its cache of compiled functions could give one class the other's.
    """

    weights: type[LayerWeights]
    window: int | None
    whole_images: bool
    rope: Rope
    owns_value: bool
    norm_epsilon: float
    experts_per_token: int


def kind_of(text: TextArchitecture, facts: Layer, weights: type[LayerWeights]) -> Kind:
    """The static facts that one compiled `layer` serves."""
    return Kind(
        weights=weights,
        window=text.window if facts.sliding else None,
        whole_images=text.whole_images,
        rope=text.rope_sliding if facts.sliding else text.rope_full,
        owns_value=facts.owns_value,
        norm_epsilon=text.norm_epsilon,
        experts_per_token=text.experts_per_token,
    )


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
