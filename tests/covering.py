"""Few cases in which every value, or every pair of values, of a test's parameters occurs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Case = Mapping[str, Hashable]


def covering(cases: Sequence[Case], strength: int) -> list[int]:
    """Places in `cases` of a few of them, in order and always the same ones.

    Every combination of `strength` parameters' values that occurs in `cases` occurs in what is
    chosen: 1 covers the values, 2 the pairs. Of cases that cover as much, the first is taken.
    """
    held = [_combinations(case, strength) for case in cases]
    missing = set().union(*held)
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda place: len(missing & held[place]))
        missing -= held[best]
        chosen.append(best)
    return sorted(chosen)


def _combinations(case: Case, strength: int) -> set[tuple[tuple[str, Hashable], ...]]:
    return {*combinations(sorted(case.items(), key=lambda item: item[0]), min(strength, len(case)))}
