"""The shell scripts on tiny checkpoints; they exit with logit-check's code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "GEMMA_CONVERT": f"{sys.executable} -m gemma_convert",
        "CHECK_OPTIONS": "--tokens 16",
    }
    return subprocess.run(
        [SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | variables,
    )


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_convert_and_check(tiny, tmp_path, family):
    name = f"convert_{family.replace('-', '_')}.sh"
    done = run(name, tiny(family), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    forms = {"unscanned"} if family in {"e2b", "e4b"} else {"unscanned", "scanned"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == forms
    assert done.stdout.count("same model") == len(forms)


@pytest.mark.parametrize(("family", "layout"), [("e2b", "gemma-jax"), ("31b", "fast-llm")])
def test_other_layouts(tiny, tmp_path, family, layout):
    done = run(f"convert_{family}.sh", tiny(family), tmp_path / "out", layout)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [layout]
    assert done.stdout.count("same model") == 1


def test_layout_without_a_place_for_the_model(tiny, tmp_path):
    done = run("convert_e4b.sh", tiny("e4b"), tmp_path / "out", "fast-llm")
    assert done.returncode == 2
    assert "Fast-LLM has no per-layer embeddings" in done.stderr
    assert not (tmp_path / "out").exists()


def test_exit_code_is_that_of_logit_check(tiny, tmp_path):
    options = "--tokens 16 --max-kl 0"
    assert run("convert_31b.sh", tiny("31b"), tmp_path / "a", CHECK_OPTIONS=options).returncode == 1


def test_wrong_model_and_usage(tiny, tmp_path):
    done = run("convert_e2b.sh", tiny("31b"), tmp_path / "out")
    assert done.returncode == 3
    assert "is 31b, not e2b" in done.stderr
    assert run("convert_and_check.sh").returncode == 2
    assert run("convert_and_check.sh", "12b", "x", "y").returncode == 2
    assert not (tmp_path / "out").exists()
