"""The axes that the arrays of Tunix' tree have for one architecture, written out by hand.

Layout: `tunix/models/gemma4/model.py` and `moe.py` of google-tunix 0.1.7.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma_convert.forward.shapes import TreeAxes
from gemma_convert.forward.sharding import Axes
from gemma_convert.model.architecture import Layer, TextArchitecture


def _outer_axes(text: TextArchitecture) -> Iterator[tuple[str, Axes]]:
    yield "embedder/input_embedding", ("vocab", "embed")
    yield "final_norm/scale", ("embed",)
    if text.ple:
        yield "embedder/per_layer_input_embedding", ("ple_vocab", "layers", "ple")
        yield "embedder/per_layer_model_projection/w", ("embed", "layers", "ple")
        yield "embedder/per_layer_projection_norm/scale", ("ple",)


def _layer_axes(text: TextArchitecture, layer: Layer) -> Iterator[tuple[str, Axes]]:
    yield "attn/q_einsum/w", ("heads", "embed", "head_dim")
    if text.key_as_value and not layer.sliding:
        yield "attn/k_einsum/w", ("kv_heads", "embed", "head_dim")
    else:
        yield "attn/kv_einsum/w", ("kv", "kv_heads", "embed", "head_dim")
    yield "attn/attn_vec_einsum/w", ("heads", "head_dim", "embed")
    yield "attn/_query_norm/scale", ("head_dim",)
    yield "attn/_key_norm/scale", ("head_dim",)
    for name in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
        yield f"{name}_norm/scale", ("embed",)
    yield "skip_scale", ("one",)
    yield "mlp/gate_proj/kernel", ("embed", "mlp")
    yield "mlp/up_proj/kernel", ("embed", "mlp")
    yield "mlp/down_proj/kernel", ("mlp", "embed")
    if text.moe:
        yield from _mixture_axes()
    if text.ple:
        yield "per_layer_input_gate/w", ("embed", "ple")
        yield "per_layer_projection/w", ("ple", "embed")
        yield "post_per_layer_input_norm/scale", ("embed",)


def _mixture_axes() -> Iterator[tuple[str, Axes]]:
    for name in ("moe_pre_ffw", "moe_post_ffw", "dense_post_ffw"):
        yield f"{name}_norm/scale", ("embed",)
    yield "moe/gating_einsum", ("experts", "gate_up", "expert_mlp", "embed")
    yield "moe/linear", ("experts", "expert_mlp", "embed")
    yield "moe/router_logits", ("embed", "experts")
    yield "moe/router_scale", ("embed",)
    yield "moe/per_expert_scale", ("experts",)


TREE = TreeAxes("layers/", _outer_axes, _layer_axes)
"""Keys and values are asked for of every layer, also of those that share another's."""
