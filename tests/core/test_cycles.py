"""Billing periods tile time for every cycle, day and time zone, and begin on their day whenever there is one."""

from calendar import monthrange
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.core.cycles import MONTHLY, Cycle, anchored, check_cycle, in_words, period_at, periods_ending
from pipeline.core.periods import (
    Period,
    format_instant,
    local_midnight,
    month_of,
    months_later,
    parse_instant,
    to_datetime,
    to_micros,
)

ZONES = [
    "UTC",
    "America/Asuncion",  # clocks change at midnight
    "America/Havana",  # at midnight, too, and back at 01:00
    "America/St_Johns",  # at 00:01, until 2011
    "Asia/Amman",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",  # by half an hour
    "Europe/Berlin",
    "Pacific/Apia",  # without a 30 December 2011
    "Pacific/Kwajalein",  # without a 21 August 1993
]
cycles = st.one_of(
    st.builds(Cycle, st.just("month"), st.integers(1, 31)),
    st.builds(Cycle, st.just("quarter"), st.integers(1, 31), st.integers(1, 3)),
    st.builds(Cycle, st.just("year"), st.integers(1, 31), st.integers(1, 12)),
)
instants = st.integers(0, to_micros(datetime(2100, 1, 1, tzinfo=UTC)))
zones = st.sampled_from(ZONES)

PERIODS = {
    "a month from the 31st, in February": ("month", "2026-01-31", "UTC", "2026-02-10", "2026-01-31", "2026-02-28"),
    "and the one after it": ("month", "2026-01-31", "UTC", "2026-02-28", "2026-02-28", "2026-03-31"),
    "in a leap year": ("month", "2026-01-30", "UTC", "2028-02-29", "2028-02-29", "2028-03-30"),
    "a month from the 15th, across the year": ("month", "2026-07-15", "UTC", "2027-01-14", "2026-12-15", "2027-01-15"),
    "calendar quarters": ("quarter", "2026-01-01", "UTC", "2026-06-30", "2026-04-01", "2026-07-01"),
    "quarters from 31 May": ("quarter", "2026-05-31", "UTC", "2026-03-01", "2026-02-28", "2026-05-31"),
    "and where the last month has 30 days": ("quarter", "2026-05-31", "UTC", "2026-12-01", "2026-11-30", "2027-02-28"),
    "a fiscal year": ("year", "2026-04-01", "UTC", "2027-03-31", "2026-04-01", "2027-04-01"),
    "years from 29 February": ("year", "2024-02-29", "UTC", "2027-02-28", "2027-02-28", "2028-02-29"),
}


@pytest.mark.parametrize(("every", "anchor", "zone", "at", "start", "end"), PERIODS.values(), ids=PERIODS)
def test_period(every: str, anchor: str, zone: str, at: str, start: str, end: str) -> None:
    day = date.fromisoformat(anchor)
    cycle = anchored(every, day.month, day.day)  # type: ignore[arg-type]
    period = period_at(cycle, parse_instant(f"{at}T12:00:00Z"), zone)
    assert [format_instant(edge)[:10] for edge in (period.start_us, period.end_us)] == [start, end]


CLOCKS = {
    # Cuba put its clocks back at 01:00 of 1 November 2026, so that its midnight came twice: the first one counts.
    "a midnight that comes twice": (Cycle(), "America/Havana", "2026-11-01T04:30:00Z", "2026-11-01T04:00:00Z"),
    # Lebanon puts them forward at midnight of 29 March 2026: that midnight is skipped.
    "a midnight that is skipped": (Cycle("month", 29), "Asia/Beirut", "2026-04-01T00:00:00Z", "2026-03-28T22:00:00Z"),
    # Lord Howe Island, by half an hour: 5 April 2026 has 24.5 hours.
    "half an hour": (Cycle("month", 5), "Australia/Lord_Howe", "2026-04-05T15:00:00Z", "2026-04-04T13:00:00Z"),
    # Samoa left out 30 December 2011: the period begins with the 31st, the instant the 29th ended.
    "a day that is skipped": (Cycle("month", 30), "Pacific/Apia", "2012-01-05T00:00:00Z", "2011-12-30T10:00:00Z"),
}


@pytest.mark.parametrize(("cycle", "zone", "at", "start"), CLOCKS.values(), ids=CLOCKS)
def test_a_period_begins_with_its_day_whatever_the_clocks_do(cycle: Cycle, zone: str, at: str, start: str) -> None:
    assert format_instant(period_at(cycle, parse_instant(at), zone).start_us) == start


@given(cycles, instants, zones)
@example(Cycle("month", 30), parse_instant("2011-12-30T10:00:00Z"), "Pacific/Apia")
@example(Cycle("month", 1), parse_instant("2009-11-01T03:00:00Z"), "America/St_Johns")
def test_periods_tile_time_without_gap_or_overlap(cycle: Cycle, at_us: int, zone: str) -> None:
    period = period_at(cycle, at_us, zone)
    assert period.start_us <= at_us < period.end_us
    assert period_at(cycle, period.start_us, zone) == period_at(cycle, period.end_us - 1, zone) == period
    assert period_at(cycle, period.end_us, zone).start_us == period.end_us
    assert period_at(cycle, period.start_us - 1, zone).end_us == period.start_us


@given(cycles, instants, zones, st.integers(-48, 48), st.integers(0, 36))
def test_an_instant_near_a_boundary_is_in_one_period(
    cycle: Cycle, at_us: int, zone: str, half_hours: int, later: int
) -> None:
    period = period_at(cycle, at_us, zone)
    for _ in range(later):
        period = period_at(cycle, period.end_us, zone)
    near = period.end_us + half_hours * 1_800_000_000
    found = period_at(cycle, near, zone)
    assert found == period if half_hours < 0 else found.start_us == period.end_us


@given(cycles, instants, zones)
def test_a_period_begins_on_its_day_or_a_shorter_month_s_last(cycle: Cycle, at_us: int, zone: str) -> None:
    """However many short months came before: the day does not drift."""
    period = period_at(cycle, at_us, zone)
    for _ in range(26):
        period = period_at(cycle, period.end_us, zone)
        # Half a day on, clocks that change at midnight have changed.
        local = (to_datetime(period.start_us) + timedelta(hours=12)).astimezone(ZoneInfo(zone)).date()
        last = monthrange(local.year, local.month)[1]
        wanted = date(local.year, local.month, min(cycle.day, last))
        skipped = {("Pacific/Apia", date(2011, 12, 30)), ("Pacific/Kwajalein", date(1993, 8, 21))}
        assert local == wanted + timedelta(days=(zone, wanted) in skipped)
        assert (local.month - cycle.month) % cycle.months == 0


@given(instants, zones)
def test_calendar_months_are_what_they_were(at_us: int, zone: str) -> None:
    assert period_at(MONTHLY, at_us, zone) == month_of(at_us, zone)


@given(cycles, st.dates(date(1971, 1, 1), date(2098, 12, 31)), zones)
def test_every_period_belongs_to_one_month(cycle: Cycle, day: date, zone: str) -> None:
    """The months of a year and a bit have the periods that end in it, each once."""
    first = month_of(local_midnight(day.year, day.month, 1, ZoneInfo(zone)), zone)
    months = [first]
    for _ in range(14):
        months.append(month_of(months[-1].end_us, zone))
    found = [period for month in months for period in periods_ending(cycle, month, zone)]
    assert all(first.start_us < period.end_us <= months[-1].end_us for period in found)
    assert all(one.end_us == other.start_us for one, other in pairwise(found))
    assert found[0].start_us <= first.start_us
    assert period_at(cycle, found[-1].end_us, zone).end_us > months[-1].end_us
    counts = {period.end_us: month for month in months for period in periods_ending(cycle, month, zone)}
    assert all(month.start_us <= end_us - 1 < month.end_us for end_us, month in counts.items())


def test_a_month_has_the_periods_whose_last_instant_lies_in_it() -> None:
    october = month_of(parse_instant("2026-10-05T00:00:00Z"), "UTC")

    def ending(cycle: Cycle) -> list[str]:
        return [format_instant(period.start_us)[:10] for period in periods_ending(cycle, october, "UTC")]

    assert ending(Cycle()) == ["2026-10-01"]
    assert ending(Cycle("month", 2)) == ["2026-09-02"]
    assert ending(Cycle("quarter", month=2)) == ["2026-08-01"]
    assert ending(Cycle("quarter")) == []
    assert ending(Cycle("year", 1, 11)) == ["2025-11-01"]


@pytest.mark.parametrize(
    ("cycle", "expected"),
    [
        (Cycle("month", 0), "expected a day of the month from 1 to 31, got 0"),
        (Cycle("month", 32), "expected a day of the month from 1 to 31, got 32"),
        (Cycle("month", 1, 2), "expected a first month from 1 to 1 for months, got 2"),
        (Cycle("quarter", 1, 4), "expected a first month from 1 to 3 for quarters, got 4"),
        (Cycle("week"), "expected a cycle of month, quarter, year, got 'week'"),  # type: ignore[arg-type]
    ],
)
def test_a_cycle_without_periods_is_refused(cycle: Cycle, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_cycle(cycle)


@given(cycles)
def test_a_cycle_is_anchored_by_any_of_its_months(cycle: Cycle) -> None:
    check_cycle(cycle)
    assert {anchored(cycle.every, month, cycle.day) for month in range(cycle.month, 13, cycle.months)} == {cycle}


def test_cycles_in_words() -> None:
    assert in_words(Cycle()) == "calendar months"
    assert in_words(Cycle("month", 15)) == "months from day 15"
    assert in_words(Cycle("quarter", 31, 2)) == "quarters from 31 May"
    assert in_words(Cycle("year", 29, 2)) == "years from 29 February"
    assert in_words(Cycle("year")) == "calendar years"


def test_a_period_past_the_calendar_is_an_overflow() -> None:
    with pytest.raises(OverflowError):
        period_at(Cycle("year", 31, 12), to_micros(datetime(9999, 12, 31, tzinfo=UTC)), "UTC")


def test_months_later_keeps_the_day_where_there_is_one() -> None:
    assert months_later(date(2026, 1, 31), 1) == date(2026, 2, 28)
    assert months_later(date(2026, 1, 31), 2) == date(2026, 3, 31)
    assert months_later(date(2026, 1, 31), -2) == date(2025, 11, 30)
    with pytest.raises(OverflowError):
        months_later(date(9999, 12, 1), 1)


def test_a_period_is_a_period() -> None:
    assert period_at(Cycle("year"), 0, "UTC") == Period(0, parse_instant("1971-01-01T00:00:00Z"))
