"""The notebooks run: their cells one after the other, as Jupyter and Colab run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documents import ROOT, command
from test_cli import run

NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))

INSTALL = '%pip install -q "gemma-convert[check]"\n'


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda one: one.stem)
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    """A line with `!` is a command of ours, whose exit code is what a comment in it says."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    first, *cells = _code(notebook)
    assert first == INSTALL
    for cell in cells:
        if not cell.startswith("!"):
            exec(compile(cell, notebook.name, "exec"), names)
            continue
        for line in cell.splitlines():
            one = command(line.removeprefix("!"))
            assert line.startswith("!") and one.words[0] == "gemma-convert"
            done = run(*one.words[1:])
            assert done.returncode == one.code, f"{line}\n{done.stderr}{done.stdout}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda one: one.stem)
def test_it_is_a_notebook_without_outputs_for_a_cpu(notebook):
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert "accelerator" not in whole["metadata"]
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def _code(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(one["source"]) + "\n" for one in cells if one["cell_type"] == "code"]
