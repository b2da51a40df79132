"""How far hidden states drift apart, layer by layer: a mistake is seen where it is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_convert.forward.native_model import States

TOLERANCE = 2e-3
"""Relative drift that float32 arithmetic does not reach (3e-4 was seen) and mistakes go beyond."""


@dataclass(frozen=True)
class Drift:
    """The largest drift of a token at each stage: |difference| over |reference|, by their lengths.

    `layers` has what leaves each layer, `embedding` what enters the first one, `final_norm` what
    the head is given. NaN where a state was NaN or infinite. `tolerance` decides what is named and
    nothing else; it is None where values are rounded, which can move later layers by any amount.
    """

    embedding: float
    layers: tuple[float, ...]
    final_norm: float
    tolerance: float | None

    @property
    def first(self) -> str | None:
        """The first stage beyond the tolerance; None where all are within, or none is set."""
        if self.tolerance is None:
            return None
        return next((name for name, at in self.stages.items() if not at <= self.tolerance), None)

    @property
    def stages(self) -> dict[str, float]:
        """Name of each stage → its drift, in the order in which they run."""
        return {
            "the embedding": self.embedding,
            **{f"layer {index}": value for index, value in enumerate(self.layers)},
            "the final norm": self.final_norm,
        }


def measure_drift(
    reference: Iterable[States], native: Iterable[States], tolerance: float | None
) -> Drift:
    """The drift of states that both sides compute in step, stage by stage.

    Raises ValueError where there are not as many of them, or shapes differ.
    """
    return drift_of(zip(reference, native, strict=True), tolerance)


def drift_of(stages: Iterable[tuple[States, States]], tolerance: float | None) -> Drift:
    """The drift of the states of both sides, stage by stage."""
    embedding, *layers, final_norm = (
        float(np.max([relative(*pair).max() for pair in zip(expected, found, strict=True)]))
        for expected, found in stages
    )
    return Drift(embedding, tuple(layers), final_norm, tolerance)


def relative(
    expected: npt.NDArray[Any], found: npt.NDArray[Any], least: float = 0.0
) -> npt.NDArray[np.float64]:
    """|difference| over |expected| of each token [length]; states are [length embed].

    What is shorter than `least` counts as that long. Raises ValueError where shapes differ.
    """
    if expected.shape != found.shape:
        raise ValueError(f"states of shapes {expected.shape} and {found.shape}")
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wide = expected.astype(np.float64)
        difference = np.linalg.norm(found.astype(np.float64) - wide, axis=-1)
        length = np.linalg.norm(wide, axis=-1)
        drift: npt.NDArray[np.float64] = np.where(
            difference == 0, 0.0, difference / np.maximum(length, least)
        )
    return drift
