"""Native → native: the bits of one form in another, and nothing of the original in between."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_verification import change
from trees import restore, same_bits

from gemma_convert import SourceError, UsageError, inspect, to_hf, to_native, verify

EMBEDDING = "params/params/token_embedder/embedding"


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def equal(left: Path, right: Path) -> bool:
    one, two = restore(left / "0" / "items"), restore(right / "0" / "items")
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
@pytest.mark.parametrize("text_only", [False, True])
def test_unscanned_to_scanned_and_back(tiny, tmp_path, family, text_only):
    source = tiny(family)
    to_native(source, tmp_path / "flat", text_only=text_only)
    to_native(source, tmp_path / "stacked", scan_layers=True, text_only=text_only)
    to_native(tmp_path / "flat", tmp_path / "restacked", scan_layers=True)
    to_native(tmp_path / "stacked", tmp_path / "flattened")
    assert equal(tmp_path / "restacked", tmp_path / "stacked")
    assert equal(tmp_path / "flattened", tmp_path / "flat")
    for name in ("restacked", "flattened"):
        assert verify(tmp_path / name).passed
        assert verify(tmp_path / name, against=source).passed
        assert inspect(tmp_path / name).coverage.complete
        to_hf(tmp_path / name, tmp_path / f"{name}-hf")
        assert sums(tmp_path / f"{name}-hf") == sums(source)


def test_trained_values_are_copied_bit_for_bit(tiny, tmp_path):
    """A trained float32 embedding is no bfloat16 times a root any more, and stays untouched."""
    to_native(tiny("31b"), tmp_path / "trained", dtype="float32")
    noise = np.random.default_rng(0)

    def train(values):
        return (values * noise.uniform(0.9, 1.1, values.shape)).astype(np.float32)

    items = tmp_path / "trained" / "0" / "items"
    change(items, EMBEDDING, train)
    change(items, "params/params/decoder/layers_3/mlp/wi_0/kernel", train)
    shutil.rmtree(tmp_path / "trained" / "hf")
    with pytest.raises(SourceError, match="no sidecar"):
        to_native(tmp_path / "trained", tmp_path / "out", scan_layers=True)
    report = to_native(tmp_path / "trained", tmp_path / "out", scan_layers=True, like=tiny("31b"))
    assert not report.lossy_rows
    to_native(tmp_path / "out", tmp_path / "again")
    assert equal(tmp_path / "again", tmp_path / "trained")


def test_casts_are_those_that_were_asked_for(tiny, tmp_path):
    to_native(tiny("31b"), tmp_path / "flat")
    to_native(tmp_path / "flat", tmp_path / "wide", dtype="float32", scan_layers=True)
    to_native(tiny("31b"), tmp_path / "direct", dtype="float32", scan_layers=True)
    assert equal(tmp_path / "wide", tmp_path / "direct")
    report = to_native(tmp_path / "flat", tmp_path / "rounded", scaled_dtype="bfloat16")
    assert [row.tensor for row in report.lossy_rows] == ["model.language_model.embed_tokens.weight"]
    to_native(tiny("31b"), tmp_path / "directly", scaled_dtype="bfloat16")
    assert equal(tmp_path / "rounded", tmp_path / "directly")


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
@pytest.mark.parametrize("scanned", [True, False])
def test_maxtexts_own_checkpoints_become_each_other(oracle, tmp_path, family, scanned):
    forms = ("unscanned", "scanned") if scanned else ("scanned", "unscanned")
    source, target = (oracle / "maxtext" / f"{family}_{form}" for form in forms)
    to_native(source, tmp_path / "out", scan_layers=scanned, like=oracle / "hf" / family)
    assert equal(tmp_path / "out", target)


def test_what_is_refused(tiny, tmp_path):
    to_native(tiny("e2b"), tmp_path / "e2b")
    with pytest.raises(UsageError, match="MaxText scans no model"):
        to_native(tmp_path / "e2b", tmp_path / "out", scan_layers=True)
    assert not (tmp_path / "out").exists()
