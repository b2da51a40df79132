"""scripts/conformance.sh: what it measured is on the page, and what it says of itself is so.

The frameworks are installed by that script and take gigabytes; where they stand, name their folder
in GEMMA_CONVERT_FRAMEWORKS and one model is tried with them here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "scripts" / "conformance"
sys.path.insert(0, str(HERE))

from case import Row  # noqa: E402
from frameworks import ALL, FRAMEWORKS  # noqa: E402
from judge import merged  # noqa: E402
from page import page  # noqa: E402
from reference import worst_kl, worst_log  # noqa: E402
from tensors import different, furthest  # noqa: E402

INSTALLED = os.environ.get("GEMMA_CONVERT_FRAMEWORKS")


def records() -> list[dict]:
    return json.loads((ROOT / "docs" / "conformance.json").read_text(encoding="utf-8"))["records"]


def test_the_page_is_what_was_measured():
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert text == page(records()), "run scripts/conformance.sh"


def test_all_that_was_measured_passed_and_what_was_not_is_said():
    failed = [
        (one["framework"], one["model"], row["check"])
        for one in records()
        for row in one["rows"]
        if not row["passed"]
    ]
    assert not failed
    measured = {(one["framework"], one["model"], one["scanned"]) for one in records()}
    known = {
        (framework.name, model, scanned)
        for framework in FRAMEWORKS.values()
        for model, forms in framework.models.items()
        for scanned in forms
    }
    assert measured <= known
    assert ("Not measured yet" in page(records())) == (measured < known)


def test_a_figure_passes_within_its_limit_alone():
    assert Row("kl", 1e-6, 1e-5).passed
    assert not Row("kl", 2e-5, 1e-5).passed
    assert not Row("kl", float("nan"), 1e-5).passed
    assert not Row("kl", None, 1e-5).passed
    assert Row("moved", 0.1, 1e-3, least=True).passed
    assert not Row("moved", 0.0, 1e-3, least=True).passed
    assert Row("only told", 4.0, None).passed
    assert not Row("only told", None, None).passed


def test_a_deviation_ends_with_the_release_that_mends_it():
    gemma = FRAMEWORKS["gemma"]
    assert gemma.deviation("26b-a4b", "4.0.1") == "router normalised twice"
    assert gemma.deviation("26b-a4b", "4.1.0") is None
    assert gemma.deviation("26b-a4b", "4.10") is None
    assert gemma.deviation("31b", "4.0.1") is None
    assert replace(gemma, mended={}).deviation("26b-a4b", "4.1.0")


def test_worst_kl_is_of_the_worst_token():
    same = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    other = np.log(np.array([[0.5, 0.5], [0.5, 0.5]])) + 7
    assert worst_kl(same, same) == 0
    assert worst_kl(same, other) == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))


def test_the_largest_difference_of_a_log_probability():
    same = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    other = np.log(np.array([[0.5, 0.5], [0.5, 0.5]])) + 7
    assert worst_log(same, same) == 0
    assert worst_log(same, other) == pytest.approx(np.log(5))


def test_arrays_are_counted_and_measured_one_by_one():
    ours = {"a": np.array([1.0, -4.0]), "b": np.array([100.0])}
    assert different(ours, ours) == 0
    assert different(ours | {"c": ours["b"]}, ours) == 1
    assert different(ours, ours | {"b": ours["b"].astype(np.float32)}) == 1
    assert furthest(ours | {"a": np.array([1.0, -3.0])}, ours) == 0.25
    with pytest.raises(ValueError, match="no arrays"):
        different({}, ours)


def test_a_newer_record_takes_the_place_of_the_older():
    def record(framework: str, model: str, date: str) -> dict:
        return {"framework": framework, "model": model, "scanned": False, "date": date}

    older = [record("gemma", "e2b", "1"), record("maxtext", "31b", "1")]
    newer = [record("maxtext", "31b", "2"), record("maxtext", "e2b", "2")]
    assert merged(older, newer) == [newer[1], newer[0], older[0]]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_has_its_script_and_models_that_are_known(name):
    framework = FRAMEWORKS[name]
    assert (HERE / f"{name.replace('-', '_')}.py").is_file()
    assert set(framework.models) <= set(ALL) and set(framework.adapters) <= set(framework.models)
    assert bool(framework.adapters) == bool(framework.tuned)


@pytest.mark.parametrize("name", [*FRAMEWORKS, "peft"])
def test_what_is_installed_stands_in_two_lists(name):
    pinned = (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    commit = r"[\w.-]+ @ git\+https://github\.com/[\w/-]+@[0-9a-f]{40}  # built"
    assert all(re.fullmatch(rf"[\w.-]+==[\w.]+|{commit}", line) for line in pinned)
    asked = [
        re.split(r"[\[ ]", line)[0].replace("_", "-").lower()
        for line in (HERE / f"{name}.in").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert set(asked) <= {re.split("==| @", line)[0].replace("_", "-").lower() for line in pinned}
    assert (FRAMEWORKS[name].package if name in FRAMEWORKS else name) in asked


def test_wrong_use_installs_nothing(tmp_path):
    for words in (["keras"], ["peft"], ["--fast"], ["--environments"]):
        command = [ROOT / "scripts" / "conformance.sh", "--environments", tmp_path / "e", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in {1, 2}, words
        assert done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not INSTALLED, reason="GEMMA_CONVERT_FRAMEWORKS names no installed frameworks")
def test_the_smallest_run(tmp_path):
    command = [sys.executable, HERE / "judge.py", "--environments", INSTALLED]
    command += ["--models", "31b", "--out", tmp_path, "gemma"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    [found] = json.loads((tmp_path / "conformance.json").read_text(encoding="utf-8"))["records"]
    assert [row["check"] for row in found["rows"]]
    assert (tmp_path / "conformance.md").is_file()
