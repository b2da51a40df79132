"""The shapes that MaxText's tree must have for one architecture, written out by hand.

Layout: MaxText (August 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gemma_convert.architecture import Layer, TextArchitecture
from gemma_convert.errors import SourceError
from gemma_convert.native.restore import ArrayFacts
from gemma_convert.native.shapes import Shape, check_fit


def check_shapes(facts: Mapping[str, ArrayFacts], text: TextArchitecture, where: Path) -> None:
    """Nothing where every array that the forward pass reads is there and fits `text`.

    Raises SourceError that names the arrays that do not.
    """
    scanned = any(path.startswith("decoder/scanned_blocks/") for path in facts)
    if scanned and text.period is None:
        raise SourceError(
            "The tree is scanned, but by config.json its layers do not repeat in blocks.",
            where=where,
            do="give the config.json of the model that was converted",
        )
    check_fit(facts, dict(_text_shapes(text, scanned)), "decoder/layers_", text, where)


def _text_shapes(text: TextArchitecture, scanned: bool) -> Iterator[tuple[str, Shape]]:
    yield "token_embedder/embedding", (text.vocab, text.embed)
    yield "decoder/decoder_norm/scale", (text.embed,)
    if text.ple:
        packed = len(text.layers) * text.ple
        yield "decoder/per_layer_embedder/embed_tokens_per_layer", (text.ple_vocab, packed)
        yield (
            "decoder/per_layer_embedder/per_layer_model_projection/kernel",
            (text.embed, packed),
        )
        yield "decoder/per_layer_embedder/per_layer_projection_norm/scale", (text.ple,)
    for layer in text.layers:
        prefix, scan = _place(text, layer.index, scanned)
        for name, (first, *rest) in _layer_shapes(text, layer):
            yield f"{prefix}/{name}", (first, *scan, *rest)


def _place(text: TextArchitecture, index: int, scanned: bool) -> tuple[str, Shape]:
    """Where a layer stands in the tree, and the scan axes of its arrays."""
    if not scanned or text.period is None:
        return f"decoder/layers_{index}", ()
    blocks = len(text.layers) // text.period
    if (index + 1) % text.period:
        return "decoder/scanned_blocks/local_layers", (blocks, text.period - 1)
    return "decoder/scanned_blocks/global_layer", (blocks,)


def _layer_shapes(text: TextArchitecture, layer: Layer) -> Iterator[tuple[str, Shape]]:
    embed, head_dim = text.embed, layer.head_dim
    yield "self_attention/query/kernel", (embed, layer.heads, head_dim)
    yield "self_attention/out/kernel", (layer.heads, head_dim, embed)
    yield "self_attention/query_norm/scale", (head_dim,)
    if layer.owns_kv:
        yield "self_attention/key/kernel", (embed, layer.kv_heads, head_dim)
        yield "self_attention/key_norm/scale", (head_dim,)
    if layer.owns_value:
        yield "self_attention/value/kernel", (embed, layer.kv_heads, head_dim)
    for name in ("pre_self_attention", "post_self_attention", "pre_ffw", "post_ffw"):
        yield f"{name}_norm/scale", (embed,)
    yield "layer_scalar", (1,)
    if text.ple:
        yield "per_layer_input_gate/kernel", (embed, text.ple)
        yield "per_layer_projection/kernel", (text.ple, embed)
        yield "post_per_layer_input_norm/scale", (embed,)
    yield from _feed_forward_shapes(text, layer.mlp)


def _feed_forward_shapes(text: TextArchitecture, mlp: int) -> Iterator[tuple[str, Shape]]:
    embed = text.embed
    dense = "mlp/moe_block/shared_experts" if text.moe else "mlp"
    yield f"{dense}/wi_0/kernel", (embed, mlp)
    yield f"{dense}/wi_1/kernel", (embed, mlp)
    yield f"{dense}/wo/kernel", (mlp, embed)
    if not text.moe:
        return
    routed = "mlp/moe_block/MoeBlock_0"
    yield f"{routed}/wi_0", (text.experts, embed, text.expert_mlp)
    yield f"{routed}/wi_1", (text.experts, embed, text.expert_mlp)
    yield f"{routed}/wo", (text.experts, text.expert_mlp, embed)
    yield f"{routed}/gate/kernel", (embed, text.experts)
    yield f"{routed}/per_expert_scale", (text.experts,)
    yield "mlp/pre_forward_scale_2", (embed,)
    yield "mlp/pre_feedforward_layernorm_2/scale", (embed,)
    yield "mlp/post_feedforward_layernorm_1/scale", (embed,)
    yield "mlp/post_feedforward_layernorm_2/scale", (embed,)
