"""Names with something before them: converted as what they are, and written back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_convert import SourceError, inspect, logit_check, to_hf, to_native, verify
from gemma_convert.logits.golden import save_golden
from gemma_convert.mapping.prefix import difference
from gemma_convert.stores.naming import find_naming

HERE = Path("here")


def old_names(name: str) -> str:
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return name.removeprefix("model.")


NAMINGS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "parallel": lambda name: f"module.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "base model": lambda name: name.removeprefix("model."),
    "older": old_names,
    "compiled base model": lambda name: "_orig_mod." + name.removeprefix("model."),
}


def rename(source: Path, target: Path, naming) -> Path:
    """A copy of a checkpoint whose tensors, and index, have other names."""
    target.mkdir()
    for path in source.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            text = json.dumps(
                {k if k == "__metadata__" else naming(k): v for k, v in header.items()}
            ).encode()
            text += b" " * (-len(text) % 8)
            data = len(text).to_bytes(8, "little") + text + data[8 + length :]
        elif path.name.endswith("index.json"):
            index = json.loads(data)
            index["weight_map"] = {naming(k): v for k, v in index["weight_map"].items()}
            data = json.dumps(index).encode()
        (target / path.name).write_bytes(data)
    return target


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["maxtext", "gemma-jax", "fast-llm"])
@pytest.mark.parametrize("kind", NAMINGS)
def test_there_and_back(kind, layout, shallow, tmp_path):
    plain = shallow("31b", shards=3)
    source = rename(plain, tmp_path / "t", NAMINGS[kind])
    native, direct = tmp_path / "n", tmp_path / "direct"
    to_native(source, native, layout=layout)
    to_native(plain, direct, layout=layout)
    regions = [
        json.loads((folder / "hf/gemma-convert/manifest.json").read_text())["regions"]
        for folder in (native, direct)
    ]
    assert regions[0] == regions[1]
    assert verify(native, against=source).passed
    assert verify(native).passed
    assert to_hf(native, tmp_path / "back").bit_for_bit
    assert files(tmp_path / "back") == files(source)
    assert verify(tmp_path / "back", against=native).passed
    assert inspect(source).coverage.complete


@pytest.mark.parametrize("kind", NAMINGS)
def test_the_check_runs_on_them(kind, shallow, converted, tmp_path):
    plain = shallow("31b")
    source = rename(plain, tmp_path / "t", NAMINGS[kind])
    native = converted(plain, "gemma-jax")
    assert logit_check(source, native, tokens=5).passed
    save_golden(source, tmp_path / "golden", tokens=5)
    assert logit_check(source, native, golden=tmp_path / "golden").passed


def test_a_name_stays_on_the_way_through_another_layout(shallow, tmp_path):
    source = rename(shallow("e2b"), tmp_path / "t", NAMINGS["both"])
    to_native(source, tmp_path / "one", layout="maxtext")
    to_native(tmp_path / "one", tmp_path / "two", layout="gemma-jax")
    to_hf(tmp_path / "two", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)
    manifest = json.loads((tmp_path / "two/hf/gemma-convert/manifest.json").read_text())
    assert manifest["names"] == ["_orig_mod.", "module."]


def test_new_shards_have_the_old_names(shallow, tmp_path):
    source = rename(shallow("31b"), tmp_path / "t", NAMINGS["peft"])
    to_native(source, tmp_path / "n", layout="maxtext")
    to_hf(tmp_path / "n", tmp_path / "back", max_shard_size=100_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert all(name.startswith("base_model.model.") for name in index["weight_map"])
    assert verify(tmp_path / "back", against=tmp_path / "n").passed


def test_text_alone(shallow, tmp_path):
    plain = shallow("31b", text_only=True)
    source = rename(plain, tmp_path / "t", NAMINGS["base model"])
    to_native(source, tmp_path / "n", layout="maxtext")
    to_hf(tmp_path / "n", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize(
    ("naming", "words"),
    [
        (lambda name: f"ema.{name}", "have `ema.` before the expected one"),
        (lambda name: f"a.b.{name}", "have `a.b.` before the expected one"),
        (
            lambda name: f"ema.{name}" if "layers.0." in name else name,
            "names have `ema.` before them",
        ),
        (lambda name: name.removeprefix("model.language_"), "expected with `model.language_`"),
    ],
)
def test_names_that_are_not_known_are_explained(naming, words, shallow, tmp_path):
    source = rename(shallow("31b", text_only="a.b" in words), tmp_path / "t", naming)
    with pytest.raises(SourceError) as caught:
        to_native(source, tmp_path / "n", layout="maxtext")
    if "language_" not in words:
        assert words in str(caught.value.found)
    assert not (tmp_path / "n").exists()


def test_two_names_that_become_one(shallow, tmp_path):
    first = []

    def naming(name):
        first.append(name)
        return "model._orig_mod.x" if len(first) == 1 else "model.x" if len(first) == 2 else name

    source = rename(shallow("31b"), tmp_path / "t", naming)
    with pytest.raises(SourceError, match="the same name but for"):
        to_native(source, tmp_path / "n", layout="maxtext")


CANONICAL = ["model.language_model.layers.0.a", "model.vision_tower.b", "lm_head.weight"]


@given(st.lists(st.sampled_from(["_orig_mod.", "module.", "base_model.model."]), max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_composition_is_read(wrappers):
    names = ["".join(wrappers) + name for name in CANONICAL]
    naming = find_naming(names, HERE)
    assert list(naming.stored) == CANONICAL
    assert list(naming.stored.values()) == names
    assert naming.plain == (not wrappers)


def test_differences_in_words():
    assert difference(["x.a.b", "x.a.c"], ["a.b", "a.c"], 2) == (
        "all 2 names have `x.` before the expected one"
    )
    assert difference(["b.c", "b.d"], ["model.b.c", "model.b.d"], 2) == (
        "all 2 names are expected with `model.` before them"
    )
    assert difference(["q", "r"], ["a.b"], 2) is None
