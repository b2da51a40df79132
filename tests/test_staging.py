"""Output appears when complete, one run at a time, and nothing else is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_convert.checkpoint.accounted import beside_huggingface
from gemma_convert.engine import staging
from gemma_convert.engine.staging import StagedFolder
from gemma_convert.engine.target import check_apart, check_space
from gemma_convert.errors import TargetError
from gemma_convert.files.write_out import sync_folder


def build(target: Path, text: str = "new", **options) -> None:
    with StagedFolder(target, strangers=beside_huggingface, **options) as staged:
        (staged.folder / "config.json").write_text(text)
        (staged.folder / "model.safetensors").write_text(text)
        staged.publish()


def test_published_at_the_end_and_only_then(tmp_path):
    target = tmp_path / "out"
    with StagedFolder(target) as staged:
        (staged.folder / "config.json").write_text("x")
        assert not target.exists()
        staged.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), StagedFolder(tmp_path / "out") as staged:
        (staged.folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_to_be_replaced(tmp_path):
    build(tmp_path / "out", "old")
    again = StagedFolder(tmp_path / "out", overwrite=True, strangers=beside_huggingface)
    with pytest.raises(RuntimeError), again:
        raise RuntimeError
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    build(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_remains_of_a_killed_run_are_replaced(tmp_path):
    left = StagedFolder(tmp_path / "out")
    left.__enter__()
    (left.folder / "deep").mkdir()
    (left.folder / "deep" / "old").write_text("x")
    left._unlock()  # as the end of a process does
    build(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "deep").exists()


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_hidden_names_that_are_not_ours_are_left_alone(tmp_path, kind):
    taken = tmp_path / ".out.partial"
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("x")
    if kind == "file":
        taken.write_text("x")
    elif kind == "link":
        taken.symlink_to("victim")
    else:
        taken.mkdir()
        if kind == "folder":
            (taken / "precious").write_text("x")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for overwrite in (False, True):
        build(tmp_path / "out", overwrite=overwrite)
        shutil.rmtree(tmp_path / "out") if not overwrite else None
        if not overwrite:
            assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "victim" / "precious").read_text() == "x"


def test_a_name_as_long_as_the_system_takes(tmp_path):
    build(tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


class Killed(BaseException):
    """Nothing is done after it."""


def killed_at(target: Path, place: int, can_exchange: bool) -> bool:
    """Whether an overwriting run came to its end; it is killed before its `place`-th step."""
    count = 0

    def step(change):
        def changed(*arguments, **named):
            nonlocal count
            if count == place:
                raise Killed
            count += 1
            return change(*arguments, **named)

        return changed

    def gone(*_, **__):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        exchanged = staging.exchange if can_exchange else lambda one, other: False
        patch.setattr(staging, "exchange", step(exchanged))
        patch.setattr(Path, "rename", step(Path.rename))
        patch.setattr(shutil, "rmtree", step(shutil.rmtree))
        staged = StagedFolder(target, overwrite=True, strangers=beside_huggingface)
        try:
            staged.__enter__()
            for name in ("config.json", "model.safetensors"):
                (staged.folder / name).write_text("new")
            staged.publish()
        except Killed:
            return False
        finally:
            staged._unlock()
    return True


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("place", range(6))
def test_a_run_that_is_killed_while_it_replaces(tmp_path, place, can_exchange):
    """The old one or the new one stands under the name, at once or when the next run has begun."""
    target = tmp_path / "out"
    build(target, "old")
    ended = killed_at(target, place, can_exchange)
    if can_exchange:
        assert target.is_dir()
    with pytest.raises(TargetError, match="exists"):
        build(target, "third")
    texts = {path.read_text() for path in target.iterdir()}
    assert len(texts) == 1
    assert texts <= ({"new"} if ended else {"old", "new"})
    build(target, "third", overwrite=True)
    assert {path.read_text() for path in target.iterdir()} == {"third"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_into_the_old_one_meanwhile_is_not_lost(tmp_path):
    build(tmp_path / "out", "old")
    with (
        pytest.raises(TargetError, match="belongs to no checkpoint"),
        StagedFolder(tmp_path / "out", overwrite=True, strangers=beside_huggingface) as staged,
    ):
        (tmp_path / "out" / "thesis.tex").write_text("x")
        staged.publish()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_second_run_is_locked_out_and_harms_nothing(tmp_path):
    with StagedFolder(tmp_path / "out") as first:
        (first.folder / "mine").write_text("x")
        with pytest.raises(TargetError, match="Another run"), StagedFolder(tmp_path / "out"):
            pass
        code = (
            "import sys; from pathlib import Path; from gemma_convert.engine.staging import *\n"
            f"StagedFolder(Path({str(tmp_path / 'out')!r})).__enter__()"
        )
        other = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "Another run" in other.stderr
        assert (first.folder / "mine").exists()
        first.publish()
    assert (tmp_path / "out" / "mine").exists()


def test_links_and_files_are_not_replaced(tmp_path):
    real = tmp_path / "real"
    build(real)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(TargetError, match="not a folder"):
            build(tmp_path / name, overwrite=True)
    assert (real / "config.json").exists()


def test_unwritable_parent_is_a_target_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="cannot be written"):
        build(tmp_path / "file" / "out")


def test_apart(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_apart(tmp_path / "a", tmp_path / "c")
    check_apart(tmp_path / "a", tmp_path / "ab")
    for source, target in (
        ("a", "a"),
        ("a", "a/x"),
        ("a/b", "a"),
        ("a", "link/x"),
        ("link", "a/x"),
    ):
        with pytest.raises(TargetError, match="in one another"):
            check_apart(tmp_path / source, tmp_path / target)


def test_space(tmp_path):
    check_space(tmp_path / "new" / "out", 1)
    free = os.statvfs(tmp_path)
    with pytest.raises(TargetError, match="not enough space"):
        check_space(tmp_path / "new" / "out", free.f_blocks * free.f_frsize * 10)


def test_every_file_and_folder_is_synced(tmp_path, monkeypatch):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    for place in (tmp_path, deep):
        (place / "file").write_bytes(b"values")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    sync_folder(tmp_path)
    expected = [tmp_path, tmp_path / "file", tmp_path / "a", deep, deep / "file"]
    assert sorted(synced) == sorted(path.stat().st_ino for path in expected)


def test_what_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"values")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        sync_folder(tmp_path)
