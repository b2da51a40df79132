"""What both models are run on: prompts or random tokens, images and sounds, or a golden file's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_convert.errors import SourceError, UsageError
from gemma_convert.forward.native_model import ComparedModel, check_towers
from gemma_convert.logits.golden import Golden, load_golden
from gemma_convert.logits.reference import reference_config
from gemma_convert.logits.sizes import check_sizes
from gemma_convert.model.architecture import Architecture
from gemma_convert.prompts.images import image_sequences
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.sounds import sound_sequences
from gemma_convert.prompts.text import TokenSequence, check_ids, token_sequences


@dataclass(frozen=True)
class Inputs:
    """What is asked for. UsageError where `golden`, which has its own tokens, is not alone."""

    prompts: Sequence[str]
    tokens: int | None
    images: Sequence[Path]
    audio: Sequence[Path]
    golden: Path | None

    def __post_init__(self) -> None:
        others = self.prompts or self.tokens is not None or self.images or self.audio
        if self.golden is not None and others:
            raise UsageError(
                "The tokens to compare come from the golden file.",
                do="leave out prompts, --tokens, --image and --audio",
            )

    def check_sizes(self, hf: Path, architecture: Architecture) -> None:
        """Raises SourceError where the tensors of `hf`, which will run, are not its config's."""
        if self.golden is None:
            check_sizes(hf, architecture)

    def sequences(
        self, hf: Path, architecture: Architecture, model: ComparedModel
    ) -> tuple[list[TokenSequence], Golden | None]:
        """The sequences, and the golden logits if these are the reference.

        Raises SourceError where the tokenizer or the golden file is not that of the model, and
        UsageError for inputs that one of the models has no tower for.
        """
        if self.golden is not None:
            stored = _matching_golden(self.golden, hf, architecture)
            return list(stored.sequences), stored
        reference_config(hf, architecture)  # before the tokenizer, which would be blamed for it
        sequences = token_sequences(hf, architecture, self.prompts, self.tokens)
        sequences += image_sequences(hf, architecture, self.images) if self.images else []
        sequences += sound_sequences(hf, architecture, self.audio) if self.audio else []
        check_towers(model, sequences)
        return sequences, None


def towers_not_run(model: ComparedModel, sequences: Sequence[TokenSequence]) -> tuple[str, ...]:
    """The towers of `model` that nothing in `sequences` goes through."""
    run = {one.medium.tower for one in sequences if isinstance(one, SoftSequence)}
    return tuple(sorted({*model.towers} - run))


def _matching_golden(path: Path, hf: Path, architecture: Architecture) -> Golden:
    golden = load_golden(path)
    golden.check_belongs(hf)
    if golden.vocab != architecture.text.vocab:
        raise SourceError(
            "The golden logits are for another vocabulary.",
            where=path,
            expected=architecture.text.vocab,
            found=golden.vocab,
        )
    for sequence in golden.sequences:
        check_ids(sequence, architecture, path)
    return golden
