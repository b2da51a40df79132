"""Files of a checkpoint do not send transformers to other files, to code or to the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_confined import copied, run


@pytest.fixture(scope="module")
def hf(tiny) -> Path:
    return tiny("31b", layers=6)


@pytest.fixture(scope="module")
def native(hf, converted) -> Path:
    return converted(hf, "maxtext")


def with_key(hf: Path, to: Path, file: str, key: str, value: Any) -> Path:
    """A copy of `hf` with one key of a JSON file set; `{}` in a text becomes an absolute path."""
    folder = copied(hf, to)
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    text = json.dumps({**content, key: value}).replace("{out}", str(to.parent))
    path.write_text(text)
    return folder


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoConfig": "code.Config"}),
        ("config.json", "configuration_files", ["../config.4.0.0.json"]),
        ("config.json", "transformers_weights", "other.safetensors"),
        ("tokenizer_config.json", "auto_map", ["code.Tokenizer", None]),
        ("tokenizer_config.json", "tokenizer_file", "{out}/tokenizer.json"),
        ("tokenizer_config.json", "vocab_file", "../tokenizer.model"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../tokenizer.4.0.0.json"]),
        ("tokenizer_config.json", "tokenizer_class", "BertJapaneseTokenizer"),
        ("special_tokens_map.json", "vocab_file", ".."),
        ("generation_config.json", "auto_map", {"x": "code.X"}),
        ("adapter_config.json", "base_model_name_or_path", "somebody/else"),
    ],
)
def test_keys_that_lead_elsewhere(file, key, value, hf, native, tmp_path) -> None:
    folder = with_key(hf, tmp_path / "in", file, key, value)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(hf / name, tmp_path / name.replace(".", ".4.0.0.", 1))
        shutil.copy(hf / name, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ("golden", folder, tmp_path / "g.safetensors"),
        ("logit-check", folder, native),
        ("logit-check", folder, native, "--whole-model"),
    ):
        code, said = run(*command)
        assert code == 3, (command, said)
        assert f"{folder / file}" in said, (command, said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.share(4, 1)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer_file", None),
        ("tokenizer_file", "tokenizer.json"),
        ("name_or_path", "google/gemma-4-31B"),
        ("tokenizer_class", "GemmaTokenizer"),
    ],
)
def test_keys_that_people_have(key, value, hf, native, tmp_path) -> None:
    folder = with_key(hf, tmp_path / "in", "tokenizer_config.json", key, value)
    assert run("logit-check", folder, native, "--log-level", "warning") == (0, "")
