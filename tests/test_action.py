"""The GitHub Action and the container: their own steps, run in empty folders without a daemon."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from documents import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
EXPRESSION = re.compile(r"\$\{\{ ([\w.-]+) \}\}")

OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "false",  # pip reads it the other way round
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("site-packages")),
}
"""A fresh environment finds what this one has, so that nothing comes over the network."""


def inputs(**given: str) -> dict[str, str]:
    """`inputs.NAME` and what else the steps ask for, as GitHub would put it in."""
    values = {name: str(one.get("default", "")) for name, one in ACTION["inputs"].items()}
    values |= {name.replace("_", "-"): value for name, value in given.items()}
    found = {f"inputs.{name}": value for name, value in values.items()}
    return found | {"steps.python.outputs.python-path": sys.executable}


def run(step: str, folder: Path, known: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One step, by the shell and with the variables that a runner gives it."""
    variables = {
        name: EXPRESSION.sub(lambda found: known[found[1]], value)
        for name, value in STEPS[step]["env"].items()
    }
    ours = {
        "RUNNER_TEMP": str(folder / "temp"),
        "GITHUB_ACTION_PATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }
    (folder / "temp").mkdir(exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    script = folder / "step.sh"
    script.write_text(STEPS[step]["run"])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
        cwd=folder / "work",
        env=os.environ | ours | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def installed(tmp_path) -> Path:
    """The folder of a job in which the package stands where the first step puts it."""
    program = tmp_path / "temp" / "gemma-convert" / "bin" / "gemma-convert"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gemma_convert "$@"\n')
    program.chmod(0o755)
    return tmp_path


def test_nothing_that_is_given_is_part_of_a_command():
    for step in STEPS.values():
        assert "${{" not in step.get("run", "")
        assert ("run" in step) == (step.get("shell") == "bash") == ("uses" not in step)
    used = set(EXPRESSION.findall(json.dumps(ACTION)))
    assert used == {f"inputs.{name}" for name in ACTION["inputs"]} | {
        "steps.python.outputs.python-path"
    }


def test_it_converts_and_verifies(installed, shallow):
    known = inputs(
        source=str(shallow("26b-a4b", scanned=True)),
        options="--scan-layers\n\n--dtype=float32\n",
        logit_check="false",
    )
    done = run("Convert and check", installed, known)
    assert done.returncode == 0, done.stderr
    reports = installed / "work" / "gemma-convert-reports"
    assert {file.name for file in reports.iterdir()} == {"to-native.json", "verify.json"}
    assert json.loads((reports / "to-native.json").read_text())["scanned"]
    assert json.loads((reports / "verify.json").read_text())["passed"]
    assert (installed / "work" / "converted" / "0").is_dir()
    assert "every value" in (installed / "summary.md").read_text()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"source": "$(touch pwned)`touch pwned`;touch pwned"}, 3),
        ({"source": "--help"}, 3),
        ({"format": "maxtext; touch pwned"}, 2),
        ({"options": "$(touch pwned)\n--dry-run; touch pwned"}, 2),
        ({"target": "--overwrite\n$(touch pwned)"}, 0),
        ({"reports": "-p $(touch pwned)"}, 0),
        ({"format": "fast-llm"}, 2),
    ],
)
def test_hostile_inputs_are_names_and_nothing_else(installed, shallow, given, code):
    known = inputs(**{"source": str(shallow("e2b")), "logit_check": "false"} | given)
    done = run("Convert and check", installed, known)
    assert done.returncode == code, done.stderr
    assert not list(installed.rglob("pwned"))


def test_a_failed_check_fails_the_step(installed, shallow):
    """And what it said is in the summary all the same."""
    program = installed / "temp" / "gemma-convert" / "bin" / "gemma-convert"
    text = program.read_text().replace("exec", '[ "$1" = logit-check ] && echo no && exit 1\nexec')
    program.write_text(text)
    done = run("Convert and check", installed, inputs(source=str(shallow("31b"))))
    assert done.returncode == 1
    reports = installed / "work" / "gemma-convert-reports"
    assert (reports / "logit-check.txt").read_text() == "no\n"
    assert "    no\n" in (installed / "summary.md").read_text()


@pytest.mark.large
def test_all_of_it_in_a_fresh_environment(tmp_path, shallow, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    known = inputs(source=str(shallow("31b")), check_options="--tokens=16")
    for step in ("Install gemma-convert", "Convert and check"):
        done = run(step, tmp_path, known)
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "temp/gemma-convert/lib").rglob("site-packages/gemma_convert/mappings"))
    reports = tmp_path / "work" / "gemma-convert-reports"
    names = {"to-native.json", "verify.json", "logit-check.txt", "report.html", "report.xml"}
    assert {file.name for file in reports.iterdir()} == names
    assert "same model" in (tmp_path / "summary.md").read_text()


def instructions() -> Iterator[tuple[str, list[str]]]:
    """The instructions of the container file, and their words."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].split()


def test_the_container_takes_what_its_ignore_file_lets_through():
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {
        word
        for name, words in instructions()
        if name == "COPY" and not words[0].startswith("--from")
        for word in words[:-1]
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.large
def test_the_steps_of_the_container(tmp_path, shallow):
    """COPY, RUN and ENTRYPOINT, with their absolute paths below an empty folder."""
    root, place, variables = tmp_path / "root", Path("/"), dict(os.environ | OFFLINE)
    program: list[str] = []

    def inside(word: str) -> str:
        return re.sub(r"^(['\"]?)/", rf"\1{root}/", word)

    for name, words in instructions():
        if name == "FROM":
            assert re.fullmatch(r"python:3\.1[123]-slim", words[0])
        elif name == "ARG":
            key, _, value = words[0].partition("=")
            variables[key] = value
        elif name == "ENV":
            variables |= {key: inside(value) for key, value in (one.split("=") for one in words)}
        elif name == "WORKDIR":
            place = Path(inside(words[0]))
            place.mkdir(parents=True)
        elif name == "COPY" and words[0].startswith("--from"):
            assert Path(inside(words[1])).is_dir()
            assert words[1] == words[2]  # an environment cannot be moved
        elif name == "COPY":
            for word in words[:-1]:
                _copy(ROOT / word, place / words[-1] / ("" if words[-1] != "./" else word))
        elif name == "RUN":
            line = " ".join(map(inside, words))
            line = re.sub(r"^python ", f"{sys.executable} ", line)
            subprocess.run(["bash", "-ec", line], cwd=place, env=variables, check=True)
        elif name == "ENTRYPOINT":
            program = [inside(word) for word in json.loads(" ".join(words))]
    shutil.copytree(shallow("31b"), place / "hf")
    for arguments in (
        ["to-native", "hf", "out", "--format", "fast-llm"],
        ["verify", "out", "--against", "hf"],
        ["logit-check", "hf", "out", "--tokens", "16"],
        ["to-hf", "out", "back"],
    ):
        subprocess.run([*program, *arguments], cwd=place, env=variables, check=True)
    assert (root / "cache").stat().st_mode & 0o7777 == 0o1777  # whoever `docker run -u` says


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
