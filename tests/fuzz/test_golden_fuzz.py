"""Broken golden files: refused, or logits that can be read to their end."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from damage import STRANGE, altered, damaged, make_strange
from hypothesis import given
from hypothesis import strategies as st
from outcome import outcome, refused, share
from seeds import GOLDENS

from gemma_convert.arrays.dtypes import TensorSpec
from gemma_convert.logits.golden import FORMAT, load_golden, weight_files
from gemma_convert.stores.safetensors.header import safetensors_header

FACTS = {
    "format": FORMAT,
    "family": "e2b",
    "config_sha256": "0" * 64,
    "weights": [{"name": "model.safetensors", "size": 5, "header": "0", "samples": "1"}],
    "versions": {"torch": "2.6"},
    "sequences": [
        {"name": "one", "pieces": ["a", "b", "c"]},
        {"name": "two", "pieces": None},
    ],
}
HEADER = {
    "ids.0": {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]},
    "ids.1": {"dtype": "I32", "shape": [2], "data_offsets": [12, 20]},
    "logits.0": {"dtype": "F32", "shape": [3, 5], "data_offsets": [20, 80]},
    "logits.1": {"dtype": "F32", "shape": [2, 5], "data_offsets": [80, 120]},
}
DATA = np.array([1, 4, 0, 3, 2], "<i4").tobytes() + np.arange(25, dtype="<f4").tobytes()


def file_of(facts: bytes, header: dict = HEADER, data: bytes = DATA) -> bytes:
    metadata = {"gemma-convert": facts.decode("utf-8", "surrogateescape")}
    text = json.dumps({"__metadata__": metadata, **header}, ensure_ascii=False)
    encoded = text.encode("utf-8", "surrogateescape")
    return len(encoded).to_bytes(8, "little") + encoded + data


GOOD = json.dumps(FACTS).encode()


def read(path: Path) -> list[np.ndarray]:
    golden = load_golden(path)
    found = []
    for index, sequence in enumerate(golden.sequences):
        assert all(0 <= token < golden.vocab for token in sequence.ids)
        found.append(np.concatenate([*golden.slices(index, 2), np.zeros((0, golden.vocab))]))
        assert found[-1].shape == (len(sequence.ids), golden.vocab)
    return found


def check(content: bytes) -> list[np.ndarray] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "golden.safetensors")
        path.write_bytes(content)
        return outcome(lambda: read(path))


def test_what_is_whole_is_read():
    one, two = check(file_of(GOOD))
    assert np.array_equal(np.concatenate([one, two]), np.arange(25).reshape(5, 5))


@share(100)
@given(altered(FACTS))
def test_facts(facts):
    check(file_of(facts))


@share(60)
@given(st.data())
def test_headers(data):
    header = data.draw(altered({"__metadata__": {"gemma-convert": GOOD.decode()}, **HEADER}))
    check(len(header).to_bytes(8, "little") + header + DATA)


@share(60)
@given(damaged(file_of(GOOD)))
def test_bytes(content):
    check(content)


@pytest.mark.parametrize(("facts", "header", "data"), GOLDENS)
def test_goldens_that_found_something(facts, header, data):
    changed = {name: HEADER[name] | change for name, change in header.items()}
    content = file_of(json.dumps(FACTS | facts).encode(), HEADER | changed, data or DATA)
    assert check(content) is None


def test_ids_without_end(tmp_path):
    """A file that takes no space and claims 64 GiB of ids; logits are only read slice by slice."""
    count = 1 << 34
    specs = {"ids.0": TensorSpec("int32", (count,)), "logits.0": TensorSpec("float32", (count, 2))}
    facts = FACTS | {"sequences": [{"name": "one", "pieces": None}]}
    path = tmp_path / "golden.safetensors"
    path.write_bytes(safetensors_header(specs, {"gemma-convert": json.dumps(facts)}))
    os.truncate(path, path.stat().st_size + 12 * count)
    assert "rows" in refused(lambda: load_golden(path))


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file(tmp_path, kind):
    make_strange(tmp_path / "golden.safetensors", kind)
    refused(lambda: load_golden(tmp_path / "golden.safetensors"))
    assert kind == "empty" or not outcome(lambda: weight_files(tmp_path))


@pytest.mark.parametrize("kind", [kind for kind in STRANGE if kind != "empty"])
def test_a_config_that_is_no_file(tmp_path, kind):
    path = tmp_path / "golden.safetensors"
    path.write_bytes(file_of(GOOD))
    golden = load_golden(path)
    make_strange(tmp_path / "config.json", kind)
    refused(lambda: golden.check_belongs(tmp_path))


def test_weights_that_the_system_does_not_open(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)

    def fail(*_, **__):
        raise OSError(13, os.strerror(13))

    monkeypatch.setattr(Path, "open", fail)
    assert os.strerror(13) in refused(lambda: weight_files(tmp_path))
