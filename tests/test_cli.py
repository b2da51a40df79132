"""The command line as a user meets it: text, JSON, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

TERMINAL = {"COLUMNS": "100", "NO_COLOR": "1"}


def run(*arguments: object, cwd: Path | str = ".") -> subprocess.CompletedProcess[str]:
    """What a command prints and its exit code, run inside of this process."""
    from gemma_convert.cli.app import main

    command, out, err, code = ["gemma-convert", *map(str, arguments)], StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        patch.chdir(cwd)
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def run_apart(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The same, as a user's shell runs it."""
    command = [sys.executable, "-m", "gemma_convert", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | TERMINAL, **options
    )


def fails(code: int, *arguments: object, run=run) -> str:
    """The message of a command that must fail with `code`: one message and no traceback."""
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture
def source(tiny, tmp_path) -> Path:
    folder = tmp_path / "in" / "checkpoint"
    shutil.copytree(tiny("31b"), folder)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


def convert(source: Path, out: Path, *options: object) -> str:
    """The message of a conversion that fails as a bad source, leaving nothing at the target."""
    message = fails(3, "to-native", source, out, "--format", "maxtext", *options)
    assert not list(out.parent.iterdir())
    return message


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_help_and_version():
    done = run("--help")
    assert done.returncode == 0
    for command in ("to-native", "inspect", "logit-check", "golden", "tiny"):
        assert command in done.stdout
        assert run(command, "--help").returncode == 0
    assert run_apart("--version").stdout.startswith("gemma-convert ")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['gemma-convert', '--help']\n"
        "from gemma_convert.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'jax', 'transformers', 'orbax', 'tensorstore', 'numpy', 'ml_dtypes'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


def test_conversion_needs_neither_torch_nor_transformers_nor_jax(source, out):
    code = (
        "import sys\n"
        f"sys.argv = ['gemma-convert', 'to-native', {str(source)!r}, {str(out)!r},"
        " '--format', 'maxtext']\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'torch','transformers','jax','orbax','safetensors'}:\n"
        "            raise ImportError(f'{name} must not be needed')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from gemma_convert.cli.app import main\n"
        "main()\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out / "0" / "items" / "_METADATA").exists()


def test_summary_says_what_happened_and_how_to_load_it(tiny, out):
    done = run("to-native", tiny("e2b"), out, "--format", "maxtext")
    assert done.returncode == 0, done.stderr
    for text in (
        "e2b to maxtext",
        "MaxText has no audio tower",
        "MaxText has no vision tower for E2B and E4B",
        "nothing reads the keys and values of KV-shared layers",
        "peak memory",
        "model_name=gemma4-e2b",
        "scan_layers=false",
        "use_multimodal=false",
        f"load_parameters_path={out}/0/items",
    ):
        assert text in done.stdout


@pytest.mark.large
def test_relative_paths_work(source, tmp_path):
    done = run_apart("to-native", "in/checkpoint", "work/out", "--format", "maxtext", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("logit-check", "in/checkpoint", "work/out", "--tokens", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_json_report(tiny, out):
    done = run(
        "to-native", tiny("31b", layers=6), out, "--format", "maxtext", "--scan-layers", "--json"
    )
    report = json.loads(done.stdout)
    assert report["schema"] == "gemma-convert/to-native/3"
    assert report["scanned"] is True
    assert report["settings"]["model_name"] == "gemma4-31b"
    assert report["settings"]["use_multimodal"] == "true"
    assert report["peak_memory_bytes"] > 1 << 20
    inspected = json.loads(run("inspect", out, "--json").stdout)
    assert inspected["complete"] is True
    assert inspected["tensors"] == report["arrays_written"]


def test_dry_run_says_what_is_filled_in(tiny, out):
    source = tiny("e2b", kv_shared="omit")
    done = run("to-native", source, out, "--format", "gemma-jax", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "attn/kv_einsum/w bfloat16 [2, " in done.stdout
    assert done.stdout.count("filled with 0") == done.stdout.count("filled with 1") > 0


def test_dry_run_prints_the_plan(tiny, out):
    done = run("to-native", tiny("26b-a4b"), out, "--format", "maxtext", "--dry-run")
    assert done.returncode == 0
    assert "would convert" in done.stdout
    assert "MoeBlock_0/wi_0" in done.stdout
    assert not out.exists()
    arrays = json.loads(
        run("to-native", tiny("26b-a4b"), out, "--format", "maxtext", "--dry-run", "--json").stdout
    )["arrays"]
    assert arrays["params/params/token_embedder/embedding"]["dtype"] == "float32"


def test_rounding_is_warned_of(tiny, out):
    done = run(
        "to-native", tiny("31b", layers=6), out, "--format", "maxtext", "--scaled-dtype", "bfloat16"
    )
    assert done.returncode == 0
    rounded = "is multiplied by √68 and rounded to bfloat16; "
    assert f"warning: model.language_model.embed_tokens.weight {rounded}" in done.stderr
    assert "cannot be restored" in done.stderr


def test_usage_errors(tiny, out):
    assert "Missing" in fails(2, "to-native", tiny("31b", layers=6), out)
    assert "gguf" in fails(
        2, "to-native", tiny("31b", layers=6), out, "--format", "gguf", run=run_apart
    )
    message = fails(2, "to-native", tiny("e4b"), out, "--format", "maxtext", "--scan-layers")
    assert "MaxText scans no model with per-layer embeddings" in message
    assert "--no-scan-layers" in message
    assert not list(out.parent.iterdir())


def test_depth_that_is_not_whole_blocks_is_refused_for_scanning(source, out):
    """The block is 6 layers; 31b with 8 would leave two that no scan holds."""
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] = 11
    text["layer_types"] = [*text["layer_types"][:10], "full_attention"]
    (source / "config.json").write_text(json.dumps(config))
    message = fails(2, "to-native", source, out, "--format", "maxtext", "--scan-layers")
    assert "multiple of the scanned block" in message or "repeating pattern" in message


def test_no_config(source, out):
    (source / "config.json").unlink()
    assert "There is no config.json" in convert(source, out)
    assert "There is no such checkpoint" in convert(source.parent / "nowhere", out)


def test_tensors_that_are_rounded_for_one_reason_are_told_in_one_sentence(tiny, out):
    source = tiny("31b", layers=6, text_only=True, dtype="float32")
    options = ("--format", "gemma-jax", "--dtype", "bfloat16")
    done = run("to-native", source, out, *options)
    assert done.returncode == 0
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning:"))
    assert "more are rounded from float32 to bfloat16" in warning
    told = " ".join(done.stdout.split())
    assert told.count("more: rounded from float32 to bfloat16") == 1
    assert told.count("rounded from") == 1


def test_a_native_checkpoint_is_not_compared_with_another(tiny, converted):
    source = tiny("31b", layers=6, text_only=True)
    two = converted(source, "maxtext"), converted(source, "fast-llm")
    message = fails(2, "verify", two[0], "--against", two[1])
    assert "compared with a Hugging Face checkpoint" in message
    assert "to-hf" in message


def test_not_gemma_4(source, out):
    edit_config(source, model_type="llama")
    message = convert(source, out)
    assert "not a Gemma 4 checkpoint" in message
    assert "llama" in message


def test_missing_tensor(tiny, out, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(tiny("31b", shards=3), source)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if "-00003-" not in file}
    index.write_text(json.dumps({"weight_map": kept}))
    message = convert(source, out)
    assert "The checkpoint lacks" in message
    lost = next(name for name, file in weight_map.items() if "-00003-" in file)
    assert lost.rsplit(".", 3)[0].split(".")[0] in message


def test_unexpected_tensor_and_wrong_shape(source, out):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.extra": torch.zeros(3)}, source / "model.safetensors")
    message = convert(source, out)
    assert "does not account for" in message
    assert "model.extra [3]" in message
    name = "model.language_model.norm.weight"
    save_file(tensors | {name: torch.zeros(3)}, source / "model.safetensors")
    message = convert(source, out)
    assert name in message
    assert "found: [3]" in message


def test_truncated_shard(source, out):
    shard = source / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    assert "truncated" in convert(source, out)


def test_index_naming_an_absent_file(tiny, out, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(tiny("31b", shards=3), source)
    (source / "model-00002-of-00003.safetensors").unlink()
    message = convert(source, out)
    assert "A shard is missing" in message
    assert "model-00002-of-00003.safetensors" in message


def test_quantized_export(source, out):
    edit_config(source, quantization={"bits": 4})
    assert "quantized export" in convert(source, out)


def test_existing_target(source, out):
    out.mkdir()
    (out / "mine").write_text("x")
    message = fails(4, "to-native", source, out, "--format", "maxtext")
    assert "The target exists" in message
    assert "--overwrite" in message
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert "not a native checkpoint" in fails(
        4, "to-native", source, out, "--format", "maxtext", "--overwrite"
    )
    assert (out / "mine").exists()


def test_no_space(source, tmp_path):
    """A real small file system, where this machine lets one be mounted; else a limit on files."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    target = small / "out" if mounted else Path("/dev/shm") / "x" * 300
    try:
        message = fails(4, "to-native", source, target, "--format", "maxtext")
        if mounted:
            assert "not enough space" in message
            assert not list(small.iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)


def test_interrupt_exits_130_and_may_be_resumed(source, out):
    code = (
        "import os, sys, time\n"
        f"sys.argv = ['gemma-convert', 'to-native', {str(source)!r}, {str(out)!r},"
        " '--format', 'maxtext']\n"
        "from gemma_convert.stores.safetensors.reader import SafetensorsFolder as Folder\n"
        "read = Folder.read_into\n"
        "def slow(self, *arguments):\n"
        "    os.write(1, b'reading\\n')\n"
        "    time.sleep(0.05)\n"
        "    return read(self, *arguments)\n"
        "Folder.read_into = slow\n"
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
    done = run("to-native", source, out, "--format", "maxtext", "--resume", "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_inspect_of_what_is_no_checkpoint(tmp_path):
    assert "no such folder" in fails(3, "inspect", tmp_path / "absent", run=run_apart)
    (tmp_path / "file").touch()
    assert "a file, not a folder" in fails(3, "inspect", tmp_path / "file")
    assert "not a checkpoint in a supported layout" in fails(3, "inspect", tmp_path)


def test_logit_check_exit_codes(tiny, out):
    assert run("to-native", tiny("31b", layers=6), out, "--format", "maxtext").returncode == 0
    good = run("logit-check", tiny("31b", layers=6), out, "--tokens", 24, "--json")
    assert good.returncode == 0, good.stderr
    report = json.loads(good.stdout)
    assert report["passed"] is True
    assert report["kl_max"] <= 2e-6
    other = run("logit-check", tiny("31b", layers=6, seed=1), out, "--tokens", 24)
    assert other.returncode == 1
    assert "not the same model" in other.stdout
    assert run("logit-check", tiny("26b-a4b"), out).returncode == 3


def test_golden_and_tiny_commands(tmp_path):
    made = run("tiny", "31b", tmp_path / "hf", "--layers", 6, "--shards", 2, "--json")
    assert json.loads(made.stdout)["tensors"] > 100
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 2
    assert "a multiple of 6" in fails(2, "tiny", "31b", tmp_path / "odd", "--layers", 7)
    golden = tmp_path / "golden.safetensors"
    saved = run("golden", tmp_path / "hf", golden, "--tokens", 20, "--json")
    assert saved.returncode == 0, saved.stderr
    assert golden.exists()
    assert run("to-native", tmp_path / "hf", tmp_path / "mt", "--format", "maxtext").returncode == 0
    light = tmp_path / "light"
    light.mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", light)
    checked = run("logit-check", light, tmp_path / "mt", "--golden", golden)
    assert checked.returncode == 0, checked.stderr
    assert "golden" in checked.stdout


def test_at_the_end_nothing_is_collected():
    """Of torch and JAX that takes longer than to check a tiny model."""
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 1000));"
        "sys.argv = ['gemma-convert', '--version'];"
        "from gemma_convert.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["True"]
