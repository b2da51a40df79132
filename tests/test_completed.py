"""A run that is continued when it had come to its end says so, and only then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import said
from native_checkpoints import damaged, edit_tensors, edited, sums

from gemma_convert import TargetError, UsageError, to_hf, to_native, verify


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
    if options["layout"] != "fast-llm":
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


@pytest.fixture
def run(shallow, converted, tmp_path) -> tuple[Path, Path, Path]:
    """An original with towers that MaxText has not, a checkpoint without a sidecar, its export."""
    source, native, out = shallow("e2b"), tmp_path / "run", tmp_path / "export"
    shutil.copytree(converted(source, "maxtext") / "0", native / "0")
    to_hf(native, tmp_path / "written", like=source)
    out.mkdir()
    for file in (tmp_path / "written").iterdir():
        shutil.copyfile(file, out / file.name)  # as another program copies it: without a receipt
    return source, native, out


def negated(array: np.ndarray) -> np.ndarray:
    return -array


def damaged_export(out: Path, part: str) -> None:
    if part == "config.json":
        config = json.loads((out / part).read_text())
        (out / part).write_text(json.dumps(config | {"eos_token_id": 7}))
    elif part == "generation_config.json":
        (out / part).write_text("{}")
    else:
        edit_tensors(out, {part: negated})


CARRIED = "model.vision_tower.patch_embedder.input_proj.weight"
PARTS = (CARRIED, "model.language_model.norm.weight", "config.json", "generation_config.json")


@pytest.mark.parametrize("part", PARTS)
def test_an_export_without_a_sidecar_is_not_held_to_itself(run, part):
    """Neither complete nor ours where it differs from what this run would write."""
    source, native, out = run
    assert to_hf(native, out, like=source, resume=True).already_complete
    damaged_export(out, part)
    held = sums(out)
    for options in ({"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(TargetError):
            to_hf(native, out, like=source, **options)
    assert sums(out) == held


def test_an_export_with_another_original_is_another(run, tmp_path):
    source, native, out = run
    other = edited(source, tmp_path / "other", {CARRIED: negated})
    with pytest.raises(TargetError, match="exists"):
        to_hf(native, out, like=other, resume=True)
    to_hf(native, tmp_path / "again", like=other)
    assert to_hf(native, tmp_path / "again", like=other, resume=True).already_complete


@pytest.mark.parametrize("part", PARTS)
def test_an_export_is_verified_with_its_original(run, part):
    """Without one, what only an original has is not said to have been compared."""
    source, native, out = run
    whole, without = verify(out, against=native, like=source), verify(out, against=native)
    carried = whole.checked - without.checked
    assert whole.passed and without.passed and whole.notes == ()
    assert f"{carried} tensors that the native checkpoint does not have" in without.notes[0]
    assert carried > 100
    damaged_export(out, part)
    assert damaged(verify(out, against=native, like=source)) == [part]
    assert verify(out, against=native).passed == (part in {CARRIED, *PARTS[2:]})
    with pytest.raises(UsageError, match="compared with itself"):
        verify(out, against=native, like=out)
    with pytest.raises(UsageError, match="`like` is for"):
        verify(native, against=source, like=source)
