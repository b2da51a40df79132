"""The axes that the arrays of MaxText's tree have for one architecture, written out by hand.

Layout: MaxText (August 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.forward.shapes import Shape, check_fit, lengths, shape_of
from gemma_convert.forward.sharding import Axes
from gemma_convert.forward.tree import ArrayFacts
from gemma_convert.model.architecture import Layer, TextArchitecture


def check_shapes(facts: Mapping[str, ArrayFacts], text: TextArchitecture, where: Path) -> None:
    """Nothing where every array that the forward pass reads is there and fits `text`.

    Raises SourceError that names the arrays that do not.
    """
    scanned = any(path.startswith("decoder/scanned_blocks/") for path in facts)
    if scanned and text.period is None:
        raise SourceError(
            "The checkpoint is scanned, but by config.json its layers do not repeat in blocks.",
            where=where,
            do="give the config.json of the model that was converted",
        )
    check_fit(facts, dict(_text_shapes(text, scanned)), "decoder/layers_", text, where)


def text_axes(text: TextArchitecture) -> dict[str, Axes]:
    """The axes of every array that the forward pass reads, scanned or not, by its path."""
    found = dict(_outer_axes(text))
    for layer in text.layers:
        for prefix in {_place(text, layer.index, scanned) for scanned in (False, True)}:
            for name, (first, *rest) in _layer_axes(text, layer):
                found[f"{prefix}/{name}"] = (first, *_scan(prefix), *rest)
    return found


def layer_axes(text: TextArchitecture, layer: Layer) -> dict[str, Axes]:
    """The axes of a layer's arrays by path below it, without those of a scan."""
    return dict(_layer_axes(text, layer))


def _text_shapes(text: TextArchitecture, scanned: bool) -> Iterator[tuple[str, Shape]]:
    for path, axes in _outer_axes(text):
        yield path, shape_of(axes, lengths(text))
    period = text.period or 1
    stacks = {"blocks": len(text.layers) // period, "block_layers": period - 1}
    for layer in text.layers:
        prefix = _place(text, layer.index, scanned)
        length = lengths(text, layer) | stacks
        for name, (first, *rest) in _layer_axes(text, layer):
            yield f"{prefix}/{name}", shape_of((first, *_scan(prefix), *rest), length)


def _place(text: TextArchitecture, index: int, scanned: bool) -> str:
    """Where a layer stands in the tree."""
    if not scanned or text.period is None:
        return f"decoder/layers_{index}"
    if (index + 1) % text.period:
        return "decoder/scanned_blocks/local_layers"
    return "decoder/scanned_blocks/global_layer"


def _scan(place: str) -> Axes:
    """The scan axes of the arrays of a layer that stands there; they are behind the first axis."""
    if place.endswith("local_layers"):
        return "blocks", "block_layers"
    return ("blocks",) if place.endswith("global_layer") else ()


def _outer_axes(text: TextArchitecture) -> Iterator[tuple[str, Axes]]:
    yield "token_embedder/embedding", ("vocab", "embed")
    yield "decoder/decoder_norm/scale", ("embed",)
    if not text.tied:
        yield "decoder/logits_dense/kernel", ("embed", "vocab")
    if text.ple:
        embedder = "decoder/per_layer_embedder"
        yield f"{embedder}/embed_tokens_per_layer", ("ple_vocab", "layers_ple")
        yield f"{embedder}/per_layer_model_projection/kernel", ("embed", "layers_ple")
        yield f"{embedder}/per_layer_projection_norm/scale", ("ple",)


def _layer_axes(text: TextArchitecture, layer: Layer) -> Iterator[tuple[str, Axes]]:
    yield "self_attention/query/kernel", ("embed", "heads", "head_dim")
    yield "self_attention/out/kernel", ("heads", "head_dim", "embed")
    yield "self_attention/query_norm/scale", ("head_dim",)
    if layer.owns_kv:
        yield "self_attention/key/kernel", ("embed", "kv_heads", "head_dim")
        yield "self_attention/key_norm/scale", ("head_dim",)
    if layer.owns_value:
        yield "self_attention/value/kernel", ("embed", "kv_heads", "head_dim")
    for name in ("pre_self_attention", "post_self_attention", "pre_ffw", "post_ffw"):
        yield f"{name}_norm/scale", ("embed",)
    yield "layer_scalar", ("one",)
    if text.ple:
        yield "per_layer_input_gate/kernel", ("embed", "ple")
        yield "per_layer_projection/kernel", ("ple", "embed")
        yield "post_per_layer_input_norm/scale", ("embed",)
    dense = "mlp/moe_block/shared_experts" if text.moe else "mlp"
    yield f"{dense}/wi_0/kernel", ("embed", "mlp")
    yield f"{dense}/wi_1/kernel", ("embed", "mlp")
    yield f"{dense}/wo/kernel", ("mlp", "embed")
    if text.moe:
        yield from _mixture_axes()


def _mixture_axes() -> Iterator[tuple[str, Axes]]:
    routed = "mlp/moe_block/MoeBlock_0"
    yield f"{routed}/wi_0", ("experts", "embed", "expert_mlp")
    yield f"{routed}/wi_1", ("experts", "embed", "expert_mlp")
    yield f"{routed}/wo", ("experts", "expert_mlp", "embed")
    yield f"{routed}/gate/kernel", ("embed", "experts")
    yield f"{routed}/per_expert_scale", ("experts",)
    yield "mlp/pre_forward_scale_2", ("embed",)
    yield "mlp/pre_feedforward_layernorm_2/scale", ("embed",)
    yield "mlp/post_feedforward_layernorm_1/scale", ("embed",)
    yield "mlp/post_feedforward_layernorm_2/scale", ("embed",)
