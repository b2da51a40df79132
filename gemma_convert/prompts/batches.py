"""Which sequences run together, and how their states are told apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

_BUCKET = 64
_BATCH_TOKENS = 4096


def by_sequence(
    states: Sequence[Any], groups: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]
) -> list[Any]:
    """The states [length embed] of each sequence, from those of the groups that they ran in."""
    found = {
        index: state[row, : len(sequences[index].ids)]
        for state, group in zip(states, groups, strict=True)
        for row, index in enumerate(group)
    }
    return [found[index] for index in range(len(sequences))]


def batches(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Numbers of the sequences that run together: those of one padded length, a bounded number.

    One with an image or a sound runs by itself.
    """
    alone = [[n] for n, sequence in enumerate(sequences) if isinstance(sequence, SoftSequence)]
    groups: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, SoftSequence):
            length = -(-len(sequence.ids) // _BUCKET) * _BUCKET
            groups.setdefault(length, []).append(index)
    together = [
        group[start : start + max(1, _BATCH_TOKENS // length)]
        for length, group in groups.items()
        for start in range(0, len(group), max(1, _BATCH_TOKENS // length))
    ]
    return together + alone


def padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """Ids [batch length], filled up with each row's last id, which no earlier position can see."""
    length = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    filled = [[*row, *[row[-1]] * (length - len(row))] for row in rows]
    return np.array(filled, np.int32)
