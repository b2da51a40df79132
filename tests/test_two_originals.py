"""Two Hugging Face checkpoints against each other: what another converter made of an original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from native_checkpoints import edited
from safetensors.torch import load_file, save_file
from test_cli import fails
from test_naming import NAMINGS, rename

from gemma_convert import SourceError, UsageError, logit_check, verify

NORM = "model.language_model.norm.weight"


def again(source: Path, target: Path, change) -> Path:
    """A copy in which `change` has had the tensors, written by the safetensors library."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, section: str, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[section] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_what_differs_is_missing_or_extra_is_said(shallow, tmp_path):
    source = shallow("31b")
    tower = "model.vision_tower.std_scale"

    def change(tensors):
        tensors[NORM].view(-1)[3] += 1
        tensors["model.extra"] = tensors.pop(tower)
        name = "model.language_model.layers.0.layer_scalar"
        tensors[name] = tensors[name].float()
        name = "model.language_model.layers.1.layer_scalar"
        tensors[name] = tensors[name].float() * 1.001
        name = "model.language_model.layers.1.self_attn.q_norm.weight"
        tensors[name] = tensors[name][:-1].clone()

    size = load_file(source / "model.safetensors")[NORM].numel()
    other = again(source, tmp_path / "other", change)
    report = verify(other, against=source)
    assert not report.passed
    head = load_file(source / "model.safetensors")
    heads = head["model.language_model.layers.1.self_attn.q_norm.weight"].numel()
    layers = "model.language_model.layers"
    assert report.different == {
        "model.extra": f"is not in {source}",
        tower: "is missing",
        NORM: f"1 of {size} values differs",
        f"{layers}.0.layer_scalar": "is float32 instead of bfloat16; every value is the same",
        f"{layers}.1.layer_scalar": "is float32 instead of bfloat16; 1 of 1 value differs",
        f"{layers}.1.self_attn.q_norm.weight": f"has the shape [{heads - 1}] instead of [{heads}]",
    }
    assert "Only the tensors were compared" in report.notes[0]


@pytest.mark.parametrize("naming", ["plain", "compiled", "base model"])
def test_the_same_tensors_pass_in_other_shards_and_under_other_names(naming, shallow, tmp_path):
    source, other = shallow("31b", shards=2), shallow("31b")
    if naming != "plain":
        other = rename(other, tmp_path / "t", NAMINGS[naming])
    report = verify(other, against=source)
    assert report.passed, report.different
    assert report.checked == 129
    assert verify(source, against=other).passed


@pytest.mark.share(2)
@pytest.mark.parametrize("whole", [False, True])
def test_the_same_weights_have_no_divergence(whole, shallow, tmp_path):
    source = shallow("31b")
    wider = again(
        source,
        tmp_path / "f",
        lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}),
    )
    report = logit_check(source, wider, tokens=20, whole_model=whole)
    assert report.passed and report.proof
    assert report.divergence.kl_max == 0
    assert (report.layout, report.local) == ("huggingface", None)
    assert "parts were not compared" in report.warnings[0]
    assert (report.drift is None) == whole


def test_another_weight_fails(shallow, tmp_path):
    source = shallow("31b")
    other = edited(source, tmp_path / "o", {NORM: lambda values: values * np.float32(1.25)})
    report = logit_check(source, other, tokens=20)
    assert not report.passed
    assert report.divergence.kl_max > 1e-3


def test_images_are_seen_by_both(shallow, tmp_path):
    from PIL import Image

    source = shallow("31b")
    Image.new("RGB", (60, 50), (200, 30, 90)).save(tmp_path / "a.png")
    name = "model.vision_tower.std_scale"
    other = edited(source, tmp_path / "o", {name: lambda values: -values})
    report = logit_check(source, other, prompts=("a",), images=(tmp_path / "a.png",))
    assert not report.passed
    assert logit_check(source, source, images=(tmp_path / "a.png",)).divergence.kl_max == 0


def test_each_side_runs_by_its_own_config(shallow, tmp_path):
    source = shallow("31b")
    other = shutil.copytree(source, tmp_path / "o")
    edit_config(other, "text_config", sliding_window=3)
    report = logit_check(source, other, tokens=20)
    assert not report.passed
    assert any("window is 3 in o, 12 in the original" in one for one in report.warnings)


def test_what_cannot_be_compared_is_refused(shallow, tmp_path):
    source = shallow("31b")
    with pytest.raises(SourceError, match="not belong to the same model"):
        logit_check(source, shallow("e2b"), tokens=5)
    with pytest.raises(UsageError, match="in float32"):
        logit_check(source, source, tokens=5, dtype="bfloat16")
    with pytest.raises(UsageError, match="a config"):
        logit_check(source, source, tokens=5, settings=["sliding_window_size=3"])
    with pytest.raises(UsageError, match="a config"):
        verify(source, against=source, settings=["sliding_window_size=3"])
    assert "needs a checkpoint to be compared with" in fails(2, "verify", source)
