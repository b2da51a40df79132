"""A mistake in a tower's weights: `logit-check` names the part of the tower, and no other one.

An ordinary run plants all of a tower's at once, as each part is run on the original's states.
"""

from __future__ import annotations

import shutil
import wave

import numpy as np
import pytest
from cases import SHALLOW
from PIL import Image
from trees import read_safetensors
from weights import bounds, vision

from gemma_convert import logit_check, to_native
from gemma_convert.stores.safetensors.header import write_safetensors

FAILING = {
    "vision: K and V exchanged": ["vision layer 1, keys", "vision layer 1, values"],
    "vision: (head_dim heads) for (heads head_dim)": ["vision layer 1, queries"],
    "vision: gate and up exchanged": ["vision layer 1, dense MLP"],
    "vision: x and y of positions exchanged": ["vision, the patch embedding"],
    "vision: standardization lost": ["vision, the standardized patches"],
    "vision: one clip bound lost": ["vision layer 1, dense MLP"],
    "vision: lower bound for upper": ["vision layer 1, output projection"],
    "audio: one clip bound lost": ["audio layer 1, first feed-forward"],
    "audio: the two feed-forwards exchanged": [
        "audio layer 1, first feed-forward",
        "audio layer 1, second feed-forward",
    ],
}
PLANTED = dict([*vision(7), *bounds()])
TOGETHER = [
    ("maxtext", "26b-a4b", [name for name, _ in vision(7)]),
    ("gemma-jax", "26b-a4b", [name for name, _ in vision(7)]),
    ("gemma-jax", "e2b", [name for name, _ in bounds()]),
]
ALONE = [(layout, family, [name]) for layout, family, names in TOGETHER for name in names]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """The arguments with an image and with a sound."""
    folder, random = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    noise = np.random.default_rng(1).integers(-9000, 9000, 16000)  # so loud that bounds are reached
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
        file.writeframes(noise.astype("<i2").tobytes())
    return {"vision": {"images": [folder / "a.png"]}, "audio": {"audio": [folder / "a.wav"]}}


@pytest.mark.parametrize(
    ("layout", "family", "mistakes"),
    [*TOGETHER, *(pytest.param(*case, marks=pytest.mark.large) for case in ALONE)],
)
def test_its_part_fails_by_itself(tiny, media, tmp_path, layout, family, mistakes):
    source, planted = tiny(family, layers=SHALLOW[family]), tmp_path / "planted"
    shutil.copytree(source, planted, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = read_safetensors(source)
    for mistake in mistakes:
        PLANTED[mistake](tensors)
    write_safetensors(planted / "model.safetensors", tensors)
    to_native(planted, tmp_path / "out", layout=layout)
    towers = {mistake.partition(":")[0] for mistake in mistakes}
    seen_or_heard = {key: files for tower in towers for key, files in media[tower].items()}
    report = logit_check(source, tmp_path / "out", tokens=3, **seen_or_heard)
    assert not report.passed
    expected = {part for mistake in mistakes for part in FAILING[mistake]}
    assert {one.name for one in report.local.failed} == expected
