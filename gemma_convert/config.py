"""config.json → Architecture, in either of its two spellings, or one clear message.

Keys and defaults: `transformers/models/gemma4/configuration_gemma4.py` (5.23) and the published
configs of google/gemma-4-{E2B,E4B,26B-A4B,31B}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_convert.architecture import (
    Architecture,
    AudioArchitecture,
    Layer,
    Rope,
    TextArchitecture,
    VisionArchitecture,
)
from gemma_convert.errors import SourceError, short
from gemma_convert.stores.json_file import read_object

MAX_LAYERS = 1024
MAX_SIZE = 1 << 31
MAX_CONFIG_BYTES = 16 << 20


def read_architecture(folder: Path) -> Architecture:
    """Facts of the checkpoint in `folder`, from its config.json.

    Raises SourceError where there is no config.json, where it is not a Gemma 4 config that this
    tool converts, or where it contradicts itself.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    return parse_architecture(_load_json(path), path)


def parse_architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """Facts of one parsed config.json; `where` is used in messages alone."""
    reader = _Config(config, where)
    model_type = reader.text("model_type")
    if "quantization_config" in config and config["quantization_config"] is not None:
        raise SourceError(
            "This is a quantized export, which holds packed integers instead of the weights.",
            where=where,
            found="quantization_config",
            do="convert the original bfloat16 checkpoint",
        )
    if model_type == "gemma4_text":
        return Architecture(
            text=_text(reader),
            vision=None,
            audio=None,
            text_only=True,
            dtype=reader.optional_text("dtype", "torch_dtype"),
            image_token=None,
        )
    if model_type != "gemma4":
        raise SourceError(
            "This is not a Gemma 4 checkpoint that gemma-convert knows.",
            where=f"{where}, key model_type",
            expected="gemma4 or gemma4_text",
            found=model_type,
            do="give a folder with a Gemma 4 E2B, E4B, 26B-A4B or 31B checkpoint",
        )
    vision = reader.section("vision_config")
    audio = reader.section("audio_config")
    text = reader.section("text_config")
    if text is None:
        raise SourceError("config.json has no text_config.", where=where, expected="a text_config")
    return Architecture(
        text=_text(text),
        vision=None if vision is None else _vision(vision),
        audio=None if audio is None else _audio(audio),
        text_only=False,
        dtype=reader.optional_text("dtype", "torch_dtype") or text.optional_text("dtype"),
        image_token=reader.optional_integer("image_token_id"),
    )


def _load_json(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path, "config.json", MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise SourceError(
            "There is no config.json, so nothing says which model this is.",
            where=path,
            do="give the folder of a Hugging Face checkpoint, config.json included",
        ) from None


class _Config:
    """One JSON object of config.json with typed access; errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: Path, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def section(self, key: str) -> _Config | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return _Config(value, self.where, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MAX_SIZE:
            raise self.error(key, f"a whole number from {least} to {MAX_SIZE - 1}", value)
        return value

    def layers(self) -> int:
        count = self.integer("num_hidden_layers")
        if count > MAX_LAYERS:
            raise self.error("num_hidden_layers", f"at most {MAX_LAYERS}", count)
        return count

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key, least=0)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "a positive number", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def optional_text(self, *keys: str) -> str | None:
        return next((self.text(key) for key in keys if self.values.get(key) is not None), None)

    def error(self, key: str, expected: str, found: object) -> SourceError:
        return SourceError(
            "config.json does not describe a model.",
            where=f"{self.where}, key {self.prefix}{key}",
            expected=expected,
            found="nothing" if found is None else short(found),
        )


def _text(config: _Config) -> TextArchitecture:
    count = config.layers()
    _refuse_unknown_arithmetic(config)
    moe = config.boolean("enable_moe_block", False)
    key_as_value = config.boolean("attention_k_eq_v", False)
    double_wide = config.boolean("use_double_wide_mlp", False)
    shared = config.integer("num_kv_shared_layers", 0, least=0)
    ple = config.integer("hidden_size_per_layer_input", 256, least=0)
    vocab = config.integer("vocab_size")
    softcap = config.values.get("final_logit_softcapping")
    return TextArchitecture(
        vocab=vocab,
        embed=config.integer("hidden_size"),
        layers=_layers(config, count, shared, key_as_value, double_wide),
        window=config.integer("sliding_window", 512),
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
        bidirectional_images=config.optional_text("use_bidirectional_attention") == "vision",
        tied=config.boolean("tie_word_embeddings", True),
        pad_token=config.integer("pad_token_id", 0, least=0),
    )


def _refuse_unknown_arithmetic(config: _Config) -> None:
    """Refuses what no published Gemma 4 has and what the native forward passes do not compute."""
    if config.boolean("attention_bias", False):
        raise config.error("attention_bias", "false: no layout has a place for biases", True)
    activation = config.optional_text("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise config.error("hidden_activation", "gelu_pytorch_tanh", activation)
    bidirectional = config.optional_text("use_bidirectional_attention")
    if bidirectional not in {None, "vision"}:
        raise config.error("use_bidirectional_attention", "null or vision", bidirectional)


def _expert_mlp(config: _Config) -> int:
    old = config.optional_integer("expert_intermediate_size")
    return config.integer("moe_intermediate_size", old)


def _rope(config: _Config, kind: str, default: Rope) -> Rope:
    parameters = config.section("rope_parameters")
    section = None if parameters is None else parameters.section(kind)
    if section is None:
        return default
    rope_type = section.optional_text("rope_type") or "default"
    if rope_type not in ("default", "proportional"):
        raise section.error("rope_type", "default or proportional", rope_type)
    if section.number("factor", 1.0) != 1.0:
        raise section.error("factor", "1", section.values["factor"])
    partial = rope_type == "proportional"
    return Rope(
        theta=section.number("rope_theta", default.theta),
        fraction=section.number("partial_rotary_factor", 1.0) if partial else 1.0,
    )


def _layers(
    config: _Config, count: int, shared: int, key_as_value: bool, double_wide: bool
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


def _layer_kinds(config: _Config, count: int) -> list[str]:
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
    config: _Config, kinds: list[str], key_as_value: bool
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


def _refuse_other_arithmetic(config: _Config, published: Mapping[str, object]) -> None:
    for key, value in published.items():
        found = config.values.get(key)
        if found is not None and found != value:
            raise config.error(key, f"{value}, which the frameworks build in", found)


def _vision(config: _Config) -> VisionArchitecture:
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


def _audio(config: _Config) -> AudioArchitecture:
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
