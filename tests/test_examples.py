"""Files that others copy: the example of a CI job, our own workflows, the citation."""

from __future__ import annotations

import re

import pytest
import yaml
from documents import ROOT, blocks, command
from test_docs import OPTIONS

from gemma_convert.version import __version__

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yml"))
WORKFLOWS = [*EXAMPLES, *sorted((ROOT / ".github" / "workflows").glob("*.yml"))]


ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
OURS = ("./", "OWNER/gemma-convert@v1")
"""The action, as this repository's workflows and as others use it."""

OF_OTHERS = (
    "pip install .",
    'cat build/report/conformance.md >> "$GITHUB_STEP_SUMMARY"',
)


def run_lines(document: dict) -> list[str]:
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda one: one.name)
def test_workflows_are_whole(file):
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert {"name", "jobs", True} <= document.keys()  # YAML reads the key `on` as true
    for job in document["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            used = step.get("uses", "./")
            assert used in OURS or re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", used)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda one: one.name)
def test_run_lines_are_real_commands(file):
    for line in run_lines(yaml.safe_load(file.read_text(encoding="utf-8"))):
        program, *words = command(line).words
        if program == "gemma-convert":
            given = {word for word in words if word.startswith("--")}
            assert given <= OPTIONS[words[0]], line
        elif program.startswith("scripts/"):
            assert (ROOT / program).is_file(), line
        else:
            assert line in OF_OTHERS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda one: one.name)
def test_the_action_is_given_what_it_takes(file):
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    uses = [step for step in steps if step.get("uses") in OURS]
    for step in uses:
        assert "source" in step["with"]
        assert step["with"].keys() <= ACTION["inputs"].keys()
        more = step["with"].get("options", "").split()
        assert {word.partition("=")[0] for word in more} <= OPTIONS["to-native"]
    assert uses or file not in EXAMPLES


def test_the_page_says_what_the_action_takes():
    page = ROOT / "docs" / "checking.md"
    (block,) = [one for one in blocks(page) if one.language == "yaml"]
    (step,) = yaml.safe_load(block.text)
    assert step["uses"] in OURS
    assert step["with"].keys() <= ACTION["inputs"].keys()
    below = page.read_text(encoding="utf-8").split("| input | meaning | default |")[1]
    section = below.split("\n\n")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*?) ?\|$", section, re.MULTILINE)
    expected = {
        name: "required" if one.get("required") else f"`{one['default']}`".replace("``", "")
        for name, one in ACTION["inputs"].items()
    }
    assert dict(rows) == expected


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
