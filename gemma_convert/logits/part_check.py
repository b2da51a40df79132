"""What is found of one part of the model by itself, and of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from gemma_convert.forward.native_model import Dtype
from gemma_convert.forward.parts import Part

FACTOR = 8.0
"""How many times its noise a part may be apart; mistakes are thousands of times apart."""

SMALLEST = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
"""The least noise that is counted: half a unit in the last place."""


@dataclass(frozen=True)
class PartCheck:
    """One part of the model: its error and its noise, relative to the length of what it makes.

    A token whose part is shorter than the usual one counts by the usual length. The error of
    attention in float32 is that of a position as early as those that noise was measured on.
    """

    part: Part
    layer: int | None
    error: float
    noise: float
    mistake: str | None = None
    """What is wrong with it, in words, where that is known."""
    tower: str | None = None
    """The tower that it is of, vision or audio; None of the language model."""
    by_feature: float = 0.0
    """How many times its own noise the feature is off that is most; 0 where that is not told."""

    @property
    def name(self) -> str:
        """The part as it is called in a report."""
        if self.layer is None:
            return f"the {self.part}" if self.tower is None else f"{self.tower}, the {self.part}"
        layer = f"layer {self.layer}, {self.part}"
        return layer if self.tower is None else f"{self.tower} {layer}"

    @property
    def times(self) -> float:
        """How many times its noise the error is, or that of a feature; infinite where it is NaN."""
        if self.error != self.error:
            return np.inf
        return max(self.error / self.noise, self.by_feature)

    @property
    def passed(self) -> bool:
        """Whether the error is within the noise times the factor; NaN never is."""
        return bool(self.error <= FACTOR * self.noise and self.by_feature <= FACTOR)


@dataclass(frozen=True)
class LocalCheck:
    """Every part by itself, in the order in which they run; rounding is that of `noise`."""

    parts: tuple[PartCheck, ...]
    noise: Dtype

    @property
    def failed(self) -> tuple[PartCheck, ...]:
        return tuple(part for part in self.parts if not part.passed)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def worst(self) -> PartCheck:
        """The part that is furthest beyond its noise."""
        return max(self.parts, key=lambda part: part.times)


def evened(parts: Iterable[PartCheck]) -> tuple[PartCheck, ...]:
    """The noise of a part, measured on few tokens, is taken to be that of most layers at least."""
    found, noises = list(parts), dict[tuple[str | None, Part], list[float]]()
    for one in found:
        noises.setdefault((one.tower, one.part), []).append(one.noise)
    usual = {part: float(np.median(each)) for part, each in noises.items()}
    found = [replace(one, noise=max(one.noise, usual[one.tower, one.part])) for one in found]
    return tuple(replace(one, mistake=None) if one.passed else one for one in found)
