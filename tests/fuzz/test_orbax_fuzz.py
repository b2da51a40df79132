"""Broken Orbax folders: refused, or read alike by our own reading of chunks and by tensorstore."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from damage import STRANGE, TEXTS, altered, damaged, make_strange
from hypothesis import given
from hypothesis import strategies as st
from outcome import bounded, command, outcome, refused, share, snapshot
from seeds import KEYS, TREES

from gemma_convert.arrays.dtypes import TensorSpec, numpy_dtype
from gemma_convert.layouts.registry import open_native
from gemma_convert.mapping.region import Box
from gemma_convert.stores.orbax.finding import METADATA
from gemma_convert.stores.orbax.raw_chunks import ocdbt_places
from gemma_convert.stores.orbax.writer import OrbaxFormat, OrbaxWriter

FORMS = {
    "ocdbt zarr3": OrbaxFormat(),
    "ocdbt zarr2": OrbaxFormat(zarr3=False),
    "ocdbt zstd": OrbaxFormat(compression="zstd"),
    "files": OrbaxFormat(ocdbt=False),
    "files zstd": OrbaxFormat(ocdbt=False, compression="zstd"),
}
GENERATOR = np.random.default_rng(5)
VALUES = {
    "embedder/input_embedding": GENERATOR.standard_normal((6, 7)).astype(ml_dtypes.bfloat16),
    "layer_0/mlp/linear": GENERATOR.standard_normal((5, 4, 3)).astype(np.float32),
    "layer_0/skip_scale": np.array(1.5, np.float32),
}
CHUNKS = {"embedder/input_embedding": (3, 7), "layer_0/mlp/linear": (1, 4, 3)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """One small item folder of each form, with its files; never written to."""
    root = tmp_path_factory.mktemp("stores")
    for name, form in FORMS.items():
        writer = OrbaxWriter(root / name, form)
        writer.declare(
            {
                path: (TensorSpec(values.dtype.name, values.shape), CHUNKS.get(path, ()))
                for path, values in VALUES.items()
            }
        )
        for path, values in VALUES.items():
            writer.write(path, tuple((0, size) for size in values.shape), values).result()
        writer.write_tree({})
    return {name: root / name for name in FORMS}


def read(folder: Path) -> dict[str, np.ndarray]:
    """The arrays, as tensorstore reads them and as we do, which must be the same.

    As a plan does, it reads only those that have the shape that the model asks for.
    """
    found = {}
    with open_native(folder) as native:
        for name, spec in native.specs.items():
            path = name.removesuffix("/w")
            if path not in VALUES or spec.shape != VALUES[path].shape:
                continue
            array = native.opener(name, 0)
            box: Box = tuple((0, size) for size in spec.shape)
            theirs = array.read(box)
            ours = np.empty(spec.shape, numpy_dtype(spec.dtype))
            array.read(box, ours)
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == theirs.tobytes(), name
            found[path] = theirs
            assert native.largest_chunk([name]) <= theirs.nbytes
    return found


def check(folder: Path, *, intact: bool = False) -> None:
    """The folder is refused or read; `intact` says that its values were left alone."""
    before = snapshot(folder)
    found = outcome(lambda: read(folder))
    assert snapshot(folder) == before
    if intact and found is not None:
        for name, values in found.items():
            assert values.tobytes() == VALUES[name].tobytes()


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_whole_is_read(stores):
    for folder in stores.values():
        found = read(folder)
        assert {name: values.tobytes() for name, values in found.items()} == {
            name: values.tobytes() for name, values in VALUES.items()
        }


@share(100)
@given(st.data())
def test_files(stores, data):
    """A file whose bytes are changed, or that is gone, or is another file."""
    whole = stores[data.draw(st.sampled_from(sorted(FORMS)))]
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "store")
        shutil.copytree(whole, folder)
        names = files_of(folder)
        path = folder / data.draw(st.sampled_from(names))
        how = data.draw(st.integers(0, 5))
        if how == 0:
            path.unlink()
        elif how == 1:
            path.write_bytes((folder / data.draw(st.sampled_from(names))).read_bytes())
        else:
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        check(folder, intact=how == 0)


@share(80)
@given(st.data())
def test_trees(stores, data):
    whole = stores[data.draw(st.sampled_from(sorted(FORMS)))]
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "store")
        shutil.copytree(whole, folder)
        tree = json.loads((folder / METADATA).read_text())
        (folder / METADATA).write_bytes(data.draw(altered(tree)))
        check(folder)


@share(80)
@given(st.data())
def test_metadata_of_arrays(stores, data):
    """Shapes, chunks, dtypes and codecs that say something else than what is stored."""
    name = data.draw(st.sampled_from(["embedder.input_embedding", "layer_0.mlp.linear"]))
    form = data.draw(st.sampled_from(sorted(FORMS)))
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "store")
        shutil.copytree(stores[form], folder)
        alter_array(folder, form, name, lambda metadata: data.draw(altered(metadata)))
        check(folder)


def alter_array(folder: Path, form: str, name: str, change: Any) -> None:
    """Writes an array's metadata anew, by tensorstore itself where they stand in its store."""
    import tensorstore as ts

    if form.startswith("files"):
        path = folder / name / ".zarray"
        path.write_bytes(change(json.loads(path.read_text())))
        return
    base = {"driver": "file", "path": f"{folder}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = f"{name}/" + ("zarr.json" if FORMS[form].uses_zarr3 else ".zarray")
    store[key] = change(json.loads(store[key]))


ABSURD = ([1 << 40, 1 << 20], [1 << 62, 1 << 62], [1, 1 << 40], [0, 0], [-1, 7], [6], [6, 7, 1])


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("key", ["shape", "chunks"])
@pytest.mark.parametrize("sizes", ABSURD)
def test_absurd_sizes(stores, tmp_path, form, key, sizes):
    shutil.copytree(stores[form], tmp_path / "store")

    def change(metadata: dict[str, Any]) -> bytes:
        if key == "chunks" and "chunk_grid" in metadata:
            metadata["chunk_grid"]["configuration"]["chunk_shape"] = sizes
        else:
            metadata[key] = sizes
        return json.dumps(metadata).encode()

    alter_array(tmp_path / "store", form, "embedder.input_embedding", change)
    check(tmp_path / "store")


@pytest.mark.share(3)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_file_that_is_no_file(stores, tmp_path, form):
    for number, (name, kind) in enumerate(
        (name, kind) for name in files_of(stores[form]) for kind in STRANGE
    ):
        folder = tmp_path / str(number)
        shutil.copytree(stores[form], folder)
        make_strange(folder / name, kind)
        check(folder, intact=True)


def test_a_chunk_that_is_gone_is_not_zero(stores, tmp_path):
    """tensorstore takes it for a chunk of zeros; Orbax writes all, and says so in its metadata."""
    shutil.copytree(stores["files"], tmp_path / "store")
    (tmp_path / "store" / "layer_0.mlp.linear" / "2.0.0").unlink()
    assert "layer_0/mlp/linear" in refused(lambda: read(tmp_path / "store"))
    tree = json.loads((tmp_path / "store" / METADATA).read_text())
    del tree["store_array_data_equal_to_fill_value"]
    (tmp_path / "store" / METADATA).write_text(json.dumps(tree))
    found = outcome(lambda: read(tmp_path / "store"))
    assert not found["layer_0/mlp/linear"][2].any()


def test_nodes_that_go_in_a_cycle(stores, monkeypatch):
    """A node of an OCDBT tree that is its own child is not followed without end."""
    import tensorstore as ts

    class Dump:
        def __init__(self, _, node: str | None = None) -> None:
            self.node = node

        def result(self) -> dict[str, Any]:
            child = {"location": "btreenode::d/x:0:4", "subtree_common_prefix": b"x", "key": b""}
            root = {"root": {"location": "btreenode::d/x:0:4"}}
            return {"versions": [root]} if self.node is None else {"entries": [child]}

    monkeypatch.setattr(ts.ocdbt, "dump", Dump)
    with bounded():
        assert ocdbt_places(stores["ocdbt zarr3"]) == {}


@pytest.mark.parametrize("form", ["files", "ocdbt zarr2"])
def test_every_length(stores, tmp_path, form):
    for name in files_of(stores[form]):
        size = (stores[form] / name).stat().st_size
        for length in sorted({0, 1, 4, 12, size // 2, size - 9, size - 1} & set(range(size))):
            folder = tmp_path / f"{name.replace('/', ' ')} {length}"
            shutil.copytree(stores[form], folder)
            os.truncate(folder / name, length)
            check(folder)


@pytest.mark.parametrize("tree", TREES)
def test_trees_that_found_something(stores, tmp_path, tree):
    shutil.copytree(stores["files"], tmp_path / "store")
    (tmp_path / "store" / METADATA).write_bytes(tree)
    refused(lambda: read(tmp_path / "store"))


@pytest.mark.parametrize("key", [*TEXTS, *KEYS])
@pytest.mark.parametrize("place", [0, -1])
def test_no_key_leads_elsewhere(stores, tmp_path, key, place):
    """An array beside the folder is not read, whatever the keys of the tree are."""
    shutil.copytree(stores["files"], tmp_path / "store")
    shutil.copytree(stores["files"] / "layer_0.mlp.linear", tmp_path / "secret")
    tree = json.loads((tmp_path / "store" / METADATA).read_text())
    leaves = tree["tree_metadata"]
    keys = [{"key": "layer_0", "key_type": 2}, {"key": "x", "key_type": 2}]
    keys[place] = {"key": key, "key_type": 2}
    leaves["x"] = {"key_metadata": keys, "value_metadata": {"value_type": "np.ndarray"}}
    if place:
        leaves["y"] = {**leaves["x"], "key_metadata": keys[-1:]}
    (tmp_path / "store" / METADATA).write_text(json.dumps(tree))
    refused(lambda: read(tmp_path / "store"))


@pytest.mark.parametrize("error", [13, 5])
def test_a_tree_that_the_system_does_not_open(stores, monkeypatch, error):
    def fail(*_, **__):
        raise OSError(error, os.strerror(error), "somewhere")

    for module, name in ((os, "open"), (os, "scandir")):
        with monkeypatch.context() as patch, bounded():
            patch.setattr(module, name, fail)
            assert os.strerror(error) in refused(lambda: read(stores["files"]))


@share(6, cost=30)
@given(st.data())
def test_inspect(stores, data):
    whole = stores[data.draw(st.sampled_from(sorted(FORMS)))]
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "store")
        shutil.copytree(whole, folder)
        tree = json.loads((folder / METADATA).read_text())
        (folder / METADATA).write_bytes(data.draw(altered(tree)))
        before = snapshot(Path(outer))
        command("inspect", folder)
        command("to-hf", folder, Path(outer, "out"), codes=(3,))
        assert snapshot(Path(outer)) == before
