"""Broken manifests, kept headers, kept values and journals: refused, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from damage import STRANGE, altered, damaged, make_strange
from hypothesis import given
from hypothesis import strategies as st
from outcome import bounded, command, outcome, refused, share, snapshot
from seeds import JOURNALS, MANIFESTS

from gemma_convert import to_hf, to_native, verify
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint import sidecar
from gemma_convert.checkpoint.manifest import read_manifest
from gemma_convert.checkpoint.original import read_exceptions
from gemma_convert.engine.journal import NAME, Journal
from gemma_convert.engine.staging import StagedFolder, staged_folder
from gemma_convert.errors import GemmaConvertError, TargetError
from gemma_convert.files.unfinished import LOCK
from gemma_convert.mapping import plan as planning
from gemma_convert.stores.safetensors.header import write_safetensors
from gemma_convert.tasks import conversion_sidecar

OWN = Path("hf", "gemma-convert")
SPECS = {"a": TensorSpec("float32", (40,)), "b": TensorSpec("bfloat16", (3, 4))}
EXCEPTIONS = {
    "a/index": np.array([0, 7, 39]),
    "a/bits": np.array([1, 2, 3], np.uint32),
    "b/index": np.array([11]),
    "b/bits": np.array([5], np.uint16),
}


@pytest.fixture(scope="module")
def native(tiny, converted) -> Path:
    """A small conversion with a sidecar; never written to."""
    return converted(tiny("31b", text_only=True), "gemma-jax")


def small(manifest: dict) -> dict:
    """A manifest with few entries of each kind, so that every kind is hit."""
    few = {key: dict(list(manifest[key].items())[:3]) for key in ("tensors", "regions")}
    return manifest | few


@share(60)
@given(st.data())
def test_manifests(native, data):
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / OWN
        folder.mkdir(parents=True)
        manifest = small(json.loads((native / OWN / "manifest.json").read_text()))
        (folder / "manifest.json").write_bytes(data.draw(altered(manifest)))
        outcome(lambda: read_manifest(Path(outer), damaged=True))


@share(8, cost=30)
@given(st.data())
def test_commands_with_a_changed_sidecar(native, data):
    """What comes back from a changed sidecar is refused, or whole, and nothing else is written."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "native")
        shutil.copytree(native, folder)
        path = folder / OWN / data.draw(st.sampled_from(["manifest.json", "header"]))
        if path.name == "header":
            path = next((folder / OWN / "headers").iterdir())
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        else:
            manifest = json.loads(path.read_text())
            few = {key: manifest[key] for key in manifest if key != "regions"}
            path.write_bytes(data.draw(altered(few)))
        before = snapshot(Path(outer))
        command("inspect", folder)
        command("verify", folder, codes=(0, 1, 3))
        assert snapshot(Path(outer)) == before
        code, _ = command("to-hf", folder, Path(outer, "back"))
        after = snapshot(Path(outer))
        assert {name: state for name, state in after.items() if name in before} == before
        assert all(name.split("/")[0] == "back" and not code for name in after.keys() - before)


@pytest.mark.parametrize("changes", MANIFESTS)
def test_manifests_that_found_something(native, tmp_path, changes):
    shutil.copytree(native, tmp_path / "native")
    path = tmp_path / "native" / OWN / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    before = snapshot(tmp_path)
    for name in ("inspect", "verify"):
        assert command(name, tmp_path / "native")[0] == 3
    assert command("to-hf", tmp_path / "native", tmp_path / "back")[0] == 3
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["manifest.json", "headers/model.safetensors.header"])
def test_what_is_no_file(native, tmp_path, name, kind):
    shutil.copytree(native, tmp_path / "native")
    make_strange(tmp_path / "native" / OWN / name, kind)
    refused(lambda: to_hf(tmp_path / "native", tmp_path / "back"))


def test_a_header_with_another_length(native, tmp_path):
    """The length word is what is exported, so it must be that of the header."""
    shutil.copytree(native, tmp_path / "native")
    path = tmp_path / "native" / OWN / "headers" / "model.safetensors.header"
    content = path.read_bytes()
    path.write_bytes((len(content) - 9).to_bytes(8, "little") + content[8:])
    refused(lambda: to_hf(tmp_path / "native", tmp_path / "back"))


@share(60)
@given(st.data())
def test_exceptions(data):
    """Index and bits: of a tensor, as many as each other, and inside it."""
    arrays = dict(EXCEPTIONS)
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        array = arrays.pop(name)
        how = data.draw(st.integers(0, 4))
        if how == 1:
            arrays[data.draw(st.sampled_from(["c/index", "a", "/bits", "b/bits/x"]))] = array
        elif how == 2:
            arrays[name] = array.astype(data.draw(st.sampled_from(["u1", "<i8", "<f4", "?"])))
        elif how == 3:
            arrays[name] = array.reshape(data.draw(st.sampled_from([(1, -1), (-1, 1)])))
        elif how == 4:
            arrays[name] = np.append(array, array.dtype.type(data.draw(st.integers(0, 200))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, sidecar.EXCEPTIONS)
        write_safetensors(path, arrays)
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        for name, (index, kept) in (
            outcome(lambda: read_exceptions(Path(folder), SPECS)) or {}
        ).items():
            assert kept.dtype.itemsize == SPECS[name].itemsize
            assert index.shape == kept.shape
            assert all(0 <= place < SPECS[name].size for place in index)


@pytest.mark.parametrize("place", [-1, 40, 1 << 40, -(1 << 63)])
def test_exceptions_beyond_their_tensor(tmp_path, place):
    arrays = {"a/index": np.array([0, place]), "a/bits": np.array([1, 2], np.uint32)}
    write_safetensors(tmp_path / sidecar.EXCEPTIONS, arrays)
    refused(lambda: read_exceptions(tmp_path, SPECS))


def test_exceptions_of_one_number(tmp_path):
    arrays = {"a/index": np.array(3), "a/bits": np.array(1, np.uint32)}
    write_safetensors(tmp_path / sidecar.EXCEPTIONS, arrays)
    refused(lambda: read_exceptions(tmp_path, SPECS))


LINES = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in [{"key": "k"}, {"tensor": "a", "regions": {}}, {"tensor": "b"}, {"array": "\x85"}]
)


def check_journal(content: bytes) -> None:
    """A journal is read up to the first line that is not whole, and goes on after it."""
    with tempfile.TemporaryDirectory() as folder, bounded():
        path = Path(folder, NAME)
        path.write_bytes(content)
        journal = Journal(Path(folder), "k")
        found = list(journal.entries)
        journal.add({"tensor": "new"})
        journal.close()
        again = Journal(Path(folder), "k")
        again.close()
        assert again.entries == [*found, {"tensor": "new"}]


@share(150)
@given(damaged(LINES) | altered({"key": "k", "x": [1, {"y": 2}]}).map(lambda line: line + b"\n"))
def test_journals(content):
    check_journal(content)


@pytest.mark.parametrize("content", JOURNALS)
def test_journals_that_found_something(content):
    check_journal(content)


@pytest.mark.parametrize("kind", [*STRANGE, "link"])
def test_a_planted_journal_is_not_written_through(tmp_path, kind):
    (tmp_path / "elsewhere").write_bytes(LINES)
    (tmp_path / "out").mkdir()
    if kind == "link":
        (tmp_path / "out" / NAME).symlink_to("../elsewhere")
    else:
        make_strange(tmp_path / "out" / NAME, kind)
    with bounded():
        try:
            journal = Journal(tmp_path / "out", "k")
        except OSError:
            assert kind == "folder"
        else:
            assert not journal.entries
            journal.add({"tensor": "a"})
            journal.close()
    assert (tmp_path / "elsewhere").read_bytes() == LINES


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "link", "linked folder"])
@pytest.mark.parametrize("place", [NAME, "0", "0/items", "hf", "model.safetensors"])
def test_links_in_an_unfinished_output_are_refused(tmp_path, kind, place):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"mine")
    folder = staged_folder(tmp_path / "out")
    planted = folder / place
    planted.parent.mkdir(parents=True)
    (folder.parent / LOCK).touch()
    if "link" in kind and kind != "dangling link":
        planted.symlink_to(tmp_path / "elsewhere" / ("file" if kind == "link" else ""))
    else:
        make_strange(planted, kind)
    before = snapshot(tmp_path / "elsewhere")

    def resume() -> None:
        with StagedFolder(tmp_path / "out", resume=True):
            raise AssertionError("it was taken")

    for _ in range(2):
        assert "link or a pipe" in refused(resume, code=4)
    with StagedFolder(tmp_path / "out") as staged:
        staged.publish()
    assert snapshot(tmp_path / "elsewhere") == before


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@share(3, cost=150)
@given(st.data())
def test_a_run_resumed_with_a_broken_journal(tiny, monkeypatch, data):
    """What a broken journal says is not believed: the result is the same, or a clear error."""
    source = tiny("31b", text_only=True)
    monkeypatch.setattr(planning, "GATHER_BYTES", 2_000)  # smaller tensors are not noted
    with tempfile.TemporaryDirectory() as outer:
        out = Path(outer, "out")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(conversion_sidecar, "write_manifest", stop)
            to_native(source, out, layout="gemma-jax")
        path = staged_folder(out) / NAME
        key, *lines = path.read_bytes().splitlines(keepends=True)
        assert lines
        how = data.draw(st.integers(0, len(lines) - 1))
        entry = altered(json.loads(lines[how])) if data.draw(st.booleans()) else damaged(lines[how])
        lines[how] = data.draw(entry)
        path.write_bytes(key + b"".join(lines))
        with bounded(20):
            try:
                to_native(source, out, layout="gemma-jax", resume=True)
            except GemmaConvertError as error:
                assert error.exit_code == TargetError.exit_code, repr(error)
                return
            assert to_hf(out, Path(outer, "back")).bit_for_bit
        assert snapshot(Path(outer, "back")) == snapshot(source)


def test_names_of_other_files_that_are_no_text(tiny, tmp_path):
    """A file whose name is not UTF-8 is carried, and comes back."""
    source = tmp_path / "source"
    shutil.copytree(tiny("31b", text_only=True), source)
    (source / os.fsdecode(b"note\xff.txt")).write_text("x")
    (source / os.fsdecode(b"old\xff.bin")).write_text("y")
    with bounded(20):
        to_native(source, tmp_path / "out", layout="gemma-jax")
        assert verify(tmp_path / "out").passed
        assert to_hf(tmp_path / "out", tmp_path / "back").bit_for_bit
    assert (tmp_path / "back" / os.fsdecode(b"note\xff.txt")).read_text() == "x"
