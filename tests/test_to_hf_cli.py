"""`gemma-convert to-hf` as a user meets it: text, JSON, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import said
from native_checkpoints import edit_manifest, manifest
from test_cli import fails, run, run_apart

from gemma_convert import to_native
from gemma_convert.cli.options import parse_size
from gemma_convert.errors import UsageError


@pytest.fixture
def native(shallow, tmp_path) -> Path:
    """A converted 31b, zarr without OCDBT: one folder an array."""
    to_native(shallow("31b"), tmp_path / "in" / "native", ocdbt=False, compression="zstd")
    return tmp_path / "in" / "native"


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "back"


def export_fails(code: int, out: Path, *arguments: object) -> str:
    """The message of an export that must fail with `code`, and leave nothing at the target."""
    message = fails(code, "to-hf", *arguments)
    assert message.startswith(("error: ", "Usage: ")), message
    assert not list(out.parent.iterdir())
    return message


def test_round_trip_by_command(shallow, native, out):
    done = run_apart("to-hf", native, out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    count = len(json.loads((native / "hf/gemma-convert/manifest.json").read_text())["tensors"])
    for text in (
        "31b from maxtext",
        f"bit for bit: all {count} tensors match its checksums",
        "in 1 file",
        "peak memory",
        "largest chunk",
    ):
        assert text in done.stdout
    for file in shallow("31b").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_json_report(native, out):
    done = run("to-hf", native, out, "--max-shard-size", "200kB", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "gemma-convert/to-hf/2"
    assert report["bit_for_bit"] is True
    assert report["different"] == []
    assert report["identical"] == report["tensors"]
    assert report["rounded"] == {}
    assert sorted(report["shards"]) == sorted(path.name for path in out.glob("*.safetensors"))
    assert len(report["shards"]) > 2
    assert "model.safetensors.index.json" in report["files"]
    assert report["peak_memory_bytes"] > 1 << 20


def test_values_that_differ_are_named_and_never_called_bit_for_bit(shallow, tmp_path, out):
    to_native(shallow("31b"), tmp_path / "native", scaled_dtype="bfloat16")
    done = run("to-hf", tmp_path / "native", out)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "bit for bit" not in words
    assert "1 differs: model.language_model.embed_tokens.weight" in words


def test_rounded_values_are_counted_in_a_warning(shallow, tmp_path, out):
    to_native(shallow("31b", dtype="float32"), tmp_path / "native")
    done = run("to-hf", tmp_path / "native", out, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "values were rounded to the target's dtype" in done.stderr
    assert "bit for bit" not in done.stdout
    assert "rounded" in done.stdout
    count = int(done.stderr.split("warning: ")[1].split()[0].replace(",", ""))
    assert f"{count:,} values in" in " ".join(done.stdout.split())
    assert count > 10_000


def test_dry_run_writes_nothing(native, out):
    done = run("to-hf", native, out, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would export" in done.stdout
    assert "bit for bit" not in done.stdout
    assert not list(out.parent.iterdir())
    report = json.loads(run("to-hf", native, out, "--dry-run", "--json").stdout)
    assert report["dry_run"] is True
    assert report["bit_for_bit"] is False
    assert report["bytes_written"] > 100_000
    assert not list(out.parent.iterdir())


def test_export_needs_neither_torch_nor_transformers_nor_jax(native, out):
    code = (
        "import sys\n"
        f"sys.argv = ['gemma-convert', 'to-hf', {str(native)!r}, {str(out)!r}]\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'torch','transformers','jax','orbax','safetensors'}:\n"
        "            raise ImportError(f'{name} must not be needed')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from gemma_convert.cli.app import main\n"
        "main()\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out / "model.safetensors").exists()


def test_relative_paths_work(native, tmp_path, out):
    done = run("to-hf", "in/native", "work/back", "--like", "in/native", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (out / "config.json").exists()


def test_usage_errors(native, out):
    assert "5 gallons" in export_fails(2, out, native, out, "--max-shard-size", "5 gallons")
    assert "--max-shard-size" in export_fails(2, out, native, out, "--max-shard-size", "0")
    assert "float8" in export_fails(2, out, native, out, "--dtype", "float8")
    assert "Missing" in export_fails(2, out, native)


def test_bad_sources(shallow, native, out):
    message = export_fails(3, out, shallow("31b"), out)
    assert "This is a Hugging Face checkpoint already" in message and "to-native" in message
    swapped = export_fails(3, out, out, native)
    assert "There is no such checkpoint" in swapped and "swapped" in swapped
    other = shallow("26b-a4b")
    assert "--like" in export_fails(3, out, native, out, "--like", other)
    manifest = native / "hf" / "gemma-convert" / "manifest.json"
    kept = manifest.read_text()
    manifest.write_text(kept[:-20])
    assert "manifest is not valid JSON" in export_fails(3, out, native, out)
    values = json.loads(kept)
    values["shards"][0]["file"] = "../model.safetensors"
    manifest.write_text(json.dumps(values))
    assert "manifest is malformed" in export_fails(3, out, native, out)
    shutil.rmtree(native / "hf")
    message = export_fails(3, out, native, out)
    assert "has no sidecar" in message
    assert "--like" in message
    kernel = next((native / "0" / "items").glob("*layers_3.mlp.wo.kernel"))
    next(path for path in kernel.iterdir() if path.name[0] != ".").write_bytes(b"rubbish")
    message = export_fails(3, out, native, out, "--like", shallow("31b"))
    assert "layers_3/mlp/wo/kernel" in message


def test_existing_target(native, out):
    out.mkdir()
    (out / "mine").write_text("x")
    message = fails(4, "to-hf", native, out)
    assert "The target exists" in message
    assert "--overwrite" in message
    assert "not a Hugging Face checkpoint" in fails(4, "to-hf", native, out, "--overwrite")
    assert [path.name for path in out.parent.iterdir()] == ["back"]
    assert (out / "mine").exists()


def test_no_space(native, tmp_path):
    """A real small file system, where this machine lets one be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts no file system")
    try:
        assert "not enough space" in fails(4, "to-hf", native, small / "out")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.share(2)
@pytest.mark.parametrize("where", ["OrbaxArray.read", "copy_files"])
def test_interrupt_exits_130_and_is_forgotten_by_the_next_run(native, out, where):
    """Interrupted while arrays are read on other threads, and while files are copied."""
    code = (
        "import os, sys, time\n"
        f"sys.argv = ['gemma-convert', 'to-hf', {str(native)!r}, {str(out)!r}]\n"
        "from gemma_convert.checkpoint import sidecar\n"
        "from gemma_convert.stores.orbax.reader import OrbaxArray\n"
        f"owner = {'OrbaxArray' if '.' in where else 'sidecar'}\n"
        f"word = {where.rpartition('.')[2]!r}\n"
        "real = getattr(owner, word)\n"
        "def slow(*arguments):\n"
        "    os.write(1, b'reading\\n')\n"
        "    time.sleep(0.05 if owner is OrbaxArray else 2)\n"
        "    return real(*arguments)\n"
        "setattr(owner, word, slow)\n"
        "from gemma_convert.cli.app import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    assert {path.name for path in out.parent.iterdir()} <= {f".{out.name}.partial"}
    done = run("to-hf", native, out)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        (" 5 GB ", 5 * 10**9),
        ("5GiB", 5 << 30),
        ("1.5KiB", 1536),
        ("0.5k", 500),
        ("200kB", 200_000),
        ("3M", 3 * 10**6),
        ("2TiB", 2 << 40),
        ("17", 17),
        ("17B", 17),
    ],
)
def test_sizes(text, size):
    assert parse_size("--max-shard-size", text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 gallons", "-5GB", "5PB", "1,5GB", "5GB5", "nan", "inf", "1e9"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="--max-shard-size takes a size"):
        parse_size("--max-shard-size", text)


def test_size_beyond_all_bounds():
    with pytest.raises(UsageError, match="--max-shard-size takes a size"):
        parse_size("--max-shard-size", "9" * 400 + "GB")


def test_a_contradiction_in_the_manifest_fails(shallow, converted, tmp_path):
    """The arrays are as they were sealed, and yet two tensors are not the original's."""
    out = shutil.copytree(converted(shallow("31b"), "maxtext"), tmp_path / "out")
    tensors = manifest(out)["tensors"]
    one, other = (f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    edit_manifest(out, tensors=tensors)
    code, printed, _ = said("to-hf", out, tmp_path / "back", "--json")
    assert code == 1
    assert json.loads(printed)["unexplained"] == [one, other]
    assert said("to-hf", out, tmp_path / "again")[0] == 1


def test_what_was_trained_is_not_damage(shallow, converted, tmp_path):
    """The checksums of another conversion, named with --like, are those of another model."""
    other = converted(shallow("31b", seed=3), "maxtext")
    shutil.copytree(converted(shallow("31b"), "maxtext") / "0", tmp_path / "run" / "7")
    for native in (tmp_path / "run", converted(shallow("31b"), "maxtext")):
        target = tmp_path / f"of-{native.name}"
        code, printed, _ = said("to-hf", native, target, "--like", other, "--json")
        report = json.loads(printed)
        assert (code, report["unexplained"]) == (0, [])
        assert report["different"]
