"""What is odd in a file of a checkpoint is told of that file, in one message; null is a value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_convert import to_native
from gemma_convert.errors import GemmaConvertError, SourceError
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.golden_writing import save_golden
from gemma_convert.model.config import parse_architecture, read_architecture
from gemma_convert.prompts.text import token_sequences


@pytest.fixture
def changed(shallow, tmp_path) -> Callable[..., Path]:
    """changed(family, change): a copy of a tiny checkpoint whose config.json `change` has set."""

    def make(family: str, change: Callable[[dict[str, Any]], object], **options) -> Path:
        folder = shutil.copytree(shallow(family, **options), tmp_path / "checkpoint")
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def told(run: Callable[[], object]) -> GemmaConvertError:
    with pytest.raises(SourceError) as caught:
        run()
    return caught.value


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("key", "value"), [("bos_token_id", [1]), ("use_cache", "yes"), ("initializer_range", None)]
)
def test_what_transformers_refuses_in_config_is_told_of_config(
    key, value, changed, shallow, converted, tmp_path
):
    """And not of the tokenizer, for which transformers reads config.json too."""
    folder = changed("31b", lambda config: config["text_config"].update({key: value}))
    native = converted(shallow("31b"), "maxtext")
    for run in (
        lambda: save_golden(folder, tmp_path / "golden"),
        lambda: logit_check(folder, native),
    ):
        error = told(run)
        assert error.where == str(folder / "config.json")
        assert key in error.found and "tokenizer" not in error.message


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("text_config", "rms_norm_eps"),
        ("text_config", "hidden_activation"),
        ("text_config", "sliding_window"),
        ("text_config", "attention_k_eq_v"),
        ("text_config", "tie_word_embeddings"),
        ("audio_config", "hidden_act"),
        ("vision_config", "standardize"),
    ],
)
def test_null_is_refused_where_transformers_refuses_it(section, key, changed):
    folder = changed("e2b", lambda config: config[section].update({key: None}))
    error = told(lambda: read_architecture(folder))
    assert (error.where, error.found) == (f"{folder / 'config.json'}, key {section}.{key}", "null")
    with pytest.raises(Exception, match=key):
        load_with_transformers(folder)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("section", "key", "fact"),
    [
        ("text_config", "final_logit_softcapping", lambda model: model.text.logit_softcap),
        ("text_config", "pad_token_id", lambda model: model.text.pad_token or None),
        ("vision_config", "attention_bias", lambda model: None),
    ],
)
def test_null_is_taken_where_transformers_takes_it(section, key, fact, changed):
    folder = changed("e2b", lambda config: config[section].update({key: None}))
    assert fact(read_architecture(folder)) is None
    assert getattr(getattr(load_with_transformers(folder), section), key) is None


def load_with_transformers(folder: Path) -> Any:
    from transformers import Gemma4Config

    return Gemma4Config.from_pretrained(folder)


def without_padding(config: dict[str, Any]) -> None:
    config.get("text_config", config)["pad_token_id"] = None


def test_a_text_model_without_padding_is_checked(changed, tmp_path):
    folder = changed("31b", without_padding, text_only=True)
    to_native(folder, tmp_path / "native", layout="maxtext")
    for whole in (False, True):
        assert logit_check(folder, tmp_path / "native", tokens=9, whole_model=whole).proof


def test_a_model_with_towers_needs_padding(changed, tmp_path):
    """transformers puts it where soft tokens stand, if there are any or not."""
    folder = changed("31b", without_padding)
    to_native(folder, tmp_path / "native", layout="maxtext")
    for whole in (False, True):
        error = told(
            lambda whole=whole: logit_check(folder, tmp_path / "native", whole_model=whole)
        )
        assert error.what == "transformers cannot run the original checkpoint."


def test_keys_and_values_that_no_layer_owns(changed):
    folder = changed("31b", lambda config: config["text_config"].update(num_kv_shared_layers=6))
    assert "num_kv_shared_layers" in told(lambda: read_architecture(folder)).where


def test_the_older_spelling_of_the_experts_width(shallow):
    config = json.loads((shallow("26b-a4b") / "config.json").read_text())
    text = config["text_config"]
    width = text["moe_intermediate_size"]
    text |= {"moe_intermediate_size": None, "expert_intermediate_size": width}
    assert parse_architecture(config, Path("config.json")).text.expert_mlp == width
    text["expert_intermediate_size"] = None
    error = told(lambda: parse_architecture(config, Path("config.json")))
    assert error.where.endswith("moe_intermediate_size") and error.found == "null"


def test_a_tokenizer_config_that_is_a_list(changed):
    folder = changed("31b", lambda config: None)
    (folder / "tokenizer_config.json").write_text("[]")
    error = told(lambda: token_sequences(folder, read_architecture(folder)))
    assert "tokenizer_config.json" in error.message
