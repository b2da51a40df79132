"""Each native layer by itself: what it makes of the reference's own states, beside its noise.

A network may amplify the rounding of its first layers a million times; an end-to-end difference
then says little. A layer that is given the reference's states has its own error alone, and how
large that may be is measured on the same states: the reference's layer in another precision. What
errors of that size amount to in the end is measured too, by a second run of the reference with
noise of their size behind every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.native_model import Dtype, Given, Logits, States, Streamed
from gemma_convert.logits.drift import relative
from gemma_convert.logits.sliced import SlicedComparison
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

FACTOR = 8.0
"""How many times its noise a part may be apart; mistakes are thousands of times apart."""

SMALLEST = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
"""The least noise that is counted: half a unit in the last place."""

MEASURED_TOKENS = 64
"""Noise is measured on the shortest sequences up to so many tokens, at least on one."""


@dataclass(frozen=True)
class Part:
    """One part of the model: its error and its noise, both relative to the length of a state.

    The error of float32 is that of a position as early as those that noise was measured on.
    """

    name: str
    error: float
    noise: float

    @property
    def times(self) -> float:
        """How many times its noise the error is; infinite where it is NaN."""
        return self.error / self.noise if self.error == self.error else np.inf

    @property
    def passed(self) -> bool:
        """Whether the error is within the noise times the factor; NaN never is."""
        return bool(self.error <= FACTOR * self.noise)


@dataclass(frozen=True)
class LocalCheck:
    """Every part by itself, in the order in which they run; rounding is that of `noise`."""

    parts: tuple[Part, ...]
    noise: Dtype

    @property
    def failed(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.passed)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def worst(self) -> Part:
        """The part that is furthest beyond its noise."""
        return max(self.parts, key=lambda part: part.times)


@dataclass
class Probe:
    """What the reference and the check tell one another, stage by stage.

    The reference runs the sequences `measured` in another precision as well, on its own states,
    and gives what comes of it in `other`: in float64, or in bfloat16 where the `noise` is its. It
    moves the states of its second run by `errors` [length] of each sequence.
    """

    measured: Sequence[int]
    noise: Dtype
    other: list[npt.NDArray[Any]] = field(default_factory=list)
    decided: list[npt.NDArray[np.bool_]] | None = None
    """Tokens [length] of each sequence whose experts no rounding changes; None: there are none."""
    errors: list[npt.NDArray[np.float64]] = field(default_factory=list)


def shortest(sequences: Sequence[TokenSequence]) -> list[int]:
    """The numbers of the shortest sequences, of `MEASURED_TOKENS` together or one alone."""
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number].ids))
    taken, tokens = order[:1], len(sequences[order[0]].ids)
    for number in order[1:]:
        tokens += len(sequences[number].ids)
        if tokens > MEASURED_TOKENS:
            break
        taken.append(number)
    return sorted(taken)


class Reference(Protocol):
    """The side that states come from."""

    def stages(self, probe: Probe | None = None) -> Iterator[States]:
        """The states of each sequence: embedded, behind each layer, and behind the final norm."""

    def logits_and_noise(
        self, vocab: Sequence[slice], picked: npt.NDArray[np.int64], noise: Dtype
    ) -> Iterator[tuple[Logits, Logits, Logits]]:
        """Logits of each slice of the vocabulary: exact, with noise, and in another precision."""


class LocalRun:
    """Both sides in step, every native layer on the reference's states beside its own."""

    def __init__(
        self,
        reference: Reference,
        native: Streamed,
        sequences: Sequence[TokenSequence],
        noise: Dtype,
    ) -> None:
        self._reference, self._native, self._sequences = reference, native, sequences
        self._probe = Probe(shortest(sequences), noise)
        self._given = Given()
        self._parts: list[Part] = []
        self._picked = _picked(sequences, self._probe.measured)
        self._floor = SlicedComparison()

    def stages(self) -> Iterator[tuple[States, States]]:
        """The states of both sides, stage by stage, until the end."""
        ours = self._native.stages(self._given)
        for expected in self._reference.stages(self._probe):
            found = next(ours)
            self._compare(expected, self._given.outputs or found)
            self._given.inputs = expected
            yield expected, found
        rows = [state[one.compared] for state, one in zip(expected, self._sequences, strict=True)]
        self._given.rows = np.concatenate(rows)[self._picked]
        next(ours, None)

    def logits(self, vocab: Sequence[slice]) -> Iterator[tuple[Logits, Logits]]:
        """The logits of both sides, slice by slice of the vocabulary."""
        error, rounding, length = (np.zeros(len(self._picked)) for _ in range(3))
        slices = self._reference.logits_and_noise(vocab, self._picked, self._probe.noise)
        for (expected, noisy, other), found in zip(slices, self._native.logits(vocab), strict=True):
            self._floor.add(expected, noisy)
            exact, ours = expected[self._picked], found[len(expected) :]
            error += _squares(ours, exact)
            rounding += _squares(other, exact)
            length += _squares(exact, 0.0)
            yield expected, found[: len(expected)]
        self._add(np.sqrt(error / length), np.sqrt(rounding / length))

    def result(self) -> LocalCheck:
        """What was found; `stages` and `logits` must have come to their ends.

        The noise of a layer, measured on few tokens, is taken to be that of most layers at least.
        """
        names = ["the embedding", *(f"layer {n}" for n in range(len(self._parts) - 3))]
        names += ["the final norm", "the head"]
        usual = float(np.median([part.noise for part in self._parts[1:-2]]))
        parts = []
        for part, name in zip(self._parts, names, strict=True):
            noise = max(part.noise, usual) if name.startswith("layer") else part.noise
            parts.append(replace(part, name=name, noise=noise))
        return LocalCheck(tuple(parts), self._probe.noise)

    @property
    def noise_floor(self) -> float:
        """The largest KL, in nats, of the reference with noise from the reference without."""
        return float(self._floor.result().kl.max())

    def _compare(self, expected: States, made: States) -> None:
        errors = [relative(*pair) for pair in zip(expected, made, strict=True)]
        if not self._parts:
            errors = list(map(_of_text, errors, self._sequences))
        probe = self._probe
        probe.errors = errors
        if probe.noise == "float32":
            errors = [one / self._growth(len(one)) for one in errors]
        measured = [expected[place] for place in probe.measured]
        rounding = [relative(*pair) for pair in zip(measured, probe.other, strict=True)]
        if probe.decided is not None:
            clear = probe.decided
            errors = [one[mask] for one, mask in zip(errors, clear, strict=True)]
            chosen = [clear[place] for place in probe.measured]
            rounding = [one[mask] for one, mask in zip(rounding, chosen, strict=True)]
        self._add(np.concatenate(errors), np.concatenate(rounding))

    def _growth(self, length: int) -> npt.NDArray[np.float64]:
        """How much more rounding there is at each position than where it was measured, [length].

        The angle of a rotary embedding is rounded in proportion to the position.
        """
        known = max(len(self._sequences[place].ids) for place in self._probe.measured)
        return np.maximum(1.0, np.arange(length) / known)

    def _add(self, error: npt.NDArray[np.float64], rounding: npt.NDArray[np.float64]) -> None:
        noise = max(SMALLEST[self._probe.noise], float(rounding.max()))
        self._parts.append(Part("", float(error.max()), noise))


def _of_text(errors: npt.NDArray[np.float64], sequence: TokenSequence) -> npt.NDArray[np.float64]:
    """The errors of embedded tokens [length]; what a tower made is none, and counts in KL alone."""
    if not isinstance(sequence, SoftSequence):
        return errors
    return np.where(np.asarray(sequence.places) != 0, 0.0, errors)


def _picked(sequences: Sequence[TokenSequence], measured: Sequence[int]) -> npt.NDArray[np.int64]:
    """Places, among all compared positions, of those of the sequences that noise is measured on."""
    owner = np.concatenate([np.full(int(s.compared.sum()), n) for n, s in enumerate(sequences)])
    return np.flatnonzero(np.isin(owner, measured))[:MEASURED_TOKENS]


def _squares(values: Logits, others: Logits | float) -> npt.NDArray[np.float64]:
    """The sum of squares of the differences of each row."""
    with np.errstate(invalid="ignore", over="ignore"):
        total: npt.NDArray[np.float64] = np.square(np.float64(values) - others).sum(axis=-1)
    return total
