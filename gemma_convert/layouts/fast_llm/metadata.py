"""Fast-LLM's `metadata.yaml`: the model that a `fast_llm` checkpoint holds, as its loader wants it.

Fast-LLM takes another default in silence where a key is missing, so every key that decides the
computation is written. Keys and values: what Fast-LLM 0.4.0 writes for Gemma 4 itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.files.yaml_file import read_yaml
from gemma_convert.model.architecture import Architecture, Layer, Rope, TextArchitecture
from gemma_convert.version import CONVERTER, __version__

METADATA = "metadata.yaml"
VERSION = "0.4.0"

MAX_METADATA_BYTES = 2 << 20
SLIDING, FULL = "sliding_attention", "full_attention"


def fast_llm_metadata(architecture: Architecture, state_index: Mapping[str, str]) -> dict[str, Any]:
    """The contents of metadata.yaml; `state_index` says in which file every tensor stands.

    Raises UsageError for layers of one kind that differ, which Fast-LLM cannot say.
    """
    return {
        "fast_llm_version": VERSION,
        "format": "fast_llm",
        "model": "gpt",
        "shards": ["weights"],
        "config": {"type": "gpt", "base_model": _base_model(architecture.text)},
        "metadata": {"state_index": dict(state_index), CONVERTER: __version__},
    }


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes metadata.yaml."""
    (folder / METADATA).write_text(yaml.safe_dump(dict(metadata)), encoding="utf-8")


def read_metadata(folder: Path) -> dict[str, Any]:
    """The contents of metadata.yaml; raises SourceError where it is not Fast-LLM's."""
    path = folder / METADATA
    metadata = read_yaml(path, METADATA, MAX_METADATA_BYTES)
    if not isinstance(metadata, dict) or metadata.get("format") != "fast_llm":
        raise SourceError(
            "The metadata is not that of a checkpoint in Fast-LLM's own format.",
            where=path,
            expected="format: fast_llm",
            found=short(metadata.get("format") if isinstance(metadata, dict) else metadata),
        )
    return dict(metadata)


def differences(expected: Any, found: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where two trees of mappings and lists differ: path → how."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}, key=str):
            below = f"{path}.{key}" if path else str(key)
            if key not in found:
                yield below, f"is missing; expected {short(expected[key])}"
            elif key not in expected:
                yield below, f"is unexpected: {short(found[key])}"
            else:
                yield from differences(expected[key], found[key], below)
    elif type(expected) is not type(found) or expected != found:
        yield path, f"is {short(found)} instead of {short(expected)}"


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path with points → value, of all values in a tree of mappings."""
    if not isinstance(values, dict):
        yield path, values
        return
    for key, value in values.items():
        yield from flat(value, f"{path}.{key}" if path else str(key))


def _base_model(text: TextArchitecture) -> dict[str, Any]:
    kinds = {SLIDING: True, FULL: False}
    blocks = {
        name: _only_one([_block(text, layer) for layer in text.layers if layer.sliding is sliding])
        for name, sliding in kinds.items()
        if any(layer.sliding is sliding for layer in text.layers)
    }
    head = {
        "normalization": {**_norm(text), "zero_centered": False},
        "final_logit_softcap": text.logit_softcap,
    }
    return {
        "hidden_size": text.embed,
        "tied_embedding_weight": text.tied,
        "embeddings": {"embedding_scale": text.embed**0.5, "vocab_size": text.vocab},
        "decoder": {
            "type": "pattern",
            "num_blocks": len(text.layers),
            "pattern": [SLIDING if layer.sliding else FULL for layer in text.layers],
            "blocks": blocks,
        },
        "head": head,
        "peft": {"type": "none"},
    }


def _only_one(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    if any(block != blocks[0] for block in blocks):
        raise UsageError(
            "Fast-LLM needs the same sizes in all layers of a kind; this model has several.",
            do="choose another layout with --format",
        )
    return blocks[0]


def _block(text: TextArchitecture, layer: Layer) -> dict[str, Any]:
    dense = text.experts == 0
    return {
        "type": "decoder",
        "mixer": _mixer(text, layer),
        "mlp": _mlp(layer.mlp) if dense else _hybrid(text, layer),
        "normalization": _norm(text),
        "post_mixer_normalization": _norm(text),
        "pre_mlp_normalization": _norm(text) if dense else {"type": "none"},
        "post_mlp_normalization": _norm(text),
        "output_scale": {"enabled": True, "lr_scale": 0.0},
    }


def _mixer(text: TextArchitecture, layer: Layer) -> dict[str, Any]:
    mixer = {
        "type": "attention",
        "add_linear_biases": False,
        "dropout": 0.0,
        "heads": layer.heads,
        "head_groups": layer.kv_heads,
        "head_size": layer.head_dim,
        "query_norm": _norm(text),
        "key_norm": _norm(text),
        "value_norm": _fixed_norm(text),
        "rotary": _rotary(text.rope_sliding if layer.sliding else text.rope_full),
        "softmax_scale_power": 0.0,
    }
    if not layer.owns_value:
        mixer["shared_key_value"] = True
    if layer.sliding:
        mixer["window_size"] = text.window
    return mixer


def _rotary(rope: Rope) -> dict[str, Any]:
    if rope.fraction == 1:
        return {"type": "default", "theta": rope.theta}
    return {"type": "proportional", "theta": rope.theta, "partial_rotary_factor": rope.fraction}


def _mlp(width: int) -> dict[str, Any]:
    return {
        "type": "mlp",
        "activation": "gelu",
        "add_linear_biases": False,
        "gated": True,
        "intermediate_size": width,
    }


def _hybrid(text: TextArchitecture, layer: Layer) -> dict[str, Any]:
    routed = {
        **_mlp(text.expert_mlp),
        "type": "moe",
        "experts": text.experts,
        "experts_per_token": text.experts_per_token,
        "router_input_scale": text.embed**-0.5,
        "router_normalization": _fixed_norm(text),
        "router_per_expert_scale": {"enabled": True},
        "router_scale": {"enabled": True},
    }
    return {
        "type": "hybrid_moe",
        "dense": _mlp(layer.mlp) | _norms(text),
        "routed": routed | _norms(text),
    }


def _norms(text: TextArchitecture) -> dict[str, Any]:
    return {"pre_norm": _norm(text), "post_norm": _norm(text)}


def _norm(text: TextArchitecture) -> dict[str, Any]:
    return {"type": "rms_norm", "epsilon": text.norm_epsilon}


def _fixed_norm(text: TextArchitecture) -> dict[str, Any]:
    return {"type": "fixed_rms_norm", "epsilon": text.norm_epsilon}
