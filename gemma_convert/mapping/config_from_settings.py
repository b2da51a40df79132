"""config.json of a text model, from what a framework is told of it alone."""

from __future__ import annotations

from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.mapping.facts import FactTable, is_of_vision
from gemma_convert.mapping.native_facts import Settings, value_of
from gemma_convert.model.config_edit import set_fact
from gemma_convert.model.config_section import MAX_LAYERS, MAX_SIZE
from gemma_convert.model.facts import (
    FULL_FRACTION,
    LAYER_TYPES,
    SLIDING_FRACTION,
    Fact,
    kinds_of,
)

_LAYERS = "text_config.num_hidden_layers"
_VOCABULARY = "text_config.vocab_size"
_NOT_THERE: dict[str, Fact] = {
    "text_config.attention_k_eq_v": False,
    "text_config.num_kv_shared_layers": 0,
    "text_config.use_double_wide_mlp": False,
    "text_config.hidden_size_per_layer_input": 0,
    "text_config.num_experts": 0,
    "text_config.tie_word_embeddings": True,
}
"""What a model has not of which settings say nothing."""

_OF_EXPERTS = (
    "text_config.num_experts",
    "text_config.top_k_experts",
    "text_config.moe_intermediate_size",
)


def config_from_settings(table: FactTable, settings: Settings, dtype: str) -> dict[str, Any]:
    """config.json of Gemma4ForCausalLM, with `dtype` as that of its weights.

    Raises SourceError for what is no value of a fact, and where a size is lacking.
    """
    facts = {**_NOT_THERE, **_facts(table, settings)}
    if not facts["text_config.num_experts"]:
        facts |= dict.fromkeys(_OF_EXPERTS)
    for key, most in ((_LAYERS, MAX_LAYERS), (_VOCABULARY, MAX_SIZE - 1)):
        if not isinstance(size := facts.get(key), int) or not 0 < size <= most:
            raise SourceError(
                "A size of the model is missing in the settings.",
                where=f"{settings.where}, for {key}",
                expected=f"a whole number from 1 to {most}",
                found=short(size),
            )
    facts.setdefault("text_config.vocab_size_per_layer_input", facts[_VOCABULARY])
    config: dict[str, Any] = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "attention_bias": False,
        "dtype": dtype,
        "enable_moe_block": bool(facts["text_config.num_experts"]),
        "hidden_activation": "gelu_pytorch_tanh",
    }
    layers = int(facts[_LAYERS])  # type: ignore[arg-type]
    for key, value in facts.items():
        set_fact(config, key, kinds_of(str(value), layers) if key == LAYER_TYPES else value)
    for fraction in (SLIDING_FRACTION, FULL_FRACTION):
        kind = "default" if facts.get(fraction, 1.0) == 1 else "proportional"
        set_fact(config, fraction.replace("partial_rotary_factor", "rope_type"), kind)
    return config


def _facts(table: FactTable, settings: Settings) -> dict[str, Fact]:
    """Key of config.json → value, of the text model's facts that are told or built in."""
    facts: dict[str, Fact] = {}
    built_in = table.named.get(settings.model or "", {})
    for row in table.rows:
        if not row.hf.startswith("text_config.") or row.tensors:
            continue
        told = row.said_in(settings.said)
        for key, found in told.items():
            value = value_of(row, key, found, settings.where)
            if facts.setdefault(row.hf, value) != value:
                raise SourceError(
                    "The settings have two different values for one key of config.json.",
                    where=f"{settings.where}, key {key}",
                    expected=facts[row.hf],
                    found=value,
                )
        if not told and row.native is None and not is_of_vision(row.hf):
            facts[row.hf] = built_in.get(row.hf, row.fixed)
    return facts
