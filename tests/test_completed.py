"""A run that is continued when it had come to its end says so, and only then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import said

from gemma_convert import TargetError, to_hf, to_native


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.share(3, 2)
@pytest.mark.parametrize(
    "options",
    [{"layout": "maxtext"}, {"layout": "gemma-jax", "ocdbt": False}, {"layout": "fast-llm"}],
)
def test_a_conversion_that_was_complete(shallow, tmp_path, options):
    source = tmp_path / "t"
    shutil.copytree(shallow("31b"), source)
    first = to_native(source, tmp_path / "out", **options)
    assert not first.already_complete
    stood = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = to_native(source, tmp_path / "out", resume=True, **options)
    assert again.already_complete
    assert again.settings == first.settings
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == stood
    with pytest.raises(TargetError, match="exists"):
        to_native(source, tmp_path / "out", **options)
    with pytest.raises(TargetError, match="exists"):
        to_native(source, tmp_path / "out", resume=True, dtype="float32", **options)
    with pytest.raises(TargetError, match="exists"):
        to_native(source, tmp_path / "out", resume=True, compression="zstd", **options)
    flip(source / "model.safetensors")
    with pytest.raises(TargetError, match="exists"):
        to_native(source, tmp_path / "out", resume=True, **options)


def test_a_conversion_from_native_that_was_complete(shallow, converted, tmp_path):
    source = converted(shallow("31b"), "maxtext")
    to_native(source, tmp_path / "out", layout="gemma-jax")
    assert to_native(source, tmp_path / "out", layout="gemma-jax", resume=True).already_complete
    other = converted(shallow("31b", seed=3), "maxtext")
    with pytest.raises(TargetError, match="exists"):
        to_native(other, tmp_path / "out", layout="gemma-jax", resume=True)


def test_an_export_that_was_complete(shallow, converted, tmp_path):
    source = converted(shallow("31b"), "maxtext")
    to_hf(source, tmp_path / "out")
    assert to_hf(source, tmp_path / "out", resume=True).already_complete
    with pytest.raises(TargetError, match="exists"):
        to_hf(source, tmp_path / "out", resume=True, max_shard_size=100_000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="exists"):
        to_hf(source, tmp_path / "out", resume=True)


@pytest.mark.parametrize("command", ["to-native", "to-hf"])
def test_the_summary_claims_no_work(command, shallow, converted, tmp_path):
    source = shallow("31b") if command == "to-native" else converted(shallow("31b"), "maxtext")
    words = [command, source, tmp_path / "out"]
    words += ["--format", "maxtext"] if command == "to-native" else []
    assert said(*words)[0] == 0
    code, output, errors = said(*words, "--resume")
    assert code == 0
    assert "is already complete" in errors
    assert ", by an earlier run" in output.splitlines()[0]
    assert "time " not in output
    assert "checksum" not in output
