"""Which tokens are run: fixed, legal, begun once, and one sequence beyond the window."""

import json

import pytest

from gemma_convert.errors import SourceError, UsageError
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts import text
from gemma_convert.prompts.text import reserved_ids, token_sequences

WINDOW = 21
BEGIN = 2


def write_config(folder, vocab=400, ple_vocab=None):
    text = {
        "model_type": "gemma4_text",
        "vocab_size": vocab,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "global_head_dim": 10,
        "sliding_window": WINDOW,
        "pad_token_id": 0,
        "bos_token_id": BEGIN,
        "eos_token_id": [1, 106],
    }
    if ple_vocab:
        text |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": ple_vocab}
    config = {
        "model_type": "gemma4",
        "text_config": text,
        "image_token_id": 390,
        "video_token_id": 391,
        "audio_token_id": None,
        "eoa_token_index": 392,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def write_tokenizer(folder, begin="<bos>"):
    """A tokenizer of single bytes, which puts its begin token first by itself where it has one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", "<bos>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BEGIN)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token=begin
    )
    fast.save_pretrained(folder)


def byte_length(text):
    return len(text.encode())


def test_built_in_prompts_begin_once_and_the_last_exceeds_the_window(tmp_path):
    write_tokenizer(tmp_path)
    sequences = token_sequences(tmp_path, write_config(tmp_path))
    assert [one.name for one in sequences] == [*text.PROMPTS, "longer-than-window"]
    for one in sequences:
        assert one.ids[0] == BEGIN and BEGIN not in one.ids[1:]
        assert len(one.pieces) == len(one.ids)
        assert one.compared.dtype == bool and one.compared.tolist() == [True] * len(one.ids)
    assert len(sequences[-1].ids) >= WINDOW + 32
    english = sequences[0]
    assert len(english.ids) == 1 + byte_length(text.PROMPTS["english"])
    assert "".join(english.pieces[1:]) == text.PROMPTS["english"]


def test_users_prompts_replace_the_built_in_ones_but_the_long_one(tmp_path):
    write_tokenizer(tmp_path)
    sequences = token_sequences(tmp_path, write_config(tmp_path), ["ab", "<bos>c"])
    assert [one.name for one in sequences] == ["prompt-0", "prompt-1", "longer-than-window"]
    assert sequences[0].pieces == ("<bos>", "a", "b")
    assert sequences[1].pieces == ("<bos>", "c")
    assert len(sequences[-1].ids) >= WINDOW + 32


def test_a_tokenizer_without_begin_token_gets_none(tmp_path):
    write_tokenizer(tmp_path, begin=None)
    sequences = token_sequences(tmp_path, write_config(tmp_path), ["ab"])
    assert sequences[0].pieces == ("a", "b")


def test_without_tokenizer_ids_are_fixed_varied_and_not_reserved(tmp_path):
    architecture = write_config(tmp_path)
    sequences = token_sequences(tmp_path, architecture)
    assert sequences == token_sequences(tmp_path, architecture)
    assert len({one.ids for one in sequences}) == len(sequences) > 2
    assert len(sequences[-1].ids) >= WINDOW + 32 > WINDOW > 0
    used = {id for one in sequences for id in one.ids}
    assert not used & {0, 1, 2, 106, 390, 391, 392} and len(used) > 50
    assert all(one.pieces is None for one in sequences)


def test_random_ids_keep_off_reserved_ones_in_a_vocabulary_that_holds_little_else(tmp_path):
    (tmp_path / "tight").mkdir()
    architecture = write_config(tmp_path / "tight", vocab=5)
    for one in token_sequences(tmp_path / "tight", architecture):
        assert set(one.ids) <= {3, 4}


def test_per_layer_vocabulary_bounds_random_ids(tmp_path):
    architecture = write_config(tmp_path, ple_vocab=40)
    used = {id for one in token_sequences(tmp_path, architecture) for id in one.ids}
    assert max(used) < 40


@pytest.mark.parametrize(("tokens", "lengths"), [(5, [5, WINDOW + 32]), (WINDOW + 1, [WINDOW + 1])])
def test_tokens_asks_for_so_many_random_ids(tmp_path, tokens, lengths):
    write_tokenizer(tmp_path)
    sequences = token_sequences(tmp_path, write_config(tmp_path), tokens=tokens)
    assert [len(one.ids) for one in sequences] == lengths


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(SourceError, match="not in the model's vocabulary"):
        token_sequences(tmp_path, write_config(tmp_path, vocab=60), ["zzz"])


def test_a_prompt_with_an_images_place_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    architecture = write_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    place = token_sequences(tmp_path, architecture, ["q"])[0].ids[1]
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": place}))
    with pytest.raises(UsageError, match="placeholder token of an image") as caught:
        token_sequences(tmp_path, architecture, ["fine", "q"])
    assert (caught.value.where, caught.value.found) == ("prompt-1", str(place))


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    """What a shell passes on that is not UTF-8."""
    write_tokenizer(tmp_path)
    architecture = write_config(tmp_path)
    with pytest.raises(UsageError, match="not valid text") as caught:
        token_sequences(tmp_path, architecture, ["fine", "b\udcff"])
    assert caught.value.where == "prompt-1"


def test_options_that_contradict_each_other_are_refused(tmp_path):
    architecture = write_config(tmp_path)
    for arguments in ({"prompts": ["a"]}, {"tokens": 0}, {"tokens": 3, "prompts": ["a"]}):
        with pytest.raises(UsageError):
            token_sequences(tmp_path, architecture, **arguments)


def test_a_broken_tokenizer_is_a_message(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="cannot load the tokenizer"):
        token_sequences(tmp_path, write_config(tmp_path))


def test_reserved_ids_come_from_all_sections_and_lists():
    config = {
        "a_token_id": 3,
        "b_token_index": 4,
        "none_token_id": None,
        "flag_token_id": True,
        "text_config": {"eos_token_id": [5, 6], "vocab_size": 7},
    }
    assert reserved_ids(config) == {3, 4, 5, 6}
