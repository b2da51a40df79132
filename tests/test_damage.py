"""Damage is named by whoever reads a checkpoint, and never passed on as if it were whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from commands import said
from native_checkpoints import OURS, edit_manifest, sums
from safetensors.numpy import load_file, save_file
from test_verification import change

from gemma_convert import SourceError, to_hf, to_native, verify
from gemma_convert.checkpoint import sidecar
from gemma_convert.tasks import conversion_sidecar

SINGLE = "model.safetensors"
EMBEDDING = "model.language_model.embed_tokens.weight"
KERNEL = "params/params/decoder/layers_3/mlp/wi_0/kernel"


@pytest.fixture
def out(shallow, converted, tmp_path) -> Path:
    """E2B for MaxText, which carries the audio tower; a copy that may be damaged."""
    return shutil.copytree(converted(shallow("e2b"), "maxtext"), tmp_path / "out")


@pytest.fixture
def odd(shallow, tmp_path) -> tuple[Path, Path]:
    """A checkpoint with values that its embedding does not give back, and its conversion."""
    source = shutil.copytree(shallow("31b"), tmp_path / "source")
    tensors = load_file(source / SINGLE)
    tensors[EMBEDDING].view(np.uint16)[3, 5:8] = 0x7F81, 0x0001, 0xFFC3
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    to_native(source, tmp_path / "out", layout="maxtext")
    assert (tmp_path / "out" / OURS / "exceptions.safetensors").exists()
    return source, tmp_path / "out"


def refused(out: Path, target: Path, name: str, **options) -> None:
    """`to-hf` and a conversion to another layout name what is damaged, and write nothing."""
    with pytest.raises(SourceError, match="damaged") as caught:
        to_hf(out, target, **options)
    assert name in str(caught.value)
    with pytest.raises(SourceError, match="damaged"):
        to_native(out, target, layout="gemma-jax")
    assert not target.exists()


# Exports.


def zeroed(tensors):
    return {
        name: np.zeros(t.shape, np.float32) if "_tower" in name else t
        for name, t in tensors.items()
    }


def raised(tensors):
    return {name: np.asarray(t * np.float32(1.003), t.dtype) for name, t in tensors.items()}


def negated(tensors):
    return {name: np.asarray(-t) if "audio" in name else t for name, t in tensors.items()}


@pytest.mark.share(3, 1)
@pytest.mark.parametrize(
    ("edit", "options", "least"),
    [(zeroed, {}, 100), (raised, {"dtype": "float32"}, 300), (negated, {}, 100)],
)
def test_tensors_of_an_export(out, tmp_path, edit, options, least):
    back = tmp_path / "back"
    to_hf(out, back, **options)
    assert verify(back, against=out).passed
    tensors = load_file(back / SINGLE)
    save_file(edit(tensors), back / SINGLE, metadata={"format": "pt"})
    report = verify(back, against=out)
    assert len([name for name in report.different if name in tensors]) > least


def test_files_of_an_export(out, tmp_path):
    back = tmp_path / "back"
    to_hf(out, back)
    config = json.loads((back / "config.json").read_text())
    config["text_config"]["sliding_window"] += 1
    (back / "config.json").write_text(json.dumps(config))
    (back / "tokenizer.json").unlink()
    (back / "notes.txt").write_text("x")
    assert verify(back, against=out).different == {
        "config.json": "differs from the export",
        "tokenizer.json": "is missing",
        "notes.txt": "is not a file of this export",
    }


def test_a_header_of_an_export(out, tmp_path):
    to_hf(out, tmp_path / "back")
    tensors = load_file(tmp_path / "back" / SINGLE)
    save_file(tensors, tmp_path / "back" / SINGLE, metadata={"format": "np"})
    assert list(verify(tmp_path / "back", against=out).different) == [SINGLE]


# The sidecar.


def test_a_lost_sidecar(out, shallow):
    shutil.rmtree(out / "hf")
    for against in (None, shallow("e2b")):
        assert list(verify(out, against=against).different) == ["hf/"]


@pytest.mark.parametrize("lost", [False, True])
def test_exceptions(odd, tmp_path, lost):
    source, out = odd
    file = out / OURS / "exceptions.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if lost else file.write_bytes(data)
    for against in (None, source):
        assert any("exceptions" in name for name in verify(out, against=against).different)
    refused(out, tmp_path / "back", "exceptions.safetensors")


def test_exceptions_of_another_conversion(odd):
    """The seal is right, and what it seals differs from the source."""
    source, out = odd
    file = out / OURS / "exceptions.safetensors"
    values = load_file(file)
    values[f"{EMBEDDING}/index"] += 1
    save_file(values, file)
    files = json.loads((out / OURS / "manifest.json").read_text())["files"]
    name = str(OURS / "exceptions.safetensors")
    edit_manifest(
        out,
        files=files
        | {name: {"size": file.stat().st_size, "sha256": digest(file), "values_from": None}},
    )
    assert verify(out).passed
    found = verify(out, against=source).different
    assert found == {"exceptions.safetensors": f"lacks original values of {EMBEDDING}"}


def digest(file: Path) -> str:
    return sidecar.sha256(file)


def test_names_exchanged_in_a_kept_header(out, tmp_path):
    name = f"{OURS}/headers/{SINGLE}.header"
    text = (out / name).read_bytes()
    one, two = (f"layers.{layer}.input_layernorm".encode() for layer in (1, 2))
    (out / name).write_bytes(text.replace(one, b"?").replace(two, one).replace(b"?", two))
    assert (out / name).read_bytes() != text
    assert verify(out).different == {name: "has changed since it was written"}
    refused(out, tmp_path / "back", name)


def test_other_files(out, tmp_path):
    (out / "hf" / "config.json").write_bytes((out / "hf" / "config.json").read_bytes() + b"\n")
    (out / "hf" / "tokenizer.json").unlink()
    refused(out, tmp_path / "back", "hf/config.json")
    code, _, errors = said("to-hf", out, tmp_path / "back")
    assert code == 3
    assert "hf/config.json has" in errors
    assert "hf/tokenizer.json is missing" in errors
    assert "--accept-damage" in errors
    knowing = ("--accept-damage", "hf/config.json", "--accept-damage", "hf/tokenizer.json")
    assert said("to-hf", out, tmp_path / "back", *knowing)[0] == 0
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_carried_tensors(out, tmp_path):
    file = out / OURS / "carried.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    refused(out, tmp_path / "back", "carried.safetensors")
    accepted = (f"{OURS}/carried.safetensors",)
    report = to_hf(out, tmp_path / "back", accept_damage=accepted)
    assert len(report.different) == 1
    assert not report.bit_for_bit


def test_the_manifest(out, tmp_path):
    path = out / OURS / "manifest.json"
    path.write_text(path.read_text().replace('"family": "e2b"', '"family": "e4b"'))
    assert list(verify(out).different) == [f"{OURS}/manifest.json"]
    with pytest.raises(SourceError, match="manifest was changed"):
        to_hf(out, tmp_path / "back")


def test_added_files_stay_behind(out, tmp_path, shallow):
    (out / "hf" / "thesis.tex").write_text("x")
    report = to_hf(out, tmp_path / "back")
    assert report.added_files == ("hf/thesis.tex",)
    assert sums(tmp_path / "back") == sums(shallow("e2b"))


# What the framework wrote down.


def gone(path: Path) -> None:
    path.unlink()


def other_time(path: Path) -> None:
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"init_timestamp_nsecs": 1}))


def skipped(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"skip_deserialize": false', '"skip_deserialize": true', 1))


@pytest.mark.share(4)
@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("0/_CHECKPOINT_METADATA", other_time),
        ("0/_CHECKPOINT_METADATA", gone),
        ("0/commit_success.txt", gone),
        ("0/items/commit_success.txt", gone),
        ("0/items/_METADATA", skipped),
    ],
)
def test_the_frameworks_files(out, shallow, tmp_path, name, edit):
    edit(out / name)
    for against in (None, shallow("e2b")):
        assert list(verify(out, against=against).different) == [name]
    refused(out, tmp_path / "back", name)


@pytest.mark.parametrize("edit", [gone, lambda path: path.write_bytes(b"")])
def test_a_file_of_values_that_is_empty_or_gone(out, shallow, tmp_path, edit):
    """Whoever reads the checkpoint says so, whether or not the values are needed."""
    name = min(str(path.relative_to(out)) for path in (out / "0/items/d").iterdir())
    edit(out / name)
    refused(out, tmp_path / "back", name)
    code, _, errors = said("logit-check", shallow("e2b"), out, "--tokens", 5)
    assert code == 3
    assert name in errors


# Arrays.


def test_a_changed_array_is_told_and_never_called_bit_for_bit(out, tmp_path):
    change(out / "0" / "items", KERNEL, lambda values: values + 1)
    report = to_hf(out, tmp_path / "back")
    assert report.changed_arrays == (KERNEL,)
    assert not report.bit_for_bit
    code, text, _ = said("to-hf", out, tmp_path / "again")
    assert code == 0
    assert "1 array has changed since the conversion" in " ".join(text.split())
    assert "bit for bit" not in text
    moved = to_native(out, tmp_path / "moved", layout="gemma-jax")
    assert moved.changed_arrays == (KERNEL,)
    assert verify(tmp_path / "moved").passed
    assert not to_hf(tmp_path / "moved", tmp_path / "third").bit_for_bit


def test_an_array_of_an_export_without_towers_is_compared_alone(out, tmp_path):
    change(out / "0" / "items", KERNEL, lambda values: values + 1)
    report = to_hf(out, tmp_path / "back", text_only=True)
    assert report.changed_arrays == (KERNEL,)
    report = verify(tmp_path / "back", against=out)
    assert report.passed
    assert "1 array of the native checkpoint" in report.notes[0]


def test_little_memory_compares_all_the_same(shallow, tmp_path, monkeypatch):
    """Blocks that are not those of the conversion: every region is compared nevertheless."""
    to_native(shallow("31b"), tmp_path / "out", layout="maxtext")
    monkeypatch.setattr("gemma_convert.mapping.plan.BLOCK_BYTES", 2_000)
    assert to_hf(tmp_path / "out", tmp_path / "back").bit_for_bit
    change(tmp_path / "out" / "0" / "items", KERNEL, lambda values: values + 1)
    assert to_hf(tmp_path / "out", tmp_path / "again").changed_arrays == (KERNEL,)


# The source, while it is read.


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", SINGLE])
def test_a_source_that_is_replaced_by_a_rename(shallow, tmp_path, monkeypatch, file):
    source = shutil.copytree(shallow("31b"), tmp_path / "source")
    carry = sidecar.copy_files

    def replace(*arguments):
        shutil.copy(source / file, tmp_path / "other")
        os.utime(tmp_path / "other", ns=(0, (source / file).stat().st_mtime_ns))
        (tmp_path / "other").replace(source / file)
        return carry(*arguments)

    monkeypatch.setattr(conversion_sidecar.sidecar, "copy_files", replace)
    with pytest.raises(SourceError, match="changed while it was read") as caught:
        to_native(source, tmp_path / "out", layout="maxtext")
    assert file in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_changed_is_not_continued(shallow, tmp_path, monkeypatch):
    """Size and time of the file are what they were; its contents are not."""
    source = shutil.copytree(shallow("31b"), tmp_path / "source")
    before = (source / SINGLE).stat()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion_sidecar, "write_manifest", interrupt)
        to_native(source, tmp_path / "out", layout="maxtext")
    tensors = load_file(source / SINGLE)
    tensors = {name: (t + 1).astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    os.utime(source / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (source / SINGLE).stat().st_size == before.st_size
    to_native(source, tmp_path / "out", layout="maxtext", resume=True)
    assert verify(tmp_path / "out", against=source).passed
