"""The choice of an ordinary run: every value, or pair of values, in few cases."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from cases import FAMILIES, LAYOUTS
from covering import covering

PRODUCT = [
    {"family": family, "layout": layout, "dtype": dtype, "scanned": scanned}
    for family, layout, dtype, scanned in product(
        FAMILIES, LAYOUTS, ("bfloat16", "float32"), (False, True)
    )
]


def occurring(cases, strength):
    return {one for case in cases for one in combinations(case.items(), strength)}


@pytest.mark.parametrize(("strength", "most"), [(1, 4), (2, 18), (4, 64)])
def test_every_combination_occurs_in_few_cases(strength, most):
    chosen = covering(PRODUCT, strength)
    assert occurring([PRODUCT[place] for place in chosen], strength) == occurring(PRODUCT, strength)
    assert len(chosen) <= most and chosen == sorted(set(chosen)) == covering(PRODUCT, strength)


def test_what_occurs_nowhere_is_not_asked_for():
    rows = [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 1, "b": 2}]
    assert covering(rows, 1) == [0, 1]
    assert covering(rows, 2) == [0, 1, 2]


def test_one_parameter_and_none():
    assert covering([{"a": 1}, {"a": 2}], 2) == [0, 1]
    assert covering([], 1) == []
