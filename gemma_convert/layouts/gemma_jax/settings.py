"""How the gemma library is told to load a converted checkpoint.

Names: `gm.nn.Gemma4_*` and `TransformerConfig` of version 4.1.0, which has no class for 12B
(google-deepmind/gemma, issue 709). Its text model differs from 31B's in sizes alone, so it is 31B's
class with another config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_convert.model.architecture import Architecture, Family

MODELS: Mapping[Family, str] = {
    "e2b": "gm.nn.Gemma4_E2B",
    "e4b": "gm.nn.Gemma4_E4B",
    "26b-a4b": "gm.nn.Gemma4_26B_A4B",
    "31b": "gm.nn.Gemma4_31B",
}

_BASE = MODELS["31b"]
_BASE_SIZES = {
    "num_embed": 262144,
    "embed_dim": 5376,
    "hidden_dim": 21504,
    "num_heads": 32,
    "head_dim": 256,
    "num_kv_heads": 16,
    "global_key_size": 512,
    "num_global_kv_heads": 4,
    "sliding_window_size": 1024,
}


def gemma_jax_settings(architecture: Architecture, target: Path) -> dict[str, str]:
    """Setting → value: the model, for 12B its config as well, and its parameters."""
    params = {"params": f'gm.ckpts.load_params("{target.absolute()}")'}
    if architecture.family != "12b":
        return {"model": f"{MODELS[architecture.family]}()", **params}
    sizes = ", ".join(f"{key}={value}" for key, value in _sizes(architecture).items())
    return {
        "model": f"{_BASE}(config=config)",
        "config": f"dataclasses.replace({_BASE}.config, {sizes})",
        **params,
    }


def _sizes(architecture: Architecture) -> dict[str, object]:
    """What 12B's config has in the place of 31B's; both repeat blocks of six layers."""
    text = architecture.text
    sliding = next((layer for layer in text.layers if layer.sliding), text.layers[-1])
    full = text.layers[-1]
    found = {
        "num_embed": text.vocab,
        "embed_dim": text.embed,
        "hidden_dim": sliding.mlp,
        "num_heads": sliding.heads,
        "head_dim": sliding.head_dim,
        "num_kv_heads": sliding.kv_heads,
        "global_key_size": full.head_dim,
        "num_global_kv_heads": full.kv_heads,
        "sliding_window_size": text.window,
    }
    changed = {key: size for key, size in found.items() if size != _BASE_SIZES[key]}
    types = f"{_BASE}.config.attention_types[:6] * {len(text.layers) // 6}"
    return {**changed, "attention_types": types, "vision_encoder": None}
