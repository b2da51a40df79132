"""Facts of the published configs against values written by hand; malformed configs are refused."""

import copy
import json
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    A4B,
    DENSE,
    E2B,
    E4B,
    PUBLISHED,
    UNIFIED,
    WHERE,
    load_architecture,
    load_config,
    text_only,
    without_layers,
)

from gemma_convert.errors import SourceError
from gemma_convert.model.architecture import Architecture, AudioEmbedder, Rope, VisionEmbedder
from gemma_convert.model.config import parse_architecture, read_architecture


class Missing:
    """Stands for a key that is left out."""

    def __repr__(self):
        return "missing"


MISSING = Missing()

TEXT = {
    E2B: {
        "vocab": 262144, "embed": 1536, "period": 5, "window": 512, "ple": 256,
        "ple_vocab": 262144, "experts": 0, "experts_per_token": 0, "expert_mlp": 0,
        "key_as_value": False, "double_wide_mlp": True, "kv_shared_layers": 20,
        "bidirectional_images": False,
    },
    E4B: {
        "vocab": 262144, "embed": 2560, "period": 6, "window": 512, "ple": 256,
        "ple_vocab": 262144, "experts": 0, "experts_per_token": 0, "expert_mlp": 0,
        "key_as_value": False, "double_wide_mlp": False, "kv_shared_layers": 18,
        "bidirectional_images": False,
    },
    A4B: {
        "vocab": 262144, "embed": 2816, "period": 6, "window": 1024, "ple": 0,
        "ple_vocab": 0, "experts": 128, "experts_per_token": 8, "expert_mlp": 704,
        "key_as_value": True, "double_wide_mlp": False, "kv_shared_layers": 0,
        "bidirectional_images": True,
    },
    DENSE: {
        "vocab": 262144, "embed": 5376, "period": 6, "window": 1024, "ple": 0,
        "ple_vocab": 0, "experts": 0, "experts_per_token": 0, "expert_mlp": 0,
        "key_as_value": True, "double_wide_mlp": False, "kv_shared_layers": 0,
        "bidirectional_images": True,
    },
    UNIFIED: {
        "vocab": 262144, "embed": 3840, "period": 6, "window": 1024, "ple": 0,
        "ple_vocab": 0, "experts": 0, "experts_per_token": 0, "expert_mlp": 0,
        "key_as_value": True, "double_wide_mlp": False, "kv_shared_layers": 0,
        "bidirectional_images": True,
    },
}  # fmt: skip

# name: layers, full layers, heads, (head_dim, kv_heads) sliding and full, mlp, first shared layer
LAYERS = {
    E2B: (35, [4, 9, 14, 19, 24, 29, 34], 8, (256, 1), (512, 1), 6144, 15),
    E4B: (42, [5, 11, 17, 23, 29, 35, 41], 8, (256, 2), (512, 2), 10240, 24),
    A4B: (30, [5, 11, 17, 23, 29], 16, (256, 8), (512, 2), 2112, 30),
    DENSE: (60, [5, 11, 17, 23, 29, 35, 41, 47, 53, 59], 32, (256, 16), (512, 4), 21504, 60),
    UNIFIED: (48, list(range(5, 48, 6)), 16, (256, 8), (512, 1), 15360, 48),
}

VISION = {
    E2B: (768, 16, 12, 64, 3072, True, False),
    E4B: (768, 16, 12, 64, 3072, True, False),
    A4B: (1152, 27, 16, 72, 4304, False, True),
    DENSE: (1152, 27, 16, 72, 4304, False, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_facts_of_the_language_model(name):
    text = load_architecture(name).text
    assert {fact: getattr(text, fact) for fact in TEXT[name]} == TEXT[name]
    assert text.rope_sliding == Rope(theta=10_000.0, fraction=1.0)
    assert text.rope_full == Rope(theta=1_000_000.0, fraction=0.25)
    assert (text.norm_epsilon, text.logit_softcap) == (1e-6, 30.0)
    assert (text.tied, text.pad_token, text.moe) == (True, 0, name == A4B)


@pytest.mark.parametrize("name", PUBLISHED)
def test_facts_of_every_layer(name):
    count, full, heads, small, large, mlp, first_shared = LAYERS[name]
    layers = load_architecture(name).text.layers
    assert [layer.index for layer in layers] == list(range(count))
    assert [layer.index for layer in layers if not layer.sliding] == full
    for layer in layers:
        assert layer.heads == heads
        assert (layer.head_dim, layer.kv_heads) == (small if layer.sliding else large)
        assert layer.owns_kv == (layer.index < first_shared)
        if name == E2B:
            assert layer.mlp == (6144 if layer.index < 15 else 12288)
        else:
            assert layer.mlp == mlp


def test_layers_that_share_keys_and_values_take_the_last_owner_of_their_kind():
    e2b = [layer.kv_source for layer in load_architecture(E2B).text.layers]
    assert e2b == [*range(15), *([13, 13, 13, 13, 14] * 4)]
    e4b = [layer.kv_source for layer in load_architecture(E4B).text.layers]
    assert e4b == [*range(24), *([22, 22, 22, 22, 22, 23] * 3)]
    for name in (A4B, DENSE, UNIFIED):
        layers = load_architecture(name).text.layers
        assert [layer.kv_source for layer in layers] == list(range(len(layers)))


def test_layers_that_own_a_value_projection():
    def owners(name):
        layers = load_architecture(name).text.layers
        return [layer.index for layer in layers if layer.owns_value]

    assert owners(E2B) == list(range(15))
    assert owners(E4B) == list(range(24))
    assert owners(A4B) == [i for i in range(30) if i % 6 != 5]
    assert owners(DENSE) == [i for i in range(60) if i % 6 != 5]
    assert owners(UNIFIED) == [i for i in range(48) if i % 6 != 5]


@pytest.mark.parametrize("name", VISION)
def test_facts_of_the_towers(name):
    model = load_architecture(name)
    assert not model.unified
    assert (model.vision_embedder, model.audio_embedder) == (None, None)
    vision = model.vision
    assert VISION[name] == (
        vision.embed, vision.layers, vision.heads, vision.head_dim, vision.mlp, vision.clipped,
        vision.standardize,
    )  # fmt: skip
    assert (vision.patch, vision.patch_size) == (768, 16)
    assert (vision.positions, vision.pooling) == (10240, 3)
    assert (vision.rope_theta, vision.norm_epsilon) == (100.0, 1e-6)
    if name in (A4B, DENSE):
        assert model.audio is None
        return
    audio = model.audio
    assert (audio.embed, audio.layers, audio.heads, audio.output) == (1024, 12, 8, 1536)
    assert (audio.channels, audio.frequencies, audio.kernel) == ((128, 32), 32, 5)
    assert audio.clipped


@pytest.mark.parametrize(
    ("name", "family"),
    [(E2B, "e2b"), (E4B, "e4b"), (A4B, "26b-a4b"), (DENSE, "31b"), (UNIFIED, "12b")],
)
def test_family_and_top_level_facts(name, family):
    model = load_architecture(name)
    assert (model.family, model.dtype, model.image_token) == (family, "bfloat16", 258880)
    assert not model.text_only


def test_sizes_of_axes():
    e2b, moe = load_architecture(E2B), load_architecture(A4B)
    assert [e2b.size("mlp", {"layers": i}) for i in (14, 15)] == [6144, 12288]
    assert [moe.size("head_dim", {"layers": i}) for i in (4, 5)] == [256, 512]
    assert [moe.size("kv_heads", {"layers": i}) for i in (4, 5)] == [8, 2]
    assert moe.size("heads", {"layers": 0}) == 16
    assert [moe.size(axis, {}) for axis in ("experts", "expert_mlp", "layers")] == [128, 704, 30]
    assert [e2b.size("conv_in", {"conv_stages": i}) for i in (0, 1)] == [1, 128]
    assert [e2b.size("conv_out", {"conv_stages": i}) for i in (0, 1)] == [128, 32]
    audio = {axis: e2b.size(axis, {}) for axis in ("audio_mlp", "audio_glu", "audio_head_dim")}
    assert audio == {"audio_mlp": 4096, "audio_glu": 2048, "audio_head_dim": 128}
    assert [e2b.size(axis, {}) for axis in ("gate_up", "kv", "bound", "xy")] == [2, 2, 4, 2]
    for axis, index in [
        ("mlp", {}), ("mlp", {"layers": 35}), ("mlp", {"layers": -1}), ("experts", {}),
        ("conv_in", {}), ("conv_out", {"conv_stages": 2}), ("nonsense", {}),
    ]:  # fmt: skip
        assert e2b.size(axis, index) is None
    assert moe.size("ple", {}) is None
    assert moe.size("audio_embed", {}) is None
    assert moe.size("conv_in", {"conv_stages": 0}) is None


def test_boolean_facts():
    e2b, moe = load_architecture(E2B), load_architecture(A4B)
    assert [e2b.holds("owns_kv", {"layers": i}) for i in (14, 15)] == [True, False]
    assert [e2b.holds("sliding", {"layers": i}) for i in (3, 4)] == [True, False]
    assert [e2b.holds("key_as_value", {"layers": i}) for i in (3, 4)] == [False, False]
    assert [moe.holds("key_as_value", {"layers": i}) for i in (4, 5)] == [False, True]
    assert [moe.holds("moe", {}), moe.holds("ple", {}), moe.holds("audio", {})] == [1, 0, 0]
    assert [e2b.holds("moe", {}), e2b.holds("ple", {}), e2b.holds("audio", {})] == [0, 1, 1]
    assert [e2b.holds("vision_clipped", {}), moe.holds("vision_clipped", {})] == [True, False]
    assert [e2b.holds("vision_standardized", {}), moe.holds("vision_standardized", {})] == [0, 1]
    assert moe.holds("nonsense", {}) is None


def saved_spelling(config, *, digits=2):
    """The config as transformers 5.23 saves it again: sizes of full layers by number."""
    text = config["text_config"]
    head_dim = text.pop("global_head_dim")
    kv_heads = text.pop("num_global_key_value_heads") or text["num_key_value_heads"]
    text["per_layer_config"] = {
        str(index).zfill(digits): {"head_dim": head_dim, "num_key_value_heads": kv_heads}
        for index, kind in enumerate(text["layer_types"])
        if kind == "full_attention"
    }
    return config


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_both_spellings_give_the_same_facts(name, digits):
    saved = saved_spelling(load_config(name), digits=digits)
    assert parse_architecture(saved, WHERE) == load_architecture(name)


def test_an_entry_by_layer_changes_that_layer_alone():
    config = saved_spelling(load_config(A4B))
    config["text_config"]["per_layer_config"]["11"] = {"head_dim": 320}
    config["text_config"]["per_layer_config"]["02"] = {"num_key_value_heads": 4}
    config["text_config"]["per_layer_config"]["29"] = None
    layers = parse_architecture(config, WHERE).text.layers
    before = load_architecture(A4B).text.layers
    assert (layers[11].head_dim, layers[11].kv_heads) == (320, 8)
    assert (layers[2].head_dim, layers[2].kv_heads) == (256, 4)
    assert (layers[29].head_dim, layers[29].kv_heads) == (256, 8)
    assert [i for i in range(30) if layers[i] != before[i]] == [2, 11, 29]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_only_config_has_the_same_language_model(name):
    model = parse_architecture(text_only(load_config(name)), WHERE)
    assert model.text == load_architecture(name).text
    assert model.text_only
    assert (model.vision, model.audio, model.image_token) == (None, None, None)
    assert model.dtype == "bfloat16"
    assert model.family == load_architecture(name).family


def test_full_layers_have_the_general_kv_heads_where_keys_are_not_values():
    config = load_config(A4B)
    config["text_config"]["attention_k_eq_v"] = False
    text = parse_architecture(config, WHERE).text
    assert {layer.kv_heads for layer in text.layers} == {8}
    assert {layer.head_dim for layer in text.layers if not layer.sliding} == {512}
    assert all(layer.owns_value for layer in text.layers)


def test_defaults_where_a_key_is_left_out():
    config = load_config(DENSE)
    for key in ("sliding_window", "rope_parameters", "rms_norm_eps", "final_logit_softcapping",
                "global_head_dim", "layer_types", "tie_word_embeddings"):  # fmt: skip
        del config["text_config"][key]
    text = parse_architecture(config, WHERE).text
    assert (text.window, text.norm_epsilon) == (512, 1e-6)
    assert (text.logit_softcap, text.tied) == (None, True)
    assert text.rope_full == Rope(1_000_000.0, 0.25)
    assert text.rope_sliding == Rope(10_000.0, 1.0)
    assert text.layers == load_architecture(DENSE).text.layers


def test_the_last_layer_is_full_whatever_the_config_says():
    config = load_config(DENSE)
    config["text_config"]["layer_types"][-1] = "sliding_attention"
    assert parse_architecture(config, WHERE) == load_architecture(DENSE)


@pytest.mark.parametrize(
    ("kinds", "period"),
    [("sf", 2), ("ssfssf", 3), ("ffff", 1), ("ssfsf", None), ("fssf", None), ("sssf", 4)],
)
def test_period(kinds, period):
    config = without_layers(load_config(DENSE), len(kinds))
    words = {"s": "sliding_attention", "f": "full_attention"}
    config["text_config"]["layer_types"] = [words[kind] for kind in kinds]
    assert parse_architecture(config, WHERE).text.period == period


def put(config, path, value):
    """`config` with `value` at a dotted path, or with nothing there."""
    *sections, key = path.split(".")
    for section in sections:
        config = config[section]
    if value is MISSING:
        config.pop(key, None)
    else:
        config[key] = value


T, V, AUDIO = "text_config.", "vision_config.", "audio_config."

WRONG = [
    ("model_type", MISSING, "model_type"),
    ("model_type", 4, "model_type"),
    ("model_type", "gemma3", "model_type"),
    ("model_type", "gemma4_unified", T + "hidden_size_per_layer_input"),
    ("quantization", {"bits": 4}, "quantization"),
    ("dtype", 16, "dtype"),
    ("image_token_id", "<image>", "image_token_id"),
    ("image_token_id", -1, "image_token_id"),
    ("text_config", MISSING, "text_config"),
    ("text_config", [], "text_config"),
    ("text_config", "gemma", "text_config"),
    ("vision_config", 1, "vision_config"),
    ("audio_config", True, "audio_config"),
    (T + "num_hidden_layers", MISSING, T + "num_hidden_layers"),
    (T + "num_hidden_layers", 10**9, T + "num_hidden_layers"),
    (T + "num_hidden_layers", 0, T + "num_hidden_layers"),
    (T + "num_hidden_layers", -35, T + "num_hidden_layers"),
    (T + "num_hidden_layers", 35.0, T + "num_hidden_layers"),
    (T + "num_hidden_layers", "35", T + "num_hidden_layers"),
    (T + "num_hidden_layers", True, T + "num_hidden_layers"),
    (T + "num_hidden_layers", 34, T + "layer_types"),
    (T + "hidden_size", MISSING, T + "hidden_size"),
    (T + "hidden_size", None, T + "hidden_size"),
    (T + "hidden_size", False, T + "hidden_size"),
    (T + "hidden_size", 1 << 31, T + "hidden_size"),
    (T + "hidden_size", 10**400, T + "hidden_size"),
    (T + "hidden_size", float("nan"), T + "hidden_size"),
    (T + "vocab_size", [1], T + "vocab_size"),
    (T + "vocab_size_per_layer_input", 0, T + "vocab_size_per_layer_input"),
    (T + "hidden_size_per_layer_input", -1, T + "hidden_size_per_layer_input"),
    (T + "intermediate_size", {}, T + "intermediate_size"),
    (T + "intermediate_size", MISSING, T + "intermediate_size"),
    (T + "head_dim", 0, T + "head_dim"),
    (T + "head_dim", MISSING, T + "head_dim"),
    (T + "global_head_dim", True, T + "global_head_dim"),
    (T + "num_attention_heads", MISSING, T + "num_attention_heads"),
    (T + "num_key_value_heads", MISSING, T + "num_key_value_heads"),
    (T + "num_key_value_heads", 3, T + "num_key_value_heads"),
    (T + "num_kv_shared_layers", 35, T + "num_kv_shared_layers"),
    (T + "num_kv_shared_layers", 32, T + "num_kv_shared_layers"),
    (T + "num_kv_shared_layers", -1, T + "num_kv_shared_layers"),
    (T + "num_kv_shared_layers", "20", T + "num_kv_shared_layers"),
    (T + "layer_types", ["sliding_attention"] * 34, T + "layer_types"),
    (T + "layer_types", [], T + "layer_types"),
    (T + "layer_types", "full_attention", T + "layer_types"),
    (T + "layer_types", ["sliding_attention"] * 34 + ["linear_attention"], T + "layer_types"),
    (T + "layer_types", [["sliding_attention"]] * 35, T + "layer_types"),
    (T + "layer_types", [None] * 35, T + "layer_types"),
    (T + "attention_bias", True, T + "attention_bias"),
    (T + "attention_k_eq_v", 1, T + "attention_k_eq_v"),
    (T + "use_double_wide_mlp", "yes", T + "use_double_wide_mlp"),
    (T + "tie_word_embeddings", 0, T + "tie_word_embeddings"),
    (T + "enable_moe_block", True, T + "num_experts"),
    (T + "sliding_window", 0.5, T + "sliding_window"),
    (T + "pad_token_id", -2, T + "pad_token_id"),
    (T + "rms_norm_eps", float("nan"), T + "rms_norm_eps"),
    (T + "rms_norm_eps", float("inf"), T + "rms_norm_eps"),
    (T + "rms_norm_eps", True, T + "rms_norm_eps"),
    (T + "rms_norm_eps", -1e-6, T + "rms_norm_eps"),
    (T + "final_logit_softcapping", "30", T + "final_logit_softcapping"),
    (T + "final_logit_softcapping", float("nan"), T + "final_logit_softcapping"),
    (T + "use_bidirectional_attention", 3, T + "use_bidirectional_attention"),
    (T + "use_bidirectional_attention", "all", T + "use_bidirectional_attention"),
    (T + "hidden_activation", "silu", T + "hidden_activation"),
    (T + "rope_parameters.full_attention.factor", 8.0,
     T + "rope_parameters.full_attention.factor"),
    (T + "rope_parameters", [], T + "rope_parameters"),
    (T + "rope_parameters.full_attention", "x", T + "rope_parameters.full_attention"),
    (T + "rope_parameters.full_attention.rope_theta", 0,
     T + "rope_parameters.full_attention.rope_theta"),
    (T + "rope_parameters.full_attention.rope_type", "yarn",
     T + "rope_parameters.full_attention.rope_type"),
    (T + "rope_parameters.full_attention.partial_rotary_factor", float("nan"),
     T + "rope_parameters.full_attention.partial_rotary_factor"),
    (T + "per_layer_config", [], T + "per_layer_config"),
    (T + "per_layer_config", {"35": {}}, T + "per_layer_config.35"),
    (T + "per_layer_config", {"-1": {}}, T + "per_layer_config.-1"),
    (T + "per_layer_config", {"four": {}}, T + "per_layer_config.four"),
    (T + "per_layer_config", {"²": {}}, T + "per_layer_config.²"),
    (T + "per_layer_config", {"04": 512}, T + "per_layer_config.04"),
    (T + "per_layer_config", {"04": {"head_dim": "512"}}, T + "per_layer_config.04.head_dim"),
    (V + "hidden_size", MISSING, V + "hidden_size"),
    (V + "num_hidden_layers", True, V + "num_hidden_layers"),
    (V + "num_key_value_heads", 6, V + "num_key_value_heads"),
    (V + "standardize", "no", V + "standardize"),
    (V + "rope_parameters.rope_theta", -1, V + "rope_parameters.rope_theta"),
    (V + "hidden_activation", "silu", V + "hidden_activation"),
    (V + "attention_bias", True, V + "attention_bias"),
    (AUDIO + "hidden_act", "gelu", AUDIO + "hidden_act"),
    (AUDIO + "attention_context_left", 12, AUDIO + "attention_context_left"),
    (AUDIO + "attention_context_right", 1, AUDIO + "attention_context_right"),
    (AUDIO + "attention_logit_cap", 30.0, AUDIO + "attention_logit_cap"),
    (AUDIO + "rms_norm_eps", 1e-5, AUDIO + "rms_norm_eps"),
    (AUDIO + "num_attention_heads", 7, AUDIO + "num_attention_heads"),
    (AUDIO + "subsampling_conv_channels", [128], AUDIO + "subsampling_conv_channels"),
    (AUDIO + "subsampling_conv_channels", [128, True], AUDIO + "subsampling_conv_channels"),
    (AUDIO + "subsampling_conv_channels", None, AUDIO + "subsampling_conv_channels"),
    (AUDIO + "conv_kernel_size", 0, AUDIO + "conv_kernel_size"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "key"), WRONG, ids=[f"{path}={value!r:.30}" for path, value, _ in WRONG]
)
def test_a_malformed_config_names_the_file_and_the_key(path, value, key):
    config = load_config(E2B)
    put(config, path, value)
    with pytest.raises(SourceError) as caught:
        parse_architecture(config, WHERE)
    assert str(WHERE) in caught.value.where
    assert key in f"{caught.value.where} {caught.value.found} {caught.value.expected}"
    assert len(caught.value.message) < 1000


def test_what_a_message_says():
    config = load_config(E2B)
    config["text_config"]["hidden_size"] = "1536"
    with pytest.raises(SourceError) as caught:
        parse_architecture(config, WHERE)
    assert caught.value.message == (
        "config.json does not describe a model.\n"
        f"  where: {WHERE}, key text_config.hidden_size\n"
        "  expected: a whole number from 1 to 2147483647\n"
        "  found: 1536"
    )


@pytest.mark.parametrize("key", ["num_experts", "top_k_experts", "moe_intermediate_size"])
def test_a_mixture_of_experts_needs_its_sizes(key):
    config = load_config(A4B)
    del config["text_config"][key]
    with pytest.raises(SourceError, match=f"key text_config.{key}"):
        parse_architecture(config, WHERE)


def test_the_old_name_of_the_experts_width():
    config = load_config(A4B)
    width = config["text_config"].pop("moe_intermediate_size")
    config["text_config"]["expert_intermediate_size"] = width
    assert parse_architecture(config, WHERE) == load_architecture(A4B)


def test_facts_of_the_embedders_of_12b():
    model = load_architecture(UNIFIED)
    assert model.unified and (model.vision, model.audio) == (None, None)
    assert model.vision_embedder == VisionEmbedder(
        embed=3840, patch=6912, patch_size=16, pooling=3, positions=1120, norm_epsilon=1e-6
    )
    assert model.audio_embedder == AudioEmbedder(frame=640)
    facts = ("images", "sounds", "vision", "audio", "vision_embedder", "audio_embedder")
    assert [model.holds(fact, {}) for fact in facts] == [True, True, False, False, True, True]
    sizes = {"vit_embed": 3840, "patch": 6912, "positions": 1120, "xy": 2, "audio_output": 640}
    assert {axis: model.size(axis, {}) for axis in sizes} == sizes
    assert model.size("vit_layers", {}) is None
    dense = load_architecture(DENSE)
    assert [dense.holds(fact, {}) for fact in facts] == [True, False, True, False, False, False]


def test_classes_and_kinds_of_models():
    names = {
        name: (one.reference_class, one.text_model_type)
        for name in (DENSE, UNIFIED)
        for one in (load_architecture(name),)
    }
    assert names == {
        DENSE: ("Gemma4ForConditionalGeneration", "gemma4_text"),
        UNIFIED: ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text"),
    }
    alone = parse_architecture(text_only(load_config(UNIFIED)), WHERE)
    assert alone.reference_class == "Gemma4UnifiedForCausalLM"
    assert (alone.unified, alone.vision_embedder, alone.audio_embedder) == (True, None, None)


def test_defaults_of_12b_where_a_key_is_left_out():
    config = load_config(UNIFIED)
    left_out = ("sliding_window", "hidden_size_per_layer_input", "use_bidirectional_attention",
                "enable_moe_block", "rope_parameters", "global_head_dim")  # fmt: skip
    for key in left_out:
        del config["text_config"][key]
    config["vision_config"] = {"model_type": "gemma4_unified_vision"}
    config["audio_config"] = {"model_type": "gemma4_unified_audio"}
    assert parse_architecture(config, WHERE) == load_architecture(UNIFIED)
    config["text_config"]["use_bidirectional_attention"] = None
    assert not parse_architecture(config, WHERE).text.bidirectional_images
    config |= {"vision_config": None, "audio_config": None}
    bare = parse_architecture(config, WHERE)
    assert (bare.unified, bare.vision_embedder, bare.audio_embedder) == (True, None, None)


@pytest.mark.parametrize("key", ["audio_embed_dim", "output_proj_dims", "audio_samples_per_token"])
def test_any_key_says_how_long_a_frame_is(key):
    config = load_config(UNIFIED)
    config["audio_config"] = {key: 320}
    assert parse_architecture(config, WHERE).audio_embedder == AudioEmbedder(frame=320)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (T + "enable_moe_block", True),
        (T + "hidden_size_per_layer_input", 256),
        (T + "use_bidirectional_attention", "all"),
        (V + "mm_embed_dim", 1920),
        (V + "output_proj_dims", 1920),
        (V + "model_patch_size", 16),
        (V + "mm_posemb_size", 0),
        (V + "patch_size", -16),
        (AUDIO + "audio_samples_per_token", 320),
        (AUDIO + "hidden_size", 641),
        (AUDIO + "audio_embed_dim", "640"),
    ],
)
def test_a_malformed_config_of_12b_names_the_key(path, value):
    config = load_config(UNIFIED)
    put(config, path, value)
    with pytest.raises(SourceError) as caught:
        parse_architecture(config, WHERE)
    key = V + "output_proj_dims" if path == V + "mm_embed_dim" else path
    assert caught.value.where == f"{WHERE}, key {key}"
    assert caught.value.what == "config.json does not describe a model."


@pytest.mark.parametrize(
    ("name", "section"), [(E2B, "vision_config"), (E2B, "audio_config"), (DENSE, "vision_config")]
)
def test_a_tower_with_a_billion_layers_is_refused(name, section):
    config = load_config(name)
    config[section]["num_hidden_layers"] = 10**9
    with pytest.raises(SourceError, match=f"key {section}.num_hidden_layers"):
        parse_architecture(config, WHERE)


def test_a_layer_number_with_thousands_of_digits_is_refused():
    config = load_config(E2B)
    config["text_config"]["per_layer_config"] = {"9" * 5000: {}}
    with pytest.raises(SourceError, match="per_layer_config"):
        parse_architecture(config, WHERE)


def test_reading_a_folder_and_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(load_config(E4B)), encoding="utf-8")
    assert read_architecture(tmp_path) == read_architecture(path) == load_architecture(E4B)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"model_type": ' + b"9" * 6000 + b"}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "does not describe a model"),
        (b" " * ((16 << 20) + 1), "too large"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, what):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=what) as caught:
        read_architecture(tmp_path)
    assert str(path) in caught.value.where


def test_no_config_at_all(tmp_path):
    with pytest.raises(SourceError, match=r"There is no config\.json") as caught:
        read_architecture(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match="cannot be read"):
        read_architecture(tmp_path)


def paths(values, prefix=()):
    """Every place of a config that a mutation may hit."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


ALL_PATHS = sorted(
    {path for name in PUBLISHED for path in paths(load_config(name)) if "label" not in path[-1]}
    | {("text_config", "per_layer_config"), ("text_config", "per_layer_config", "4")}
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.sampled_from([0, 1, 2, -1, 35, 1024, 1025, 1 << 31, 10**300])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["full_attention", "sliding_attention", "gemma4_text", "gemma4_unified", "proportional"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=timedelta(seconds=2))
@given(
    name=st.sampled_from(PUBLISHED),
    text_alone=st.booleans(),
    changes=st.lists(st.tuples(st.sampled_from(ALL_PATHS), JSON | st.just(MISSING)), max_size=4),
)
def test_a_damaged_config_gives_facts_or_a_clear_error(name, text_alone, changes):
    config = load_config(name)
    for (*sections, key), value in changes:
        inner = config
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            continue
        if value is MISSING:
            inner.pop(key, None)
        else:
            inner[key] = copy.deepcopy(value)
    if text_alone and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    try:
        model = parse_architecture(config, WHERE)
    except SourceError as error:
        assert str(WHERE) in error.where
        assert len(error.message) < 1000
    else:
        assert isinstance(model, Architecture)
        assert all(layer.kv_source <= layer.index for layer in model.text.layers)
