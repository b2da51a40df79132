"""Tokenizer and processor files of a tiny model: every byte is a token, and there are no merges.

File formats: the `tokenizers` library's tokenizer.json with its byte-level BPE, whose alphabet is
GPT-2's; `transformers/models/gemma4/processing_gemma4.py` (5.23) for what the processor asks of the
tokenizer. Names of special tokens and the shape of a turn are Gemma 4's.
"""

from __future__ import annotations

from collections.abc import Mapping

_SPECIAL_WORDS = """
<pad> <eos> <bos> <unk> <mask> <|turn> <turn|>
<|image> <image|> <|image|> <|audio> <audio|> <|audio|> <|video|>
"""

SPECIAL_TOKENS = {word: number for number, word in enumerate(_SPECIAL_WORDS.split())}
"""Identities of the special tokens; the 256 bytes follow them."""

FIRST_BYTE = len(SPECIAL_TOKENS)

MODEL_TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
"""The names under which the processor asks the tokenizer for its special tokens."""

SAMPLING_RATE = 16000
"""Of sounds, in hertz."""

SOFT_TOKENS = 70
"""Most soft tokens of an image: the smallest number that transformers' processor takes."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- elif part['type'] in ('image', 'audio', 'video') -%}
{{- '<|' + part['type'] + '|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- endif -%}
"""
"""The chat template: Gemma-style turns."""


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level BPE, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(vocab: int) -> dict[str, object]:
    """The whole tokenizer.json for `vocab` tokens: specials, bytes, then unused ones."""
    words = [*SPECIAL_TOKENS, *byte_symbols()]
    unused = [f"<unused{number}>" for number in range(vocab - len(words))]
    special = SPECIAL_TOKENS | {word: len(words) + i for i, word in enumerate(unused)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(word, number) for word, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": _byte_level(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special("<bos>", 0), _sequence("A", 0)],
            "pair": [
                _special("<bos>", 0),
                _sequence("A", 0),
                _special("<bos>", 1),
                _sequence("B", 1),
            ],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [SPECIAL_TOKENS["<bos>"]], "tokens": ["<bos>"]}
            },
        },
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: number for number, word in enumerate([*words, *unused])},
            "merges": [],
        },
    }


def tokenizer_config_json(model: str, text_only: bool) -> dict[str, object]:
    """The whole tokenizer_config.json; a text-only model has no processor to name.

    `model` begins the names of the processor's classes: Gemma4 or Gemma4Unified.
    """
    processor = {} if text_only else {"processor_class": f"{model}Processor"}
    return {
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "extra_special_tokens": MODEL_TOKENS,
        "mask_token": "<mask>",
        "model_max_length": 4096,
        "pad_token": "<pad>",
        "padding_side": "left",
        **processor,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def special_tokens_map_json() -> dict[str, object]:
    """The whole special_tokens_map.json."""
    names = ("bos", "eos", "mask", "pad", "unk")
    return {**{f"{name}_token": f"<{name}>" for name in names}, **MODEL_TOKENS}


def image_processor_json(model: str, patch_size: int, pooling: int) -> dict[str, object]:
    """How an image becomes patches; stands in both processor files."""
    return {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": f"{model}ImageProcessor",
        "image_seq_length": SOFT_TOKENS,
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": SOFT_TOKENS,
        "patch_size": patch_size,
        "pooling_kernel_size": pooling,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def processor_json(
    model: str, patch_size: int, pooling: int, extractor: Mapping[str, object], milliseconds: int
) -> dict[str, object]:
    """The whole processor_config.json; a soft token of a sound stands for some `milliseconds`."""
    image = image_processor_json(model, patch_size, pooling)
    video = {key: image[key] for key in image if key not in _IMAGES_ALONE}
    return {
        "audio_ms_per_token": milliseconds,
        "audio_seq_length": 750,
        "feature_extractor": {
            "feature_extractor_type": f"{model}AudioFeatureExtractor",
            "sampling_rate": SAMPLING_RATE,
            **extractor,
        },
        "image_processor": image,
        "image_seq_length": SOFT_TOKENS,
        "processor_class": f"{model}Processor",
        "video_processor": video
        | {
            "do_sample_frames": True,
            "num_frames": 4,
            "video_processor_type": f"{model}VideoProcessor",
        },
    }


_IMAGES_ALONE = ("image_processor_type", "image_seq_length")


def _byte_level() -> dict[str, object]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }


def _added_token(word: str, number: int) -> dict[str, object]:
    return {
        "id": number,
        "content": word,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _special(word: str, kind: int) -> dict[str, object]:
    return {"SpecialToken": {"id": word, "type_id": kind}}


def _sequence(name: str, kind: int) -> dict[str, object]:
    return {"Sequence": {"id": name, "type_id": kind}}
