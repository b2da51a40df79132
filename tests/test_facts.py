"""Facts of config.json: every key is claimed, and the framework is told what it cannot know."""

from __future__ import annotations

import ast
import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from commands import said
from models import (
    A4B,
    DENSE,
    E2B,
    E4B,
    PUBLISHED,
    UNIFIED,
    load_config,
    load_tensors,
    without_layers,
)

from gemma_convert import SourceError, UsageError, logit_check, to_native, verify
from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec
from gemma_convert.cli.to_native_summary import settings_lines
from gemma_convert.layouts.fast_llm.metadata import fast_llm_metadata
from gemma_convert.layouts.gemma_jax.settings import gemma_jax_settings
from gemma_convert.mapping.config_keys import check_keys, config_keys
from gemma_convert.mapping.facts import is_of_vision, load_facts
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import parse_architecture
from gemma_convert.model.facts import facts_of, layer_pattern

FULL, SLIDING = "full_attention", "sliding_attention"


def changed(source: Path, folder: Path, *path: str, to: object) -> Path:
    """A copy of a checkpoint whose config.json has another value at `path`."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = to
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sees(layout: str, family: str) -> bool:
    """Whether the vision tower of a model goes along."""
    return layout == "gemma-jax" or (layout == "maxtext" and family in ("26b-a4b", "31b"))


@pytest.mark.parametrize("layout", ["maxtext", "gemma-jax", "tunix"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_the_named_one(name, layout):
    """Every key is known, and the framework is told nothing that its named model says already."""
    config = load_config(name)
    check_keys(config, False, (), Path("config.json"))
    facts = load_facts(layout)
    architecture = parse_architecture(config, Path("config.json"))
    vision = sees(layout, architecture.family)
    told = facts.told(architecture, vision=vision)
    assert bool(told) == (architecture.family == "12b")  # it has no name of its own there


@pytest.mark.parametrize("section", ["", "text_config", "vision_config"])
def test_an_unknown_key_is_named(shallow, tmp_path, section):
    path = [part for part in (section, "rotary_bass") if part]
    source = changed(shallow("31b"), tmp_path / "in", *path, to=3)
    code, _, errors = said("to-native", source, tmp_path / "out", "--format", "maxtext")
    assert code == 3
    assert ".".join(path) in errors
    assert "--ignore-fact" in errors
    knowing = ("--ignore-fact", ".".join(path))
    assert said("to-native", source, tmp_path / "out", "--format", "maxtext", *knowing)[0] == 0
    manifest = json.loads((tmp_path / "out/hf/gemma-convert/manifest.json").read_text())
    assert manifest["ignored_facts"] == [".".join(path)]


ROPE = ("text_config", "rope_parameters")
TOLD: dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]] = {
    "theta": (
        (*ROPE, FULL, "rope_theta"),
        500_000.0,
        {"global_rope_max_timescale": 500_000.0},
    ),
    "sliding theta": (
        (*ROPE, SLIDING, "rope_theta"),
        20_000.0,
        {"local_rope_max_timescale": 20_000.0},
    ),
    "proportion": (
        (*ROPE, FULL, "partial_rotary_factor"),
        0.5,
        {"global_rope_proportion": 0.5},
    ),
    "soft-cap": (
        ("text_config", "final_logit_softcapping"),
        50.0,
        {"final_logits_soft_cap": 50.0},
    ),
    "no soft-cap": (
        ("text_config", "final_logit_softcapping"),
        None,
        {"final_logits_soft_cap": 0.0},
    ),
    "epsilon": (
        ("text_config", "rms_norm_eps"),
        1e-3,
        {"normalization_layer_epsilon": 1e-3},
    ),
    "tiny epsilon": (
        ("text_config", "rms_norm_eps"),
        1e-7,
        {"normalization_layer_epsilon": 1e-7},
    ),
    "window": (("text_config", "sliding_window"), 20, {"sliding_window_size": 20}),
}


@pytest.mark.share(8, 3)
@pytest.mark.parametrize("fact", TOLD)
def test_what_differs_is_printed_and_written_and_run_by(shallow, tmp_path, fact):
    """And wrong in the settings it is a failed check, like a wrong weight."""
    path, value, told = TOLD[fact]
    source = changed(shallow("31b"), tmp_path / "in", *path, to=value)
    out = tmp_path / "out"
    report = to_native(source, out, layout="maxtext", text_only=True)
    config = yaml.safe_load((out / "maxtext.yml").read_text())
    assert (config["base_config"], config["model_name"]) == ("base.yml", "gemma4-31b")
    model = out / "models" / "gemma4-31b.yml"
    settings = yaml.safe_load(model.read_text())
    for key, expected in told.items():
        assert settings[key] == expected
        assert float(report.settings[key]) == expected
    assert logit_check(source, out, tokens=40).passed
    for key in told:
        del settings[key]
    model.write_text(yaml.safe_dump(settings))
    assert "models/gemma4-31b.yml" in verify(out).different
    wrong = logit_check(source, out, tokens=40)
    assert not wrong.passed
    assert any(".".join(path) in warning for warning in wrong.warnings)


IN_GEMMA = {
    "theta": ("global_base_frequency", 500_000.0),
    "sliding theta": ("local_base_frequency", 20_000.0),
    "proportion": ("global_rope_proportion", 0.5),
    "soft-cap": ("final_logit_softcap", 50.0),
    "no soft-cap": ("final_logit_softcap", None),
    "window": ("sliding_window_size", 20),
}


@pytest.mark.share(6, 2)
@pytest.mark.parametrize("fact", IN_GEMMA)
def test_the_gemma_library_is_told_too(shallow, tmp_path, fact):
    (path, value, _), (key, expected) = TOLD[fact], IN_GEMMA[fact]
    source = changed(shallow("31b"), tmp_path / "in", *path, to=value)
    out = tmp_path / "out"
    report = to_native(source, out, layout="gemma-jax", text_only=True)
    assert f"{key}={expected}" in report.settings["config"]
    settings = json.loads((out / "gemma.json").read_text())
    assert settings["model"] == "gm.nn.Gemma4_31B"
    assert settings["config"].pop(key) == expected
    assert logit_check(source, out, tokens=40).passed
    (out / "gemma.json").write_text(json.dumps(settings))
    wrong = logit_check(source, out, tokens=40)
    assert not wrong.passed
    assert any(".".join(path) in warning for warning in wrong.warnings)


FIXED_IN_GEMMA = {
    "epsilon": (("text_config", "rms_norm_eps"), 1e-5),
    "vision theta": (("vision_config", "rope_parameters", "rope_theta"), 50.0),
}
FIXED = {
    "a base that is no whole number": (("vision_config", "rope_parameters", "rope_theta"), 50.5),
    "pad token": (("text_config", "pad_token_id"), 3),
    "vision epsilon": (("vision_config", "rms_norm_eps"), 1e-5),
    "pooling": (("vision_config", "pooling_kernel_size"), 2),
    "image tokens": (("text_config", "use_bidirectional_attention"), None),
}


@pytest.mark.parametrize(
    ("layout", "fact"),
    [*(("maxtext", fact) for fact in FIXED), *(("gemma-jax", fact) for fact in FIXED_IN_GEMMA)],
)
def test_what_cannot_be_told_is_refused(shallow, tmp_path, layout, fact):
    path, value = (FIXED | FIXED_IN_GEMMA)[fact]
    source = changed(shallow("31b"), tmp_path / "in", *path, to=value)
    with pytest.raises(SourceError, match="cannot run a value") as caught:
        to_native(source, tmp_path / "out", layout=layout)
    assert ".".join(path) in str(caught.value)
    assert str(caught.value.found).lower() == str(value).lower()
    assert not (tmp_path / "out").exists()


def test_layers_in_another_order():
    """MaxText builds their order in; the gemma library is told each of them."""
    config = without_layers(load_config("gemma-4-31B-it"), 7)
    architecture = parse_architecture(config, Path("config.json"))
    maxtext, known = load_facts("maxtext"), ("text_config.layer_types",)
    with pytest.raises(SourceError, match="order of sliding and full layers"):
        maxtext.told(architecture, vision=False)
    assert maxtext.told(architecture, vision=False, ignore=known) == {"base_num_decoder_layers": 7}
    plan = SimpleNamespace(architecture=architecture, ignored_facts=())
    told = gemma_jax_settings(plan, Path("out"), vision=False)["config"]
    assert "for place in (0, 0, 0, 0, 0, 5, 5,))" in told


def test_what_can_be_told_is_told_whatever_is_ignored(shallow, tmp_path):
    source = changed(shallow("31b"), tmp_path / "in", "text_config", "rms_norm_eps", to=1e-3)
    options = {"layout": "maxtext", "text_only": True, "ignore_facts": ["text_config.rms_norm_eps"]}
    report = to_native(source, tmp_path / "out", **options)
    assert float(report.settings["normalization_layer_epsilon"]) == 1e-3


def test_patterns_of_layers():
    config = copy.deepcopy(load_config("gemma-4-31B-it"))
    architecture = parse_architecture(config, Path("config.json"))
    assert layer_pattern(architecture.text) == "5 sliding, 1 full"
    config["text_config"]["layer_types"][7] = FULL
    pattern = layer_pattern(parse_architecture(config, Path("config.json")).text)
    assert pattern.split()[5:9] == ["full", "sliding", "full", "sliding"]
    config["text_config"]["layer_types"] = load_config("gemma-4-31B-it")["text_config"][
        "layer_types"
    ][:8]
    config["text_config"]["num_hidden_layers"] = 8
    pattern = layer_pattern(parse_architecture(config, Path("config.json")).text)
    assert pattern.split()[5:] == ["full", "sliding", "full"]  # the last is full, and no pattern is


@pytest.mark.parametrize("layout", ["maxtext", "gemma-jax", "tunix"])
def test_every_fact_that_is_read_has_a_row(layout):
    rows = {row.hf for row in load_facts(layout).rows}
    for name in PUBLISHED:
        assert set(facts_of(parse_architecture(load_config(name), Path("config.json")))) <= rows


def section_of(config: dict, key: str) -> dict:
    """The part of a config.json that a key stands in; empty where there is none."""
    for part in key.split(".")[:-1]:
        config = config.get(part) or {}
    return config


def other(value: Any) -> Any:
    """Another value that config.json may have in its place."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [FULL, *value[1:]]
    if isinstance(value, str) or value is None:
        return None if value else "vision"
    return value * 2 or 1


def told(layout: str, config: dict, tensors: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """What the framework is told of a model, whose tensors must fit."""
    architecture = parse_architecture(config, Path("config.json"))
    plan_to_native(architecture, load_table(layout), tensors, DTypePolicy())
    if layout == "fast-llm":
        load_facts(layout).told(architecture, vision=False)
        return fast_llm_metadata(architecture, {})
    vision = sees(layout, architecture.family)
    return load_facts(layout).told(architecture, vision=vision)


CHANGED = [
    (layout, name, key)
    for layout in ("maxtext", "gemma-jax", "fast-llm", "tunix")
    for name in PUBLISHED
    for key in config_keys().facts
    if key.split(".")[-1] in section_of(load_config(name), key)
    and not (layout == "fast-llm" and (name in (E2B, E4B) or is_of_vision(key)))
    and not (layout == "maxtext" and name in (E2B, E4B, UNIFIED) and is_of_vision(key))
    and not (layout == "tunix" and is_of_vision(key))
    and not (name == UNIFIED and key.startswith("vision_config."))
]
"""Towers that a layout has no place for are carried, with their facts."""


_EXPERTS = {
    f"text_config.{key}" for key in ("num_experts", "top_k_experts", "moe_intermediate_size")
}
_PLE = {"text_config.vocab_size_per_layer_input"}
_IMAGES = {"text_config.use_bidirectional_attention", "text_config.pad_token_id"}
_TIED = {"text_config.tie_word_embeddings"}  # of a whole model the key at the top counts
MEANS_NOTHING = {
    E2B: _EXPERTS | _TIED | {"text_config.num_global_key_value_heads"},
    E4B: _EXPERTS | _TIED | {"text_config.num_global_key_value_heads"},
    A4B: _PLE | _TIED,
    DENSE: _PLE | _EXPERTS | _TIED,
    UNIFIED: _PLE | _EXPERTS | _IMAGES | _TIED,  # its embedders are carried
}
"""Keys that say how large something is that the model has not."""


@pytest.mark.share(23)
@pytest.mark.parametrize(("layout", "name", "key"), CHANGED)
def test_a_changed_key_is_told_or_refused(layout, name, key):
    config, tensors = load_config(name), load_tensors(name)
    before = told(layout, config, tensors)
    section, last = section_of(config, key), key.split(".")[-1]
    section[last] = other(section[last])
    try:
        after = told(layout, config, tensors)
    except (SourceError, UsageError):
        return
    assert (after != before) == (key not in MEANS_NOTHING[name])


@pytest.mark.parametrize(
    ("layout", "option"),
    [
        ("gemma-jax", ("--scaled-dtype", "bfloat16")),
        ("tunix", ("--scaled-dtype", "bfloat16")),
        ("fast-llm", ("--scaled-dtype", "bfloat16")),
        ("fast-llm", ("--compression", "zstd")),
        ("fast-llm", ("--no-ocdbt",)),
    ],
)
def test_an_option_without_effect_is_refused(shallow, tmp_path, layout, option):
    code, _, errors = said("to-native", shallow("31b"), tmp_path / "o", "--format", layout, *option)
    assert (code, option[0] in errors) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_ignored_for_nothing_is_told_and_not_recorded(shallow, tmp_path):
    source = changed(shallow("31b"), tmp_path / "in", "rotary_bass", to=3)
    ignored = ("--ignore-fact", "rotary_bass", "--ignore-fact", "text_config.vocab_size")
    code, _, errors = said("to-native", source, tmp_path / "o", "--format", "maxtext", *ignored)
    assert code == 0
    assert "warning: --ignore-fact text_config.vocab_size: nothing is refused" in errors
    assert "rotary_bass" not in errors
    manifest = json.loads((tmp_path / "o/hf/gemma-convert/manifest.json").read_text())
    assert manifest["ignored_facts"] == ["rotary_bass"]


@pytest.mark.parametrize("layout", ["gemma-jax", "tunix"])
@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_settings_in_python_can_be_pasted(layout, family, shallow, tmp_path):
    """As they are printed, each name is imported or assigned before it is used."""
    report = to_native(shallow(family), tmp_path / "out", layout=layout, dry_run=True)
    known = set[str]()
    for statement in ast.parse("\n".join(settings_lines(report))).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            known |= {one.name for one in statement.names}
            continue
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        assert {one.id for one in names if isinstance(one.ctx, ast.Load)} <= known
        known |= {one.id for one in names if isinstance(one.ctx, ast.Store)}
    assert {"config", "model", "params"} <= known
