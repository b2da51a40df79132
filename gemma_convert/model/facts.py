"""What config.json says of a model, key by key, as one set of values that layouts are told.

Keys are those of config.json, whole models' spelling; defaults are filled in, and a fact that has
two spellings (per-layer sizes, experts) stands under the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemma_convert.model.architecture import Architecture, TextArchitecture

_TEXT = "text_config."

Fact = int | float | str | bool | None

ROPE = "text_config.rope_parameters"
FULL_THETA = f"{ROPE}.full_attention.rope_theta"
FULL_FRACTION = f"{ROPE}.full_attention.partial_rotary_factor"
SLIDING_THETA = f"{ROPE}.sliding_attention.rope_theta"
SLIDING_FRACTION = f"{ROPE}.sliding_attention.partial_rotary_factor"
EPSILON = "text_config.rms_norm_eps"
SOFTCAP = "text_config.final_logit_softcapping"
LAYER_TYPES = "text_config.layer_types"
TOP_K = "text_config.top_k_experts"
WINDOW = "text_config.sliding_window"
TIED = "text_config.tie_word_embeddings"
VISION_THETA = "vision_config.rope_parameters.rope_theta"


def facts_of(architecture: Architecture) -> dict[str, Fact]:
    """Key of config.json → its value, of the text model and of a vision tower where there is one.

    `text_config.layer_types` is told as a pattern (`layer_pattern`).
    """
    return {**_text(architecture.text), **_vision(architecture), **_embedder(architecture)}


def key_read(key: str, architecture: Architecture) -> str:
    """The key as it stands in config.json; whether the head is tied, the top level says alone."""
    return key.removeprefix(_TEXT) if architecture.text_only or key == TIED else key


def _text(text: TextArchitecture) -> dict[str, Fact]:
    sliding = next((layer for layer in text.layers if layer.sliding), text.layers[-1])
    full = text.layers[-1]
    of_full = {"text_config.num_global_key_value_heads": full.kv_heads} if text.key_as_value else {}
    return {
        **of_full,
        "text_config.vocab_size": text.vocab,
        "text_config.hidden_size": text.embed,
        "text_config.num_hidden_layers": len(text.layers),
        LAYER_TYPES: layer_pattern(text),
        "text_config.intermediate_size": text.layers[0].mlp,
        "text_config.num_attention_heads": sliding.heads,
        "text_config.num_key_value_heads": sliding.kv_heads,
        "text_config.head_dim": sliding.head_dim,
        "text_config.global_head_dim": full.head_dim,
        "text_config.attention_k_eq_v": text.key_as_value,
        "text_config.num_kv_shared_layers": text.kv_shared_layers,
        "text_config.use_double_wide_mlp": text.double_wide_mlp,
        "text_config.hidden_size_per_layer_input": text.ple,
        "text_config.vocab_size_per_layer_input": text.ple_vocab,
        "text_config.num_experts": text.experts,
        TOP_K: text.experts_per_token,
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


def _of_images(text: TextArchitecture) -> dict[str, Fact]:
    bidirectional = "vision" if text.bidirectional_images else "none"
    return {
        "text_config.pad_token_id": text.pad_token,
        "text_config.use_bidirectional_attention": bidirectional,
    }


def _embedder(architecture: Architecture) -> dict[str, Fact]:
    vision = architecture.vision_embedder
    if vision is None:
        return {}
    return {
        **_of_images(architecture.text),
        "vision_config.mm_embed_dim": vision.embed,
        "vision_config.model_patch_size": vision.patch_size * vision.pooling,
        "vision_config.mm_posemb_size": vision.positions,
        "vision_config.rms_norm_eps": vision.norm_epsilon,
    }


def _vision(architecture: Architecture) -> dict[str, Fact]:
    vision = architecture.vision
    if vision is None:
        return {}
    return {
        **_of_images(architecture.text),
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
    return pattern_of([layer.sliding for layer in text.layers])


def pattern_of(sliding: Sequence[bool]) -> str:
    """The pattern of layers of which these are sliding, the others full."""
    period = sliding.index(False) + 1 if False in sliding else len(sliding) + 1
    if all(kind == bool((place + 1) % period) for place, kind in enumerate(sliding)):
        return f"{period - 1} sliding, 1 full"
    return " ".join("sliding" if kind else "full" for kind in sliding)


def kinds_of(pattern: str, layers: int) -> list[str]:
    """The `layer_types` of so many layers, of which `layer_pattern` gives this pattern."""
    words = pattern.split()
    if words and words[0].isdigit():
        period = int(words[0]) + 1
        words = ["full" if place % period == 0 else "sliding" for place in range(1, layers + 1)]
    return [f"{word}_attention" for word in words]


NUMBERS = (EPSILON, SLIDING_THETA, SLIDING_FRACTION, FULL_THETA, FULL_FRACTION, VISION_THETA)
FRACTIONS = (SLIDING_FRACTION, FULL_FRACTION)
WHOLE_NUMBERS = (WINDOW, TOP_K)
ARITHMETIC = (*NUMBERS, *WHOLE_NUMBERS, SOFTCAP)
"""The facts that layers compute with and no shape of a tensor bears out."""


def is_value(key: str, value: object) -> bool:
    """Whether `value` may stand for the fact; arithmetic ones are positive, or no soft-cap.

    Of what turns, a head has its whole at the most.
    """
    if key not in ARITHMETIC:
        return value is None or isinstance(value, int | float | str)
    if key == SOFTCAP and value is None:
        return True
    number = isinstance(value, int if key in WHOLE_NUMBERS else int | float)
    most = 1 if key in FRACTIONS else 1e30
    return number and not isinstance(value, bool) and 0 < value <= most  # type: ignore[operator]
