"""What config.json says of a model, key by key, as one set of values that layouts are told.

Keys are those of config.json, whole models' spelling; defaults are filled in, and a fact that has
two spellings (per-layer sizes, experts) stands under the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_convert.model.architecture import Architecture, Rope, TextArchitecture

Fact = int | float | str | bool | None

_ROPE = "text_config.rope_parameters"
FULL_THETA = f"{_ROPE}.full_attention.rope_theta"
FULL_FRACTION = f"{_ROPE}.full_attention.partial_rotary_factor"
SLIDING_THETA = f"{_ROPE}.sliding_attention.rope_theta"
SLIDING_FRACTION = f"{_ROPE}.sliding_attention.partial_rotary_factor"
EPSILON = "text_config.rms_norm_eps"
SOFTCAP = "text_config.final_logit_softcapping"
WINDOW = "text_config.sliding_window"
TIED = "text_config.tie_word_embeddings"
VISION_THETA = "vision_config.rope_parameters.rope_theta"


def facts_of(architecture: Architecture) -> dict[str, Fact]:
    """Key of config.json → its value, of the text model and of a vision tower where there is one.

    `text_config.layer_types` is told as a pattern (`layer_pattern`).
    """
    return {**_text(architecture.text), **_vision(architecture)}


def _text(text: TextArchitecture) -> dict[str, Fact]:
    sliding = next((layer for layer in text.layers if layer.sliding), text.layers[-1])
    full = text.layers[-1]
    return {
        "text_config.vocab_size": text.vocab,
        "text_config.hidden_size": text.embed,
        "text_config.num_hidden_layers": len(text.layers),
        "text_config.layer_types": layer_pattern(text),
        "text_config.intermediate_size": text.layers[0].mlp,
        "text_config.num_attention_heads": sliding.heads,
        "text_config.num_key_value_heads": sliding.kv_heads,
        "text_config.head_dim": sliding.head_dim,
        "text_config.global_head_dim": full.head_dim,
        "text_config.num_global_key_value_heads": full.kv_heads,
        "text_config.attention_k_eq_v": text.key_as_value,
        "text_config.num_kv_shared_layers": text.kv_shared_layers,
        "text_config.use_double_wide_mlp": text.double_wide_mlp,
        "text_config.hidden_size_per_layer_input": text.ple,
        "text_config.vocab_size_per_layer_input": text.ple_vocab,
        "text_config.num_experts": text.experts,
        "text_config.top_k_experts": text.experts_per_token,
        "text_config.moe_intermediate_size": text.expert_mlp,
        TIED: text.tied,
        WINDOW: text.window,
        EPSILON: text.norm_epsilon,
        SOFTCAP: text.logit_softcap,
        SLIDING_THETA: text.rope_sliding.theta,
        SLIDING_FRACTION: text.rope_sliding.fraction,
        FULL_THETA: text.rope_full.theta,
        FULL_FRACTION: text.rope_full.fraction,
    }


def _vision(architecture: Architecture) -> dict[str, Fact]:
    vision = architecture.vision
    if vision is None:
        return {}
    bidirectional = "vision" if architecture.text.bidirectional_images else "none"
    return {
        "text_config.pad_token_id": architecture.text.pad_token,
        "text_config.use_bidirectional_attention": bidirectional,
        "vision_config.hidden_size": vision.embed,
        "vision_config.num_hidden_layers": vision.layers,
        "vision_config.num_attention_heads": vision.heads,
        "vision_config.intermediate_size": vision.mlp,
        "vision_config.patch_size": vision.patch_size,
        "vision_config.position_embedding_size": vision.positions,
        "vision_config.pooling_kernel_size": vision.pooling,
        VISION_THETA: vision.rope_theta,
        "vision_config.rms_norm_eps": vision.norm_epsilon,
        "vision_config.standardize": vision.standardize,
        "vision_config.use_clipped_linears": vision.clipped,
    }


def layer_pattern(text: TextArchitecture) -> str:
    """How kinds of layers follow one another: `5 sliding, 1 full`, or all of them, one by one.

    The last layer is full whatever config.json says, and may break the pattern.
    """
    kinds = [layer.sliding for layer in text.layers]
    period = kinds.index(False) + 1
    if all(kind == bool((place + 1) % period) for place, kind in enumerate(kinds)):
        return f"{period - 1} sliding, 1 full"
    return " ".join("sliding" if kind else "full" for kind in kinds)


NUMBERS = (EPSILON, SLIDING_THETA, SLIDING_FRACTION, FULL_THETA, FULL_FRACTION, VISION_THETA)
ARITHMETIC = (*NUMBERS, WINDOW, SOFTCAP, TIED)
"""The facts that layers compute with, beside their sizes."""


def is_value(key: str, value: object) -> bool:
    """Whether `value` may stand for an arithmetic fact; a soft-cap may be none."""
    if key == SOFTCAP and value is None:
        return True
    if key == TIED:
        return isinstance(value, bool)
    number = isinstance(value, int if key == WINDOW else int | float)
    return number and not isinstance(value, bool) and 0 < value < 1e30  # type: ignore[operator]


def with_facts(architecture: Architecture, facts: Mapping[str, Any]) -> Architecture:
    """The model with `facts`, which has arithmetic ones alone; the others stay as they are."""
    text, vision = architecture.text, architecture.vision
    ours = {**facts_of(architecture), **facts}
    text = replace(
        text,
        window=ours[WINDOW],
        norm_epsilon=ours[EPSILON],
        logit_softcap=ours[SOFTCAP],
        tied=ours[TIED],
        rope_sliding=Rope(ours[SLIDING_THETA], ours[SLIDING_FRACTION]),
        rope_full=Rope(ours[FULL_THETA], ours[FULL_FRACTION]),
    )
    if vision is not None:
        vision = replace(vision, rope_theta=ours[VISION_THETA])
    return replace(architecture, text=text, vision=vision)
