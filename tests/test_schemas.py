"""docs/schemas says what every `--json` prints, field by field, and nothing else is printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters import matrices, save
from cases import LAYOUTS
from jsonschema import Draft202012Validator
from models import DENSE, FOLDER
from native_checkpoints import edit_manifest, manifest
from PIL import Image
from test_cli import run
from test_verification import change

from gemma_convert import to_hf, to_native
from gemma_convert.cli.app import app

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
FILES = sorted(SCHEMAS.glob("*.json"))
MANIFEST = "hf/gemma-convert/manifest.json"
EMPTY = (None, [], {}, "")


def printed(*arguments: object, code: int = 0) -> dict:
    """The JSON that a command prints, which is all that stands on its stdout."""
    done = run(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def load(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def parts(schema: object, place: str = "") -> Iterator[tuple[str, dict]]:
    """(place, schema) of every schema inside of one."""
    if isinstance(schema, dict):
        yield place, schema
        for key, value in schema.items():
            for name, part in value.items() if key == "properties" else [(key, value)]:
                yield from parts(part, f"{place}/{name}")
    elif isinstance(schema, list):
        for number, part in enumerate(schema):
            yield from parts(part, f"{place}/{number}")


@pytest.fixture
def source(tiny) -> Path:
    return tiny("31b", layers=6)


@pytest.fixture
def edited(source, tmp_path) -> Path:
    """The source with a float32 tensor that bfloat16 rounds, and files that are not carried."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "31b-in-float32-with-a-head"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = "model.language_model.embed_tokens.weight"
    wide = tensors[embedding].astype(np.float32) + np.float32(1e-6)
    head = {"lm_head.weight": wide}
    save_file(tensors | {embedding: wide} | head, folder / "model.safetensors")
    (folder / "model.gguf").write_bytes(b"x")
    return folder


def tiny_reports(source, edited, folder, shallow, converted):
    yield printed("tiny", "e2b", folder / "made")


def trained(out: Path, folder: Path) -> Path:
    """A copy of a conversion with another value in an array, and a file that nobody wrote."""
    shutil.copytree(out, folder)
    change(folder / "0" / "items", "params/params/decoder/decoder_norm/scale", lambda v: v + 1)
    (folder / "notes.txt").write_text("trained")
    return folder


def to_native_reports(source, edited, folder, shallow, converted):
    lossy = ("--dtype", "bfloat16", "--scaled-dtype", "bfloat16")
    yield printed("to-native", edited, folder / "a", "--format", "maxtext", *lossy)
    yield printed("to-native", edited, folder / "b", "--format", "maxtext")
    omitted = shallow("e2b", kv_shared="omit")
    yield printed("to-native", omitted, folder / "c", "--format", "gemma-jax", "--dry-run")
    yield printed("to-native", source, folder / "d", "--format", "fast-llm", "--text-only")
    changed = trained(converted(source, "maxtext"), folder / "trained")
    yield printed("to-native", changed, folder / "e", "--format", "gemma-jax")
    adapter = save(folder / "adapter", source, matrices(source))
    yield printed("to-native", adapter, folder / "f", "--format", "maxtext")


def to_hf_reports(source, edited, folder, shallow, converted):
    out = converted(source, "maxtext")
    yield printed("to-hf", out, folder / "back")
    yield printed("to-hf", converted(edited, "maxtext"), folder / "b", "--dtype", "bfloat16")
    yield printed("to-hf", out, folder / "other", "--like", edited, "--dry-run")
    told = ("--settings", "sliding_window_size=5")
    yield printed("to-hf", trained(out, folder / "trained"), folder / "changed", *told)
    shutil.copytree(out / "0", folder / "run" / "5")
    yield printed("to-hf", folder / "run", folder / "of-a-step", "--like", source)
    tensors = manifest(out)["tensors"]
    one, other = (f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    swapped = {one: tensors[other], other: tensors[one]}
    edit_manifest(shutil.copytree(out, folder / "contradicting"), tensors=tensors | swapped)
    yield printed("to-hf", folder / "contradicting", folder / "c", code=1)


def verify_reports(source, edited, folder, shallow, converted):
    out = converted(source, "maxtext")
    yield printed("verify", out)
    yield printed("verify", out, "--against", source)
    yield printed("verify", out, "--against", shallow("31b", seed=1), code=1)
    rounded = converted(edited, "maxtext", scaled_dtype="bfloat16")
    yield printed("verify", rounded, "--against", edited)
    to_hf(out, folder / "back")
    shutil.copytree(out, folder / "bare")
    shutil.rmtree(folder / "bare" / "hf")
    yield printed("verify", folder / "back", "--against", folder / "bare")


def inspect_reports(source, edited, folder, shallow, converted):
    yield printed("inspect", source)
    out = converted(edited, "maxtext", scaled_dtype="bfloat16")
    yield printed("inspect", out)
    (folder / "bare").mkdir()
    shutil.copy(source / "model.safetensors", folder / "bare")
    yield printed("inspect", folder / "bare")
    yield printed("inspect", save(folder / "adapter", source, matrices(source)))
    shutil.copytree(out / "0", folder / "run" / "5")
    yield printed("inspect", folder / "run")
    yield from damaged(folder / "bare", edited)


def damaged(folder: Path, edited: Path) -> Iterator[dict]:
    """Reports of a checkpoint whose tensors are not those of its config.json, and of a run."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(edited / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    tensors["model.language_model.layers.0.layer_scalar"] = np.zeros(2, np.float32)
    tensors["extra"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(edited / "config.json", folder)
    yield printed("inspect", folder)


def golden_reports(source, edited, folder, shallow, converted):
    yield printed("golden", source, folder / "golden.safetensors", "--tokens", 12)


def logit_check_reports(source, edited, folder, shallow, converted):
    import gemma_convert
    from gemma_convert.logits.drift import Drift

    out = converted(source, "maxtext")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    yield printed("logit-check", source, out, "--tokens", 12, "--image", folder / "a.png")
    other = shallow("31b", seed=1)
    rounded = converted(edited, "maxtext", scaled_dtype="bfloat16")
    report = gemma_convert.logit_check(other, rounded, prompts=("a cat",))
    worst = replace(report.divergence.worst, kl=float("nan"), text="a")
    numberless = replace(report.divergence, worst=worst, kl_max=float("nan"), kl_mean=float("inf"))
    drift = Drift(1e-3, (float("nan"), 0.1), 0.2, tolerance=2e-3)
    yield json.loads(json.dumps(replace(report, divergence=numberless, drift=drift).as_json()))


def compare_reports_reports(source, edited, folder, shallow, converted):
    """Two reports that are alike, one that is worse, and one of another kind."""
    import sample_reports

    makes = {"passed": sample_reports.report, "failed": sample_reports.failed}
    for name, make in makes.items():
        (folder / name).write_text(json.dumps(make().as_json()), encoding="utf-8")
    other = sample_reports.report(dtype="bfloat16")
    (folder / "other").write_text(json.dumps(other.as_json()), encoding="utf-8")
    yield printed("compare-reports", folder / "passed", folder / "passed")
    yield printed("compare-reports", folder / "passed", folder / "failed", code=1)
    yield printed("compare-reports", folder / "failed", folder / "other")


def flops_reports(source, edited, folder, shallow, converted):
    dense = FOLDER / DENSE
    yield printed("flops", dense, "--seq-len", 64)
    measured = ("--step-time", "1e-9", "--hardware", "H100", "--devices", 2)
    media = ("--images", 1, "--freeze", "vision", "--recompute", "full")
    yield printed("flops", dense, "--seq-len", 4096, *measured, *media)
    yield printed("flops", shallow("e2b"), "--seq-len", 900, "--sounds", 1, "--mode", "prefill")
    yield printed("flops", dense, "--seq-len", 64, "--mode", "decode")


def mappings_reports(source, edited, folder, shallow, converted):
    yield printed("mappings")
    for layout in LAYOUTS:
        yield printed("mappings", "--format", layout)
    yield printed("mappings", "--format", "maxtext", "--model", edited)
    yield printed("mappings", "--model", source)
    omitted = shallow("e2b", kv_shared="omit")
    yield printed("mappings", "--format", "gemma-jax", "--model", omitted)
    yield printed("mappings", "--format", "maxtext", "--model", source, "--scan-layers")
    yield printed("mappings", "--format", "gemma-jax", "--model", source, "--facts")


def progress_reports(source, edited, folder, shallow, converted):
    """Every line on stderr of runs that convert, warn and fail."""
    lossy = ("--dtype", "bfloat16", "--scaled-dtype", "bfloat16")
    for target in (folder / "a", folder / "a"):
        words = ("to-native", edited, target, "--format", "maxtext", *lossy, "--json-lines")
        for line in run(*words).stderr.splitlines():
            yield json.loads(line)


def manifest_reports(source, edited, folder, shallow, converted):
    yield load(converted(shallow("e2b", kv_shared="omit"), "gemma-jax") / MANIFEST)
    rounded = converted(edited, "maxtext", scaled_dtype="bfloat16", dtype="bfloat16")
    yield load(rounded / MANIFEST)
    yield load(converted(source, "fast-llm") / MANIFEST)
    adapter = save(folder / "adapter", source, matrices(source))
    to_native(adapter, folder / "adapted", layout="maxtext")
    yield load(folder / "adapted" / MANIFEST)
    odd = shutil.copytree(source, folder / "odd")
    config = load(odd / "config.json")
    config["text_config"]["of_tomorrow"] = 1
    (odd / "config.json").write_text(json.dumps(config))
    key = "text_config.of_tomorrow"
    to_native(odd, folder / "ignoring", layout="maxtext", ignore_facts=(key,))
    yield load(folder / "ignoring" / MANIFEST)


NEVER_HERE = {
    "inspect": {"/extras"},  # of a training run
    "manifest": set(),
}
VERSIONS = {
    "to-native": 3,
    "inspect": 2,
    "to-hf": 2,
    "verify": 2,
    "manifest": 3,
    "mappings": 2,
    "logit-check": 3,
    "flops": 2,
}
"""Of the schemas that have had others before."""

REPORTS = {
    "tiny": tiny_reports,
    "to-native": to_native_reports,
    "to-hf": to_hf_reports,
    "verify": verify_reports,
    "inspect": inspect_reports,
    "golden": golden_reports,
    "logit-check": logit_check_reports,
    "compare-reports": compare_reports_reports,
    "flops": flops_reports,
    "mappings": mappings_reports,
    "manifest": manifest_reports,
    "progress": progress_reports,
}


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_printed_is_what_the_schema_says(
    name, source, edited, tmp_path, shallow, converted
):
    schema = load(SCHEMAS / f"{name}-{VERSIONS.get(name, 1)}.json")
    validator = Draft202012Validator(schema)
    folder = tmp_path / "work"
    folder.mkdir()
    told: set[str] = set()
    for report in REPORTS[name](source, edited, folder, shallow, converted):
        errors = [
            f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(report)
        ]
        assert errors == []
        assert report["schema"] == f"gemma-convert/{name}/{VERSIONS.get(name, 1)}"
        told |= fields_told(schema, report)
    fields = {place for place, part in parts(schema) if field_of(place, part)}
    assert sorted(fields - told - NEVER_HERE.get(name, set())) == []


def field_of(place: str, part: dict) -> bool:
    """Whether a part of a schema is a field, a list's item or a mapping's value."""
    return bool(place) and ("type" in part or "enum" in part) and not place.endswith("/1")


def fields_told(schema: dict, value: object, place: str = "") -> set[str]:
    """The places of a schema that `value` has something to say at: not null, not empty."""
    told = set() if value in EMPTY else {place}
    for number, choice in enumerate(schema.get("anyOf", [])):
        if Draft202012Validator(choice).is_valid(value):
            told |= fields_told(choice, value, f"{place}/anyOf/{number}")
    if isinstance(value, dict):
        for key, one in value.items():
            if key in schema.get("properties", {}):
                told |= fields_told(schema["properties"][key], one, f"{place}/{key}")
            else:
                more = schema.get("additionalProperties")
                if isinstance(more, dict):
                    told |= fields_told(more, one, f"{place}/additionalProperties")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            prefix = schema.get("prefixItems", [])
            if number < len(prefix):
                told |= fields_told(prefix[number], one, f"{place}/prefixItems/{number}")
            elif isinstance(schema.get("items"), dict):
                told |= fields_told(schema["items"], one, f"{place}/items")
    return told


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_is_described_and_closed(file):
    schema = load(file)
    Draft202012Validator.check_schema(schema)
    name, _, number = file.stem.rpartition("-")
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:gemma-convert:{name}:{number}"
    assert schema["properties"]["schema"]["const"] == f"gemma-convert/{name}/{number}"
    for place, part in parts(schema):
        described = part.get("properties", {}).values()
        for field in described:
            assert len(field.get("description", "")) > 8, place
            assert field["description"].endswith("."), place
        if "properties" in part:
            assert part["additionalProperties"] is False, place
            assert set(part["required"]) <= set(part["properties"]), place
            optional = set(part["properties"]) - set(part["required"])
            assert optional == ({"arrays"} if file.stem == "to-native-3" and not place else set())
        elif "object" in part.get("type", ()):
            assert isinstance(part["additionalProperties"], dict), place


def test_every_command_has_its_schema():
    commands = {command.name for command in app.registered_commands}
    assert commands | {"manifest", "progress"} == set(REPORTS)
    assert {file.stem for file in FILES} == {f"{name}-{VERSIONS.get(name, 1)}" for name in REPORTS}


def test_an_error_prints_no_json(tmp_path):
    for command in (("inspect", tmp_path), ("mappings", "--model", tmp_path / "none")):
        done = run(*command, "--json")
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("error: ")
