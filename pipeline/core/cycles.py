"""Billing cycles: how long a contract's billing periods are and on which day they begin.

A period is what one invoice bills; it is found from the contract's cycle and the account's time zone alone, so every
part of the program (rater, sink, close) names it by the same two instants. The whole period stays the whole also where
a contract begins or ends in it: the contract has a part of it then.
"""

from calendar import monthrange
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.core.money import Micros
from pipeline.core.periods import Period, months_of

Every: TypeAlias = Literal["month", "quarter", "year"]

_MONTHS: dict[Every, int] = {"month": 1, "quarter": 3, "year": 12}


@dataclass(frozen=True, slots=True)
class Cycle:
    """Periods of a month, quarter or year that begin on one day of the month, in the account's time zone.

    A month too short for the day has the period begin on its last day, and later ones on the day again: the 31st is
    31 January, 28 February, 31 March. The default is calendar months.
    """

    every: Every = "month"
    #: Day of the month that periods begin on: 1 to 31.
    day: int = 1
    #: The first month of the year a period begins in: 1 for a month, 1 to 3 for a quarter, 1 to 12 for a year.
    month: int = 1

    @property
    def months(self) -> int:
        """Months per period."""
        return _MONTHS[self.every]


#: Calendar months.
MONTHLY = Cycle()


def check_cycle(cycle: Cycle) -> None:
    """Raise ValueError, saying what was expected and what came, for a cycle that has no periods."""
    if cycle.every not in _MONTHS:
        raise ValueError(f"expected a cycle of {', '.join(_MONTHS)}, got {cycle.every!r}")
    if not 1 <= cycle.day <= 31:
        raise ValueError(f"expected a day of the month from 1 to 31, got {cycle.day}")
    if not 1 <= cycle.month <= cycle.months:
        raise ValueError(f"expected a first month from 1 to {cycle.months} for {cycle.every}s, got {cycle.month}")


def anchored(every: Every, month: int, day: int) -> Cycle:
    """The cycle one of whose periods begins on a day of a month (1 to 12), or on the month's last if it is shorter."""
    return Cycle(every, day, (month - 1) % _MONTHS[every] + 1)


# fmt: off
_NAMES = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)
# fmt: on
_LEAP_YEAR = 2000


def in_words(cycle: Cycle) -> str:
    """``calendar months``, ``months from day 15``, ``quarters from 31 May``: how people call its periods."""
    if (cycle.day, cycle.month) == (1, 1):
        return f"calendar {cycle.every}s"
    if cycle.every == "month":
        return f"months from day {cycle.day}"
    begin = range(cycle.month, 13, cycle.months)
    month = next((month for month in begin if monthrange(_LEAP_YEAR, month)[1] >= cycle.day), cycle.month)
    return f"{cycle.every}s from {cycle.day} {_NAMES[month - 1]}"


def period_at(cycle: Cycle, at_us: Micros, time_zone: str) -> Period:
    """The cycle's period that holds an instant, in an IANA time zone. Each instant is in exactly one.

    Raises zoneinfo.ZoneInfoNotFoundError for an unknown zone, OverflowError outside the years 1 to 9999.
    """
    return months_of(at_us, time_zone, months=cycle.months, first_month=cycle.month, day=cycle.day)


def periods_ending(cycle: Cycle, within: Period, time_zone: str) -> tuple[Period, ...]:
    """The cycle's periods whose last instant lies within a span of time, in order.

    So a period belongs to the calendar month that its last instant lies in: from 15 September to 15 October it is
    October's, and a quarter is its last month's. Raises as ``period_at``.
    """
    found = []
    period = period_at(cycle, within.start_us, time_zone)
    while period.end_us <= within.end_us:
        found.append(period)
        period = period_at(cycle, period.end_us, time_zone)
    return tuple(found)
