"""The whole check, from files: right conversions pass, wrong ones do not, and reports say why."""

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import FAMILIES, SHALLOW
from maxtext_trees import (
    change,
    facts_for_maxtext,
    make_model,
    maxtext_tree,
    save_model,
    tell_maxtext,
    write_maxtext,
)
from native_checkpoints import alter
from PIL import Image

from gemma_convert.cli.app import main
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.logits import check as check_module
from gemma_convert.logits import opened as opened_module
from gemma_convert.logits import running
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.logits.limit import choose_limit, find_lossy_rows
from gemma_convert.logits.report_table import render
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import image_sequences


class Checkpoint:
    """One tiny model on disk as `hf`, and its MaxText tree in memory."""

    def __init__(self, kind, folder, scanned):
        import torch

        model = make_model(kind).to(torch.bfloat16)
        self.hf = save_model(model, folder)
        self.tree = maxtext_tree(model, scanned)

    def write(self, tree, folder):
        """A tree as a checkpoint of MaxText, told the facts of the model."""
        return tell_maxtext(write_maxtext(tree, folder), self.hf)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return Checkpoint("dense", tmp_path_factory.mktemp("dense"), scanned=True)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return {
        "moe": Checkpoint("moe", tmp_path_factory.mktemp("moe"), scanned=True),
        "ple": Checkpoint("ple", tmp_path_factory.mktemp("ple"), scanned=False),
    }


@pytest.fixture(scope="module")
def native(dense, tmp_path_factory):
    return dense.write(dense.tree, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def golden(dense, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "dense.safetensors"
    save_golden(dense.hf, path)
    return path


def pairs(hf):
    """What MaxText is told of a model, setting by setting."""
    return [f"{key}={value}" for key, value in facts_for_maxtext(hf).items()]


def strict_json(report):
    return json.loads(json.dumps(report.as_json(), allow_nan=False))


def shown(report):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(render(report))
    return console.file.getvalue()


def test_right_conversion_is_proven(dense, native):
    report = logit_check(dense.hf, native)
    assert report.passed and report.proof and report.verdict == "same model"
    assert report.layout == "maxtext" and report.images == report.sounds == 0
    assert report.divergence.kl_max < 1e-8 and report.divergence.top1_agreement == 1.0
    assert report.limit == 1e-5 and report.warnings == () and report.lossy_rows == ()
    assert report.longest_sequence > report.sliding_window == 7
    found = strict_json(report)
    assert found["schema"] == "gemma-convert/logit-check/3" and found["nan"] == []
    assert found["tokens"] == 24 * 3 + 39 and found["sequences"] == 4
    assert {"jax", "torch", "transformers", "orbax-checkpoint"} <= found["versions"].keys()
    assert found["worst_token"]["kl"] == report.divergence.kl_max
    assert found["layout"] == "maxtext" and found["images"] == found["sounds"] == 0
    assert found["towers_not_run"] == []
    text = shown(report)
    assert "same model" in text and "limit 1e-05 (float32, nothing rounded)" in text


@pytest.mark.share(2)
@pytest.mark.parametrize("kind", ["moe", "ple"])
def test_other_kinds_pass_and_do_not_pass_with_a_mistake(others, kind, tmp_path):
    one = others[kind]
    one.write(one.tree, tmp_path / "right")
    streamed = logit_check(one.hf, tmp_path / "right")
    whole = logit_check(one.hf, tmp_path / "right", whole_model=True)
    assert streamed.verdict == whole.verdict == "same model"
    assert streamed.drift.first is None and len(streamed.drift.layers) == (
        8 if kind == "ple" else 6
    )
    path = {
        "moe": "decoder/scanned_blocks/local_layers/mlp/moe_block/MoeBlock_0/per_expert_scale",
        "ple": "decoder/layers_5/layer_scalar",
    }[kind]
    one.write(change(one.tree, path, np.ones_like), tmp_path / "wrong")
    report = logit_check(one.hf, tmp_path / "wrong")
    assert not report.passed and report.verdict == "not the same model"
    assert report.divergence.kl_max > 1e-4
    assert report.drift.first == ("layer 5" if kind == "ple" else "layer 0")


def test_sliced_runs_give_the_same_figures(dense, native, monkeypatch):
    whole = logit_check(dense.hf, native, whole_model=True)
    monkeypatch.setattr(running, "SLICE_BYTES", 4 * 94 * 5)
    sliced = logit_check(dense.hf, native, whole_model=True)
    assert sliced.divergence.tokens == whole.divergence.tokens
    assert sliced.divergence.kl_max == pytest.approx(whole.divergence.kl_max, rel=1, abs=1e-9)


def test_one_wrong_scalar_fails_and_its_token_is_named(dense, tmp_path):
    def lose(scalars):
        scalars = scalars.copy()
        scalars[0, 1, 0] = 1.0
        return scalars

    path = "decoder/scanned_blocks/local_layers/layer_scalar"
    dense.write(change(dense.tree, path, lose), tmp_path)
    report = logit_check(dense.hf, tmp_path)
    assert not report.passed and report.divergence.kl_max > 1e-4
    assert report.drift.first == "layer 3" and "first beyond 2e-03 is layer 3" in shown(report)
    worst = strict_json(report)["worst_token"]
    assert worst["sequence"].startswith("random-") and 0 <= worst["position"] < 39
    assert "not the same model" in shown(report)


def test_window_is_seen_only_by_the_long_sequence(dense, native, monkeypatch):
    original = opened_module.open_model

    def with_window(folder, architecture):
        text = replace(architecture.text, window=39)
        return original(folder, replace(architecture, text=text))

    monkeypatch.setattr(opened_module, "open_model", with_window)
    report = logit_check(dense.hf, native)
    assert not report.passed and report.divergence.worst.position >= 7


def test_values_that_are_not_numbers_fail(dense, tmp_path):
    def spoil(scale):
        scale = scale.copy()
        scale[3] = np.nan
        return scale

    dense.write(change(dense.tree, "decoder/decoder_norm/scale", spoil), tmp_path)
    report = logit_check(dense.hf, tmp_path, max_kl=1e30)
    assert not report.passed and math.isnan(report.divergence.kl_max)
    found = strict_json(report)
    assert found["kl_max"] is None and "kl_max" in found["nan"] and not found["passed"]
    assert "nan" in shown(report)


def rounded(tree):
    table = tree["token_embedder"]["embedding"].astype(ml_dtypes.bfloat16)
    return change(tree, "token_embedder/embedding", lambda _: table)


def test_rounded_embedding_is_found_and_called_an_indication(dense, tmp_path):
    dense.write(rounded(dense.tree), tmp_path)
    report = logit_check(dense.hf, tmp_path)
    assert report.limit >= 0.03 and not report.proof
    assert report.drift.tolerance is None and report.drift.first is None
    assert 1e-5 < report.divergence.kl_max < 0.03 and report.passed
    assert report.verdict == "no difference found: an indication, not proof"
    assert report.lossy_rows == ("the embedding: scaled, in bfloat16",)
    assert "scaled, in bfloat16" in report.warnings[0]
    assert not logit_check(dense.hf, tmp_path, lossy_rows=()).passed
    strict = logit_check(dense.hf, tmp_path, max_kl=1e-5)
    assert strict.verdict == "larger difference than rounding explains"


def test_manifest_says_what_is_lossy(dense, tmp_path):
    dense.write(dense.tree, tmp_path)
    folder = tmp_path / "hf" / "gemma-convert"
    folder.mkdir(parents=True)
    rows = [{"tensor": "embed_tokens", "reason": "scaled and rounded"}]
    manifest = {"schema": "gemma-convert/manifest/1", "shards": [], "lossy_rows": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = logit_check(dense.hf, tmp_path, tokens=3)
    assert report.lossy_rows == ("embed_tokens: scaled and rounded",) and not report.proof
    architecture, items = read_architecture(dense.hf), tmp_path / "0" / "items"

    def found(folder, scaled_dtype="bfloat16"):
        return find_lossy_rows(folder, {"bfloat16", "float32"}, scaled_dtype, architecture)

    for path in (tmp_path, tmp_path / "0", items):
        assert found(path) == report.lossy_rows
    (folder / "manifest.json").write_text('{"lossy_rows": [{"tensor": "a"}, {}, "b"]}')
    assert found(items) == ("a: rounded", "?: rounded", "b")
    (folder / "manifest.json").write_text('{"lossy_rows": []}')
    assert found(items) == ()
    for text in ("{", "[]", '{"lossy_rows": 3}', "{}"):
        (folder / "manifest.json").write_text(text)
        assert found(items) == ("the embedding: scaled, in bfloat16",)
    for scaled_dtype in ("float32", None):
        assert found(items, scaled_dtype) == ()


@pytest.mark.parametrize(
    ("embed", "exact"), [(1, True), (16, True), (32, False), (40, False), (4096, True)]
)
def test_a_root_that_is_a_power_of_two_rounds_nothing(dense, tmp_path, embed, exact):
    architecture = read_architecture(dense.hf)
    architecture = replace(architecture, text=replace(architecture.text, embed=embed))
    assert (not find_lossy_rows(tmp_path, {"bfloat16"}, "bfloat16", architecture)) == exact


def test_weights_rounded_from_float32_are_lossy(dense, tmp_path):
    architecture = replace(read_architecture(dense.hf), dtype="float32")
    for scaled_dtype in ("bfloat16", "float32", None):
        (found,) = find_lossy_rows(tmp_path, {"float32", "bfloat16"}, scaled_dtype, architecture)
        assert found.startswith("weights: float32")
    assert find_lossy_rows(tmp_path, {"float32"}, "float32", architecture) == ()


def test_bfloat16_is_an_indication(dense, native):
    report = logit_check(dense.hf, native, dtype="bfloat16")
    assert report.limit >= 0.03 and not report.proof and "bfloat16" in report.warnings[0]
    assert 1e-5 < report.divergence.kl_max < 0.03 and report.local.passed
    assert strict_json(report)["dtype"] == "bfloat16"


def test_golden_logits_stand_in_for_the_reference(dense, native, golden, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("the reference model was loaded")

    direct = logit_check(dense.hf, native)
    monkeypatch.setattr(running, "TransformersLogits", never)
    monkeypatch.setattr(running, "LayerwiseReference", never)
    (tmp_path / "config.json").write_bytes((dense.hf / "config.json").read_bytes())
    report = logit_check(tmp_path, native, golden=golden)
    assert report.passed and report.proof
    assert report.divergence.tokens == direct.divergence.tokens
    assert report.reference == "golden logits dense.safetensors"
    assert {"transformers", "jax"} <= report.versions.keys()


def test_golden_logits_catch_a_mistake(dense, golden, tmp_path):
    path = "decoder/scanned_blocks/global_layer/self_attention/query_norm/scale"
    dense.write(change(dense.tree, path, np.ones_like), tmp_path)
    assert not logit_check(dense.hf, tmp_path, golden=golden).passed


def test_golden_logits_of_another_model_are_refused(others, golden, tmp_path):
    others["ple"].write(others["ple"].tree, tmp_path)
    with pytest.raises(SourceError, match="another checkpoint"):
        logit_check(others["ple"].hf, tmp_path, golden=golden)


def test_short_golden_logits_warn_about_the_window(dense, native, tmp_path, monkeypatch):
    from gemma_convert.prompts import text as prompts

    monkeypatch.setattr(prompts, "BEYOND_WINDOW", -4)
    monkeypatch.setattr(prompts, "SHORT_LENGTH", 5)
    path = tmp_path / "short.safetensors"
    save_golden(dense.hf, path)
    assert (
        "longer than the sliding window" in logit_check(dense.hf, native, golden=path).warnings[0]
    )


def test_tree_of_another_model_is_refused_by_name(dense, others, tmp_path):
    others["ple"].write(others["ple"].tree, tmp_path)
    with pytest.raises(SourceError, match=r"embedding is \[94, 38\] instead of \[94, 40\]"):
        logit_check(dense.hf, tmp_path)


def test_options_are_checked_before_anything_runs(dense, native, golden):
    with pytest.raises(UsageError, match="come from the golden"):
        logit_check(dense.hf, native, golden=golden, tokens=3)
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError, match="max_kl"):
            logit_check(dense.hf, native, max_kl=value)
    with pytest.raises(UsageError, match="come from the golden") as caught:
        logit_check(dense.hf, native, golden=golden, images=[Path("cat.png")])
    assert "--image" in caught.value.do
    with pytest.raises(SourceError, match="no Orbax checkpoint"):
        logit_check(dense.hf, golden)


@pytest.mark.parametrize(
    ("max_kl", "dtype", "lossy", "kl", "proof", "warnings"),
    [
        (None, "float32", [], 1e-5, True, 0),
        (1e-7, "float32", [], 1e-7, True, 0),
        (1e-3, "float32", [], 1e-3, False, 1),
        (None, "bfloat16", [], 0.03, False, 1),
        (None, "float32", ["a: rounded"], 0.03, False, 1),
        (1e-9, "bfloat16", ["a: rounded"], 1e-9, False, 2),
    ],
)
def test_limits(max_kl, dtype, lossy, kl, proof, warnings):
    limit = choose_limit(max_kl, dtype, lossy)
    assert (limit.kl, limit.proof, len(limit.warnings)) == (kl, proof, warnings)


def test_package_imports_without_heavy_libraries():
    import subprocess
    import sys

    code = (
        "import sys; import gemma_convert.logits.check, gemma_convert.logits.golden;"
        "heavy = {'jax', 'torch', 'transformers', 'orbax', 'jaxtyping'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    root = Path(check_module.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("26b-a4b", "26b-a4b_unscanned"),
        ("31b", "31b_scanned_training"),
    ],
)
def test_maxtexts_own_checkpoints_pass(oracle, model, name):
    hf = oracle / "hf" / model
    report = logit_check(hf, oracle / "maxtext" / name, settings=pairs(hf))
    assert report.verdict == "same model" and report.divergence.kl_max < 1e-6


def test_maxtexts_rounded_embedding_is_told_apart(oracle):
    name = "26b-a4b_scanned_bfloat16"
    hf = oracle / "hf" / "26b-a4b"
    report = logit_check(hf, oracle / "maxtext" / name, settings=pairs(hf))
    assert not report.proof and report.limit >= 0.03 and report.local.noise == "bfloat16"
    assert report.divergence.kl_max > 1e-2


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(pixels).save(path)
    return path


TEXT_ALONE = (
    ("maxtext", "e2b"),
    ("maxtext", "e4b"),
    ("fast-llm", "26b-a4b"),
    ("fast-llm", "31b"),
)
WITH_IMAGES = (
    *(("gemma-jax", family) for family in FAMILIES),
    ("maxtext", "26b-a4b"),
    ("maxtext", "31b"),
)
TEXT_LIMIT = 2e-6
"""Largest KL of a token: 2e-10 was seen on the tiny models, and logits 6e-5 apart."""


@pytest.mark.parametrize(("layout", "family"), TEXT_ALONE)
def test_text_of_every_layout(tiny, converted, layout, family):
    source = tiny(family, layers=SHALLOW[family])
    report = logit_check(source, converted(source, layout), tokens=3)
    assert report.verdict == "same model" and report.divergence.kl_max <= TEXT_LIMIT
    assert report.layout == layout and f"{layout}, float32" in shown(report)
    assert report.longest_sequence > report.sliding_window and report.warnings == ()


@pytest.mark.share(6, 4)
@pytest.mark.parametrize(("layout", "family"), WITH_IMAGES)
def test_images_of_every_layout_that_sees(tiny, converted, picture, layout, family):
    """The text that runs beside the image is held to the same limit."""
    source = tiny(family, layers=SHALLOW[family])
    report = logit_check(source, converted(source, layout), tokens=3, images=[picture])
    assert report.verdict == "same model" and report.divergence.kl_max <= TEXT_LIMIT
    assert (report.layout, report.images, report.sequences) == (layout, 1, 3)
    assert "1 with an image" in shown(report) and strict_json(report)["images"] == 1
    (one,) = image_sequences(source, read_architecture(source), [picture])
    window = read_architecture(source).text.window
    assert report.divergence.tokens == 3 + window + 32 + int(one.compared.sum())


@pytest.mark.parametrize(("layout", "family"), TEXT_ALONE)
def test_layouts_without_a_tower_refuse_images(
    tiny, converted, picture, layout, family, monkeypatch
):
    """Before the original is loaded, which may take long."""
    source = tiny(family, layers=SHALLOW[family])
    monkeypatch.setattr(running, "LayerwiseReference", None)
    with pytest.raises(UsageError, match="has no vision tower, so it cannot take images") as one:
        logit_check(source, converted(source, layout), tokens=3, images=[picture])
    assert one.value.found == f"layout {layout}" and "--image" in one.value.do


@pytest.mark.parametrize(("layout", "family"), [("gemma-jax", "e2b"), ("maxtext", "31b")])
def test_trees_without_a_tower_refuse_images(tiny, converted, picture, layout, family, monkeypatch):
    monkeypatch.setattr(running, "LayerwiseReference", None)
    native = converted(tiny(family, layers=SHALLOW[family], text_only=True), layout)
    with pytest.raises(UsageError, match="has no vision tower"):
        logit_check(tiny(family, layers=SHALLOW[family]), native, tokens=3, images=[picture])
    with pytest.raises(UsageError, match="The model cannot take images"):
        logit_check(tiny(family, layers=SHALLOW[family], text_only=True), native, images=[picture])


def test_a_checkpoint_of_fast_llm_for_another_vocabulary_is_refused(tiny, converted, tmp_path):
    shutil.copytree(
        tiny("31b", layers=6), tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    vocab = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = vocab + 1
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="another shape") as caught:
        logit_check(tmp_path / "hf", converted(tiny("31b", layers=6), "fast-llm"))
    assert caught.value.found == str(vocab)


def test_exit_codes(tiny, converted, picture, tmp_path, monkeypatch, capsys):
    def code(*arguments):
        monkeypatch.setattr(sys, "argv", ["gemma-convert", "logit-check", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    source, native = tiny("31b", layers=6), converted(tiny("31b", layers=6), "gemma-jax")
    check = (source, native, "--tokens", 3)
    assert not code(*check, "--image", picture, "--image", picture, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 2 and found["sequences"] == 4 and found["passed"]
    broken = tmp_path / "broken"
    shutil.copytree(native, broken)
    alter(broken, "embedder/mm_input_projection/w", lambda kernel: kernel[::-1])
    assert not code(source, broken, "--tokens", 3)
    capsys.readouterr()
    assert code(source, broken, "--tokens", 3, "--image", picture, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "not the same model"
    assert found["worst_token"]["sequence"] == "image-0 (noise.png)"
    assert code(*check, "--image", tmp_path / "none.png") == 2
    assert "error: The image does not exist." in capsys.readouterr().err
    assert code(source, converted(source, "fast-llm"), "--image", picture) == 2
    assert "vision tower" in capsys.readouterr().err
    assert code(source, tmp_path / "nothing") == 3
    assert code(*check, "--image", picture, "--golden", tmp_path / "golden") == 2
    assert "--audio" in capsys.readouterr().err
