"""MaxText's parameter tree and prompts → logits: the Gemma 4 language model in JAX.

Kernels are used as MaxText lays them out, never through a mapping table, so that no mistake of a
table can cancel itself here. Arithmetic: `forward/decoder_layer.py`. Layout of the tree: MaxText
(August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_convert.forward import decoder
from gemma_convert.forward.arithmetic import gelu, head, product
from gemma_convert.forward.decoder_weights import Norm, Params, at
from gemma_convert.forward.native_model import Dtype
from gemma_convert.forward.prompt import Prompt
from gemma_convert.forward.sharding import Axes, gather, place
from gemma_convert.layouts.maxtext.shapes import layer_axes
from gemma_convert.model.architecture import TextArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_NORMS: Mapping[Norm, tuple[str, ...]] = {
    "pre_attention": ("pre_self_attention_norm",),
    "query": ("self_attention", "query_norm"),
    "key": ("self_attention", "key_norm"),
    "post_attention": ("post_self_attention_norm",),
    "pre_dense": ("pre_ffw_norm",),
    "post_dense": ("mlp", "post_feedforward_layernorm_1"),
    "pre_experts": ("mlp", "pre_feedforward_layernorm_2"),
    "post_experts": ("mlp", "post_feedforward_layernorm_2"),
    "post_feed_forward": ("post_ffw_norm",),
    "post_per_layer": ("post_per_layer_input_norm",),
}
_PER_LAYER = ("decoder", "per_layer_embedder")
_ROUTED = ("mlp", "moe_block", "MoeBlock_0")


def text_modules(text: TextArchitecture) -> tuple[str, ...]:
    """The modules below params/params that the language model is made of."""
    return "token_embedder", "decoder"


def forward(
    tree: Params,
    text: TextArchitecture,
    tokens: Int[np.ndarray, "batch length"],
    dtype: Dtype = "float32",
) -> Float[Array, "batch length vocab"]:
    """Logits [batch length vocab] in float32 of all positions at once."""
    (hidden,) = final_hidden(tree, text, [Prompt(tokens)], dtype)
    return head(output_table(tree, text, dtype), hidden, text)


def final_hidden(
    tree: Params, text: TextArchitecture, prompts: Sequence[Prompt], dtype: Dtype = "float32"
) -> list[Float[Array, "batch length embed"]]:
    """What the head is given [batch length embed], for each of `prompts`."""
    return decoder.final_hidden(weights(tree, text), text, prompts, dtype)


def weights(tree: Params, text: TextArchitecture) -> MaxTextWeights:
    """The arrays of `tree`, which may still be in a file, and the products over their axes."""
    return MaxTextWeights(tree, text)


def output_table(
    tree: Params, text: TextArchitecture, dtype: Dtype = "float32"
) -> Float[Array, "vocab embed"]:
    """The output table [vocab embed]: a kernel of its own, or the stored embedding over √embed."""
    return output_rows(stored_table(tree, text), text, dtype)


def stored_table(tree: Params, text: TextArchitecture) -> Any:
    """The array [vocab embed], perhaps still in a file, that the output table is made of."""
    if text.tied:
        return at(tree, "token_embedder", "embedding")
    return at(tree, "decoder", "logits_dense", "kernel").T


def output_rows(
    stored: Float[Array, "rows embed"], text: TextArchitecture, dtype: Dtype = "float32"
) -> Float[Array, "rows embed"]:
    """Rows of the output table, made of the same rows of `stored_table`."""
    table = place(stored, ("vocab", "embed"))
    if text.tied:
        table = table.astype(jnp.float32) / np.float32(text.embed**0.5)
    return table.astype(dtype)


@dataclass(frozen=True)
class MaxTextWeights:
    """The tree below params/params, scanned or not; its embedding is stored × √embed."""

    tree: Params
    text: TextArchitecture

    def embedding(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        return gather(at(self.tree, "token_embedder", "embedding"), tokens)

    def per_layer_rows(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length layers ple"]:
        return self._by_layer(gather(at(self.tree, *_PER_LAYER, "embed_tokens_per_layer"), tokens))

    def per_layer_context(
        self, embedded: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length layers ple"]:
        stored = at(self.tree, *_PER_LAYER, "per_layer_model_projection", "kernel")
        kernel = place(stored, ("embed", "layers_ple"))
        return self._by_layer(product("ble,ep->blp", embedded, kernel))

    def per_layer_scale(self) -> Float[Array, " ple"]:
        return place(at(self.tree, *_PER_LAYER, "per_layer_projection_norm", "scale"))

    def layer(self, index: int) -> MaxTextLayer:
        return MaxTextLayer(layer_params(self.tree, self.text, index))

    def layer_axes(self, index: int) -> Mapping[str, Axes]:
        return layer_axes(self.text, self.text.layers[index])

    def final_scale(self) -> Float[Array, " embed"]:
        return place(at(self.tree, "decoder", "decoder_norm", "scale"))

    def _by_layer(self, packed: jax.Array) -> jax.Array:
        return packed.reshape(*packed.shape[:-1], len(self.text.layers), self.text.ple)


def layer_params(tree: Params, text: TextArchitecture, index: int) -> Params:
    """Parameters of one layer, with the scan axes taken away where the tree is scanned.

    Scan axes stand after the first axis of every array: [first blocks place rest] in local_layers,
    [first blocks rest] in global_layer.
    """
    layers: Params = tree["decoder"]
    if "scanned_blocks" not in layers:
        found: Params = layers[f"layers_{index}"]
        return found
    if text.period is None:
        raise ValueError("layers that do not repeat cannot have been scanned")
    block, place = divmod(index, text.period)
    blocks = layers["scanned_blocks"]
    if place == text.period - 1:
        return _taken(blocks["global_layer"], (block,))
    return _taken(blocks["local_layers"], (block, place))


def _taken(tree: Params, index: tuple[int, ...]) -> Params:
    """Entry `index` of the scan axes of every array, left where it is."""
    on_devices = all(isinstance(array, jax.Array) for array in jax.tree.leaves(tree))
    taken: Params = (_take_all if on_devices else _take)(tree, index)
    return taken


def _take(tree: Params, index: tuple[int, ...]) -> Params:
    taken: Params = jax.tree.map(lambda array: array[:, *index], tree)
    return taken


_take_all = jax.jit(_take)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaxTextLayer:
    """One layer's parameters; every kernel has the axes that it takes in first."""

    params: Params

    def scale(self, norm: Norm) -> Float[Array, " size"]:
        return at(self.params, *_NORMS[norm], "scale")

    def query(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length heads head_dim"]:
        return product(
            "ble,ehd->blhd", hidden, at(self.params, "self_attention", "query", "kernel")
        )

    def key_value(
        self, hidden: Float[Array, "batch length embed"], owns_value: bool
    ) -> tuple[
        Float[Array, "batch length kv_heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
    ]:
        key = product("ble,ekd->blkd", hidden, at(self.params, "self_attention", "key", "kernel"))
        if not owns_value:
            return key, key
        return key, product(
            "ble,ekd->blkd", hidden, at(self.params, "self_attention", "value", "kernel")
        )

    def attended(
        self, mixed: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length embed"]:
        return product("blhd,hde->ble", mixed, at(self.params, "self_attention", "out", "kernel"))

    def dense(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        mlp = self.params["mlp"]
        branch = mlp["moe_block"]["shared_experts"] if "moe_block" in mlp else mlp
        kernels = tuple(branch[name]["kernel"] for name in ("wi_0", "wi_1", "wo"))
        return self.expert(kernels, hidden)

    def router_scale(self) -> Float[Array, " embed"]:
        return at(self.params, "mlp", "pre_forward_scale_2")

    def router_scores(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length experts"]:
        return product("ble,ex->blx", hidden, at(self.params, *_ROUTED, "gate", "kernel"))

    def per_expert_scale(self) -> Float[Array, " experts"]:
        return at(self.params, *_ROUTED, "per_expert_scale")

    def experts(self) -> Any:
        return tuple(at(self.params, *_ROUTED, name) for name in ("wi_0", "wi_1", "wo"))

    def expert(
        self, kernels: Any, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        gate, up, down = kernels
        inner = gelu(product("ble,em->blm", hidden, gate)) * product("ble,em->blm", hidden, up)
        return product("blm,me->ble", inner, down)

    def per_layer_gate(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length ple"]:
        return product("ble,ep->blp", hidden, at(self.params, "per_layer_input_gate", "kernel"))

    def per_layer_out(
        self, gated: Float[Array, "batch length ple"]
    ) -> Float[Array, "batch length embed"]:
        return product("blp,pe->ble", gated, at(self.params, "per_layer_projection", "kernel"))

    def scalar(self) -> Float[Array, " 1"]:
        return at(self.params, "layer_scalar")
