"""What a count sums up to: blocks, recomputation, and numbers for people."""

from __future__ import annotations

from dataclasses import replace

import models
import pytest

from gemma_convert.flops.attention import Reach
from gemma_convert.flops.count import count
from gemma_convert.flops.hardware import Utilization
from gemma_convert.flops.memory import memory
from gemma_convert.flops.model import DecoderLayer, Dense, Experts, GroupedQuery, Model
from gemma_convert.flops.report import FlopsReport, human_flops
from gemma_convert.flops.source import read_model
from gemma_convert.flops.workload import prefill, train


def model_of(mixer: GroupedQuery, *feed_forward: Dense | Experts) -> Model:
    return Model("", 11, 7, (DecoderLayer(mixer, feed_forward),))


ATTENTION = GroupedQuery(6, 3, 5, Reach())


def test_a_layer_without_keys_of_its_own_has_no_values_either():
    shared = count(model_of(replace(ATTENTION, owns_k=False), Dense(13)), prefill(2, 9))
    names = [name for _, name in shared.components]
    assert "k projection" not in names and "v projection" not in names
    as_values = count(model_of(replace(ATTENTION, owns_v=False), Dense(13)), prefill(2, 9))
    assert as_values.components["text", "k projection"] == 2 * 2 * 9 * 7 * 15
    assert ("text", "v projection") not in as_values.components


def test_the_ratio_is_of_blocks_of_the_text_layers():
    experts = Experts(17, 4, 19, shared=23, shared_gate=True)
    found = count(model_of(ATTENTION, Dense(13), experts), prefill(2, 9))
    rows = 2 * 2 * 9 * 7
    feed_forward = rows * (3 * 13 + 17 + 4 * 3 * 19 + 3 * 23 + 1)
    attention = rows * (30 + 15 + 15 + 30) + 2 * 4 * 45 * 30
    assert found.block("feed-forward") == feed_forward
    assert found.block("attention") == attention
    assert FlopsReport("", found, memory(found)).attention_to_ffn == attention / feed_forward


def test_towers_are_not_in_the_ratio():
    model, step = read_model(models.FOLDER / models.E2B), prefill(1, 99)
    seen = replace(step, images=1, image_tokens=70, sounds=1, sound_tokens=20)
    counts = [count(model, work) for work in (step, seen)]
    ratios = [FlopsReport("", one, memory(one)).attention_to_ffn for one in counts]
    assert ratios[0] == ratios[1]


def test_layers_without_a_backward_pass_are_not_run_again():
    model = read_model(models.FOLDER / models.E2B)
    seeing = replace(train(1, 99), images=1, image_tokens=70, recomputation="full")
    frozen = replace(seeing, frozen=frozenset({"vision"}))
    text = count(model, replace(train(1, 99), recomputation="full"))
    assert count(model, frozen).hardware - count(model, frozen).total == text.hardware - text.total
    assert count(model, seeing).hardware - count(model, seeing).total > text.hardware - text.total


@pytest.mark.parametrize(
    ("flops", "shown"),
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (1000, "1.00 kFLOP"),
        (1_049_600, "1.05 MFLOP"),
        (10**15, "1.00 PFLOP"),
        (12_345 * 10**18, "12,345.00 EFLOP"),
    ],
)
def test_units(flops, shown):
    assert human_flops(flops) == shown


@pytest.mark.parametrize(("flops", "warned"), [(10**12, False), (10**12 + 1, True)])
def test_more_than_the_peak_is_warned_of(flops, warned):
    found = count(model_of(ATTENTION, Dense(13)), prefill(2, 9))
    used = Utilization(1.0, 1, flops, flops, peak=1e12)
    report = FlopsReport("", found, memory(found), utilization=used)
    assert bool(report.warnings) == warned
