"""Chunks read straight from their files, against tensorstore's own reading."""

from __future__ import annotations

import itertools
import os

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from gemma_convert import to_hf, to_native
from gemma_convert.mapping.region import contiguous
from gemma_convert.stores.orbax import raw_chunks as module
from gemma_convert.stores.orbax.raw_chunks import Place, ocdbt_places, raw_chunks

SHAPE, CHUNK = (5, 6, 7), (2, 3, 7)


def store(folder, values, chunk, *, ocdbt, zarr3, name="a.b", **metadata):
    kvstore = {"driver": "file", "path": f"{folder}/{name}/"}
    if ocdbt:
        base = {"driver": "file", "path": f"{folder}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        kvstore["config"] = {"max_inline_value_bytes": 1}
    if zarr3:
        grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
        metadata = {"data_type": values.dtype.name, "chunk_grid": grid} | metadata
    else:
        dtype = values.dtype.name if values.dtype == ml_dtypes.bfloat16 else values.dtype.str
        metadata = {"dtype": dtype, "chunks": list(chunk), "compressor": None} | metadata
    spec = {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": kvstore,
        "metadata": {"shape": list(values.shape)} | metadata,
        "store_data_equal_to_fill_value": True,
    }
    array = ts.open(spec, open=True, create=True).result()
    array.write(values).result()
    return array


def raw(folder, array, ocdbt, name="a.b"):
    places = ocdbt_places(folder) if ocdbt else None
    metadata = array.spec().to_json()["metadata"]
    return raw_chunks(folder, name, metadata, array.dtype.numpy_dtype.itemsize, places)


def counted(shape, dtype=np.int32):
    return np.arange(1, np.prod(shape) + 1).reshape(shape).astype(dtype)


FORMS = list(itertools.product([False, True], [False, True]))


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMS)
@pytest.mark.parametrize("dtype", [np.int32, np.float64, ml_dtypes.bfloat16])
def test_every_box_is_right_or_left_to_tensorstore(tmp_path, ocdbt, zarr3, dtype):
    """Bytes of the values, chunks that reach beyond the shape among them."""
    values = counted(SHAPE, dtype)
    chunks = raw(tmp_path, store(tmp_path, values, CHUNK, ocdbt=ocdbt, zarr3=zarr3), ocdbt)
    spans = [[(a, b - a) for a in range(n) for b in range(a + 1, n + 1)] for n in SHAPE]
    done = 0
    for box in itertools.product(*spans):
        into = np.zeros([length for _, length in box], dtype)
        if chunks.read(box, into):
            where = tuple(slice(start, start + length) for start, length in box)
            assert into.tobytes() == values[where].tobytes(), box
            done += 1
    whole = [box for box in itertools.product(*spans) if box[2] == (0, 7)]
    assert done > len(whole) / 3


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMS)
def test_whole_chunks_are_read_raw(tmp_path, ocdbt, zarr3):
    values = counted((6, 4, 5))
    chunks = raw(tmp_path, store(tmp_path, values, (2, 4, 5), ocdbt=ocdbt, zarr3=zarr3), ocdbt)
    for box in (((0, 2), (0, 4), (0, 5)), ((2, 4), (0, 4), (0, 5)), ((0, 6), (0, 4), (0, 5))):
        into = np.zeros([length for _, length in box], np.int32)
        assert chunks.read(box, into)
        assert (into == values[box[0][0] : sum(box[0])]).all()


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("zarr3", [False, True])
def test_separators(tmp_path, zarr3, separator):
    values = counted(SHAPE)
    encoding = {"name": "default", "configuration": {"separator": separator}}
    metadata = {"chunk_key_encoding": encoding} if zarr3 else {"dimension_separator": separator}
    array = store(tmp_path, values, CHUNK, ocdbt=False, zarr3=zarr3, **metadata)
    into = np.zeros((2, 3, 7), np.int32)
    assert raw(tmp_path, array, False).read(((2, 2), (3, 3), (0, 7)), into)
    assert (into == values[2:4, 3:6]).all()


@pytest.mark.parametrize(
    ("zarr3", "metadata"),
    [
        (False, {"compressor": {"id": "zstd", "level": 1}}),
        (False, {"order": "F"}),
        (False, {"dtype": ">i4"}),
        (True, {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}),
        (True, {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, "crc32c"]}),
        (True, {"chunk_key_encoding": {"name": "v2"}}),
    ],
)
def test_what_is_not_plain_is_left_to_tensorstore(tmp_path, zarr3, metadata):
    array = store(tmp_path, counted(SHAPE), CHUNK, ocdbt=False, zarr3=zarr3, **metadata)
    assert raw(tmp_path, array, False) is None


def test_scalars_and_empty_arrays_are_left_to_tensorstore(tmp_path):
    for name, shape, chunk in (("a", (), ()), ("b", (0, 3), (1, 3))):
        array = store(tmp_path, counted(shape), chunk, ocdbt=False, zarr3=False, name=name)
        assert raw(tmp_path, array, False, name) is None


def test_broken_chunks_are_left_to_tensorstore(tmp_path):
    array = store(tmp_path, counted((4, 3)), (2, 3), ocdbt=False, zarr3=False)
    chunks, into = raw(tmp_path, array, False), np.zeros((2, 3), np.int32)
    (tmp_path / "a.b" / "0.0").unlink()
    assert not chunks.read(((0, 2), (0, 3)), into)
    os.truncate(tmp_path / "a.b" / "1.0", 23)
    assert not chunks.read(((2, 2), (0, 3)), into)
    os.truncate(tmp_path / "a.b" / "1.0", 25)
    assert not chunks.read(((2, 2), (0, 3)), into)


def test_a_truncated_data_file_is_left_to_tensorstore(tmp_path):
    array = store(tmp_path, counted((400, 3)), (400, 3), ocdbt=True, zarr3=True)
    chunks = raw(tmp_path, array, True)
    (place,) = [place for key, place in chunks.places.items() if "/c/" in key]
    os.truncate(tmp_path / place.file, place.offset + 100)
    assert not chunks.read(((0, 400), (0, 3)), np.zeros((400, 3), np.int32))


def test_every_key_of_a_deep_tree_is_placed(tmp_path):
    """Nodes of a few entries, so that the tree is several levels high, and small values inline."""
    config = {"max_decoded_node_bytes": 400, "max_inline_value_bytes": 8}
    base = {"driver": "file", "path": f"{tmp_path}/"}
    kvstore = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    values = {f"layer_{n % 7}.weight/c/{n}": b"%d" % n * n for n in range(200)}
    for key, value in values.items():
        kvstore[key] = value
    places = ocdbt_places(tmp_path)
    assert set(places) == {key for key, value in values.items() if len(value) > 8}
    for key, place in places.items():
        stop = place.offset + place.length
        assert (tmp_path / place.file).read_bytes()[place.offset : stop] == values[key], key


@pytest.mark.parametrize(
    "location",
    [
        "value:../:d/x:0:4",
        "value::../x:0:4",
        "value::/etc/passwd:0:4",
        "value:/etc/:passwd:0:4",
        "value::d%2Fx:0:4",
        "value::d/x:-1:4",
        "btreenode::d/x:0:4",
    ],
)
def test_places_outside_the_folder_are_not_followed(tmp_path, monkeypatch, location):
    store(tmp_path, counted((40, 30)), (40, 30), ocdbt=True, zarr3=True)
    assert ocdbt_places(tmp_path)
    dump = ts.ocdbt.dump

    def forged(base, node=None):
        found = dump(base, node).result()
        for entry in found.get("entries", ()):
            entry["indirect_value"] = location

        class Done:
            def result(self):
                return found

        return Done()

    monkeypatch.setattr(ts.ocdbt, "dump", forged)
    assert ocdbt_places(tmp_path) == {}


def test_merged_stores_have_their_data_in_the_folder_of_a_process(tmp_path):
    import orbax.checkpoint as ocp

    values = {"a": np.arange(3000, dtype=np.int32), "b": {"c": np.ones((40, 50), np.float32)}}
    ocp.PyTreeCheckpointer().save(tmp_path / "items", values)
    places = ocdbt_places(tmp_path / "items")
    assert any(place.file.startswith("ocdbt.process_0/d/") for place in places.values())
    for place in places.values():
        assert (tmp_path / "items" / place.file).stat().st_size >= place.offset + place.length


@pytest.mark.parametrize("dtype", [np.int32, ml_dtypes.bfloat16])
def test_what_is_written_is_what_tensorstore_writes_and_reads(tmp_path, dtype):
    """Box by box, each file byte for byte; boxes that are no piece of a chunk are refused."""
    values = counted(SHAPE, dtype)
    theirs = store(tmp_path / "theirs", values, CHUNK, ocdbt=False, zarr3=False)
    ours = store(tmp_path / "ours", np.zeros(SHAPE, dtype), CHUNK, ocdbt=False, zarr3=False)
    for file in (tmp_path / "ours" / "a.b").glob("[0-9]*"):
        file.unlink()
    chunks = raw(tmp_path / "ours", ours, ocdbt=False)
    assert not chunks.write(((0, 2), (0, 2), (0, 7)), np.ascontiguousarray(values[:2, :2]))
    for i, j in itertools.product(range(5), range(0, 6, 3)):
        box = ((i, 1), (j, 3), (0, 7))
        assert chunks.write(box, np.ascontiguousarray(values[i : i + 1, j : j + 3]))
    assert np.array_equal(ours.read().result(), values)
    for file in sorted((tmp_path / "theirs" / "a.b").glob("[0-9]*")):
        mine = (tmp_path / "ours" / "a.b" / file.name).read_bytes()
        inside = min(SHAPE[0] - 2 * int(file.name[0]), CHUNK[0]) * 3 * 7 * values.itemsize
        assert len(mine) == file.stat().st_size
        assert mine[:inside] == file.read_bytes()[:inside]
    assert theirs.shape == ours.shape


def test_contiguous():
    assert contiguous(((1, 1), (0, 2), (0, 4)), (3, 5, 4))
    assert contiguous(((0, 1), (2, 1), (1, 2)), (3, 5, 4))
    assert contiguous(((0, 3), (0, 5), (0, 4)), (3, 5, 4))
    assert not contiguous(((0, 2), (0, 2), (0, 4)), (3, 5, 4))
    assert not contiguous(((0, 1), (0, 2), (0, 3)), (3, 5, 4))


@pytest.mark.parametrize("options", [{}, {"ocdbt": False}])
def test_an_export_reads_every_large_array_raw(shallow, tmp_path, monkeypatch, options):
    """Scalars aside; what stands in OCDBT's tree itself is small."""
    to_native(shallow("31b"), tmp_path / "native", **options)
    read, left = module.RawChunks.read, []

    def spy(self, box, values):
        done = read(self, box, values)
        if not done and values.nbytes > 100:
            left.append((self.key, box))
        return done

    monkeypatch.setattr(module.RawChunks, "read", spy)
    assert to_hf(tmp_path / "native", tmp_path / "back").bit_for_bit
    assert not left


def test_place_of_a_file_of_its_own():
    chunks = raw_chunks(
        None,
        "a.b",
        {
            "zarr_format": 2,
            "shape": [4, 4],
            "chunks": [2, 4],
            "compressor": None,
            "filters": None,
            "order": "C",
            "dtype": "<f4",
        },
        4,
        None,
    )
    assert chunks._place((1, 0)) == Place("a.b/1.0", 0, None)
