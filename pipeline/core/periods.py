"""Instants and billing periods. An instant is microseconds since 1970 UTC; a period is half-open, ``[start, end)``."""

from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from pipeline.core.money import Micros

#: The first instant: what counts "from the beginning" counts from here.
BEGINNING: Micros = 0
#: After every instant: the end of what has none.
NEVER: Micros = 2**63 - 1

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
    """The calendar month of an IANA time zone that holds the instant; ``months_of`` with one month from the 1st."""
    return months_of(at_us, time_zone, months=1)


def months_of(at_us: Micros, time_zone: str, *, months: int, first_month: int = 1, day: int = 1) -> Period:
    """The period of so many months in an IANA time zone that holds the instant.

    Periods begin on ``day`` (1 to 31) of ``first_month`` (1 to 12) and of every ``months``-th month from it, ``months``
    a divisor of 12. A month that is shorter has the period begin on its last day; the one after it begins on ``day``
    again.

    A period starts at the first midnight of its first day; where the clocks skip that midnight, at the moment it would
    have been had they not been put forward yet. Periods so defined tile time: each instant is in exactly one, also
    where local time runs twice through a period's last hour.

    Raises zoneinfo.ZoneInfoNotFoundError for an unknown zone, OverflowError outside the years 1 to 9999.
    """
    zone = ZoneInfo(time_zone)
    local = to_datetime(at_us).astimezone(zone)
    month = local.year * 12 + local.month - 1
    month -= (month - first_month + 1) % months
    start, end = _month_day(month, day, zone), _month_day(month + months, day, zone)
    # In the month a period begins in, the days before its first are the period's before. Besides, the local date and
    # the boundary disagree while clocks go back over a midnight that opens a period.
    if at_us < start:
        start, end = _month_day(month - months, day, zone), start
    elif at_us >= end:
        start, end = end, _month_day(month + 2 * months, day, zone)
    return Period(start, end)


#: Days asked for over and over: those that periods of all accounts of a time zone begin on.
_DAYS_KEPT = 4096


@lru_cache(maxsize=_DAYS_KEPT)
def local_midnight(year: int, month: int, day: int, zone: ZoneInfo) -> Micros:
    """The instant a day begins in the zone; ambiguous midnights are the first, skipped ones as in ``months_of``."""
    return to_micros(datetime(year, month, day, tzinfo=zone, fold=0).astimezone(UTC))


def days_later(at_us: Micros, days: int, time_zone: str) -> Micros:
    """The same time of day so many calendar days later, in an IANA time zone; skipped and ambiguous times as above.

    Raises zoneinfo.ZoneInfoNotFoundError for an unknown zone, OverflowError outside the years 1 to 9999.
    """
    local = to_datetime(at_us).astimezone(ZoneInfo(time_zone)) + timedelta(days=days)
    return to_micros(local.replace(fold=0).astimezone(UTC))


def months_later(day: date, months: int) -> date:
    """The same day of the month so many months later, or that month's last where it has not so many days.

    Raises OverflowError outside the years 1 to 9999.
    """
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    if not 1 <= year <= 9999:
        raise OverflowError(f"expected a day in the years 1 to 9999, got one in the year {year}")
    return date(year, month + 1, min(day.day, monthrange(year, month + 1)[1]))


def _month_day(month: int, day: int, zone: ZoneInfo) -> Micros:
    """Start of a day, or of the last one where there are not so many, in a month counted from year 0."""
    year, number = month // 12, month % 12 + 1
    if not 1 <= year <= 9999:
        raise OverflowError("expected a time from the year 1 to before the year 9999 ends")
    return local_midnight(year, number, min(day, monthrange(year, number)[1]) if day > _DAYS_MIN else day, zone)


#: No month has fewer days.
_DAYS_MIN = 28
