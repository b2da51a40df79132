"""How figures that span many decades are shown: bins, a logarithmic range, and levels of a limit.

NaN is the worst of all and is never lost in a bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

FLOOR = 1e-18
"""What lies below is shown as if it lay here; the rounding of float64 alone is larger."""

_WITHIN = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
_BEYOND = (1e1, 1e2, 1e3, 1e4, math.inf)
"""Upper ends of the levels, as multiples of the limit."""

NOT_A_NUMBER = len(_WITHIN) + len(_BEYOND)
"""The level of NaN, one above those of numbers."""


@dataclass(frozen=True)
class LogRange:
    """Decades from 10**low to 10**high, low < high."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Where a number lies between the ends, 0 to 1."""
        if value <= FLOOR:
            return 0.0
        share = (min(math.log10(value), self.high) - self.low) / (self.high - self.low)
        return max(0.0, share)


def log_range(values: Iterable[float], limit: float | None) -> LogRange:
    """The decades that hold all positive numbers of `values`, and the limit if they come near."""
    logs = [math.log10(max(one, FLOOR)) for one in values if math.isfinite(one) and one > 0]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (0, 0)
    if limit is not None and limit > FLOOR:
        at = math.log10(limit)
        if not logs:
            low, high = math.floor(at) - 1, math.ceil(at)
        elif at < high + 12:
            low, high = min(low, math.floor(at)), max(high, math.ceil(at))
    return LogRange(low, max(high, low + 1))


def level(kl: float, limit: float) -> int:
    """How far from the limit: 0 to 4 within it, 5 to 9 beyond, `NOT_A_NUMBER` for NaN."""
    if math.isnan(kl):
        return NOT_A_NUMBER
    unit = limit or FLOOR
    if kl <= limit:
        return next(number for number, end in enumerate(_WITHIN) if kl <= end * unit)
    beyond = next(number for number, end in enumerate(_BEYOND) if kl <= end * unit)
    return len(_WITHIN) + beyond


def level_ends(limit: float) -> list[float]:
    """The upper end of each level of numbers, in nats."""
    return [end * (limit or FLOOR) for end in (*_WITHIN, *_BEYOND)]


def largest_of_bins(values: Sequence[float | None], bins: int) -> list[float | None]:
    """The largest value of each of at most `bins` runs of equal length; NaN is the largest.

    None stands for what was not compared, and for a run of that alone.
    """
    count = min(bins, len(values))
    edges = [number * len(values) // count for number in range(count + 1)] if count else []
    return [
        _largest([one for one in values[start:end] if one is not None])
        for start, end in pairwise(edges)
    ]


def _largest(values: Sequence[float]) -> float | None:
    if any(math.isnan(one) for one in values):
        return math.nan
    return max(values, default=None)


def figure(value: float) -> str:
    """A figure as it is printed: three digits, or what it is where it is no number."""
    if math.isnan(value):
        return "NaN"
    return "0" if value == 0 else f"{value:.2e}"
