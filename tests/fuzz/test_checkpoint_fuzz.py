"""Broken files of a checkpoint for `golden` and `logit-check`: served, or one clear message."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from damage import CLOSED, DEEP, altered, damaged, dump
from hypothesis import given
from hypothesis import strategies as st
from outcome import bounded, clear, share

from gemma_convert.errors import GemmaConvertError, SourceError
from gemma_convert.layouts.maxtext import tree as maxtext_orbax
from gemma_convert.layouts.registry import open_model
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.images import image_sequences
from gemma_convert.prompts.sounds import sound_sequences
from gemma_convert.prompts.text import token_sequences

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
INDEX = "model.safetensors.index.json"
DEEPLY = tuple(dump({"tree_metadata": deep}).encode() for deep in (DEEP, CLOSED))
SECONDS = 60


class Bench:
    """A copy of a checkpoint, one file of which is written anew for each case."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder, self.source, self.work = folder / "checkpoint", source, folder
        self.folder.mkdir()
        for path in source.iterdir():
            shutil.copy(path, self.folder / path.name)
        self.architecture = read_architecture(source)

    def json(self, name: str) -> dict:
        return json.loads((self.source / name).read_text())

    def with_file(self, name: str, content: bytes, run: Callable[[], object]) -> bool:
        """Whether `run` serves the checkpoint with that file; else it has told one thing."""
        path = self.folder / name
        path.unlink()
        path.write_bytes(content)
        try:
            with bounded(SECONDS):
                run()
        except GemmaConvertError as error:
            assert error.exit_code in (2, 3), repr(error)
            assert error.where is not None, repr(error)
            clear(error.message)
            return False
        finally:
            path.unlink()
            shutil.copy(self.source / name, path)
        return True

    def golden(self, tokens: int | None = 5) -> None:
        save_golden(self.folder, self.work / "golden", tokens=tokens, overwrite=True)


@pytest.fixture(scope="module")
def bench(shallow, tmp_path_factory) -> Bench:
    return Bench(shallow("31b", shards=2), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def seeing(tiny, tmp_path_factory) -> Bench:
    """One with both towers."""
    return Bench(tiny("e2b", layers=10), tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def native(bench, converted) -> Path:
    return converted(bench.source, "maxtext")


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    import PIL.Image

    path = tmp_path_factory.mktemp("picture") / "grey.png"
    PIL.Image.new("RGB", (31, 22), (90, 120, 60)).save(path)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "hum.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((1000 * np.sin(np.arange(4000) / 9)).astype("<i2").tobytes())
    return path


@pytest.fixture(autouse=True, scope="module")
def all_memory_is_taken_before_it_is_measured(bench) -> Iterator[None]:
    bench.golden(tokens=None)
    yield


def test_a_checkpoint_that_is_whole_is_served(bench, seeing, native, picture, sound):
    """Else every other case here might be refused for the same one reason."""
    config = json.dumps(bench.json("config.json")).encode()
    assert bench.with_file("config.json", config, bench.golden)
    assert bench.with_file("config.json", config, lambda: logit_check(bench.folder, native))
    for name in PROCESSOR:
        content = (seeing.source / name).read_bytes()
        assert seeing.with_file(name, content, lambda: see_and_hear(seeing, picture, sound))


def see_and_hear(bench: Bench, picture: Path, sound: Path) -> None:
    image_sequences(bench.folder, bench.architecture, [picture])
    sound_sequences(bench.folder, bench.architecture, [sound])


@share(8, cost=20)
@given(st.data())
def test_configs(bench, native, data):
    content = data.draw(altered(bench.json("config.json")))
    if bench.with_file("config.json", content, lambda: bench.golden(5)):
        bench.with_file("config.json", content, lambda: logit_check(bench.folder, native, tokens=5))


@share(24, cost=4)
@given(st.data())
def test_files_of_a_tokenizer(bench, data):
    name = data.draw(st.sampled_from(TOKENIZER))
    whole = (bench.source / name).read_bytes()
    content = data.draw(altered(json.loads(whole)) | damaged(whole))
    bench.with_file(name, content, lambda: token_sequences(bench.folder, bench.architecture))


@share(16, cost=6)
@given(st.data())
def test_files_of_a_tokenizer_for_images_and_sounds(seeing, picture, sound, data):
    name = data.draw(st.sampled_from(TOKENIZER[1:]))
    content = data.draw(altered(seeing.json(name), most=1))
    seeing.with_file(name, content, lambda: see_and_hear(seeing, picture, sound))


@share(24, cost=4)
@given(st.data())
def test_files_of_a_processor(seeing, picture, sound, data):
    name = data.draw(st.sampled_from(PROCESSOR))
    content = data.draw(altered(seeing.json(name), most=1))
    seeing.with_file(name, content, lambda: see_and_hear(seeing, picture, sound))


@share(8, cost=20)
@given(st.data())
def test_an_index(bench, native, data):
    content = data.draw(altered(bench.json(INDEX)))
    if bench.with_file(INDEX, content, bench.golden):
        bench.with_file(INDEX, content, lambda: logit_check(bench.folder, native, tokens=5))


@share(6, cost=20)
@given(st.data())
def test_a_generation_config(bench, data):
    content = data.draw(altered(bench.json("generation_config.json")))
    bench.with_file("generation_config.json", content, bench.golden)


@pytest.fixture(scope="module")
def tree(native, tmp_path_factory) -> Path:
    """A copy of the converted checkpoint's item folder, whose `_METADATA` is written anew."""
    items = next(native.rglob("_METADATA")).parent
    return shutil.copytree(items, tmp_path_factory.mktemp("tree") / "items")


@share(24, cost=4)
@given(st.data())
def test_the_metadata_of_orbax(bench, native, tree, data):
    """What Orbax itself makes of it, and the arrays that it names."""
    whole = next(native.rglob("_METADATA")).read_bytes()
    broken = altered(json.loads(whole)) | damaged(whole) | st.sampled_from(DEEPLY)
    (tree / "_METADATA").write_bytes(data.draw(broken))
    try:
        with bounded(SECONDS):
            open_model(tree, bench.architecture)
            maxtext_orbax.open_tree(tree)
    except GemmaConvertError as error:
        assert error.exit_code == SourceError.exit_code, repr(error)
        clear(error.message)


@pytest.mark.parametrize("content", DEEPLY)
def test_metadata_that_nests_too_deep(bench, native, tree, content):
    (tree / "_METADATA").write_bytes(content)
    with pytest.raises(SourceError, match="etadata"):
        open_model(tree, bench.architecture)
