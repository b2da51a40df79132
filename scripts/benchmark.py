#!/usr/bin/env python3
"""How fast conversions run, against the least that one must do, MaxText's converter, and `cp -r`.

Makes a synthetic checkpoint of real widths, then runs every direction and layout in turns, several
times, beside the floor: read every tensor once, transpose it with the same function, write one raw
file, sync (benchmark_floor.py); beside `cp -r` + sync of the same bytes; and, with `--peer`, beside
MaxText's own converter in its environment. Ratios are of times within one round; their median is
printed. Times on a busy machine vary up to fivefold, ratios much less. What the machine can do at
most is printed first, and with `--phases` what the seconds of one more run of each case went into.

A virtual machine may have given its free memory back to the host, and then the first touch of a
page costs more than all else that a run does with it. So the page cache is filled with a file that
stays, up to what a run needs, and before every run that rest is filled and freed, and the source is
read: the pages that a run gets were in use a moment before, for all alike. MaxText's converter,
which takes them all, comes last in its round, and the page cache is filled again behind it.

    scripts/benchmark.py WORK_FOLDER [--model 31b] [--gigabytes 3.5] [--rounds 3] [--phases]
                         [--peer PYTHON] [--json FILE]

The weights are wild, or with `--weights trained` like a trained model's
(gemma_convert/tiny/kinds.py). The work folder needs about four times the checkpoint's size, eight
times with `--peer`, and is cleaned up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from benchmark_machine import machine_figures
from real_widths import CONFIGS, published_config, slice_config, write_checkpoint

from gemma_convert.tiny.kinds import Repeated

SCRIPTS = Path(__file__).parent
OURS = (sys.executable, "-m", "gemma_convert")
SPARE_BYTES = 1 << 30
WARM_BYTES = 6 << 30
LAYER_ORDER = "text_config.layer_types"
"""A slice has fewer layers than the order of MaxText's needs."""


@dataclass(frozen=True)
class Case:
    """One command of gemma-convert whose time is taken; `removed` are folders, afterwards."""

    name: str
    command: tuple[str, ...]
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One measured run: seconds, bytes."""

    wall: float
    cpu: float
    anonymous: int
    read: int
    written: int


def main() -> None:
    arguments = _arguments()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each run would compile all that it imports
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "benchmark"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        size = make_checkpoint(arguments, folder / "hf")
        cases = _cases(arguments.model, arguments.only)
        print(f"{arguments.model}: {size / 1e9:.2f} GB, {os.cpu_count()} cores", flush=True)
        machine = machine_figures(folder)
        print("; ".join(f"{name} {rate:.1f}" for name, rate in machine.items()), "GB/s", flush=True)
        peer = arguments.peer and _peer(folder, arguments.peer.absolute(), arguments.weights)
        warm = min(int(1.2 * size), WARM_BYTES)
        _fill_cache(folder, warm)
        runs = measure(folder, cases, arguments.rounds, warm, peer)
        phases = phases_of(folder, cases, warm) if arguments.phases else {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = summary(runs, size)
    show(report)
    show_phases(phases)
    if arguments.json:
        values = {
            "model": arguments.model,
            "bytes": size,
            "machine": machine,
            "cases": report,
            "phases": phases,
        }
        arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=CONFIGS, default="31b")
    parser.add_argument("--gigabytes", type=float, default=3.5)
    parser.add_argument("--full", action="store_true", help="all layers and all rows")
    parser.add_argument("--weights", choices=get_args(Repeated), default="wild")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run cases whose name holds this")
    parser.add_argument("--phases", action="store_true", help="tell where the seconds go")
    parser.add_argument("--peer", type=Path, help="Python of an environment that has MaxText")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_checkpoint(arguments: argparse.Namespace, folder: Path) -> int:
    """Writes a checkpoint of real widths and, unless it is `--full`, fewer layers; its bytes."""
    model: str = arguments.model
    config = (
        published_config(model)
        if arguments.full
        else slice_config(model, int(arguments.gigabytes * 1e9))
    )
    return write_checkpoint(folder, config, arguments.weights)


def _cases(model: str, only: str) -> list[Case]:
    layouts: dict[str, tuple[str, ...]] = {
        "maxtext zarr": ("--format", "maxtext", "--no-ocdbt"),
        "maxtext ocdbt": ("--format", "maxtext"),
        "gemma-jax zarr": ("--format", "gemma-jax", "--no-ocdbt"),
        "gemma-jax ocdbt": ("--format", "gemma-jax"),
    }
    if model not in {"e2b", "e4b"}:
        layouts["maxtext scanned zarr"] = ("--format", "maxtext", "--no-ocdbt", "--scan-layers")
        layouts["maxtext scanned ocdbt"] = ("--format", "maxtext", "--scan-layers")
        layouts["fast-llm"] = ("--format", "fast-llm")
    cases = []
    for name, options in layouts.items():
        if only in name:
            there = ("to-native", "hf", "native", *options, "--ignore-fact", LAYER_ORDER)
            cases.append(Case(f"hf to {name}", there))
            cases.append(Case(f"verify {name}", ("verify", "native")))
            back = ("to-hf", "native", "back")
            cases.append(Case(f"{name} to hf", back, removed=("native", "back")))
    return cases


def _peer(folder: Path, python: Path, weights: Repeated) -> list[str]:
    """The command of MaxText's converter, for the settings that `to-native` prints.

    It reads a checkpoint of the same bytes under the names of the text model alone, which it wants
    where a model has no towers.
    """
    config = json.loads((folder / "hf" / "config.json").read_text(encoding="utf-8"))
    causal = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
    write_checkpoint(folder / "text", config["text_config"] | causal, weights)
    planned = [*OURS, "to-native", "text", "none", "--format", "maxtext", "--dry-run", "--json"]
    command = [*planned, "--ignore-fact", LAYER_ORDER]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True)
    settings = folder / "settings.json"
    settings.write_text(json.dumps(json.loads(done.stdout)["settings"]), encoding="utf-8")
    script = SCRIPTS / "conformance" / "maxtext.py"
    return [str(python), "-P", str(script), "to_maxtext_bfloat16", str(settings), "text", "peer"]


def measure(
    folder: Path, cases: list[Case], rounds: int, warm: int, peer: list[str] | None
) -> dict[str, list[Run]]:
    """Name → its runs, one a round; every round runs everything once.

    Before each run `warm` bytes of the page cache are filled and freed.
    """
    runs: dict[str, list[Run]] = {"cp -r": [], "floor": []}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        _warm(folder, warm)
        runs["cp -r"].append(_watch(["cp", "-r", "hf", "copy"], folder))
        shutil.rmtree(folder / "copy")
        floor = [sys.executable, str(SCRIPTS / "benchmark_floor.py"), "hf", "floor.bin"]
        _warm(folder, warm)
        runs["floor"].append(_watch(floor, folder))
        (folder / "floor.bin").unlink()
        for case in cases:
            _warm(folder, warm)
            runs.setdefault(case.name, []).append(_watch([*OURS, *case.command], folder))
            _clean(folder, case)
        if peer is not None:
            _warm(folder, warm)
            runs.setdefault("MaxText's to_maxtext", []).append(_watch(peer, folder))
            shutil.rmtree(folder / "peer")
            _fill_cache(folder, warm)
    return runs


def phases_of(folder: Path, cases: list[Case], warm: int) -> dict[str, dict[str, Any]]:
    """Name of a case → what benchmark_phases.py says of one more run."""
    phases = {}
    for case in cases:
        _warm(folder, warm)
        report = folder / "phases.json"
        command = [sys.executable, str(SCRIPTS / "benchmark_phases.py"), report, *case.command]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        phases[case.name] = json.loads(report.read_text(encoding="utf-8"))
        _clean(folder, case)
    return phases


def _clean(folder: Path, case: Case) -> None:
    for name in case.removed:
        shutil.rmtree(folder / name)


def _fill_cache(folder: Path, warm: int) -> None:
    """Leaves `warm` bytes of memory free, and fills the others with the pages of one file."""
    (folder / "filling").unlink(missing_ok=True)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))
    _write(folder / "filling", max(0, free - warm - SPARE_BYTES))
    os.sync()


def _warm(folder: Path, size: int) -> None:
    """Fills `size` bytes of the page cache and frees them, so that the host has the pages ready.

    Then the source is read, so that its pages are there too.
    """
    _write(folder / "ballast", size)
    (folder / "ballast").unlink()
    piece = memoryview(bytearray(4 << 20))
    for path in sorted((folder / "hf").glob("*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def _write(path: Path, size: int) -> None:
    piece = bytes(4 << 20)
    with path.open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)


def _watch(command: list[str], folder: Path) -> Run:
    """Runs a command, then syncs the disk; both count."""
    started = time.monotonic()
    before = os.times()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    peak = {"anonymous": 0, "read": 0, "written": 0}

    def look() -> None:
        while process.poll() is None:
            for key, value in _figures(process.pid):
                peak[key] = max(peak[key], value)
            time.sleep(0.02)

    watcher = threading.Thread(target=look)
    watcher.start()
    code = process.wait()
    watcher.join()
    os.sync()
    wall = time.monotonic() - started
    after = os.times()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    cpu = sum(after[2:4]) - sum(before[2:4])
    return Run(wall, cpu, peak["anonymous"], peak["read"], peak["written"])


def _figures(pid: int) -> Iterator[tuple[str, int]]:
    """Anonymous memory now, and bytes read and written so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        io = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return
    for line in (*status.splitlines(), *io.splitlines()):
        key, _, value = line.partition(":")
        if key == "RssAnon":
            yield "anonymous", int(value.split()[0]) * 1024
        elif key in {"rchar", "wchar"}:
            yield {"rchar": "read", "wchar": "written"}[key], int(value)


def summary(runs: Mapping[str, list[Run]], size: int) -> dict[str, dict[str, object]]:
    """Name → median time, its ratios to the floor and `cp -r` of the same round, memory, bytes."""
    report: dict[str, dict[str, object]] = {}
    for name, found in runs.items():
        walls = [run.wall for run in found]
        report[name] = {
            "seconds": statistics.median(walls),
            "over_floor": _ratio(walls, runs["floor"]),
            "over_cp": _ratio(walls, runs["cp -r"]),
            "cpu_seconds": statistics.median(run.cpu for run in found),
            "peak_anonymous_bytes": max(run.anonymous for run in found),
            "bytes_read": statistics.median(run.read for run in found),
            "bytes_written": statistics.median(run.written for run in found),
            "gigabytes_per_second": size / statistics.median(walls) / 1e9,
            "runs": [asdict(run) for run in found],
        }
    return report


def _ratio(walls: list[float], others: list[Run]) -> float:
    return statistics.median(wall / other.wall for wall, other in zip(walls, others, strict=True))


def show(report: Mapping[str, Mapping[str, object]]) -> None:
    head = ("case", "s", "/ floor", "/ cp", "CPU s", "anon MB", "read GB", "written GB")
    rows = [
        (
            name,
            f"{found['seconds']:.1f}",
            f"{found['over_floor']:.2f}",
            f"{found['over_cp']:.2f}",
            f"{found['cpu_seconds']:.1f}",
            f"{found['peak_anonymous_bytes'] / 1e6:.0f}",
            f"{found['bytes_read'] / 1e9:.2f}",
            f"{found['bytes_written'] / 1e9:.2f}",
        )
        for name, found in report.items()
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        _, *rest = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]))


def show_phases(phases: Mapping[str, Mapping[str, Any]]) -> None:
    """Seconds of each phase, its bytes a second where it moves some, and what passed."""
    for name, found in phases.items():
        told = [
            f"{phase} {clock['seconds']:.2f}"
            + (f" ({clock['nbytes'] / clock['seconds'] / 1e9:.1f} GB/s)" if clock["nbytes"] else "")
            for phase, clock in found["phases"].items()
        ]
        print(f"{name}: {found['total']:.1f} s; of all threads: {', '.join(told)}")


if __name__ == "__main__":
    main()
