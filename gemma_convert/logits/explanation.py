"""Which of the mistakes that were tried explains what was found, and what values say alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.parts import Part
from gemma_convert.logits.drift import relative

STORED = 2.0**-7
"""How far apart a mistake may be from what was found where its values were rounded as well, once
more, to bfloat16; it must then explain all but a part of the difference: `UNEXPLAINED`."""

UNEXPLAINED = 1 / 10

CERTAIN = 1 / 100
"""The part of the difference that a mistake leaves, within rounding, where no more are tried."""

FEW = 0.1
"""A share of features, or of tokens, that is told of by its number."""


@dataclass(frozen=True)
class Found:
    """What a native part makes of one sequence [length features], and how far it may be apart.

    `error` is how far it is, relative likewise.
    """

    part: Part
    made: npt.NDArray[Any]
    error: float
    tolerance: float
    compared: npt.NDArray[np.bool_]
    """Tokens [length] that count."""

    @property
    def explained(self) -> float:
        """How near what a mistake makes must come to it."""
        rounded = min(STORED, UNEXPLAINED * self.error) if self.error == self.error else 0.0
        return max(self.tolerance, rounded)


def closest(
    right: npt.NDArray[Any], tried: Iterable[tuple[str, npt.NDArray[Any]]], found: Found
) -> str | None:
    """Of the mistakes that give what was found, the one that gives the most like it.

    `right` is what the part should make, and each mistake comes with what it makes, [length
    features].
    """
    usual = float(np.median(np.linalg.norm(right, axis=-1)))
    best, least = None, found.explained
    for words, made in tried:
        errors = relative(made, found.made, usual)[found.compared]
        if (error := float(errors.max(initial=0.0))) <= least:
            best, least = words, np.nextafter(error, -1)
        if least <= min(found.tolerance, CERTAIN * found.error):
            break
    return best or of_values(right, found)


def of_values(right: npt.NDArray[Any], found: Found) -> str | None:
    """What is seen in the values that a part makes: some not finite, a factor, few that differ."""
    rows, ours = right[found.compared], np.float64(found.made[found.compared])
    if broken := int(np.count_nonzero(~np.isfinite(ours))):
        return f"{broken:,} of {ours.size:,} values are not finite"
    length = np.linalg.norm(rows, axis=-1)
    length = np.maximum(length, np.median(length))
    factor = float((rows * ours).sum() / np.square(rows).sum())
    errors = np.linalg.norm(ours - factor * rows, axis=-1)
    if factor and (errors <= found.explained * abs(factor) * length).all():
        return f"it is {factor:.4g} times what it should be"
    apart = np.abs(ours - rows) > found.tolerance * length[:, None] / 2
    features, tokens = (int(np.count_nonzero(apart.any(axis=axis))) for axis in (0, 1))
    if 0 < features <= FEW * rows.shape[1]:
        return f"it differs in {features:,} of {rows.shape[1]:,} features"
    if 0 < tokens <= FEW * len(rows):
        return f"it differs in {tokens:,} of {len(rows):,} tokens"
    return None
