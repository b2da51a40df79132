"""Two processes on one machine: one report, one exit code, and no one waits for ever."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compiling import QUICK_XLA
from key_value_store import Store
from native_checkpoints import alter
from PIL import Image

from gemma_convert import logit_check
from gemma_convert.cli.app import main
from gemma_convert.engine import joined as joining
from gemma_convert.engine import processes
from gemma_convert.engine.joined import (
    in_step,
    is_leader,
    joined,
    process_count,
    publish,
    published,
)
from gemma_convert.engine.processes import Processes
from gemma_convert.errors import GemmaConvertError, SourceError, UsageError
from gemma_convert.logits.report import LogitReport

ROOT = Path(joining.__file__).parents[2]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run_pair(arguments, of_second=None, devices=1):
    """Exit code, stdout and stderr of two processes that check together through the real CLI."""
    joining = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    flags = f"{QUICK_XLA} --xla_force_host_platform_device_count={devices}"
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "gemma_convert",
                "logit-check",
                *map(str, given),
                *joining,
                str(n),
            ],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, given in enumerate((arguments, of_second or arguments))
    ]
    ended = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return "--image", folder / "noise.png"


def test_two_processes_give_one_report(tiny, converted, media):
    """Two devices each: arrays are split over four, and each process reads its own parts."""
    native = converted(tiny("31b", layers=6), "gemma-jax")
    arguments = (tiny("31b", layers=6), native, "--tokens", 3, *media, "--json")
    first, second = run_pair(arguments, devices=2)
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert second[1] == ""
    found = json.loads(first[1])
    assert found["passed"] and found["processes"] == 2 and found["native_devices"] == 4
    assert found["devices"]["native"] == "4 × cpu" and found["kl_max"] < 1e-8
    assert found["images"] == 1 and found["first_drift"] is None


@pytest.mark.large
def test_both_end_with_the_code_of_a_failed_check(tiny, converted, tmp_path):
    native = tmp_path / "broken"
    shutil.copytree(converted(tiny("31b", layers=6), "gemma-jax"), native)
    alter(native, "layer_3/skip_scale", lambda scalar: scalar * 2)
    arguments = (tiny("31b", layers=6), native, "--tokens", 3, "--whole-model")
    first, second = run_pair(arguments)
    assert first[0] == second[0] == 1, (first[2], second[2])
    assert "not the same model" in first[1] and "2 × cpu, 2 processes" in first[1]
    assert second[1] == ""


@pytest.mark.large
def test_a_process_that_cannot_start_ends_both(tiny, converted, tmp_path):
    native = converted(tiny("31b", layers=6), "gemma-jax")
    first, second = run_pair((tiny("31b", layers=6), native), (tiny("31b", layers=6), tmp_path))
    assert first[0] == second[0] == SourceError.exit_code, (first[2], second[2])
    assert "error: Process 1 failed." in first[2] and str(tmp_path) in first[2]
    assert first[1] == second[1] == "" and "error" not in second[2]


JOINING = ("--coordinator", "h:1", "--processes", "2", "--process", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (JOINING[:4], "belong together"),
        (JOINING[2:], "belong together"),
        ((*JOINING, "--distributed"), "in the environment"),
        (("--process", "0", "--distributed"), "in the environment"),
        (("--coordinator", "h", *JOINING[2:]), "HOST:PORT"),
        (("--coordinator", "h:p", *JOINING[2:]), "HOST:PORT"),
        ((*JOINING[:4], "--process", "2"), "0 to 1"),
        ((*JOINING[:4], "--process", "-1"), "0 to 1"),
    ],
)
def test_options_that_contradict_each_other(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("jax.distributed.initialize", None)
    monkeypatch.setattr(sys, "argv", ["gemma-convert", "logit-check", "a", "b", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_an_environment_without_a_cluster_is_refused(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "JAX_COORDINATOR", "TPU", "KUBERNETES")):
            monkeypatch.delenv(name)
    with pytest.raises(UsageError, match="cannot be joined"), joined(None, None, None, True):
        raise AssertionError("entered")
    assert is_leader()


def test_one_process_is_left_alone():
    with joined(None, None, None, False):
        assert is_leader() and process_count() == 1
        assert list(in_step(iter("abc"))) == ["a", "b", "c"]
        publish("three")
    with pytest.raises(ValueError, match="no other"):
        published()


@pytest.fixture
def group(monkeypatch):
    """group(index, words): within `joined` as a process of three that hears these words."""
    monkeypatch.setattr(processes, "CHECK_S", 0.01)
    monkeypatch.setattr(processes, "LINGER_S", 0.05)
    leaving = []
    monkeypatch.setattr(joining.atexit, "register", lambda *given: leaving.append(given))

    def join(index, words):
        store = Store(words)
        monkeypatch.setattr(joining, "connect", lambda *given: Processes(store, index, 3))
        return store, joined("h:1", 3, index, False), leaving

    return join


def steps(count, *indices):
    """The words of processes that have come to the first `count` steps."""
    return {f"step/{step}/{index}": "" for step in range(count) for index in indices}


LEFT = {"left/1": "", "left/2": ""}


def test_process_0_gives_what_it_has(group):
    store, together, leaving = group(0, steps(4, 1, 2))
    with together as found:
        assert found.leads and is_leader() and process_count() == 3
        assert list(in_step("ab")) == ["a", "b"]
        publish("a report")
    assert store.asked == [f"step/{step}/{index}" for step in range(4) for index in (1, 2)]
    assert [store.said(f"step/{step}/0") for step in range(5)] == [""] * 4 + [None]
    assert not leaving
    shared = store.said("text/4")
    store, together, _ = group(2, steps(4, 0) | {"text/4": shared})
    with together:
        assert not is_leader() and list(in_step("ab")) == ["a", "b"]
        assert published() == "a report"
    assert store.said("step/0/2") == "" and store.said("step/0/1") is None
    assert is_leader()


@pytest.mark.parametrize("begun", [False, True])
def test_process_0_tells_the_others_why_it_ends(group, begun):
    for left in (LEFT, {"left/1": ""}):
        store, together, leaving = group(0, steps(1, 1, 2) | left)
        with pytest.raises(SourceError, match="gone"), together:
            if begun:
                next(in_step("ab"))
            raise SourceError("gone")
        assert store.said("failure/first") == "0 3 gone" and store.said("left/0") == ""
        assert [given[1] for given in leaving] == [3] * (left != LEFT)


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (ValueError("a"), 70), (OSError(), 3), (ImportError(), 2)],
)
def test_codes_of_other_failures(group, error, code):
    store, together, _ = group(0, LEFT)
    with pytest.raises(type(error)), together:
        raise error
    assert store.said("failure/first").startswith(f"0 {code} {type(error).__name__}: ")


@pytest.mark.parametrize("failed", [0, 2])
def test_a_follower_ends_silently_with_process_0(group, capsys, failed):
    words = {"failure/first": f"{failed} 4 gone", "left/0": ""}
    store, together, leaving = group(1, steps(1, 0) | words)
    with pytest.raises(SystemExit) as caught, together:
        list(in_step("ab"))
    assert caught.value.code == 4 and store.said("left/1") == ""
    assert capsys.readouterr() == ("", "") and not leaving


def test_a_failure_before_the_first_step_is_reported_by_process_0(group, capsys):
    """Its process waits for process 0, however long that takes."""
    store, together, leaving = group(1, {})
    later = threading.Timer(0.5, store.key_value_set, ["gemma-convert/left/0", ""])
    later.start()
    with pytest.raises(SystemExit) as caught, together:
        raise UsageError("two words", found="x")
    assert caught.value.code == 2 and capsys.readouterr() == ("", "") and not leaving
    assert store.said("left/1") == ""
    store, together, _ = group(0, {"failure/first": store.said("failure/first"), **LEFT})
    with pytest.raises(GemmaConvertError) as failed, together:
        next(in_step("ab"))
    assert failed.value.exit_code == 2 and store.said("left/0") == ""
    assert failed.value.what == "Process 1 failed."
    assert failed.value.found == "two words\n      found: x"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SourceError("two words"), 3, "process 1: two words\n"),
        (ValueError("three"), 70, "ValueError: three"),
    ],
)
def test_a_failure_that_process_0_does_not_hear(group, capsys, error, code, text):
    """It waits for this process inside of JAX: this one ends at once, and JAX ends the others."""
    store, together, leaving = group(1, steps(1, 0))
    with pytest.raises(SystemExit) as caught, together:
        next(in_step("ab"))
        raise error
    assert caught.value.code == code and [given[1] for given in leaving] == [code]
    assert text in capsys.readouterr().err
    assert store.said("failure/first").startswith(f"1 {code} ")


def test_a_fault_of_ours_is_told_where_it_is_met(group, capsys):
    _, together, leaving = group(1, steps(1, 0) | {"left/0": ""})
    with pytest.raises(SystemExit) as caught, together:
        next(in_step("ab"))
        raise ValueError("three")
    assert caught.value.code == 70 and not leaving
    assert capsys.readouterr().err.startswith("error: process 1: Traceback")


def test_a_failure_that_process_0_has_caused_is_not_told(group, capsys):
    words = {"failure/first": "0 3 gone", "left/0": ""}
    store, together, leaving = group(1, steps(1, 0) | words)
    with pytest.raises(SystemExit) as caught, together:
        next(in_step("ab"))
        raise ValueError("connection closed by peer")
    assert caught.value.code == 3 and capsys.readouterr().err == "" and not leaving
    assert store.said("left/1") == ""


def test_leaving_asks_nobody(tmp_path):
    code = "import atexit\nfrom gemma_convert.engine.joined import _leave\n"
    code += "atexit.register(print, 'late')\natexit.register(_leave, 5)\nprint('said')\n"
    done = run_python(code)
    assert (done.returncode, done.stdout) == (5, "said\n")


def test_the_standard_output_is_kept_from_libraries():
    code = (
        "import os\nfrom gemma_convert.engine.joined import _devices_shared as shared\n"
        "print('before')\nwith shared():\n    os.write(1, b'gloo\\n')\n    print('within')\n"
        "print('behind')\n"
    )
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("before\nwithin\nbehind\n", "gloo\n")


def test_a_report_arrives_as_it_was_sent(tiny, converted):
    source = tiny("31b", layers=6)
    report = logit_check(source, converted(source, "maxtext"), tokens=20)
    assert report.drift is not None
    assert LogitReport.from_text(report.as_text()) == report
    bare = replace(report, drift=None, warnings=("one", "two"))
    assert LogitReport.from_text(bare.as_text()) == bare
