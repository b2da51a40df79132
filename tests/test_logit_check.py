"""The whole check, from files: right conversions pass, wrong ones do not, and reports say why."""

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from maxtext_trees import change, make_model, maxtext_tree, save_model, write_maxtext

from gemma_convert.config import read_architecture
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.logits import check as check_module
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.golden import save_golden
from gemma_convert.logits.limit import choose_limit, find_lossy_rows
from gemma_convert.logits.report import render
from gemma_convert.native.restore import ArrayFacts

ORACLE = os.environ.get("GEMMA_CONVERT_ORACLE")
needs_oracle = pytest.mark.skipif(
    ORACLE is None, reason="GEMMA_CONVERT_ORACLE is not set: no checkpoints of MaxText's own here"
)


class Checkpoint:
    """One tiny model on disk as `hf`, and its MaxText tree in memory."""

    def __init__(self, kind, folder, scanned):
        import torch

        model = make_model(kind).to(torch.bfloat16)
        self.hf = save_model(model, folder)
        self.tree = maxtext_tree(model, scanned)


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
    return write_maxtext(dense.tree, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def golden(dense, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "dense.safetensors"
    save_golden(dense.hf, path)
    return path


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
    assert report.divergence.kl_max < 1e-8 and report.divergence.top1_agreement == 1.0
    assert report.limit == 1e-5 and report.warnings == () and report.lossy_rows == ()
    assert report.longest_sequence > report.sliding_window == 7
    found = strict_json(report)
    assert found["schema"] == "gemma-convert/logit-check/1" and found["nan"] == []
    assert found["tokens"] == 24 * 3 + 39 and found["sequences"] == 4
    assert {"jax", "torch", "transformers", "orbax-checkpoint"} <= found["versions"].keys()
    assert found["worst_token"]["kl"] == report.divergence.kl_max
    text = shown(report)
    assert "same model" in text and "limit 1e-05 (float32, nothing rounded)" in text


@pytest.mark.parametrize("kind", ["moe", "ple"])
def test_other_kinds_pass_and_do_not_pass_with_a_mistake(others, kind, tmp_path):
    one = others[kind]
    write_maxtext(one.tree, tmp_path / "right")
    assert logit_check(one.hf, tmp_path / "right").verdict == "same model"
    path = {
        "moe": "decoder/scanned_blocks/local_layers/mlp/moe_block/MoeBlock_0/per_expert_scale",
        "ple": "decoder/layers_5/layer_scalar",
    }[kind]
    write_maxtext(change(one.tree, path, np.ones_like), tmp_path / "wrong")
    report = logit_check(one.hf, tmp_path / "wrong")
    assert not report.passed and report.verdict == "not the same model"
    assert report.divergence.kl_max > 1e-4


def test_sliced_runs_give_the_same_figures(dense, native, monkeypatch):
    whole = logit_check(dense.hf, native)
    monkeypatch.setattr(check_module, "SLICE_BYTES", 4 * 94 * 5)
    sliced = logit_check(dense.hf, native)
    assert sliced.divergence.tokens == whole.divergence.tokens
    assert sliced.divergence.kl_max == pytest.approx(whole.divergence.kl_max, rel=1, abs=1e-9)


def test_one_wrong_scalar_fails_and_its_token_is_named(dense, tmp_path):
    def lose(scalars):
        scalars = scalars.copy()
        scalars[0, 1, 0] = 1.0
        return scalars

    path = "decoder/scanned_blocks/local_layers/layer_scalar"
    write_maxtext(change(dense.tree, path, lose), tmp_path)
    report = logit_check(dense.hf, tmp_path)
    assert not report.passed and report.divergence.kl_max > 1e-4
    worst = strict_json(report)["worst_token"]
    assert worst["sequence"].startswith("random-") and 0 <= worst["position"] < 39
    assert "not the same model" in shown(report)


def test_window_is_seen_only_by_the_long_sequence(dense, native, monkeypatch):
    original = check_module.NativeLogits

    def with_window(items, text, sequences, dtype):
        return original(items, replace(text, window=39), sequences, dtype)

    monkeypatch.setattr(check_module, "NativeLogits", with_window)
    report = logit_check(dense.hf, native)
    assert not report.passed and report.divergence.worst.position >= 7


def test_values_that_are_not_numbers_fail(dense, tmp_path):
    def spoil(scale):
        scale = scale.copy()
        scale[3] = np.nan
        return scale

    write_maxtext(change(dense.tree, "decoder/decoder_norm/scale", spoil), tmp_path)
    report = logit_check(dense.hf, tmp_path, max_kl=1e30)
    assert not report.passed and math.isnan(report.divergence.kl_max)
    found = strict_json(report)
    assert found["kl_max"] is None and "kl_max" in found["nan"] and not found["passed"]
    assert "nan" in shown(report)


def rounded(tree):
    table = tree["token_embedder"]["embedding"].astype(ml_dtypes.bfloat16)
    return change(tree, "token_embedder/embedding", lambda _: table)


def test_rounded_embedding_is_found_and_called_an_indication(dense, tmp_path):
    write_maxtext(rounded(dense.tree), tmp_path)
    report = logit_check(dense.hf, tmp_path)
    assert report.limit == 0.03 and not report.proof
    assert 1e-5 < report.divergence.kl_max < 0.03 and report.passed
    assert report.verdict == "no difference seen: an indication, not proof"
    assert report.lossy_rows == ("token_embedder/embedding: the scaled embedding in bfloat16",)
    assert "embedding in bfloat16" in report.warnings[0]
    assert not logit_check(dense.hf, tmp_path, lossy_rows=()).passed
    strict = logit_check(dense.hf, tmp_path, max_kl=1e-5)
    assert strict.verdict == "further apart than rounding should be"


def test_manifest_says_what_is_lossy(dense, tmp_path):
    write_maxtext(dense.tree, tmp_path)
    folder = tmp_path / "hf" / "gemma-convert"
    folder.mkdir(parents=True)
    rows = [{"row": "embed_tokens", "reason": "scaled and rounded"}]
    (folder / "manifest.json").write_text(json.dumps({"lossy_rows": rows}))
    report = logit_check(dense.hf, tmp_path, tokens=3)
    assert report.lossy_rows == ("embed_tokens: scaled and rounded",) and not report.proof
    architecture, items = read_architecture(dense.hf), tmp_path / "0" / "items"
    facts = {"token_embedder/embedding": ArrayFacts((94, 40), "bfloat16")}
    for path in (tmp_path, tmp_path / "0", items):
        assert find_lossy_rows(path, items, facts, architecture) == report.lossy_rows
    (folder / "manifest.json").write_text('{"lossy_rows": []}')
    assert find_lossy_rows(tmp_path, items, facts, architecture) == ()
    for text in ("{", "[]", '{"lossy_rows": 3}', "{}"):
        (folder / "manifest.json").write_text(text)
        (found,) = find_lossy_rows(tmp_path, items, facts, architecture)
        assert "scaled embedding in bfloat16" in found
    facts = {"token_embedder/embedding": ArrayFacts((94, 40), "float32")}
    assert find_lossy_rows(tmp_path, items, facts, architecture) == ()


def test_weights_rounded_from_float32_are_lossy(dense, tmp_path):
    architecture = replace(read_architecture(dense.hf), dtype="float32")
    facts = {
        "token_embedder/embedding": ArrayFacts((94, 40), "float32"),
        "decoder/layers_0/mlp/wo/kernel": ArrayFacts((52, 40), "bfloat16"),
    }
    (found,) = find_lossy_rows(tmp_path, tmp_path / "0" / "items", facts, architecture)
    assert found.startswith("weights: float32")


def test_bfloat16_is_an_indication(dense, native):
    report = logit_check(dense.hf, native, dtype="bfloat16")
    assert report.limit == 0.03 and not report.proof and "bfloat16" in report.warnings[0]
    assert 1e-5 < report.divergence.kl_max < 0.03
    assert strict_json(report)["dtype"] == "bfloat16"


def test_golden_logits_stand_in_for_the_reference(dense, native, golden, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("the reference model was loaded")

    direct = logit_check(dense.hf, native)
    monkeypatch.setattr(check_module, "TransformersLogits", never)
    (tmp_path / "config.json").write_bytes((dense.hf / "config.json").read_bytes())
    report = logit_check(tmp_path, native, golden=golden)
    assert report.passed and report.proof
    assert report.divergence.tokens == direct.divergence.tokens
    assert report.reference == "golden logits dense.safetensors"
    assert {"transformers", "jax"} <= report.versions.keys()


def test_golden_logits_catch_a_mistake(dense, golden, tmp_path):
    path = "decoder/scanned_blocks/global_layer/self_attention/query_norm/scale"
    write_maxtext(change(dense.tree, path, np.ones_like), tmp_path)
    assert not logit_check(dense.hf, tmp_path, golden=golden).passed


def test_golden_logits_of_another_model_are_refused(others, golden, tmp_path):
    write_maxtext(others["ple"].tree, tmp_path)
    with pytest.raises(SourceError, match="another checkpoint"):
        logit_check(others["ple"].hf, tmp_path, golden=golden)


def test_short_golden_logits_warn_about_the_window(dense, native, tmp_path, monkeypatch):
    from gemma_convert.logits import prompts

    monkeypatch.setattr(prompts, "BEYOND_WINDOW", -4)
    monkeypatch.setattr(prompts, "SHORT_LENGTH", 5)
    path = tmp_path / "short.safetensors"
    save_golden(dense.hf, path)
    assert (
        "longer than the sliding window" in logit_check(dense.hf, native, golden=path).warnings[0]
    )


def test_tree_of_another_model_is_refused_by_name(dense, others, tmp_path):
    write_maxtext(others["ple"].tree, tmp_path)
    with pytest.raises(SourceError, match=r"embedding is \[94, 38\] instead of \[94, 40\]"):
        logit_check(dense.hf, tmp_path)


def test_options_are_checked_before_anything_runs(dense, native, golden):
    with pytest.raises(UsageError, match="its own tokens"):
        logit_check(dense.hf, native, golden=golden, tokens=3)
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError, match="max-kl"):
            logit_check(dense.hf, native, max_kl=value)
    with pytest.raises(SourceError, match="no Orbax checkpoint"):
        logit_check(dense.hf, dense.hf)


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


@needs_oracle
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("26b-a4b", "26b-a4b_unscanned"),
        ("31b", "31b_scanned_training"),
    ],
)
def test_maxtexts_own_checkpoints_pass(model, name):
    report = logit_check(Path(ORACLE) / "hf" / model, Path(ORACLE) / "maxtext" / name)
    assert report.verdict == "same model" and report.divergence.kl_max < 1e-6


@needs_oracle
def test_maxtexts_rounded_embedding_is_told_apart():
    oracle = Path(ORACLE)
    name = "26b-a4b_scanned_bfloat16"
    report = logit_check(oracle / "hf" / "26b-a4b", oracle / "maxtext" / name)
    assert not report.proof and report.limit == 0.03
    assert report.divergence.kl_max > 1e-2
