"""Broken config.json: refused with the file and the key, or facts that everything else can bear."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from cases import LAYOUTS
from damage import (
    DEEP,
    NUMBERS,
    STRANGE,
    VALUES,
    Twice,
    altered,
    damaged,
    dump,
    make_strange,
    places,
    put,
)
from hypothesis import given
from hypothesis import strategies as st
from models import PUBLISHED, load_config
from outcome import bounded, command, outcome, refused, share, snapshot
from seeds import CONFIGS

from gemma_convert import to_hf, to_native
from gemma_convert.errors import GemmaConvertError
from gemma_convert.mapping.inventory import hf_tensors
from gemma_convert.model.config import read_architecture

CONFIGS_OF_MODELS = {name: load_config(name) for name in PUBLISHED}
DOCUMENTS = {name: altered(config, most=3) for name, config in CONFIGS_OF_MODELS.items()}
NUMERIC = sorted(
    {
        (name, path)
        for name, config in CONFIGS_OF_MODELS.items()
        for path in places(config)
        if "label" not in str(path)
    },
    key=str,
)


def check(content: bytes) -> None:
    """The file is refused, or its facts size a list of tensors in bounded time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(content)

        def size() -> int:
            return len(hf_tensors(read_architecture(Path(folder))))

        found = outcome(size)
        assert found is None or 0 < found < 500_000


@share(250)
@given(st.sampled_from(PUBLISHED).flatmap(DOCUMENTS.get))
def test_documents(content):
    check(content)


@share(150)
@given(st.sampled_from(NUMERIC), st.sampled_from(VALUES))
def test_every_field_with_absurd_values(place, value):
    name, path = place
    config = load_config(name)
    put(config, path, value)
    check(dump(config).encode("utf-8", "surrogatepass"))


@share(60)
@given(damaged(json.dumps(CONFIGS_OF_MODELS[PUBLISHED[0]]).encode()))
def test_bytes(content):
    check(content)


@pytest.mark.parametrize("content", CONFIGS)
def test_configs_that_found_something(content):
    check(content)


@pytest.mark.parametrize("value", [1 << 31, 1_000_000_000, 1025, -1, 0, 1.5, True, DEEP])
@pytest.mark.parametrize("section", ["text_config", "vision_config", "audio_config"])
def test_a_billion_layers(tmp_path, section, value):
    config = load_config(PUBLISHED[0])
    config[section]["num_hidden_layers"] = value
    (tmp_path / "config.json").write_text(dump(config))
    refused(lambda: read_architecture(tmp_path))


@pytest.mark.parametrize(
    "kinds", [[], ["full_attention"], ["full_attention"] * 36, "full", {}, [3]]
)
def test_kinds_of_layers_of_another_number(tmp_path, kinds):
    config = load_config(PUBLISHED[0])
    config["text_config"]["layer_types"] = kinds
    (tmp_path / "config.json").write_text(dump(config))
    assert "layer_types" in refused(lambda: read_architecture(tmp_path))


def test_a_key_that_stands_twice(tmp_path):
    config = load_config(PUBLISHED[0])
    config["text_config"] = Twice(config["text_config"])
    (tmp_path / "config.json").write_text(dump(config))
    assert "stands twice" in refused(lambda: read_architecture(tmp_path))


@pytest.mark.parametrize("depth", range(860, 1000, 20))
def test_values_that_are_just_not_too_deep_to_read(tmp_path, depth):
    """What can just be read may be too deep to be shown in a message."""
    deep = "[" * depth + "]" * depth
    text = f'{{"model_type": "gemma4_text", "num_hidden_layers": {deep}}}'
    (tmp_path / "config.json").write_text(text)
    refused(lambda: read_architecture(tmp_path))


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file(tiny, tmp_path, kind):
    shutil.copytree(tiny("31b", text_only=True), tmp_path / "source")
    make_strange(tmp_path / "source" / "config.json", kind)
    message = refused(lambda: read_architecture(tmp_path / "source"))
    assert "is not a file" in message or kind not in ("pipe", "device")
    before = snapshot(tmp_path)
    assert command("inspect", tmp_path / "source")[0] in (0, 3)
    assert (
        command("to-native", tmp_path / "source", tmp_path / "out", "--format", "maxtext")[0] == 3
    )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [13, 5, 24])
def test_a_config_that_the_system_does_not_open(tmp_path, monkeypatch, error):
    (tmp_path / "config.json").write_text("{}")

    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "open", fail)
    assert os.strerror(error) in refused(lambda: read_architecture(tmp_path))


@share(8, cost=30)
@given(st.data())
def test_a_conversion_is_refused_or_comes_back(tiny, data):
    """What is converted under a changed config is the same, bit for bit, when it comes back."""
    source = tiny("31b", text_only=True)
    config = json.loads((source / "config.json").read_text())
    layout = data.draw(st.sampled_from(LAYOUTS))
    with tempfile.TemporaryDirectory() as outer:
        folder, out, back = (Path(outer, name) for name in ("source", "out", "back"))
        shutil.copytree(source, folder)
        (folder / "config.json").write_bytes(data.draw(altered(config, NUMBERS)))
        before = snapshot(Path(outer))
        try:
            with bounded(20):
                to_native(folder, out, layout=layout)
        except GemmaConvertError as error:
            assert error.exit_code in (2, 3), repr(error)
            assert snapshot(Path(outer)) == before
        else:
            with bounded(20):
                assert to_hf(out, back).bit_for_bit
            assert snapshot(back) == snapshot(folder)
