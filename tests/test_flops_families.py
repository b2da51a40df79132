"""config.json of every family → model, and one message for what is none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import models
import pytest

from gemma_convert.errors import SourceError
from gemma_convert.flops.attention import Reach
from gemma_convert.flops.families import families
from gemma_convert.flops.model import Dense, Experts, GatedDelta, GroupedQuery, Latent
from gemma_convert.flops.source import read_model

REQUIRED = {"deepseek_v2": {"num_experts_per_tok": 6}}

TEXT_TYPES = sorted({family.model_type for family in families().values()})


@pytest.fixture
def read(tmp_path):
    """read(values): the model of a config.json with these values."""

    def make(values: object):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_model(tmp_path)

    return make


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_what_is_left_out_is_as_in_transformers(read, model_type):
    """A config.json of the family's name alone, and the one that transformers writes of that."""
    from transformers import AutoConfig

    values = {"model_type": model_type} | REQUIRED.get(model_type, {})
    written = AutoConfig.for_model(**values).to_dict()
    assert len(written) > 20
    assert read(values) == read(written)


def test_twelve_families_are_known():
    """Llama 2 and 3 are one of eleven descriptions; two of the families have towers beside them."""
    assert TEXT_TYPES == [
        "deepseek_v2",
        "deepseek_v3",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "llama",
        "llama4_text",
        "mixtral",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
    ]
    assert set(families()) - set(TEXT_TYPES) == {"gemma3", "llama4"}


def test_the_text_model_of_a_model_with_towers(read):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 7}
    found = read({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert found.embed == 2560
    assert [layer.kind for layer in found.layers] == ["sliding"] * 5 + ["full", "sliding"]
    assert found.layers == read(text).layers
    assert "without the towers" in found.notes[0] and read(text).notes == ()


def test_llama_3(read):
    """Sizes of Meta-Llama-3-8B, whose config.json states all of them but head_dim."""
    found = read(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
        }
    )
    layer = found.layers[0]
    assert layer.mixer == GroupedQuery(32, 8, 128, Reach())
    assert layer.feed_forward == (Dense(14336),)
    assert (found.vocab, found.embed, found.groups) == (128256, 4096, {"full": 4})


def test_deepseek(read):
    values = {"model_type": "deepseek_v3", "num_hidden_layers": 5, "q_lora_rank": None}
    found = read(values)
    assert found.layers[0].mixer == Latent(128, None, 512, 128, 64, 128, Reach())
    assert [layer.feed_forward for layer in found.layers[2:4]] == [
        (Dense(18432),),
        (Experts(256, 8, 2048, shared=2048),),
    ]
    assert read(values | {"n_shared_experts": 3}).layers[4].feed_forward[0].shared == 3 * 2048
    assert "num_nextn_predict_layers" in found.notes[0]
    assert found.groups == {}


def test_llama_4(read):
    values = {"model_type": "llama4_text", "num_hidden_layers": 8, "interleave_moe_layer_step": 2}
    found = read(values)
    assert [layer.kind for layer in found.layers] == (["chunked"] * 3 + ["full"]) * 2
    assert [type(layer.feed_forward[0]) for layer in found.layers[:2]] == [Dense, Experts]
    assert found.layers[0].mixer.reach == Reach("chunked", 8192)
    flagged = read(values | {"no_rope_layers": [0, 1] * 4, "moe_layers": [0]})
    assert [layer.kind for layer in flagged.layers] == ["full", "chunked"] * 4
    assert [type(layer.feed_forward[0]) for layer in flagged.layers[:2]] == [Experts, Dense]
    assert read(values | {"no_rope_layers": []}).layers == found.layers


def test_qwen3_next(read):
    values = {"model_type": "qwen3_next", "num_hidden_layers": 4, "mlp_only_layers": [1]}
    found = read(values)
    assert found.layers[0].mixer == GatedDelta(16, 32, 128, 128, 4, 64)
    assert found.layers[3].mixer == GroupedQuery(16, 2, 256, Reach(), gated=True)
    assert found.layers[1].feed_forward == (Dense(5632),)
    assert found.layers[2].feed_forward == (Experts(512, 10, 512, 512, shared_gate=True),)


def test_windows_are_off_unless_switched_on(read):
    values = {"model_type": "qwen3", "num_hidden_layers": 4, "max_window_layers": 3}
    assert {layer.kind for layer in read(values).layers} == {"full"}
    on = read(values | {"use_sliding_window": True, "sliding_window": 77})
    assert [layer.kind for layer in on.layers] == ["full"] * 3 + ["sliding"]
    assert on.layers[3].mixer.reach == Reach("sliding", 77)
    none = read(values | {"use_sliding_window": True, "sliding_window": None})
    assert {layer.kind for layer in none.layers} == {"full"}


def test_mixtral_has_its_window_in_every_layer(read):
    values = {"model_type": "mixtral", "num_hidden_layers": 2, "num_experts_per_tok": 8}
    assert [layer.kind for layer in read(values).layers] == ["full"] * 2
    windowed = read(values | {"sliding_window": 4096})
    assert [layer.mixer.reach for layer in windowed.layers] == [Reach("sliding", 4096)] * 2


BROKEN = [
    ({"model_type": "bert"}, "model_type", "bert"),
    ({}, "model_type", "nothing"),
    ({"model_type": ["llama"]}, "model_type", "['llama']"),
    ({"model_type": "gemma4_assistant"}, "model_type", "gemma4_assistant"),
    ({"model_type": "gemma4_unified_text"}, "num_hidden_layers", "nothing"),
    ({"model_type": "deepseek_v2"}, "num_experts_per_tok", "nothing"),
    ({"model_type": "llama", "hidden_size": 0}, "hidden_size", "0"),
    ({"model_type": "llama", "hidden_size": -4}, "hidden_size", "-4"),
    ({"model_type": "llama", "hidden_size": 10**30}, "hidden_size", str(10**30)),
    ({"model_type": "llama", "hidden_size": 4096.0}, "hidden_size", "4096.0"),
    ({"model_type": "llama", "hidden_size": True}, "hidden_size", "True"),
    ({"model_type": "llama", "hidden_size": None}, "hidden_size", "nothing"),
    ({"model_type": "llama", "hidden_size": 7}, "head_dim", "0"),
    ({"model_type": "llama", "num_hidden_layers": 10**6}, "num_hidden_layers", "1000000"),
    ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads", "5"),
    ({"model_type": "qwen3", "use_sliding_window": 1}, "use_sliding_window", "1"),
    ({"model_type": "gemma2", "layer_types": "full"}, "layer_types", "full"),
    ({"model_type": "gemma2", "layer_types": []}, "layer_types", "0 entries"),
    ({"model_type": "gemma2", "layer_types": [[]] * 26}, "layer_types", "[]"),
    (
        {"model_type": "qwen3_next", "layer_types": ["sliding_attention"] * 48},
        "layer_types",
        "sliding_attention",
    ),
    ({"model_type": "gemma2", "layer_types": ["linear_attention"] * 26}, "layer_types", "linear"),
    (
        {"model_type": "gemma2", "sliding_window": None, "layer_types": ["sliding_attention"] * 26},
        "sliding_window",
        "nothing",
    ),
    ({"model_type": "llama4_text", "no_rope_layers": [1]}, "no_rope_layers", "1"),
    ({"model_type": "llama4_text", "moe_layers": 3}, "moe_layers", "3"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok", "9"),
    ({"model_type": "gemma3"}, "text_config", "nothing"),
    ({"model_type": "gemma3", "text_config": {"hidden_size": "x"}}, "text_config.hidden_size", "x"),
    ({"model_type": "gemma4_text"}, "num_hidden_layers", "nothing"),
]


@pytest.mark.parametrize(("values", "key", "found"), BROKEN, ids=[key for _, key, _ in BROKEN])
def test_a_config_that_describes_no_model(read, values, key, found):
    with pytest.raises(SourceError) as caught:
        read(values)
    assert re.search(rf"config\.json, key {re.escape(key)}$", caught.value.where)
    assert found in caught.value.found


def test_the_message_about_another_model_names_the_known_ones(read):
    with pytest.raises(SourceError) as caught:
        read({"model_type": "bert"})
    assert caught.value.expected == (
        "deepseek_v2, deepseek_v3, gemma2, gemma3, gemma3_text, gemma4, gemma4_text, "
        "gemma4_unified, gemma4_unified_text, gpt_oss, llama, llama4, llama4_text, mixtral, qwen3, "
        "qwen3_moe, qwen3_next"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("\xff", "not valid JSON"),
        (" " * (17 << 20), "too large"),
    ],
    ids=["empty", "deep", "list", "no JSON", "huge"],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=message):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["", "missing", "missing.json"])
def test_no_config_at_all(tmp_path, name):
    with pytest.raises(SourceError, match=r"no config\.json"):
        read_model(tmp_path / name)


def test_a_file_a_folder_and_a_converted_checkpoint_are_the_same(tiny, converted):
    source = tiny("e2b")
    native = converted(source, "maxtext")
    expected = read_model(source)
    assert expected == read_model(source / "config.json") == read_model(native)
    assert expected == read_model(native / "0" / "items")


def test_quantized_checkpoints_multiply_the_same(read):
    values = models.load_config(models.DENSE)
    assert read(values | {"quantization_config": {"bits": 4}}) == read(values)


def test_gemma4_as_its_architecture_says(read):
    found = read(models.load_config(models.E2B) | {"vision_soft_tokens_per_image": 70})
    assert (found.family, found.image_tokens, found.ple) == ("gemma4 e2b", 70, 256)
    assert found.bidirectional_images is False
    assert found.layers[14].feed_forward == (Dense(6144),)
    assert found.layers[15].feed_forward == (Dense(12288),)
    assert found.layers[15].mixer == GroupedQuery(8, 1, 256, Reach("sliding", 512), False, False)
    moe = read_model(models.FOLDER / models.A4B)
    assert moe.bidirectional_images is True and moe.image_tokens == 280
    assert moe.layers[0].feed_forward == (Dense(2112), Experts(128, 8, 704))
    assert moe.layers[5].mixer == GroupedQuery(16, 2, 512, Reach(), True, False)
    assert moe.groups == {"sliding": 2, "full": 8}


def test_12b_as_its_architecture_says(read):
    found = read_model(models.FOLDER / models.UNIFIED)
    assert (found.family, found.image_tokens, found.ple) == ("gemma4 12b", 280, 0)
    assert found.bidirectional_images is True and len(found.layers) == 48
    assert found.layers[0].mixer == GroupedQuery(16, 8, 256, Reach("sliding", 1024))
    assert found.layers[5].mixer == GroupedQuery(16, 1, 512, Reach(), True, False)
    assert {layer.feed_forward for layer in found.layers} == {(Dense(15360),)}
    values = models.load_config(models.UNIFIED)
    values["vision_config"]["num_soft_tokens"] = 70
    assert read(values) == replace(found, image_tokens=70)
    assert read(values | {"vision_config": None}) == replace(found, vision=None)
    assert read(values | {"quantization": {"bits": 4}}).image_tokens == 70


def test_a_description_names_its_source():
    folder = Path(read_model.__code__.co_filename).parent / "descriptions"
    files = sorted(folder.glob("*.toml"))
    assert len(files) == len(TEXT_TYPES)
    for file in files:
        assert "Source: transformers 5.23, models/" in file.read_text()
