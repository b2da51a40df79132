"""The shapes that the gemma library's tree must have for one architecture, written out by hand.

Layout: google/gemma 4.1.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gemma_convert.architecture import Layer, TextArchitecture
from gemma_convert.native.restore import ArrayFacts
from gemma_convert.native.shapes import Shape, check_fit


def check_shapes(facts: Mapping[str, ArrayFacts], text: TextArchitecture, where: Path) -> None:
    """Nothing where every array that the library asks for is there and fits `text`.

    It asks for the keys and values of every layer, also of those that share another's. Towers are
    not looked at. Raises SourceError that names the arrays that do not fit.
    """
    check_fit(facts, dict(_text_shapes(text)), "layer_", text, where)


def _text_shapes(text: TextArchitecture) -> Iterator[tuple[str, Shape]]:
    yield "embedder/input_embedding", (text.vocab, text.embed)
    yield "final_norm/scale", (text.embed,)
    if text.ple:
        by_layer = (len(text.layers), text.ple)
        yield "embedder/per_layer_embeddings", (text.ple_vocab, *by_layer)
        yield "embedder/per_layer_model_projection/w", (text.embed, *by_layer)
        yield "embedder/per_layer_projection_norm/scale", (text.ple,)
    for layer in text.layers:
        for name, shape in _layer_shapes(text, layer):
            yield f"layer_{layer.index}/{name}", shape


def _layer_shapes(text: TextArchitecture, layer: Layer) -> Iterator[tuple[str, Shape]]:
    embed, head_dim = text.embed, layer.head_dim
    yield "attn/q_einsum/w", (layer.heads, embed, head_dim)
    if text.key_as_value and not layer.sliding:
        yield "attn/k_einsum/w", (layer.kv_heads, embed, head_dim)
    else:
        yield "attn/kv_einsum/w", (2, layer.kv_heads, embed, head_dim)
    yield "attn/attn_vec_einsum/w", (layer.heads, head_dim, embed)
    yield "attn/query_norm/scale", (head_dim,)
    yield "attn/key_norm/scale", (head_dim,)
    for name in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
        yield f"{name}_norm/scale", (embed,)
    yield "skip_scale", (1,)
    if text.ple:
        yield "per_layer_input_gate/w", (embed, text.ple)
        yield "per_layer_projection/w", (text.ple, embed)
        yield "post_per_layer_input_norm/scale", (embed,)
    dense = "mlp2" if text.moe else "mlp"
    yield f"{dense}/gating_einsum/w", (2, layer.mlp, embed)
    yield f"{dense}/linear/w", (layer.mlp, embed)
    if text.moe:
        yield from _mixture_shapes(text)


def _mixture_shapes(text: TextArchitecture) -> Iterator[tuple[str, Shape]]:
    embed, experts, width = text.embed, text.experts, text.expert_mlp
    for name in ("pre_ffw2", "post_ffw2", "post_ffw1"):
        yield f"{name}_norm/scale", (embed,)
    yield "mlp/gating_einsum/w", (experts, 2, width, embed)
    yield "mlp/linear/w", (experts, width, embed)
    yield "mlp/router_logits/w", (embed, experts)
    yield "mlp/router_scale", (embed,)
    yield "mlp/per_expert_scale", (experts,)
