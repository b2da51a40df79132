"""MaxText's parameter tree and token ids → logits: the Gemma 4 language model in JAX.

Kernels are used as MaxText lays them out, never through a mapping table, so that no mistake of a
table can cancel itself here. A layer is embed → layer → head: layers may be fed one at a time.
Arithmetic: `transformers/models/gemma4/modeling_gemma4.py` (5.23). Layout of the tree: MaxText
(August 2026). Weights and activations are of `dtype`; norms, rotary angles, softmax, router and
logits are float32, and float32 products are float32 on every accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.architecture import Layer, Rope, TextArchitecture
from gemma_convert.native.arithmetic import attend, gelu, head, product, rms_norm, rotary, routing

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Params: TypeAlias = Mapping[str, Any]
Dtype: TypeAlias = Literal["float32", "bfloat16"]
KeysAndValues: TypeAlias = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Kind:
    """What a layer is compiled for: its facts without its number, so that few kinds are compiled.

    `window` is None where attention reaches back to the first token.
    """

    window: int | None
    rope: Rope
    owns_kv: bool
    owns_value: bool
    norm_epsilon: float
    experts_per_token: int
    ple: bool


def forward(
    tree: Params,
    text: TextArchitecture,
    tokens: Int[Array, "batch length"],
    dtype: Dtype = "float32",
) -> Float[Array, "batch length vocab"]:
    """Logits [batch length vocab] in float32 of all positions at once."""
    (hidden,) = final_hidden(tree, text, [tokens], dtype)
    return head(output_table(tree, text, dtype), hidden, text)


def final_hidden(
    tree: Params,
    text: TextArchitecture,
    batches: Sequence[Int[Array, "batch length"]],
    dtype: Dtype = "float32",
) -> list[Float[Array, "batch length embed"]]:
    """What the head is given [batch length embed], for each of `batches`.

    Every layer's weights are moved to the device once, for all batches.
    """
    states = [embed(tree, text, tokens, dtype) for tokens in batches]
    inputs = [
        per_layer_inputs(tree, text, tokens, state) if text.ple else None
        for tokens, state in zip(batches, states, strict=True)
    ]
    sources = {facts.kv_source for facts in text.layers if not facts.owns_kv}
    kept: dict[tuple[int, int], KeysAndValues] = {}
    for facts in text.layers:
        params = jax.device_put(layer_params(tree, text, facts.index))
        kind = kind_of(text, facts)
        for number, ple in enumerate(inputs):
            mine = None if ple is None else ple[:, :, facts.index]
            shared = None if facts.owns_kv else kept[number, facts.kv_source]
            states[number], keys_values = layer(params, states[number], mine, shared, kind)
            if facts.index in sources:
                kept[number, facts.index] = keys_values
    scale = tree["decoder"]["decoder_norm"]["scale"]
    return [rms_norm(state, scale, text.norm_epsilon) for state in states]


def kind_of(text: TextArchitecture, facts: Layer) -> Kind:
    """The static facts that one compiled `layer` serves."""
    return Kind(
        window=text.window if facts.sliding else None,
        rope=text.rope_sliding if facts.sliding else text.rope_full,
        owns_kv=facts.owns_kv,
        owns_value=facts.owns_value,
        norm_epsilon=text.norm_epsilon,
        experts_per_token=text.experts_per_token,
        ple=bool(text.ple),
    )


def layer_params(tree: Params, text: TextArchitecture, index: int) -> Params:
    """Parameters of one layer, with the scan axes taken away where the tree is scanned.

    Scan axes stand after the first axis of every array: [first blocks place rest] in local_layers,
    [first blocks rest] in global_layer.
    """
    decoder: Params = tree["decoder"]
    if "scanned_blocks" not in decoder:
        found: Params = decoder[f"layers_{index}"]
        return found
    if text.period is None:
        raise ValueError("layers that do not repeat cannot have been scanned")
    block, place = divmod(index, text.period)
    blocks = decoder["scanned_blocks"]
    if place == text.period - 1:
        return _each(blocks["global_layer"], lambda array: array[:, block])
    return _each(blocks["local_layers"], lambda array: array[:, block, place])


def _each(tree: Params, function: Callable[[Any], Any]) -> Params:
    return {
        name: _each(below, function) if isinstance(below, Mapping) else function(below)
        for name, below in tree.items()
    }


def embed(
    tree: Params, text: TextArchitecture, tokens: Int[Array, "batch length"], dtype: Dtype
) -> Float[Array, "batch length embed"]:
    """Rows of the token embedding [batch length embed]; the stored table holds them × √embed.

    Rows are gathered where the table is, so that the table itself is never moved.
    """
    table = tree["token_embedder"]["embedding"]
    return jnp.asarray(table[np.asarray(tokens)]).astype(dtype)


def per_layer_inputs(
    tree: Params,
    text: TextArchitecture,
    tokens: Int[Array, "batch length"],
    embedded: Float[Array, "batch length embed"],
) -> Float[Array, "batch length layers ple"]:
    """Per-layer embeddings [batch length layers ple]: what the token is, and what the context says.

    Both parts of transformers' `get_per_layer_inputs` and `project_per_layer_inputs`.
    """
    params = tree["decoder"]["per_layer_embedder"]
    shape = (*np.shape(tokens), len(text.layers), text.ple)
    rows = jnp.asarray(params["embed_tokens_per_layer"][np.asarray(tokens)])
    token = rows.astype(embedded.dtype).reshape(shape) * np.sqrt(text.ple).astype(np.float32)
    kernel = jnp.asarray(params["per_layer_model_projection"]["kernel"])
    context = product("ble,ep->blp", embedded, kernel) * np.float32(text.embed**-0.5)
    scale = params["per_layer_projection_norm"]["scale"]
    context = rms_norm(context.reshape(shape), scale, text.norm_epsilon)
    both: jax.Array = (context + token) * np.float32(2**-0.5)
    return both.astype(embedded.dtype)


@partial(jax.jit, static_argnames=("kind",))
def layer(
    params: Params,
    hidden: Float[Array, "batch length embed"],
    per_layer: Float[Array, "batch length ple"] | None,
    shared: KeysAndValues | None,
    kind: Kind,
) -> tuple[Float[Array, "batch length embed"], KeysAndValues]:
    """The layer's output [batch length embed], and the keys and values that it attended to.

    `shared` are the keys and values of the layer that this one shares them with.
    """
    norm = partial(_named_norm, params, kind.norm_epsilon)
    attended, keys_values = attention(
        params["self_attention"], norm("pre_self_attention_norm", hidden), shared, kind
    )
    hidden = hidden + norm("post_self_attention_norm", attended)
    feed = norm("pre_ffw_norm", hidden)
    if kind.experts_per_token:
        fed = mixture(params["mlp"], hidden, feed, kind)
    else:
        fed = mlp(params["mlp"], feed)
    hidden = hidden + norm("post_ffw_norm", fed)
    if per_layer is not None:
        added = per_layer_input(params, hidden, per_layer)
        hidden = hidden + norm("post_per_layer_input_norm", added)
    return hidden * params["layer_scalar"].astype(hidden.dtype), keys_values


def attention(
    params: Params,
    hidden: Float[Array, "batch length embed"],
    shared: KeysAndValues | None,
    kind: Kind,
) -> tuple[Float[Array, "batch length embed"], KeysAndValues]:
    """Attention's output [batch length embed], and keys, values [batch length kv_heads head_dim].

    Where there is no value kernel, the projected keys before their norm are the values.
    """
    norm = partial(_named_norm, params, kind.norm_epsilon)
    query = product("ble,ehd->blhd", hidden, params["query"]["kernel"])
    query = rotary(norm("query_norm", query), kind.rope)
    if shared is None:
        key = product("ble,ekd->blkd", hidden, params["key"]["kernel"])
        value = (
            product("ble,ekd->blkd", hidden, params["value"]["kernel"]) if kind.owns_value else key
        )
        value = rms_norm(value, None, kind.norm_epsilon)
        key = rotary(norm("key_norm", key), kind.rope)
    else:
        key, value = shared
    mixed = attend(query, key, value, kind.window)
    return product("blhd,hde->ble", mixed, params["out"]["kernel"]), (key, value)


def mlp(
    params: Params, hidden: Float[Array, "batch length embed"]
) -> Float[Array, "batch length embed"]:
    """The gated feed-forward [batch length embed]; its width is that of the kernels."""
    gate = product("ble,em->blm", hidden, params["wi_0"]["kernel"])
    up = product("ble,em->blm", hidden, params["wi_1"]["kernel"])
    return product("blm,me->ble", gelu(gate) * up, params["wo"]["kernel"])


def mixture(
    params: Params,
    hidden: Float[Array, "batch length embed"],
    feed: Float[Array, "batch length embed"],
    kind: Kind,
) -> Float[Array, "batch length embed"]:
    """Dense branch plus experts [batch length embed]: the one gets `feed`, the others `hidden`."""
    norm = partial(_named_norm, params, kind.norm_epsilon)
    dense = mlp(params["moe_block"]["shared_experts"], feed)
    routed = params["moe_block"]["MoeBlock_0"]
    weights = router(routed, params["pre_forward_scale_2"], hidden, kind)
    sparse = experts(routed, norm("pre_feedforward_layernorm_2", hidden), weights)
    dense = norm("post_feedforward_layernorm_1", dense)
    return dense + norm("post_feedforward_layernorm_2", sparse)


def router(
    params: Params,
    scale: Float[Array, " embed"],
    hidden: Float[Array, "batch length embed"],
    kind: Kind,
) -> Float[Array, "batch length experts"]:
    """Weight of each expert [batch length experts] in float32, zero for all but the best."""
    normed = rms_norm(hidden.astype(jnp.float32), scale, kind.norm_epsilon)
    scaled = normed * np.float32(hidden.shape[-1] ** -0.5)
    scores = product("ble,ex->blx", scaled, params["gate"]["kernel"])
    return routing(scores, params["per_expert_scale"], kind.experts_per_token)


def experts(
    params: Params,
    hidden: Float[Array, "batch length embed"],
    weights: Float[Array, "batch length experts"],
) -> Float[Array, "batch length embed"]:
    """Sum of the experts' outputs by `weights` [batch length embed], one expert after the other.

    Every expert sees every token: more work than routing, no token dropped, and no more memory than
    one expert takes.
    """

    def add(total: Any, expert: Any) -> tuple[Any, None]:
        gate, up, down, weight = expert
        inner = gelu(product("ble,em->blm", hidden, gate)) * product("ble,em->blm", hidden, up)
        out = product("blm,me->ble", inner, down)
        return total + out.astype(jnp.float32) * weight[..., None], None

    kernels = (params["wi_0"], params["wi_1"], params["wo"], jnp.moveaxis(weights, -1, 0))
    total, _ = jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), kernels)
    return total.astype(hidden.dtype)


def per_layer_input(
    params: Params,
    hidden: Float[Array, "batch length embed"],
    per_layer: Float[Array, "batch length ple"],
) -> Float[Array, "batch length embed"]:
    """This layer's part of the per-layer embedding, gated by `hidden` [batch length embed]."""
    gate = gelu(product("ble,ep->blp", hidden, params["per_layer_input_gate"]["kernel"]))
    return product("blp,pe->ble", gate * per_layer, params["per_layer_projection"]["kernel"])


def output_table(
    tree: Params, text: TextArchitecture, dtype: Dtype = "float32"
) -> Float[Array, "vocab embed"]:
    """The tied output table [vocab embed]: the stored embedding without its factor √embed."""
    table = jnp.asarray(tree["token_embedder"]["embedding"]).astype(jnp.float32)
    return (table / np.float32(text.embed**0.5)).astype(dtype)


def _named_norm(params: Params, epsilon: float, name: str, x: jax.Array) -> jax.Array:
    return rms_norm(x, params[name]["scale"], epsilon)
