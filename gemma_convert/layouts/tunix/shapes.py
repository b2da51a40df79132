"""The axes that the arrays of Tunix' tree have for one architecture, written out by hand.

Layout: `tunix/models/gemma4/model.py` and `moe.py` of google-tunix 0.1.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gemma_convert.forward.shapes import Shape, check_fit, lengths, shape_of
from gemma_convert.forward.sharding import Axes
from gemma_convert.forward.tree import ArrayFacts
from gemma_convert.model.architecture import Layer, TextArchitecture


def check_shapes(facts: Mapping[str, ArrayFacts], text: TextArchitecture, where: Path) -> None:
    """Nothing where every array that Tunix asks for is there and fits `text`.

    It asks for the keys and values of every layer, also of those that share another's. Raises
    SourceError that names the arrays that do not fit.
    """
    check_fit(facts, dict(_text_shapes(text)), "layers/", text, where)


def text_axes(text: TextArchitecture) -> dict[str, Axes]:
    """The axes of every array that Tunix asks for, by path."""
    found = dict(_outer_axes(text))
    for layer in text.layers:
        for name, axes in _layer_axes(text, layer):
            found[f"layers/{layer.index}/{name}"] = axes
    return found


def layer_axes(text: TextArchitecture, layer: Layer) -> dict[str, Axes]:
    """The axes of a layer's arrays by path below it."""
    return dict(_layer_axes(text, layer))


def _text_shapes(text: TextArchitecture) -> Iterator[tuple[str, Shape]]:
    for path, axes in _outer_axes(text):
        yield path, shape_of(axes, lengths(text))
    for layer in text.layers:
        for name, axes in _layer_axes(text, layer):
            yield f"layers/{layer.index}/{name}", shape_of(axes, lengths(text, layer))


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
