"""config.json and generation_config.json of a tiny model of each family, in both spellings.

Features and keys are those of the published configs of google/gemma-4-{E2B,E4B,26B-A4B,31B}-it and
google/gemma-4-12B; the saved spelling is what transformers 5.23 writes with `save_pretrained`.
"""

from __future__ import annotations

from typing import Literal

from gemma_convert.errors import UsageError
from gemma_convert.model.architecture import Family
from gemma_convert.model.config_section import MAX_LAYERS
from gemma_convert.tiny.sizes import (
    POOLING,
    SIZES,
    AudioSizes,
    EmbedderSizes,
    FamilySizes,
    VisionSizes,
)
from gemma_convert.tiny.tokenizer import SOFT_TOKENS, SPECIAL_TOKENS
from gemma_convert.tiny.unified import unified_config_json

ConfigSpelling = Literal["published", "saved"]
DType = Literal["bfloat16", "float32", "float16"]


def config_json(
    family: Family,
    layers: int | None,
    text_only: bool,
    dtype: DType,
    spelling: ConfigSpelling,
    *,
    tied: bool,
) -> dict[str, object]:
    """The whole config.json; raises UsageError for a number of layers the family cannot have."""
    sizes = SIZES[family]
    text = _text_config(sizes, _depth(family, layers), spelling)
    text["tie_word_embeddings"] = tied
    version = "5.5.0.dev0" if spelling == "published" else "5.23.0"
    if text_only:
        generation = "Gemma4Unified" if sizes.unified else "Gemma4"
        return {
            "architectures": [f"{generation}ForCausalLM"],
            **text,
            "dtype": dtype,
            "transformers_version": version,
        }
    if isinstance(sizes.vision, EmbedderSizes):
        own = unified_config_json(sizes.vision, published=spelling == "published")
    else:
        own = _config_with_towers(sizes.vision, sizes.audio, dtype, spelling)
        if spelling == "published":
            text["dtype"] = dtype
    own["tie_word_embeddings"] = tied
    return own | {"dtype": dtype, "text_config": text, "transformers_version": version}


def _config_with_towers(
    vision: VisionSizes, audio: AudioSizes | None, dtype: DType, spelling: ConfigSpelling
) -> dict[str, object]:
    """config.json without its text_config, dtype and version."""
    published = spelling == "published"
    towers_dtype = {"dtype": dtype} if published else {}
    tokens = SPECIAL_TOKENS
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None if audio is None else _audio_config(audio) | towers_dtype,
        "audio_token_id": tokens["<|audio|>"],
        "boa_token_id": tokens["<|audio>"],
        "boi_token_id": tokens["<|image>"],
        **({"eoa_token_id": tokens["<audio|>"]} if published else {}),
        "eoa_token_index": tokens["<audio|>"],
        "eoi_token_id": tokens["<image|>"],
        **({"eos_token_id": [tokens["<eos>"], tokens["<turn|>"]]} if published else {}),
        "image_token_id": tokens["<|image|>"],
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "tie_word_embeddings": True,
        "video_token_id": tokens["<|video|>"],
        "vision_config": _vision_config(vision, audio is not None, spelling) | towers_dtype,
        **({"vision_soft_tokens_per_image": SOFT_TOKENS} if published else {}),
    }


def generation_config_json() -> dict[str, object]:
    """The whole generation_config.json."""
    return {
        "bos_token_id": SPECIAL_TOKENS["<bos>"],
        "do_sample": True,
        "eos_token_id": [SPECIAL_TOKENS["<eos>"], SPECIAL_TOKENS["<turn|>"]],
        "pad_token_id": SPECIAL_TOKENS["<pad>"],
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
        "transformers_version": "5.5.0.dev0",
    }


def _depth(family: Family, layers: int | None) -> int:
    """Number of layers: whole blocks, and two at least where the last ones share K and V."""
    sizes = SIZES[family]
    depth = sizes.layers if layers is None else layers
    least = 2 * sizes.period if sizes.shared[0] else sizes.period
    if depth < least or depth % sizes.period or depth > MAX_LAYERS:
        raise UsageError(
            f"A tiny {family} cannot have {depth} layers.",
            expected=f"a multiple of {sizes.period} from {least} to {MAX_LAYERS}",
            found=depth,
            do=f"leave it out for {sizes.layers} layers, or give {2 * sizes.period}",
        )
    return depth


def _shared_layers(sizes: FamilySizes, depth: int) -> int:
    """Number of KV-shared layers: whole blocks, in about the published share, one at least."""
    part, whole = sizes.shared
    if not part:
        return 0
    blocks = depth // sizes.period
    return max(1, blocks * part // whole) * sizes.period


def _text_config(sizes: FamilySizes, depth: int, spelling: ConfigSpelling) -> dict[str, object]:
    key_as_value = sizes.full_kv_heads is not None
    full = [(layer + 1) % sizes.period == 0 for layer in range(depth)]
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": key_as_value,
        "bos_token_id": SPECIAL_TOKENS["<bos>"],
        "enable_moe_block": sizes.experts > 0,
        "eos_token_id": SPECIAL_TOKENS["<eos>"],
        "final_logit_softcapping": 30.0,
        **_full_layer_keys(sizes, full, spelling),
        "head_dim": sizes.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": sizes.embed,
        "hidden_size_per_layer_input": sizes.ple,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "layer_types": ["full_attention" if last else "sliding_attention" for last in full],
        "max_position_embeddings": 4096,
        "model_type": "gemma4_unified_text" if sizes.unified else "gemma4_text",
        "moe_intermediate_size": sizes.expert_mlp or None,
        "num_attention_heads": sizes.heads,
        "num_experts": sizes.experts or None,
        "num_hidden_layers": depth,
        "num_key_value_heads": sizes.kv_heads,
        "num_kv_shared_layers": _shared_layers(sizes, depth),
        "pad_token_id": SPECIAL_TOKENS["<pad>"],
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": sizes.window,
        "tie_word_embeddings": True,
        "top_k_experts": sizes.experts_per_token or None,
        "use_bidirectional_attention": "vision" if key_as_value else None,
        "use_cache": True,
        "use_double_wide_mlp": sizes.double_wide,
        "vocab_size": sizes.vocab,
        "vocab_size_per_layer_input": sizes.vocab,
    }


def _full_layer_keys(
    sizes: FamilySizes, full: list[bool], spelling: ConfigSpelling
) -> dict[str, object]:
    """The keys that give full-attention layers their own sizes: where the spellings differ."""
    if spelling == "published":
        return {
            **({} if sizes.unified else {"expert_intermediate_size": None}),
            "global_head_dim": sizes.full_head_dim,
            "num_global_key_value_heads": sizes.full_kv_heads,
        }
    override = {"head_dim": sizes.full_head_dim}
    if sizes.full_kv_heads is not None:
        override["num_key_value_heads"] = sizes.full_kv_heads
    width = len(str(len(full) - 1))
    return {
        "per_layer_config": {
            f"{layer:0{width}}": override for layer, is_full in enumerate(full) if is_full
        }
    }


def _vision_config(
    sizes: VisionSizes, clipped: bool, spelling: ConfigSpelling
) -> dict[str, object]:
    published = spelling == "published"
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        **(
            {"default_output_length": SOFT_TOKENS, "global_head_dim": sizes.head_dim}
            if published
            else {}
        ),
        "head_dim": sizes.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": sizes.embed,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_vision",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.heads,
        "patch_size": sizes.patch_size,
        "pooling_kernel_size": POOLING,
        "position_embedding_size": sizes.positions,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "rope_theta": 100.0,
            "rope_type": "default" if published else "axial",
        },
        "standardize": not clipped,
        "use_clipped_linears": clipped,
    }


def _audio_config(sizes: AudioSizes) -> dict[str, object]:
    return {
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_invalid_logits_value": -1000000000.0,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": sizes.kernel,
        "gradient_clipping": 10000000000.0,
        "hidden_act": "silu",
        "hidden_size": sizes.embed,
        "initializer_range": 0.02,
        "model_type": "gemma4_audio",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "output_proj_dims": sizes.output,
        "residual_weight": 0.5,
        "rms_norm_eps": 1e-06,
        "subsampling_conv_channels": list(sizes.channels),
        "use_clipped_linears": True,
    }
