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

LEFT = 1 / 4
"""The part of the difference that a mistake leaves at most, even where rounding would be more."""

CERTAIN = 1e-4
"""The part that one leaves where no more are tried; in bfloat16 none leaves so little."""

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
        if self.error != self.error:
            return 0.0
        return max(min(self.tolerance, LEFT * self.error), min(STORED, UNEXPLAINED * self.error))


def closest(
    right: npt.NDArray[Any], tried: Iterable[tuple[str, npt.NDArray[Any]]], found: Found
) -> str | None:
    """Of the mistakes that give what was found, the one that gives the most like it.

    `right` is what the part should make, and each mistake comes with what it makes, [length
    features].
    """
    if not np.isfinite(right).all():
        return "the original itself computes values that are not finite"
    usual = float(np.median(np.linalg.norm(right, axis=-1)))
    best, least = None, found.explained
    for words, made in tried:
        errors = relative(made, found.made, usual)[found.compared]
        if (error := float(errors.max(initial=0.0))) <= least:
            best, least = words, np.nextafter(error, -1)
        if best is not None and least <= CERTAIN * found.error:
            break
    return best or of_values(right, found)


def of_values(right: npt.NDArray[Any], found: Found) -> str | None:
    """What is seen in the values that a part makes: some not finite, a factor, few that differ."""
    rows, ours = right[found.compared], np.float64(found.made[found.compared])
    if broken := int(np.count_nonzero(~np.isfinite(ours))):
        return f"{broken:,} of {ours.size:,} values are not finite"
    if not ours.any():
        return "all of its values are zero"
    length = np.linalg.norm(rows, axis=-1)
    length = np.maximum(length, np.median(length))
    factor = float((rows * ours).sum() / np.square(rows).sum())
    errors = np.linalg.norm(ours - factor * rows, axis=-1)
    if factor and (errors <= found.explained * abs(factor) * length).all():
        return f"it is {factor:.4g} times what it should be"
    apart = np.abs(ours - rows)
    for axis, words in ((0, "features"), (1, "tokens")):
        few = (apart > found.tolerance * length[:, None] / 2).any(axis=axis)
        count = int(np.count_nonzero(few))
        others = np.where(few if axis == 0 else few[:, None], 0.0, apart)
        small = np.linalg.norm(others, axis=-1) <= found.explained * length
        if 0 < count <= FEW * len(few) and small.all():
            return f"it differs in {count:,} of {len(few):,} {words}"
    return None
