"""Instants and billing periods. An instant is microseconds since 1970 UTC; a period is half-open, ``[start, end)``."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from pipeline.core.money import Micros

#: The first instant: what counts "from the beginning" counts from here.
BEGINNING: Micros = 0

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Period:
    """From start_us, inclusive, to end_us, exclusive."""

    start_us: Micros
    end_us: Micros


def to_datetime(at_us: Micros) -> datetime:
    """The instant as an aware datetime in UTC. Raises OverflowError outside the years 1 to 9999."""
    return _EPOCH + timedelta(microseconds=at_us)


def to_micros(at: datetime) -> Micros:
    """The instant of an aware datetime, exact."""
    return (at - _EPOCH) // _MICROSECOND


def format_instant(at_us: Micros) -> str:
    """The instant in ISO 8601, UTC: ``2026-01-31T23:59:59.999999Z``, without a fraction of zero."""
    return to_datetime(at_us).replace(tzinfo=None).isoformat() + "Z"


def parse_instant(text: str) -> Micros:
    """The instant of an ISO 8601 time with zone. Raises ValueError without one."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"expected a time with zone such as 2026-01-31T00:00:00Z, got {text!r}")
    return to_micros(at)


def month_of(at_us: Micros, time_zone: str) -> Period:
    """The calendar month of an IANA time zone that holds the instant.

    A month starts at the first midnight of its first day; where the clocks skip that midnight, at the moment it would
    have been had they not been put forward yet. Months so defined tile time: each instant is in exactly one, also where
    local time runs twice through the last hour of a month.

    Raises zoneinfo.ZoneInfoNotFoundError for an unknown zone, OverflowError outside the years 1 to 9999.
    """
    zone = ZoneInfo(time_zone)
    local = to_datetime(at_us).astimezone(zone)
    month = local.year * 12 + local.month - 1
    start, end = _month_start(month, zone), _month_start(month + 1, zone)
    # The local date and the boundary disagree only while clocks go back over a midnight that opens a month.
    if at_us < start:
        start, end = _month_start(month - 1, zone), start
    elif at_us >= end:
        start, end = end, _month_start(month + 2, zone)
    return Period(start, end)


def local_midnight(year: int, month: int, day: int, zone: ZoneInfo) -> Micros:
    """The instant a day begins in the zone; ambiguous midnights are the first, skipped ones as in ``month_of``."""
    return to_micros(datetime(year, month, day, tzinfo=zone, fold=0).astimezone(UTC))


def days_later(at_us: Micros, days: int, time_zone: str) -> Micros:
    """The same time of day so many calendar days later, in an IANA time zone; skipped and ambiguous times as above.

    Raises zoneinfo.ZoneInfoNotFoundError for an unknown zone, OverflowError outside the years 1 to 9999.
    """
    local = to_datetime(at_us).astimezone(ZoneInfo(time_zone)) + timedelta(days=days)
    return to_micros(local.replace(fold=0).astimezone(UTC))


def _month_start(month: int, zone: ZoneInfo) -> Micros:
    """Start of a month counted from year 0."""
    if month >= 12 * 10_000:
        raise OverflowError("expected a time before the year 9999 ends")
    return local_midnight(month // 12, month % 12 + 1, 1, zone)
