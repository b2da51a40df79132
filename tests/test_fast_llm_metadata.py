"""metadata.yaml: what Fast-LLM is told of the model, key by key."""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fast_llm_by_hand import fast_llm_metadata as by_hand
from models import A4B, DENSE, WHERE, load_architecture, load_config

from gemma_convert import to_hf, to_native, verify
from gemma_convert.checkpoint.native import plan_native
from gemma_convert.checkpoint.original import open_original
from gemma_convert.layouts.fast_llm import layout as fast_llm
from gemma_convert.layouts.fast_llm.metadata import differences, fast_llm_metadata
from gemma_convert.layouts.registry import load_layout, open_native
from gemma_convert.model.config import parse_architecture, read_architecture

LARGE = ("26b-a4b", "31b")
METADATA = "metadata.yaml"
BLOCKS = ("config", "base_model", "decoder", "blocks")


def read(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / METADATA).read_text())


def without_index(metadata: dict[str, Any]) -> dict[str, Any]:
    return {**metadata, "metadata": {}}


def types(tree: Any) -> Any:
    """The tree with types for values: 0 is not 0.0, and True is not 1, to Fast-LLM."""
    if isinstance(tree, dict):
        return {key: types(value) for key, value in tree.items()}
    return [types(value) for value in tree] if isinstance(tree, list) else type(tree)


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("family", LARGE)
def test_it_is_what_was_written_by_hand(tiny, converted, family):
    found = read(converted(tiny(family), "fast-llm"))
    expected = by_hand(read_architecture(tiny(family)))
    assert without_index(found) == expected
    assert types(without_index(found)) == types(expected)


@pytest.mark.parametrize("name", [A4B, DENSE])
def test_published_models(name):
    architecture = load_architecture(name)
    found = fast_llm_metadata(architecture, {"a/weights": "model_0.safetensors"})
    assert without_index(found) == by_hand(architecture)
    assert found["metadata"]["state_index"] == {"a/weights": "model_0.safetensors"}
    model, text = found["config"]["base_model"], load_config(name)["text_config"]
    assert model["embeddings"]["embedding_scale"] == text["hidden_size"] ** 0.5
    assert model["decoder"]["pattern"] == text["layer_types"]
    blocks = model["decoder"]["blocks"]
    assert blocks["sliding_attention"]["mixer"]["window_size"] == text["sliding_window"] == 1024
    assert "window_size" not in blocks["full_attention"]["mixer"]
    assert blocks["full_attention"]["mixer"]["shared_key_value"] is True
    assert "shared_key_value" not in blocks["sliding_attention"]["mixer"]


@pytest.mark.parametrize("family", LARGE)
def test_it_is_what_fast_llm_itself_writes(oracle, tmp_path, family):
    to_native(oracle / "hf" / family, tmp_path / "out", layout="fast-llm")
    ours, theirs = read(tmp_path / "out"), read(oracle / "fast_llm" / family)
    del theirs["config"]["distributed"]
    for metadata in (ours, theirs):
        del metadata["fast_llm_version"]
        assert metadata.pop("metadata").keys() - {"gemma_convert"} == {"state_index"}
    assert ours == theirs
    assert types(ours) == types(theirs)


@pytest.mark.parametrize("family", LARGE)
def test_nothing_is_written_by_reference(tiny, converted, family):
    """Two equal parts are two parts: whoever edits one of them changes one."""
    text = (converted(tiny(family), "fast-llm") / METADATA).read_text()
    assert not re.search(r"[&*]id\d", text)


@pytest.mark.parametrize(
    ("key", "value", "place", "expected"),
    [
        ("final_logit_softcapping", 12.5, ("head", "final_logit_softcap"), 12.5),
        ("rms_norm_eps", 1e-5, ("head", "normalization", "epsilon"), 1e-5),
        ("sliding_window", 77, (*BLOCKS[2:], "sliding_attention", "mixer", "window_size"), 77),
    ],
)
def test_facts_of_a_config_reach_it(key, value, place, expected):
    config = load_config(DENSE)
    config["text_config"][key] = value
    architecture = parse_architecture(config, WHERE)
    model = fast_llm_metadata(architecture, {})["config"]["base_model"]
    assert at(model, place) == expected
    assert without_index(fast_llm_metadata(architecture, {})) == by_hand(architecture)


def test_no_softcap_is_said():
    config = load_config(DENSE)
    config["text_config"]["final_logit_softcapping"] = None
    metadata = fast_llm_metadata(parse_architecture(config, WHERE), {})
    assert metadata["config"]["base_model"]["head"]["final_logit_softcap"] is None


# verify


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every leaf and of every mapping."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from leaves(value, (*path, key))


def altered(value: Any) -> list[Any]:
    """Values that are not this one."""
    if isinstance(value, bool):
        return [not value, int(value)]
    if isinstance(value, int):
        return [value + 1, float(value), str(value)]
    if isinstance(value, float):
        return [math.nextafter(value, math.inf), None]
    if isinstance(value, str):
        return [value + "s"]
    if isinstance(value, list):
        return [value[:-1], [*value[1:], value[0]], {}]
    return [None, []]


@pytest.fixture(params=LARGE)
def checked(request, tiny, converted, monkeypatch):
    """(metadata, check): check(metadata) names the places that differ, as verify does."""
    source = tiny(request.param)
    out = converted(source, "fast-llm")
    with open_native(out) as native, open_original(native.folder, source) as original:
        plan = plan_native(native, original)

    def check(metadata: dict[str, Any]) -> list[str]:
        monkeypatch.setattr(fast_llm, "read_metadata", lambda _: copy.deepcopy(metadata))
        return list(load_layout("fast-llm").check_metadata(out, plan))

    return without_index(read(out)), check


def test_every_key_of_the_model_is_checked(checked):
    metadata, check = checked
    assert check(metadata) == []
    paths = [path for path in leaves(metadata) if path[:2] == ("config", "base_model")]
    assert len(paths) > 100
    for path in paths:
        place = f"{METADATA}: {'.'.join(path)}"
        for value in altered(at(metadata, path)):
            changed = copy.deepcopy(metadata)
            at(changed, path[:-1])[path[-1]] = value
            assert check(changed) == [place], (path, value)
        lost = copy.deepcopy(metadata)
        del at(lost, path[:-1])[path[-1]]
        assert check(lost) == [place]
        if isinstance(at(metadata, path), dict):
            more = copy.deepcopy(metadata)
            at(more, path)["another"] = 1
            assert check(more) == [f"{place}.another"]


def test_what_lies_around_the_model_is_checked_too(checked):
    metadata, check = checked
    for key, value in (("shards", ["weights", "mean"]), ("model", "bert"), ("config", 3)):
        assert check({**metadata, key: value}) == [f"{METADATA}: {key}"]
        assert check({k: v for k, v in metadata.items() if k != key}) == [f"{METADATA}: {key}"]
    config = metadata["config"]
    assert check({**metadata, "config": {**config, "type": "bert"}}) == [f"{METADATA}: config.type"]
    assert check({**metadata, "config": None}) == [f"{METADATA}: config"]
    free = {**config, "distributed": {"compute_dtype": "float32", "rank": 3}}
    assert check({**metadata, "config": free, "fast_llm_version": "0.3.1"}) == []


def test_verify_names_what_differs(tiny, converted, tmp_path):
    source, out = tiny("31b", layers=6), tmp_path / "out"
    shutil.copytree(converted(source, "fast-llm"), out)
    metadata = read(out)
    mixer = at(metadata, BLOCKS)["full_attention"]["mixer"]
    mixer["softmax_scale_power"] = 0.5
    del mixer["rotary"]
    (out / METADATA).write_text(yaml.safe_dump(metadata))
    place = f"{METADATA}: {'.'.join(BLOCKS)}.full_attention.mixer."
    for against in (None, source):
        different = verify(out, against=against).different
        assert different.keys() == {place + "softmax_scale_power", place + "rotary", METADATA}
        assert different[place + "softmax_scale_power"] == "is 0.5 instead of 0.0"
        assert different[place + "rotary"].startswith("is missing; expected {")
    assert to_hf(out, tmp_path / "back", accept_damage=[METADATA]).bit_for_bit


def test_differences_of_two_trees():
    one = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert dict(differences(one, copy.deepcopy(one))) == {}
    assert dict(differences(one, {"a": {"b": True, "c": [1, 2]}, "e": 0})) == {
        "a.b": "is True instead of 1",
        "d": "is missing; expected x",
        "e": "is unexpected: 0",
    }
    assert dict(differences(one, {"a": [], "d": "x"})).keys() == {"a"}
