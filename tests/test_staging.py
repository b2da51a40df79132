"""Output appears when complete, one run at a time, and nothing else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_convert.errors import TargetError
from gemma_convert.stores.staging import StagedFolder, check_apart, check_space


def build(target: Path, text: str = "new", **options) -> None:
    with StagedFolder(target, **options) as staged:
        (staged.folder / "config.json").write_text(text)
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
    with pytest.raises(RuntimeError), StagedFolder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    build(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_remains_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / ".out.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".out.partial" / "deep" / "old").write_text("x")
    build(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_second_run_is_locked_out_and_harms_nothing(tmp_path):
    with StagedFolder(tmp_path / "out") as first:
        (first.folder / "mine").write_text("x")
        with pytest.raises(TargetError, match="Another run"), StagedFolder(tmp_path / "out"):
            pass
        code = (
            "import sys; from pathlib import Path; from gemma_convert.stores.staging import *\n"
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


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (tmp_path / ".out.partial").symlink_to(victim)
    with pytest.raises(TargetError):
        build(tmp_path / "out")
    assert (victim / "precious").read_text() == "x"


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
