"""Checkpoints in Google Cloud Storage, against an emulator on loopback."""

from __future__ import annotations

import pytest
from object_stores import BUCKET, Objects, gcs_server, sums

import gemma_convert
from gemma_convert.errors import SourceError, TargetError
from gemma_convert.files.unfinished import JOURNAL
from gemma_convert.stores.orbax.writer import OrbaxWriter
from gemma_convert.stores.remote.object_store import file_system

URL = f"gs://{BUCKET}"


@pytest.fixture(scope="module")
def gcs():
    with gcs_server():
        yield Objects(file_system("gs"))


@pytest.fixture(scope="module")
def hf(tiny):
    return tiny("31b", layers=6, text_only=True)


def test_there_and_back_again(gcs, hf, tmp_path):
    out = f"{URL}/there/out"
    report = gemma_convert.to_native(hf, out)
    assert report.settings["load_parameters_path"] == f"{out}/0/items"
    assert gemma_convert.verify(out, against=hf).passed
    exported = gemma_convert.to_hf(out, f"{out}-back")
    assert exported.bit_for_bit
    assert gcs.sums(f"{out}-back".removeprefix(f"{URL}/")) == sums(hf)
    gemma_convert.to_native(f"{out}-back", tmp_path / "native")
    assert gemma_convert.verify(tmp_path / "native", against=hf).passed


def test_an_error_midway_leaves_nothing(gcs, hf, monkeypatch):
    def fails(*_):
        assert gcs.keys("broken/out")[:1] == [f"broken/out/{JOURNAL}"]
        raise OSError("disk")

    monkeypatch.setattr(OrbaxWriter, "write_tree", fails)
    with pytest.raises(TargetError):
        gemma_convert.to_native(hf, f"{URL}/broken/out")
    assert gcs.keys("broken") == []


def test_no_such_place_is_one_message(gcs):
    with pytest.raises(SourceError, match="There is nothing at this place"):
        gemma_convert.inspect(f"{URL}/no/such/place")
