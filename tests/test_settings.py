"""What a framework is told is what the native side is run by, and what an export says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import said
from transformers import AutoConfig

from gemma_convert import SourceError, logit_check, to_hf, to_native, verify
from gemma_convert.model.config import read_architecture
from gemma_convert.model.facts import facts_of

FILES = {
    "maxtext": "maxtext.yml",
    "gemma-jax": "gemma.json",
    "fast-llm": "metadata.yaml",
    "tunix": "tunix.json",
}
SETTINGS = {
    "maxtext": "models/gemma4-31b.yml",
    "gemma-jax": "gemma.json",
    "tunix": "tunix.json",
}


def edited(out: Path, layout: str, **values: object) -> None:
    """Puts values into the settings file of a checkpoint."""
    file = out / SETTINGS[layout]
    settings = yaml.safe_load(file.read_text())
    settings.get("config", settings).update(values)
    file.write_text(json.dumps(settings))


@pytest.mark.share(2)
@pytest.mark.parametrize("layout", SETTINGS)
def test_odd_values_in_settings_are_messages(shallow, converted, tmp_path, layout):
    source = shallow("31b")
    for number, value in enumerate(("x", [1], {}, True, -3, 1e99, None, 0)):
        out = shutil.copytree(converted(source, layout), tmp_path / str(number))
        edited(out, layout, sliding_window_size=value)
        code, _, errors = said("logit-check", source, out, "--tokens", 5)
        assert code == 3, value
        assert "sliding_window_size" in errors and "has the wrong type" in errors


@pytest.mark.parametrize(
    ("layout", "file", "text"),
    [
        ("maxtext", "maxtext.yml", "x: ["),
        ("maxtext", "maxtext.yml", "- 1"),
        ("maxtext", "maxtext.yml", "model_name: ../../gemma4-31b"),
        ("maxtext", "maxtext.yml", "model_name: [1]"),
        ("maxtext", "models/gemma4-31b.yml", "a: !!python/object/apply:os.getcwd []"),
        ("gemma-jax", "gemma.json", "{"),
        ("gemma-jax", "gemma.json", '{"model": 3, "config": {}}'),
        ("gemma-jax", "gemma.json", '{"model": "gm.nn.Gemma4_31B", "config": 1}'),
        ("tunix", "tunix.json", '{"model": "gemma4_31b"}'),
        ("tunix", "tunix.json", '{"model": "gemma3_27b", "config": {}}'),
    ],
)
def test_broken_settings_are_messages(shallow, converted, tmp_path, layout, file, text):
    out = shutil.copytree(converted(shallow("31b"), layout), tmp_path / "out")
    (out / file).write_text(text)
    code, _, errors = said("logit-check", shallow("31b"), out, "--tokens", 5)
    assert code == 3
    assert errors.count("\n") <= 5


@pytest.mark.parametrize("file", ["maxtext.yml", "models/gemma4-31b.yml", "models"])
@pytest.mark.parametrize("items", ["", "0/items"])
def test_settings_elsewhere_are_not_read(shallow, converted, tmp_path, file, items):
    """Nor is a checkpoint run by config.json because its settings are gone."""
    source = shallow("31b")
    out = shutil.copytree(converted(source, "maxtext"), tmp_path / "out")
    (out / file).rename(tmp_path / "elsewhere")
    code, _, errors = said("logit-check", source, out / items, "--tokens", 5)
    assert (code, "is missing" in errors) == (3, True)
    (out / file).symlink_to(tmp_path / "elsewhere")
    for command in (("logit-check", source, out / items, "--tokens", 5), ("verify", out / items)):
        code, _, errors = said(*command)
        assert code == 3
        assert "points outside" in errors or "linked folder" in errors or "not a file" in errors


def in_metadata(out: Path, ending: str, value: object) -> None:
    """Puts a value into metadata.yaml, wherever a path ends like that."""
    file = out / "metadata.yaml"
    metadata = yaml.safe_load(file.read_text())

    def put(section: dict, path: str) -> None:
        for key, below in section.items():
            if isinstance(below, dict):
                put(below, f"{path}.{key}")
            elif f"{path}.{key}".endswith(f".{ending}"):
                section[key] = value

    put(metadata["config"], "")
    file.write_text(yaml.safe_dump(metadata))


def put(out: Path, layout: str, key: str, value: object) -> None:
    """Tells the framework something else."""
    if layout == "fast-llm":
        in_metadata(out, key, value)
    else:
        edited(out, layout, **{key: value})


_ROPE = "text_config.rope_parameters"
WRONG = {
    "text_config.sliding_window": 7,
    "text_config.final_logit_softcapping": 3.0,
    "text_config.top_k_experts": 1,
    "text_config.rms_norm_eps": 0.1,
    f"{_ROPE}.sliding_attention.rope_theta": 20.0,
    f"{_ROPE}.sliding_attention.partial_rotary_factor": 0.5,
    f"{_ROPE}.full_attention.rope_theta": 20.0,
    f"{_ROPE}.full_attention.partial_rotary_factor": 1.0,
}
KEYS = {
    "maxtext": {
        "sliding_window_size": "text_config.sliding_window",
        "final_logits_soft_cap": "text_config.final_logit_softcapping",
        "num_experts_per_tok": "text_config.top_k_experts",
        "normalization_layer_epsilon": "text_config.rms_norm_eps",
        "local_rope_max_timescale": f"{_ROPE}.sliding_attention.rope_theta",
        "local_rope_proportion": f"{_ROPE}.sliding_attention.partial_rotary_factor",
        "global_rope_max_timescale": f"{_ROPE}.full_attention.rope_theta",
        "global_rope_proportion": f"{_ROPE}.full_attention.partial_rotary_factor",
    },
    "gemma-jax": {
        "sliding_window_size": "text_config.sliding_window",
        "final_logit_softcap": "text_config.final_logit_softcapping",
        "top_k_experts": "text_config.top_k_experts",
        "local_base_frequency": f"{_ROPE}.sliding_attention.rope_theta",
        "local_rope_proportion": f"{_ROPE}.sliding_attention.partial_rotary_factor",
        "global_base_frequency": f"{_ROPE}.full_attention.rope_theta",
        "global_rope_proportion": f"{_ROPE}.full_attention.partial_rotary_factor",
    },
    "tunix": {
        "sliding_window_size": "text_config.sliding_window",
        "final_logit_softcap": "text_config.final_logit_softcapping",
        "num_experts_per_tok": "text_config.top_k_experts",
        "local_base_frequency": f"{_ROPE}.sliding_attention.rope_theta",
        "local_rope_proportion": f"{_ROPE}.sliding_attention.partial_rotary_factor",
        "global_base_frequency": f"{_ROPE}.full_attention.rope_theta",
        "global_rope_proportion": f"{_ROPE}.full_attention.partial_rotary_factor",
    },
    "fast-llm": {
        "window_size": "text_config.sliding_window",
        "final_logit_softcap": "text_config.final_logit_softcapping",
        "experts_per_token": "text_config.top_k_experts",
        "epsilon": "text_config.rms_norm_eps",
        "sliding_attention.mixer.rotary.theta": f"{_ROPE}.sliding_attention.rope_theta",
        "full_attention.mixer.rotary.theta": f"{_ROPE}.full_attention.rope_theta",
        "full_attention.mixer.rotary.partial_rotary_factor": (
            f"{_ROPE}.full_attention.partial_rotary_factor"
        ),
    },
}
"""Layout → the framework's key of each fact that its forward pass reads → key of config.json."""

CASES = [(layout, key) for layout, keys in KEYS.items() for key in keys]
MODELS = {"maxtext": "models/gemma4-26b.yml", "gemma-jax": "gemma.json", "tunix": "tunix.json"}


@pytest.fixture
def told(shallow, converted, tmp_path, monkeypatch):
    """told(layout, key): source, and its conversion with another value of a fact."""
    monkeypatch.setattr("test_settings.SETTINGS", MODELS)

    def make(layout: str, key: str) -> tuple[Path, Path]:
        source = shallow("26b-a4b", text_only=True)
        out = shutil.copytree(converted(source, layout), tmp_path / "out")
        put(out, layout, key, WRONG[KEYS[layout][key]])
        if layout == "fast-llm":  # sealed metadata is not edited, it is damaged
            shutil.rmtree(out / "hf")
        return source, out

    return make


@pytest.mark.share(8)
@pytest.mark.parametrize(("layout", "key"), CASES)
def test_a_fact_planted_wrong_fails_the_check(told, layout, key):
    source, out = told(layout, key)
    report = logit_check(source, out, tokens=40)
    assert not report.passed and report.divergence.kl_max > 1e-4
    assert any(KEYS[layout][key] in warning for warning in report.warnings)


@pytest.mark.share(10, 1)
@pytest.mark.parametrize(("layout", "key"), CASES)
def test_a_changed_fact_goes_into_config_json(told, tmp_path, layout, key):
    """The export then computes what the native side does, and nothing else of config.json moves."""
    source, out = told(layout, key)
    hf, value = KEYS[layout][key], WRONG[KEYS[layout][key]]
    report = to_hf(out, tmp_path / "back", like=source)
    assert list(report.changed_facts) == [hf]
    config = json.loads((tmp_path / "back/config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    *sections, last = hf.split(".")[1:]
    section, original = config, before
    for name in sections:
        section, original = section[name], original[name]
    assert section[last] == value
    if sections:
        section.pop("rope_type"), original.pop("rope_type")
    section.pop(last), original.pop(last, None)
    if sections:
        section.pop("partial_rotary_factor", 0), original.pop("partial_rotary_factor", 0)
    assert config == before
    AutoConfig.from_pretrained(tmp_path / "back")
    assert logit_check(tmp_path / "back", out, tokens=20).passed
    assert verify(tmp_path / "back", against=out).passed


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("layout", KEYS)
def test_settings_that_say_the_same_change_no_byte(shallow, converted, tmp_path, layout):
    source = shallow("26b-a4b", text_only=True)
    report = to_hf(converted(source, layout), tmp_path / "back")
    assert not report.changed_facts
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_one_place_of_many_is_run_and_cannot_be_exported(shallow, converted, tmp_path):
    source = shallow("26b-a4b", text_only=True)
    out = shutil.copytree(converted(source, "fast-llm"), tmp_path / "out")
    shutil.rmtree(out / "hf")
    in_metadata(out, "full_attention.mixer.query_norm.epsilon", 0.1)
    report = logit_check(source, out, tokens=20)
    assert not report.passed
    assert any("query_norm" in warning for warning in report.warnings)
    with pytest.raises(SourceError, match="two different values for one key"):
        to_hf(out, tmp_path / "back", like=source)


def run_of(out: Path, folder: Path) -> Path:
    """A MaxText run that was trained from a checkpoint: its arrays, and no settings."""
    step = folder / "checkpoints" / "3"
    shutil.copytree(out / "0", step)
    return step


@pytest.fixture
def trained(shallow, tmp_path, monkeypatch):
    """A source with another rotary base, its conversion, and a run of MaxText without settings.

    Prompts stay short, whatever the window of the named model.
    """
    monkeypatch.setattr("gemma_convert.prompts.text.LONGEST_MADE", 40)
    source = shutil.copytree(shallow("31b", text_only=True), tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["full_attention"]["rope_theta"] = 20.0
    config["sliding_window"] = 1024  # as the named model has it
    (source / "config.json").write_text(json.dumps(config))
    to_native(source, tmp_path / "out", layout="maxtext")
    return source, tmp_path / "out", run_of(tmp_path / "out", tmp_path / "run")


def test_a_run_without_settings_is_run_as_the_named_model(trained):
    source, out, run = trained
    alone = logit_check(source, run, tokens=20)
    assert not alone.passed
    assert "it ran with that of gemma4-31b" in alone.warnings[0]
    assert logit_check(source, run, tokens=20, settings=[str(out / "maxtext.yml")]).passed
    assert logit_check(source, run, tokens=20, settings=["global_rope_max_timescale=20"]).passed


def test_settings_count_as_in_maxtext(trained, tmp_path):
    """The file of the model counts more than a config, single settings count most."""
    source, out, run = trained
    config = out / "maxtext.yml"
    text = config.read_text()
    config.write_text(f"{text}global_rope_max_timescale: 1000000\n")
    assert logit_check(source, run, tokens=20, settings=[str(config)]).passed
    pair = "global_rope_max_timescale=1000000"
    assert not logit_check(source, run, tokens=20, settings=[str(config), pair]).passed
    config.write_text(text)
    below = tmp_path / "mine.yml"
    below.write_text("base_config: maxtext.yml\n")
    shutil.copytree(out / "models", tmp_path / "models")
    shutil.copy(config, tmp_path)
    assert logit_check(source, run, tokens=20, settings=[str(below)]).passed
    below.write_text("model_name=gemma4-31b global_rope_max_timescale=20\nbase_num_kv_heads=2")
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(SourceError, match="another shape"):
        logit_check(source, run, tokens=20, settings=[str(below)])
    below.write_text("model_name=gemma4-31b global_rope_max_timescale=20")
    assert logit_check(source, run, tokens=20, settings=[str(below)]).passed
    below.write_text("model_name: gemma4-31b\nglobal_rope_max_timescale: 20")
    assert not logit_check(source, run, tokens=20, settings=[str(below)]).passed
    with pytest.raises(SourceError, match="another shape"):
        logit_check(source, run, tokens=20, settings=["base_emb_dim=48"])


def test_a_trained_run_is_exported_by_its_settings(trained, tmp_path):
    source, out, run = trained
    settings = [str(out / "maxtext.yml"), "sliding_window_size=8"]
    report = to_hf(run, tmp_path / "back", like=source, settings=settings)
    assert list(report.changed_facts) == ["text_config.sliding_window"]
    assert json.loads((tmp_path / "back/config.json").read_text())["sliding_window"] == 8
    assert to_hf(run, tmp_path / "as it was", like=source).changed_facts == {}


@pytest.mark.share(2)
@pytest.mark.parametrize("layout", ["gemma-jax", "fast-llm"])
def test_changed_facts_go_along_to_another_layout(told, tmp_path, layout):
    source, out = told("maxtext", "global_rope_max_timescale")
    to_native(out, tmp_path / "next", layout=layout)
    report = logit_check(source, tmp_path / "next", tokens=20)
    assert not report.passed
    assert "20.0 in the settings" in " ".join(report.warnings)


def test_odd_single_settings_are_messages(shallow, converted):
    source = shallow("31b", text_only=True)
    check = ("logit-check", source, converted(source, "maxtext"), "--tokens", 3, "--settings")
    for setting, code, expected in (
        ("slidng_window_size=3", 0, "slidng_window_size matches no key"),
        ("global_rope_proportion=7", 3, "1 at the most"),
        ("sliding_window_size=nan", 3, "has the wrong type"),
        (f"sliding_window_size={'9' * 6000}", 3, "has the wrong type"),
        ("y" * 6000, 2, "neither an existing file"),
    ):
        found, _, errors = said(*check, setting)
        assert (found, expected in errors) == (code, True), errors


def test_a_parent_elsewhere_is_not_read(shallow, converted, tmp_path):
    source = shallow("31b", text_only=True)
    (tmp_path / "mine.yml").write_text("base_config: ../other.yml\nmodel_name: gemma4-31b")
    with pytest.raises(SourceError, match="base_config outside"):
        logit_check(source, converted(source, "maxtext"), settings=[str(tmp_path / "mine.yml")])


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 10**12), ("num_layers", True), ("layer_types", ""), ("num_embed", -1)],
)
def test_sizes_that_no_model_has_make_no_config_json(shallow, converted, tmp_path, key, value):
    out = shutil.copytree(converted(shallow("31b", text_only=True), "gemma-jax"), tmp_path / "out")
    shutil.rmtree(out / "hf")
    edited(out, "gemma-jax", **{key: value})
    code, _, errors = said("to-hf", out, tmp_path / "back", "--settings", out / "gemma.json")
    assert (code, errors.count("error")) == (3, 1), errors
    assert not (tmp_path / "back").exists()


def test_settings_that_have_no_place(shallow, converted, tmp_path):
    source = shallow("26b-a4b", text_only=True)
    metadata = converted(source, "fast-llm")
    for command, expected in {
        ("logit-check", source, metadata, "--settings", "a=1"): "its own metadata",
        ("to-hf", metadata, tmp_path / "x", "--settings", "a=1"): "its own metadata",
        ("to-native", source, tmp_path / "x", "--format", "maxtext", "--settings", "a=1"): "native",
        ("verify", metadata, "--settings", "a=1"): "--against",
        ("logit-check", source, metadata, "--settings", "nothing"): "neither an existing file",
    }.items():
        code, _, errors = said(*command)
        assert (code, expected in errors) == (2, True), errors


@pytest.mark.share(5, 1)
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("maxtext", "31b"),
        ("maxtext", "26b-a4b"),
        ("maxtext", "e4b"),
        ("gemma-jax", "31b"),
        ("gemma-jax", "26b-a4b"),
        ("gemma-jax", "e2b"),
        ("fast-llm", "31b"),
        ("fast-llm", "26b-a4b"),
    ],
)
def test_without_an_original_settings_make_config_json(shallow, converted, tmp_path, layout, model):
    """The export loads in transformers and computes what the native checkpoint does."""
    source = shallow(model, text_only=True)
    out = shutil.copytree(converted(source, layout), tmp_path / "out")
    shutil.rmtree(out / "hf")
    with pytest.raises(SourceError, match="no sidecar"):
        to_hf(out, tmp_path / "back")
    report = to_hf(out, tmp_path / "back", settings=[str(out / FILES[layout])])
    assert report.made_from_settings and not report.sealed
    before, after = (read_architecture(folder) for folder in (source, tmp_path / "back"))
    assert facts_of(before) == facts_of(after)
    assert logit_check(tmp_path / "back", converted(source, layout), tokens=20).passed


def test_towers_need_an_original(shallow, converted, tmp_path):
    out = shutil.copytree(converted(shallow("31b"), "maxtext"), tmp_path / "out")
    shutil.rmtree(out / "hf")
    settings = [str(out / "maxtext.yml")]
    with pytest.raises(SourceError, match="config of its towers"):
        to_hf(out, tmp_path / "back", settings=settings)
    report = to_hf(out, tmp_path / "back", settings=settings, text_only=True)
    assert report.made_from_settings and not report.changed_facts  # there is nothing to differ from
    code, _, errors = said("to-hf", out, tmp_path / "again")
    assert (code, "--like" in errors, "--settings" in errors) == (3, True, True)


def test_an_untied_head_is_among_what_settings_say(shallow, converted, tmp_path):
    source = shallow("31b", text_only=True, untied=True)
    out = shutil.copytree(converted(source, "fast-llm"), tmp_path / "out")
    shutil.rmtree(out / "hf")
    to_hf(out, tmp_path / "back", settings=[str(out / "metadata.yaml")])
    assert not read_architecture(tmp_path / "back").text.tied
    assert logit_check(tmp_path / "back", converted(source, "fast-llm"), tokens=20).passed


@pytest.mark.parametrize("layout", ["maxtext", "tunix"])
def test_a_single_setting_changes_its_own_key_alone(shallow, converted, tmp_path, layout, capsys):
    """What the framework's own model has otherwise, nobody has set."""
    source = shallow("26b-a4b")
    run = tmp_path / "run"
    shutil.copytree(converted(source, layout) / "0", run / "0")
    to_hf(run, tmp_path / "back", like=source, settings=["sliding_window_size=5"])
    expected = json.loads((source / "config.json").read_text())
    expected["text_config"]["sliding_window"] = 5
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == expected
    capsys.readouterr()
    to_hf(run, tmp_path / "same", like=source, settings=["sliding_windw_size=5"])
    assert (tmp_path / "same" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert "Did you mean sliding_window_size?" in capsys.readouterr().err


def test_a_named_model_says_the_rest(shallow, converted, tmp_path):
    source = shallow("26b-a4b")
    run = tmp_path / "run"
    shutil.copytree(converted(source, "maxtext") / "0", run / "0")
    to_hf(run, tmp_path / "back", like=source, settings=["model_name=gemma4-26b"])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["text_config"]["sliding_window"] == 1024


def test_printed_settings_in_a_file_are_single_settings(shallow, converted, tmp_path):
    """As MaxText's command line has them, they count more than what its named model says."""
    source = shallow("26b-a4b")
    run = tmp_path / "run"
    shutil.copytree(converted(source, "maxtext") / "0", run / "0")
    told = to_native(source, tmp_path / "out", layout="maxtext").settings
    file = tmp_path / "printed.txt"
    file.write_text("".join(f"  {key}={value}\n" for key, value in told.items()))
    to_hf(run, tmp_path / "back", like=source, settings=[str(file)])
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    window = f"sliding_window_size={told['sliding_window_size']}"
    file.write_text(file.read_text().replace(window, "sliding_window_size=5"))
    to_hf(run, tmp_path / "other", like=source, settings=[str(file)])
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["text_config"]["sliding_window"] == 5
    assert config["text_config"]["top_k_experts"] == int(told["num_experts_per_tok"])
