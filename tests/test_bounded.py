"""Sizes in the JSON files of a checkpoint are believed as far as its tensors bear them out."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_confined import copied, hf_readers, run

from gemma_convert.model.config import read_architecture
from gemma_convert.prompts.text import LONGEST_MADE, token_sequences

HUGE = (10**9, 2**31 - 2)
TEXT = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim",
    "global_head_dim", "num_key_value_heads", "num_hidden_layers",
)  # fmt: skip
VISION = ("hidden_size", "num_hidden_layers", "position_embedding_size", "patch_size", "head_dim")
AUDIO = ("hidden_size", "num_hidden_layers", "subsampling_conv_channels")
PLE = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
SIZES = [
    *(("31b", "text_config", key) for key in TEXT),
    *(("e2b", "text_config", key) for key in PLE),
    *(("e2b", "vision_config", key) for key in VISION),
    *(("e2b", "audio_config", key) for key in AUDIO),
    ("26b-a4b", "text_config", "num_experts"),
    ("26b-a4b", "text_config", "moe_intermediate_size"),
]


@contextmanager
def not_without_end(seconds: int = 60) -> Iterator[None]:
    """A loop over so many things would not end within a test run; this one says where it was."""

    def late(*_: object) -> None:
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_size(source: Path, to: Path, file: str, section: str, key: str, value: Any) -> Path:
    folder = copied(source, to)
    config = json.loads((folder / file).read_text())
    place = config[section] if section else config
    assert file != "config.json" or key in place, key
    place[key] = [value] * len(place[key]) if isinstance(place.get(key), list) else value
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(config))
    return folder


@pytest.mark.share(14)
@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(("family", "section", "key"), SIZES)
def test_sizes_that_no_tensor_has(family, section, key, value, shallow, converted, tmp_path):
    source = shallow(family)
    native = converted(source, "maxtext")
    folders = {"zarr": native, "golden": tmp_path / "none"}
    work = tmp_path / "work"
    work.mkdir()
    folder = with_size(source, work / "in", "config.json", section, key, value)
    for command in hf_readers(folder, folders, work / "out"):
        with not_without_end():
            code, said = run(*command)
        if (command[0] in ("flops", "mappings") and "layers" not in key) or (
            command[0] == "inspect" and "layers" not in key
        ):
            assert code in (0, 3), (command, said)
        elif command[0] == "verify":
            assert code in (1, 3), (command, said)  # config.json is not the export's
        elif "fast-llm" in command and family == "e2b":
            assert code in (2, 3), (command, said)  # it has no place for this model
        else:
            assert code == 3, (command, said)
    assert [path.name for path in work.iterdir()] == ["in"]


@pytest.mark.parametrize("tokens", [None, 7])
def test_the_longest_prompt_has_a_limit(tokens, shallow, tmp_path) -> None:
    """A window that no tensor bears out is not what decides how long a sequence is."""
    for number, window in enumerate((2**31 - 2, 5000, 1024, LONGEST_MADE - 32)):
        folder = with_size(
            shallow("31b"),
            tmp_path / str(number),
            "config.json",
            "text_config",
            "sliding_window",
            window,
        )
        sequences = token_sequences(folder, read_architecture(folder), tokens=tokens)
        assert abs(len(sequences[-1].ids) - min(window + 32, LONGEST_MADE)) <= 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling_rate", 2**31),
        ("feature_size", 2**31),
        ("frame_length_ms", 1e9),
        ("hop_length_ms", 1e-9),
        ("sampling_rate", "16000"),
    ],
)
def test_feature_extractors_of_no_gemma_4(key, value, shallow, converted, tmp_path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(16000))
    source = shallow("e2b")
    folder = with_size(
        source, tmp_path / "in", "processor_config.json", "feature_extractor", key, value
    )
    command = ("logit-check", folder, converted(source, "maxtext"), "--audio", tmp_path / "a.wav")
    with not_without_end():
        code, said = run(*command)
    assert code == 3, said
    assert "feature extractor" in said


@pytest.mark.parametrize(("key", "value"), [("patch_size", 5000), ("pooling_kernel_size", 900)])
def test_image_processors_of_no_gemma_4(key, value, shallow, converted, tmp_path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), (9, 99, 200)).save(tmp_path / "i.png")
    source = shallow("e2b")
    folder = with_size(
        source, tmp_path / "in", "processor_config.json", "image_processor", key, value
    )
    command = ("logit-check", folder, converted(source, "maxtext"), "--image", tmp_path / "i.png")
    with not_without_end():
        code, said = run(*command)
    assert code == 3, said
    assert "does not fit the vision tower" in said
