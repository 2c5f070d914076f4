"""Spend commitments: true-up, overage, and windows that settle alone."""

from decimal import Decimal
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.commitments import (
    Commitment,
    Spend,
    Window,
    check_commitment,
    first_start,
    settle,
    settle_windows,
)
from pipeline.core.periods import format_instant, parse_instant

HOUR = 3_600_000_000
JANUARY, FEBRUARY, MARCH, APRIL = (parse_instant(f"2026-{month:02}-01T00:00:00Z") for month in (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("spent", "factor", "true_up", "parts"),
    [
        pytest.param(1300, "1", True, (1000, 300), id="beyond it, at the same price"),
        pytest.param(1400, "1.5", True, (1000, 600), id="beyond it, at one and a half times the price"),
        pytest.param(800, "1.5", True, (800, 200), id="short of it, trued up"),
        pytest.param(800, "1.5", False, (800,), id="short of it, without true-up"),
        pytest.param(1000, "1.5", True, (1000,), id="exactly it"),
        pytest.param(0, "1", True, (1000,), id="nothing spent"),
        pytest.param(-50, "1", True, (-50, 1000), id="less than nothing: a credit stays one"),
    ],
)
def test_settles_a_window(spent: int, factor: str, true_up: bool, parts: tuple[int, ...]) -> None:
    settlement = settle(1000, spent, true_up=true_up, overage_factor=Decimal(factor))
    assert settlement.parts == parts
    assert settlement.total == sum(parts)
    assert settlement.adjustment == sum(parts) - spent


def test_a_window_that_goes_on_is_not_trued_up_yet() -> None:
    assert settle(1000, 800, ended=False).total == 800
    assert settle(1000, 1200, overage_factor=Decimal(2), ended=False).total == 1400


def test_each_hour_settles_alone() -> None:
    commitment = Commitment("c", 20, 0, window="hour", overage_factor=Decimal("1.5"))
    spends = [Spend(0, "api", 30), Spend(HOUR, "api", 12), Spend(2 * HOUR - 1, "api", 0), Spend(2 * HOUR, "api", 20)]
    windows = settle_windows(commitment, spends, "UTC", 0, 4 * HOUR)
    assert [window.settlement.total for window in windows] == [35, 20, 20, 20]  # the last without any usage


def test_charges_that_do_not_count_do_not() -> None:
    commitment = Commitment("c", 100, 0, window="hour", charges=frozenset({"api"}))
    (window,) = settle_windows(commitment, [Spend(0, "api", 30), Spend(0, "storage", 500)], "UTC", 0, HOUR)
    assert (window.settlement.spent, window.settlement.true_up) == (30, 70)


def test_a_window_covered_in_part_owes_that_part() -> None:
    middle = parse_instant("2026-02-15T00:00:00Z")
    commitment = Commitment("c", 28_000, middle)
    first, second = settle_windows(commitment, [Spend(middle - 1, "api", 9)], "UTC", JANUARY, APRIL)
    assert (first.start_us, first.committed, first.settlement.true_up) == (middle, 14_000, 14_000)  # not the 9 before
    assert (second.committed, second.end_us) == (28_000, APRIL)
    whole, _ = settle_windows(Commitment("c", 28_000, middle, prorate=False), [], "UTC", JANUARY, APRIL)
    assert whole.committed == 28_000


def test_a_year_is_settled_at_each_close_and_trued_up_at_the_last() -> None:
    """What each month books is the difference to the months before; together they are the year's total."""
    end = parse_instant("2027-01-01T00:00:00Z")
    commitment = Commitment("c", 1000, JANUARY, end, window="year", overage_factor=Decimal(2))
    months = [JANUARY, FEBRUARY, MARCH, APRIL, end]
    spends = [Spend(JANUARY, "api", 600), Spend(FEBRUARY, "api", 300), Spend(MARCH, "api", 50)]
    booked, before = [], 0
    for close in months[1:]:
        (window,) = settle_windows(commitment, spends, "UTC", JANUARY, close)
        booked.append(window.settlement.total - before)
        before = window.settlement.total
    assert booked == [600, 300, 50, 50]
    assert window.ended


def test_days_are_those_of_the_billing_time_zone() -> None:
    start = parse_instant("2026-03-28T23:00:00Z")  # midnight in Berlin, on the day with 23 hours
    end = parse_instant("2026-03-29T22:00:00Z")
    commitment = Commitment("c", 24, start - 24 * HOUR, window="day")
    (window,) = settle_windows(
        commitment, [Spend(end - 1, "api", 24), Spend(end, "api", 1)], "Europe/Berlin", start, end
    )
    assert (format_instant(window.start_us), format_instant(window.end_us)) == (
        "2026-03-28T23:00:00Z",
        "2026-03-29T22:00:00Z",
    )
    assert window.settlement.spent == 24


def test_spending_counts_from_the_start_of_the_window() -> None:
    commitment = Commitment("c", 1, FEBRUARY, window="year")
    assert first_start(commitment, "UTC", APRIL) == FEBRUARY
    assert first_start(commitment, "UTC", parse_instant("2027-03-01T00:00:00Z")) == parse_instant("2027-02-01T00:00Z")


@pytest.mark.parametrize(
    ("commitment", "says"),
    [
        (Commitment("c", 0, 0), "expected a commitment above 0"),
        (Commitment("c", 1, 5, 5), "expected a commitment to end after it starts"),
        (Commitment("c", 1, 0, window="term"), "expected an end of a commitment over its whole term"),
        (Commitment("c", 1, 0, overage_factor=Decimal(-1)), "expected an overage factor of 0 or more, got -1"),
    ],
)
def test_a_commitment_that_cannot_be_settled_says_why(commitment: Commitment, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_commitment(commitment)


spending = st.lists(st.builds(Spend, st.integers(0, 100 * HOUR), st.just("api"), st.integers(-100, 3000)), max_size=12)
factors = st.decimals(0, 5, places=3)


@given(spending, st.integers(1, 5000), factors, st.sampled_from(["hour", "day", "month", "term"]), st.randoms())
def test_windows_partition_the_spending_in_any_order(
    spends: list[Spend], amount: int, factor: Decimal, window: Window, random: Random
) -> None:
    end = 101 * HOUR
    commitment = Commitment("c", amount, 0, end, window, overage_factor=factor, prorate=False)
    windows = settle_windows(commitment, spends, "UTC", 0, end)
    assert sum(one.settlement.spent for one in windows) == sum(spend.amount for spend in spends)
    assert [one.end_us for one in windows[:-1]] == [one.start_us for one in windows[1:]]
    assert all(one.settlement.total >= one.committed or one.settlement.spent < 0 for one in windows)
    shuffled = list(spends)
    random.shuffle(shuffled)
    assert settle_windows(commitment, shuffled, "UTC", 0, end) == windows


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 5000), st.decimals(1, 5, places=3))
def test_more_spending_never_costs_less(one: int, more: int, amount: int, factor: Decimal) -> None:
    before, after = (settle(amount, spent, overage_factor=factor).total for spent in (one, one + more))
    assert after >= before >= amount
