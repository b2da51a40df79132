"""Errors by feature, where one that is much larger hides those of all others in a token's length.

Of parts whose rounding goes by features: norms and sums, which make each of its own one alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.native_model import Dtype
from gemma_convert.forward.parts import Part
from gemma_convert.logits.part_check import FACTOR, SMALLEST, PartCheck


def is_by_feature(part: Part) -> bool:
    """Whether a feature of what the part makes is rounded by itself."""
    return "norm" in part.split() or part.startswith("sum") or part == "output"


def times_by_feature(
    exact: npt.NDArray[Any],
    found: npt.NDArray[Any],
    rounding: npt.NDArray[Any],
    smallest: float,
) -> npt.NDArray[np.float64]:
    """How many times its noise each feature is off, over all tokens [features].

    `exact` and `found` are [tokens features], `rounding` what it was found to be [measured
    features]. A feature's noise is at least that of the usual one, and `smallest`, relative.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = _root_mean_square(np.float64(found) - exact)
        own = _root_mean_square(np.float64(rounding))
        noise = np.maximum(np.maximum(own, np.median(own)), smallest * _root_mean_square(exact))
    times = np.where(error > 0, np.inf, 0.0)
    return np.divide(error, noise, out=times, where=noise > 0)


def seen_by_feature(
    one: PartCheck,
    exact: npt.NDArray[Any],
    found: npt.NDArray[Any],
    rounding: npt.NDArray[Any],
    noise: Dtype,
) -> PartCheck:
    """The check of a part, looked at by feature too; what its largest feature hides is told."""
    times = times_by_feature(exact, found, rounding, SMALLEST[noise])
    off, seen = int(np.count_nonzero(times > FACTOR)), replace(one, by_feature=float(times.max()))
    if one.passed and not seen.passed:
        words = f"it differs in {off:,} of {len(times):,} features, which are small beside others"
        return replace(seen, mistake=words)
    return seen


def _root_mean_square(values: Any) -> npt.NDArray[np.float64]:
    mean: npt.NDArray[np.float64] = np.sqrt(np.square(np.float64(values)).mean(axis=0))
    return mean
