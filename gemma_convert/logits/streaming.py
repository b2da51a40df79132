"""Both sides in step: layer by layer, then slice by slice of the vocabulary.

What is in memory is a layer of each side, the hidden states, and one slice of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_convert.files.library_path import library_path
from gemma_convert.forward.native_model import Logits, Staged, VocabularySlices
from gemma_convert.logits.divergence import Accumulator
from gemma_convert.logits.drift import Drift, measure_drift
from gemma_convert.logits.golden import Golden
from gemma_convert.logits.sliced import SlicedComparison
from gemma_convert.prompts.text import TokenSequence

LOGIT_BYTES = 32 << 20
"""Most bytes of one slice of logits in float32; a slice has `_LEAST_ROWS` at the least."""

TABLE_BYTES = 128 << 20
"""Most bytes of the rows of an output table, in float32, that one slice is made of."""

_LEAST_ROWS = 256


@dataclass(frozen=True)
class GoldenSlices:
    """Golden logits, read from their file by slices of the vocabulary."""

    golden: Golden

    @property
    def device(self) -> str:
        """Where the logits come from, in the place of a device's name."""
        return self.golden.device

    def logits(self, vocab: Sequence[slice]) -> Iterator[Logits]:
        """Logits [positions width] of each slice, of all sequences' positions in order."""
        from safetensors import safe_open

        with safe_open(library_path(self.golden.path), framework="numpy") as file:
            stored = [
                file.get_slice(f"logits.{index}") for index in range(len(self.golden.sequences))
            ]
            for part in vocab:
                yield np.concatenate([one[:, part.start : part.stop] for one in stored])


def run_in_step(
    reference: Staged | GoldenSlices, native: Staged, tolerance: float | None
) -> Drift | None:
    """Runs the layers; the drift, or None where the reference is logits alone."""
    if not isinstance(reference, GoldenSlices):
        return measure_drift(reference.stages(), native.stages(), tolerance)
    for _ in native.stages():
        pass
    return None


def compare_slices(
    reference: VocabularySlices,
    native: VocabularySlices,
    sequences: Sequence[TokenSequence],
    *,
    vocab: int,
    embed: int,
) -> Accumulator:
    """All compared positions of all sequences in order, from slices of the vocabulary."""
    slices = compared_slices(sequences, vocab=vocab, embed=embed)
    return summed(zip(reference.logits(slices), native.logits(slices), strict=True), sequences)


def summed(
    slices: Iterable[tuple[Logits, Logits]], sequences: Sequence[TokenSequence]
) -> Accumulator:
    """All compared positions in order, from slices [positions width] of both sides' logits."""
    places = [np.flatnonzero(sequence.compared) for sequence in sequences]
    compared = SlicedComparison()
    for pair in slices:
        compared.add(*pair)
    total = Accumulator()
    total.add_compared(
        compared.result(),
        [
            (one.name, row, one.ids[row], None if one.pieces is None else one.pieces[row])
            for one, rows in zip(sequences, places, strict=True)
            for row in rows.tolist()
        ],
    )
    return total


def compared_slices(sequences: Sequence[TokenSequence], *, vocab: int, embed: int) -> list[slice]:
    """The vocabulary in the slices that `compare_slices` takes."""
    positions = sum(int(np.count_nonzero(sequence.compared)) for sequence in sequences)
    return vocabulary_slices(vocab, embed, positions)


def vocabulary_slices(vocab: int, embed: int, positions: int) -> list[slice]:
    """The vocabulary in slices that fit `LOGIT_BYTES` and `TABLE_BYTES`."""
    fitting = min(LOGIT_BYTES // (4 * max(1, positions)), TABLE_BYTES // (4 * embed))
    width = min(vocab, max(_LEAST_ROWS, fitting // _LEAST_ROWS * _LEAST_ROWS))
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]
