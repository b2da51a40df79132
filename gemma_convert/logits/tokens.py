"""What a report says of single tokens: the KL of each, and what was predicted behind the worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.logits.divergence import Likeliest, TokenDivergence, WorstToken
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

SHOWN_TOKENS = 5
SHOWN_CANDIDATES = 5

Decode = Callable[[Sequence[int]], Mapping[int, str]]
"""Ids to the text of each; of those that have none, nothing."""


@dataclass(frozen=True)
class CheckedSequence:
    """One sequence with the KL of each token's prediction in nats, None where none was compared.

    `pieces` is the text of each token, None without a tokenizer. `medium` is what stands where
    nothing was compared: an image or a sound.
    """

    name: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...] | None
    kl: tuple[float | None, ...]
    medium: str | None = None

    @property
    def compared(self) -> list[float]:
        """The KL of the tokens that were compared."""
        return [kl for kl in self.kl if kl is not None]

    @property
    def worst(self) -> int | None:
        """Position of the first NaN or else of the largest KL; None where none was compared."""
        places = [position for position, kl in enumerate(self.kl) if kl is not None]
        return places[worst_first(self.compared)[0]] if places else None

    @property
    def kl_max(self) -> float:
        """The KL of the worst token; NaN where nothing was compared."""
        kl = None if self.worst is None else self.kl[self.worst]
        return math.nan if kl is None else kl

    @property
    def kl_mean(self) -> float:
        """The mean over compared tokens; NaN where one is, or nothing was compared."""
        return math.fsum(self.compared) / len(self.compared) if self.compared else math.nan

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> CheckedSequence:
        """The sequence of which these are the fields, as JSON has them."""
        pieces = values["pieces"]
        lists = {name: tuple(values[name]) for name in ("ids", "kl")}
        return CheckedSequence(
            **{**values, **lists, "pieces": None if pieces is None else tuple(pieces)}
        )


@dataclass(frozen=True)
class Candidate:
    """A token that one side predicts; NaN is the probability where its logits are no numbers."""

    token: int
    text: str | None
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What both sides predict behind one token: the likeliest tokens of each, in order."""

    behind: WorstToken
    reference: tuple[Candidate, ...]
    native: tuple[Candidate, ...]

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> Prediction:
        """The prediction of which these are the fields, as JSON has them."""
        return Prediction(
            WorstToken(**values["behind"]),
            tuple(Candidate(**one) for one in values["reference"]),
            tuple(Candidate(**one) for one in values["native"]),
        )


def worst_first(kl: Sequence[float] | npt.NDArray[np.float64]) -> list[int]:
    """Places of these KL from the worst to the best: NaN, then the largest, the first of equals."""
    values = np.asarray(kl, np.float64)
    order: list[int] = np.lexsort(
        (-np.nan_to_num(values, posinf=np.inf), ~np.isnan(values))
    ).tolist()
    return order


def checked_sequences(
    sequences: Sequence[TokenSequence], found: TokenDivergence
) -> tuple[CheckedSequence, ...]:
    """Each sequence with its part of the KL in `found`, which has all compared places in order."""
    kl, checked = iter(found.kl.tolist()), []
    for one in sequences:
        values = tuple(next(kl) if compared else None for compared in one.compared.tolist())
        medium = one.medium.one if isinstance(one, SoftSequence) else None
        checked.append(CheckedSequence(one.name, tuple(one.ids), one.pieces, values, medium))
    return tuple(checked)


def worst_predictions(
    checked: Sequence[CheckedSequence], found: TokenDivergence, decode: Decode
) -> tuple[Prediction, ...]:
    """What was predicted behind the worst `SHOWN_TOKENS` tokens of all, the worst first.

    Of tokens behind the same text, whose predictions are the same, there is one.
    """
    places = [
        (sequence, position)
        for sequence in checked
        for position, kl in enumerate(sequence.kl)
        if kl is not None
    ]
    rows = _worst_rows(found.kl, places)
    sides = [_shown(side, rows) for side in (found.reference, found.native)]
    texts = decode(sorted({token for side in sides for row in side for token, _ in row}))
    named = [
        [tuple(Candidate(token, texts.get(token), p) for token, p in row) for row in side]
        for side in sides
    ]
    return tuple(
        Prediction(_token(places[row], float(found.kl[row])), ours, theirs)
        for row, ours, theirs in zip(rows, *named, strict=True)
    )


def _worst_rows(
    kl: npt.NDArray[np.float64], places: Sequence[tuple[CheckedSequence, int]]
) -> list[int]:
    rows: dict[object, int] = {}
    for row in worst_first(kl):
        sequence, position = places[row]
        text = (
            sequence.ids[: position + 1] if sequence.medium is None else (sequence.name, position)
        )
        rows.setdefault(text, row)
        if len(rows) == SHOWN_TOKENS:
            break
    return list(rows.values())


def _shown(side: Likeliest, rows: Sequence[int]) -> list[list[tuple[int, float]]]:
    kept = (side.ids[rows, :SHOWN_CANDIDATES], side.probabilities[rows, :SHOWN_CANDIDATES])
    return [
        list(zip(*row, strict=True)) for row in zip(*(one.tolist() for one in kept), strict=True)
    ]


def _token(place: tuple[CheckedSequence, int], kl: float) -> WorstToken:
    sequence, position = place
    text = None if sequence.pieces is None else sequence.pieces[position]
    return WorstToken(sequence.name, position, sequence.ids[position], text, kl)
