"""Each native part of the towers by itself, as those of the decoder's layers in `local`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.encoder import Encoder, Made
from gemma_convert.forward.native_model import Dtype
from gemma_convert.forward.parts import Part
from gemma_convert.logits.by_feature import is_by_feature, seen_by_feature
from gemma_convert.logits.drift import relative
from gemma_convert.logits.explanation import Found
from gemma_convert.logits.local import may_be_diagnosed, usual_length
from gemma_convert.logits.part_check import FACTOR, SMALLEST, PartCheck, evened
from gemma_convert.logits.tower_reference import TowerStep, WatchedTower
from gemma_convert.prompts.soft import SoftSequence
from gemma_convert.prompts.text import TokenSequence

OTHER_EPSILON = (
    "the epsilon of its norms with biases is that of the text model's norms, and not the "
    "original's, so images with flat patches may come out otherwise"
)


class Reference(Protocol):
    """The side that states come from."""

    def tower(self, sequence: SoftSequence, noise: Dtype) -> WatchedTower:
        """The tower that sees or hears what is in a sequence, beside rounding of `noise`."""


@dataclass(frozen=True)
class TowerCheck:
    """Every part of the towers, and what noise of the size of their errors does to soft tokens.

    `soft_errors` is how far it moves them, relative to their lengths [tokens], by the number of the
    sequence that they are in; those of a part that failed, or that makes what is `known` to be
    made otherwise, are no noise, and none are told. `known` says it in words.
    """

    parts: tuple[PartCheck, ...]
    soft_errors: Mapping[int, npt.NDArray[np.float64]]
    known: tuple[str, ...] = ()


def check_each_part(
    reference: Reference,
    towers: Mapping[str, Callable[[SoftSequence], Encoder]],
    sequences: Sequence[TokenSequence],
    noise: Dtype,
) -> TowerCheck:
    """What the native `towers` make of the reference's states; of several sequences, the worst."""
    worst: dict[tuple[str, int | None, Part], PartCheck] = {}
    soft_errors: dict[int, npt.NDArray[np.float64]] = {}
    known: dict[str, None] = {}
    diagnosed: dict[str, set[int]] = {}
    for number, sequence in enumerate(sequences):
        if not isinstance(sequence, SoftSequence):
            continue
        tower = sequence.medium.tower
        watched, encoder = reference.tower(sequence, noise), towers[tower](sequence)
        stages = diagnosed.setdefault(tower, set())
        for stage, (expected, run) in enumerate(zip(watched.steps(), encoder, strict=True)):
            _, made = run(expected.state, expected.parts)
            for one, seen, otherwise in _compared(expected, made, tower, noise):
                if otherwise:
                    known[f"{one.name}: {OTHER_EPSILON}"] = None
                part = one
                if one.mistake is None and not one.passed and may_be_diagnosed(stage, stages):
                    part = replace(one, mistake=watched.mistake(seen))
                key = tower, part.layer, part.part
                worst[key] = max(worst.get(key, part), part, key=lambda one: one.times)
        soft_errors[number] = watched.soft_errors
    parts = evened(worst.values())
    passed = all(part.passed for part in parts) and not known
    return TowerCheck(parts, soft_errors if passed else {}, tuple(known))


def _compared(
    step: TowerStep, made: Made, tower: str, noise: Dtype
) -> Iterator[tuple[PartCheck, Found, bool]]:
    """The parts of a step, whose errors it is told, and what was found in the rows that are real.

    Padding counts as nothing. With each stands whether it makes what is known to be made otherwise,
    and its error is from that.
    """
    for part, values in step.parts.items():
        exact, other = values[step.real], step.other[part][step.real]
        found = _rows(made[part])[step.real]
        usual = usual_length([exact])
        error = relative(exact, found, usual)
        rounding = max(SMALLEST[noise], float(relative(exact, other, usual).max()))
        otherwise = False
        if part in step.known and not error.max() <= FACTOR * rounding:
            again = relative(step.known[part][step.real], found, usual)
            otherwise = bool(again.max() <= FACTOR * rounding)
            error = again if otherwise else error
        step.errors[part] = np.zeros(len(values))
        step.errors[part][step.real] = error
        one = PartCheck(part, step.layer, float(error.max()), rounding, tower=tower)
        if is_by_feature(part) and not otherwise:
            one = seen_by_feature(one, exact, found, other - exact, noise)
        every = np.ones(len(found), np.bool_)
        yield one, Found(part, found, one.error, FACTOR * rounding, every), otherwise


def _rows(value: Any) -> npt.NDArray[Any]:
    array = np.asarray(value)
    return array.reshape(len(array), -1)
