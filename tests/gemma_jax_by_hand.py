"""Hugging Face → google/gemma 4.1.0 written out by hand with numpy, without any mapping table.

An independent second opinion on the tables: every transpose is spelled out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_convert.model.architecture import (
    Architecture,
    AudioArchitecture,
    Layer,
    TextArchitecture,
    VisionArchitecture,
)

Arrays = Mapping[str, np.ndarray]
Flat = dict[str, np.ndarray]

BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def gemma_jax_tree(hf: Arrays, architecture: Architecture) -> Flat:
    """Path → array, dtypes kept; a key that holds a slash stands in single quotes.

    Layers that share another's keys and values get zeros and a norm of ones where `hf` has none.
    Towers are there where `hf` has their tensors.
    """
    tree = _text(hf, architecture)
    if architecture.vision is not None:
        tree |= _vision(hf, architecture.vision)
    if architecture.audio is not None:
        tree |= _audio(hf, architecture.audio)
    return tree


def nested(flat: Arrays) -> dict[str, Any]:
    """The nested dict of a flat one, path → array."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *keys, last = (quoted or key for quoted, key in re.findall("'([^']*)'|([^/]+)", path))
        below = tree
        for key in keys:
            below = below.setdefault(key, {})
        below[last] = array
    return tree


def flat(tree: Mapping[str, Any], at: str = "") -> Flat:
    """The flat dict of a nested one, path → array."""
    found: Flat = {}
    for name, below in tree.items():
        path = f"{at}'{name}'" if "/" in name else at + name
        found |= flat(below, path + "/") if isinstance(below, Mapping) else {path: below}
    return found


def heads_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """A linear's weight [heads · head_dim, embed] as [heads embed head_dim]."""
    return weight.reshape(heads, -1, weight.shape[1]).transpose(0, 2, 1)


def _text(hf: Arrays, architecture: Architecture) -> Flat:
    text = architecture.text
    prefix = "model." if architecture.text_only else "model.language_model."
    tree = {
        "embedder/input_embedding": hf[prefix + "embed_tokens.weight"],
        "final_norm/scale": hf[prefix + "norm.weight"],
    }
    if text.ple:
        packed = (len(text.layers), text.ple)
        table = hf[prefix + "embed_tokens_per_layer.weight"]
        tree["embedder/per_layer_embeddings"] = table.reshape(text.ple_vocab, *packed)
        projection = hf[prefix + "per_layer_model_projection.weight"]
        tree["embedder/per_layer_model_projection/w"] = projection.T.reshape(text.embed, *packed)
        tree["embedder/per_layer_projection_norm/scale"] = hf[
            prefix + "per_layer_projection_norm.weight"
        ]
    for facts in text.layers:
        layer = _layer(hf, f"{prefix}layers.{facts.index}.", facts, text)
        tree |= {f"layer_{facts.index}/{name}": array for name, array in layer.items()}
    return tree


def _layer(hf: Arrays, at: str, facts: Layer, text: TextArchitecture) -> Flat:
    layer = {
        "attn/q_einsum/w": heads_first(hf[at + "self_attn.q_proj.weight"], facts.heads),
        "attn/attn_vec_einsum/w": hf[at + "self_attn.o_proj.weight"].T.reshape(
            facts.heads, facts.head_dim, text.embed
        ),
        "attn/query_norm/scale": hf[at + "self_attn.q_norm.weight"],
        "pre_attention_norm/scale": hf[at + "input_layernorm.weight"],
        "post_attention_norm/scale": hf[at + "post_attention_layernorm.weight"],
        "post_ffw_norm/scale": hf[at + "post_feedforward_layernorm.weight"],
        "skip_scale": hf[at + "layer_scalar"],
        **_keys_and_values(hf, at, facts, text),
    }
    dense = "mlp2/" if text.moe else "mlp/"
    layer[dense + "gating_einsum/w"] = np.stack(
        [hf[at + "mlp.gate_proj.weight"], hf[at + "mlp.up_proj.weight"]]
    )
    layer[dense + "linear/w"] = hf[at + "mlp.down_proj.weight"].T
    if text.moe:
        layer |= _experts(hf, at, text)
    else:
        layer["pre_ffw_norm/scale"] = hf[at + "pre_feedforward_layernorm.weight"]
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

    key = heads_first(found("k_proj", zeros), facts.kv_heads)
    norm = {"attn/key_norm/scale": found("k_norm", ones)}
    if text.key_as_value and not facts.sliding:
        return {"attn/k_einsum/w": key, **norm}
    value = heads_first(found("v_proj", zeros), facts.kv_heads)
    return {"attn/kv_einsum/w": np.stack([key, value]), **norm}


def _experts(hf: Arrays, at: str, text: TextArchitecture) -> Flat:
    gate_up = hf[at + "experts.gate_up_proj"]
    return {
        "mlp/gating_einsum/w": gate_up.reshape(text.experts, 2, text.expert_mlp, text.embed),
        "mlp/linear/w": hf[at + "experts.down_proj"].transpose(0, 2, 1),
        "mlp/router_logits/w": hf[at + "router.proj.weight"].T,
        "mlp/router_scale": hf[at + "router.scale"],
        "mlp/per_expert_scale": hf[at + "router.per_expert_scale"],
        "pre_ffw2_norm/scale": hf[at + "pre_feedforward_layernorm.weight"],
        "post_ffw2_norm/scale": hf[at + "post_feedforward_layernorm_1.weight"],
        "pre_ffw_norm/scale": hf[at + "pre_feedforward_layernorm_2.weight"],
        "post_ffw1_norm/scale": hf[at + "post_feedforward_layernorm_2.weight"],
    }


def _vision(hf: Arrays, vision: VisionArchitecture) -> Flat:
    tower = "model.vision_tower."
    entry = "vision_encoder/entry/"
    table = hf[tower + "patch_embedder.position_embedding_table"]
    tree = {
        "embedder/mm_input_projection/w": hf["model.embed_vision.embedding_projection.weight"].T,
        entry + "input_projection/w": hf[tower + "patch_embedder.input_proj.weight"].T,
        entry + "pos_emb": table.transpose(1, 0, 2),
    }
    if vision.standardize:
        tree["vision_encoder/standardize/scale"] = hf[tower + "std_scale"]
        tree["vision_encoder/standardize/bias"] = hf[tower + "std_bias"]
    layers = [
        _vision_layer(hf, f"{tower}encoder.layers.{index}.", vision)
        for index in range(vision.layers)
    ]
    for name in layers[0]:
        stacked = np.stack([layer[name] for layer in layers])
        tree[f"vision_encoder/transformer/stacked_layers/block/{name}"] = stacked
    return tree


def _vision_layer(hf: Arrays, at: str, vision: VisionArchitecture) -> Flat:
    heads = vision.heads

    def linear(name: str) -> np.ndarray:
        return hf[f"{at}{name}_proj.linear.weight"]

    key, value = (heads_first(linear(f"self_attn.{name}"), heads) for name in "kv")
    layer = {
        "attn/q_einsum/w": heads_first(linear("self_attn.q"), heads),
        "attn/kv_einsum/w": np.stack([key, value]),
        "attn/attn_vec_einsum/w": linear("self_attn.o").T.reshape(
            heads, vision.head_dim, vision.embed
        ),
        "attn/query_norm/scale": hf[at + "self_attn.q_norm.weight"],
        "attn/key_norm/scale": hf[at + "self_attn.k_norm.weight"],
        "mlp/gating_einsum/w": np.stack([linear("mlp.gate"), linear("mlp.up")]),
        "mlp/linear/w": linear("mlp.down").T,
        "pre_attention_norm/scale": hf[at + "input_layernorm.weight"],
        "post_attention_norm/scale": hf[at + "post_attention_layernorm.weight"],
        "pre_ffw_norm/scale": hf[at + "pre_feedforward_layernorm.weight"],
        "post_ffw_norm/scale": hf[at + "post_feedforward_layernorm.weight"],
    }
    if vision.clipped:
        for ours, theirs in {
            "attn/q_einsum": "self_attn.q",
            "attn/kv_einsum": "self_attn.k",
            "attn/attn_vec_einsum": "self_attn.o",
            "mlp/gating_einsum": "mlp.gate",
            "mlp/linear": "mlp.down",
        }.items():
            for bound in BOUNDS:
                layer[f"{ours}/clip_{bound}"] = hf[f"{at}{theirs}_proj.{bound}"]
    return layer


def _audio(hf: Arrays, audio: AudioArchitecture) -> Flat:
    tower = "model.audio_tower."
    convolutions = tower + "subsample_conv_projection."
    feature = "audio_encoder/feature/"
    projection = hf["model.embed_audio.embedding_projection.weight"]
    input_projection = hf[convolutions + "input_proj_linear.weight"]
    tree = {
        "embedder/audio_input_projection/w": projection.T,
        feature + "input_proj/kernel": input_projection.T.reshape(
            audio.frequencies, audio.channels[-1], audio.embed
        ),
        "audio_encoder/output_projection/kernel": hf[tower + "output_proj.weight"].T,
        "audio_encoder/output_projection/bias": hf[tower + "output_proj.bias"],
    }
    for stage in range(len(audio.channels)):
        kernel = hf[f"{convolutions}layer{stage}.conv.weight"]
        tree[f"{feature}subsampling_{stage}/kernel"] = kernel.transpose(2, 3, 1, 0)
        tree[f"{feature}norm_{stage}/scale"] = hf[f"{convolutions}layer{stage}.norm.weight"]
    for index in range(audio.layers):
        layer = _audio_layer(hf, f"{tower}layers.{index}.", audio)
        at = f"audio_encoder/'conformer/stacked_layers_{index}'"
        tree |= {f"{at}/{name}": array for name, array in layer.items()}
    return tree


def _audio_layer(hf: Arrays, at: str, audio: AudioArchitecture) -> Flat:
    split = (audio.heads, audio.embed // audio.heads)
    self_attention = "trans_atten/self_atten/"
    relative = hf[at + "self_attn.relative_k_proj.weight"]
    layer = {
        self_attention + "per_dim_scale": hf[at + "self_attn.per_dim_scale"],
        self_attention + "relative_position_embedding/pos_proj/kernel": relative.T.reshape(
            audio.embed, *split
        ),
        "lconv/depthwise_conv1d/kernel": hf[at + "lconv1d.depthwise_conv1d.weight"].transpose(
            2, 1, 0
        ),
    }
    linears = {
        "fflayer_start/ffn_layer1": "feed_forward1.ffw_layer_1",
        "fflayer_start/ffn_layer2": "feed_forward1.ffw_layer_2",
        "fflayer_end/ffn_layer1": "feed_forward2.ffw_layer_1",
        "fflayer_end/ffn_layer2": "feed_forward2.ffw_layer_2",
        self_attention + "query": "self_attn.q_proj",
        self_attention + "key": "self_attn.k_proj",
        self_attention + "value": "self_attn.v_proj",
        "trans_atten/post": "self_attn.post",
        "lconv/linear_start": "lconv1d.linear_start",
        "lconv/linear_end": "lconv1d.linear_end",
    }
    for ours, theirs in linears.items():
        layer[f"{ours}/kernel"] = hf[f"{at}{theirs}.linear.weight"].T
        if audio.clipped:
            for bound in BOUNDS:
                layer[f"{ours}/clip_{bound}"] = hf[f"{at}{theirs}.{bound}"]
    post = layer["trans_atten/post/kernel"]
    layer["trans_atten/post/kernel"] = post.reshape(*split, audio.embed)
    for ours, theirs in {
        "fflayer_start/pre_layer_norm": "feed_forward1.pre_layer_norm",
        "fflayer_start/post_layer_norm": "feed_forward1.post_layer_norm",
        "fflayer_end/pre_layer_norm": "feed_forward2.pre_layer_norm",
        "fflayer_end/post_layer_norm": "feed_forward2.post_layer_norm",
        "trans_atten/pre_norm": "norm_pre_attn",
        "trans_atten/post_norm": "norm_post_attn",
        "final_ln": "norm_out",
        "lconv/ln": "lconv1d.pre_layer_norm",
        "lconv/conv_norm": "lconv1d.conv_norm",
    }.items():
        layer[f"{ours}/scale"] = hf[f"{at}{theirs}.weight"]
    return layer
