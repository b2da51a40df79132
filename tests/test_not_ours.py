"""What we did not write stays, also where it looks like what we write."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma_convert import TargetError, to_hf, to_native
from gemma_convert.checkpoint.accounted import beside_huggingface
from gemma_convert.engine import staging
from gemma_convert.engine.staging import StagedFolder
from gemma_convert.engine.target import check_target
from gemma_convert.files import receipt


def state(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder, by content."""
    return {
        str(p.relative_to(folder)): str(p.readlink())
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else "folder"
        for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def native(shallow, converted) -> Path:
    return converted(shallow("31b", text_only=True), "gemma-jax")


@pytest.fixture(scope="module")
def export(native, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    to_hf(native, out)
    return out


def copied(folder: Path, out: Path) -> Path:
    """A copy with times and attributes, as `cp -a` makes it."""
    return Path(shutil.copytree(folder, out))


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_somebodys_weights_under_the_same_names_stay(shallow, native, tmp_path, dtype):
    """The same files, names, shapes and sizes: only the values are somebody's own."""
    out = copied(shallow("31b", text_only=True, seed=1), tmp_path / "out")
    before = state(tmp_path)
    with pytest.raises(TargetError, match="not an unchanged export") as caught:
        to_hf(native, out, overwrite=True, dtype=dtype)
    assert caught.value.exit_code == 4
    assert state(tmp_path) == before


@pytest.mark.parametrize("change", ["weights", "config", "nothing"])
def test_an_export_that_was_changed_stays(native, export, tmp_path, change):
    out = copied(export, tmp_path / "out")
    assert receipt.has_receipt(out)
    if change == "weights":
        path = out / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif change == "config":
        (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    before = state(out)
    if change == "nothing":
        to_hf(native, out, overwrite=True, dtype="float32")
        assert state(out).keys() == before.keys() and state(out) != before
        to_hf(native, out, overwrite=True)
    else:
        with pytest.raises(TargetError, match="not an unchanged export"):
            to_hf(native, out, overwrite=True)
    assert state(out) == before


def test_without_attributes_only_the_same_is_replaced(native, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", refuse)
    out = tmp_path / "out"
    to_hf(native, out)
    assert not receipt.has_receipt(out)
    before = state(out)
    to_hf(native, out, overwrite=True)
    assert state(out) == before
    with pytest.raises(TargetError, match="not an unchanged export"):
        to_hf(native, out, overwrite=True, dtype="float32")
    assert state(out) == before


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_was_added_to_a_target_is_there_afterwards(
    shallow, native, export, tmp_path_factory, data
):
    """Any entries at any depth, any command and options: what was there is there, bit for bit."""
    outer = tmp_path_factory.mktemp("added")
    old = copied(data.draw(st.sampled_from([native, export])), outer / "out")
    inside = st.sampled_from(["", *(str(p.relative_to(old)) for p in old.rglob("*") if p.is_dir())])
    name = st.sampled_from(["thesis.tex", ".git", "100", "model.bin", "0", "hf", "ocdbt", ".x"])
    kinds = st.sampled_from(["file", "folder", "empty", "link"])
    places = data.draw(st.lists(st.tuples(inside, name), min_size=1, max_size=3))
    added = [add(old.joinpath(*place), data.draw(kinds)) for place in places]
    assume(any(added))
    add(outer / ".out.partial", data.draw(kinds))
    before = state(outer)
    options = {name: data.draw(st.booleans()) for name in ("overwrite", "resume")}
    command = data.draw(st.sampled_from(["to_hf", "to_native", "relayout"]))
    try:
        if command == "to_hf":
            report = to_hf(native, old, **options)
        elif command == "to_native":
            report = to_native(shallow("31b", text_only=True), old, layout="fast-llm", **options)
        else:
            report = to_native(native, old, layout="maxtext", **options)
        assert report.already_complete
    except TargetError as error:
        assert error.exit_code == 4
    assert state(outer) == before
    shutil.rmtree(outer)


def add(path: Path, kind: str) -> bool:
    """Whether something was added: not where something is already."""
    if os.path.lexists(path):
        return False
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to("/")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "deep").mkdir()
            (path / "deep" / "precious").write_text("precious")
    return True


def old_one(target: Path, text: str = "old") -> Path:
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_text(text)
    return target


def replace(target: Path) -> None:
    with StagedFolder(target, overwrite=True, strangers=beside_huggingface) as staged:
        for name in ("config.json", "model.safetensors"):
            (staged.folder / name).write_text("new")
        staged.publish()


def test_the_old_one_stays_where_its_name_was_taken_between_the_renames(tmp_path, monkeypatch):
    """Neither rename can be done: the old one is in the hidden folder, and is never removed."""
    target, rename = old_one(tmp_path / "out"), Path.rename

    def taken(path, new):
        moved = rename(path, new)
        if path == target:
            target.mkdir()
            (target / "theirs").write_text("theirs")
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(staging, "exchange", lambda one, other: False)
        patch.setattr(Path, "rename", taken)
        with pytest.raises(TargetError, match="something else has its name") as caught:
            replace(target)
    kept = tmp_path / ".out.partial" / "old"
    assert str(kept) in str(caught.value.found)
    for _ in range(2):
        assert {path.read_text() for path in kept.iterdir()} == {"old"}
        assert (target / "theirs").read_text() == "theirs"
        with pytest.raises(TargetError, match="something else has its name"):
            replace(target)
    shutil.rmtree(target)
    replace(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.read_text() for path in target.iterdir()} == {"new"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_comes_into_the_old_one_at_the_last_moment_is_not_lost(
    tmp_path, monkeypatch, can_exchange
):
    target, exchange = old_one(tmp_path / "out"), staging.exchange
    late = iter([target])

    def exchanged(one, other):
        for folder in late:
            (folder / "thesis.tex").write_text("x")
        return can_exchange and exchange(one, other)

    monkeypatch.setattr(staging, "exchange", exchanged)
    with pytest.raises(TargetError, match="belongs to no checkpoint") as caught:
        replace(target)
    assert (caught.value.where, caught.value.found) == (str(target), "thesis.tex")
    assert (target / "thesis.tex").read_text() == "x"
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_cannot_be_read_is_a_message(tmp_path):
    def refuse(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    old_one(tmp_path / "out")
    with pytest.raises(TargetError, match="cannot be read") as caught:
        check_target(tmp_path / "out", overwrite=True, strangers=refuse)
    assert caught.value.found == os.strerror(errno.EACCES)
