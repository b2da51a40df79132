"""Broken safetensors files and indexes: refused, or read as the safetensors library reads them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from damage import STRANGE, TEXTS, altered, damaged, make_strange
from hypothesis import example, given
from hypothesis import strategies as st
from outcome import bounded, command, outcome, refused, share, snapshot
from safetensors import safe_open
from seeds import HEADERS, INDEXES

from gemma_convert.model.huggingface_files import INDEX, SINGLE
from gemma_convert.stores.safetensors.reader import SafetensorsFolder

DATA = np.random.default_rng(0).bytes(60)
HEADER = {
    "__metadata__": {"format": "pt", "note": "x"},
    "model.layers.0.a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.layers.1.a": {"dtype": "BF16", "shape": [3, 2, 2], "data_offsets": [24, 48]},
    "b": {"dtype": "F16", "shape": [0, 5], "data_offsets": [48, 48]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [48, 56]},
    "d": {"dtype": "U8", "shape": [4], "data_offsets": [56, 60]},
}
WHOLE = {"dtype": "U8", "shape": [60], "data_offsets": [0, 60]}
INDEX_OF_TWO = {
    "metadata": {"total_size": 60},
    "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
}


def file_of(header: bytes, data: bytes = DATA) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


GOOD = file_of(json.dumps(HEADER).encode())


def read(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name → dtype, shape and bytes of every tensor, as we read them."""
    with SafetensorsFolder(folder) as reader:
        found = {}
        for name, tensor in reader.tensors.items():
            found[name] = (
                tensor.spec.dtype,
                list(tensor.spec.shape),
                b"".join(reader.pieces(name)),
            )
        return found


def check(content: bytes) -> None:
    """A file is refused, or every tensor is what the library says that it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SINGLE)
        path.write_bytes(content)
        found = outcome(lambda: read(Path(folder)))
        assert path.read_bytes() == content
        if found is None:
            return
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        start = 8 + int.from_bytes(content[:8], "little")
        with safe_open(path, framework="np") as file:
            assert set(found) == set(file.keys())
            for name, (_, shape, values) in found.items():
                part, entry = file.get_slice(name), header[name]
                assert (part.get_shape(), part.get_dtype()) == (shape, entry["dtype"])
                begin, end = entry["data_offsets"]
                assert values == content[start + begin : start + end]


@share(150)
@given(altered(HEADER))
def test_headers(header):
    check(file_of(header))


@pytest.mark.parametrize("content", HEADERS)
def test_headers_that_found_something(content):
    check(content)


@share(150)
@given(damaged(GOOD))
def test_bytes(content):
    check(content)


@share(60)
@given(damaged(json.dumps(HEADER).encode()))
def test_header_text_with_the_right_length(header):
    check(file_of(header))


@share(60)
@given(st.lists(st.sampled_from([-24, -8, -4, 0, 4, 8, 24]), min_size=5, max_size=5))
@example([0, 0, 0, 0, 0])
@example([0, 4, 0, 0, 0])
@example([0, -24, 0, 0, 0])
def test_data_that_overlaps_or_leaves_a_gap(shifts):
    """Each tensor with the bytes that it needs, but in another place."""
    header = dict(HEADER)
    for shift, (name, entry) in zip(shifts, list(HEADER.items())[1:], strict=True):
        begin, end = entry["data_offsets"]
        header[name] = entry | {"data_offsets": [begin + shift, end + shift]}
    check(file_of(json.dumps(header).encode()))


def test_every_length():
    """A file that ends too soon, or says a wrong length of its header."""
    for length in range(len(GOOD)):
        check(GOOD[:length])
    for length in (0, 1, 7, 2, 100, len(GOOD), 1 << 20, 1 << 31, (1 << 64) - 1, 16 << 20):
        check(length.to_bytes(8, "little") + GOOD[8:])


def with_index(folder: Path, index: bytes) -> None:
    for number, name in enumerate("ab", 1):
        content = file_of(json.dumps({name: WHOLE}).encode())
        (folder / f"model-{number}.safetensors").write_bytes(content)
    (folder / INDEX).write_bytes(index)


def check_index(index: bytes) -> None:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "inner")
        folder.mkdir()
        with_index(folder, index)
        secret = file_of(json.dumps({"a": WHOLE}).encode(), b"\1" * 60)
        Path(outer, "x.safetensors").write_bytes(secret)
        found = outcome(lambda: read(folder))
        assert all(tensor == ("uint8", [60], DATA) for tensor in (found or {}).values())


@share(120)
@given(altered(INDEX_OF_TWO))
def test_indexes(index):
    check_index(index)


@pytest.mark.parametrize("index", INDEXES)
def test_indexes_that_found_something(index):
    check_index(index)


@pytest.mark.parametrize("name", [text for text in TEXTS if text != "model.safetensors"])
def test_no_name_in_an_index_leads_elsewhere(tmp_path, name):
    with_index(tmp_path, json.dumps({"weight_map": {"a": name}}).encode())
    refused(lambda: read(tmp_path))
    before = snapshot(tmp_path)
    assert command("inspect", tmp_path)[0] == 3
    assert command("to-native", tmp_path, tmp_path.parent / "out", "--format", "maxtext")[0] == 3
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-1.safetensors"])
def test_what_is_no_file(tmp_path, name, kind):
    with_index(tmp_path, json.dumps(INDEX_OF_TWO).encode())
    make_strange(tmp_path / name, kind)
    refused(lambda: read(tmp_path))
    assert command("to-native", tmp_path, tmp_path.parent / "out", "--format", "maxtext")[0] == 3


def test_a_shard_may_be_a_link_to_a_file_elsewhere(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(GOOD)
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/1")
    assert outcome(lambda: read(tmp_path / "snapshot")) is not None


@pytest.mark.parametrize("error", [13, 5, 24, 40])
def test_a_shard_that_the_system_does_not_open(tmp_path, monkeypatch, error):
    (tmp_path / SINGLE).write_bytes(GOOD)

    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "open", fail)
    assert os.strerror(error) in refused(lambda: SafetensorsFolder(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(os, "pread", fail)
    assert os.strerror(error) in refused(lambda: SafetensorsFolder(tmp_path))
    monkeypatch.undo()
    with SafetensorsFolder(tmp_path) as reader, bounded():
        monkeypatch.setattr(os, "preadv", fail)
        assert os.strerror(error) in refused(lambda: list(reader.pieces("d")))


@share(12, cost=4)
@given(altered(HEADER))
@example(json.dumps({"layers." + "9" * 5000 + ".a": WHOLE}).encode())
@example(json.dumps({"layers.٣.a": WHOLE}).encode())
def test_inspect(header):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, SINGLE).write_bytes(file_of(header))
        code, said = command("inspect", folder, "--json")
        assert code or json.loads(said)["tensors"] >= 1
