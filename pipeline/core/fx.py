"""Foreign exchange: the last published rate on or before a day, applied to a finished document only. Pure.

Nothing is priced in a foreign currency: a document is reckoned in its contract's, and what it comes to is shown in
another one beside it; both amounts are kept with the rate, the day it was published for, and its source.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction

from pipeline.core.apportion import round_to
from pipeline.core.money import Minor, minor_units, round_half_up_div

#: Decimals of a rate that follows from published ones. At a thousand million, 0.001 of a unit.
RATE_DECIMALS = 12
#: Calendar days a rate holds on when none follows. The longest gap between the ECB's reference rates is five days
#: (Easter, Christmas); more than that means the table was not loaded.
RATE_MAX_AGE_DAYS = 7


class NoRate(ValueError):
    """No rate was published on or before the day, or only one that is too old to be meant for it."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many units of ``quote`` for one of ``base``, published for a day. Currencies of ISO 4217."""

    base: str
    quote: str
    rate: Decimal
    day: date
    source: str


@dataclass(frozen=True, slots=True)
class Converted:
    """A document's amounts in ``rate.quote``, in its smallest unit: net + tax = total, and taxes add up to tax."""

    rate: Rate
    net: Minor
    tax: Minor
    total: Minor
    #: As the taxes that were given.
    taxes: tuple[Minor, ...]


def rate_on(
    base: str, quote: str, day: date, published: Iterable[Rate], *, max_age_days: int = RATE_MAX_AGE_DAYS
) -> Rate:
    """The rate of the last day on or before ``day`` on which it was published, or follows from rates published then.

    It follows from the rate the other way round, or from the rates of both currencies against a third (the ECB
    publishes against the euro): rounded once, half up, to 12 decimals. Of one day's, published goes before following.

    Raises NoRate.
    """
    if base == quote:
        return Rate(base, quote, Decimal(1), day, "")
    oldest = day - timedelta(days=max_age_days)
    days: dict[date, list[Rate]] = {}
    for rate in published:
        if oldest <= rate.day <= day and {rate.base, rate.quote} & {base, quote}:
            days.setdefault(rate.day, []).append(rate)
    for of_day in sorted(days, reverse=True):
        found = _direct(base, quote, days[of_day]) or _crossed(base, quote, days[of_day])
        if found is not None:
            return found
    raise NoRate(
        f"expected a rate of {quote} for {base} published from {oldest} to {day}, got none: load the reference rates"
    )


def _direct(base: str, quote: str, rates: Iterable[Rate]) -> Rate | None:
    return next((rate for rate in rates if (rate.base, rate.quote) == (base, quote)), None)


def _crossed(base: str, quote: str, rates: Sequence[Rate]) -> Rate | None:
    """From what one unit of a third currency (or of either) is worth in both, all from one source."""
    worth: dict[tuple[str, str], dict[str, Fraction]] = {}
    for rate in rates:
        worth.setdefault((rate.source, rate.base), {rate.base: Fraction(1)})[rate.quote] = Fraction(rate.rate)
    for (source, _), units in sorted(worth.items()):
        if base in units and quote in units:
            return Rate(base, quote, _quotient(units[quote], units[base]), rates[0].day, source)
    return None


def _quotient(dividend: Fraction, divisor: Fraction) -> Decimal:
    numerator = dividend.numerator * divisor.denominator * 10**RATE_DECIMALS
    return Decimal(f"{round_half_up_div(numerator, dividend.denominator * divisor.numerator)}E-{RATE_DECIMALS}")


def convert(rate: Rate, currency: str, *, net: Minor, tax: Minor, taxes: Sequence[Minor] = ()) -> Converted:
    """What a document of net + tax, in smallest units of ``currency``, comes to at a rate.

    The total is rounded once, half up; net and tax are parts of it by largest remainder, and so are taxes of the tax.

    Raises ValueError for a rate of another currency, and for taxes that do not add up to the tax.
    """
    if rate.base != currency:
        raise ValueError(f"expected a rate for one {currency}, got one for {rate.base}")
    if taxes and sum(taxes) != tax:
        raise ValueError(f"expected taxes that add up to {tax}, got {list(taxes)}")
    numerator, denominator = rate.rate.as_integer_ratio()
    numerator *= _ten_to(minor_units(rate.quote))
    denominator *= _ten_to(minor_units(currency))
    total = round_half_up_div((net + tax) * numerator, denominator)
    of_net, of_tax = round_to(total, [net * numerator, tax * numerator], denominator)
    parts = round_to(of_tax, [part * numerator for part in taxes], denominator) if taxes else []
    return Converted(rate, of_net, of_tax, total, tuple(parts))


def _ten_to(power: int) -> int:
    # pow of two ints is an int for powers of 0 or more; the type checker cannot know.
    return int(10**power)
