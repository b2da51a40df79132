"""Broken mapping tables and notation: one clear error, as a fault of ours."""

from __future__ import annotations

import tomllib

import pytest
from damage import TEXTS, VALUES, Raw, Twice, damaged, places, put
from hypothesis import given
from hypothesis import strategies as st
from outcome import outcome, refused, share

from gemma_convert.errors import MappingError
from gemma_convert.mapping import table
from gemma_convert.mapping.declared import layout_names
from gemma_convert.mapping.notation import (
    join_path,
    parse_condition,
    parse_view,
    split_path,
)

TEXT = {name: table.table_file(name).read_text() for name in ("huggingface", *layout_names())}
PATHS = {name: sorted(places(tomllib.loads(text)), key=str) for name, text in TEXT.items()}
PLAIN = [value for value in VALUES if not isinstance(value, Raw | Twice)]
WORDS = (
    "layers", "{layer}", "{layers}", "[", "]", "(", ")", "embed", "1", " ", "heads", "head_dim",
    "{gate_up}", "{", "}", ".", "/", "'", "mlp", "x", "!", "&", "owns_kv", "moe", "", "  ", "\n",
)  # fmt: skip


def parse(name: str, data: dict) -> object:
    if name == table.HUGGINGFACE:
        return table.parse_inventory(data, "file.toml")
    return table.parse_table(data, "file.toml", table.load_inventory())


@share(60, cost=2)
@given(st.data())
def test_values(data):
    name = data.draw(st.sampled_from(sorted(TEXT)))
    document = tomllib.loads(TEXT[name])
    for path in data.draw(st.lists(st.sampled_from(PATHS[name]), min_size=1, max_size=2)):
        put(document, path, data.draw(st.sampled_from(PLAIN)))
    outcome(lambda: parse(name, document), MappingError.exit_code)


@share(40, cost=2)
@given(st.data())
def test_bytes(data):
    name = data.draw(st.sampled_from(sorted(TEXT)))
    content = data.draw(damaged(TEXT[name].encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table.Path, "read_text", lambda *_, **__: content.decode("utf-8"))
        path = table.table_file(name)
        outcome(lambda: parse(name, table.read_toml(path)[0]), MappingError.exit_code)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = 1\na = 2", "a = " + "9" * 5000])
def test_texts_that_found_something(monkeypatch, text):
    monkeypatch.setattr(table.Path, "read_text", lambda *_, **__: text)
    refused(lambda: table.read_toml(table.table_file("maxtext")), MappingError.exit_code)


@share(150)
@given(st.lists(st.sampled_from([*WORDS, *TEXTS]), max_size=9).map("".join))
def test_notation(text):
    for read in (parse_view, parse_condition, split_path):
        outcome(lambda read=read: read(text), MappingError.exit_code)


@share(150)
@given(st.lists(st.text("ab/'.{é", min_size=1, max_size=4), min_size=1, max_size=4))
def test_paths_come_back(keys):
    path = outcome(lambda: join_path(keys), MappingError.exit_code)
    assert path is None or split_path(path) == tuple(keys)
    assert path is not None or any("'" in key for key in keys)
