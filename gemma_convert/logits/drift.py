"""How far hidden states drift apart, layer by layer: a mistake is seen where it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    embedding, *layers, final_norm = _largest(reference, native)
    return Drift(embedding, tuple(layers), final_norm, tolerance)


def _largest(reference: Iterable[States], native: Iterable[States]) -> Iterator[float]:
    for expected, found in zip(reference, native, strict=True):
        drifts = [_relative(*pair) for pair in zip(expected, found, strict=True)]
        yield float(np.max(drifts))


def _relative(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """The largest drift of a token; states are [length embed]."""
    if expected.shape != found.shape:
        raise ValueError(f"states of shapes {expected.shape} and {found.shape}")
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wide = expected.astype(np.float64)
        difference = np.linalg.norm(found.astype(np.float64) - wide, axis=-1)
        length = np.linalg.norm(wide, axis=-1)
        drift = np.where(difference == 0, 0.0, difference / length)
    return float(drift.max())
