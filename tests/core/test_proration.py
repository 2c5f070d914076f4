"""Parts of a period: they add up, and cost what others' documentation says they cost."""

from datetime import date
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.money import AMOUNT_DECIMALS, amount_decimal, round_to_minor
from pipeline.core.periods import Period, parse_instant
from pipeline.core.plans import ProrateBy
from pipeline.core.proration import WHOLE, Change, Portion, change, periods_between, portion_of, remaining

UNIT = 10**AMOUNT_DECIMALS
DAY_US = 86_400_000_000

amounts = st.integers(-(10**18), 10**18)


@given(amounts, st.integers(1, 10**6), st.lists(st.integers(0, 10**6), max_size=6))
def test_portions_that_tile_the_whole_add_up_to_it(amount: int, whole: int, cuts: list[int]) -> None:
    marks = sorted({0, *(cut % (whole + 1) for cut in cuts), whole})
    portions = [Portion(start, end, whole) for start, end in pairwise(marks)]
    parts = [portion.of(amount) for portion in portions]
    assert sum(parts) == amount
    for portion, part in zip(portions, parts, strict=True):
        assert abs(part - Fraction(amount * (portion.end - portion.start), whole)) <= 1


@given(st.sampled_from(["second", "day"]), st.lists(st.integers(0, 31 * DAY_US), min_size=1, max_size=6))
def test_segments_of_a_period_have_portions_that_tile_it(by: ProrateBy, cuts: list[int]) -> None:
    """In October 2026, in which Berlin's clocks go back."""
    october = Period(parse_instant("2026-09-30T22:00:00Z"), parse_instant("2026-10-31T23:00:00Z"))
    edges = sorted({october.start_us, *(october.start_us + cut for cut in cuts), october.end_us})
    portions = [
        portion_of(by, october, start, end, "Europe/Berlin", enters=False, leaves=False)
        for start, end in pairwise(edges)
    ]
    assert portions[0].start == 0
    assert portions[-1].end == portions[-1].whole == (31 if by == "day" else 31 * DAY_US + DAY_US // 24)
    assert all(one.end == other.start for one, other in pairwise(portions))


def test_a_period_that_opens_twice_begins_with_its_first_day() -> None:
    """Newfoundland, 2009: a minute into November its clocks went back to 23:01 of October's last day."""
    november = Period(parse_instant("2009-11-01T02:30:00Z"), parse_instant("2009-12-01T03:30:00Z"))
    again = parse_instant("2009-11-01T03:00:00Z")
    found = portion_of("day", november, again, november.end_us, "America/St_Johns", enters=False, leaves=False)
    assert found == Portion(0, 30, 30)


@given(amounts, amounts, st.integers(0, 31))
def test_a_change_is_what_the_period_s_segments_cost_less_what_was_paid(old: int, new: int, left: int) -> None:
    before, rest = Portion(0, 31 - left, 31), remaining(left, 31)
    found = change(old, new, rest)
    assert found.net == before.of(old) + rest.of(new) - old
    assert change(old, old, rest).net == 0, "nothing changed"
    assert change(old, new, WHOLE) == Change(-old, new)


def rounded(amount: int) -> str:
    return str(round_to_minor(amount_decimal(amount), "USD"))


CHANGES = {
    "halfway, from 10 to 20": ((10, 20), remaining(1, 2), ("-5.00", "10.00")),
    "15 of 30 days, from 100 to 200": ((100, 200), remaining(15, 30), ("-50.00", "100.00")),
    "265 of 365 days, from 600 to 1200": ((600, 1200), remaining(265, 365), ("-435.62", "871.23")),
    "from 40 seats of 20 to 25, 21 of 31 days": ((800, 500), remaining(21, 31), ("-541.94", "338.71")),
    "an upgrade on the 11th of May, that day its first": ((20, 40), remaining(21, 31), ("-13.55", "27.10")),
    "on the last instant of a period": ((20, 40), remaining(0, 31), ("0.00", "0.00")),
}


@pytest.mark.parametrize(("prices", "rest", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_change(prices: tuple[int, int], rest: Portion, expected: tuple[str, str]) -> None:
    found = change(prices[0] * UNIT, prices[1] * UNIT, rest)
    assert (rounded(found.credit), rounded(found.charge)) == expected


PARTS = {
    "a seat for 22 of 30 days": (10, 22, 30, "7.33"),
    "a first period of 24 of 31 days": (50, 24, 31, "38.71"),
    "32 of a quarter's 91 days": (910, 32, 91, "320.00"),
}


@pytest.mark.parametrize(("price", "units", "whole", "expected"), PARTS.values(), ids=PARTS)
def test_a_part(price: int, units: int, whole: int, expected: str) -> None:
    assert rounded(remaining(units, whole).of(price * UNIT)) == expected


@pytest.mark.parametrize(("units", "whole"), [(-1, 30), (31, 30), (0, 0)])
def test_more_than_all_remains_of_nothing(units: int, whole: int) -> None:
    with pytest.raises(ValueError, match="expected from 0 to all of 1 or more units"):
        remaining(units, whole)


@pytest.mark.parametrize(
    ("start", "end", "months", "expected"),
    [
        (date(2012, 3, 2), date(2012, 6, 2), 1, Fraction(92, 31)),
        (date(2012, 1, 31), date(2012, 2, 10), 1, Fraction(10, 29)),
        (date(2012, 5, 1), date(2012, 5, 1), 3, Fraction(0)),
        (date(2011, 3, 1), date(2012, 3, 1), 12, Fraction(1)),
    ],
)
def test_periods_between_two_days(start: date, end: date, months: int, expected: Fraction) -> None:
    assert periods_between(start, end, months) == expected
