"""The divergence of logits that come in slices of the vocabulary, from running sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gemma_convert.logits import divergence
from gemma_convert.logits.divergence import (
    Floats,
    Likeliest,
    TokenDivergence,
    behind_and_short,
    joined,
    largest,
)


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
            self._rows = max(1, divergence.BLOCK_BYTES // (8 * max(1, width)))
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
        return joined([block.result() for block in self._blocks])


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
            shrunk, weights = self._reference.add(reference, native, start)
            self._weighted = self._weighted * shrunk + (weights * apart).sum(axis=1)
            self._native.add(native, reference, start)

    def result(self) -> TokenDivergence:
        """The figures of these positions."""
        ours, theirs = self._reference, self._native
        with np.errstate(invalid="ignore", divide="ignore"):
            kl = self._weighted / ours.total - ours.log_total() + theirs.log_total()
        behind, short = behind_and_short(theirs.others_of_top, ours.top_logits, self._finite)
        return TokenDivergence(
            kl=np.where(self._finite, np.maximum(kl, 0.0), np.nan),
            difference=np.where(self._finite, self._difference, np.nan),
            behind=behind,
            short=short,
            reference=ours.likeliest(),
            native=theirs.likeliest(),
        )


class _RunningSide:
    """One side's softmax so far: largest logit, sum relative to it, and the likeliest tokens."""

    def __init__(self, positions: int) -> None:
        self._largest = np.full(positions, -np.inf)
        self.total = np.zeros(positions)
        self.top = np.zeros((positions, 0), np.int64)
        self.top_logits = np.zeros((positions, 0))
        self.others_of_top = np.zeros((positions, 0))
        """The other side's logits of the same tokens."""

    def add(
        self, logits: npt.NDArray[np.float64], others: npt.NDArray[np.float64], start: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What sums so far are multiplied with [positions], and exp of `logits`, its shape."""
        highest = np.maximum(self._largest, logits.max(axis=1))
        shrunk = np.exp(self._largest - highest)
        weights = np.exp(logits - highest[:, None])
        self.total = self.total * shrunk + weights.sum(axis=1)
        self._largest = highest
        self._keep_likeliest(logits, others, start)
        return shrunk, weights

    def log_total(self) -> npt.NDArray[np.float64]:
        """The logarithm of the sum of exp of all logits [positions]."""
        total: npt.NDArray[np.float64] = self._largest + np.log(self.total)
        return total

    def likeliest(self) -> Likeliest:
        """The likeliest tokens over the vocabulary so far."""
        with np.errstate(invalid="ignore", divide="ignore"):
            probabilities = np.exp(self.top_logits - self.log_total()[:, None])
        return Likeliest(self.top, probabilities)

    def _keep_likeliest(
        self, logits: npt.NDArray[np.float64], others: npt.NDArray[np.float64], start: int
    ) -> None:
        ids, values = largest(logits)
        others = np.concatenate([self.others_of_top, np.take_along_axis(others, ids, 1)], axis=1)
        ids = np.concatenate([self.top, ids + start], axis=1)
        values = np.concatenate([self.top_logits, values], axis=1)
        self.top, self.top_logits = largest(values, ids)
        places = (ids[:, None, :] == self.top[:, :, None]).argmax(axis=2)
        self.others_of_top = np.take_along_axis(others, places, 1)
