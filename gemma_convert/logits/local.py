"""Each native part by itself: what it makes of the reference's own states, beside its noise.

A network may amplify the rounding of its first layers a million times; an end-to-end difference
then says little. A part that is given the reference's states has its own error alone, and how
large that may be is measured on the same states: the reference's part in another precision. What
errors of that size amount to in the end is measured too, by a second run of the reference with
noise of their size behind every part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.native_model import Dtype, Given, Logits, States, Streamed
from gemma_convert.forward.parts import Part
from gemma_convert.logits.by_feature import is_by_feature, seen_by_feature
from gemma_convert.logits.drift import relative
from gemma_convert.logits.explanation import Found
from gemma_convert.logits.part_check import FACTOR, SMALLEST, LocalCheck, PartCheck, evened
from gemma_convert.logits.sliced import SlicedComparison
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

DIAGNOSED = 2
"""In how many stages that fail it is tried what is wrong."""

MEASURED_TOKENS = 64
"""Noise is measured on so many tokens, or on one sequence that has an image or a sound."""


@dataclass
class Probe:
    """What the reference and the check tell one another, stage by stage.

    The reference gives what its `parts` made, [length features] of each sequence, and what they
    make in another precision, each on what the one before made: `other`, in float64, or in bfloat16
    where the `noise` is its. That is of the sequences `measured`, by number, and of so many of
    their first tokens. It disturbs its second run by the `errors` [length] of its parts.
    """

    measured: Mapping[int, int]
    noise: Dtype
    parts: list[dict[Part, npt.NDArray[Any]]] = field(default_factory=list)
    other: list[dict[Part, npt.NDArray[Any]]] = field(default_factory=list)
    decided: list[npt.NDArray[np.bool_]] | None = None
    """Tokens [length] of each sequence whose experts no rounding changes; None: there are none."""
    errors: list[dict[Part, npt.NDArray[np.float64]]] = field(default_factory=list)


def chosen_tokens(sequences: Sequence[TokenSequence]) -> dict[int, int]:
    """Number of a sequence → how many of its first tokens noise is measured on.

    They are those of the shortest ones, of `MEASURED_TOKENS` together. What has an image or a sound
    is taken whole, as its tokens may see those that follow.
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number].ids))
    found: dict[int, int] = {}
    for number in order:
        length = len(sequences[number].ids)
        left = MEASURED_TOKENS - sum(found.values())
        if not found and not isinstance(sequences[number], SoftSequence):
            found[number] = min(length, left)
        elif not found or length <= left:
            found[number] = length
    return dict(sorted(found.items()))


class Reference(Protocol):
    """The side that states come from."""

    def stages(self, probe: Probe | None = None) -> Iterator[States]:
        """The states of each sequence: embedded, behind each layer, and behind the final norm."""

    def mistake(self, layer: int | None, place: int, found: Found) -> str | None:
        """What is wrong with a part of the last stage, seen in the sequence of number `place`."""

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
        soft_errors: Mapping[int, npt.NDArray[np.float64]],
    ) -> None:
        """`soft_errors` are how far noise behind each part of a tower moves soft tokens [tokens].

        They go by the number of the sequence.
        """
        self._soft = {
            number: (one, soft_errors[number])
            for number, one in enumerate(sequences)
            if isinstance(one, SoftSequence) and number in soft_errors
        }
        self._reference, self._native, self._sequences = reference, native, sequences
        self._probe = Probe(chosen_tokens(sequences), noise)
        self._given = Given()
        self._parts: list[PartCheck] = []
        self._picked = _picked(sequences, self._probe.measured)
        self._floor = SlicedComparison()
        self._diagnosed: set[int] = set()

    def stages(self) -> Iterator[tuple[States, States]]:
        """The states of both sides, stage by stage, until the end."""
        ours = self._native.stages(self._given)
        for stage, expected in enumerate(self._reference.stages(self._probe)):
            self._given.parts = self._probe.parts
            found = next(ours)
            self._compare(stage - 1)
            self._given.inputs = expected
            yield expected, found
        rows = [state[one.compared] for state, one in zip(expected, self._sequences, strict=True)]
        self._given.rows = np.concatenate(rows)[self._picked]
        next(ours, None)

    def logits(self, vocab: Sequence[slice]) -> Iterator[tuple[Logits, Logits]]:
        """The logits of both sides, slice by slice of the vocabulary."""
        error, rounding, length = (np.zeros(len(self._picked)) for _ in range(3))
        first: Logits | None = None
        slices = self._reference.logits_and_noise(vocab, self._picked, self._probe.noise)
        for (expected, noisy, other), found in zip(slices, self._native.logits(vocab), strict=True):
            self._floor.add(expected, noisy)
            exact, ours = expected[self._picked], found[len(expected) :]
            first = ours if first is None else first
            error += _squares(ours, exact)
            rounding += _squares(other, exact)
            length += _squares(exact, 0.0)
            yield expected, found[: len(expected)]
        part = self._add("head", None, np.sqrt(error / length), np.sqrt(rounding / length))
        if not part.passed and first is not None:
            every = np.ones(len(first), np.bool_)
            seen = Found("head", first, part.error, FACTOR * part.noise, every)
            self._parts[-1] = replace(part, mistake=self._reference.mistake(None, 0, seen))

    def result(self) -> LocalCheck:
        """What was found; `stages` and `logits` must have come to their ends."""
        return LocalCheck(evened(self._parts), self._probe.noise)

    @property
    def noise_floor(self) -> float:
        """The largest KL, in nats, of the reference with noise from the reference without."""
        return float(self._floor.result().kl.max())

    @property
    def tied(self) -> npt.NDArray[np.float64]:
        """How near logits are that noise makes equal: twice what it moves any, [positions]."""
        return 2 * np.nan_to_num(self._floor.result().difference)

    def _compare(self, layer: int) -> None:
        """What the parts of a stage made on both sides; a layer, or what stands beside them."""
        probe, made = self._probe, self._given.made
        probe.errors = [{} for _ in made]
        for part in probe.parts[0]:
            pairs = [(one[part], ours[part]) for one, ours in zip(probe.parts, made, strict=True)]
            usual = usual_length([expected for expected, _ in pairs])
            errors = [relative(*pair, usual) for pair in pairs]
            if part == "embedding":
                self._hold_soft_tokens(errors)
                errors = list(map(_of_text, errors, self._sequences))
            for noted, one in zip(probe.errors, errors, strict=True):
                noted[part] = one
            if part == "attention" and probe.noise == "float32":
                errors = [one / self._growth(len(one)) for one in errors]
            rounding = [
                relative(probe.parts[place][part][:length], other[part], usual)
                for (place, length), other in zip(probe.measured.items(), probe.other, strict=True)
            ]
            if part == "embedding":
                measured = [self._sequences[place] for place in probe.measured]
                rounding = list(map(_of_text, rounding, measured))
                self._disturb_soft_tokens()
            if part == "router" and (clear := probe.decided) is not None:
                errors = [one[mask] for one, mask in zip(errors, clear, strict=True)]
                chosen = [clear[place][:length] for place, length in probe.measured.items()]
                rounding = [one[mask] for one, mask in zip(rounding, chosen, strict=True)]
            here = None if part in ("embedding", "per-layer inputs", "final norm") else layer
            found = self._add(part, here, np.concatenate(errors), np.concatenate(rounding))
            if is_by_feature(part):
                exact, ours, rounded = map(np.concatenate, self._values(part))
                found = seen_by_feature(found, exact, ours, rounded, probe.noise)
                self._parts[-1] = found
            unknown = found.mistake is None and not found.passed
            if unknown and may_be_diagnosed(layer, self._diagnosed):
                self._parts[-1] = replace(found, mistake=self._mistake(found, errors))

    def _values(self, part: Part) -> tuple[list[Any], list[Any], list[Any]]:
        """What a part makes on both sides [length features], and its rounding, by sequence."""
        probe = self._probe
        exact, found = [one[part] for one in probe.parts], [one[part] for one in self._given.made]
        rounding = [
            other[part] - exact[place][:length]
            for (place, length), other in zip(probe.measured.items(), probe.other, strict=True)
        ]
        return exact, found, rounding

    def _hold_soft_tokens(self, errors: Sequence[npt.NDArray[np.float64]]) -> None:
        """Holds what towers made, in its places in the embedding, to what noise makes of it."""
        for tower in sorted({one.medium.tower for one, _ in self._soft.values()}):
            own = {n: pair for n, pair in self._soft.items() if pair[0].medium.tower == tower}
            found = np.concatenate([errors[n][one.places != 0] for n, (one, _) in own.items()])
            noise = np.concatenate([moved for _, moved in own.values()])
            part = self._add("embedded soft tokens", None, found, noise)
            self._parts[-1] = replace(part, tower=tower)

    def _disturb_soft_tokens(self) -> None:
        """Gives the reference's second run what noise makes of soft tokens, and no more."""
        for number, (one, moved) in self._soft.items():
            errors = self._probe.errors[number]["embedding"].copy()
            errors[one.places != 0] = moved
            self._probe.errors[number]["embedding"] = errors

    def _mistake(self, one: PartCheck, errors: Sequence[npt.NDArray[np.float64]]) -> str | None:
        """What is wrong with a part, in words, tried on the sequence where that is seen best."""
        limit = FACTOR * one.noise
        failed = [place for place, error in enumerate(errors) if not (error <= limit).all()]
        lengths = {place: len(self._sequences[place].ids) for place in failed}
        pick = max if one.part == "attention" else min  # windows are seen in long ones alone
        place = pick(failed, key=lambda number: lengths[number])
        made = self._given.made[place][one.part]
        compared = np.ones(len(made), np.bool_)
        if one.part == "router" and self._probe.decided is not None:
            compared = self._probe.decided[place]
        if one.part == "attention":
            compared[-1] = len(made) == 1  # what follows it is another thing on either side
            limit *= self._growth(len(made)).max()
        found = Found(one.part, made, one.error, limit, compared)
        return self._reference.mistake(one.layer, place, found)

    def _growth(self, length: int) -> npt.NDArray[np.float64]:
        """How much more rounding there is at each position than where it was measured, [length].

        The angle of a rotary embedding is rounded in proportion to the position.
        """
        known = max(self._probe.measured.values())
        return np.maximum(1.0, np.arange(length) / known)

    def _add(
        self,
        part: Part,
        layer: int | None,
        error: npt.NDArray[np.float64],
        rounding: npt.NDArray[np.float64],
    ) -> PartCheck:
        noise = max(SMALLEST[self._probe.noise], float(rounding.max()))
        self._parts.append(PartCheck(part, layer, float(error.max()), noise))
        return self._parts[-1]


def may_be_diagnosed(stage: int, diagnosed: set[int]) -> bool:
    """Of the first stages that fail, so that a mistake of all layers takes no time in each."""
    if len(diagnosed) < DIAGNOSED:
        diagnosed.add(stage)
    return stage in diagnosed


def usual_length(values: Sequence[npt.NDArray[Any]]) -> float:
    """The median length of all tokens' vectors, of arrays [length features]."""
    return float(np.median(np.concatenate([np.linalg.norm(one, axis=-1) for one in values])))


def _of_text(errors: npt.NDArray[np.float64], sequence: TokenSequence) -> npt.NDArray[np.float64]:
    """The errors of embedded tokens [length]; what a tower made is none: its own parts are held."""
    if not isinstance(sequence, SoftSequence):
        return errors
    return np.where(np.asarray(sequence.places) != 0, 0.0, errors)


def _picked(
    sequences: Sequence[TokenSequence], measured: Mapping[int, int]
) -> npt.NDArray[np.int64]:
    """Places, among all compared positions, of those of the sequences that noise is measured on."""
    owner = np.concatenate([np.full(int(s.compared.sum()), n) for n, s in enumerate(sequences)])
    return np.flatnonzero(np.isin(owner, list(measured)))[:MEASURED_TOKENS]


def _squares(values: Logits, others: Logits | float) -> npt.NDArray[np.float64]:
    """The sum of squares of the differences of each row."""
    with np.errstate(invalid="ignore", over="ignore"):
        total: npt.NDArray[np.float64] = np.square(np.float64(values) - others).sum(axis=-1)
    return total
