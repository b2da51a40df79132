"""How far two models' logits are apart, token by token, from slices of positions or tokens.

Everything is accumulated in float64, and a NaN or an infinity in the logits survives to the result:
a comparison that met one can never be called a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Place: TypeAlias = tuple[str, int, int, str | None]
"""Where a token stands: its sequence, position, id and text."""

TOP = 10
_BLOCK_BYTES = 16 << 20


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
class TokenDivergence:
    """The same figures for each position of one slice, [positions] each."""

    kl: npt.NDArray[np.float64]
    top1: npt.NDArray[np.bool_]
    overlap: npt.NDArray[np.float64]
    difference: npt.NDArray[np.float64]


def compare(reference: Floats, native: Floats) -> TokenDivergence:
    """Divergence of `native` from `reference` logits, both [positions vocab], at each position.

    KL(reference ‖ native) = Σ p (log p − log q); rounding below zero is set to zero. Raises
    ValueError where the shapes differ or there is no vocabulary.
    """
    if reference.shape != native.shape or reference.ndim != 2 or not reference.shape[1]:
        raise ValueError(f"logits of shapes {reference.shape} and {native.shape}")
    rows = max(1, _BLOCK_BYTES // (8 * reference.shape[1]))
    blocks = [
        _compare_block(
            reference[start : start + rows].astype(np.float64),
            native[start : start + rows].astype(np.float64),
        )
        for start in range(0, len(reference), rows)
    ]
    return _joined(blocks)


class SlicedComparison:
    """The same divergence as `compare` has, from slices of the vocabulary, one after the other.

    With S = Σ exp r, T = Σ exp r · (r - n), A = log S and B = log Σ exp n over the vocabulary,
    KL = T / S - A + B; sums are kept relative to the largest logit so far.
    """

    def __init__(self) -> None:
        self._blocks: list[_RunningBlock] | None = None
        self._rows, self._start = 0, 0

    def add(self, reference: Floats, native: Floats) -> None:
        """Takes in the next slice: logits [positions width], the same positions each time.

        Raises ValueError where shapes differ.
        """
        if reference.shape != native.shape or reference.ndim != 2:
            raise ValueError(f"logits of shapes {reference.shape} and {native.shape}")
        positions, width = reference.shape
        if self._blocks is None:
            self._rows = max(1, _BLOCK_BYTES // (8 * max(1, width)))
            starts = range(0, positions, self._rows)
            self._blocks = [_RunningBlock(min(self._rows, positions - start)) for start in starts]
        if positions != sum(block.positions for block in self._blocks):
            raise ValueError(f"{positions} positions, and another number before")
        if not width:
            return
        for number, block in enumerate(self._blocks):
            rows = slice(number * self._rows, (number + 1) * self._rows)
            block.add(
                reference[rows].astype(np.float64), native[rows].astype(np.float64), self._start
            )
        self._start += width

    def result(self) -> TokenDivergence:
        """The figures of all positions. Raises ValueError where there was no vocabulary."""
        if self._blocks is None or not self._start:
            raise ValueError("no logits were compared")
        return _joined([block.result() for block in self._blocks])


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

    def result(self) -> Divergence:
        """The divergence over all slices. Raises ValueError where no token was compared."""
        if not self._places:
            raise ValueError("no tokens were compared")
        kl = np.concatenate([one.kl for one in self._slices])
        worst = int(np.argmax(kl))  # the first NaN, where there is one
        sequence, position, token, text = self._places[worst]
        return Divergence(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.percentile(kl, 99)),
            kl_max=float(kl.max()),
            worst=WorstToken(sequence, position, token, text, float(kl[worst])),
            top1_agreement=float(np.concatenate([one.top1 for one in self._slices]).mean()),
            topk_overlap=float(np.concatenate([one.overlap for one in self._slices]).mean()),
            max_logit_difference=float(
                np.concatenate([one.difference for one in self._slices]).max()
            ),
        )


def _joined(blocks: Sequence[TokenDivergence]) -> TokenDivergence:
    if not blocks:
        nothing = np.zeros(0)
        return TokenDivergence(nothing, nothing.astype(bool), nothing, nothing)
    return TokenDivergence(
        kl=np.concatenate([block.kl for block in blocks]),
        top1=np.concatenate([block.top1 for block in blocks]),
        overlap=np.concatenate([block.overlap for block in blocks]),
        difference=np.concatenate([block.difference for block in blocks]),
    )


class _RunningBlock:
    """Sums over the vocabulary so far, [positions] each."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._finite = np.ones(positions, np.bool_)
        self._difference = np.zeros(positions)
        self._weighted = np.zeros(positions)
        self._reference, self._native = _RunningSide(positions), _RunningSide(positions)

    def add(
        self, reference: npt.NDArray[np.float64], native: npt.NDArray[np.float64], start: int
    ) -> None:
        """The next slice of the vocabulary, whose first token is `start`."""
        self._finite &= np.isfinite(reference).all(axis=1) & np.isfinite(native).all(axis=1)
        with np.errstate(invalid="ignore", over="ignore"):
            apart = reference - native
            self._difference = np.maximum(self._difference, np.abs(apart).max(axis=1))
            shrunk, weights = self._reference.add(reference, start)
            self._weighted = self._weighted * shrunk + (weights * apart).sum(axis=1)
            self._native.add(native, start)

    def result(self) -> TokenDivergence:
        """The figures of these positions."""
        ours, theirs = self._reference, self._native
        with np.errstate(invalid="ignore", divide="ignore"):
            kl = self._weighted / ours.total - ours.log_total() + theirs.log_total()
        shared = (ours.top[:, :, None] == theirs.top[:, None, :]).any(axis=2).mean(axis=1)
        return TokenDivergence(
            kl=np.where(self._finite, np.maximum(kl, 0.0), np.nan),
            top1=self._finite & (ours.best == theirs.best),
            overlap=np.where(self._finite, shared, 0.0),
            difference=np.where(self._finite, self._difference, np.nan),
        )


class _RunningSide:
    """One side's softmax so far: largest logit, sum relative to it, and the likeliest tokens."""

    def __init__(self, positions: int) -> None:
        self._largest = np.full(positions, -np.inf)
        self.total = np.zeros(positions)
        self.best = np.zeros(positions, np.int64)
        self.top = np.zeros((positions, 0), np.int64)
        self._top_logits = np.zeros((positions, 0))

    def add(
        self, logits: npt.NDArray[np.float64], start: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What sums so far are multiplied with [positions], and exp of `logits`, its shape."""
        best = logits.argmax(axis=1)
        peak = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]
        self.best = np.where(peak > self._largest, best + start, self.best)
        largest = np.maximum(self._largest, peak)
        shrunk = np.exp(self._largest - largest)
        weights = np.exp(logits - largest[:, None])
        self.total = self.total * shrunk + weights.sum(axis=1)
        self._largest = largest
        self._keep_likeliest(logits, start)
        return shrunk, weights

    def log_total(self) -> npt.NDArray[np.float64]:
        """The logarithm of the sum of exp of all logits [positions]."""
        total: npt.NDArray[np.float64] = self._largest + np.log(self.total)
        return total

    def _keep_likeliest(self, logits: npt.NDArray[np.float64], start: int) -> None:
        tokens = np.broadcast_to(np.arange(start, start + logits.shape[1]), logits.shape)
        if logits.shape[1] > TOP:
            places = np.argpartition(-logits, TOP - 1, axis=1)[:, :TOP]
            logits, tokens = (np.take_along_axis(one, places, 1) for one in (logits, tokens))
        both = np.concatenate([self._top_logits, logits], axis=1)
        ids = np.concatenate([self.top, tokens], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :TOP]
        self._top_logits, self.top = (np.take_along_axis(one, order, 1) for one in (both, ids))


def _compare_block(
    reference: npt.NDArray[np.float64], native: npt.NDArray[np.float64]
) -> TokenDivergence:
    finite = np.isfinite(reference).all(axis=1) & np.isfinite(native).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = _log_softmax(reference), _log_softmax(native)
        kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        difference = np.abs(reference - native).max(axis=1)
    return TokenDivergence(
        kl=np.where(finite, np.maximum(kl, 0.0), np.nan),
        top1=finite & (reference.argmax(axis=1) == native.argmax(axis=1)),
        overlap=np.where(finite, _overlap(reference, native), 0.0),
        difference=np.where(finite, difference, np.nan),
    )


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted: npt.NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True)
    total: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted - total


def _overlap(
    reference: npt.NDArray[np.float64], native: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Share of the reference's likeliest tokens that are among the native's, [positions]."""
    top = min(TOP, reference.shape[1])
    ours = np.argpartition(-reference, top - 1, axis=1)[:, :top]
    theirs = np.argpartition(-native, top - 1, axis=1)[:, :top]
    shared = (ours[:, :, None] == theirs[:, None, :]).any(axis=2)
    share: npt.NDArray[np.float64] = shared.mean(axis=1)
    return share
