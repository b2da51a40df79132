"""A Gemma 4 model for the formulas, from the facts that the whole package goes by."""

from __future__ import annotations

from gemma_convert.flops.attention import Reach
from gemma_convert.flops.model import DecoderLayer, Dense, Experts, FeedForward, GroupedQuery, Model
from gemma_convert.model.architecture import Architecture, Layer, TextArchitecture

IMAGE_TOKENS = 280
"""Soft tokens of an image by default (vision_soft_tokens_per_image of the published configs)."""


def gemma4(architecture: Architecture, image_tokens: int = IMAGE_TOKENS) -> Model:
    """The model that a Gemma 4 architecture describes."""
    text = architecture.text
    return Model(
        family=f"gemma4 {architecture.family}",
        vocab=text.vocab,
        embed=text.embed,
        layers=tuple(_layer(layer, text) for layer in text.layers),
        ple=text.ple,
        ple_vocab=text.ple_vocab,
        tied=text.tied,
        vision=architecture.sight,
        audio=architecture.audio or architecture.audio_embedder,
        bidirectional_images=text.bidirectional_images,
        image_tokens=image_tokens,
    )


def _layer(layer: Layer, text: TextArchitecture) -> DecoderLayer:
    """A mixture of experts stands beside the dense MLP, not in its place."""
    mixer = GroupedQuery(
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        reach=Reach("sliding", text.window) if layer.sliding else Reach(),
        owns_k=layer.owns_kv,
        owns_v=layer.owns_value,
    )
    feed_forward: tuple[FeedForward, ...] = (Dense(layer.mlp),)
    if text.moe:
        feed_forward += (Experts(text.experts, text.experts_per_token, text.expert_mlp),)
    return DecoderLayer(mixer, feed_forward)
