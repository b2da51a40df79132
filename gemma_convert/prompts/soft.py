"""Prompts with soft tokens: places that an encoder of images or sounds fills, and text around them.

How such places stand among the tokens is from `transformers/models/gemma4/processing_gemma4.py`
(5.23), whose class itself cannot be made without torchvision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gemma_convert.errors import SourceError, UsageError, short
from gemma_convert.files.libraries import told_by_library
from gemma_convert.model.architecture import Architecture
from gemma_convert.model.transformers_folder import handed
from gemma_convert.prompts.text import (
    TOKENIZER_FILES,
    TokenSequence,
    check_ids,
    has_tokenizer,
    load_tokenizer,
    refuse_placeholders,
    tokenized,
)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Medium:
    """What prompts with images and prompts with sounds differ in: tokens, texts, and words.

    `begin`, `place` and `end` are the tokenizer's names of the tokens in front of the soft tokens,
    in their places and behind them; `before` and `question` are the text in front of and behind
    those.
    """

    one: str
    many: str

    tower: str
    option: str
    processor: str
    begin: str
    place: str
    end: str
    before: str
    question: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftSequence(TokenSequence, ABC):
    """Token ids of one prompt with one image or sound; equal to itself alone.

    `places` [length] is 1 where a soft token stands and 0 elsewhere.
    """

    medium: ClassVar[Medium]
    places: npt.NDArray[np.int64]

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def compared(self) -> npt.NDArray[np.bool_]:
        """Whether the logits behind each token count in a comparison, [length]: text alone."""
        compared: npt.NDArray[np.bool_] = self.places == 0
        return compared

    @property
    @abstractmethod
    def arguments(self) -> Mapping[str, npt.NDArray[Any]]:
        """What transformers' model is given beside the ids, without the axis of a batch."""


def no_tower(medium: Medium, hf: Path) -> UsageError:
    """The error of a model whose checkpoint has no tower for `medium`."""
    return UsageError(
        f"The model cannot take {medium.many}: its checkpoint has no {medium.tower} tower.",
        where=hf,
        do=f"leave out the {medium.many}",
    )


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def load_processor(hf: Path, medium: Medium, name: str) -> Any:
    """The class `name` of transformers, configured by the files in `hf`. Raises SourceError."""
    import transformers

    if not any((hf / file).is_file() for file in PROCESSOR_FILES):
        raise SourceError(
            f"{medium.many.capitalize()} need the configuration of {_an(medium.processor)}, and "
            "the folder has none.",
            where=hf,
            expected=" or ".join(PROCESSOR_FILES),
            do="add the processor's files",
        )
    folder = handed(hf)
    with told_by_library(
        f"transformers cannot load the {medium.processor}.", hf, "repair the processor's files"
    ):
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True)


class SoftPrompts:
    """The prompts that stand behind each image or sound, and the tokenizer of the checkpoint."""

    def __init__(
        self,
        hf: Path,
        architecture: Architecture,
        medium: Medium,
        place: int | None,
        prompts: Sequence[str],
    ) -> None:
        """`place` is the model's id of a soft token; a built-in question stands in for no prompts.

        Raises UsageError for a prompt that cannot be used, and SourceError where the tokenizer is
        missing or has no tokens for `medium`.
        """
        self._hf, self._architecture, self._medium, self._place = hf, architecture, medium, place
        self._tokenizer = self._checked_tokenizer()
        named = {f"prompt-{number}": text for number, text in enumerate(prompts)}
        refuse_placeholders(
            (tokenized(self._tokenizer, name, text) for name, text in named.items()), hf
        )
        self._behind = {f", {name}": text for name, text in named.items()} or {"": medium.question}

    def around(
        self, name: str, soft_tokens: int
    ) -> Iterator[tuple[TokenSequence, npt.NDArray[np.int64]]]:
        """Each prompt around `soft_tokens` places, and those places [length].

        Raises SourceError where the tokenizer does not read them as such, or an id is not in the
        vocabulary.
        """
        medium, tokenizer = self._medium, self._tokenizer
        begin, place, end = (
            getattr(tokenizer, word) for word in (medium.begin, medium.place, medium.end)
        )
        for suffix, behind in self._behind.items():
            text = f"{medium.before}{begin}{place * soft_tokens}{end}{behind}"
            sequence = tokenized(tokenizer, f"{name}{suffix}", text)
            places = (np.array(sequence.ids) == self._place).astype(np.int64)
            check_ids(sequence, self._architecture, self._hf)
            if places.sum() != soft_tokens:
                raise SourceError(
                    f"The tokenizer does not read the places of {_an(medium.one)} as such.",
                    where=self._hf,
                    expected=f"{soft_tokens} places",
                    found=places.sum(),
                    do="use the tokenizer that belongs to this checkpoint",
                )
            yield sequence, places

    def _checked_tokenizer(self) -> Any:
        hf, medium = self._hf, self._medium
        if not has_tokenizer(hf):
            raise SourceError(
                f"{medium.many.capitalize()} need a tokenizer, and the folder has none.",
                where=hf,
                expected=" or ".join(TOKENIZER_FILES),
                do="add the tokenizer's files",
            )
        tokenizer = load_tokenizer(hf)
        marks, key = (medium.begin, medium.place, medium.end), f"{medium.place}_id"
        with told_by_library("The tokenizer cannot name its tokens.", hf):
            words = {name: getattr(tokenizer, name, None) for name in marks}
            found = getattr(tokenizer, key, None)
        missing = [name for name, word in words.items() if not isinstance(word, str)]
        if missing:
            raise SourceError(
                f"The tokenizer has no tokens for {_an(medium.one)}.",
                where=hf,
                expected=", ".join(marks),
                found=f"no {', '.join(missing)}",
                do="add them to tokenizer_config.json",
            )
        if found != self._place:
            raise SourceError(
                f"The tokenizer's token for {_an(medium.one)} differs from the model's.",
                where=hf,
                expected=f"{key} {self._place}, as in config.json",
                found=short(found),
                do="use the tokenizer that belongs to this checkpoint",
            )
        return tokenizer
