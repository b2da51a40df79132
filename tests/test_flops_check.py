"""What logit-check says of its own arithmetic."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import models
import numpy as np
import pytest

from gemma_convert import logit_check, save_golden
from gemma_convert.flops.count import count
from gemma_convert.flops.source import read_model
from gemma_convert.flops.workload import prefill
from gemma_convert.logits.achieved import forward_flops
from gemma_convert.logits.report_table import render
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import ImageSequence
from gemma_convert.prompts.sounds import SoundSequence
from gemma_convert.prompts.text import TokenSequence


def places(length: int, soft: int) -> np.ndarray:
    return np.array([0] * (length - soft) + [1] * soft)


@pytest.mark.parametrize("name", [models.E2B, models.DENSE])
def test_every_sequence_counts_with_what_it_sees_and_hears(name):
    model, architecture = read_model(models.FOLDER / name), models.load_architecture(name)
    text = [TokenSequence("one", (5,) * 30), TokenSequence("two", (5,) * 1100)]
    expected = [count(model, prefill(1, 30)).total, count(model, prefill(1, 1100)).total]
    assert forward_flops(architecture, text) == sum(expected)
    image = ImageSequence(
        "image",
        (5,) * 50,
        places=places(50, 12),
        pixels=np.zeros((999, 3), np.float32),
        positions=np.zeros((999, 2), np.int64),
    )
    seen = replace(prefill(1, 50), images=1, image_tokens=12, logits=38)
    seen = replace(seen, bidirectional_images=name == models.DENSE)
    assert forward_flops(architecture, [*text, image]) == sum(expected) + count(model, seen).total


def test_a_sound_counts_by_its_soft_tokens():
    model, architecture = (
        read_model(models.FOLDER / models.E2B),
        models.load_architecture(models.E2B),
    )
    sound = SoundSequence(
        "sound", (5,) * 50, places=places(50, 12), features=np.zeros((46, 128), np.float32)
    )
    heard = replace(prefill(1, 50), sounds=1, sound_tokens=12, logits=38)
    assert forward_flops(architecture, [sound]) == count(model, heard).total


def test_the_check_reports_what_it_achieved(tiny, converted, tmp_path):
    from rich.console import Console

    source = tiny("31b")
    native = converted(source, "fast-llm")
    length = read_architecture(source).text.window + 3
    report = logit_check(source, native, tokens=length)
    assert (report.sequences, report.longest_sequence) == (1, length)
    forward = count(read_model(source), prefill(1, length)).total
    assert report.flops == 2 * forward
    assert 0 < report.running_seconds <= report.seconds
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert found["flops"] == 2 * forward
    assert found["tflops_per_second"] == report.flops / report.running_seconds / 10**12
    console = Console(file=io.StringIO(), width=200)
    console.print(render(report))
    assert " s, reading weights included: " in console.file.getvalue()
    assert "TFLOP/s" in console.file.getvalue()
    save_golden(source, tmp_path / "golden.safetensors", tokens=length)
    stored = logit_check(source, native, golden=tmp_path / "golden.safetensors")
    assert stored.flops == forward
    assert replace(report, running_seconds=0.0).flops_per_second == 0.0
