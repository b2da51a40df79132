"""The MaxText settings under which a converted checkpoint loads.

Names and defaults: MaxText's `configs/models/gemma4-{e2b,e4b,26b,31b}.yml` and `configs/base.yml`.
The MaxText of August 2026 has no name for 12B, whose text model differs from 31B's in sizes alone.
So 31B's name is given, and every size that differs.
"""

from __future__ import annotations

from pathlib import Path

from gemma_convert.model.architecture import Architecture, Family

MODEL_NAMES: dict[Family, str] = {
    "e2b": "gemma4-e2b",
    "e4b": "gemma4-e4b",
    "12b": "gemma4-31b",
    "26b-a4b": "gemma4-26b",
    "31b": "gemma4-31b",
}

_PUBLISHED: dict[str, dict[str, int]] = {
    "gemma4-e2b": {
        "base_num_decoder_layers": 35,
        "base_emb_dim": 1536,
        "base_num_query_heads": 8,
        "base_num_kv_heads": 1,
        "base_mlp_dim": 6144,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "sliding_window_size": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 20,
    },
    "gemma4-e4b": {
        "base_num_decoder_layers": 42,
        "base_emb_dim": 2560,
        "base_num_query_heads": 8,
        "base_num_kv_heads": 2,
        "base_mlp_dim": 10240,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "sliding_window_size": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 18,
    },
    "gemma4-26b": {
        "base_num_decoder_layers": 30,
        "base_emb_dim": 2816,
        "base_num_query_heads": 16,
        "base_num_kv_heads": 8,
        "base_mlp_dim": 2112,
        "base_moe_mlp_dim": 704,
        "head_dim": 256,
        "global_head_dim": 512,
        "global_num_kv_heads": 2,
        "vocab_size": 262144,
        "sliding_window_size": 1024,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "gemma4-31b": {
        "base_num_decoder_layers": 60,
        "base_emb_dim": 5376,
        "base_num_query_heads": 32,
        "base_num_kv_heads": 16,
        "base_mlp_dim": 21504,
        "head_dim": 256,
        "global_head_dim": 512,
        "global_num_kv_heads": 4,
        "vocab_size": 262144,
        "sliding_window_size": 1024,
    },
}


def maxtext_settings(
    architecture: Architecture, items: Path, *, scanned: bool, multimodal: bool
) -> dict[str, str]:
    """Setting → value: model name, form and path, then every size that the named model has not."""
    name = MODEL_NAMES[architecture.family]
    settings = {
        "model_name": name,
        "scan_layers": str(scanned).lower(),
        "use_multimodal": str(multimodal).lower(),
        "load_parameters_path": str(items),
    }
    sizes = _sizes(architecture)
    named = _PUBLISHED[name]
    changed = {key: str(sizes[key]) for key, value in named.items() if sizes[key] != value}
    if changed:
        settings["override_model_config"] = "true"
    return settings | changed


def _sizes(architecture: Architecture) -> dict[str, int]:
    text = architecture.text
    sliding = next((layer for layer in text.layers if layer.sliding), text.layers[-1])
    full = text.layers[-1]
    return {
        "base_num_decoder_layers": len(text.layers),
        "base_emb_dim": text.embed,
        "base_num_query_heads": sliding.heads,
        "base_num_kv_heads": sliding.kv_heads,
        "base_mlp_dim": text.layers[0].mlp,
        "base_moe_mlp_dim": text.expert_mlp,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "global_num_kv_heads": full.kv_heads,
        "vocab_size": text.vocab,
        "sliding_window_size": text.window,
        "hidden_size_per_layer_input": text.ple,
        "vocab_size_per_layer_input": text.ple_vocab,
        "num_kv_shared_layers": text.kv_shared_layers,
        "num_experts": text.experts,
        "num_experts_per_tok": text.experts_per_token,
    }
