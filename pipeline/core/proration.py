"""A part of a billing period and its part of what is granted or owed per period.

What a part is counted in is the plan's choice (``Plan.prorate_by``):

========  ===========================================================================================================
second    the time that passes, exactly: half of a 30-day month is 15 days, wherever clocks are changed in it
day       calendar days of the billing time zone. A day belongs to what begins on it, however late; the day a contract
          ends on without another that takes over is its own. Both the first and the last day count, then
period    nothing smaller than the period: included units are whole in every segment; a fee is due once, whole, in the
          first segment of the period that a contract has on the plan, and never given back
========  ===========================================================================================================

Parts are cut from one ruler: what is due up to a mark is rounded, and a part has the difference between its end and its
start. So the parts of a period add up to the whole, however often it was cut.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from fractions import Fraction
from typing import NamedTuple
from zoneinfo import ZoneInfo

from pipeline.core.charges import Charge
from pipeline.core.money import Amount, Micros, round_half_up_div
from pipeline.core.periods import Period, months_later, to_datetime
from pipeline.core.plans import Pool, Prorate, ProrateBy


class Portion(NamedTuple):
    """``[start, end)`` of a whole of so many equal units, ``0 <= start <= end <= whole``: microseconds, days, one."""

    start: int
    end: int
    whole: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.start == self.whole

    def of(self, value: int) -> int:
        """Its part of a scaled integer, within 1 of the exact part; portions that tile the whole add up to it."""
        until, since = (round_half_up_div(value * mark, self.whole) for mark in (self.end, self.start))
        return until - since


#: All of it.
WHOLE = Portion(0, 1, 1)


def portion_of(
    by: ProrateBy, period: Period, start_us: Micros, end_us: Micros, time_zone: str, *, enters: bool, leaves: bool
) -> Portion:
    """What ``[start_us, end_us)`` is of the period that holds it, in an IANA time zone.

    ``enters``: the plan begins to count with it, or with the period. ``leaves``: its contract ends with it, and no
    other takes over.

    Raises zoneinfo.ZoneInfoNotFoundError for an unknown zone.
    """
    match by:
        case "second":
            return _elapsed(period, start_us, end_us)
        case "period":
            return WHOLE if enters else Portion(1, 1, 1)
        case "day":
            zone = ZoneInfo(time_zone)
            first, last = _day(period.start_us, zone), _day(period.end_us, zone)
            start, end = _day(start_us, zone), _day(end_us - 1, zone) + 1 if leaves else _day(end_us, zone)
            # Where clocks go back over the midnight that opens a period, its first moments are on the day before.
            start, end = max(start, first), max(min(end, last), first)
            return Portion(start - first, end - first, last - first)


def share_of(value: int, period: Period, start_us: Micros, end_us: Micros) -> int:
    """What ``[start_us, end_us)`` of a period has of a scaled integer per period, by the time that passes."""
    return _elapsed(period, start_us, end_us).of(value)


def prorated(
    charges: Iterable[Charge], pools: Iterable[Pool], prorate: Prorate, portion: Portion
) -> tuple[tuple[Charge, ...], tuple[Pool, ...]]:
    """A plan's charges and pools for a portion of the period. The whole period has them as they are.

    Prorated are included units and, with ``pool_and_tiers``, the bounds of tiers; never prices, fees, minimums or
    maximums, nor anything of a charge ``per_level``, which pays each level for its share of the period already. No
    tier is lost: each holds at least 1e-9, in a segment however short.
    """
    if prorate == "none" or portion.is_whole:
        return tuple(charges), tuple(pools)

    def of(charge: Charge) -> Charge:
        if charge.per_level:
            return charge
        if charge.included:
            charge = replace(charge, included=portion.of(charge.included))
        if prorate == "pool_and_tiers" and charge.tiers:
            tiers, lower = [], 0
            for tier in charge.tiers:
                if tier.up_to is not None:
                    lower = max(lower + 1, portion.of(tier.up_to))
                    tier = replace(tier, up_to=lower)
                tiers.append(tier)
            charge = replace(charge, tiers=tuple(tiers))
        return charge

    return tuple(map(of, charges)), tuple(replace(pool, included=portion.of(pool.included)) for pool in pools)


class Change(NamedTuple):
    """What a change within a period costs where the period was paid in advance, exact (1e-12)."""

    #: What was paid and is not used, 0 or less.
    credit: Amount
    #: What the rest of the period costs from the change on.
    charge: Amount

    @property
    def net(self) -> Amount:
        return self.credit + self.charge


def change(old: Amount, new: Amount, rest: Portion) -> Change:
    """A change of the price per period (1e-12): credit for the unused part of the old, charge for that of the new.

    ``rest`` is what is left of the period, up to its end. It is what a close finds as the difference between what the
    period's segments cost and what was booked for the period in advance.
    """
    return Change(-rest.of(old), rest.of(new))


def remaining(units: int, whole: int) -> Portion:
    """The last so many of a whole's units: days that remain, that of the change included. Raises ValueError outside."""
    if not 0 <= units <= whole or whole == 0:
        raise ValueError(f"expected from 0 to all of 1 or more units, got {units} of {whole}")
    return Portion(whole - units, whole, whole)


def periods_between(start: date, end: date, months: int) -> Fraction:
    """How many periods of so many months lie between two days: their days over those of the period from ``start`` on.

    The way trailing days are counted where a last period is cut short; above 1 where it is more than one period.
    """
    return Fraction((end - start).days, (months_later(start, months) - start).days)


def _elapsed(period: Period, start_us: Micros, end_us: Micros) -> Portion:
    return Portion(start_us - period.start_us, end_us - period.start_us, period.end_us - period.start_us)


def _day(at_us: Micros, zone: ZoneInfo) -> int:
    """The local calendar day of an instant, counted from the year 1."""
    return to_datetime(at_us).astimezone(zone).toordinal()
