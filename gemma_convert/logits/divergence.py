"""How far two models' logits are apart, token by token.

Everything is accumulated in float64, and a NaN or an infinity in the logits survives to the result:
a comparison that met one can never be called a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Place: TypeAlias = tuple[str, int, int, str | None]
"""Where a token stands: its sequence, position, id and text."""

TOP = 10
BLOCK_BYTES = 16 << 20
"""Most bytes of a block of logits in float64."""


@dataclass(frozen=True)
class WorstToken:
    """The token whose next-token prediction differs most; `text` is None without a tokenizer."""

    sequence: str
    position: int
    token: int
    text: str | None
    kl: float


@dataclass(frozen=True)
class Divergence:
    """Divergence of a whole run. KL in nats; NaN where any logit was NaN or infinite."""

    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    worst: WorstToken
    top1_agreement: float
    topk_overlap: float
    max_logit_difference: float

    def within(self, limit: float) -> bool:
        """Whether the worst token is within `limit`; never where its KL is NaN."""
        return bool(self.kl_max <= limit)


@dataclass(frozen=True)
class Likeliest:
    """The likeliest next tokens of each position, in order, and their probabilities.

    Both [positions k], k the smaller of `TOP` and the vocabulary; probabilities are NaN where a
    logit was NaN or +infinity.
    """

    ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenDivergence:
    """The same figures for each position of one slice, [positions] each, and the likeliest.

    `behind` [positions k] is how far, in the reference's logits, each of the native's likeliest
    tokens is behind the reference's likeliest, and `short` how far behind the last of its `TOP`
    likeliest; NaN where a logit is not finite.
    """

    kl: npt.NDArray[np.float64]
    difference: npt.NDArray[np.float64]
    behind: npt.NDArray[np.float64]
    short: npt.NDArray[np.float64]
    reference: Likeliest
    native: Likeliest
    tied: npt.NDArray[np.float64] | float = 0.0
    """How near logits are that count as equal, [positions]."""

    @property
    def top1(self) -> npt.NDArray[np.bool_]:
        """Whether both sides' likeliest token is one, or tied with it in the reference."""
        found: npt.NDArray[np.bool_] = self.behind[:, 0] <= self.tied
        return found

    @property
    def overlap(self) -> npt.NDArray[np.float64]:
        """Share of the native's likeliest that are among the reference's, or tied with one."""
        enough: npt.NDArray[np.bool_] = np.less_equal(self.short.T, self.tied)
        share: npt.NDArray[np.float64] = enough.mean(axis=0)
        return share


def behind_and_short(
    reference_of_native: npt.NDArray[np.float64],
    reference_top: npt.NDArray[np.float64],
    finite: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """`TokenDivergence.behind` and `short`, from the reference's logits, [positions k] each.

    Those of the native's likeliest tokens, and its own largest ones in order.
    """
    with np.errstate(invalid="ignore"):
        behind = reference_top[:, :1] - reference_of_native
        short = reference_top[:, -1:] - reference_of_native
    broken = ~finite[:, None]
    return np.where(broken, np.nan, behind), np.where(broken, np.nan, short)


def compare(reference: Floats, native: Floats) -> TokenDivergence:
    """Divergence of `native` from `reference` logits, both [positions vocab], at each position.

    KL(reference ‖ native) = Σ p (log p − log q); rounding below zero is set to zero. Raises
    ValueError where the shapes differ or there is no vocabulary.
    """
    if reference.shape != native.shape or reference.ndim != 2 or not reference.shape[1]:
        raise ValueError(f"logits of shapes {reference.shape} and {native.shape}")
    rows = max(1, BLOCK_BYTES // (8 * reference.shape[1]))
    blocks = [
        _compare_block(
            reference[start : start + rows].astype(np.float64),
            native[start : start + rows].astype(np.float64),
        )
        for start in range(0, len(reference), rows)
    ]
    return joined(blocks)


class Accumulator:
    """Collects slices of positions and sums them up as one Divergence."""

    def __init__(self) -> None:
        self._slices: list[TokenDivergence] = []
        self._places: list[Place] = []

    def add(
        self,
        reference: Floats,
        native: Floats,
        *,
        sequence: str,
        start: int,
        ids: Sequence[int],
        pieces: Sequence[str] | None = None,
        compared: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Takes in one slice: logits [positions vocab] at `start` and later, and their tokens.

        Rows that are not `compared` [positions] are left out.
        """
        if len(ids) != len(reference):
            raise ValueError(f"{len(ids)} tokens for {len(reference)} rows of logits")
        places = np.arange(len(ids)) if compared is None else np.flatnonzero(compared)
        rows: list[int] = places.tolist()
        self.add_compared(
            compare(reference[rows], native[rows]),
            [
                (sequence, start + row, int(ids[row]), None if pieces is None else pieces[row])
                for row in rows
            ],
        )

    def add_compared(self, tokens: TokenDivergence, places: Sequence[Place]) -> None:
        """Takes in positions whose figures are known, and where each of them stands."""
        if len(tokens.kl) != len(places):
            raise ValueError(f"figures of {len(tokens.kl)} tokens for {len(places)} places")
        self._slices.append(tokens)
        self._places.extend(places)

    def count_tied(self, tied: npt.NDArray[np.float64]) -> None:
        """Counts logits of the reference that are so near [positions] as equal from now on."""
        self._slices = [replace(joined(self._slices), tied=tied)]

    def tokens(self) -> TokenDivergence:
        """The figures of every position so far, in the order in which they came."""
        return joined(self._slices)

    def result(self) -> Divergence:
        """The divergence over all slices. Raises ValueError where no token was compared."""
        if not self._places:
            raise ValueError("no tokens were compared")
        found = self.tokens()
        kl = found.kl
        worst = int(np.argmax(kl))  # the first NaN, where there is one
        sequence, position, token, text = self._places[worst]
        return Divergence(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.percentile(kl, 99)),
            kl_max=float(kl.max()),
            worst=WorstToken(sequence, position, token, text, float(kl[worst])),
            top1_agreement=float(found.top1.mean()),
            topk_overlap=float(found.overlap.mean()),
            max_logit_difference=float(found.difference.max()),
        )


def joined(blocks: Sequence[TokenDivergence]) -> TokenDivergence:
    """The figures of blocks of positions one behind the other."""
    blocks = [block for block in blocks if len(block.kl)]
    if not blocks:
        nothing = np.zeros(0)
        likeliest = Likeliest(np.zeros((0, 0), np.int64), np.zeros((0, 0)))
        none = np.zeros((0, 1))
        return TokenDivergence(nothing, nothing, none, none, likeliest, likeliest)
    return TokenDivergence(
        kl=np.concatenate([block.kl for block in blocks]),
        difference=np.concatenate([block.difference for block in blocks]),
        behind=np.concatenate([block.behind for block in blocks]),
        short=np.concatenate([block.short for block in blocks]),
        reference=_likeliest_of([block.reference for block in blocks]),
        native=_likeliest_of([block.native for block in blocks]),
        tied=np.concatenate([np.broadcast_to(block.tied, len(block.kl)) for block in blocks]),
    )


def _likeliest_of(blocks: Sequence[Likeliest]) -> Likeliest:
    return Likeliest(
        np.concatenate([block.ids for block in blocks]),
        np.concatenate([block.probabilities for block in blocks]),
    )


def largest(
    values: npt.NDArray[np.float64], ids: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The ids [positions k] of the largest `TOP` values of each row, in order, and those values.

    `values` [positions width] are those of `ids`, of the first `width` tokens without them. Of
    equal values in the result the lower id comes first, and NaN comes last.
    """
    if ids is None:
        ids = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    if values.shape[1] > TOP:
        places = np.argpartition(-values, TOP - 1, axis=1)[:, :TOP]
        values = np.take_along_axis(values, places, 1)
        ids = np.take_along_axis(ids, places, 1)
    order = np.lexsort((ids, -values), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


def _compare_block(
    reference: npt.NDArray[np.float64], native: npt.NDArray[np.float64]
) -> TokenDivergence:
    finite = np.asarray((np.isfinite(reference) & np.isfinite(native)).all(axis=1))
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = _log_softmax(reference), _log_softmax(native)
        kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        difference = np.abs(reference - native).max(axis=1)
    ours, theirs = _likeliest(reference, log_p), _likeliest(native, log_q)
    behind, short = behind_and_short(
        np.take_along_axis(reference, theirs.ids, 1),
        np.take_along_axis(reference, ours.ids, 1),
        finite,
    )
    return TokenDivergence(
        kl=np.where(finite, np.maximum(kl, 0.0), np.nan),
        difference=np.where(finite, difference, np.nan),
        behind=behind,
        short=short,
        reference=ours,
        native=theirs,
    )


def _likeliest(
    logits: npt.NDArray[np.float64], log_probabilities: npt.NDArray[np.float64]
) -> Likeliest:
    ids, _ = largest(logits)
    return Likeliest(ids, np.exp(np.take_along_axis(log_probabilities, ids, 1)))


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted: npt.NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True)
    total: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted - total
