"""The gemma library's parameter tree and prompts → logits: the Gemma 4 language model in JAX.

Arrays are used as google/gemma 4.1.0 lays them out, never through a mapping table, so that no
mistake of a table can cancel itself here. Arithmetic: `forward/decoder_layer.py`. Nothing is folded
into the arrays: the embedding is stored without its factor √embed. Where there are experts, `mlp`
holds them and `mlp2` the dense branch, and the norms are numbered accordingly.
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
from gemma_convert.layouts.gemma_jax.shapes import TREE
from gemma_convert.model.architecture import TextArchitecture

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_NORMS: Mapping[Norm, tuple[str, ...]] = {
    "pre_attention": ("pre_attention_norm",),
    "query": ("attn", "query_norm"),
    "key": ("attn", "key_norm"),
    "post_attention": ("post_attention_norm",),
    "pre_dense": ("pre_ffw_norm",),
    "post_feed_forward": ("post_ffw_norm",),
    "post_per_layer": ("post_per_layer_input_norm",),
}
_NORMS_OF_MIXTURE: Mapping[Norm, tuple[str, ...]] = {
    **_NORMS,
    "pre_dense": ("pre_ffw2_norm",),
    "post_dense": ("post_ffw2_norm",),
    "pre_experts": ("pre_ffw_norm",),
    "post_experts": ("post_ffw1_norm",),
}
_UNUSED_WHERE_SHARED = ("kv_einsum", "k_einsum", "key_norm")


def text_modules(text: TextArchitecture) -> tuple[str, ...]:
    """The keys of the tree that the language model is made of."""
    return "embedder", *(f"layer_{layer.index}" for layer in text.layers), "final_norm"


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


def weights(tree: Params, text: TextArchitecture) -> GemmaJaxWeights:
    """The arrays of `tree`, which may still be in a file, and the products over their axes."""
    return GemmaJaxWeights(tree, text)


def output_table(
    tree: Params, text: TextArchitecture, dtype: Dtype = "float32"
) -> Float[Array, "vocab embed"]:
    """The tied output table [vocab embed]: the embedding as it is stored."""
    return output_rows(stored_table(tree, text), text, dtype)


def stored_table(tree: Params, text: TextArchitecture) -> Any:
    """The array [vocab embed], perhaps still in a file, that the output table is made of."""
    del text  # the library has no other table
    return at(tree, "embedder", "input_embedding")


def output_rows(
    stored: Float[Array, "rows embed"], text: TextArchitecture, dtype: Dtype = "float32"
) -> Float[Array, "rows embed"]:
    """Rows of the output table, made of the same rows of `stored_table`."""
    return place(stored, ("vocab", "embed")).astype(dtype)


@dataclass(frozen=True)
class GemmaJaxWeights:
    """The nested dict that the library loads, its dense feed-forward kernels below `w`."""

    tree: Params
    text: TextArchitecture

    def embedding(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        rows = gather(at(self.tree, "embedder", "input_embedding"), tokens).astype(jnp.float32)
        return rows * np.float32(self.text.embed**0.5)

    def per_layer_rows(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> Float[Array, "batch length layers ple"]:
        return gather(at(self.tree, "embedder", "per_layer_embeddings"), tokens)

    def per_layer_context(
        self, embedded: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length layers ple"]:
        stored = at(self.tree, "embedder", "per_layer_model_projection", "w")
        return product("ble,eyp->blyp", embedded, place(stored, ("embed", "layers", "ple")))

    def per_layer_scale(self) -> Float[Array, " ple"]:
        return place(at(self.tree, "embedder", "per_layer_projection_norm", "scale"))

    def layer(self, index: int) -> GemmaJaxLayer:
        return GemmaJaxLayer(layer_params(self.tree, self.text, index))

    def layer_axes(self, index: int) -> Mapping[str, Axes]:
        return TREE.layer_axes(self.text, self.text.layers[index])

    def final_scale(self) -> Float[Array, " embed"]:
        return place(at(self.tree, "final_norm", "scale"))


def layer_params(tree: Params, text: TextArchitecture, index: int) -> Params:
    """Parameters of one layer, without those that the library declares and throws away.

    A layer that shares another's keys and values has key and value kernels whatever they hold.
    """
    layer: Params = tree[f"layer_{index}"]
    if text.layers[index].owns_kv:
        return layer
    used = {
        name: below for name, below in layer["attn"].items() if name not in _UNUSED_WHERE_SHARED
    }
    return {**layer, "attn": used}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GemmaJaxLayer:
    """One layer's parameters; heads, kv and gate_up stand before the axis that is taken in."""

    params: Params

    def scale(self, norm: Norm) -> Float[Array, " size"]:
        norms = _NORMS_OF_MIXTURE if "mlp2" in self.params else _NORMS
        return at(self.params, *norms[norm], "scale")

    def query(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length heads head_dim"]:
        return product("ble,hed->blhd", hidden, at(self.params, "attn", "q_einsum", "w"))

    def key_value(
        self, hidden: Float[Array, "batch length embed"], owns_value: bool
    ) -> tuple[
        Float[Array, "batch length kv_heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
    ]:
        if not owns_value:
            key = product("ble,ked->blkd", hidden, at(self.params, "attn", "k_einsum", "w"))
            return key, key
        key, value = product("ble,cked->cblkd", hidden, at(self.params, "attn", "kv_einsum", "w"))
        return key, value

    def attended(
        self, mixed: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length embed"]:
        return product("blhd,hde->ble", mixed, at(self.params, "attn", "attn_vec_einsum", "w"))

    def dense(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        branch = "mlp2" if "mlp2" in self.params else "mlp"
        kernels = tuple(at(self.params, branch, name, "w") for name in ("gating_einsum", "linear"))
        return self.expert(kernels, hidden)

    def router_scale(self) -> Float[Array, " embed"]:
        return at(self.params, "mlp", "router_scale")

    def router_scores(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length experts"]:
        return product("ble,ex->blx", hidden, at(self.params, "mlp", "router_logits", "w"))

    def per_expert_scale(self) -> Float[Array, " experts"]:
        return at(self.params, "mlp", "per_expert_scale")

    def experts(self) -> Any:
        return at(self.params, "mlp", "gating_einsum", "w"), at(self.params, "mlp", "linear", "w")

    def expert(
        self, kernels: Any, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        gating, linear = kernels
        gate, up = product("ble,cme->cblm", hidden, gating)
        return product("blm,me->ble", gelu(gate) * up, linear)

    def per_layer_gate(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length ple"]:
        return product("ble,ep->blp", hidden, at(self.params, "per_layer_input_gate", "w"))

    def per_layer_out(
        self, gated: Float[Array, "batch length ple"]
    ) -> Float[Array, "batch length embed"]:
        return product("blp,pe->ble", gated, at(self.params, "per_layer_projection", "w"))

    def scalar(self) -> Float[Array, " 1"]:
        return at(self.params, "skip_scale")
