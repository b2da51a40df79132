"""Odd values in config.json: every command serves them or says one sentence, and soon."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from outcome import command

ODD = (None, [], {}, "", "odd", True, 0, -1, 1.5, 2**31 - 2, 10**40, [1], {"a": 1}, 3)


def places(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield (*path, key)
            yield from places(value, (*path, key))


def put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    level = changed
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    return changed


class Bench:
    """A checkpoint whose config.json is written anew for each case, and a conversion of it."""

    def __init__(self, source: Path, native: Path, folder: Path) -> None:
        self.folder, self.native, self.work = folder / "checkpoint", native, folder
        self.folder.mkdir()
        for path in source.iterdir():
            if path.name != "config.json":
                shutil.copy(path, self.folder / path.name)
        self.config = json.loads((source / "config.json").read_text())

    def run(self, path: tuple[str, ...], value: Any) -> None:
        text = json.dumps(put(self.config, path, value))
        (self.folder / "config.json").write_text(text)
        command("inspect", self.folder)
        command("flops", self.folder, "--seq-len", 16, codes=(0, 2, 3))
        out = self.work / "out"
        command("to-native", self.folder, out, "--format", "maxtext", "--dry-run", codes=(0, 2, 3))
        one = ("--tokens", 5)
        golden = self.work / "golden"
        command("golden", self.folder, golden, *one, "--overwrite", codes=(0, 2, 3), seconds=180)
        command("logit-check", self.folder, self.native, *one, codes=(0, 1, 2, 3), seconds=180)


@pytest.fixture(scope="module", params=["31b", "e2b", "26b-a4b"])
def bench(request, shallow, converted, tmp_path_factory) -> Bench:
    source = shallow(request.param)
    return Bench(source, converted(source, "maxtext"), tmp_path_factory.mktemp("odd"))


def test_every_key_with_odd_values(bench: Bench, request: pytest.FixtureRequest) -> None:
    every = [(path, value) for path in places(bench.config) for value in ODD]
    step = 1 if request.config.getoption("--every") else 401
    for path, value in every[::step]:
        bench.run(path, value)


DEEP = "[" * 100_000 + "]" * 100_000
ODD_FILES = (
    "",
    "[]",
    "null",
    "{",
    "{}",
    '"x"',
    DEEP,
    '{"model": []}',
    '{"added_tokens": 3}',
    "\ufeff{}",
)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize("name", FILES)
def test_odd_files_beside_the_weights(
    name: str, shallow, converted, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = shallow("31b", shards=2)
    bench = Bench(source, converted(source, "gemma-jax"), tmp_path)
    (bench.folder / "config.json").write_text(json.dumps(bench.config))
    step = 1 if request.config.getoption("--every") else 5
    for text in ODD_FILES[FILES.index(name) % step :: step]:
        (bench.folder / name).unlink(missing_ok=True)
        (bench.folder / name).write_text(text)
        short, golden = ("--prompt", "short"), (tmp_path / "golden", "--overwrite")
        command("golden", bench.folder, *golden, *short, codes=(0, 2, 3), seconds=180)
        command("logit-check", bench.folder, bench.native, *short, codes=(0, 1, 2, 3), seconds=180)
        command("inspect", bench.folder)
