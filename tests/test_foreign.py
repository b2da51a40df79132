"""What is no Gemma 4 checkpoint is called by its name, and what to do is said: exit code 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from native_checkpoints import passes, sums
from test_cli import fails

from gemma_convert import SourceError, inspect, logit_check, to_hf, to_native
from gemma_convert.model.foreign import refuse_foreign_tensors

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "google/gemma-4-31B-it", "r": 8}
CONVERT = ("to-native", "--format", "maxtext")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


def write(path: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def refused(source: Path) -> str:
    """The one message that every command has for a source, given as a folder."""
    out = source.parent / "out"
    message = fails(3, "to-native", source, out, "--format", "maxtext")
    assert not out.exists()
    assert fails(3, "inspect", source) == message
    assert fails(3, "golden", source, out) == message
    return message


def save(path: Path, *names: str, dtype: str = "float32") -> None:
    import torch
    from safetensors.torch import save_file

    zeros = torch.zeros(2).to(getattr(torch, dtype))
    save_file({name: zeros.clone() for name in names}, path, metadata={"format": "pt"})


# Adapters.


@pytest.mark.parametrize("weights", ["adapter_model.bin", None])
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_that_is_pickled_or_has_no_weights(folder, tiny, weights, with_config):
    write(folder / "adapter_config.json", ADAPTER)
    if weights is not None:
        (folder / weights).write_bytes(b"")
    if with_config:
        shutil.copy(tiny("31b", layers=6) / "config.json", folder)
    if weights is None and with_config:
        assert "This is an adapter" not in fails(3, "inspect", folder)
        return
    message = refused(folder)
    assert "This is an adapter of PEFT" in message
    found = f"{weights or 'adapter_config.json'}, kind LORA, base model google/gemma-4-31B-it"
    assert found in message
    assert "merge_and_unload()" in message and "save_pretrained()" in message


@pytest.mark.parametrize("content", ["{", "[]", {"peft_type": None}])
def test_an_adapter_whose_config_says_nothing(folder, content):
    write(folder / "adapter_config.json", content)
    save(folder / "adapter_model.safetensors", "base_model.model.model.layers.0.q.lora_A.weight")
    for more in ((), ("--merge",)):
        message = fails(3, "to-native", folder, folder.parent / "o", "--format", "maxtext", *more)
        assert "adapter_config.json" in message
    assert "adapter_config.json" in fails(3, "inspect", folder)
    assert "to-native --merge" in fails(3, "golden", folder, folder.parent / "out")
    assert not (folder.parent / "o").exists()


def test_an_adapter_config_beside_whole_weights_is_passed_over(tiny, tmp_path):
    source = shutil.copytree(tiny("31b", layers=6), tmp_path / "in")
    write(source / "adapter_config.json", ADAPTER)
    to_native(source, tmp_path / "out")
    assert inspect(source).coverage.complete
    assert inspect(tmp_path / "out").coverage.complete
    again = to_native(tmp_path / "out", tmp_path / "next", layout="gemma-jax")
    assert again.family == "31b"


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.language_model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_weights_with_an_adapter_that_is_not_merged(folder, tiny, name):
    shutil.copy(tiny("31b", layers=6) / "config.json", folder)
    save(folder / "model.safetensors", "model.language_model.norm.weight", name)
    out = folder.parent / "out"
    for command in (("inspect", folder), ("to-native", folder, out, "--format", "gemma-jax")):
        message = fails(3, *command)
        assert "a PEFT model whose adapter is not merged" in message
        assert name in message and "merge_and_unload()" in message


# Other models of the family, by config.json.

OTHERS = [
    ("gemma4_assistant", "This is a drafter, which proposes tokens to a Gemma 4 model"),
    ("gemma4_unified_assistant", "This is a drafter, which proposes tokens to Gemma 4 12B"),
    ("gemma4_vision", "the vision tower of a Gemma 4 model by itself"),
    ("gemma4_unified_audio", "the audio embedder of Gemma 4 12B by itself"),
    ("embedding_gemma2", "an EmbeddingGemma 2 model, which gives vectors and no logits"),
    ("embedding_gemma2_text", "an EmbeddingGemma 2 model, which gives vectors and no logits"),
    ("diffusion_gemma", "a DiffusionGemma model"),
    ("gemma3n", "a Gemma 3n model"),
    ("gemma3n_text", "a Gemma 3n model"),
    ("gemma3", "a Gemma 3 model"),
    ("gemma3_text", "a Gemma 3 model"),
    ("gemma2", "a Gemma 2 model"),
    ("gemma", "a Gemma 1 model"),
    ("paligemma", "a PaliGemma model"),
    ("t5gemma2", "a T5Gemma 2 model"),
]


@pytest.mark.parametrize(("model_type", "what"), OTHERS)
def test_another_model_of_the_family(folder, model_type, what):
    write(folder / "config.json", {"model_type": model_type, "text_config": {}})
    save(folder / "model.safetensors", "model.norm.weight")
    message = refused(folder)
    assert what in message and f"found: {model_type}\n" in message
    assert "what to do: " in message
    drafts, part = "assistant" in model_type, model_type.startswith("gemma4")
    assert ("no framework that is converted to here has a place" in message) == drafts
    assert ("convert the whole model that it belongs to" in message) == (part and not drafts)
    assert ("E2B, E4B, 12B, 26B-A4B or 31B" in message) == (not part)


def test_names_are_those_that_transformers_has():
    from transformers import CONFIG_MAPPING

    assert {model_type for model_type, _ in OTHERS} <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("model_type", ["llama", "gemma4_something", "gemma_4", "text"])
def test_a_model_of_no_known_kind(folder, model_type):
    write(folder / "config.json", {"model_type": model_type})
    save(folder / "model.safetensors", "model.norm.weight")
    message = refused(folder)
    assert "This is not a Gemma 4 checkpoint that gemma-convert knows." in message
    assert "expected: gemma4, gemma4_text, gemma4_unified, gemma4_unified_text" in message


# Exports of other programs.


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_of_gguf_files(folder, tiny, with_config):
    for name in ("model-Q4_0.gguf", "mmproj.gguf"):
        (folder / name).write_bytes(b"GGUF")
    if with_config:
        shutil.copy(tiny("31b", layers=6) / "config.json", folder)
    message = refused(folder)
    assert "This is a GGUF export for llama.cpp" in message
    assert "found: mmproj.gguf, model-Q4_0.gguf" in message
    assert "convert the original bfloat16 checkpoint" in message


def test_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "This is a GGUF export" in refused(tmp_path / "model.gguf")


def test_gguf_beside_safetensors_is_passed_over(tiny, tmp_path):
    source = shutil.copytree(tiny("31b", layers=6), tmp_path / "in")
    (source / "model-Q4_0.gguf").write_bytes(b"GGUF")
    assert to_native(source, tmp_path / "out", dry_run=True).family == "31b"


def test_an_export_of_mlx_by_its_config(folder, tiny):
    config = json.loads((tiny("31b", layers=6) / "config.json").read_text())
    write(folder / "config.json", config | {"quantization": {"group_size": 64, "bits": 4}})
    save(folder / "model.safetensors", "model.norm.weight")
    message = refused(folder)
    assert "This is a quantized export of MLX," in message and "key quantization" in message


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float8_e4m3fn"])
def test_packed_weights_under_the_names_of_weights(folder, tiny, dtype):
    shutil.copy(tiny("31b") / "config.json", folder)
    save(folder / "model.safetensors", "model.language_model.norm.weight", dtype=dtype)
    for command in (("inspect", folder), (*CONVERT[:1], folder, folder / "o", *CONVERT[1:])):
        message = fails(3, *command)
        assert "This is a quantized export, which holds packed integers" in message
        assert f"found: model.language_model.norm.weight in {dtype}\n" in message


QUANTIZED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "bits": 4}


@pytest.mark.share(2)
@pytest.mark.parametrize("place", ["", "text_config"])
def test_the_tensors_decide_what_is_quantized(place, shallow, tmp_path):
    source = shutil.copytree(shallow("31b"), tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (config[place] if place else config)["quantization_config"] = QUANTIZED
    write(source / "config.json", config)
    to_native(source, tmp_path / "out", layout="gemma-jax")
    assert inspect(source).coverage.complete
    passes(tmp_path / "out", source)
    for whole in (False, True):
        assert logit_check(source, tmp_path / "out", tokens=5, whole_model=whole).passed
    assert to_hf(tmp_path / "out", tmp_path / "back").bit_for_bit
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.language_model.layers.0.self_attn.q_proj.weight_scale", "a quantized export"),
        ("model.language_model.layers.0.mlp.up_proj.qweight", "a quantized export"),
        ("model.language_model.layers.0.mlp.up_proj.scales", "a quantized export"),
    ],
)
def test_an_export_by_its_tensors(folder, tiny, name, what):
    shutil.copy(tiny("31b", layers=6) / "config.json", folder)
    save(folder / "model.safetensors", name)
    for command in (
        ("inspect", folder),
        ("to-native", folder, folder / "o", "--format", "maxtext"),
    ):
        message = fails(3, *command)
        assert what in message and f"found: {name}\n" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight",
        "model.vision_embedder.patch_dense.bias",
        "model.language_model.model.odd",
        "language_model.odd.weight",
        "lora.weight",
    ],
)
def test_names_that_say_nothing(name):
    refuse_foreign_tensors({name: "bfloat16"}, "here")


def test_the_first_name_that_says_something_is_told():
    with pytest.raises(SourceError) as caught:
        names = ("a.weight", "b.lora_A.weight", "c.scales")
        refuse_foreign_tensors(dict.fromkeys(names, "float32"), "here")
    assert (caught.value.found, caught.value.where) == ("b.lora_A.weight", "here")
