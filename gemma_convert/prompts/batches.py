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
            length = _padded_length(len(sequence.ids))
            groups.setdefault(length, []).append(index)
    together = [
        group[start : start + max(1, _BATCH_TOKENS // length)]
        for length, group in groups.items()
        for start in range(0, len(group), max(1, _BATCH_TOKENS // length))
    ]
    return together + alone


def filled(states: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """States [batch length embed] of sequences that run together, the length that of `padded`."""
    length = _padded_length(max(map(len, states)))
    together = np.zeros((len(states), length, states[0].shape[1]), states[0].dtype)
    for row, state in enumerate(states):
        together[row, : len(state)] = state
    return together


def _padded_length(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """Ids [batch length], filled up with each row's last id, which no earlier position can see."""
    length = _padded_length(max(map(len, rows)))
    whole = [[*row, *[row[-1]] * (length - len(row))] for row in rows]
    return np.array(whole, np.int32)
