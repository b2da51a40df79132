"""Faults while a conversion runs: one message, no traceback, the source untouched, nothing left.

Every direction is tried: a file system that fills up, a source that cannot be read, that changes or
goes, a target that is taken away or cannot be written, a worker that fails, a second run.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from native_checkpoints import sums

from gemma_convert import SourceError, TargetError, inspect, to_hf, to_native
from gemma_convert.engine import casting, restoring
from gemma_convert.stores.orbax.reader import OrbaxArray
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

DIRECTIONS = {
    "hf to maxtext": ("hf", "maxtext", {}),
    "hf to scanned zarr": ("hf", "maxtext", {"ocdbt": False, "scan_layers": True}),
    "hf to gemma-jax": ("hf", "gemma-jax", {}),
    "hf to fast-llm": ("hf", "fast-llm", {}),
    "maxtext to hf": ("maxtext", None, {}),
    "fast-llm to hf": ("fast-llm", None, {}),
    "maxtext to gemma-jax": ("maxtext", "gemma-jax", {}),
}
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_writer = pytest.mark.parametrize(
    "direction", ["hf to maxtext", "hf to scanned zarr", "hf to fast-llm", "maxtext to hf"]
)
"""Those that write in different ways, for what needs a process of its own."""


@pytest.fixture
def source(tiny, converted, tmp_path, direction):
    """A copy of what is converted, which may be damaged."""
    kind = DIRECTIONS[direction][0]
    whole = tiny("26b-a4b") if kind == "hf" else converted(tiny("26b-a4b"), kind)
    return shutil.copytree(whole, tmp_path / "source")


def run(direction, source, out, **more):
    _, layout, options = DIRECTIONS[direction]
    if layout is None:
        return to_hf(source, out, **more)
    return to_native(source, out, layout=layout, **options, **more)


def command(direction, source, out):
    """The command, its words for the command line."""
    _, layout, options = DIRECTIONS[direction]
    words = ["to-native", "--format", layout] if layout else ["to-hf"]
    words += ["--no-ocdbt"] if options.get("ocdbt") is False else []
    words += ["--scan-layers"] if options.get("scan_layers") else []
    return [words[0], str(source), str(out), *words[1:]]


MAIN = """
import sys
import gemma_convert.tasks.to_native, gemma_convert.tasks.to_hf
for module in (gemma_convert.tasks.to_native, gemma_convert.tasks.to_hf):
    module.check_space = lambda *_: None
from gemma_convert.cli.app import main
main()
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; the space is checked beforehand only where it is not asked for."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def limited():
    """Where nothing can be mounted: no file may grow beyond 100 KB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.share(4, 2)
@every_writer
def test_a_disk_that_fills_up(direction, source, small_disk, tmp_path):
    """The disk is almost full, and the check of free space has been deceived."""
    before, folder = sums(source), small_disk or tmp_path / "limited"
    folder.mkdir(exist_ok=True)
    if small_disk:
        (folder / "others").write_bytes(bytes(shutil.disk_usage(folder).free - 400_000))
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *command(direction, source, folder / "out")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=None if small_disk else limited,
    )
    assert done.returncode == 4, done.stderr
    assert "cannot be written" in done.stderr
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in folder.iterdir()] in (["others"], [])
    assert sums(source) == before


def after(count, owner, name, monkeypatch, action):
    """From the call number `count` of `owner.name` on, `action` comes first."""
    original, calls, lock = getattr(owner, name), [0], threading.Lock()

    def call(*arguments, **options):
        with lock:
            calls[0] += 1
            now = calls[0] >= count
        if now:
            action()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


def reader_of(direction):
    """What reads the source of a direction."""
    if DIRECTIONS[direction][0] == "maxtext":
        return OrbaxArray, "read"
    return SafetensorsFolder, "read_into"


@pytest.mark.share(4, 1)
@every_direction
def test_a_source_that_cannot_be_read_halfway(direction, source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before, preadv, calls = sums(source), os.preadv, [0]

    def broken(*arguments):
        calls[0] += 1
        if calls[0] > 60:
            fail()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(SourceError, match="source cannot be read"):
        run(direction, source, tmp_path / "out")
    assert calls[0] > 60
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert sums(source) == before


@pytest.mark.share(4)
@every_direction
def test_a_source_that_changes_meanwhile(direction, source, tmp_path, monkeypatch):
    files = [path for path in source.rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    weights = max(files, key=lambda path: path.stat().st_size)

    def change():
        """Size and time of the last change stay as they were."""
        status = weights.stat()
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read()[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))

    calls = after(40, *reader_of(direction), monkeypatch, change)
    with pytest.raises(SourceError, match="changed while it was read"):
        run(direction, source, tmp_path / "out")
    assert calls[0] > 40
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.share(4, 3)
@every_direction
def test_a_source_that_goes_away(direction, source, tmp_path, monkeypatch):
    calls = after(
        40, *reader_of(direction), monkeypatch, lambda: shutil.rmtree(source, ignore_errors=True)
    )
    with pytest.raises(SourceError):
        run(direction, source, tmp_path / "out")
    assert calls[0] >= 40
    assert not list(tmp_path.iterdir())


@pytest.mark.share(4, 2)
@every_direction
def test_a_target_that_is_taken_away(direction, source, tmp_path, monkeypatch):
    before = sums(source)
    after(
        40,
        *reader_of(direction),
        monkeypatch,
        lambda: shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True),
    )
    with pytest.raises(TargetError):
        run(direction, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sums(source) == before


@pytest.mark.share(4)
@every_direction
def test_a_worker_that_fails(direction, source, tmp_path, monkeypatch):
    """A fault of our own is raised as it is, and leaves nothing either."""
    before = sums(source)

    def fail():
        raise MemoryError("no memory for this block")

    module = casting if DIRECTIONS[direction][1] else restoring
    after(10, module, "convert", monkeypatch, fail)
    with pytest.raises(MemoryError):
        run(direction, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert sums(source) == before


@pytest.mark.share(4, 1)
@every_writer
def test_a_target_that_may_not_be_written(direction, source, small_disk, tmp_path):
    before = sums(source)
    if small_disk:
        remount = ["mount", "-o", "remount,ro", str(small_disk)]
        subprocess.run(remount, check=True, capture_output=True)
        target = small_disk / "out"
    else:
        target = tmp_path / "shut" / "out"
        target.parent.mkdir(mode=0o500)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *command(direction, source, target)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(target.parent.iterdir())
    assert sums(source) == before


SLOW = """
import sys, time
import gemma_convert.output as output
tell = output._Lines.__call__
def slow(self, event):
    if event.event == "advance":
        print("running", flush=True)
        time.sleep(0.05)
    tell(self, event)
output._Lines.__call__ = slow
from gemma_convert.cli.app import main
main()
"""


@pytest.mark.share(4)
@every_writer
def test_a_second_run_and_an_interrupt(direction, source, tmp_path):
    """The second is sent away, the first is interrupted, what it left is no checkpoint."""
    words = command(direction, source, tmp_path / "out")
    first = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "running\n"
    with pytest.raises(TargetError, match="Another run is writing"):
        run(direction, source, tmp_path / "out")
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 130, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
    with pytest.raises(SourceError):
        inspect(tmp_path / ".out.partial")
    run(direction, source, tmp_path / "out", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_is_killed_while_it_publishes_is_whole_or_absent(tiny, tmp_path):
    """Killed at moments around the end, --overwrite leaves the old checkpoint or the new one."""
    out, source = tmp_path / "out", tiny("31b", layers=6)
    to_native(source, out, dtype="float32")
    started = time.monotonic()
    words = ["to-native", source, out, "--format", "maxtext", "--overwrite"]
    process = [sys.executable, "-m", "gemma_convert", *map(str, words)]
    subprocess.run(process, check=True, capture_output=True)
    took = time.monotonic() - started
    for part in (0.8, 0.95):
        running = subprocess.Popen(process, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(took * part)
        running.kill()
        running.wait()
        assert to_hf(out, tmp_path / "back", overwrite=True).bit_for_bit
    assert sums(tmp_path / "back") == sums(source)


def test_nothing_writes_through_a_link_in_the_target(tiny, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".out.partial").symlink_to(elsewhere)
    to_native(tiny("31b", layers=6), tmp_path / "out")
    assert (tmp_path / ".out.partial").is_symlink()
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(TargetError):
        to_native(tiny("31b", layers=6), tmp_path / "link", overwrite=True)
    assert not list(elsewhere.iterdir())
    assert Path(tmp_path / "link").is_symlink()
