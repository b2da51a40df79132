"""How far two models' logits are apart, token by token, from slices of positions.

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
    if not blocks:
        nothing = np.zeros(0)
        return TokenDivergence(nothing, nothing.astype(bool), nothing, nothing)
    return TokenDivergence(
        kl=np.concatenate([block.kl for block in blocks]),
        top1=np.concatenate([block.top1 for block in blocks]),
        overlap=np.concatenate([block.overlap for block in blocks]),
        difference=np.concatenate([block.difference for block in blocks]),
    )


class Accumulator:
    """Collects slices of positions and sums them up as one Divergence."""

    def __init__(self) -> None:
        self._slices: list[TokenDivergence] = []
        self._places: list[tuple[str, int, int, str | None]] = []

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
        self._slices.append(compare(reference[rows], native[rows]))
        for row in rows:
            piece = None if pieces is None else pieces[row]
            self._places.append((sequence, start + row, int(ids[row]), piece))

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
