"""Files and folders have the mode that the umask gives; temporary ones are private, and go."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_confined import run


@pytest.fixture(params=[0o027, 0o077, 0o002], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.share(3)  # one of them has all three kinds of bits
def test_outputs_of_all_commands(umask, tiny, converted, tmp_path, monkeypatch) -> None:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    hf, native = tiny("31b", layers=6), converted(tiny("31b", layers=6), "maxtext")
    reports = ("--report", work / "r.html", "--junit", work / "r.xml")
    commands = [
        ("tiny", "31b", work / "tiny", "--layers", 6),
        ("golden", hf, work / "golden.safetensors", "--tokens", 5),
        ("logit-check", hf, native, "--golden", work / "golden.safetensors", *reports),
        ("to-hf", native, work / "back"),
        ("to-hf", native, work / "sharded", "--max-shard-size", "1MiB"),
        ("to-native", hf, work / "zarr", "--format", "maxtext", "--no-ocdbt"),
        ("to-native", hf, work / "ocdbt", "--format", "maxtext"),
        ("to-native", hf, work / "jax", "--format", "gemma-jax"),
        ("to-native", hf, work / "fast", "--format", "fast-llm"),
        ("to-native", hf, work / "fast", "--format", "fast-llm", "--overwrite"),
        ("golden", hf, work / "golden.safetensors", "--tokens", 5, "--overwrite"),
    ]
    for command in commands:
        code, said = run(*command)
        assert code == 0, (command, said)
        for path in work.rglob("*"):
            whole = 0o777 if path.is_dir() else 0o666
            found = stat.S_IMODE(path.stat().st_mode)
            assert found == whole & ~umask, (command, path, oct(found))
        assert not list(temporary.glob("gemma-convert*")), command
    assert len(list(work.iterdir())) == 10


def test_a_mirror_is_private_and_goes(tmp_path, monkeypatch) -> None:
    from gemma_convert.stores.remote.mirror import mirroring
    from gemma_convert.stores.remote.object_store import ObjectURL

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        with mirroring(ObjectURL("s3", "bucket", "key"), object()) as mirror:
            (top,) = tmp_path.iterdir()
            assert mirror.folder.is_relative_to(top)
            assert stat.S_IMODE(top.stat().st_mode) == 0o700
            Path(mirror.folder, "data").write_text("somebody's")
    finally:
        os.umask(before)
    assert not list(tmp_path.iterdir())
