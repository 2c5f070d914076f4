"""Billing months tile time in every zone."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.periods import format_instant, month_of, parse_instant, to_datetime, to_micros

MONTHS = {
    "UTC": ("2026-02-28T23:59:59.999999Z", "UTC", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"),
    "the first instant belongs to the new month": (
        "2026-03-01T00:00:00Z",
        "UTC",
        "2026-03-01T00:00:00Z",
        "2026-04-01T00:00:00Z",
    ),
    "behind UTC, last month there": (
        "2026-03-01T04:59:59Z",
        "America/New_York",
        "2026-02-01T05:00:00Z",
        "2026-03-01T05:00:00Z",
    ),
    "clocks go forward within the month": (
        "2026-03-15T12:00:00Z",
        "America/New_York",
        "2026-03-01T05:00:00Z",
        "2026-04-01T04:00:00Z",
    ),
    "across the year": ("2025-12-31T23:30:00Z", "Asia/Tokyo", "2025-12-31T15:00:00Z", "2026-01-31T15:00:00Z"),
    # Jordan put its clocks forward at midnight of 1 April 2016: that midnight does not exist.
    "a month that opens with a skipped midnight": (
        "2016-04-10T00:00:00Z",
        "Asia/Amman",
        "2016-03-31T22:00:00Z",
        "2016-04-30T21:00:00Z",
    ),
    # Newfoundland put its clocks back from 00:01 of 1 November 2009 to 23:01: November had begun, that hour came again.
    "the second run of a month's last hour": (
        "2009-11-01T03:00:00Z",
        "America/St_Johns",
        "2009-11-01T02:30:00Z",
        "2009-12-01T03:30:00Z",
    ),
    # Cuba puts its clocks back at 01:00 of 1 November 2026: that midnight comes twice.
    "a month opens with the first of two midnights": (
        "2026-11-01T04:30:00Z",
        "America/Havana",
        "2026-11-01T04:00:00Z",
        "2026-12-01T05:00:00Z",
    ),
}


@pytest.mark.parametrize(("at", "zone", "start", "end"), MONTHS.values(), ids=MONTHS)
def test_month(at: str, zone: str, start: str, end: str) -> None:
    period = month_of(parse_instant(at), zone)
    assert (format_instant(period.start_us), format_instant(period.end_us)) == (start, end)


zones = st.sampled_from(
    [
        "UTC",
        "America/Asuncion",
        "America/Havana",
        "America/New_York",
        "America/St_Johns",
        "Antarctica/Troll",
        "Asia/Amman",
        "Asia/Damascus",
        "Asia/Kathmandu",
        "Australia/Lord_Howe",
        "Pacific/Apia",
        "Pacific/Kwajalein",
    ]
)
instants = st.integers(0, to_micros(datetime(2100, 1, 1, tzinfo=UTC)))


@given(instants, zones)
def test_months_tile_time_without_gap_or_overlap(at_us: int, zone: str) -> None:
    period = month_of(at_us, zone)
    assert period.start_us <= at_us < period.end_us
    assert month_of(period.start_us, zone) == month_of(period.end_us - 1, zone) == period
    assert month_of(period.end_us, zone).start_us == period.end_us
    assert month_of(period.start_us - 1, zone).end_us == period.start_us


@pytest.mark.parametrize("zone", ["America/St_Johns", "America/Havana", "Asia/Amman", "Pacific/Apia"])
def test_months_tile_a_century_hour_by_hour_around_each_boundary(zone: str) -> None:
    period = month_of(0, zone)
    while period.end_us < to_micros(datetime(2070, 1, 1, tzinfo=UTC)):
        following = month_of(period.end_us, zone)
        assert following.start_us == period.end_us
        for minutes in range(-120, 0, 10):
            assert month_of(period.end_us + minutes * 60_000_000, zone) == period
        for minutes in range(0, 120, 10):
            assert month_of(period.end_us + minutes * 60_000_000, zone) == following
        period = following


@given(instants)
def test_an_instant_survives_being_written_and_read(at_us: int) -> None:
    assert parse_instant(format_instant(at_us)) == at_us
    assert to_micros(to_datetime(at_us)) == at_us


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a time with zone"):
        parse_instant("2026-01-01T00:00:00")


def test_a_time_past_the_calendar_is_an_overflow() -> None:
    with pytest.raises(OverflowError):
        month_of(to_micros(datetime(9999, 12, 31, 23, tzinfo=UTC)), "UTC")
