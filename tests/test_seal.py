"""The seal: whatever of a checkpoint is changed, lost or added is named, byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_checkpoints import arrays_of

from gemma_convert import SourceError, to_native, verify

FORMS: dict[str, dict[str, Any]] = {
    "maxtext": {"layout": "maxtext"},
    "maxtext scanned": {"layout": "maxtext", "scan_layers": True},
    "maxtext zarr": {"layout": "maxtext", "ocdbt": False},
    "maxtext zstd": {"layout": "maxtext", "ocdbt": False, "compression": "zstd"},
    "gemma-jax": {"layout": "gemma-jax"},
    "fast-llm": {"layout": "fast-llm", "scaled_dtype": "float32"},
}
each = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=list(FORMS))
def sealed(request, tiny, tmp_path_factory) -> tuple[str, Path]:
    """A checkpoint of each form; those of E2B and of Fast-LLM carry tensors."""
    source = tiny("e2b", layers=10) if request.param == "maxtext" else tiny("31b", layers=6)
    out = tmp_path_factory.mktemp("sealed") / "out"
    to_native(source, out, **FORMS[request.param])
    return request.param, out


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def reported(out: Path, name: str) -> bool:
    """Whether `verify` fails: by its report, or by a message about the file or what is in it."""
    try:
        report = verify(out)
    except SourceError as error:
        return name.rpartition("/")[2] in str(error) or "array" in str(error)
    return not report.passed


@contextmanager
def kept(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    try:
        yield data
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.mark.share(6)
@each
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_reported(sealed, data):
    """Where it is not, it lies in a data file of OCDBT, and every value is what it was."""
    form, out = sealed
    name = data.draw(st.sampled_from(files(out)))
    size = (out / name).stat().st_size
    at = data.draw(st.integers(0, size - 1))
    bit = data.draw(st.integers(0, 7))
    with kept(out / name) as before:
        changed = bytearray(before)
        changed[at] ^= 1 << bit
        (out / name).write_bytes(changed)
        found = reported(out, name)
        if not found:
            assert "d" in Path(name).parts, name
            layout = FORMS[form]["layout"]
            after = arrays_of(out, layout)
    if not found:
        good = arrays_of(out, layout)
        assert good.keys() == after.keys()
        assert all(good[key].tobytes() == after[key].tobytes() for key in good)


@pytest.mark.share(6, 4)
@each
@given(data=st.data())
def test_a_lost_file_is_reported(sealed, data):
    _, out = sealed
    name = data.draw(st.sampled_from(files(out)))
    if name.endswith("gemma-convert/manifest.json"):
        return
    with kept(out / name):
        (out / name).unlink()
        assert reported(out, name), name


@pytest.mark.share(6, 2)
@each
@given(data=st.data())
def test_an_added_file_is_reported(sealed, data):
    _, out = sealed
    folders = sorted({Path(name).parent for name in files(out)})
    words = ["x", "0.0", "config2.json", ".hidden", "model.safetensors", "a" * 32, "7.7.7"]
    name = str(data.draw(st.sampled_from(folders)) / data.draw(st.sampled_from(words)))
    if (out / name).exists():
        return
    (out / name).write_bytes(data.draw(st.binary(max_size=3)))
    try:
        if name == "model.safetensors":  # it is a Hugging Face checkpoint then
            return
        assert verify(out).different.get(name) == "was added"
    finally:
        (out / name).unlink()


def test_it_stands_again(sealed):
    """Nothing that the other tests did has stayed."""
    _, out = sealed
    assert verify(out).passed


def test_a_lost_manifest_is_reported(sealed, tmp_path):
    _, out = sealed
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "hf/gemma-convert/manifest.json").unlink()
    assert not verify(copy).passed


def test_a_checkpoint_of_the_first_version_is_read_and_its_limits_said(tiny, tmp_path):
    """Manifests of version 1 have no digests of files but the original's."""
    out = tmp_path / "out"
    to_native(tiny("31b", layers=6), out, layout="maxtext")
    path = out / "hf/gemma-convert/manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("files", "array_metadata", "settings", "sha256"):
        del manifest[key]
    path.write_text(json.dumps(manifest | {"schema": "gemma-convert/manifest/1"}))
    report = verify(out)
    assert report.passed
    assert "version 1" in report.notes[0]
    (out / "hf/config.json").write_bytes((out / "hf/config.json").read_bytes() + b" ")
    assert list(verify(out).different) == ["hf/config.json"]
    assert report.files == len(manifest["files_sha256"])


def test_bytes_beyond_the_end_of_an_array_are_sealed(tiny, tmp_path, monkeypatch):
    """A chunk at the edge reaches beyond its array: no value is there, and bytes are."""
    monkeypatch.setattr("gemma_convert.mapping.plan.BLOCK_BYTES", 4_000)
    monkeypatch.setattr("gemma_convert.mapping.plan.GATHER_BYTES", 64)
    out = tmp_path / "out"
    to_native(tiny("31b", layers=6), out, layout="maxtext", ocdbt=False)
    folder = out / "0" / "items" / "params.params.token_embedder.embedding"
    array = json.loads((folder / ".zarray").read_text())
    (rows, _), (step, _) = array["shape"], array["chunks"]
    assert rows % step
    last = folder / f"{rows // step}.0"
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    name = str(last.relative_to(out))
    assert verify(out).different == {name: "has changed since it was written"}
