"""Broken folders of torch's distributed checkpoint: refused, or read; nothing in them is run."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from damage import STRANGE, damaged, make_strange
from distcp_folders import halves, save_distcp
from hypothesis import given
from hypothesis import strategies as st
from outcome import outcome, share

from gemma_convert.errors import SourceError
from gemma_convert.stores.distcp.metadata import FILE
from gemma_convert.stores.distcp.plain_pickle import read_plain
from gemma_convert.stores.weights import open_weights

VALUES = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(5, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_distcp(tmp_path_factory.mktemp("distcp") / "d", {**VALUES, "n": 5}, halves(0))


def read(folder: Path) -> dict[str, bytes]:
    with open_weights(folder) as reader:
        sizes = sum(spec.nbytes for spec in reader.specs.values())
        if sizes > 1 << 20:  # a plan asks for the shapes of the model
            raise SourceError("Larger than any.", where=folder)
        return {name: b"".join(reader.pieces(name)) for name in reader.tensors}


def test_what_is_whole_is_read(whole):
    found = read(whole)
    for name, values in VALUES.items():
        assert found[name] == values.view(torch.uint8).numpy().tobytes()


@share(150)
@given(st.data())
def test_files(whole, data):
    """Metadata and chunks with other bytes, exchanged, or with something else in their place."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "d")
        shutil.copytree(whole, folder)
        names = sorted(path.name for path in folder.iterdir())
        path = folder / data.draw(st.sampled_from([FILE, *names]))
        if data.draw(st.integers(0, 9)):
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        else:
            make_strange(path, data.draw(st.sampled_from(STRANGE)))
        outcome(lambda: read(folder))


OPCODES = (
    b"(].})NKJMXV\x80\x81\x85\x86\x87\x88\x89\x8c\x93\x94\x95aesutbhqrjR0c2di\x82\x8a\x8b\x96Q"
)


@share(200)
@given(st.lists(st.sampled_from(OPCODES) | st.integers(0, 255), max_size=60))
def test_pickles(opcodes):
    """Any opcodes give plain data, or are refused."""
    outcome(lambda: read_plain(bytes(opcodes) + b".", ("torch.Size",), "here"))


class _Call:
    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self):
        return getattr(os, self._name), ("echo",)


@share(30)
@given(st.sampled_from(("system", "popen", "getenv", "fspath")), st.integers(0, 5))
def test_calls(name, protocol):
    data = pickle.dumps([_Call(name)], protocol)
    assert outcome(lambda: read_plain(data, ("torch.Size",), "here")) is None
