"""`gemma-convert flops` as a user meets it: text, JSON, exit codes, no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import pytest

DENSE = str(models.FOLDER / models.DENSE)
E2B = str(models.FOLDER / models.E2B)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments): (exit code, stdout, stderr) of the command."""
    from gemma_convert.cli.app import main

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gemma-convert", "flops", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return int(stopped.value.code or 0), out.out, out.err

    return call


@pytest.fixture
def report(run):
    """report(*arguments): the JSON of a command that succeeds."""

    def call(*arguments: object) -> dict:
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_a_training_step(run):
    code, out, err = run(
        *(DENSE, "--seq-len", 8192, "--batch", 64, "--recompute", "full"),
        *("--step-time", 4.2, "--hardware", "h100", "--devices", 64),
    )
    assert (code, err) == (0, "")
    assert lines(out) == TRAINING.splitlines()


TRAINING = """\
gemma4 31b, train, 64 × 8,192 tokens
component                  FLOPs      share
q projection          9.70 PFLOP      9.39%
k projection          3.81 PFLOP      3.69%
v projection          3.46 PFLOP      3.35%
attention scores      3.35 PFLOP      3.24%
attention values      3.35 PFLOP      3.24%
o projection          9.70 PFLOP      9.39%
MLP                  65.46 PFLOP     63.39%
vocabulary            4.43 PFLOP      4.29%
total               103.26 PFLOP    100.00%

exactly                  103,258,012,445,048,832 FLOPs, attention counted exact
forward                  34.42 PFLOP
with recomputation       136.20 PFLOP
a token                  196.95 GFLOP
attention to FFN         0.510
query heads per KV head  2 (sliding), 8 (full)
weights                  57.2 GiB, 30,696,013,824 parameters in bf16
gradients                57.2 GiB
optimizer                343.1 GiB, Adam's moments and master weights in fp32
activations              955.5 GiB
memory, estimated        1.4 TiB, 22.1 GiB on each of 64 devices
achieved                 384.1 TFLOP/s each, 4.2 s on 64 devices
peak                     989.5 TFLOP/s dense bf16 (NVIDIA H100 Tensor Core GPU datasheet, SXM)
MFU                      38.82%
HFU                      51.21%
"""


def test_json(report):
    found = report(DENSE, "--seq-len", 8192, "--batch", 2, "--step-time", 3, "--hardware", "A100")
    assert found["schema"] == "gemma-convert/flops/2"
    assert (found["family"], found["mode"], found["path"]) == ("gemma4 31b", "train", DENSE)
    assert (found["batch"], found["tokens"], found["cached"]) == (2, 8192, 0)
    assert found["flops"] == found["hardware_flops"] == 3 * found["forward_flops"]
    assert sum(one["flops"] for one in found["components"]) == found["flops"]
    assert sum(one["share"] for one in found["components"]) == pytest.approx(1)
    layers = found["layers"]
    assert [one["kind"] for one in layers[:6]] == ["sliding"] * 5 + ["full"]
    assert all(sum(one["components"].values()) == one["flops"] for one in layers)
    outside = [one["flops"] for one in found["components"] if one["component"] == "vocabulary"]
    assert sum(one["flops"] for one in layers) + sum(outside) == found["flops"]
    assert found["query_heads_per_kv_head"] == {"sliding": 2, "full": 8}
    attention = sum(
        one["flops"]
        for one in found["components"]
        if one["component"].endswith(("projection", "scores", "values"))
    )
    mlp = next(one["flops"] for one in found["components"] if one["component"] == "MLP")
    assert found["attention_to_ffn"] == attention / mlp
    rate = found["flops"] / 3
    assert found["flops_per_second_per_device"] == rate
    assert found["mfu"] == found["hfu"] == rate / 312e12
    assert found["peak_flops_per_second"] == 312e12 and found["dtype"] == "bf16"
    assert "above the peak" in found["warnings"][0]


def test_without_a_time_there_is_no_utilization(report, run):
    found = report(DENSE, "--seq-len", 8)
    assert found["mfu"] is found["hfu"] is found["step_seconds"] is found["hardware"] is None
    _, out, _ = run(DENSE, "--seq-len", 8)
    assert "achieved" not in out and "MFU" not in out


def test_a_time_without_hardware_gives_a_rate(report, run):
    found = report(DENSE, "--seq-len", 8, "--step-time", 0.5, "--devices", 4)
    assert found["flops_per_second_per_device"] == found["flops"] / 2
    assert found["mfu"] is None and found["dtype"] is None
    _, out, _ = run(DENSE, "--seq-len", 8, "--step-time", 0.5, "--devices", 4)
    assert "TFLOP/s each, 0.5 s on 4 devices" in out and "MFU" not in out


def test_a_peak_of_ones_own(report, run):
    found = report(DENSE, "--seq-len", 8, "--step-time", 0.5, "--peak", 12.5)
    assert found["peak_flops_per_second"] == 12.5e12
    assert found["mfu"] == found["flops"] / 0.5 / 12.5e12
    assert found["hardware"] is found["hardware_source"] is found["dtype"] is None
    _, out, _ = run(DENSE, "--seq-len", 8, "--step-time", 0.5, "--peak", 12.5)
    assert "12.5 TFLOP/s as given" in out


def test_bytes_are_spread_over_devices(report, run):
    """31B in fp32: 30,696,013,824 parameters of 4 bytes, 4 of gradients and 8 of moments."""
    one = report(DENSE, "--seq-len", 8, "--weight-dtype", "fp32")
    many = report(DENSE, "--seq-len", 8, "--weight-dtype", "fp32", "--devices", 7)
    held = one["memory"]
    assert held["weights"] == held["gradients"] == 4 * 30_696_013_824
    assert held["per_device"] == 16 * 30_696_013_824 + held["activations"]
    assert many["memory"] == {**held, "per_device": -(-held["per_device"] // 7)}
    assert (one["devices"], many["devices"]) == (1, 7)
    _, out, _ = run(DENSE, "--seq-len", 8, "--mode", "prefill", "--devices", 8)
    assert "57.2 GiB, 7.1 GiB on each of 8 devices" in out
    assert "gradients" not in out and "activations" not in out


def test_a_sweep_is_a_csv_of_what_each_length_has_alone(report, run):
    code, out, err = run(DENSE, "--sweep", "1024, 4096", "--batch", 3, "--devices", 2)
    assert (code, err) == (0, "")
    names, *rows = (line.split(",") for line in out.splitlines())
    assert [dict(zip(names, map(int, row), strict=True)) for row in rows] == [
        swept(report(DENSE, "--seq-len", length, "--batch", 3, "--devices", 2))
        for length in (1024, 4096)
    ]
    _, out, _ = run(DENSE, "--sweep", "700", "--mode", "decode")
    assert out.splitlines()[1].startswith("700,1,")
    assert out.splitlines()[1].endswith(",0,0,,61392027648")


def swept(found: dict) -> dict[str, int]:
    held = found["memory"]
    return {
        "seq_len": found["tokens"],
        "batch": found["batch"],
        "flops": found["flops"],
        "forward_flops": found["forward_flops"],
        "hardware_flops": found["hardware_flops"],
        "parameters": held["parameters"],
        "weight_bytes": held["weights"],
        "gradient_bytes": held["gradients"],
        "optimizer_bytes": held["optimizer"],
        "activation_bytes": held["activations"],
        "bytes_per_device": held["per_device"],
    }


def test_sparse_and_other_dtypes_have_other_peaks(report):
    timed = (E2B, "--seq-len", 9, "--step-time", 1, "--hardware", "B200")
    assert report(*timed)["peak_flops_per_second"] == 2250e12
    assert report(*timed, "--sparse")["peak_flops_per_second"] == 4500e12
    fast = report(*timed, "--sparse", "--dtype", "fp8")
    assert (fast["peak_flops_per_second"], fast["sparse"], fast["dtype"]) == (9e15, True, "fp8")


def test_recomputation_is_in_hfu_alone(report):
    timed = (E2B, "--seq-len", 9, "--step-time", 1, "--hardware", "B200")
    plain, again = report(*timed), report(*timed, "--recompute", "full")
    assert plain["mfu"] == again["mfu"] == plain["hfu"] < again["hfu"]
    layers = sum(one["flops"] for one in plain["layers"]) // 3
    assert again["hardware_flops"] == plain["flops"] + layers


def test_prefill_is_a_third_of_training_and_may_have_one_position_of_logits(report):
    training, whole = (
        report(E2B, "--seq-len", 99),
        report(E2B, "--seq-len", 99, "--mode", "prefill"),
    )
    assert training["flops"] == 3 * whole["flops"]
    last = report(E2B, "--seq-len", 99, "--mode", "prefill", "--last-logits")
    assert whole["flops"] - last["flops"] == 98 * 2 * 1536 * 262144
    assert (whole["logit_positions"], last["logit_positions"]) == (99, 1)


def test_decoding_reads_the_cache(report, run):
    short = report(DENSE, "--seq-len", 1023, "--mode", "decode")
    longer = report(DENSE, "--seq-len", 1024, "--mode", "decode")
    assert (short["tokens"], short["cached"], short["logit_positions"]) == (1, 1023, 1)
    assert longer["flops"] - short["flops"] == 10 * 4 * 32 * 512
    _, out, _ = run(DENSE, "--seq-len", 1024, "--mode", "decode", "--batch", 3)
    assert out.startswith("gemma4 31b, decode, 3 × 1 token behind a cache of 1,024\n")


def test_attention_rules_differ(report):
    step = (DENSE, "--seq-len", 2000, "--attention")
    customary, exact, dense = (
        report(*step, rule)["flops"] for rule in ("customary", "exact", "dense")
    )
    assert customary < exact < dense


def test_images_and_sounds(report):
    plain = report(E2B, "--seq-len", 2000)
    seen = report(E2B, "--seq-len", 2000, "--images", 2, "--sounds", 1)
    assert (seen["image_tokens"], seen["sound_tokens"]) == (280, 750)
    parts = {one["part"] for one in seen["components"]}
    assert parts == {"text", "vision", "vision-projector", "audio", "audio-projector"}
    frozen = report(
        *(E2B, "--seq-len", 2000, "--images", 2, "--sounds", 1),
        *("--freeze", "vision", "--freeze", "audio"),
    )
    assert plain["flops"] < frozen["flops"] < seen["flops"]
    assert frozen["frozen"] == ["audio", "vision"]
    small = report(E2B, "--seq-len", 140, "--images", 2, "--image-tokens", 70)
    assert small["image_tokens"] == 70 and small["flops"] < seen["flops"]


@pytest.mark.parametrize(("path", "default"), [(DENSE, True), (E2B, False)])
def test_images_both_ways(report, path, default):
    step = (path, "--seq-len", 600, "--images", 1)
    both, one_way = report(*step, "--bidirectional-images"), report(*step, "--causal-images")
    assert both["flops"] > one_way["flops"]
    expected = both if default else one_way
    assert report(*step)["flops"] == expected["flops"]
    assert report(*step)["bidirectional_images"] is default
    assert report(path, "--seq-len", 600)["bidirectional_images"] is False


def test_a_note_is_shown(run, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "deepseek_v3"}')
    _, out, _ = run(file, "--seq-len", 10)
    assert "! Layers that predict further tokens" in out
    assert "query heads per KV head" not in out


USAGE = [
    ((), "has one length of sequences"),
    (("--seq-len", 9, "--sweep", "9"), "has one length of sequences"),
    (("--sweep", "9,x"), "--sweep is a list of lengths"),
    (("--sweep", "9,0"), "--sweep is a list of lengths"),
    (("--sweep", "9" * 5000), "--sweep is a list of lengths"),
    (("--sweep", "9", "--json"), "--sweep prints a CSV"),
    (("--sweep", "9", "--step-time", 1), "--sweep prints a CSV"),
    (("--seq-len", 9, "--peak", 900), "belong to --step-time"),
    (("--seq-len", 9, "--step-time", 1, "--peak", 0), "--peak is a rate"),
    (("--seq-len", 9, "--step-time", 1, "--peak", 9, "--hardware", "H100"), "leave out --peak"),
    (("--seq-len", 9, "--step-time", 1, "--peak", 9, "--dtype", "fp8"), "belong to --hardware"),
    (("--seq-len", 9, "--devices", 0), "--devices"),
    (("--seq-len", 0), "--seq-len"),
    (("--seq-len", 1 << 41), "--seq-len"),
    (("--seq-len", 9, "--batch", 0), "--batch"),
    (("--seq-len", 9, "--mode", "think"), "--mode"),
    (("--seq-len", 9, "--sparse"), "belong to --hardware"),
    (("--seq-len", 9, "--dtype", "fp8"), "belong to --hardware"),
    (("--seq-len", 9, "--step-time", 1, "--dtype", "fp8"), "belong to --hardware"),
    (("--seq-len", 9, "--hardware", "H100"), "belong to --step-time"),
    (("--seq-len", 9, "--step-time", 1, "--hardware", "X"), "hardware is not known"),
    (("--seq-len", 9, "--step-time", 1, "--hardware", "TPU-v4", "--sparse"), "no sparse bf16"),
    (("--seq-len", 9, "--step-time", 0), "--step-time is a time"),
    (("--seq-len", 9, "--step-time", "nan"), "--step-time is a time"),
    (("--seq-len", 9, "--step-time", 1e-300), "--step-time is a time"),
    (("--seq-len", 9, "--mode", "prefill", "--freeze", "vision"), "belong to --mode train"),
    (("--seq-len", 9, "--mode", "decode", "--recompute", "full"), "belong to --mode train"),
    (("--seq-len", 9, "--last-logits"), "belong to --mode prefill"),
    (("--seq-len", 9, "--mode", "decode", "--last-logits"), "belong to --mode prefill"),
    (("--seq-len", 9, "--mode", "decode", "--images", 1), "belong to --mode train"),
    (("--seq-len", 9, "--mode", "decode", "--sounds", 1), "belong to --mode train"),
    (("--seq-len", 9, "--image-tokens", 4), "belong to --images"),
    (("--seq-len", 9, "--causal-images"), "belong to --images"),
    (("--seq-len", 9, "--sound-tokens", 4), "belong to --sounds"),
    (("--seq-len", 9, "--images", 1), "do not fit"),
    (("--seq-len", 9, "--sounds", 1, "--sound-tokens", 4), "No tower for sounds"),
    (("--seq-len", 9, "--freeze", "text"), "Nothing is trained"),
]


@pytest.mark.parametrize(("options", "message"), USAGE, ids=[str(one[0]) for one in USAGE])
def test_options_that_contradict_each_other(run, options, message):
    code, out, err = run(DENSE, *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_a_model_without_a_tower_sees_no_images(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = run(tmp_path, "--seq-len", 9, "--images", 1, "--image-tokens", 4)
    assert code == 2 and "No tower for images" in err


def test_a_bad_source_is_three(run, tmp_path):
    code, out, err = run(tmp_path, "--seq-len", 9)
    assert (code, out) == (3, "")
    assert err.startswith("error: There is no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run(tmp_path, "--seq-len", 9)
    assert code == 3 and "known" in err and "gpt_oss" in err and "Traceback" not in err


def test_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        f"sys.argv = ['gemma-convert', 'flops', {DENSE!r}, '--seq-len', '9', '--json']\n"
        "from gemma_convert.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "heavy = {'torch', 'jax', 'transformers', 'tensorstore'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_names_every_mode(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "train|prefill|decode" in out and "<train" not in out and Path(DENSE).name in out


@pytest.mark.parametrize("name", ["v5p", "TPU v5p", "trillium", "tpu-v6e"])
def test_tpus_have_their_short_names(run, name):
    measure = ("--seq-len", "9", "--step-time", "1", "--json", "--hardware")
    found = json.loads(run(DENSE, *measure, name)[1])
    full = "TPU-v5p" if "5" in name else "TPU-v6e"
    assert found == json.loads(run(DENSE, *measure, full)[1])


def test_a_published_model_needs_no_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, given = (json.loads(run(one, "--seq-len", "9", "--json")[1]) for one in ("31B", DENSE))
    assert named["flops"] == given["flops"]
    code, _, errors = run("31c", "--seq-len", "9")
    assert code == 3 and "hf/ of a converted checkpoint" in errors


def test_a_tower_that_is_not_there_is_told_before_the_length(run):
    code, _, errors = run(DENSE, "--seq-len", "9", "--sounds", "1")
    assert code == 2 and "No tower for sounds" in errors and "leave out --sounds" in errors
