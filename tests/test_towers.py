"""Every part of a native tower by itself, on the original's own states."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cases import SHALLOW
from native_checkpoints import alter
from PIL import Image
from safetensors.torch import load_file, save_file
from test_local import COMMON

from gemma_convert import logit_check
from gemma_convert.forward import jax_model
from gemma_convert.forward.encoder import encoded
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.limit import SINGLE_NOISE_FACTOR
from gemma_convert.logits.part_check import FACTOR, PartCheck
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import image_sequences

AROUND = {"patch embedding", "pooled patches", "norm before the projection", "soft tokens"}
FAMILIES = [("maxtext", "26b-a4b"), ("gemma-jax", "26b-a4b"), ("gemma-jax", "31b")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(pixels).save(path)
    return path


def of_tower(report, tower="vision"):
    return [one for one in report.local.parts if one.tower == tower]


@pytest.mark.each(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "family"), FAMILIES)
def test_a_right_tower_is_within_its_rounding(tiny, converted, picture, layout, family, dtype):
    """A tower is float32 whatever the language model is."""
    source = tiny(family, layers=SHALLOW[family])
    native = converted(source, layout)
    report = logit_check(source, native, tokens=3, images=[picture], dtype=dtype)
    *parts, embedded = of_tower(report)
    vision = read_architecture(source).vision
    assert embedded.name == "vision, the embedded soft tokens" and embedded.times < FACTOR / 2
    assert report.passed and max(one.times for one in parts) < FACTOR / 2
    assert all(2.0**-24 <= one.noise < 1e-6 for one in parts)
    beside = [one.part for one in parts if one.layer is None]
    assert beside[0] == "patch embedding" and beside[-1] == "soft tokens"
    assert set(beside) == AROUND | {"standardized patches"} and vision.standardize
    layers = [{one.part for one in parts if one.layer == n} for n in range(vision.layers)]
    assert layers == [COMMON] * vision.layers
    assert list(report.local.parts[: len(parts)]) == parts


@pytest.mark.large
def test_what_is_rounded_has_the_rounding_of_what_it_is_rounded_to(
    tiny, converted, picture, tmp_path
):
    source = tiny("31b", layers=6, dtype="float32")
    native = converted(source, "gemma-jax", dtype="bfloat16")
    report = logit_check(source, native, tokens=3, images=[picture])
    assert report.local.passed and 1e-5 < max(one.error for one in of_tower(report)) < 0.1


def test_padding_counts_as_nothing(tiny, converted, picture):
    """What stands in padding patches differs between the sides, and nothing of it is compared."""
    source = tiny("31b", layers=6)
    (image,) = image_sequences(source, read_architecture(source), [picture])
    watched = LayerwiseReference(source, [image]).tower(image, "float32")
    steps = list(watched.steps())
    patches, pooled = len(image.positions), int(image.places.sum())
    assert [step.layer for step in steps] == [None, 0, 1, 2, None]
    for step in steps[:-1]:
        assert len(step.real) == patches and step.real.sum() == (image.positions[:, 0] >= 0).sum()
        assert all(values.shape[0] == patches for values in step.parts.values())
    assert not steps[0].real.all()
    assert len(steps[-1].real) == patches // 9 and steps[-1].real.sum() == pooled
    assert watched.soft_errors.tolist() == [0.0] * pooled, "no errors, no noise"


def test_each_step_leads_to_the_next(tiny, picture):
    """Noise has the size of the errors that the steps are told."""
    source = tiny("31b", layers=6)
    (image,) = image_sequences(source, read_architecture(source), [picture])
    watched = LayerwiseReference(source, [image]).tower(image, "float32")
    before = None
    for step in watched.steps():
        if step.layer is not None:
            expected = before.parts["output" if step.layer else "patch embedding"]
            assert np.array_equal(step.state, expected)
        if step.parts.keys() & {"soft tokens"}:
            step.errors["soft tokens"] = np.full(len(step.real), 1e-3)
        before = step
    assert watched.soft_errors == pytest.approx(1e-3, rel=0.5)


def test_names_tell_the_tower():
    assert PartCheck("keys", 3, 0.0, 1.0, tower="vision").name == "vision layer 3, keys"
    assert PartCheck("soft tokens", None, 0.0, 1.0, tower="audio").name == "audio, the soft tokens"
    assert PartCheck("keys", 3, 0.0, 1.0).name == "layer 3, keys"


BLOCK = "transformer/stacked_layers/block"


def of_layer(number, edit):
    """An edit of one layer of a stack."""

    def altered(stack):
        stack[number] = edit(stack[number])
        return stack

    return altered


MISTAKES = {
    "the patch embedding": ("entry/input_projection/w", lambda v: v[::-1], None),
    "the standardized patches": ("standardize/bias", lambda v: v + 1, None),
    "layer 2, dense MLP": (
        f"{BLOCK}/mlp/linear/w",
        of_layer(2, lambda v: v * 2),
        "it is 2 times what it should be",
    ),
    "layer 0, output projection": (
        f"{BLOCK}/attn/attn_vec_einsum/w",
        of_layer(0, lambda v: v * np.nan),
        "values are not finite",
    ),
}


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_where_it_is(tiny, converted, picture, tmp_path, name):
    source, (path, edit, words) = tiny("31b", layers=6), MISTAKES[name]
    shutil.copytree(converted(source, "gemma-jax"), tmp_path / "out")
    alter(tmp_path / "out", f"vision_encoder/{path}", edit)
    report = logit_check(source, tmp_path / "out", tokens=3, images=[picture])
    (failed,) = report.local.failed
    assert failed.name in (f"vision {name}", f"vision, {name}") and not report.passed
    assert words is None or words in failed.mistake
    assert report.noise_floor is None and report.limit == 1e-5


@pytest.fixture(scope="module")
def amplifying(tiny, tmp_path_factory):
    """A model whose sharp attention, in the tower and behind it, makes much of little."""
    folder = tmp_path_factory.mktemp("sharp") / "amplifying"
    shutil.copytree(tiny("31b", layers=6), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name] = tensors[name] * 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_tower_that_amplifies_rounding(amplifying, converted, picture, shifted, monkeypatch):
    """Its noise raises the limit, and soft tokens in each other's places fail by themselves."""
    if shifted:
        roll = lambda encoder: np.roll(encoded(encoder), 1, 0)  # noqa: E731
        monkeypatch.setattr(jax_model, "encoded", roll)
    native = converted(amplifying, "gemma-jax")
    report = logit_check(amplifying, native, tokens=3, images=[picture])
    assert report.passed != shifted
    failed = [one.name for one in report.local.failed]
    assert failed == (["vision, the embedded soft tokens"] if shifted else [])
    if not shifted:
        assert report.divergence.kl_max > 1e-5
        assert report.limit == SINGLE_NOISE_FACTOR * report.noise_floor
