"""The shell scripts on tiny checkpoints; they exit with logit-check's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_convert import inspect

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


@pytest.fixture
def checked_by(tmp_path) -> Callable[[int], dict[str, str]]:
    """checked_by(code): variables by which a stand-in for logit-check writes down its arguments."""

    def stand_in(code: int) -> dict[str, str]:
        command = tmp_path / "gemma-convert"
        command.write_text(
            "#!/usr/bin/env bash\n"
            f'[ "$1" = logit-check ] || exec {sys.executable} -m gemma_convert "$@"\n'
            f'echo "$@" >> {tmp_path}/checks\n'
            f"exit {code}\n"
        )
        command.chmod(0o755)
        return {"GEMMA_CONVERT": str(command)}

    return stand_in


def checks(folder: Path) -> list[str]:
    return (folder / "checks").read_text().splitlines()


@pytest.mark.large
def test_convert_and_check(shallow, tmp_path):
    done = run("convert_31b.sh", shallow("31b"), tmp_path / "out", "fast-llm")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fast-llm"]
    assert done.stdout.count("same model") == 1


@pytest.mark.share(2, 1)
@pytest.mark.parametrize(
    ("family", "forms"), [("e2b", ["unscanned"]), ("26b-a4b", ["unscanned", "scanned"])]
)
def test_every_form_is_converted_and_checked(shallow, checked_by, tmp_path, family, forms):
    source, out = shallow(family), tmp_path / "out"
    done = run(f"convert_{family.replace('-', '_')}.sh", source, out, **checked_by(0))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == set(forms)
    assert all(inspect(out / form).scanned == (form == "scanned") for form in forms)
    assert checks(tmp_path) == [f"logit-check {source} {out / form} --tokens 16" for form in forms]


@pytest.mark.large
def test_other_layouts(shallow, checked_by, tmp_path):
    source, out = shallow("e2b"), tmp_path / "out"
    done = run("convert_e2b.sh", source, out, "gemma-jax", **checked_by(0))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["gemma-jax"]
    assert inspect(out / "gemma-jax").layout == "gemma-jax"
    assert checks(tmp_path) == [f"logit-check {source} {out / 'gemma-jax'} --tokens 16"]


def test_layout_without_a_place_for_the_model(shallow, tmp_path):
    done = run("convert_e4b.sh", shallow("e4b"), tmp_path / "out", "fast-llm")
    assert done.returncode == 2
    assert "Fast-LLM has no per-layer embeddings" in done.stderr
    assert not (tmp_path / "out").exists()


def test_exit_code_is_that_of_logit_check(shallow, checked_by, tmp_path):
    """And a form that fails is the last one."""
    options = "--tokens 16 --max-kl 0"
    done = run(
        "convert_31b.sh", shallow("31b"), tmp_path / "a", CHECK_OPTIONS=options, **checked_by(1)
    )
    assert done.returncode == 1
    assert len(checks(tmp_path)) == 1
    assert checks(tmp_path)[0].endswith(options)


def test_wrong_model_and_usage(shallow, tmp_path):
    done = run("convert_e2b.sh", shallow("31b"), tmp_path / "out")
    assert done.returncode == 3
    assert "is 31b, not e2b" in done.stderr
    assert run("convert_and_check.sh").returncode == 2
    assert run("convert_and_check.sh", "27b", "x", "y").returncode == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["--no-ocdbt", "--ocdbt"])
def test_phases_of_a_conversion(shallow, tmp_path, form):
    """Every byte is read once and written once, both ways; no phase is left without a clock."""
    source = shallow("31b")
    report = inspect(source)
    names = ("read", "values", "checksum", "write")

    def phases(*command: object) -> dict[str, dict[str, float]]:
        out = tmp_path / "phases.json"
        script = [sys.executable, str(SCRIPTS / "benchmark_phases.py"), str(out)]
        subprocess.run([*script, *map(str, command)], check=True, capture_output=True)
        found = json.loads(out.read_text())
        assert all(clock["seconds"] < found["total"] * 4 for clock in found["phases"].values())
        return found["phases"]

    there = phases("to-native", source, tmp_path / "native", "--format", "maxtext", form)
    back = phases("to-hf", tmp_path / "native", tmp_path / "back")
    assert there["read"]["nbytes"] == back["write"]["nbytes"] == report.bytes
    scalars = there["write"]["nbytes"] - back["read"]["nbytes"]
    assert scalars in {0, 4}, "tensorstore reads the arrays that have no axes"
    assert there["write"]["nbytes"] > report.bytes
    for found in (there, back):
        assert all(found[name]["seconds"] > 0 for name in (*names, "start", "plan", "sync"))
