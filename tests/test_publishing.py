"""What cannot be published: one message, no harm to what was there, nothing left."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from gemma_convert import TargetError, to_hf, to_native
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.accounted import beside_huggingface
from gemma_convert.engine import staging
from gemma_convert.engine.casting import Losses
from gemma_convert.engine.process_results import TransferResult, leave_part, take_part
from gemma_convert.engine.processes import Processes
from gemma_convert.engine.staging import StagedFolder
from gemma_convert.files.unfinished import LOCK
from gemma_convert.files.write_out import NewFiles


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_has_taken_the_name_meanwhile_stays(tmp_path, kind):
    target = tmp_path / "out"
    with pytest.raises(TargetError) as caught, StagedFolder(target) as staged:
        (staged.folder / "config.json").write_text("new")
        if kind == "file":
            target.write_text("theirs")
        else:
            target.mkdir()
            (target / "theirs").write_text("theirs")
        staged.publish()
    assert caught.value.what == "The finished output cannot be renamed."
    assert caught.value.where == str(target)
    assert caught.value.found == os.strerror(errno.ENOTDIR if kind == "file" else errno.ENOTEMPTY)
    assert caught.value.exit_code == 4
    assert names(tmp_path) == ["out"]
    assert (target if kind == "file" else target / "theirs").read_text() == "theirs"


def test_a_rename_that_fails_with_nothing_to_put_back(tmp_path, monkeypatch):
    def refuse(path, new):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(TargetError) as caught, StagedFolder(tmp_path / "out") as staged:
        staged.publish()
    assert caught.value.what == "The finished output cannot be renamed."
    assert caught.value.found == os.strerror(errno.EIO)
    assert names(tmp_path) == []


def old(target: Path) -> Path:
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_text("old")
    return target


@pytest.mark.parametrize("fails", ["new", "out"])
def test_what_was_to_be_replaced_comes_back(tmp_path, monkeypatch, fails):
    """A rename fails: of the new folder when the old is out of the way, or of the old itself."""
    target, rename = old(tmp_path / "out"), Path.rename

    def refuse(path, new):
        if path.name == fails:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, new)

    monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(TargetError, match="cannot be renamed") as caught,
        StagedFolder(target, overwrite=True, strangers=beside_huggingface) as staged,
    ):
        (staged.folder / "config.json").write_text("new")
        staged.publish()
    assert caught.value.found == os.strerror(errno.EBUSY)
    assert names(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == "old"


def test_a_file_system_that_has_no_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TargetError) as caught, StagedFolder(tmp_path / "out"):
        pass
    assert caught.value.what == "The target cannot be written."
    assert caught.value.found == os.strerror(errno.ENOLCK)


def test_a_process_by_itself_waits_for_nobody():
    with pytest.raises(RuntimeError), Processes() as alone:
        alone.step()
        alone.check()
        raise RuntimeError
    assert (alone.index, alone.count, alone.leads, alone.told()) == (0, 1, True, True)


def test_what_a_process_left_before_is_not_taken_for_what_it_leaves_now(tmp_path):
    """An interrupted job is continued by other processes than those that began it."""
    places, originals = np.array([3, 5]), np.array([7, 9], np.uint16)
    first = TransferResult({"a": "1"}, {"a": Losses(2, [places], [originals])})
    leave_part(tmp_path, 1, first, {"x": {((0, 2),): "one"}})
    second = TransferResult({"b": "2"}, {"a": Losses(9, whole=True)})
    leave_part(tmp_path, 1, second, {"y": {((4, 2), (0, 3)): "two"}})
    specs = {name: TensorSpec("bfloat16", (8,)) for name in "ab"}
    result, regions = take_part(tmp_path, 1, specs)
    assert result == second
    assert regions == {"y": {((4, 2), (0, 3)): "two"}}
    assert not list(tmp_path.iterdir())


def test_what_a_process_leaves_is_what_is_taken(tmp_path):
    pieces = [np.array([3]), np.array([5])], [np.array([7], "u2"), np.array([9], "u2")]
    losses = {"a": Losses(2, *pieces), "b": Losses(8, whole=True), "c": Losses(1)}
    leave_part(tmp_path, 2, TransferResult({"a": "1"}, losses), {})
    specs = {name: TensorSpec("bfloat16", (8,)) for name in "abc"}
    result, regions = take_part(tmp_path, 2, specs)
    assert (result.checksums, regions) == ({"a": "1"}, {})
    taken = result.losses
    assert [taken["a"].places[0].tolist(), taken["a"].originals[0].tolist()] == [[3, 5], [7, 9]]
    assert taken["a"].originals[0].dtype == np.uint16
    assert (taken["a"].count, taken["a"].whole) == (2, False)
    assert (taken["b"], taken["c"]) == (losses["b"], losses["c"])


def test_a_folder_that_cannot_be_cleared_does_not_lock_out_the_next_run(tmp_path, monkeypatch):
    left = tmp_path / ".out.partial"
    (left / "new" / "deep").mkdir(parents=True)
    (left / LOCK).touch()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refused(errno.EACCES))
        with pytest.raises(TargetError, match="cannot be written"), StagedFolder(tmp_path / "out"):
            pass
    assert names(tmp_path) == [".out.partial"]
    with StagedFolder(tmp_path / "out") as staged:
        staged.publish()
    assert names(tmp_path) == ["out"]


def test_a_file_system_without_locks_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refused(errno.ENOLCK))
    with pytest.raises(TargetError, match="cannot be written"), StagedFolder(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def refused(code: int):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("ocdbt", [False, True])
def test_a_file_system_that_takes_no_advice(shallow, tmp_path, monkeypatch, ocdbt):
    def refuse(*_):
        raise OSError(errno.EINVAL, "no advice is taken here")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    report = to_native(shallow("31b"), tmp_path / "native", layout="maxtext", ocdbt=ocdbt)
    assert to_hf(report.target, tmp_path / "back").bit_for_bit


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_files_of_a_library_are_written_out_once_they_are_there(tmp_path, monkeypatch):
    started: list[tuple[str, int, int]] = []

    def note(descriptor, offset, length, _):
        started.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    files = NewFiles(tmp_path / "d", ".__lock")
    files.start_write_out()
    (tmp_path / "d").mkdir()
    for names in (["a", "b.__lock"], [], ["b", "c"]):
        for name in names:
            (tmp_path / "d" / name).write_bytes(b"values")
        files.start_write_out()
    assert sorted(started) == [("a", 0, 0), ("b", 0, 0), ("c", 0, 0)]
