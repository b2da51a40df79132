"""config.json with other facts: what a framework was told, in the keys of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_convert.model.config import parse_architecture
from gemma_convert.model.facts import (
    FULL_FRACTION,
    FULL_THETA,
    ROPE,
    SLIDING_FRACTION,
    SLIDING_THETA,
    Fact,
    facts_of,
)

_KINDS = {
    "full_attention": (FULL_THETA, FULL_FRACTION),
    "sliding_attention": (SLIDING_THETA, SLIDING_FRACTION),
}


def with_facts(config: Mapping[str, Any], facts: Mapping[str, Fact]) -> dict[str, Any]:
    """A copy of a config.json, a whole model's or a text model's, that says these facts.

    Keys are those of `model.facts`. A rotary embedding is spelled out, base and proportion.
    """
    edited = copy.deepcopy(dict(config))
    all_facts = {**facts_of(parse_architecture(config, Path("config.json"))), **facts}
    for key, value in facts.items():
        if not key.startswith(ROPE):
            set_fact(edited, key, value)
    for kind, (theta, fraction) in _KINDS.items():
        if theta in facts or fraction in facts:
            turned = all_facts[fraction]
            set_fact(edited, theta, all_facts[theta])
            set_fact(edited, fraction, turned)
            set_fact(
                edited, f"{ROPE}.{kind}.rope_type", "default" if turned == 1 else "proportional"
            )
    return edited


def set_fact(config: dict[str, Any], key: str, value: object) -> None:
    """Puts a value under a key of `model.facts` into a config.json, sections made as needed."""
    *sections, last = key.split(".")
    if sections[0] == "text_config" and "text_config" not in config:
        del sections[0]
    for section in sections:
        if not isinstance(config.get(section), dict):
            config[section] = {}
        config = config[section]
    config[last] = value
