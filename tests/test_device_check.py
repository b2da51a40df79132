"""scripts/device_check.sh on the CPU: its lines, table, JSON and exit codes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gemma_convert

SCRIPTS = Path(__file__).parents[1] / "scripts"
SENSES = ("text", "image", "sound")


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
    only = ("--only", "tiny 31b fast-llm")
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
    assert states(written) == {
        "devices devices": "passed",
        "tiny 31b fast-llm text": "passed",
    }
    for one in written["checks"][1:]:
        assert 0 < one["kl_max"] < 1e-8
        assert one["device"] == "cpu"
        assert one["jax_peak_bytes"] is one["torch_peak_bytes"] is None
    table = done.stdout.partition("\n\n")[2].splitlines()
    assert table[0].split()[:6] == ["device", "model", "layout", "dtype", "what", "KL"]
    assert table[2].split()[:5] == ["cpu", "31b", "fast-llm", "float32", "text"]
    assert table[2].endswith("same model")
    assert "2 passed in" in table[-1]


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
    passed = script.Finding("passed", "same model", 1e-11, "cpu")
    monkeypatch.setattr(script, "run", lambda step: passed)
    only = ("--only", "tiny 31b fast-llm", "--only", "real")
    code, written = run_here(script, monkeypatch, tmp_path, "--seconds", "40", *only)
    assert code == 1
    assert [one["state"] for one in written["checks"]] == ["passed"] * 2 + ["not run"] * 4
    assert written["checks"][2]["verdict"] == "not run: no time left"


def test_what_the_machine_lacks_is_no_failure(script, monkeypatch, tmp_path):
    steps = {f"{step.name} {step.what}": step for step in script.tiny_steps(tmp_path)}
    old = SimpleNamespace(__version__="5.17.0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", old)
        found = script.run(steps["tiny 12b fast-llm text"])
    assert found.state == "unavailable"
    assert found.verdict == "not run: transformers 5.17.0 has no gemma4_unified"
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    found = script.run(steps["tiny 31b gemma-jax image"])
    assert (found.state, found.verdict) == ("unavailable", "not run: Pillow is not installed")

    monkeypatch.setattr(script, "run", lambda step: found)
    code, written = run_here(script, monkeypatch, tmp_path, "--only", "tiny 31b gemma-jax")
    assert code == 1, "nothing passed"
    monkeypatch.setattr(script, "run", lambda step: found if step.what == "image" else passed)
    passed = script.Finding("passed", "same model", 1e-11, "cpu")
    code, written = run_here(script, monkeypatch, tmp_path, "--only", "tiny 31b gemma-jax")
    assert code == 0
    assert list(states(written).values()) == ["passed", "passed", "unavailable"]


def test_each_sense_shows_its_own_figure(script, monkeypatch, tmp_path):
    def checked(source, native, *, dtype, images, audio):
        kl = {"english": 1.0, "code": 2.0}
        kl |= {f"image-0 ({path.name})": 0.5 for path in images}
        kl |= {f"sound-0 ({path.name})": math.nan for path in audio}
        assert all(path.is_file() for path in (*images, *audio))
        sequences = [SimpleNamespace(name=name, kl_max=value) for name, value in kl.items()]
        devices = {"reference_device": "cpu", "native_device": "TPU v5"}
        return SimpleNamespace(passed=False, verdict="no", checked=sequences, **devices)

    monkeypatch.setattr(gemma_convert, "logit_check", checked)
    found = [script.check(tmp_path, tmp_path, "float32", sense, tmp_path) for sense in SENSES]
    assert [one.kl_max for one in found[:2]] == [2.0, 0.5]
    assert math.isnan(found[2].kl_max)
    assert {(one.state, one.device) for one in found} == {("failed", "cpu / TPU v5")}


def test_without_an_accelerator_few_are_run(script, monkeypatch, tmp_path):
    passed = script.Finding("passed", "same model", 1e-11, "cpu")
    monkeypatch.setattr(script, "run", lambda step: passed)
    _, few = run_here(script, monkeypatch, tmp_path)
    assert {one["check"] for one in few["checks"]} == {
        "devices",
        *script.FEW[:2],
        "real e2b maxtext",
    }
    monkeypatch.setattr(script, "devices", lambda: (passed, True))
    _, all_of_them = run_here(script, monkeypatch, tmp_path)
    assert len({one["check"] for one in all_of_them["checks"]}) == 1 + 16 + 1


def test_nan_is_null_in_the_file(script, monkeypatch, tmp_path):
    bad = script.Finding("failed", "not the same model", math.nan, "cpu")
    monkeypatch.setattr(script, "run", lambda step: bad)
    code, written = run_here(script, monkeypatch, tmp_path, "--only", "tiny 31b fast-llm")
    assert code == 1
    assert written["checks"][1]["kl_max"] is None


@pytest.mark.parametrize(
    ("platform", "cuda", "state", "accelerated"),
    [
        ("cpu", False, "passed", False),
        ("gpu", True, "passed", True),
        ("tpu", False, "passed", True),
        ("cpu", True, "failed", True),
        ("gpu", False, "failed", True),
    ],
)
def test_one_side_on_the_cpu_beside_a_gpu(script, monkeypatch, platform, cuda, state, accelerated):
    """It would pass without having been on the accelerator."""
    import jax
    import torch

    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    found, any_accelerator = script.devices()
    assert (found.state, any_accelerator) == (state, accelerated)


@pytest.mark.large
def test_real_widths(script, monkeypatch, tmp_path):
    """E2B's widths with a small vocabulary: rounding is seen, and is far from the limit."""
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
