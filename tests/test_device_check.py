"""scripts/device_check.sh on the CPU: its lines, table, JSON and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_convert

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """The module device_check, as its own process would import it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import device_check

    return device_check


def run_here(script, monkeypatch, out: Path, *arguments: str) -> tuple[int, dict]:
    """The exit code in this process, and what was written."""
    monkeypatch.setattr(sys, "argv", ["device_check.py", str(out), *arguments])
    with pytest.raises(SystemExit) as done:
        script.main()
    return done.value.code, json.loads((out / "device-check.json").read_text())


def states(written: dict) -> dict[str, str]:
    return {f"{one['check']} {one['what']}": one["state"] for one in written["checks"]}


def test_a_process_of_its_own(tmp_path):
    """Nothing but the interpreter is given: not even the folder of the package."""
    only = ("--only", "tiny 31b fast-llm", "--only", "tiny e2b gemma-jax")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [SCRIPTS / "device_check.sh", *only],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out" / "device-check.json").read_text())
    assert written["passed"] is True
    assert list(states(written)) == [
        "devices devices",
        "tiny e2b gemma-jax text",
        "tiny e2b gemma-jax image",
        "tiny e2b gemma-jax sound",
        "tiny 31b fast-llm text",
    ]
    assert set(states(written).values()) == {"passed"}
    for one in written["checks"][1:]:
        assert 0 < one["kl_max"] < 1e-8
        assert (one["device"], one["jax_peak_bytes"], one["torch_peak_bytes"]) == (
            "cpu",
            None,
            None,
        )
    kl = [one["kl_max"] for one in written["checks"][1:]]
    assert len(set(kl)) == len(kl), "a sense shows its own figure"
    table = done.stdout.partition("\n\n")[2].splitlines()
    assert table[0].split()[:6] == ["device", "model", "layout", "dtype", "what", "KL"]
    assert table[5].split()[:5] == ["cpu", "31b", "fast-llm", "float32", "text"]
    assert table[5].endswith("same model")
    assert "5 passed in" in table[-1]


def test_a_failure_is_told_and_the_rest_goes_on(script, monkeypatch, tmp_path, capsys):
    """One conversion is of other weights, one raises, and the last one is right."""
    convert = gemma_convert.to_native

    def broken(source, native, **options):
        if source.name == "tiny-12b":
            other = source.parent / "other"
            gemma_convert.make_tiny("12b", other, layers=12, seed=1)
            return convert(other, native, **options)
        if source.name == "tiny-26b-a4b":
            raise RuntimeError("no conversion today")
        return convert(source, native, **options)

    monkeypatch.setattr(gemma_convert, "to_native", broken)
    code, written = run_here(script, monkeypatch, tmp_path, "--only", "fast-llm")
    assert code == 1
    assert written["passed"] is False
    assert states(written) == {
        "devices devices": "passed",
        "tiny 12b fast-llm text": "failed",
        "tiny 26b-a4b fast-llm text": "failed",
        "tiny 31b fast-llm text": "passed",
    }
    wrong, raised = written["checks"][1:3]
    assert wrong["verdict"] == "not the same model"
    assert wrong["kl_max"] > 1e-2
    assert raised["verdict"] == "failed: RuntimeError: no conversion today"
    assert "1 not run" not in capsys.readouterr().out


def test_what_does_not_fit_is_not_run(script, monkeypatch, tmp_path):
    code, written = run_here(
        script, monkeypatch, tmp_path, "--seconds", "19", "--only", "tiny 31b fast-llm"
    )
    assert code == 1
    assert written["checks"][1]["verdict"] == "not run: no time left"
    assert states(written)["tiny 31b fast-llm text"] == "not run"


def test_what_the_machine_lacks_is_no_failure(script, monkeypatch, tmp_path):
    import transformers

    name = "Gemma4UnifiedForConditionalGeneration"
    monkeypatch.setitem(transformers._class_to_module, name, "models.gone")
    monkeypatch.delattr(transformers, name, raising=False)
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    only = ("--only", "tiny 12b fast-llm", "--only", "tiny 31b fast-llm")
    code, written = run_here(script, monkeypatch, tmp_path, *only)
    assert code == 0
    assert written["checks"][1]["state"] == "unavailable"
    version = transformers.__version__
    assert (
        written["checks"][1]["verdict"] == f"not run: transformers {version} has no gemma4_unified"
    )
    found = script.run(script.tiny_steps(tmp_path)[3])
    assert (found.state, found.verdict) == ("unavailable", "not run: Pillow is not installed")


def test_real_widths(script, monkeypatch, tmp_path):
    """E2B's widths with a small vocabulary; a table with other rows is seen in the logits."""
    monkeypatch.setattr(script, "SMALL_ROWS", 600)
    code, written = run_here(script, monkeypatch, tmp_path, "--only", "real")
    assert code == 0
    assert [one["what"] for one in written["checks"][1:]] == [
        "conversion",
        "verification",
        "text",
        "text",
    ]
    rounded, exact = written["checks"][3:]
    assert exact["dtype"] == "float32"
    assert exact["kl_max"] < 1e-6 < 1e-5 < rounded["kl_max"] < 0.03


def test_usage(script, monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(sys, "argv", ["device_check.py"])
    with pytest.raises(SystemExit) as done:
        script.main()
    assert done.value.code == 2
    monkeypatch.setattr(sys, "argv", ["device_check.py", str(tmp_path), "--only", "e3b"])
    with pytest.raises(SystemExit) as done:
        script.main()
    assert done.value.code == "no check has such a name: e3b"
