"""Which token sequences a check runs on: text where there is a tokenizer, fixed random ids else.

One sequence is always longer than the sliding window: shorter ones see neither the window nor wrong
positions of the rotary embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError, UsageError
from gemma_convert.files.json_file import read_object
from gemma_convert.files.libraries import told_by_library
from gemma_convert.files.read_once import once
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.config import MAX_CONFIG_BYTES
from gemma_convert.model.transformers_folder import handed
from gemma_convert.output import counted

BEYOND_WINDOW = 32
LONGEST_MADE = 2048
"""Tokens of the longest prompt that is made; published windows are 512 and 1024."""
SHORT_LENGTH = 24
SHORT_COUNT = 3
SEED = 20260401

PROMPTS = {
    "english": "The lighthouse keeper counted the ships that passed before dawn, and wrote down",
    "code": "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "numbers": "17 + 25 = 42, 3.14159 * 2 = 6.28318, and 2**20 = 1048576, so 1048576 / 1024 =",
    "japanese": "港の灯台は、夜明け前に通り過ぎる船の数を数え、その名前を",
    "mixed": "Grüße aus Köln! Привет, мир. مرحبا بالعالم. 🙂 <b>bold</b>\t| a | b |",
}

_CANNOT_READ = "The tokenizer cannot read a prompt."
_REPAIR = "repair the tokenizer's files"

_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one prompt; `pieces` is the text of each token, None without a tokenizer."""

    name: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...] | None = None

    @property
    def compared(self) -> npt.NDArray[np.bool_]:
        """Whether the logits behind each token count in a comparison, [length]: all of them."""
        return np.ones(len(self.ids), bool)


def token_sequences(
    hf: Path, architecture: Architecture, prompts: Sequence[str] = (), tokens: int | None = None
) -> list[TokenSequence]:
    """The sequences that a check runs on, the one longer than the sliding window last.

    `prompts` replace the built-in ones. `tokens` asks for that many fixed pseudo-random ids instead
    of text. Nothing is fetched from a network, and no code of the checkpoint is run. Raises
    UsageError where both are given or the folder has no tokenizer for `prompts`, and SourceError
    where a token does not fit the vocabulary.
    """
    if tokens is not None and (prompts or tokens < 1):
        raise UsageError(
            "--tokens takes a positive number, and cannot be combined with --prompt.",
            found=f"{counted(tokens, 'token')} and {counted(len(prompts), 'prompt')}",
        )
    for number, prompt in enumerate(prompts):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError(
                "A prompt is not valid text.", where=f"prompt-{number}", do="give it in UTF-8"
            )
    long = min(architecture.text.window + BEYOND_WINDOW, LONGEST_MADE)
    if tokens is not None or not has_tokenizer(hf):
        if prompts:
            raise UsageError(
                "Prompts need a tokenizer, and the folder has none.",
                where=hf,
                expected=" or ".join(TOKENIZER_FILES),
                do="add the tokenizer's files, or use --tokens",
            )
        sequences = _random_sequences(hf, architecture, tokens, long)
    else:
        sequences = _text_sequences(hf, prompts, long)
        refuse_placeholders(sequences, hf)
    for sequence in sequences:
        check_ids(sequence, architecture, hf)
    return sequences


def check_ids(sequence: TokenSequence, architecture: Architecture, where: Path) -> None:
    """Nothing where all ids are in the vocabulary. Raises SourceError else."""
    vocab = _vocab(architecture)
    beyond = next((token for token in sequence.ids if not 0 <= token < vocab), None)
    if beyond is not None or not sequence.ids:
        raise SourceError(
            "A token is not in the model's vocabulary.",
            where=f"{where}, sequence {sequence.name}",
            expected=f"at least one id, all from 0 to {vocab - 1}",
            found="no ids" if beyond is None else beyond,
            do="use the tokenizer that belongs to this checkpoint",
        )


def _vocab(architecture: Architecture) -> int:
    text = architecture.text
    return min(text.vocab, text.ple_vocab) if text.ple else text.vocab


def _random_sequences(
    hf: Path, architecture: Architecture, tokens: int | None, long: int
) -> list[TokenSequence]:
    reserved = reserved_ids(_config(hf))
    allowed = np.array([id for id in range(_vocab(architecture)) if id not in reserved])
    if not len(allowed):
        raise SourceError(
            "config.json reserves every token id, so there is none for random tokens.",
            where=hf / "config.json",
        )
    if tokens is None:
        lengths = [SHORT_LENGTH] * SHORT_COUNT + [long]
    else:
        lengths = [tokens] if tokens > architecture.text.window else [tokens, long]
    generator = np.random.default_rng(SEED)
    return [
        TokenSequence(f"random-{number}", tuple(generator.choice(allowed, length).tolist()))
        for number, length in enumerate(lengths)
    ]


def reserved_ids(config: Mapping[str, Any]) -> frozenset[int]:
    """Ids that config.json gives a meaning: padding, begin, end, and places of images and sounds.

    transformers puts other embeddings where some of these stand, so random ids keep off them.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    found: set[int] = set()
    for section in sections:
        for key, value in section.items():
            if key.endswith(("_token_id", "_token_index")):
                found.update(_integers(value))
    return frozenset(found)


def refuse_placeholders(sequences: Iterable[TokenSequence], hf: Path) -> None:
    """Nothing where no sequence holds a place of an image, a video or a sound.

    config.json in `hf` says which ids those are. Raises UsageError else.
    """
    config = _config(hf)
    places = {
        id for key in _PLACEHOLDERS if config.get(key) is not None for id in _integers(config[key])
    }
    for sequence in sequences:
        found = places.intersection(sequence.ids)
        if found:
            raise UsageError(
                "A prompt contains the placeholder token of an image, a video or a sound.",
                where=sequence.name,
                found=min(found),
                do="leave it out: prompts are text only",
            )


def _integers(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return (one for one in values if isinstance(one, int) and not isinstance(one, bool))


def _config(hf: Path) -> Mapping[str, Any]:
    return read_object(hf / "config.json", "config.json", MAX_CONFIG_BYTES)


def _text_sequences(hf: Path, prompts: Sequence[str], long: int) -> list[TokenSequence]:
    tokenizer = load_tokenizer(hf)
    named = {f"prompt-{number}": text for number, text in enumerate(prompts)} or PROMPTS
    sequences = [tokenized(tokenizer, name, text) for name, text in named.items()]
    return [*sequences, _long_sequence(tokenizer, long)]


def has_tokenizer(hf: Path) -> bool:
    """Whether the folder `hf` holds a tokenizer's file."""
    return any((hf / name).is_file() for name in TOKENIZER_FILES)


@once
def load_tokenizer(hf: Path) -> Any:
    """transformers' tokenizer of the folder `hf`. Raises SourceError where it cannot be loaded."""
    from transformers import AutoTokenizer

    folder = handed(hf)
    with told_by_library("transformers cannot load the tokenizer.", hf, _REPAIR):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenized(tokenizer: Any, name: str, text: str) -> TokenSequence:
    """The ids of `text` behind one begin token, where the tokenizer has one."""
    with told_by_library(_CANNOT_READ, tokenizer.name_or_path, _REPAIR):
        return _begun(tokenizer, name, _ids(tokenizer, text))


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _long_sequence(tokenizer: Any, length: int) -> TokenSequence:
    """`length` tokens or more made of the built-in prompts, over and over."""
    with told_by_library(_CANNOT_READ, tokenizer.name_or_path, _REPAIR):
        sentences = [_ids(tokenizer, text + "\n") for text in PROMPTS.values()]
        if not any(sentences):
            raise SourceError(
                "The tokenizer returns no tokens for a text.", where=tokenizer.name_or_path
            )
        endless = itertools.chain.from_iterable(itertools.cycle(sentences))
        return _begun(tokenizer, "longer-than-window", list(itertools.islice(endless, length)))


def _begun(tokenizer: Any, name: str, ids: list[int]) -> TokenSequence:
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    return TokenSequence(name, tuple(ids), tuple(tokenizer.decode([id]) for id in ids))
