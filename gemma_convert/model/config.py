"""config.json → Architecture, in either of its two spellings, or one clear message.

Keys and defaults: `configuration_gemma4.py` and `configuration_gemma4_unified.py` of transformers
5.23, and the published configs of google/gemma-4-{E2B,E4B,12B,26B-A4B,31B}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_convert.errors import SourceError
from gemma_convert.files.json_file import read_object, read_regular
from gemma_convert.model.architecture import Architecture, Layer, Rope, TextArchitecture
from gemma_convert.model.config_media import (
    audio_embedder,
    audio_tower,
    vision_embedder,
    vision_tower,
)
from gemma_convert.model.config_section import MAX_LAYERS, Section
from gemma_convert.model.foreign import refuse_foreign_config, refuse_foreign_folder

MAX_CONFIG_BYTES = 16 << 20

TEXT_ONLY = ("gemma4_text", "gemma4_unified_text")
UNIFIED = ("gemma4_unified", "gemma4_unified_text")
MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
"""Every `model_type` that is converted; the unified ones are 12B's."""


def read_architecture(folder: Path) -> Architecture:
    """Facts of the checkpoint in `folder`, from its config.json.

    Raises SourceError where there is no config.json, where it is not a Gemma 4 config that this
    tool converts, or where it contradicts itself.
    """
    refuse_foreign_folder(folder)
    path = folder / "config.json" if folder.is_dir() else folder
    return parse_architecture(load_config(folder), path)


def parse_architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """Facts of one parsed config.json; `where` is used in messages alone."""
    reader = Section(config, where)
    model_type = reader.text("model_type")
    refuse_foreign_config(config, model_type, where)
    if model_type not in MODEL_TYPES:
        raise SourceError(
            "This is not a Gemma 4 checkpoint that gemma-convert knows.",
            where=f"{where}, key model_type",
            expected=", ".join(MODEL_TYPES),
            found=model_type,
            do="give a folder with a Gemma 4 E2B, E4B, 12B, 26B-A4B or 31B checkpoint",
        )
    if model_type in TEXT_ONLY:
        return _text_alone(reader, model_type in UNIFIED)
    return _whole(reader, model_type in UNIFIED)


def _text_alone(reader: Section, unified: bool) -> Architecture:
    return Architecture(
        text=_text(reader, unified),
        vision=None,
        audio=None,
        text_only=True,
        dtype=reader.optional_text("dtype", "torch_dtype"),
        image_token=None,
        unified=unified,
    )


def _whole(reader: Section, unified: bool) -> Architecture:
    vision = reader.section("vision_config")
    audio = reader.section("audio_config")
    text = reader.section("text_config")
    if text is None:
        raise SourceError(
            "config.json has no text_config.", where=reader.where, expected="a text_config"
        )
    tied = reader.boolean("tie_word_embeddings", True)  # text_config's own ties nothing here
    facts = Architecture(
        text=replace(_text(text, unified), tied=tied),
        vision=None,
        audio=None,
        text_only=False,
        dtype=reader.optional_text("dtype", "torch_dtype") or text.optional_text("dtype"),
        image_token=reader.optional_integer("image_token_id"),
        unified=unified,
    )
    if unified:
        return replace(
            facts,
            vision_embedder=None if vision is None else vision_embedder(vision),
            audio_embedder=None if audio is None else audio_embedder(audio),
        )
    return replace(
        facts,
        vision=None if vision is None else vision_tower(vision),
        audio=None if audio is None else audio_tower(audio),
    )


def read_config(folder: Path) -> bytes:
    """The bytes of config.json in `folder`, or at that path, as they stand there."""
    path = folder / "config.json" if folder.is_dir() else folder
    return read_regular(path, "config.json", MAX_CONFIG_BYTES)


def load_config(folder: Path) -> Mapping[str, Any]:
    """The parsed config.json in `folder`, or at that path. Raises SourceError where it is none."""
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        return read_object(path, "config.json", MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise SourceError(
            "There is no config.json, so the model is unknown."
            if folder.exists()
            else "There is no such checkpoint.",
            where=path if folder.exists() else folder,
            do="give the folder of a Hugging Face checkpoint, config.json included",
        ) from None


def _text(config: Section, unified: bool) -> TextArchitecture:
    """The text model; that of 12B has neither experts nor per-layer embeddings."""
    count = config.layers()
    _refuse_unknown_arithmetic(config, unified)
    moe = config.boolean("enable_moe_block", False)
    key_as_value = config.boolean("attention_k_eq_v", False)
    double_wide = config.boolean("use_double_wide_mlp", False)
    shared = config.integer("num_kv_shared_layers", 0, least=0)
    ple = config.integer("hidden_size_per_layer_input", 0 if unified else 256, least=0)
    vocab = config.integer("vocab_size")
    softcap = config.values.get("final_logit_softcapping")
    return TextArchitecture(
        vocab=vocab,
        embed=config.integer("hidden_size"),
        layers=_layers(config, count, shared, key_as_value, double_wide),
        window=config.integer("sliding_window", 1024 if unified else 512),
        rope_sliding=_rope(config, "sliding_attention", Rope(10_000.0, 1.0)),
        rope_full=_rope(config, "full_attention", Rope(1_000_000.0, 0.25)),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        logit_softcap=None if softcap is None else config.number("final_logit_softcapping", 30.0),
        ple=ple,
        ple_vocab=config.integer("vocab_size_per_layer_input", vocab) if ple else 0,
        experts=config.integer("num_experts") if moe else 0,
        experts_per_token=config.integer("top_k_experts") if moe else 0,
        expert_mlp=_expert_mlp(config) if moe else 0,
        key_as_value=key_as_value,
        double_wide_mlp=double_wide,
        kv_shared_layers=shared,
        bidirectional_images=_bidirectional(config, unified) == "vision",
        whole_images=unified,
        tied=config.boolean("tie_word_embeddings", True),
        pad_token=config.optional_integer("pad_token_id") or 0,
    )


def _bidirectional(config: Section, unified: bool) -> str | None:
    """Which tokens see those behind them; where 12B's config says nothing, those of an image."""
    key = "use_bidirectional_attention"
    return "vision" if unified and key not in config.values else config.optional_text(key)


def _refuse_unknown_arithmetic(config: Section, unified: bool) -> None:
    """Refuses what no published Gemma 4 has and what the native forward passes do not compute."""
    if config.boolean("attention_bias", False):
        raise config.error("attention_bias", "false: no layout has a place for biases", True)
    activation = config.values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise config.error("hidden_activation", "gelu_pytorch_tanh", activation)
    bidirectional = _bidirectional(config, unified)
    if bidirectional not in {None, "vision"}:
        raise config.error("use_bidirectional_attention", "null or vision", bidirectional)
    if unified and config.boolean("enable_moe_block", False):
        raise config.error("enable_moe_block", "false: Gemma 4 unified has no experts", True)
    if unified and config.integer("hidden_size_per_layer_input", 0, least=0):
        found = config.values["hidden_size_per_layer_input"]
        expected = "0: Gemma 4 unified has no per-layer embeddings"
        raise config.error("hidden_size_per_layer_input", expected, found)


def _expert_mlp(config: Section) -> int:
    keys = ("moe_intermediate_size", "expert_intermediate_size")
    given = [key for key in keys if config.values.get(key) is not None]
    return config.integer(given[0] if given else keys[0])


def _rope(config: Section, kind: str, default: Rope) -> Rope:
    parameters = config.section("rope_parameters")
    section = None if parameters is None else parameters.section(kind)
    if section is None:
        return default
    rope_type = section.values.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise section.error("rope_type", "default or proportional", rope_type)
    if section.number("factor", 1.0) != 1.0:
        raise section.error("factor", "1", section.values["factor"])
    partial = rope_type == "proportional"
    fraction = section.number("partial_rotary_factor", 1.0) if partial else 1.0
    if fraction > 1:
        raise section.error("partial_rotary_factor", "at most 1", fraction)
    return Rope(theta=section.number("rope_theta", default.theta), fraction=fraction)


def _layers(
    config: Section, count: int, shared: int, key_as_value: bool, double_wide: bool
) -> tuple[Layer, ...]:
    kinds = _layer_kinds(config, count)
    if not shared < count:
        raise config.error("num_kv_shared_layers", f"fewer than the {count} layers", shared)
    overrides = _layer_overrides(config, kinds, key_as_value)
    heads = config.integer("num_attention_heads")
    mlp = config.integer("intermediate_size")
    layers: list[Layer] = []
    for index, kind in enumerate(kinds):
        sliding = kind == "sliding_attention"
        owns_kv = index < count - shared
        source = index
        if not owns_kv:
            owners = [layer.index for layer in layers if layer.owns_kv and layer.sliding == sliding]
            if not owners:
                raise config.error("num_kv_shared_layers", f"a layer before with {kind}", shared)
            source = owners[-1]
        head_dim, kv_heads = overrides[index]
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
        layers.append(
            Layer(
                index=index,
                sliding=sliding,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                mlp=2 * mlp if double_wide and not owns_kv else mlp,
                owns_kv=owns_kv,
                owns_value=owns_kv and (sliding or not key_as_value),
                kv_source=source,
            )
        )
    return tuple(layers)


def _layer_kinds(config: Section, count: int) -> list[str]:
    kinds = config.values.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        found = f"{len(kinds)} entries" if isinstance(kinds, list) else kinds
        raise config.error("layer_types", f"a list of {count} entries", found)
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise config.error("layer_types", "sliding_attention or full_attention", kind)
    return [*kinds[:-1], "full_attention"]


def _layer_overrides(
    config: Section, kinds: list[str], key_as_value: bool
) -> list[tuple[int, int]]:
    """(head_dim, kv_heads) of each layer, from either spelling of config.json."""
    head_dim = config.integer("head_dim")
    kv_heads = config.integer("num_key_value_heads")
    per_layer = config.section("per_layer_config")
    if per_layer is None:
        full_head_dim = config.integer("global_head_dim", 512)
        full_kv_heads = (
            config.optional_integer("num_global_key_value_heads") if key_as_value else None
        )
        full = (full_head_dim, full_kv_heads or kv_heads)
        return [full if kind == "full_attention" else (head_dim, kv_heads) for kind in kinds]
    sizes = [(head_dim, kv_heads)] * len(kinds)
    for key in per_layer.values:
        number = key.isascii() and key.isdecimal() and len(key) <= len(str(MAX_LAYERS))
        if not number or int(key) >= len(kinds):
            raise per_layer.error(key[:40], f"a layer number below {len(kinds)}", key)
        section = per_layer.section(key)
        if section is not None:
            sizes[int(key)] = (
                section.integer("head_dim", head_dim),
                section.integer("num_key_value_heads", kv_heads),
            )
    return sizes
