"""The safetensors reader: regions by pread, and every broken file in one clear message."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gemma_convert.arrays.checksums import checksum
from gemma_convert.arrays.dtypes import SAFETENSORS_NAMES, TensorSpec, numpy_dtype
from gemma_convert.errors import SourceError
from gemma_convert.model.huggingface_files import SINGLE
from gemma_convert.stores.safetensors import reader as reading
from gemma_convert.stores.safetensors import writer as writing
from gemma_convert.stores.safetensors.checked_writer import CheckedWriter
from gemma_convert.stores.safetensors.header import safetensors_header
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.stores.safetensors.writer import SafetensorsWriter, output_shard

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
}


def write(folder: Path, header: object, data: bytes = bytes(32), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    word = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(word + text + data)


def read_whole(reader: SafetensorsFolder, name: str) -> NDArray[Any]:
    tensor = reader.tensors[name]
    values = np.empty(tensor.spec.shape, numpy_dtype(tensor.spec.dtype))
    reader.read_box(tensor, tuple((0, size) for size in tensor.spec.shape), values)
    return values


def error(folder: Path) -> str:
    with pytest.raises(SourceError) as caught, SafetensorsFolder(folder):
        pass
    assert caught.value.exit_code == 3
    assert str(folder) in caught.value.message
    return caught.value.message


def test_reads_what_the_library_writes(tmp_path):
    arrays = {
        "w": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
        "scalar": np.array(7, np.int64),
        "none": np.zeros((0, 4), np.float16),
        "flags": np.array([True, False]),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as reader:
        assert reader.specs == {
            name: TensorSpec(array.dtype.name, array.shape) for name, array in arrays.items()
        }
        assert [t.name for t in reader.shards[0].tensors] == list(reader.tensors)
        for name, array in arrays.items():
            buffer = bytearray(array.nbytes)
            reader.read_into(reader.tensors[name], 0, memoryview(buffer))
            assert bytes(buffer) == array.tobytes()
        part = bytearray(20)
        reader.read_into(reader.tensors["w"], 40, memoryview(part))
        assert bytes(part) == arrays["w"].tobytes()[40:60]
        assert (
            reader.shards[0].header
            == (tmp_path / "model.safetensors").read_bytes()[: len(reader.shards[0].header)]
        )


def test_header_that_we_write_is_read_by_the_library(tmp_path):
    from safetensors import safe_open

    specs = {"x": TensorSpec("float32", (2,)), "ü": TensorSpec("bfloat16", (3, 1))}
    header = safetensors_header(specs)
    assert len(header) % 8 == 0
    (tmp_path / "f.safetensors").write_bytes(header + bytes(14))
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"x", "ü"}
        assert file.get_slice("ü").get_shape() == [3, 1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, "24 bytes"),
        ({"a": {"dtype": "F33", "shape": [2, 3], "data_offsets": [0, 24]}}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [True, 6], "data_offsets": [0, 24]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}}, "-24 bytes"),
        (
            {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}},
            "overlap or leave a gap",
        ),
        ({"b": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]}}, "overlap or leave a gap"),
        ({"b": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]}}, "truncated"),
        ({"b": {"dtype": "I64", "shape": [1 << 40], "data_offsets": [24, 32]}}, "bytes"),
        ({"b": {"dtype": "I64", "shape": [1] * 40, "data_offsets": [24, 32]}}, "malformed"),
        ({"b": {"dtype": "I64", "shape": []}}, "not dtype, shape and data_offsets"),
        ({"b": 5}, "not dtype, shape and data_offsets"),
        ({"c": {"dtype": "I64", "shape": [0], "data_offsets": [40, 40]}}, "truncated"),
    ],
)
def test_broken_entries(tmp_path, change, text):
    write(tmp_path, GOOD | change)
    assert text in error(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "truncated"),
        (b"\x05\0\0", "truncated"),
        ((10**15).to_bytes(8, "little") + b"{}", "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"{]", "not valid JSON"),
        ((3).to_bytes(8, "little") + b'"\xff"', "not valid JSON"),
        ((9).to_bytes(8, "little") + b'{"a":NaN}', "not valid JSON"),
        ((17).to_bytes(8, "little") + b'{"a":1,"a":{}}   ', "not valid JSON"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "not valid JSON"),
        ((2).to_bytes(8, "little") + b"{}" + b"more", "after its last tensor"),
    ],
)
def test_broken_headers(tmp_path, content, text):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert text in error(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    write(tmp_path, GOOD)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        error(tmp_path)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_bytes_never_end_in_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, GOOD)
    whole = bytearray((folder / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(whole)
    try:
        with SafetensorsFolder(folder) as reader:
            for tensor in reader.tensors.values():
                reader.read_into(tensor, 0, memoryview(bytearray(tensor.spec.nbytes)))
    except SourceError:
        pass


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", 5,
     "a\\b.safetensors", "a\0.safetensors", "\n.safetensors"],
)  # fmt: skip
def test_index_may_only_name_plain_files(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a plain file name" in error(tmp_path)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "A shard is missing"),
        ('{"weight_map": {"zzz": "model-1.safetensors"}}', "does not hold a tensor"),
        ('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}', "two shards"),
    ],
)
def test_broken_indexes(tmp_path, index, text):
    write(tmp_path, GOOD)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    write(tmp_path, GOOD)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert text in error(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path):
    assert "no such folder" in error(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "not a folder" in error(tmp_path / "file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = error(tmp_path)
    assert "pytorch_model.bin" in message
    assert "never read" in message
    (tmp_path / "model.safetensors").mkdir()
    assert "not a file" in error(tmp_path)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a file" in error(tmp_path)


def test_dtypes_have_the_sizes_that_the_format_says():
    widths = {"8": 1, "16": 2, "32": 4, "64": 8}
    for name, dtype in SAFETENSORS_NAMES.items():
        digits = name.split("_")[0].lstrip("BFIUOL")
        expected = widths.get(digits, 1)
        assert TensorSpec(dtype, (3,)).nbytes == 3 * expected


def test_random_bytes_as_a_file(tmp_path):
    generator = random.Random(0)
    for _ in range(200):
        (tmp_path / "model.safetensors").write_bytes(generator.randbytes(generator.randrange(80)))
        error(tmp_path)


@pytest.mark.parametrize("short", [0, 1 << 30])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_boxes_of_a_tensor_are_written_as_numpy_writes_them(tmp_path, monkeypatch, short, data):
    """Piece by piece, or all through the map: the same values at the same places."""
    monkeypatch.setattr(writing, "SHORT_RUN_BYTES", short)
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    spans = [data.draw(st.integers(0, size - 1)) for size in shape]
    box = tuple(
        (start, data.draw(st.integers(1, size - start)))
        for start, size in zip(spans, shape, strict=True)
    )
    values = np.arange(1, 1 + np.prod([length for _, length in box], dtype=int), dtype=np.float32)
    values = values.reshape([length for _, length in box])
    shard = output_shard(SINGLE, {"t": TensorSpec("float32", shape)})
    (tmp_path / SINGLE).unlink(missing_ok=True)
    with SafetensorsWriter(tmp_path, [shard]) as writer:
        writer.write("t", box, values)
        assert writer.holds("t", {box: checksum(values)})
        assert not writer.holds("t", {box: checksum(values + 1)})
    expected = np.zeros(shape, np.float32)
    expected[tuple(slice(start, start + length) for start, length in box)] = values
    monkeypatch.setattr(reading, "SHORT_ROW_BYTES", short)
    monkeypatch.setattr(reading, "WINDOW_BYTES", data.draw(st.integers(1, 64)))
    with SafetensorsFolder(tmp_path) as reader:
        assert np.array_equal(read_whole(reader, "t"), expected)
        again = np.empty_like(values)
        reader.read_box(reader.tensors["t"], box, again)
        assert np.array_equal(again, values)


def test_a_part_of_rows_of_nothing(tmp_path):
    save_file({"t": np.zeros((3, 2, 0), np.float32)}, tmp_path / SINGLE)
    with SafetensorsFolder(tmp_path) as reader:
        box = ((0, 3), (0, 1), (0, 0))
        reader.read_box(reader.tensors["t"], box, np.empty((3, 1, 0), np.float32))


@pytest.mark.parametrize("short", [0, 1 << 30])
def test_a_part_of_a_file_that_became_shorter_is_not_read(tmp_path, monkeypatch, short):
    """By whole rows, or piece by piece."""
    monkeypatch.setattr(reading, "SHORT_ROW_BYTES", short)
    save_file({"t": np.zeros((4096, 8), np.float32)}, tmp_path / SINGLE)
    with SafetensorsFolder(tmp_path) as reader:
        os.truncate(tmp_path / SINGLE, 4096)
        with pytest.raises(SourceError, match=r"(?s)became shorter.*tensor t"):
            reader.read_box(reader.tensors["t"], ((0, 4096), (2, 1)), np.empty((4096, 1), "f4"))


@pytest.mark.parametrize("short", [0, 1 << 30])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_checksums_are_those_of_the_file_whatever_the_order(tmp_path, monkeypatch, short, data):
    """Rows in any order, some in halves that are not contiguous, and some that never come."""
    monkeypatch.setattr(writing, "SHORT_RUN_BYTES", short)
    rows = data.draw(st.integers(1, 6))
    values = np.arange(1, 1 + rows * 4, dtype=np.int32).reshape(rows, 2, 2)
    boxes = [((row, 1), (0, 2), part) for row in range(rows) for part in ((0, 2),)]
    for row in data.draw(st.sets(st.integers(0, rows - 1))):
        boxes.remove(((row, 1), (0, 2), (0, 2)))
        boxes += [((row, 1), (0, 2), (column, 1)) for column in (0, 1)]
    order = data.draw(st.permutations(boxes))
    missing = data.draw(st.integers(0, 1))
    shard = output_shard(SINGLE, {"t": TensorSpec("int32", values.shape)})
    (tmp_path / SINGLE).unlink(missing_ok=True)
    with CheckedWriter(tmp_path, [shard]) as writer:
        for box in order[missing:]:
            index = tuple(slice(start, start + length) for start, length in box)
            writer.write("t", box, np.ascontiguousarray(values[index]))
        assert writer.checksum("t") == checksum(writer.array("t"))
