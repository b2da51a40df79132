"""Hugging Face → Fast-LLM written out by hand with numpy, without any mapping table.

An independent second opinion on the tables, and on the metadata that a conversion writes: facts of
Fast-LLM 0.4.0, measured on checkpoints that it wrote itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma_convert.model.architecture import Architecture

WEIGHTS = "model_0.safetensors"


def fast_llm_tensors(
    hf: Mapping[str, np.ndarray], architecture: Architecture
) -> dict[str, np.ndarray]:
    """Name with /weights → array of the stored dtype, for the text model of `hf`."""
    text = architecture.text
    prefix = "model." if architecture.text_only else "model.language_model."
    tensors = {
        "embeddings.word_embeddings_weight": hf[prefix + "embed_tokens.weight"],
        "head.final_norm.weight": hf[prefix + "norm.weight"],
    }
    if not text.tied:
        tensors["head.output_weights"] = hf["lm_head.weight"]
    for layer in text.layers:
        at = f"{prefix}layers.{layer.index}."
        own = {name.removeprefix(at): value for name, value in hf.items() if name.startswith(at)}
        converted = _mixer(own) | (_mixture(own) if text.moe else _dense(own))
        tensors |= {f"decoder.{layer.index}.{name}": value for name, value in converted.items()}
    return {f"{name}/weights": np.ascontiguousarray(value) for name, value in tensors.items()}


def _mixer(own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    key_value = own["self_attn.k_proj.weight"]
    if "self_attn.v_proj.weight" in own:
        key_value = np.concatenate([key_value, own["self_attn.v_proj.weight"]])
    return {
        "mixer.query.weight": own["self_attn.q_proj.weight"],
        "mixer.key_value.weight": key_value,
        "mixer.dense.weight": own["self_attn.o_proj.weight"],
        "mixer.query_norm.weight": own["self_attn.q_norm.weight"],
        "mixer.key_norm.weight": own["self_attn.k_norm.weight"],
        "norm_1.weight": own["input_layernorm.weight"],
        "post_mixer_norm.weight": own["post_attention_layernorm.weight"],
        "post_mlp_norm.weight": own["post_feedforward_layernorm.weight"],
        "output_scale": own["layer_scalar"],
    }


def _dense(own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "norm_2.weight": own["pre_feedforward_layernorm.weight"],
        "mlp.layer_1.weight": _gate_then_up(own),
        "mlp.layer_2.weight": own["mlp.down_proj.weight"].T,
    }


def _mixture(own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "mlp.dense.layer_1.weight": _gate_then_up(own),
        "mlp.dense.layer_2.weight": own["mlp.down_proj.weight"].T,
        "mlp.dense.pre_norm.weight": own["pre_feedforward_layernorm.weight"],
        "mlp.dense.post_norm.weight": own["post_feedforward_layernorm_1.weight"],
        "mlp.routed.layer_1.weight": np.concatenate(list(own["experts.gate_up_proj"])),
        "mlp.routed.layer_2.weight": np.concatenate(
            [expert.T for expert in own["experts.down_proj"]]
        ),
        "mlp.routed.pre_norm.weight": own["pre_feedforward_layernorm_2.weight"],
        "mlp.routed.post_norm.weight": own["post_feedforward_layernorm_2.weight"],
        "mlp.routed.router.weight": own["router.proj.weight"],
        "mlp.routed.router_scale": own["router.scale"],
        "mlp.routed.router_per_expert_scale": own["router.per_expert_scale"],
    }


def _gate_then_up(own: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]])


def fast_llm_metadata(architecture: Architecture) -> dict:
    """metadata.yaml of the text model as a dict, without `metadata.state_index`."""
    text = architecture.text
    kinds = ["sliding_attention" if layer.sliding else "full_attention" for layer in text.layers]
    blocks = {
        kind: _block(architecture, text.layers[kinds.index(kind)]) for kind in sorted(set(kinds))
    }
    return {
        "config": {
            "base_model": {
                "decoder": {
                    "blocks": blocks,
                    "num_blocks": len(kinds),
                    "pattern": kinds,
                    "type": "pattern",
                },
                "embeddings": {
                    "embedding_scale": text.embed**0.5,
                    "vocab_size": text.vocab,
                },
                "head": {
                    "final_logit_softcap": text.logit_softcap,
                    "normalization": {**_rms_norm(text.norm_epsilon), "zero_centered": False},
                },
                "hidden_size": text.embed,
                "peft": {"type": "none"},
                "tied_embedding_weight": text.tied,
            },
            "type": "gpt",
        },
        "fast_llm_version": "0.4.0",
        "format": "fast_llm",
        "metadata": {},
        "model": "gpt",
        "shards": ["weights"],
    }


def _block(architecture: Architecture, layer) -> dict:
    text = architecture.text
    norm = _rms_norm(text.norm_epsilon)
    mixer = {
        "add_linear_biases": False,
        "dropout": 0.0,
        "head_groups": layer.kv_heads,
        "head_size": layer.head_dim,
        "heads": layer.heads,
        "key_norm": dict(norm),
        "query_norm": dict(norm),
        "softmax_scale_power": 0.0,
        "type": "attention",
        "value_norm": _fixed_norm(text.norm_epsilon),
    }
    if layer.sliding:
        mixer["rotary"] = {"theta": text.rope_sliding.theta, "type": "default"}
        mixer["window_size"] = text.window
    else:
        mixer["rotary"] = {
            "partial_rotary_factor": text.rope_full.fraction,
            "theta": text.rope_full.theta,
            "type": "proportional",
        }
    if not layer.owns_value:
        mixer["shared_key_value"] = True
    return {
        "mixer": mixer,
        "mlp": _hybrid(text, layer) if text.moe else {**_mlp(layer.mlp), "type": "mlp"},
        "normalization": dict(norm),
        "output_scale": {"enabled": True, "lr_scale": 0.0},
        "post_mixer_normalization": dict(norm),
        "post_mlp_normalization": dict(norm),
        "pre_mlp_normalization": {"type": "none"} if text.moe else dict(norm),
        "type": "decoder",
    }


def _hybrid(text, layer) -> dict:
    routed = {
        "experts": text.experts,
        "experts_per_token": text.experts_per_token,
        "router_input_scale": text.embed**-0.5,
        "router_normalization": _fixed_norm(text.norm_epsilon),
        "router_per_expert_scale": {"enabled": True},
        "router_scale": {"enabled": True},
        "type": "moe",
    }
    return {
        "dense": {**_mlp(layer.mlp), **_around(text), "type": "mlp"},
        "routed": {**_mlp(text.expert_mlp), **_around(text), **routed},
        "type": "hybrid_moe",
    }


def _around(text) -> dict:
    return {
        "pre_norm": _rms_norm(text.norm_epsilon),
        "post_norm": _rms_norm(text.norm_epsilon),
    }


def _mlp(width: int) -> dict:
    return {
        "activation": "gelu",
        "add_linear_biases": False,
        "gated": True,
        "intermediate_size": width,
    }


def _rms_norm(epsilon: float) -> dict:
    return {"epsilon": epsilon, "type": "rms_norm"}


def _fixed_norm(epsilon: float) -> dict:
    return {"epsilon": epsilon, "type": "fixed_rms_norm"}


def write_fast_llm(folder: Path, tensors: Mapping[str, np.ndarray], metadata: dict) -> Path:
    """The checkpoint in `folder`, in one file of tensors; `metadata` gets its state_index here."""
    import yaml
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / WEIGHTS)
    whole = {**metadata, "metadata": {"state_index": dict.fromkeys(sorted(tensors), WEIGHTS)}}
    (folder / "metadata.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return folder
