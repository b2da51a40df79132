"""A conversion for a version of the framework: MaxText's release, and the one that sees for 12B.

Facts of the second: MaxText at commit 85b12b8, whose own converter gave the same trees, scanned and
not, bit for bit.
"""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from maxtext_by_hand import maxtext_tree
from models import DENSE, UNIFIED, load_architecture
from native_checkpoints import CARRIED, arrays_of, differing, edit_manifest, passes, sums
from PIL import Image
from test_cli import fails, run
from test_verification import change
from trees import read_safetensors

from gemma_convert import GemmaConvertError, SourceError, UsageError, inspect, to_hf, to_native
from gemma_convert.checkpoint import manifest as manifests
from gemma_convert.errors import MappingError
from gemma_convert.forward.encoder import encoded
from gemma_convert.layouts.maxtext import embedder
from gemma_convert.layouts.maxtext.settings import maxtext_settings, settings_files
from gemma_convert.layouts.maxtext.tree import restore_tree
from gemma_convert.layouts.registry import open_native
from gemma_convert.logits.check import logit_check
from gemma_convert.mapping import table as tables
from gemma_convert.mapping.facts import load_facts
from gemma_convert.mapping.notation import Condition, parse_condition
from gemma_convert.mapping.table import load_inventory, load_table, parse_table
from gemma_convert.mapping.versions import versioned
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import image_sequences

RELEASE, SEEING = "0.2.5", "85b12b8"
EMBEDDER = "vision_encoder/Gemma4UnifiedVisionEmbedder_0/"
PROJECTION = "vision_encoder/Gemma4VisionProjector_0/projection/kernel"
SOUNDS = "model.embed_audio.embedding_projection.weight"
KL_LIMIT = 2e-6
"""Largest KL of a token with an image: 7e-8 was seen, for the epsilon of norms; text has 2e-11."""

TOML = """
layout = "x"
[versions.first]
[versions.second]
has = ["new"]
models = { 12b = "other" }
"""


@pytest.fixture(scope="module")
def native(shallow, converted):
    """(source, its conversion that sees): shallow, and two blocks deep where it is scanned."""

    def convert(scanned: bool = False) -> tuple[Path, Path]:
        source = shallow("12b", scanned)
        options = {"scan_layers": scanned, "framework_version": SEEING}
        return source, converted(source, "maxtext", **options)

    return convert


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Name → file: one of noise, and one that is all but flat."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    noise = random.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    flat = np.uint8(120) + random.integers(0, 2, (60, 80, 3), dtype=np.uint8)
    for name, pixels in (("noise", noise), ("flat", flat)):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in ("noise", "flat")}


def by_hand(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Path below params/params → array of the embedder, by plain numpy."""
    theirs = "model.vision_embedder."
    norms = {
        f"{EMBEDDER}{norm}/{ours}": hf[f"{theirs}{norm}.{word}"]
        for norm in ("patch_ln1", "patch_ln2", "pos_norm")
        for ours, word in (("scale", "weight"), ("bias", "bias"))
    }
    return norms | {
        f"{EMBEDDER}patch_dense/kernel": hf[f"{theirs}patch_dense.weight"].T,
        f"{EMBEDDER}patch_dense/bias": hf[f"{theirs}patch_dense.bias"],
        f"{EMBEDDER}pos_emb_param": hf[f"{theirs}pos_embedding"],
        PROJECTION: hf["model.embed_vision.embedding_projection.weight"].T,
    }


# There and back.


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("scanned", [False, True])
def test_the_embedder_goes_there_and_every_file_comes_back(native, tmp_path, scanned):
    source, out = native(scanned)
    hf = read_safetensors(source)
    text = maxtext_tree(hf, read_architecture(source), scanned)
    assert not differing(arrays_of(out, "maxtext"), text | by_hand(hf))
    assert list(read_safetensors((out / CARRIED).parent)) == [SOUNDS]
    for against in (None, source):
        passes(out, against)
    assert to_hf(out, tmp_path / "back").bit_for_bit
    assert sums(tmp_path / "back") == sums(source)


def test_it_is_recorded_reported_and_inspected(native):
    source, out = native()
    kept = json.loads((out / CARRIED.parent / "manifest.json").read_text())
    assert (kept["schema"], kept["framework_version"]) == ("gemma-convert/manifest/3", SEEING)
    report = to_native(source, out.parent / "o", framework_version=SEEING, dry_run=True)
    assert report.framework == f"MaxText {SEEING}"
    why = "MaxText has no audio embedder for Gemma 4 12B"
    assert report.carried_why == {why: 1}
    found = inspect(out)
    assert (found.family, found.towers, found.coverage.complete) == ("12b", ("vision",), True)


def test_the_release_is_meant_where_nothing_is_said(shallow, converted, tmp_path):
    source = shallow("12b")
    out = converted(source, "maxtext")
    to_native(source, tmp_path / "named", framework_version=RELEASE)
    assert not differing(arrays_of(out, "maxtext"), arrays_of(tmp_path / "named", "maxtext"))
    for folder in (out, tmp_path / "named"):
        kept = json.loads((folder / CARRIED.parent / "manifest.json").read_text())
        assert kept["framework_version"] == RELEASE
        assert kept["settings"]["model_name"] == "gemma4-31b"
    layout = converted(source, "fast-llm")
    kept = json.loads((layout / CARRIED.parent / "manifest.json").read_text())
    assert kept["framework_version"] is None


def test_a_trained_tree_tells_its_version(native, tmp_path):
    source, out = native()
    bare = shutil.copytree(out, tmp_path / "bare", ignore=shutil.ignore_patterns("hf"))
    with open_native(bare) as opened:
        assert opened.version == SEEING
    assert inspect(bare).family == "12b"
    to_hf(bare, tmp_path / "back", like=source)
    assert sums(tmp_path / "back") == sums(source)
    change(bare / "0" / "items", f"params/params/{EMBEDDER}pos_norm/bias", lambda v: v + 1)
    to_hf(bare, tmp_path / "trained", like=source)
    before, after = read_safetensors(source), read_safetensors(tmp_path / "trained")
    assert differing(before, after) == ["model.vision_embedder.pos_norm.bias"]


@pytest.mark.large
def test_one_version_becomes_the_other(native, tmp_path):
    source, out = native()
    to_native(out, tmp_path / "blind", framework_version=RELEASE)
    to_native(tmp_path / "blind", tmp_path / "seeing", framework_version=SEEING)
    assert not differing(arrays_of(tmp_path / "seeing", "maxtext"), arrays_of(out, "maxtext"))
    to_hf(tmp_path / "blind", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(source)


def test_the_manifest_counts_more_than_the_tree(native, shallow, tmp_path):
    """A text model has the same arrays for both versions."""
    out = tmp_path / "text"
    to_native(native()[0], out, framework_version=SEEING, text_only=True)
    with open_native(out) as opened:
        assert opened.version == SEEING and not opened.towers
    passes(out, native()[0])
    edit_manifest(out, framework_version="0.9")
    with pytest.raises(SourceError, match="an unsupported version of its framework") as caught:
        open_native(out)
    assert (caught.value.expected, caught.value.found) == (f"{RELEASE}, {SEEING}", "0.9")
    edit_manifest(out, framework_version=3)
    with pytest.raises(SourceError, match="malformed"):
        open_native(out)


def test_a_manifest_of_the_second_version_is_read(shallow, tmp_path, monkeypatch):
    """It names no version of the framework."""
    source = shallow("12b")
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "SCHEMA", "gemma-convert/manifest/2")
        patch.setattr("gemma_convert.tasks.conversion_sidecar.write_manifest", _without_version)
        to_native(source, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / CARRIED.parent / "manifest.json").read_text())
    assert kept["schema"] == "gemma-convert/manifest/2" and "framework_version" not in kept
    for against in (None, source):
        passes(tmp_path / "out", against)
    (tmp_path / "out/hf/config.json").write_bytes(b"{}")
    with pytest.raises(SourceError, match="file was changed or lost"):
        to_hf(tmp_path / "out", tmp_path / "back")


def _without_version(path, content):
    del content["framework_version"]
    manifests.write_manifest(path, content)


def test_a_run_for_one_version_is_not_continued_for_another(native, tmp_path):
    source, _ = native()
    to_native(source, tmp_path / "out", framework_version=RELEASE, text_only=True)
    fails(4, "to-native", source, tmp_path / "out", "--format", "maxtext", "--text-only",
          "--framework-version", SEEING, "--resume")  # fmt: skip


# Settings.


def published(**changes) -> SimpleNamespace:
    plan = {"scanned": True, "ignored_facts": (), "version": SEEING}
    return SimpleNamespace(**{"architecture": load_architecture(UNIFIED), **plan, **changes})


@pytest.mark.parametrize("sees", [False, True])
def test_12b_has_a_name_of_its_own_and_needs_no_sizes(sees):
    assert maxtext_settings(published(), Path("out/0/items"), multimodal=sees) == {
        "model_name": "gemma4-12b",
        "scan_layers": "true",
        "use_multimodal": str(sees).lower(),
        "load_parameters_path": "out/0/items",
    }


def test_other_sizes_are_told(native):
    architecture = read_architecture(native()[0])
    settings = maxtext_settings(published(architecture=architecture), Path("x"), multimodal=True)
    vision = architecture.vision_embedder
    assert {key: settings[key] for key in settings if key.endswith("_vit")} == {
        "hidden_size_for_vit": str(vision.embed),
        "patch_size_for_vit": str(vision.patch_size * vision.pooling),
        "num_position_embeddings_for_vit": str(vision.positions),
    }
    files = settings_files(published(architecture=architecture), Path("x"), multimodal=True)
    assert list(files) == ["maxtext.yml", "models/gemma4-12b.yml"]
    assert "vision_encoder_block: gemma4_unified" in files["models/gemma4-12b.yml"]


def test_other_models_are_told_what_they_were():
    plans = [published(architecture=load_architecture(DENSE), version=v) for v in (None, SEEING)]
    told, as_before = (maxtext_settings(plan, Path("x"), multimodal=True) for plan in plans)
    assert told == as_before


# Checked by running.


@pytest.mark.share(2)
@pytest.mark.parametrize("scanned", [False, True])
def test_text_and_images_are_those_of_transformers(native, pictures, scanned):
    source, out = native(scanned)
    report = logit_check(source, out, tokens=3, images=[pictures["noise"]])
    assert report.verdict == "same model" and report.divergence.kl_max < KL_LIMIT
    assert report.longest_sequence > 2 * report.sliding_window and report.images == 1
    of_tower = [one.part for one in report.local.parts if one.tower == "vision"]
    assert of_tower == ["patch embedding", "norm before the projection", "soft tokens"]
    (warning,) = [one for one in report.warnings if "epsilon" in one]
    assert warning.startswith("vision, the patch embedding: the epsilon of its norms with biases")


def test_what_the_epsilon_of_maxtext_makes_of_a_flat_image_fails(native, pictures):
    """Its parts are those of transformers with the same epsilon, and its logits are not."""
    source, out = native()
    report = logit_check(source, out, tokens=3, images=[pictures["flat"]])
    assert report.local.passed and not report.passed and report.divergence.kl_max > 0.1


def test_without_the_other_epsilon_nothing_is_left(native, pictures, monkeypatch):
    real = embedder.layer_norm
    monkeypatch.setattr(
        embedder, "layer_norm", lambda x, scale, bias, _: real(x, scale, bias, 1e-5)
    )
    embedder._embedded.clear_cache()
    source, out = native()
    try:
        report = logit_check(source, out, tokens=3, images=list(pictures.values()))
    finally:
        embedder._embedded.clear_cache()
    assert report.passed and report.divergence.kl_max < 1e-9
    assert not any("epsilon" in one for one in report.warnings)


@pytest.mark.large
def test_the_whole_model_sees_too(native, pictures):
    source, out = native()
    report = logit_check(source, out, tokens=3, images=[pictures["noise"]], whole_model=True)
    assert report.passed and report.divergence.kl_max < KL_LIMIT


def test_a_conversion_that_does_not_see_refuses_images(shallow, converted, pictures):
    source = shallow("12b")
    for layout in ("maxtext", "gemma-jax"):
        with pytest.raises(UsageError, match="has no vision tower"):
            logit_check(source, converted(source, layout), images=[pictures["noise"]])


def test_the_epsilon_is_that_of_the_text_model(native, pictures):
    """What MaxText is told of it counts for the norms of images as well."""
    source, out = native()
    architecture = read_architecture(source)
    (image,) = image_sequences(source, architecture, [pictures["flat"]])
    tree = restore_tree(out / "0" / "items")

    def soft(epsilon):
        text = SimpleNamespace(norm_epsilon=epsilon, embed=architecture.text.embed)
        model = SimpleNamespace(text=text, vision_embedder=architecture.vision_embedder)
        return np.asarray(
            encoded(embedder.image_encoder(tree, model, image.pixels, image.positions))
        )

    assert soft(1e-6).shape == (image.places.sum(), architecture.text.embed)
    assert np.abs(soft(1e-6) - soft(1e-5)).max() > 0.01


def test_squares_of_patches_are_those_of_transformers(native, pictures):
    """Its own processor needs torchvision; the function that merges patches does not."""
    import torch
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    architecture = read_architecture(native()[0])
    models = Path(transformers.__path__[0], "models")
    file = models / "gemma4_unified" / "image_processing_gemma4_unified.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [one for one in tree.body if getattr(one, "name", "") == "patches_merge"]
    scope = {"torch": torch, "math": math}
    exec(compile(tree, str(file), "exec"), scope)
    processor = Gemma4ImageProcessorPil(patch_size=3, max_soft_tokens=70, pooling_kernel_size=3)
    for picture in pictures.values():
        (image,) = image_sequences(native()[0], architecture, [picture])
        real = int(image.places.sum())
        found = processor(images=Image.open(picture), return_tensors="pt")
        small, places = (
            found[key][:, : 9 * real] for key in ("pixel_values", "image_position_ids")
        )
        merged, positions = scope["patches_merge"](small, places, real)
        assert np.array_equal(image.pixels[:real], merged[0].numpy())
        assert np.array_equal(image.positions[:real], positions[0].numpy())
        assert (image.positions[real:] == -1).all() and not image.pixels[real:].any()


# Planted mistakes.

CROSSED = {
    "scale and bias of the first norm": ("patch_ln1/scale", "patch_ln1/bias"),
    "scale and bias of the second norm": ("patch_ln2/scale", "patch_ln2/bias"),
    "scale and bias of the third norm": ("pos_norm/scale", "pos_norm/bias"),
    "the second norm and the third": ("patch_ln2/scale", "pos_norm/scale"),
    "their biases": ("patch_ln2/bias", "pos_norm/bias"),
    "the bias of the map and of a norm": ("patch_dense/bias", "patch_ln2/bias"),
}
AXES = {
    "the map": ("patch_dense/kernel [patch vit_embed]", "patch_dense/kernel [vit_embed patch]"),
    "positions": (
        "pos_emb_param [positions xy vit_embed]",
        "pos_emb_param [xy positions vit_embed]",
    ),
    "the projection": (
        "Gemma4VisionProjector_0/projection/kernel [vit_embed embed]",
        "Gemma4VisionProjector_0/projection/kernel [embed vit_embed]",
    ),
}
PLANTED = {
    "x and y of positions": ("pos_emb_param", lambda v: v[:, ::-1]),
    "positions moved by one": ("pos_emb_param", lambda v: np.roll(v, 1, 0)),
    "patches with their colours first": (
        "patch_dense/kernel",
        lambda v: v.reshape(-1, 3, v.shape[1]).swapaxes(0, 1).reshape(v.shape),
    ),
    "one flipped sign": ("pos_norm/bias", lambda v: np.concatenate([-v[:1], v[1:]])),
    "the bias of the map lost": ("patch_dense/bias", np.zeros_like),
}


@pytest.fixture
def mistaken(monkeypatch):
    """mistaken(edit): from then on MaxText's table has the edited text."""
    file, read = tables.table_file("maxtext"), tables.read_toml

    def plant(edit):
        before = file.read_text(encoding="utf-8")
        text = edit(before)
        assert text != before

        def read_mistaken(path):
            return (tomllib.loads(text), path.name) if path == file else read(path)

        monkeypatch.setattr(tables, "read_toml", read_mistaken)
        load_table.cache_clear()

    yield plant
    monkeypatch.undo()
    load_table.cache_clear()


def crossed(one: str, other: str):
    def edit(text: str) -> str:
        swap = {one: other, other: one}
        return re.sub(
            rf"(Embedder_0/)({re.escape(one)}|{re.escape(other)}) ",
            lambda match: f"{match[1]}{swap[match[2]]} ",
            text,
        )

    return edit


@pytest.mark.share(6)
@pytest.mark.parametrize("name", CROSSED)
def test_rows_crossed_in_the_table_are_found(native, pictures, mistaken, tmp_path, name):
    source, right = native()
    mistaken(crossed(*CROSSED[name]))
    to_native(source, tmp_path / "out", framework_version=SEEING)
    passes(tmp_path / "out", None)
    report = logit_check(source, tmp_path / "out", tokens=3, images=[pictures["noise"]])
    assert not report.passed
    assert [one.name for one in report.local.failed] == ["vision, the patch embedding"]
    assert differing(arrays_of(tmp_path / "out", "maxtext"), arrays_of(right, "maxtext"))


@pytest.mark.parametrize("name", AXES)
def test_axes_exchanged_in_the_table_are_found(native, pictures, mistaken, tmp_path, name):
    source, _ = native()
    old, new = AXES[name]
    mistaken(lambda text: text.replace(old, new))
    to_native(source, tmp_path / "out", framework_version=SEEING)
    with pytest.raises(SourceError, match="has an unexpected shape"):
        logit_check(source, tmp_path / "out", tokens=3, images=[pictures["noise"]])


@pytest.mark.share(5, 1)
@pytest.mark.parametrize("name", PLANTED)
def test_mistakes_in_arrays_are_found(native, pictures, tmp_path, name):
    source, out = native()
    copy = shutil.copytree(out, tmp_path / "out")
    array, edit = PLANTED[name]
    change(copy / "0" / "items", f"params/params/{EMBEDDER}{array}", edit)
    assert run("verify", copy).returncode == 1
    report = logit_check(source, copy, tokens=3, images=[pictures["noise"]])
    assert not report.passed
    assert [one.name for one in report.local.failed] == ["vision, the patch embedding"]


def test_an_image_that_full_layers_see_one_way_is_found(native, pictures, monkeypatch):
    """12B differs from other models in that: its tokens see one another in all layers."""
    from gemma_convert.model import config

    real, one_way = config.TextArchitecture, {"whole_images": False}
    monkeypatch.setattr(config, "TextArchitecture", lambda **facts: real(**{**facts, **one_way}))
    source, out = native()
    report = logit_check(source, out, tokens=3, images=[pictures["noise"]])
    assert not report.passed and report.divergence.kl_max > 1e-4
    assert {one.part for one in report.local.failed} == {"attention"}


# Tables and options.


def test_a_version_of_a_table():
    data = tomllib.loads(TOML)
    cases = ((None, False, {}), ("first", False, {}), ("second", True, {"12b": "other"}))
    for name, holds, models in cases:
        top, version = versioned(data, "x.toml", name)
        assert (version.name, version.models) == (name or "first", models)
        assert parse_condition("moe & new", top.version) == Condition((("moe", True),), holds)
        assert parse_condition("!new", top.version).possible is not holds
        assert (Condition() & parse_condition("new", top.version)).possible is holds
    assert versioned({}, "x.toml", None)[1].name is None


@pytest.mark.parametrize(
    ("data", "name", "error", "found"),
    [
        (TOML, "third", UsageError, "third"),
        ("", "0.2.5", UsageError, "0.2.5"),
        (TOML.replace('"new"', '"moe"'), None, MappingError, "{'moe'}"),
        (TOML + "why = 3", None, MappingError, None),
        (TOML.replace('["new"]', "3"), None, MappingError, "3"),
    ],
)
def test_versions_that_are_none(data, name, error, found):
    with pytest.raises(error) as caught:
        versioned(tomllib.loads(data), "x.toml", name)
    assert found is None or caught.value.found == found


def test_rows_of_one_version_are_not_rows_of_the_other():
    release, seeing = load_table("maxtext"), load_table("maxtext", SEEING)
    assert (release.version, seeing.version) == (RELEASE, SEEING)
    new = {row.native.pattern.text for row in seeing.rows} - {
        row.native.pattern.text for row in release.rows
    }
    assert len(new) == len(seeing.rows) - len(release.rows) - 1 == 9
    assert {row.hf.view.pattern.text for row in seeing.rows} >= {
        row.hf.view.pattern.text for row in release.rows
    }
    assert load_facts("maxtext").models["12b"] == "gemma4-31b"
    assert load_facts("maxtext", SEEING).models["12b"] == "gemma4-12b"
    assert load_table("fast-llm").version is None


def test_a_row_that_no_version_maps_is_missed():
    text = tables.table_file("maxtext").read_text(encoding="utf-8")
    data = tomllib.loads(re.sub(r"  \{ hf = \"vision_embedder.pos_embedding.*\n", "", text))
    parse_table(data, "maxtext.toml", load_inventory())
    with pytest.raises(MappingError, match="neither mapped nor carried") as caught:
        parse_table(data, "maxtext.toml", load_inventory(), SEEING)
    assert "pos_embedding" in caught.value.found


def test_options_that_do_not_fit(native, tmp_path):
    source, _ = native()
    message = fails(2, "to-native", source, tmp_path / "o", "--format", "maxtext",
                    "--framework-version", "main")  # fmt: skip
    assert f"{RELEASE}, {SEEING}" in message
    for layout in ("gemma-jax", "fast-llm"):
        with pytest.raises(GemmaConvertError, match="version of the framework is not supported"):
            to_native(source, tmp_path / "o", layout=layout, framework_version=RELEASE)
    assert "--format" in fails(2, "mappings", "--framework-version", SEEING)
    assert not (tmp_path / "o").exists()


def test_what_is_printed(native, tmp_path):
    source, _ = native()
    done = run("to-native", source, tmp_path / "o", "--format", "maxtext",
               "--framework-version", SEEING, "--dry-run")  # fmt: skip
    assert f"MaxText {SEEING} loads it with:\n  model_name=gemma4-12b\n" in done.stdout
    listed = run("mappings", "--format", "maxtext", "--framework-version", SEEING, "--model", "12b")
    assert f"params/params/{EMBEDDER}pos_emb_param" in listed.stdout
    facts = run("mappings", "--format", "maxtext", "--framework-version", SEEING, "--model", "12b",
                "--facts").stdout  # fmt: skip
    assert "vision_config.mm_posemb_size\tnum_position_embeddings_for_vit\t1120\t1120" in facts
