"""Stores that fail, or stand on systems that lack something, and what is said of them."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from native_checkpoints import sums

from gemma_convert import SourceError, TargetError, to_hf, to_native
from gemma_convert.arrays.checksums import checksum
from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.checkpoint.original import open_original
from gemma_convert.checkpoint.safetensors_layout import SafetensorsStore
from gemma_convert.mapping import plan as planning
from gemma_convert.stores.orbax.reader import read_orbax_tree
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.safetensors.writer import SafetensorsWriter, output_shard

SPEC = TensorSpec("float32", (6, 4))
VALUES = np.arange(24, dtype=np.float32).reshape(SPEC.shape)
BOX = ((0, 6), (0, 4))


def written(folder: Path, name: str, part: int = 0, **options) -> OrbaxWriter:
    writer = OrbaxWriter(folder, OrbaxFormat(**options), part)
    writer.declare({name: (SPEC, SPEC.shape)})
    writer.write(name, BOX, VALUES).result()
    return writer


@pytest.mark.parametrize("damage", ["cut", "no store"])
def test_a_part_that_cannot_be_read_is_not_left_out(tmp_path, damage):
    leader = written(tmp_path, "a")
    written(tmp_path, "b", part=1)
    manifest = tmp_path / "ocdbt.process_1" / "manifest.ocdbt"
    data = manifest.read_bytes()
    manifest.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(len(data)))
    with pytest.raises(TargetError) as caught:
        leader.merge(2)
    assert caught.value.what == "The target cannot be written."
    assert caught.value.where == str(tmp_path)
    assert str(manifest) in caught.value.found


def test_parts_are_merged(tmp_path):
    leader = written(tmp_path, "a")
    written(tmp_path, "b", part=1)
    leader.merge(2)
    leader.declare({"b": (SPEC, SPEC.shape)})
    assert leader.holds("b", {BOX: checksum(VALUES)})
    assert leader.regions["b"] == {BOX: checksum(VALUES)}


@pytest.mark.parametrize("data", [b"", b"short", bytes(96)])
def test_a_damaged_chunk_does_not_count_as_written(tmp_path, data):
    written(tmp_path, "a", ocdbt=False)
    again = OrbaxWriter(tmp_path, OrbaxFormat(ocdbt=False))
    again.declare({"a": (SPEC, SPEC.shape)})
    assert again.holds("a", {BOX: checksum(VALUES)})
    again.regions.clear()
    (tmp_path / "a" / "0.0").write_bytes(data)
    assert not again.holds("a", {BOX: checksum(VALUES)})
    assert not again.regions


def test_a_folder_that_is_no_orbax_tree(tmp_path):
    with pytest.raises(SourceError, match="metadata is missing") as caught:
        read_orbax_tree(tmp_path)
    assert caught.value.where == str(tmp_path / "_METADATA")


@pytest.mark.parametrize("spoiled", ["missing", "broken"])
def test_an_original_without_a_config_is_closed_again(shallow, converted, tmp_path, spoiled):
    original = shutil.copytree(shallow("31b"), tmp_path / "hf")
    (original / "config.json").unlink()
    if spoiled == "broken":
        (original / "config.json").write_text("{")
    native = converted(shallow("31b"), "maxtext")
    closed, close = [], SafetensorsFolder.close

    def noted(self):
        closed.append(self.folder)
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFolder, "close", noted)
        with pytest.raises(SourceError, match=r"config\.json"):
            open_original(native, original)
    assert closed == [original]
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        to_hf(native, tmp_path / "back", like=original)
    assert caught.value.where == str(original / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_that_is_not_at_hand(shallow, converted):
    """A sidecar has the carried tensors alone; a Hugging Face folder has all of its own."""
    source = shallow("31b")
    native = converted(source, "fast-llm")
    name = "model.language_model.norm.weight"
    with open_original(native, None) as kept, open_original(native, source) as whole:
        assert name in kept.specs
        assert not kept.holds(name)
        assert whole.holds(name)
        assert whole.read_box(name, ((0, 4),)).shape == (4,)
        with pytest.raises(SourceError, match="neither in the native checkpoint nor") as caught:
            kept.read_box(name, ((0, 4),))
        assert caught.value.found == name


def test_systems_that_cannot_reserve_space(shallow, converted, tmp_path, monkeypatch):
    """macOS has no posix_fallocate."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    source = shallow("31b")
    to_hf(converted(source, "maxtext"), tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize(
    ("writer", "layout"), [(OrbaxWriter, "maxtext"), (SafetensorsStore, "fast-llm")]
)
@pytest.mark.parametrize("gathered", [False, True])
def test_a_write_that_fails_at_once(shallow, tmp_path, monkeypatch, writer, layout, gathered):
    if not gathered:
        monkeypatch.setattr(planning, "GATHER_BYTES", 0)

    def refuse(self, name, box, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write", refuse)
    with pytest.raises(TargetError) as caught:
        to_native(shallow("31b"), tmp_path / "out", layout=layout)
    assert caught.value.what == "The target cannot be written."
    assert caught.value.found == os.strerror(errno.ENOSPC)
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_not_there_is_not_taken_as_empty(tmp_path):
    leader = written(tmp_path, "a")
    written(tmp_path, "b", part=1)
    (tmp_path / "ocdbt.process_1" / "manifest.ocdbt").unlink()
    with pytest.raises(TargetError, match="another process has written is not there"):
        leader.merge(2)


@pytest.fixture
def open_files():
    """open_files(folder): files below it that this process has open, deleted ones too."""
    if sys.platform != "linux":
        pytest.skip("only Linux says which files are open")

    def found(folder: Path) -> list[str]:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        names = [str(link.readlink()) for link in links]
        return [name for name in names if name.startswith(str(folder))]

    return found


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_conversion_lets_go_of_its_files(tmp_path, tiny, monkeypatch, open_files):
    monkeypatch.setattr(SafetensorsStore, "write", full)
    with pytest.raises(TargetError, match="cannot be written") as caught:
        to_native(tiny("31b", layers=6), tmp_path / "out", layout="fast-llm")
    assert caught.value.found == os.strerror(errno.ENOSPC)
    assert open_files(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_space_that_cannot_be_reserved_is_let_go(tmp_path, monkeypatch, open_files):
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        SafetensorsWriter(tmp_path, [output_shard("model.safetensors", {"a": SPEC})])
    assert open_files(tmp_path) == []


def test_a_broken_sidecar_is_let_go(tmp_path, tiny, converted, open_files):
    folder = tmp_path / "out"
    shutil.copytree(converted(tiny("e2b"), "maxtext"), folder)
    (folder / "hf" / "config.json").write_text("{}")
    with pytest.raises(SourceError):
        open_original(folder, None)
    assert open_files(tmp_path) == []
