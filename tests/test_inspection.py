"""inspect: layouts, models, forms and coverage, by what is in the folder alone."""

from __future__ import annotations

import json
import shutil

import pytest
from cases import CASES, FAMILIES

from gemma_convert import SourceError, inspect, to_native


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"text_only": True}, {"shards": 3}])
def test_huggingface(tiny, family, options):
    report = inspect(tiny(family, **options))
    assert (report.layout, report.family, report.scanned) == ("huggingface", family, None)
    assert report.coverage.complete
    assert report.dtypes == {"bfloat16": report.tensors}
    assert report.bytes == 2 * report.parameters
    expected = {"e2b": ("vision", "audio"), "e4b": ("vision", "audio")}.get(family, ("vision",))
    assert report.towers == (() if "text_only" in options else expected)


def test_coverage_names_what_is_wrong(shallow, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(shallow("31b"), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    tensors["model.odd"] = torch.zeros(1)
    tensors["model.language_model.layers.0.layer_scalar"] = torch.zeros(2)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    coverage = inspect(tmp_path / "hf").coverage
    assert coverage.missing == ("model.language_model.norm.weight",)
    assert coverage.unexpected == ("model.odd",)
    assert coverage.misshapen == (
        "model.language_model.layers.0.layer_scalar: expected [1], found [2]",
    )
    assert not coverage.complete


@pytest.mark.parametrize(("family", "scanned"), CASES)
def test_maxtext(shallow, tmp_path, family, scanned):
    made = to_native(shallow(family, scanned), tmp_path / "out", scan_layers=scanned)
    whole = inspect(tmp_path / "out")
    assert (whole.layout, whole.family, whole.scanned) == ("maxtext", family, scanned)
    assert whole.tensors == made.arrays_written
    assert whole.coverage.complete
    assert whole.layers == len(made.plan.architecture.text.layers)
    assert whole.extras == ("step",)
    assert whole.converted_by.startswith("gemma-convert ")
    assert json.loads(json.dumps(whole.as_json()))["complete"] is True
    for part in ("0", "0/items"):
        assert inspect(tmp_path / "out" / part).coverage == whole.coverage
    shutil.rmtree(tmp_path / "out" / "hf")
    bare = inspect(tmp_path / "out")
    assert bare.coverage is None
    assert (bare.family, bare.layers, bare.scanned) == (family, whole.layers, scanned)


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, "gemma-jax") for family in FAMILIES), ("26b-a4b", "fast-llm"), ("31b", "fast-llm")],
)
def test_other_layouts(shallow, converted, tmp_path, family, layout):
    out = converted(shallow(family), layout)
    whole = inspect(out)
    assert (whole.layout, whole.family, whole.scanned) == (layout, family, False)
    assert whole.coverage.complete
    assert whole.coverage.expected == whole.tensors
    towers = {"fast-llm": ()}.get(
        layout, ("vision", "audio") if family.startswith("e") else ("vision",)
    )
    assert whole.towers == towers
    assert whole.dtypes == {"bfloat16": whole.tensors}
    assert whole.extras == ()
    assert whole.config == str(out / "hf" / "config.json")
    assert whole.converted_by.startswith("gemma-convert ")
    shutil.copytree(out, tmp_path / "bare", ignore=shutil.ignore_patterns("hf"))
    bare = inspect(tmp_path / "bare")
    assert (bare.family, bare.layers, bare.towers) == (family, whole.layers, towers)
    assert (bare.coverage, bare.config, bare.converted_by) == (None, None, None)
    assert (bare.parameters, bare.bytes) == (whole.parameters, whole.bytes)


@pytest.mark.parametrize("kv_shared", ["keep", "omit"])
def test_arrays_that_were_filled_in_are_expected(tiny, converted, kv_shared):
    source = tiny("e4b", layers=12, kv_shared=kv_shared)
    assert inspect(converted(source, "gemma-jax")).coverage.complete


def test_lossy_rows_are_named(shallow, tmp_path):
    to_native(shallow("31b"), tmp_path / "out", scaled_dtype="bfloat16")
    assert inspect(tmp_path / "out").lossy_rows == ("model.language_model.embed_tokens.weight",)


def test_checkpoints_of_the_real_frameworks(oracle):
    for folder in sorted((oracle / "maxtext").iterdir()):
        report = inspect(folder)
        family, form, *_ = folder.name.split("_")
        assert (report.layout, report.family) == ("maxtext", family)
        assert report.scanned == (form == "scanned")
        assert report.layers == {"e2b": 35, "e4b": 42}.get(family, 12)
        assert ("opt_state" in report.extras) == folder.name.endswith("_training")
    for folder in sorted((oracle / "gemma_jax").iterdir()):
        report = inspect(folder)
        assert (report.layout, report.family) == ("gemma-jax", folder.name)
        assert "vision" in report.towers
    for folder in sorted((oracle / "fast_llm").iterdir()):
        report = inspect(folder)
        assert (report.layout, report.family) == ("fast-llm", folder.name)
        assert report.layers == 12
    for folder in sorted((oracle / "hf").iterdir()):
        assert inspect(folder).coverage.complete


@pytest.mark.parametrize("damage", ["tree", "json", "array", "folder"])
def test_broken_orbax_folders(shallow, tmp_path, damage):
    to_native(shallow("31b"), tmp_path / "out", ocdbt=False)
    items = tmp_path / "out" / "0" / "items"
    if damage == "tree":
        (items / "_METADATA").write_text('{"tree_metadata": {"x": {}}}')
    elif damage == "json":
        (items / "_METADATA").write_text("{")
    elif damage == "array":
        shutil.rmtree(items / "params.params.decoder.decoder_norm.scale")
    else:
        (items / "_METADATA").unlink()
    with pytest.raises(SourceError):
        inspect(tmp_path / "out")
