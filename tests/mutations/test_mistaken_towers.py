"""A mistake in a tower: the part that is wrong fails, no other does, and the mistake is named.

Mistakes in weights are planted many at once (`towers.py`). An ordinary run takes every ninth of
those checkpoints, one with the report of scripts/mutations.sh every fifth; and one mistaken forward
pass.
"""

from __future__ import annotations

import os
import re
import shutil
import wave
from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest
from cases import SHALLOW
from PIL import Image
from planting import planted
from record import REPORT
from towers import Planted, audio, batches, bounds, standardization, unknown, vision
from trees import read_safetensors

from gemma_convert import to_native
from gemma_convert.layouts.registry import open_model
from gemma_convert.logits import local
from gemma_convert.logits.layerwise import LayerwiseReference
from gemma_convert.logits.towers import check_each_part
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import image_sequences
from gemma_convert.prompts.sounds import sound_sequences
from gemma_convert.stores.safetensors.header import write_safetensors

PLAIN = batches([*unknown(), *vision(), *standardization()])
CLIPPED = batches([*bounds(), *audio()])
CASES = [
    *[("maxtext", "26b-a4b", number, PLAIN) for number in range(len(PLAIN))],
    *[("gemma-jax", "26b-a4b", number, PLAIN) for number in range(len(PLAIN))],
    *[("gemma-jax", "e2b", number, CLIPPED) for number in range(len(CLIPPED))],
]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A picture, and a sound so loud that clip bounds are reached."""
    folder, random = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    noise = np.random.default_rng(1).integers(-9000, 9000, 16000)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
        file.writeframes(noise.astype("<i2").tobytes())
    return folder


@pytest.fixture(scope="module")
def references(tiny, media):
    """references(family): the original's side, with the picture and, where it hears, the sound."""

    @cache
    def make(family):
        source = tiny(family, layers=SHALLOW[family])
        facts = read_architecture(source)
        sequences = image_sequences(source, facts, [media / "a.png"])
        if facts.audio is not None:
            sequences += sound_sequences(source, facts, [media / "a.wav"])
        return source, facts, sequences, LayerwiseReference(source, sequences)

    return make


@pytest.fixture
def failing(references, monkeypatch):
    """failing(native, family): part → mistake of every part that fails, tried in every layer."""
    monkeypatch.setattr(local, "DIAGNOSED", 99)

    def check(native, family):
        _, facts, sequences, reference = references(family)
        towers = open_model(native, facts).towers
        found = check_each_part(reference, towers, sequences, "float32")
        return {one.name: one.mistake for one in found.parts if not one.passed}

    return check


def agree(said, expected):
    assert said.keys() == expected.keys()
    for part, words in expected.items():
        assert (said[part] is None) == (words is None), (part, said[part])
        assert words is None or re.search(words, said[part]), (part, said[part])


@pytest.mark.share(5 if os.environ.get(REPORT) else 9)
@pytest.mark.parametrize(
    ("layout", "family", "number", "mistakes"),
    CASES,
    ids=[f"{layout}-{family}-{number}" for layout, family, number, _ in CASES],
)
def test_mistakes_in_weights(references, failing, tmp_path, layout, family, number, mistakes):
    source, expected = references(family)[0], {}
    shutil.copytree(source, tmp_path / "in", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = read_safetensors(source)
    for one in mistakes[number]:
        one.plant(tensors)
        expected |= one.said
    write_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    to_native(tmp_path / "in", tmp_path / "out", layout=layout)
    agree(failing(tmp_path / "out", family), expected)


VISION_LAYERS, AUDIO_LAYERS = (0, 1, 2), (0, 1)
ARITHMETIC = {
    "audio: window, activation, half": (
        "e2b",
        [
            ("audio.attention", "np.arange(WINDOW)", "np.arange(WINDOW + 1)"),
            ("audio.distance_waves", "np.arange(WINDOW, ", "np.arange(WINDOW + 1, "),
            ("audio.feed_forward", " * _RESIDUAL_WEIGHT", ""),
            ("audio.light_convolution", "signal, gate =", "gate, signal ="),
        ],
        {
            "attention": "its window is one frame too long",
            "first feed-forward": "its half is lost",
            "second feed-forward": "its half is lost",
            "light convolution": "signal and gate are exchanged",
        },
        {},
    ),
    "audio: soft-cap, activations, bias": (
        "e2b",
        [
            ("audio.attention", "jnp.tanh(scores / _LOGIT_CAP) * _LOGIT_CAP", "scores"),
            ("audio.feed_forward", "jax.nn.silu(", "jax.nn.gelu("),
            ("audio.light_convolution", "jax.nn.silu(", "("),
            ("audio.soft_tokens", " + bias)", ")"),
            ("audio.subsample", "jax.nn.relu(", "("),
        ],
        {
            "attention": "the soft-cap is lost",
            "first feed-forward": "its activation is GELU",
            "second feed-forward": "its activation is GELU",
            "light convolution": "its activation is lost",
        },
        {
            "projected frames": "its bias is lost",
            "subsampled frames": "activations of both convolutions are lost",
        },
    ),
    "vision: base, pixels, order": (
        "26b-a4b",
        [
            ("vision.rotary", "np.float32(theta)", "np.float32(10000)"),
            ("vision._project_pixels", "2 * (pixels - 0.5)", "pixels"),
            ("vision._soft_tokens", "(pooled - bias) * scale", "pooled * scale - bias"),
        ],
        {"attention": "its rotary base is 10,000"},
        {
            "patch embedding": "pixels are not centred",
            "standardized patches": "its bias is subtracted behind the scale",
        },
    ),
    "vision: padding, root, norm": (
        "26b-a4b",
        [
            ("vision.attend", "jnp.where(real, ", "jnp.where(True, "),
            ("vision._soft_tokens", " * np.float32(hidden.shape[-1] ** 0.5)", ""),
        ],
        {"attention": "padding patches are seen"},
        {"pooled patches": "it is not multiplied by √embed"},
    ),
    "vision: turned the other way": (
        "26b-a4b",
        [
            (
                "vision.rotary",
                "first * cosine - second * sine, second * cosine + first * sine",
                "first * cosine + second * sine, second * cosine - first * sine",
            ),
        ],
        {"attention": "turns the other way"},
        {},
    ),
}


@pytest.mark.share(5)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_mistakes_in_arithmetic(references, converted, failing, name):
    family, places, in_layers, around = ARITHMETIC[name]
    native = converted(references(family)[0], "gemma-jax")
    tower = name.partition(":")[0]
    layers = AUDIO_LAYERS if tower == "audio" else VISION_LAYERS
    expected = {f"{tower} layer {n}, {part}": in_layers[part] for n in layers for part in in_layers}
    expected |= {f"{tower}, the {part}": words for part, words in around.items()}
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(planted(*place))
        agree(failing(native, family), expected)


def test_enough_is_planted():
    mistakes: list[Planted] = [one for batch in (*PLAIN, *CLIPPED) for one in batch]
    assert len({one.name for one in mistakes}) == len(mistakes) > 110
    assert sum(len(one.said) for one in mistakes) > 120
