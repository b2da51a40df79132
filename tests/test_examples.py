"""Files that others copy: the example of a CI job, our own workflow, the citation."""

from __future__ import annotations

import re

import pytest
import yaml
from documents import ROOT, command
from test_docs import OPTIONS

from gemma_convert.version import __version__

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yml"))
WORKFLOWS = [*EXAMPLES, *sorted((ROOT / ".github" / "workflows").glob("*.yml"))]


OF_OTHERS = (
    "pip install 'gemma-convert[check]'",
    'cat build/report/conformance.md >> "$GITHUB_STEP_SUMMARY"',
)


def run_lines(document: dict) -> list[str]:
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda one: one.name)
def test_workflows_are_whole(file):
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert {"name", "jobs", True} <= document.keys()  # YAML reads the key `on` as true
    assert run_lines(document)
    for job in document["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda one: one.name)
def test_run_lines_are_real_commands(file):
    ours = 0
    for line in run_lines(yaml.safe_load(file.read_text(encoding="utf-8"))):
        program, *words = command(line).words
        if program == "gemma-convert":
            given = {word for word in words if word.startswith("--")}
            assert given <= OPTIONS[words[0]], line
            ours += 1
        elif program.startswith("scripts/"):
            assert (ROOT / program).is_file(), line
        else:
            assert line in OF_OTHERS
    assert ours > 3 or file not in EXAMPLES


def test_our_workflow_tests_every_python_that_is_supported():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    matrix = yaml.safe_load(text)["jobs"]["test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", project)
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == __version__
    assert cited["license"] == "Apache-2.0"
    assert cited["authors"] == [{"name": "The gemma-convert authors"}]
