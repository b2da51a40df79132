"""Hugging Face → google-tunix 0.1.7 written out by hand with numpy, without any mapping table.

An independent second opinion on the table: every transpose is spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma_convert.model.architecture import Architecture, Layer, TextArchitecture

Arrays = Mapping[str, np.ndarray]
Flat = dict[str, np.ndarray]


def tunix_tree(hf: Arrays, architecture: Architecture) -> Flat:
    """Path on disk → array, dtypes kept.

    Layers that share another's keys and values get zeros and a norm of ones where `hf` has none.
    """
    text = architecture.text
    prefix = "model." if architecture.text_only else "model.language_model."
    table = hf[prefix + "embed_tokens.weight"]
    tree = {"embedder/input_embedding": table, "final_norm/scale": hf[prefix + "norm.weight"]}
    if text.ple:
        rows = hf[prefix + "embed_tokens_per_layer.weight"]
        projection = hf[prefix + "per_layer_model_projection.weight"]
        packed = (len(text.layers), text.ple)
        tree["embedder/per_layer_input_embedding"] = rows.reshape(len(table), *packed)
        tree["embedder/per_layer_model_projection/w"] = projection.T.reshape(text.embed, *packed)
        tree["embedder/per_layer_projection_norm/scale"] = hf[
            prefix + "per_layer_projection_norm.weight"
        ]
    for facts in text.layers:
        layer = _layer(hf, f"{prefix}layers.{facts.index}.", facts, text)
        tree |= {f"layers/{facts.index}/{name}": array for name, array in layer.items()}
    return {f"{name}/value": array for name, array in tree.items()}


def _heads_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """A linear's weight [heads · head_dim, embed] as [heads embed head_dim]."""
    return weight.reshape(heads, -1, weight.shape[1]).transpose(0, 2, 1)


def _layer(hf: Arrays, at: str, facts: Layer, text: TextArchitecture) -> Flat:
    layer = {
        "attn/q_einsum/w": _heads_first(hf[at + "self_attn.q_proj.weight"], facts.heads),
        "attn/attn_vec_einsum/w": hf[at + "self_attn.o_proj.weight"].T.reshape(
            facts.heads, facts.head_dim, text.embed
        ),
        "attn/_query_norm/scale": hf[at + "self_attn.q_norm.weight"],
        "pre_attention_norm/scale": hf[at + "input_layernorm.weight"],
        "post_attention_norm/scale": hf[at + "post_attention_layernorm.weight"],
        "pre_ffw_norm/scale": hf[at + "pre_feedforward_layernorm.weight"],
        "post_ffw_norm/scale": hf[at + "post_feedforward_layernorm.weight"],
        "mlp/gate_proj/kernel": hf[at + "mlp.gate_proj.weight"].T,
        "mlp/up_proj/kernel": hf[at + "mlp.up_proj.weight"].T,
        "mlp/down_proj/kernel": hf[at + "mlp.down_proj.weight"].T,
        "skip_scale": hf[at + "layer_scalar"],
        **_keys_and_values(hf, at, facts, text),
    }
    if text.moe:
        gate_up = hf[at + "experts.gate_up_proj"]
        layer |= {
            "moe/gating_einsum": gate_up.reshape(text.experts, 2, text.expert_mlp, text.embed),
            "moe/linear": hf[at + "experts.down_proj"].transpose(0, 2, 1),
            "moe/router_logits": hf[at + "router.proj.weight"].T,
            "moe/router_scale": hf[at + "router.scale"],
            "moe/per_expert_scale": hf[at + "router.per_expert_scale"],
            "moe_pre_ffw_norm/scale": hf[at + "pre_feedforward_layernorm_2.weight"],
            "dense_post_ffw_norm/scale": hf[at + "post_feedforward_layernorm_1.weight"],
            "moe_post_ffw_norm/scale": hf[at + "post_feedforward_layernorm_2.weight"],
        }
    if text.ple:
        layer["per_layer_input_gate/w"] = hf[at + "per_layer_input_gate.weight"].T
        layer["per_layer_projection/w"] = hf[at + "per_layer_projection.weight"].T
        layer["post_per_layer_input_norm/scale"] = hf[at + "post_per_layer_input_norm.weight"]
    return layer


def _keys_and_values(hf: Arrays, at: str, facts: Layer, text: TextArchitecture) -> Flat:
    like = hf[at + "self_attn.q_proj.weight"]
    zeros = np.zeros((facts.kv_heads * facts.head_dim, text.embed), like.dtype)
    ones = np.ones(facts.head_dim, like.dtype)

    def found(name: str, filling: np.ndarray) -> np.ndarray:
        weight = f"{at}self_attn.{name}.weight"
        return hf[weight] if facts.owns_kv else hf.get(weight, filling)

    key = _heads_first(found("k_proj", zeros), facts.kv_heads)
    norm = {"attn/_key_norm/scale": found("k_norm", ones)}
    if text.key_as_value and not facts.sliding:
        return {"attn/k_einsum/w": key, **norm}
    value = _heads_first(found("v_proj", zeros), facts.kv_heads)
    return {"attn/kv_einsum/w": np.stack([key, value]), **norm}
