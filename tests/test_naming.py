"""Names with something before them: converted as what they are, and written back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import LAYOUTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_convert import SourceError, inspect, logit_check, to_hf, to_native, verify
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.mapping.prefix import difference
from gemma_convert.stores.safetensors.naming import find_naming
from gemma_convert.stores.safetensors.reader import SafetensorsFolder
from gemma_convert.tasks.mappings import list_mappings

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
    "compiled inside": lambda name: name.replace("model.", "model._orig_mod.", 1),
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


IN_LAYOUTS = [
    (kind, LAYOUTS[(first + shift) % len(LAYOUTS)])
    for first, kind in enumerate(NAMINGS)
    for shift in range(len(LAYOUTS))
]
"""Every naming in every layout; each naming begins with another layout than the one before."""


@pytest.mark.share(9)
@pytest.mark.parametrize(("kind", "layout"), IN_LAYOUTS)
def test_there_and_back(kind, layout, shallow, converted, tmp_path):
    plain = shallow("31b", shards=3)
    source = rename(plain, tmp_path / "t", NAMINGS[kind])
    native, direct = tmp_path / "n", converted(plain, layout)
    to_native(source, native, layout=layout)
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


@pytest.mark.share(9, 5)
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
    assert manifest["names"] == ["module.", "_orig_mod."]


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


def of_modules(name: str) -> str:
    """What transformers' modules of 12B call a tensor, as their `state_dict` does."""
    old, new = "embed_vision.embedding", "embed_vision.multimodal_embedder.embedding"
    return name.replace(old, new).replace("vision_embedder.", "embed_vision.")


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("before", ["", "module."])
def test_names_of_modules(before, shallow, tmp_path):
    plain = shallow("12b", shards=2)
    source = rename(plain, tmp_path / "t", lambda name: before + of_modules(name))
    native = tmp_path / "n"
    to_native(source, native, layout="maxtext")
    assert verify(native, against=source).passed
    to_hf(native, tmp_path / "back")
    assert files(tmp_path / "back") == files(source)
    assert {*verify(native, against=plain).different} == {
        "hf/gemma-convert/headers/model-00001-of-00002.safetensors.header",
        "hf/gemma-convert/headers/model-00002-of-00002.safetensors.header",
        "hf/model.safetensors.index.json",
    }
    assert logit_check(source, native, tokens=5).passed
    assert logit_check(source, native, tokens=5, whole_model=True).passed


def test_names_of_modules_are_those_of_transformers(shallow):
    from gemma_convert.logits.reference import Reference

    source = shallow("12b")
    with SafetensorsFolder(source) as reader:
        stored = {of_modules(name) for name in reader.specs}
    assert stored == {*Reference(source)._model.state_dict()} - {"lm_head.weight"}


@pytest.mark.share(3)
@pytest.mark.parametrize("kind", ["both", "base model", "older", "compiled layers"])
def test_an_export_like_another_original_has_its_names(kind, shallow, converted, tmp_path):
    plain = shallow("31b", shards=2)
    other = rename(plain, tmp_path / "t", NAMINGS[kind])
    to_hf(converted(plain, "maxtext"), tmp_path / "back", like=other)
    assert files(tmp_path / "back") == files(other)


def test_text_alone_in_another_dtype_keeps_its_names(shallow, tmp_path):
    source = rename(shallow("31b", text_only=True), tmp_path / "t", NAMINGS["parallel"])
    to_native(source, tmp_path / "n", layout="maxtext")
    to_hf(tmp_path / "n", tmp_path / "back", dtype="float32", text_only=True)
    with SafetensorsFolder(source) as before, SafetensorsFolder(tmp_path / "back") as after:
        assert after.naming == before.naming


@pytest.mark.parametrize("kind", ["both", "older"])
def test_commands_that_read_headers_alone(kind, shallow, tmp_path):
    plain = shallow("31b")
    source = rename(plain, tmp_path / "t", NAMINGS[kind])
    assert not to_native(source, tmp_path / "n", layout="maxtext", dry_run=True).plan.carried
    assert not (tmp_path / "n").exists()
    listed = [list_mappings("fast-llm", str(folder)).tensors for folder in (plain, source)]
    assert listed[0] == listed[1]


def in_first_layer(naming):
    return lambda name: naming(name) if "layers.0." in name else name


def in_text(before: str):
    return lambda name: name.replace("model.language_model.", before, 1)


@pytest.mark.parametrize(
    ("naming", "words"),
    [
        (lambda name: f"ema.{name}", "all 129 names have `ema.` before the expected one"),
        (lambda name: f"module.ema.{name}", "all 129 names have `ema.` before the expected one"),
        (lambda name: f"a.b.{name}", "all 129 names have `a.b.` before the expected one"),
        (lambda name: f"0.{name}", "all 129 names have `0.` before the expected one"),
        (
            in_first_layer("ema.{}".format),
            "27 of the 129 names have `ema.` before the expected one",
        ),
        (
            in_first_layer("module.{}".format),
            "27 of the 129 names have `module.` before the expected one",
        ),
        (
            in_first_layer("_orig_mod.{}".format),
            "27 of the 129 names have `_orig_mod.` before the expected one",
        ),
        (
            in_first_layer(NAMINGS["base model"]),
            "27 of the 129 names are expected with `model.` before them",
        ),
        (
            in_first_layer(old_names),
            "14 of the 129 names have `language_model.model.` where `model.language_model.` is "
            "expected and 13 of the 129 names are expected with `model.` before them",
        ),
        (
            lambda name: ("base_model.model." if "layers.0." in name else "module.") + name,
            "102 of the 129 names have `module.` before the expected one and "
            "27 of the 129 names have `base_model.model.` before the expected one",
        ),
        (
            lambda name: name.replace("model.", "transformer.", 1),
            "all 129 names have `transformer.` where `model.` is expected",
        ),
        (
            in_text("model."),
            "85 of the 129 names have `model.` where `model.language_model.` is expected",
        ),
        (
            lambda name: "vlm." + old_names(name),
            "85 of the 129 names have `vlm.language_model.model.` where `model.language_model.` is "
            "expected and 44 of the 129 names have `vlm.` where `model.` is expected",
        ),
    ],
)
def test_names_that_are_not_known_are_explained(naming, words, shallow, tmp_path):
    source = rename(shallow("31b"), tmp_path / "t", naming)
    with pytest.raises(SourceError, match="names are not those of a Gemma 4") as caught:
        to_native(source, tmp_path / "n", layout="maxtext")
    assert str(caught.value.found).endswith(f"; {words}")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("other", ["layers.77.", "layers.1."])
def test_tensors_of_another_layer_are_no_other_naming(other, shallow, tmp_path):
    def naming(name: str) -> str:
        before = "" if other == "layers.77." else "ema."
        return before + name.replace("layers.0.", other) if "layers.0." in name else name

    source = rename(shallow("31b"), tmp_path / "t", naming)
    with pytest.raises(SourceError, match="lacks 27 tensors"):
        to_native(source, tmp_path / "n", layout="maxtext")


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
    assert naming.wrappers == tuple(wrappers)


@given(
    wrappers=st.lists(st.sampled_from(["_orig_mod.", "module.", "base_model.model."]), max_size=3),
    spelling=st.sampled_from([str, NAMINGS["base model"], old_names]),
    inner=st.lists(st.sampled_from([".layers.", ".self_attn.", ".mlp."]), unique=True),
    shards=st.integers(1, 4),
)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_composition_in_any_shards_comes_back(
    wrappers, spelling, inner, shards, shallow, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("composed")

    def naming(name: str) -> str:
        name = spelling(name)
        for part in inner:
            name = name.replace(part, f"{part}_orig_mod.")
        return "".join(wrappers) + name

    source = rename(shallow("31b", shards=shards), folder / "t", naming)
    to_native(source, folder / "n", layout="maxtext")
    to_hf(folder / "n", folder / "back")
    assert files(folder / "back") == files(source)


def test_differences_in_words():
    assert difference(["x.a.b", "x.a.c"], ["a.b", "a.c"], 2) == (
        "all 2 names have `x.` before the expected one"
    )
    assert difference(["b.c", "b.d"], ["model.b.c", "model.b.d"], 2) == (
        "all 2 names are expected with `model.` before them"
    )
    assert difference(["q.r", "q.s"], ["p.r", "p.s"], 3) == (
        "2 of the 3 names have `q.` where `p.` is expected"
    )
    assert difference(["q.r"], ["p.r"], 1) is None
    assert difference(["q", "r"], ["a.b"], 2) is None


def test_names_of_any_length_are_looked_at_in_no_time():
    """Quadratic work would take hours here."""
    for name in ("module." * 300_000, "_orig_mod." * 300_000, "a._orig_mod." * 300_000):
        assert list(find_naming([name], HERE).stored.values()) == [name]
    assert difference(["a." * 1_000_000 + "x"], ["model.x"], 1) is None


def test_mlx_is_not_taken_for_an_older_checkpoint(shallow, tmp_path):
    """Its names are the same, and what it lays out otherwise may have the same shape."""
    source = rename(shallow("31b"), tmp_path / "t", NAMINGS["older"])
    path = source / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b'"format": "pt"') == 1
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"format": "pt"', b'"format":"mlx"')
    path.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(SourceError, match="an export of MLX"):
        to_native(source, tmp_path / "n", layout="maxtext")
    with pytest.raises(SourceError, match="an export of MLX"):
        inspect(source)
