"""The verification cards: every model and layout has one, and its figures meet the limits."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from datetime import date
from functools import cache

import pytest
from documents import ROOT, command

from gemma_convert import UsageError

sys.path.insert(0, str(ROOT / "scripts"))

from cards import (
    CARDS,
    FORMS,
    LIBRARIES,
    LIMITS,
    PAGE,
    SCHEMA,
    TESTS,
    card_names,
    families,
    published_counts,
    published_plan,
)
from cards_page import page
from commands_page import commands

TOWERS = {
    ("maxtext", "26b-a4b"): {"image"},
    ("maxtext", "31b"): {"image"},
    ("gemma-jax", "e2b"): {"image", "sound"},
    ("gemma-jax", "e4b"): {"image", "sound"},
    ("gemma-jax", "26b-a4b"): {"image"},
    ("gemma-jax", "31b"): {"image"},
}
"""What a layout sees and hears of a model; the others see text alone."""


@cache
def cards() -> dict:
    return json.loads(CARDS.read_text(encoding="utf-8"))


def card(name: str) -> dict:
    (found,) = (one for one in cards()["cards"] if one["name"] == name)
    return found


def test_every_model_and_layout_has_one():
    assert cards()["schema"] == SCHEMA
    assert [one["name"] for one in cards()["cards"]] == card_names()
    assert len(card_names()) == len(families()) * len(FORMS) >= 16
    assert set(cards()["versions"]) == set(LIBRARIES)


def test_the_page_is_made_from_them():
    assert PAGE.read_text(encoding="utf-8") == page(cards()), "run scripts/cards.py --page"


@pytest.mark.parametrize("name", card_names())
def test_published_counts_are_those_of_the_plan(name):
    found = card(name)
    family, layout, scanned = found["family"], found["layout"], found["scanned"]
    if found["refused"] is not None:
        with pytest.raises(UsageError) as refusal:
            published_plan(family, layout, scanned)
        assert refusal.value.what.rstrip(".") == found["refused"]
        return
    plan = published_plan(family, layout, scanned)
    assert found["published"] == asdict(published_counts(family, plan))


@pytest.mark.parametrize("name", card_names())
def test_figures_meet_the_limits(name):
    found = card(name)
    assert date.fromisoformat(found["date"]) >= date(2026, 11, 21)
    if found["refused"] is not None:
        assert found["published"] is found["tiny"] is found["framework"] is None
        return
    tiny = found["tiny"]
    assert tiny["arrays"] > 100 or found["scanned"]
    assert tiny["identical"] == tiny["files"] >= 8
    assert tiny["kl"].keys() == {"text"} | TOWERS.get((found["layout"], found["family"]), set())
    for sense, value in tiny["kl"].items():
        assert 0 < value <= LIMITS[sense] and math.isfinite(value)
    framework = found["framework"]
    if found["layout"] not in TESTS or found["family"] == "12b":
        assert framework is None  # none of them wrote one that is among those files
    else:
        assert framework["arrays"] > 20
        assert 0 < framework["kl"] <= LIMITS["framework"]
        assert 0 < framework["own_kl"] <= LIMITS["framework"]
        assert framework["test"] == TESTS[found["layout"]]


@pytest.mark.parametrize("name", card_names())
def test_commands_are_real(name):
    options = {one.name: one.options for one in commands()}
    for line in card(name)["commands"]:
        program, chosen, *words = command(line).words
        assert program == "gemma-convert"
        assert {word for word in words if word.startswith("--")} <= options[chosen]
        assert str(ROOT) not in line
    wanted = {"tiny", "to-native", "verify", "to-hf", "logit-check"}
    done = {command(line).words[1] for line in card(name)["commands"]}
    assert done == (set() if card(name)["refused"] else wanted)


@pytest.mark.parametrize("test", TESTS.values())
def test_the_tests_that_cards_name_exist(test):
    file, _, function = test.partition("::")
    assert f"def {function}(oracle" in (ROOT / file).read_text(encoding="utf-8")
