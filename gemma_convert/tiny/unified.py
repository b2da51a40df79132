"""What a tiny 12B has of its own: embedders in the place of towers, as config.json says it.

Features and keys are those of google/gemma-4-12B and of `models/gemma4_unified` in transformers
5.23.
"""

from __future__ import annotations

from gemma_convert.tiny.sizes import POOLING, EmbedderSizes
from gemma_convert.tiny.tokenizer import SOFT_TOKENS, SPECIAL_TOKENS


def unified_config_json(sizes: EmbedderSizes, published: bool) -> dict[str, object]:
    """config.json without its text_config, dtype and version."""
    tokens = SPECIAL_TOKENS
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "audio_config": _audio_config(sizes, published),
        "audio_token_id": tokens["<|audio|>"],
        "boa_token_id": tokens["<|audio>"],
        "boi_token_id": tokens["<|image>"],
        "eoa_token_index": tokens["<audio|>"],
        "eoi_token_id": tokens["<image|>"],
        "image_token_id": tokens["<|image|>"],
        "initializer_range": 0.02,
        "model_type": "gemma4_unified",
        "tie_word_embeddings": True,
        "video_token_id": tokens["<|video|>"],
        "vision_config": _vision_config(sizes, published),
    }


def _vision_config(sizes: EmbedderSizes, published: bool) -> dict[str, object]:
    return {
        "initializer_range": 0.02,
        "mm_embed_dim": sizes.embed,
        "mm_posemb_size": sizes.positions,
        **({"model_patch_size": POOLING * sizes.patch_size} if published else {}),
        "model_type": "gemma4_unified_vision",
        "num_soft_tokens": SOFT_TOKENS,
        "output_proj_dims": sizes.embed,
        "patch_size": sizes.patch_size,
        "pooling_kernel_size": POOLING,
        "rms_norm_eps": 1e-06,
    }


def _audio_config(sizes: EmbedderSizes, published: bool) -> dict[str, object]:
    width = {"hidden_size": sizes.frame, "output_proj_dims": sizes.frame}
    return {
        "audio_embed_dim": sizes.frame,
        **({"audio_samples_per_token": sizes.frame, **width} if published else {}),
        "initializer_range": 0.02,
        "model_type": "gemma4_unified_audio",
        "rms_norm_eps": 1e-06,
    }
