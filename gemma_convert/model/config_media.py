"""vision_config and audio_config → the towers, or the embedders of 12B that stand in their place.

Keys and defaults: `configuration_gemma4.py` and `configuration_gemma4_unified.py` of transformers
5.23.
"""

from __future__ import annotations

from collections.abc import Mapping

from gemma_convert.model.architecture import (
    AudioArchitecture,
    AudioEmbedder,
    VisionArchitecture,
    VisionEmbedder,
)
from gemma_convert.model.config_section import MAX_SIZE, Section

_VISION_ARITHMETIC = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_AUDIO_ARITHMETIC = {
    "hidden_act": "silu",
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_logit_cap": 50.0,
    "residual_weight": 0.5,
    "gradient_clipping": 1e10,
    "rms_norm_eps": 1e-6,
}
"""What all published towers have, and the frameworks build in."""


def _refuse_other_arithmetic(config: Section, published: Mapping[str, object]) -> None:
    for key, value in published.items():
        found = config.values.get(key, value)
        if found != value and not (found is None and value is False):
            raise config.error(key, f"{value}, which the frameworks build in", found)


def vision_tower(config: Section) -> VisionArchitecture:
    """The vision tower. Raises SourceError for one that the frameworks do not compute."""
    _refuse_other_arithmetic(config, _VISION_ARITHMETIC)
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if kv_heads != heads:
        raise config.error("num_key_value_heads", f"{heads}, as many as query heads", kv_heads)
    patch_size = config.integer("patch_size", 16)
    rope = config.section("rope_parameters")
    return VisionArchitecture(
        embed=config.integer("hidden_size"),
        layers=config.layers(),
        heads=heads,
        head_dim=config.integer("head_dim"),
        mlp=config.integer("intermediate_size"),
        patch=3 * patch_size * patch_size,
        patch_size=patch_size,
        positions=config.integer("position_embedding_size", 10240),
        pooling=config.integer("pooling_kernel_size", 3),
        rope_theta=100.0 if rope is None else rope.number("rope_theta", 100.0),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        clipped=config.boolean("use_clipped_linears", False),
        standardize=config.boolean("standardize", False),
    )


def audio_tower(config: Section) -> AudioArchitecture:
    """The audio tower. Raises SourceError for one that the frameworks do not compute."""
    _refuse_other_arithmetic(config, _AUDIO_ARITHMETIC)
    channels = config.values.get("subsampling_conv_channels", [128, 32])
    if not isinstance(channels, list) or len(channels) != 2:
        raise config.error("subsampling_conv_channels", "two numbers of channels", channels)
    for channel in channels:
        if not isinstance(channel, int) or isinstance(channel, bool) or not 0 < channel < MAX_SIZE:
            raise config.error("subsampling_conv_channels", "two numbers of channels", channels)
    embed, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if embed % heads:
        raise config.error("num_attention_heads", f"a divisor of hidden_size {embed}", heads)
    return AudioArchitecture(
        embed=embed,
        layers=config.layers(),
        heads=heads,
        output=config.integer("output_proj_dims", 1536),
        channels=tuple(channels),
        frequencies=channels[0] // 4,
        kernel=config.integer("conv_kernel_size", 5),
        clipped=config.boolean("use_clipped_linears", True),
    )


def vision_embedder(config: Section) -> VisionEmbedder:
    """The embedder of patches. Raises SourceError where its two widths differ."""
    embed = config.integer("mm_embed_dim", 3840)
    patch_size = config.integer("patch_size", 16)
    pooling = config.integer("pooling_kernel_size", 3)
    side = patch_size * pooling
    _refuse_other_sizes(config, {"output_proj_dims": 3840}, embed, "mm_embed_dim")
    _refuse_other_sizes(config, {"model_patch_size": side}, side, "patch_size · pooling")
    return VisionEmbedder(
        embed=embed,
        patch=3 * side * side,
        patch_size=patch_size,
        pooling=pooling,
        positions=config.integer("mm_posemb_size", 1120),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
    )


_FRAME_KEYS = ("audio_embed_dim", "output_proj_dims", "hidden_size", "audio_samples_per_token")


def audio_embedder(config: Section) -> AudioEmbedder:
    """The embedder of raw samples. Raises SourceError where the keys for its width differ."""
    key = next((key for key in _FRAME_KEYS if config.values.get(key) is not None), _FRAME_KEYS[0])
    frame = config.integer(key, 640)
    _refuse_other_sizes(config, dict.fromkeys(_FRAME_KEYS, frame), frame, key)
    return AudioEmbedder(frame=frame)


def _refuse_other_sizes(config: Section, keys: Mapping[str, int], size: int, like: str) -> None:
    """Refuses another size than `size` at `keys`, each of which has a default."""
    for key, default in keys.items():
        found = config.integer(key, default)
        if found != size:
            raise config.error(key, f"{size}, as {like}", found)
