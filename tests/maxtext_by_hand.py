"""Hugging Face → MaxText written out by hand with numpy, without any mapping table.

An independent second opinion on the tables: every transpose is spelled out.
"""

from __future__ import annotations

import numpy as np

from gemma_convert.model.architecture import Architecture


def maxtext_tree(
    hf: dict[str, np.ndarray], architecture: Architecture, scanned: bool
) -> dict[str, np.ndarray]:
    """Path below params/params → array, for the text model of `hf`."""
    text = architecture.text
    prefix = "model." if architecture.text_only else "model.language_model."
    embedding = hf[prefix + "embed_tokens.weight"].astype(np.float32)
    tree = {
        "token_embedder/embedding": embedding * np.float32(text.embed**0.5),
        "decoder/decoder_norm/scale": hf[prefix + "norm.weight"],
    }
    if not text.tied:
        tree["decoder/logits_dense/kernel"] = hf["lm_head.weight"].T
    if text.ple:
        ple = "decoder/per_layer_embedder/"
        tree[ple + "embed_tokens_per_layer"] = hf[prefix + "embed_tokens_per_layer.weight"]
        tree[ple + "per_layer_model_projection/kernel"] = hf[
            prefix + "per_layer_model_projection.weight"
        ].T
        tree[ple + "per_layer_projection_norm/scale"] = hf[
            prefix + "per_layer_projection_norm.weight"
        ]
    layers = [_layer(hf, f"{prefix}layers.{layer.index}.", layer, text) for layer in text.layers]
    if not scanned:
        for index, layer in enumerate(layers):
            tree |= {f"decoder/layers_{index}/{name}": value for name, value in layer.items()}
        return tree
    period = text.period
    local = [layers[block : block + period - 1] for block in range(0, len(layers), period)]
    for name in layers[0]:
        stacked = np.stack([np.stack([layer[name] for layer in block], 0) for block in local], 0)
        tree[f"decoder/scanned_blocks/local_layers/{name}"] = np.moveaxis(stacked, 2, 0)
    for name in layers[period - 1]:
        stacked = np.stack([layer[name] for layer in layers[period - 1 :: period]], 0)
        tree[f"decoder/scanned_blocks/global_layer/{name}"] = np.moveaxis(stacked, 1, 0)
    return tree


def _layer(hf, at, facts, text) -> dict[str, np.ndarray]:
    heads, head_dim, embed = facts.heads, facts.head_dim, text.embed
    layer = {
        "self_attention/query/kernel": hf[at + "self_attn.q_proj.weight"].T.reshape(
            embed, heads, head_dim
        ),
        "self_attention/out/kernel": hf[at + "self_attn.o_proj.weight"].T.reshape(
            heads, head_dim, embed
        ),
        "self_attention/query_norm/scale": hf[at + "self_attn.q_norm.weight"],
        "pre_self_attention_norm/scale": hf[at + "input_layernorm.weight"],
        "post_self_attention_norm/scale": hf[at + "post_attention_layernorm.weight"],
        "pre_ffw_norm/scale": hf[at + "pre_feedforward_layernorm.weight"],
        "post_ffw_norm/scale": hf[at + "post_feedforward_layernorm.weight"],
        "layer_scalar": hf[at + "layer_scalar"],
    }
    if facts.owns_kv:
        shape = (embed, facts.kv_heads, head_dim)
        layer["self_attention/key/kernel"] = hf[at + "self_attn.k_proj.weight"].T.reshape(shape)
        layer["self_attention/key_norm/scale"] = hf[at + "self_attn.k_norm.weight"]
        if facts.owns_value:
            value = hf[at + "self_attn.v_proj.weight"].T.reshape(shape)
            layer["self_attention/value/kernel"] = value
    dense = "mlp/moe_block/shared_experts/" if text.moe else "mlp/"
    layer[dense + "wi_0/kernel"] = hf[at + "mlp.gate_proj.weight"].T
    layer[dense + "wi_1/kernel"] = hf[at + "mlp.up_proj.weight"].T
    layer[dense + "wo/kernel"] = hf[at + "mlp.down_proj.weight"].T
    if text.moe:
        layer |= _experts(hf, at, text)
    if text.ple:
        layer["per_layer_input_gate/kernel"] = hf[at + "per_layer_input_gate.weight"].T
        layer["per_layer_projection/kernel"] = hf[at + "per_layer_projection.weight"].T
        layer["post_per_layer_input_norm/scale"] = hf[at + "post_per_layer_input_norm.weight"]
    return layer


def _experts(hf, at, text) -> dict[str, np.ndarray]:
    moe, width = "mlp/moe_block/MoeBlock_0/", text.expert_mlp
    gate_up = hf[at + "experts.gate_up_proj"]
    return {
        moe + "wi_0": gate_up[:, :width].transpose(0, 2, 1),
        moe + "wi_1": gate_up[:, width:].transpose(0, 2, 1),
        moe + "wo": hf[at + "experts.down_proj"].transpose(0, 2, 1),
        moe + "gate/kernel": hf[at + "router.proj.weight"].T,
        moe + "per_expert_scale": hf[at + "router.per_expert_scale"],
        "mlp/pre_forward_scale_2": hf[at + "router.scale"],
        "mlp/pre_feedforward_layernorm_2/scale": hf[at + "pre_feedforward_layernorm_2.weight"],
        "mlp/post_feedforward_layernorm_1/scale": hf[at + "post_feedforward_layernorm_1.weight"],
        "mlp/post_feedforward_layernorm_2/scale": hf[at + "post_feedforward_layernorm_2.weight"],
    }
