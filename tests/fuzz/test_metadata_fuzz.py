"""Broken metadata.yaml of Fast-LLM: refused, in time and memory that do not grow with cunning."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from damage import DEEP, STRANGE, TEXTS, VALUES, altered, damaged, make_strange
from hypothesis import given
from hypothesis import strategies as st
from outcome import bounded, command, outcome, refused, share, snapshot
from seeds import YAML

from gemma_convert.layouts.fast_llm.layout import FastLLM
from gemma_convert.layouts.fast_llm.metadata import METADATA, differences
from gemma_convert.layouts.registry import open_native
from gemma_convert.stores.safetensors.header import write_safetensors

ARRAYS = {
    "embeddings.a": np.arange(6, dtype=np.float32),
    "decoder.0.b": np.ones((2, 3), np.float16),
}
DOCUMENT = {
    "fast_llm_version": "0.4.0",
    "format": "fast_llm",
    "model": "gpt",
    "shards": ["weights"],
    "config": {"type": "gpt", "base_model": {"hidden_size": 6, "head": {"epsilon": 1e-6}}},
    "metadata": {"state_index": dict.fromkeys(ARRAYS, "model_0.safetensors")},
}

NOT_DEEP = [value for value in VALUES if value is not DEEP]
"""Hypothesis allows deep recursion, in which PyYAML is slow; as it is else is tested below."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small checkpoint; only its metadata are written again."""
    folder = tmp_path_factory.mktemp("outer") / "inner"
    folder.mkdir()
    write_safetensors(folder / "model_0.safetensors", ARRAYS)
    write_safetensors(folder.parent / "x.safetensors", ARRAYS)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    with open_native(folder) as native:
        return {
            name: native.opener(name, 0).read(tuple((0, n) for n in spec.shape)).tobytes()
            for name, spec in native.specs.items()
        }


def check(folder: Path, content: bytes) -> None:
    (folder / METADATA).write_bytes(content)
    before = snapshot(folder.parent)
    found = outcome(lambda: read(folder))
    assert snapshot(folder.parent) == before
    assert found is None or found == {name: array.tobytes() for name, array in ARRAYS.items()}


@share(120)
@given(altered(DOCUMENT, NOT_DEEP))
def test_documents(folder, content):
    """JSON is YAML too, but for what neither allows."""
    check(folder, content)


@share(120)
@given(damaged(yaml.safe_dump(DOCUMENT).encode()))
def test_bytes(folder, content):
    check(folder, content)


@share(80)
@given(st.data())
def test_words_of_yaml(folder, data):
    """Tags, anchors, merges and odd numbers in the place of a value."""
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
    lines = yaml.safe_dump(DOCUMENT).splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = f"{lines[place].partition(':')[0]}: {' '.join(words)}"
    check(folder, "\n".join(lines).encode())


WORDS = (
    "&a", "*a", "<<:", "!!python/object/apply:os.system", "[touch, x]", "!!binary", "!!set",
    "!!timestamp", "2001-13-45", "!!int", "!!bool", "maybe", "0x" + "f" * 990, "1:2:3", ".inf",
    "!!omap", "!!pairs", "{", "}", "[", "]", "|", ">", "---", "...", "%YAML 9.9", "?", "- ",
    "!!float", "190:20:30.15", "!!null", '"\\ud800"', "0b1", "@", "`", "1e999", "~", "!!merge", "=",
)  # fmt: skip


@pytest.mark.parametrize("content", YAML)
def test_texts_that_found_something(folder, content):
    (folder / METADATA).write_bytes(content)
    refused(lambda: read(folder))


@pytest.mark.parametrize("name", [text for text in TEXTS if text.isprintable()])
def test_no_name_leads_elsewhere(folder, name):
    index = {"state_index": dict.fromkeys(ARRAYS, name)}
    (folder / METADATA).write_text(json.dumps(DOCUMENT | {"metadata": index}))
    refused(lambda: read(folder))


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file(folder, tmp_path, kind):
    shutil.copytree(folder, tmp_path / "source")
    (tmp_path / "source" / METADATA).write_bytes(b"")
    make_strange(tmp_path / "source" / METADATA, kind)
    refused(lambda: read(tmp_path / "source"))
    assert command("inspect", tmp_path / "source")[0] == 3


def test_metadata_that_the_system_does_not_open(folder, monkeypatch):
    (folder / METADATA).write_bytes(json.dumps(DOCUMENT).encode())

    def fail(*_, **__):
        raise OSError(13, os.strerror(13))

    monkeypatch.setattr(os, "open", fail)
    assert os.strerror(13) in refused(lambda: read(folder))


@share(60)
@given(altered(DOCUMENT, NOT_DEEP))
def test_what_differs_can_be_said(content):
    """Values that are nested without end, or refer to themselves, are compared all the same."""
    with bounded():
        try:
            found = yaml.safe_load(content.decode("utf-8", "replace"))
        except (yaml.YAMLError, RecursionError, ValueError, AttributeError):
            return
    assert all(len(how) < 1000 for _, how in differences(DOCUMENT, found))


@share(4, cost=60)
@given(st.data())
def test_checks_of_a_conversion(tiny, converted, data):
    """A conversion whose metadata are changed: verify says no, or that nothing was changed."""
    whole = converted(tiny("31b", text_only=True), FastLLM.name)
    with tempfile.TemporaryDirectory() as outer:
        native = Path(outer, "native")
        shutil.copytree(whole, native)
        document = yaml.safe_load((native / METADATA).read_text())
        (native / METADATA).write_bytes(data.draw(altered(document, NOT_DEEP)))
        command("inspect", native)
        code, _ = command("verify", native, codes=(0, 1, 3))
        changed = yaml.safe_load((native / METADATA).read_bytes()) if code == 0 else None
        assert code or changed["config"] == document["config"]


def test_deep_nesting(folder):
    for text in ("[" * 20_000, "{a: " * 9_000, "- " * 20_000, "? " * 9_000):
        (folder / METADATA).write_text(text)
        refused(lambda: read(folder))
