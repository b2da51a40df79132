"""config.json of a family other than Gemma 4 → Model, by one description of the family.

A description (`descriptions/*.toml`) says at which keys the sizes stand, what they are where they
are left out, and which layers have which kind of attention and of feed-forward block.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError, short
from gemma_convert.flops.attention import Kind, Reach
from gemma_convert.flops.config_file import ConfigFile
from gemma_convert.flops.model import (
    DecoderLayer,
    Dense,
    Experts,
    FeedForward,
    GatedDelta,
    GroupedQuery,
    Latent,
    Mixer,
    Model,
)
from gemma_convert.model.config import MODEL_TYPES

_DESCRIPTIONS = Path(__file__).parent / "descriptions"
_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Family:
    """A description: its TOML tables, and the `model_type`s whose text model it describes."""

    model_type: str
    wrappers: tuple[str, ...]
    tables: Mapping[str, Any]


@cache
def families() -> dict[str, Family]:
    """model_type → family, for every description."""
    found: dict[str, Family] = {}
    for path in sorted(_DESCRIPTIONS.glob("*.toml")):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        family = Family(tables["model_type"], tuple(tables.get("wrappers", ())), tables)
        found |= dict.fromkeys((family.model_type, *family.wrappers), family)
    return found


def read_family(config: ConfigFile, family: Family) -> Model:
    """The text model of `config`. Raises SourceError where a size is missing or is none."""
    notes: tuple[str, ...] = tuple(family.tables.get("notes", ()))
    tied = config.truth(_TIED, family.tables.get("tied", False))
    if config.values.get("model_type") in family.wrappers:
        config = config.section("text_config")
        tied = config.truth(_TIED, tied)
        notes += ("Only the text model is counted, without the towers beside it.",)
    sizes = _Sizes(config, family.tables["sizes"])
    layers = sizes.number("layers")
    kinds = _kinds(sizes, family.tables.get("attention", {}), layers)
    feed_forward = _feed_forward(sizes, family.tables.get("experts"))
    return Model(
        family=family.model_type,
        vocab=sizes.number("vocab"),
        embed=sizes.number("embed"),
        layers=tuple(
            DecoderLayer(_mixer(sizes, family.tables, kind), (feed_forward(index),))
            for index, kind in enumerate(kinds)
        ),
        tied=tied,
        notes=notes,
    )


@dataclass(frozen=True)
class _Sizes:
    """Our words for sizes, looked up in a config.json as a description says."""

    config: ConfigFile
    rows: Mapping[str, Any]

    def number(self, word: str, least: int = 1) -> int:
        if isinstance(self.rows[word], int):
            return int(self.rows[word])
        key, default = self._row(word)
        if isinstance(default, str):
            return self.config.size(key, self._derived(key, default), least)
        if key in self.config.values:
            default = None  # null is no size, where transformers derives none
        return self.config.size(key, default, least)

    def optional(self, word: str) -> int | None:
        """As `number`, or None where config.json says null, or says nothing and has no default."""
        key, default = self._row(word)
        left_out = self.config.values.get(key, default) is None
        return None if left_out else self.config.size(key, default)

    def _row(self, word: str) -> tuple[str, Any]:
        row = self.rows[word]
        return (row, None) if isinstance(row, str) else (row["key"], row.get("default"))

    def _derived(self, key: str, default: str) -> int | None:
        """What a word, or one word divided by another, is; None if `key` is there already."""
        if self.config.values.get(key) is not None:
            return None
        word, _, divisor = default.partition(" / ")
        return self.number(word) // self.number(divisor) if divisor else self.number(word)


def _kinds(sizes: _Sizes, attention: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of attention of each layer: as config.json lists them, or by the family's rule."""
    config, other = sizes.config, attention.get("other", "full")
    listed = config.items(attention["list"]) if "list" in attention else None
    if listed is not None:
        return _listed(config, attention["list"], listed, layers, other)
    if "switch" in attention and not config.truth(attention["switch"], False):
        return ["full"] * layers
    flags = config.items(attention["flags"]) if "flags" in attention else None
    if flags:
        if len(flags) != layers:
            raise config.error(attention["flags"], f"a list of {layers} entries", len(flags))
        for flag in flags:
            if flag not in (0, 1):
                raise config.error(attention["flags"], "0 or 1 for each layer", flag)
        return [other if flag else "full" for flag in flags]
    if other in ("sliding", "chunked") and sizes.optional("reach") is None:
        return ["full"] * layers
    start = sizes.number("from_layer") if "from_layer" in sizes.rows else 0
    period = sizes.number("period") if "period" in sizes.rows else 0
    return [
        "full" if index < start or (period and not (index + 1) % period) else other
        for index in range(layers)
    ]


def _listed(config: ConfigFile, key: str, listed: list[Any], layers: int, other: str) -> list[str]:
    if len(listed) != layers:
        raise config.error(key, f"a list of {layers} entries", f"{len(listed)} entries")
    for kind in listed:
        if kind not in ("full_attention", f"{other}_attention"):
            raise config.error(key, f"full_attention or {other}_attention", kind)
    return [kind.removesuffix("_attention") for kind in listed]


def _mixer(sizes: _Sizes, tables: Mapping[str, Any], kind: str) -> Mixer:
    attention = tables.get("attention", {})
    if kind == "linear":
        return GatedDelta(
            k_heads=sizes.number("linear_k_heads"),
            v_heads=sizes.number("linear_v_heads"),
            k_dim=sizes.number("linear_k_dim"),
            v_dim=sizes.number("linear_v_dim"),
            kernel=sizes.number("linear_kernel"),
            chunk=tables["linear"]["chunk"],
        )
    reach = _reach(sizes, kind)
    heads = sizes.number("heads")
    if attention.get("latent"):
        return Latent(
            heads=heads,
            q_rank=sizes.optional("q_rank"),
            kv_rank=sizes.number("kv_rank"),
            plain=sizes.number("plain"),
            rotated=sizes.number("rotated"),
            value_dim=sizes.number("value_dim"),
            reach=reach,
        )
    kv_heads = sizes.number("kv_heads")
    if heads % kv_heads:
        raise sizes.config.error("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
    gated = bool(attention.get("gated"))
    return GroupedQuery(heads, kv_heads, sizes.number("head_dim"), reach, gated=gated)


def _reach(sizes: _Sizes, kind: str) -> Reach:
    if kind == "full":
        return Reach()
    limited: Kind = "chunked" if kind == "chunked" else "sliding"
    return Reach(limited, sizes.number("reach"))


def _feed_forward(sizes: _Sizes, experts: Mapping[str, Any] | None) -> Callable[[int], FeedForward]:
    """Which feed-forward block a layer has, by its number."""
    if experts is None:
        dense = Dense(sizes.number("mlp"))
        return lambda _: dense
    sparse = _experts(sizes, experts)
    config = sizes.config
    first = sizes.number("dense_layers", 0) if "dense_layers" in sizes.rows else 0
    step = sizes.number("expert_step") if "expert_step" in sizes.rows else 1
    listed = config.layers(experts["list"]) if "list" in experts else None
    left_out = config.layers(experts["left_out"]) if "left_out" in experts else None

    def block(index: int) -> FeedForward:
        chosen = index in listed if listed is not None else not (index + 1) % step
        if chosen and index >= first and index not in (left_out or ()):
            return sparse
        return Dense(sizes.number("mlp"))

    return block


def _experts(sizes: _Sizes, experts: Mapping[str, Any]) -> Experts:
    expert_mlp, active = sizes.number("expert_mlp"), sizes.number("active")
    shared = 0
    if "shared" in sizes.rows:
        shared = sizes.number("shared")
    elif "shared_experts" in sizes.rows:
        shared = sizes.number("shared_experts", 0) * expert_mlp
    number = sizes.number("experts")
    if active > number:
        raise sizes.config.error("num_experts_per_tok", f"at most {number} experts", active)
    return Experts(number, active, expert_mlp, shared, bool(experts.get("shared_gate")))


def unknown_family(config: ConfigFile, found: object) -> SourceError:
    """The message about a model_type that no description is for."""
    known = sorted({*MODEL_TYPES, *families()})
    return SourceError(
        "The FLOPs of this kind of model are not known.",
        where=f"{config.where}, key model_type",
        expected=", ".join(known),
        found="nothing" if found is None else short(found),
    )
