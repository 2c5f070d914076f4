"""Splits add up, and nobody gets more than the next whole number from what is theirs."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.apportion import apportion, round_to, round_together

WEIGHTS = st.lists(st.integers(-(10**6), 10**6), max_size=8)


@given(WEIGHTS, st.integers(1, 10**4))
def test_fractions_are_rounded_together(numerators: list[int], denominator: int) -> None:
    parts = round_together(numerators, denominator)
    exact = Fraction(sum(numerators), denominator)
    assert abs(sum(parts) - exact) <= Fraction(1, 2)
    assert all(
        abs(part - Fraction(numerator, denominator)) < 1 for part, numerator in zip(parts, numerators, strict=True)
    )


@given(st.integers(-(10**9), 10**9), WEIGHTS.filter(sum))
def test_a_whole_is_apportioned(whole: int, weights: list[int]) -> None:
    parts = apportion(whole, weights)
    assert sum(parts) == whole
    assert all(
        abs(part - Fraction(whole * weight, sum(weights))) < 1 for part, weight in zip(parts, weights, strict=True)
    )


@pytest.mark.parametrize(
    ("whole", "weights", "parts"),
    [
        (100, [1, 1, 1], [34, 33, 33]),
        (2, [1, 1, 1], [1, 1, 0]),
        (-2, [1, 1, 1], [0, -1, -1]),
        (10, [3, 2, 1], [5, 3, 2]),
        (10, [30, -20], [30, -20]),
        (-7, [-1, -1], [-3, -4]),
        (0, [], []),
        (0, [5, -5], [0, 0]),
    ],
    ids=[
        "the first of equals has more",
        "too little for all",
        "below 0",
        "the largest rest",
        "a weight below 0",
        "all weights below 0",
        "nothing to nobody",
        "nothing",
    ],
)
def test_parts(whole: int, weights: list[int], parts: list[int]) -> None:
    assert apportion(whole, weights) == parts


def test_a_whole_that_is_no_rounding_of_the_sum_is_refused() -> None:
    assert round_to(2, [3, 2], 3) == [1, 1]
    assert round_to(1, [3, 2], 3) == [1, 0]
    for whole in (0, 3):
        with pytest.raises(ValueError, match=rf"expected the sum of \[3, 2\] / 3, rounded, got {whole}"):
            round_to(whole, [3, 2], 3)
    with pytest.raises(ValueError, match=r"expected weights to split 1 by, got \[5, -5\]"):
        apportion(1, [5, -5])
