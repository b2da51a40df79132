"""A killed run continues where it stopped, and the result is that of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from native_checkpoints import arrays_of, differing, manifest
from trees import restore, same_bits

from gemma_convert import SourceError, inspect, to_hf, to_native

SLOW = """
import sys, time
import gemma_convert.mapping.plan as planning
planning.BLOCK_BYTES = 20_000
planning.GATHER_BYTES = 2_000
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.orbax.reader import OrbaxArray
from gemma_convert.checkpoint.safetensors_layout import SafetensorsArray
reads = [0]
def throttled(read):
    def slow(self, *arguments):
        reads[0] += 1
        time.sleep(0.002)
        return read(self, *arguments)
    return slow
SafetensorsFolder.read_into = throttled(SafetensorsFolder.read_into)
OrbaxArray.read = throttled(OrbaxArray.read)
SafetensorsArray.read = throttled(SafetensorsArray.read)
import gemma_convert
print("started", flush=True)
gemma_convert.{call}
print(reads[0])
"""


def start(call: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(call=call)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    return process


def kill_and_resume(call: str, out: Path, seed: int, kills: int = 3) -> int:
    """Kills the call at random moments, then lets it end; how often the last run read."""
    generator = random.Random(seed)
    for _ in range(kills):
        process = start(call)
        time.sleep(generator.uniform(0.02, 0.5))
        process.kill()
        process.communicate()
        if out.exists():
            return 0
        partial = out.with_name(f".{out.name}.partial") / "new"
        if partial.exists():
            with pytest.raises(SourceError):
                inspect(partial)
    stdout, stderr = start(call).communicate(timeout=120)
    assert out.exists(), stderr
    return int(stdout)


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(shallow, converted) -> Path:
    return converted(shallow("26b-a4b", scanned=True), "maxtext", scan_layers=True)


@pytest.mark.share(2)
@pytest.mark.parametrize("seed", range(2))
def test_killed_conversions_continue(shallow, tmp_path, undisturbed, seed):
    source, out = shallow("26b-a4b", scanned=True), tmp_path / "out"
    call = f"to_native({str(source)!r}, {str(out)!r}, scan_layers=True, resume=True)"
    kill_and_resume(call, out, seed)
    good, found = (restore(folder / "0" / "items") for folder in (undisturbed, out))
    assert good.keys() == found.keys()
    assert all(same_bits(good[name], found[name]) for name in good)
    assert manifest(out) == manifest(undisturbed)
    names = {path.name for path in out.rglob("*")}
    assert not {name for name in names if "journal" in name or name.endswith(".lock")}


@pytest.mark.share(2)
@pytest.mark.parametrize("seed", range(2))
def test_killed_exports_continue(shallow, tmp_path, undisturbed, seed):
    out = tmp_path / "back"
    kill_and_resume(f"to_hf({str(undisturbed)!r}, {str(out)!r}, resume=True)", out, seed)
    assert sums(out) == sums(shallow("26b-a4b", scanned=True))


def test_damaged_parts_of_an_export_are_written_again(shallow, tmp_path, undisturbed):
    """The journal says that they are there; their checksums say that they are not."""
    out = tmp_path / "back"
    call = f"to_hf({str(undisturbed)!r}, {str(out)!r}, resume=True)"
    process = start(call)
    journal = tmp_path / ".back.partial/new" / ".gemma-convert.journal"
    while not journal.exists() or journal.read_text().count("\n") < 20:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    weights = tmp_path / ".back.partial/new" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin:] = bytes(len(data) - begin)
    weights.write_bytes(data)
    assert start(call).wait(timeout=120) == 0
    assert sums(out) == sums(shallow("26b-a4b", scanned=True))


def test_what_is_complete_is_not_read_again(shallow, tmp_path):
    out = tmp_path / "out"
    call = f"to_native({str(shallow('26b-a4b'))!r}, {str(out)!r}, resume=True)"
    process = start(call)
    journal = tmp_path / ".out.partial/new" / ".gemma-convert.journal"
    while not journal.exists() or journal.read_text().count("\n") < 60:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = journal.read_text().count("\n") - 1
    entry = json.loads(journal.read_text().splitlines()[1])
    resumed = start(call)
    reads = int(resumed.communicate(timeout=120)[0])
    whole = start(call.replace(str(out), str(tmp_path / "fresh")))
    everything = int(whole.communicate(timeout=120)[0])
    assert reads <= everything - kept
    assert entry["regions"]


@pytest.mark.share(3)
@pytest.mark.parametrize("damage", ["value", "journal", "source"])
def test_nothing_is_trusted_that_is_not_so(shallow, tmp_path, damage):
    """A damaged region is written again; another source, or another journal, starts anew."""
    import shutil

    source, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(shallow("26b-a4b"), source)
    call = f"to_native({str(source)!r}, {str(out)!r}, ocdbt=False, resume=True)"
    process = start(call)
    journal = tmp_path / ".out.partial/new" / ".gemma-convert.journal"
    while not journal.exists() or journal.read_text().count("\n") < 40:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    if damage == "value":
        entry = json.loads(journal.read_text().splitlines()[3])
        array = next(iter(entry["regions"])).replace("/", ".")
        for file in (tmp_path / ".out.partial/new" / "0" / "items" / array).iterdir():
            if file.name != ".zarray":
                file.write_bytes(bytes(file.stat().st_size))
    elif damage == "journal":
        with journal.open("a") as file:
            file.write('{"tensor": "model.language_model.norm.weight", "regions"')
    else:
        shutil.rmtree(source)
        shutil.copytree(shallow("26b-a4b", seed=1), source)
    assert start(call).wait(timeout=120) == 0
    to_native(source, tmp_path / "good")
    good, found = (restore(folder / "0" / "items") for folder in (tmp_path / "good", out))
    assert all(same_bits(good[name], found[name]) for name in good)


def test_interrupted_run_may_be_resumed_and_a_plain_one_starts_anew(shallow, tmp_path):
    out = tmp_path / "out"
    call = f"to_native({str(shallow('26b-a4b'))!r}, {str(out)!r})"
    process = start(call)
    journal = tmp_path / ".out.partial/new" / ".gemma-convert.journal"
    while not journal.exists() or journal.read_text().count("\n") < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert not out.exists()
    assert journal.exists()
    to_native(shallow("26b-a4b"), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_resume_with_nothing_to_resume_is_a_plain_run(shallow, tmp_path):
    to_native(shallow("31b"), tmp_path / "out", resume=True)
    to_hf(tmp_path / "out", tmp_path / "back", resume=True)
    assert sums(tmp_path / "back") == sums(shallow("31b"))


LEAN = {"layers": 10, "kv_shared": "omit", "text_only": True}


@pytest.mark.large
@pytest.mark.parametrize(
    ("layout", "family", "made"), [("gemma-jax", "e2b", LEAN), ("fast-llm", "26b-a4b", {})]
)
def test_killed_conversions_to_other_layouts_continue(
    tiny, converted, tmp_path, layout, family, made
):
    source, out = tiny(family, **made), tmp_path / "out"
    call = f"to_native({str(source)!r}, {str(out)!r}, layout={layout!r}, resume=True)"
    kill_and_resume(call, out, seed=1, kills=2)
    direct = converted(source, layout)
    assert not differing(arrays_of(out, layout), arrays_of(direct, layout))
    assert manifest(out) == manifest(direct)
    assert {entry.name for entry in out.iterdir()} == {entry.name for entry in direct.iterdir()}
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.share(3, 2)
@pytest.mark.parametrize(
    ("one", "two"), [("gemma-jax", "fast-llm"), ("fast-llm", "maxtext"), ("maxtext", "gemma-jax")]
)
def test_killed_conversions_between_layouts_continue(tiny, converted, tmp_path, one, two):
    """What is complete is kept: the last run reads less than a whole one does."""
    source, out = tiny("31b", layers=6), tmp_path / "out"
    native = converted(source, one)
    call = f"to_native({str(native)!r}, {str(out)!r}, layout={two!r}, resume=True)"
    process = start(call)
    journal = tmp_path / ".out.partial/new" / ".gemma-convert.journal"
    while not journal.exists() or journal.read_text().count("\n") < 40:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not out.exists()
    with pytest.raises(SourceError):
        inspect(tmp_path / ".out.partial/new")
    resumed = int(start(call).communicate(timeout=120)[0])
    whole = start(call.replace(str(out), str(tmp_path / "fresh")))
    assert resumed < int(whole.communicate(timeout=120)[0])
    direct = converted(source, two)
    for folder in (out, tmp_path / "fresh"):
        assert not differing(arrays_of(folder, two), arrays_of(direct, two))
    to_hf(out, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_damaged_tensors_of_fast_llm_are_written_again(shallow, converted, tmp_path):
    """The journal says that they are there; their checksums say that they are not."""
    source, out = shallow("26b-a4b"), tmp_path / "out"
    call = f"to_native({str(source)!r}, {str(out)!r}, layout='fast-llm', resume=True)"
    process = start(call)
    journal = tmp_path / ".out.partial/new" / ".gemma-convert.journal"
    while not journal.exists() or journal.read_text().count("\n") < 40:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    weights = tmp_path / ".out.partial/new" / "model_0.safetensors"
    data = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin:] = bytes(len(data) - begin)
    weights.write_bytes(data)
    assert start(call).wait(timeout=120) == 0
    direct = converted(source, "fast-llm")
    assert not differing(arrays_of(out, "fast-llm"), arrays_of(direct, "fast-llm"))
