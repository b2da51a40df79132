"""Gemma 4 12B, which has embedders instead of towers: every layout, there, checked, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cases import LAYOUTS_OF_12B
from fast_llm_by_hand import fast_llm_tensors
from gemma_jax_by_hand import gemma_jax_tree
from maxtext_by_hand import maxtext_tree
from models import UNIFIED, load_architecture, load_config, load_tensors
from native_checkpoints import CARRIED, arrays_of, differing, edited, passes, sums
from PIL import Image
from test_cli import fails, run
from trees import read_safetensors
from tunix_by_hand import tunix_tree

from gemma_convert import SourceError, inspect, to_hf, to_native
from gemma_convert.layouts.gemma_jax.settings import gemma_jax_settings
from gemma_convert.layouts.maxtext.settings import maxtext_settings
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.model.config import read_architecture
from gemma_convert.tiny import make_tiny
from gemma_convert.tiny.tokenizer import FIRST_BYTE

EMBEDDERS = sorted(name for name in load_tensors(UNIFIED) if ".language_model." not in name)
FRAMEWORKS = {
    "maxtext": "MaxText",
    "gemma-jax": "The gemma library",
    "fast-llm": "Fast-LLM",
    "tunix": "Tunix",
}
EVERY = pytest.mark.parametrize(("layout", "scanned"), LAYOUTS_OF_12B)
KL_LIMIT = 1e-9
"""Largest KL of a token: 4.3e-11 was seen."""


@pytest.fixture(scope="module")
def native(shallow, converted):
    """(source, its conversion) of a layout: shallow, and two blocks deep where it is scanned."""

    def convert(layout: str, scanned: bool) -> tuple[Path, Path]:
        source = shallow("12b", scanned)
        return source, converted(source, layout, scan_layers=scanned)

    return convert


def by_hand(source: Path, layout: str, scanned: bool) -> dict[str, np.ndarray]:
    hf, architecture = read_safetensors(source), read_architecture(source)
    if layout == "maxtext":
        return maxtext_tree(hf, architecture, scanned)
    made = {"gemma-jax": gemma_jax_tree, "fast-llm": fast_llm_tensors, "tunix": tunix_tree}
    return made[layout](hf, architecture)


# There and back.


@EVERY
def test_arrays_are_those_written_by_hand_and_the_rest_is_carried(native, layout, scanned):
    source, out = native(layout, scanned)
    assert not differing(arrays_of(out, layout), by_hand(source, layout, scanned))
    hf = read_safetensors(source)
    carried = read_safetensors((out / CARRIED).parent)
    assert sorted(carried) == EMBEDDERS
    assert not differing(carried, {name: hf[name] for name in EMBEDDERS})
    kept = json.loads((out / CARRIED.parent / "manifest.json").read_text())["tensors"]
    assert sorted(name for name in kept if kept[name]["kept"] == "carried") == EMBEDDERS


@pytest.mark.share(2, 1)
@EVERY
def test_it_is_verified_and_every_file_comes_back(native, tmp_path, layout, scanned):
    source, out = native(layout, scanned)
    for against in (None, source):
        passes(out, against)
    report = to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)
    assert report.bit_for_bit and report.family == "12b"


@EVERY
def test_what_the_report_and_inspect_say(native, tmp_path, layout, scanned):
    source, out = native(layout, scanned)
    plan = to_native(source, tmp_path / "o", layout=layout, scan_layers=scanned, dry_run=True)
    why = f"{FRAMEWORKS[layout]} has no place for the embedders of Gemma 4 12B"
    assert (plan.family, plan.carried_why) == ("12b", {why: len(EMBEDDERS)})
    found = inspect(out)
    assert (found.layout, found.family, found.scanned) == (layout, "12b", scanned)
    assert found.coverage.complete and found.towers == ()


def test_one_layout_becomes_the_next_and_the_original_in_the_end(native, tmp_path):
    source, out = native("maxtext", True)
    for layout in ("gemma-jax", "fast-llm", "maxtext"):
        to_native(out, tmp_path / layout, layout=layout)
        out = tmp_path / layout
        assert not differing(arrays_of(out, layout), by_hand(source, layout, False))
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_a_trained_checkpoint_takes_the_embedders_from_the_original(native, tmp_path):
    source, out = native("gemma-jax", False)
    shutil.copytree(out, tmp_path / "bare", ignore=shutil.ignore_patterns("hf"))
    fails(3, "to-hf", tmp_path / "bare", tmp_path / "without")
    to_hf(tmp_path / "bare", tmp_path / "back", like=source)
    assert sums(tmp_path / "back") == sums(source)


def test_the_text_alone_goes_there_and_back(tiny, tmp_path):
    source = tiny("12b", layers=6, text_only=True)
    report = to_native(source, tmp_path / "out", layout="gemma-jax")
    assert (report.family, report.tensors_carried) == ("12b", 0)
    to_hf(tmp_path / "out", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def logits_of(folder: Path, name: str):
    """Logits of a few tokens by transformers' class `name`, which must be filled exactly."""
    import torch
    import transformers

    model, found = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(FIRST_BYTE, FIRST_BYTE + 40)[None]).logits


def test_an_export_of_the_text_alone_is_the_same_language_model(native, tiny, tmp_path):
    import torch

    source, out = native("fast-llm", False)
    to_hf(out, tmp_path / "text", text_only=True)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["model_type"] == "gemma4_unified_text"
    assert config["architectures"] == ["Gemma4UnifiedForCausalLM"]
    alone = tiny("12b", layers=6, text_only=True)
    assert not differing(read_safetensors(tmp_path / "text"), read_safetensors(alone))
    whole = logits_of(source, "Gemma4UnifiedForConditionalGeneration")
    assert torch.equal(logits_of(tmp_path / "text", "Gemma4UnifiedForCausalLM"), whole)


# Checked by running.


@pytest.mark.share(3, 1)
@EVERY
def test_logits_are_those_of_transformers(native, layout, scanned):
    source, out = native(layout, scanned)
    report = logit_check(source, out, tokens=3)
    assert report.verdict == "same model" and report.divergence.kl_max < KL_LIMIT
    assert report.longest_sequence > report.sliding_window and report.layout == layout
    assert len(report.drift.layers) == len(read_architecture(source).text.layers)


@pytest.mark.large
def test_logits_of_the_whole_model_and_of_a_golden_file(native, tmp_path):
    source, out = native("maxtext", False)
    whole = logit_check(source, out, tokens=3, whole_model=True)
    golden = save_golden(source, tmp_path / "golden.safetensors", tokens=3)
    assert golden.family == "12b"
    stored = logit_check(source, out, golden=golden.path)
    for report in (whole, stored):
        assert report.verdict == "same model" and report.divergence.kl_max < KL_LIMIT
    text = shutil.copytree(source, tmp_path / "text", ignore=shutil.ignore_patterns("*.safe*"))
    assert logit_check(text, out, golden=golden.path).passed


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.5.self_attn.k_proj.weight",
        "model.language_model.layers.0.self_attn.v_proj.weight",
    ],
)
def test_another_checkpoint_does_not_pass(native, tmp_path, name):
    """Keys of a full layer are its values as well."""
    source, out = native("maxtext", False)
    other = edited(source, tmp_path / "other", {name: lambda values: values[::-1]})
    report = logit_check(other, out, tokens=3)
    assert not report.passed and report.divergence.kl_max > 1e-3


def test_a_tensor_that_transformers_would_make_up_is_missed(tiny, tmp_path):
    """Names in the file are not those of the modules: both sides must be renamed alike."""
    from safetensors.torch import load_file, save_file

    source = tiny("12b", layers=6)
    folder = shutil.copytree(source, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.vision_embedder.odd"] = tensors.pop("model.vision_embedder.pos_norm.bias")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"does not fit its config\.json") as caught:
        LayerwiseReference(folder, [])
    assert "1 missing: model.embed_vision.pos_norm.bias" in caught.value.found
    assert "1 unexpected: model.vision_embedder.odd" in caught.value.found
    files, stored = LayerwiseReference(source, [])._files, read_safetensors(source)
    assert len(files.shapes) == len(stored)
    bias = files.read("model.embed_vision.pos_norm.bias").numpy()
    assert (bias == stored["model.vision_embedder.pos_norm.bias"].astype(np.float32)).all()


@pytest.mark.parametrize("option", ["--image", "--audio"])
def test_images_and_sounds_are_refused_before_anything_runs(native, tmp_path, option):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    source, out = native("gemma-jax", False)
    message = fails(2, "logit-check", source, out, option, tmp_path / "x.png")
    assert "cannot take" in message and "tower" in message


# Settings.


def published() -> SimpleNamespace:
    """What settings ask a plan of the published 12B, scanned, for."""
    architecture = load_architecture(UNIFIED)
    return SimpleNamespace(architecture=architecture, scanned=True, ignored_facts=(), version=None)


def test_maxtext_is_told_31b_with_the_sizes_of_12b():
    settings = maxtext_settings(published(), Path("out/0/items"), multimodal=False)
    assert settings == {
        "model_name": "gemma4-31b",
        "scan_layers": "true",
        "use_multimodal": "false",
        "load_parameters_path": "out/0/items",
        "override_model_config": "true",
        "base_num_decoder_layers": "48",
        "base_emb_dim": "3840",
        "base_num_query_heads": "16",
        "base_num_kv_heads": "8",
        "base_mlp_dim": "15360",
        "global_num_kv_heads": "1",
    }


def test_the_gemma_library_is_told_31b_with_the_sizes_of_12b():
    assert gemma_jax_settings(published(), Path("/out"), vision=False) == {
        "model": "gm.nn.Gemma4_31B(config=config)",
        "config": "dataclasses.replace(gm.nn.Gemma4_31B.config, embed_dim=3840, hidden_dim=15360, "
        "num_heads=16, num_kv_heads=8, num_global_kv_heads=1, "
        "attention_types=gm.nn.Gemma4_31B.config.attention_types[:6] * 8, vision_encoder=None)",
        "params": 'gm.ckpts.load_params("/out")',
    }


# The tiny model.


def test_no_two_axes_of_the_tiny_model_share_a_size(tiny):
    model = read_architecture(tiny("12b", layers=6))
    text, vision = model.text, model.vision_embedder
    sizes = {
        text.vocab, text.embed, len(text.layers), vision.embed, vision.patch, vision.positions,
        model.audio_embedder.frame,
    }  # fmt: skip
    of_layers = [
        {getattr(layer, field) for layer in text.layers}
        for field in ("heads", "kv_heads", "head_dim", "mlp")
    ]
    assert [len(found) for found in of_layers] == [1, 2, 2, 1]
    assert len(sizes.union(*of_layers)) == 7 + 6
    assert (model.family, text.period, text.key_as_value) == ("12b", 6, True)
    assert all(round(width**0.5) ** 2 != width for width in (text.embed, vision.embed))


def test_the_tiny_model_has_the_tensors_and_keys_of_the_published_one(tiny):
    source = tiny("12b", layers=6)
    names = {name for name in load_tensors(UNIFIED) if ".layers." not in name}
    assert {name for name in read_safetensors(source) if ".layers." not in name} == names
    config, published = json.loads((source / "config.json").read_text()), load_config(UNIFIED)
    assert config.keys() == published.keys()
    for section in ("text_config", "vision_config", "audio_config"):
        unused = {"_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label",
                  "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states",
                  "problem_type", "return_dict"}  # fmt: skip
        assert config[section].keys() == published[section].keys() - unused


def test_no_norm_or_bias_of_the_tiny_model_is_near_one_or_zero(tiny):
    for name, values in read_safetensors(tiny("12b", layers=6)).items():
        found = values.astype(np.float64)
        if name.endswith("bias"):
            assert np.abs(found).min() > 0.15 and found.min() < 0 < found.max(), name
        elif found.ndim == 1:
            assert found.min() > 0.2 and np.abs(found - 1).min() > 0.04, name


@pytest.mark.parametrize("text_only", [False, True])
def test_both_spellings_of_its_config(tmp_path, text_only):
    from transformers import AutoConfig

    folders = {
        spelling: make_tiny(
            "12b", tmp_path / spelling, layers=6, config_spelling=spelling, text_only=text_only
        ).path
        for spelling in ("published", "saved")
    }
    assert read_architecture(folders["published"]) == read_architecture(folders["saved"])
    AutoConfig.from_pretrained(folders["saved"]).save_pretrained(tmp_path / "theirs")
    written, expected = (
        json.loads((folder / "config.json").read_text())
        for folder in (folders["saved"], tmp_path / "theirs")
    )
    del written["transformers_version"], expected["transformers_version"]
    assert written == expected


def test_transformers_loads_its_processor_as_far_as_it_is_installed(tiny):
    from transformers import AutoFeatureExtractor, AutoTokenizer

    extractor = AutoFeatureExtractor.from_pretrained(tiny("12b", layers=6))
    assert type(extractor).__name__ == "Gemma4UnifiedAudioFeatureExtractor"
    frames = extractor([np.zeros(320, np.float32)], return_tensors="np").input_features
    assert frames.shape == (1, 10, 32)
    assert len(AutoTokenizer.from_pretrained(tiny("12b", layers=6))) == 331
    processor = json.loads((tiny("12b", layers=6) / "processor_config.json").read_text())
    assert processor["processor_class"] == "Gemma4UnifiedProcessor"
    assert processor["image_processor"]["image_processor_type"] == "Gemma4UnifiedImageProcessor"
    assert processor["audio_ms_per_token"] == 2


def test_the_command_makes_and_inspects_it(tmp_path):
    done = run("tiny", "12b", tmp_path / "made", "--layers", 6, "--json")
    assert json.loads(done.stdout)["family"] == "12b"
    found = json.loads(run("inspect", tmp_path / "made", "--json").stdout)
    assert (found["family"], found["complete"], found["layers"]) == ("12b", True, 6)
    (tmp_path / "made" / "config.json").unlink()
    assert inspect(tmp_path / "made").family == "12b"
