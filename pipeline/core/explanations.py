"""A price's arithmetic in words a customer could read, and as data: each part says what it is and what it costs.

The words are made of the numbers beside them and of nothing else, so they cannot say something else.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from pipeline.core.catalog import Segment
from pipeline.core.charges import Charge, Share, ShareKind, Tier
from pipeline.core.money import amount_decimal, plain, quantity_decimal
from pipeline.core.periods import Period

#: A unit that is written as a word and so has a plural: token, seat-month; not GB, kWh.
_WORD = re.compile(r"[a-z][a-z -]{2,}")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of what a counter costs. Numbers are exact, in whole units and whole units of the currency.

    ``over`` and ``up_to`` bound the part within the whole quantity. The amounts of all parts add up to the price, the
    quantities to the quantity, but for one below zero, which has no parts.
    """

    kind: ShareKind
    text: str
    over: Decimal
    up_to: Decimal
    quantity: Decimal
    packages: int | None
    events: int | None
    unit_price: Decimal
    flat: Decimal
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Wording:
    """What the words need to know beside the arithmetic: the charge, its meter's unit, and the part of the period."""

    charge: Charge
    unit: str
    currency: str
    cell: tuple[str, ...] = ()
    #: A segment shorter than its period, as "15 of 31 days"; empty where it is the whole.
    share: str = ""


def explain_parts(shares: Iterable[Share], wording: Wording) -> list[Part]:
    """Each part of a price with its words, in order."""
    return [
        Part(
            kind=share.kind,
            text=_text(share, wording),
            over=quantity_decimal(share.first),
            up_to=quantity_decimal(share.last),
            quantity=quantity_decimal(share.quantity),
            packages=share.packages,
            events=share.events,
            unit_price=share.unit_price,
            flat=share.flat,
            amount=amount_decimal(share.amount),
        )
        for share in shares
    ]


def explain_usage(quantity: Decimal, unit: str, events: int) -> str:
    """``1,200 calls in 3 events``."""
    return f"{_quantity(quantity, unit)} in {_count(events, 'event')}"


def explain_share(segment: Segment) -> str:
    """How much of its period a segment holds, as its plan prorates; empty: all, or nothing is prorated."""
    portion = segment.portion
    match segment.plan.prorate_by:
        case "day" if not portion.is_whole:
            return f"{portion.end - portion.start} of {portion.whole} days"
        case "period" if not portion.is_whole:
            return "no part: its first segment had all of it"
        case "second":
            return explain_span(segment.start_us, segment.end_us, segment.period)
    return ""


def explain_span(start_us: int, end_us: int, period: Period) -> str:
    """How much of its period a segment holds: ``15 of 31 days``, in hours where that is no whole number; empty: all."""
    if (start_us, end_us) == (period.start_us, period.end_us):
        return ""
    part, whole = end_us - start_us, period.end_us - period.start_us
    for unit, length_us in (("days", _DAY_US), ("hours", _DAY_US // 24), ("seconds", 1_000_000)):
        if part % length_us == 0 and whole % length_us == 0:
            return f"{part // length_us:,} of {whole // length_us:,} {unit}"
    return f"{part:,} of {whole:,} microseconds"


_DAY_US = 24 * 3600 * 1_000_000


def _text(share: Share, wording: Wording) -> str:
    charge = wording.charge
    match share.kind:
        case "pool":
            return f"{_units(share, wording)} from the shared pool: free"
        case "credits":
            return f"{_units(share, wording)} paid for by credits: free"
        case "included" if share.events is not None:
            return f"{_count(share.events, 'event')} free, {_units(share, wording)} in all"
        case "included":
            part = f", for {wording.share}" if wording.share else ""
            return f"{_units(share, wording)} included{part}: free"
        case "events":
            return _events(share, wording)
        case "fee":
            times = f"{_number(quantity_decimal(charge.quantity))} × " if share.quantity != 10**9 else ""
            part = f", for {wording.share}" if wording.share and charge.prorate else ""
            return f"{times}{_money(share.unit_price, wording)}{part}"
        case "minimum":
            part = f", for {wording.share}" if wording.share and charge.prorate else ""
            return f"what is missing to the minimum of {_money(charge.minimum or Decimal(0), wording)}{part}"
        case "maximum":
            return f"what lies above the maximum of {_money(charge.maximum or Decimal(0), wording)}"
        case "usage":
            return _usage(share, wording)


def _events(share: Share, wording: Wording) -> str:
    charge = wording.charge
    what = _count(share.events or 0, "event")
    if charge.model == "dynamic":
        times = "" if charge.multiplier == 1 else f", times {_number(charge.multiplier)}"
        text = f"{what} at the amounts they brought{times}"
    else:
        fixed = f" and {_money(share.flat, wording)} each" if share.flat else ""
        text = f"{what}: {_percent(share.unit_price)} of {_number(quantity_decimal(share.quantity))}{fixed}"
    least = "" if charge.event_minimum is None else f", at least {_money(charge.event_minimum, wording)} each"
    most = "" if charge.event_maximum is None else f", at most {_money(charge.event_maximum, wording)} each"
    return text + least + most


def _usage(share: Share, wording: Wording) -> str:
    charge, tier = wording.charge, share.tier
    flat = f", and {_money(share.flat, wording)} flat" if share.flat else ""
    capped = f", at most {_money(tier.cap, wording)}" if tier is not None and tier.cap is not None else ""
    match charge.model:
        case "stairstep":
            return (
                f"{_units(share, wording)}: {_money(share.flat, wording)} for a total {_reach(tier, charge, wording)}"
            )
        case "package" | "block":
            size = _quantity(quantity_decimal(charge.package_size or 0), wording.unit)
            name = "package" if charge.model == "package" else "block"
            text = f"{_count(share.packages or 0, name)} of {size}, {_money(share.unit_price, wording)} each"
            return text + flat + capped
        case _ if not share.quantity:
            return f"{_money(share.flat, wording)} flat, due without usage{capped}"
        case "volume":
            price = f"{_money(share.unit_price, wording)} each{flat}{capped}"
            return f"all {_units(share, wording)} at {price}: the total is {_reach(tier, charge, wording)}"
        case "graduated":
            return f"{_range(share, wording)} at {_money(share.unit_price, wording)} each{flat}{capped}"
        case "graduated_percentage":
            return f"{_range(share, wording)}: {_percent(share.unit_price)}{flat}{capped}"
        case _:
            cell = f" ({', '.join(value or 'none' for value in wording.cell)})" if wording.cell else ""
            return f"{_units(share, wording)}{cell} at {_money(share.unit_price, wording)} each"


def _range(share: Share, wording: Wording) -> str:
    over, up_to = quantity_decimal(share.first), _number(quantity_decimal(share.last))
    if not share.first:
        return f"the first {_units(share, wording)}"
    return f"{_units(share, wording)} over {_number(over)} up to {up_to}"


def _reach(tier: Tier | None, charge: Charge, wording: Wording) -> str:
    """Which totals the tier holds, after included units."""
    bounds = [one.up_to for one in charge.tiers]
    at = charge.tiers.index(tier) if tier in charge.tiers else 0
    if tier is not None and tier.up_to is not None:
        word = "up to" if charge.bound == "inclusive" else "below"
        return f"{word} {_quantity(quantity_decimal(tier.up_to), wording.unit)}"
    lower = bounds[at - 1] if at else None
    word = "over" if charge.bound == "inclusive" else "at least"
    return f"{word} {_quantity(quantity_decimal(lower or 0), wording.unit)}"


def _units(share: Share, wording: Wording) -> str:
    return _quantity(quantity_decimal(share.quantity), wording.unit)


def _quantity(quantity: Decimal, unit: str) -> str:
    plural = "s" if quantity != 1 and _WORD.fullmatch(unit) and not unit.endswith("s") else ""
    return f"{_number(quantity)} {unit}{plural}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _money(amount: Decimal, wording: Wording) -> str:
    return f"{_number(amount)} {wording.currency}"


def _percent(rate: Decimal) -> str:
    return f"{_number(Decimal(f'{plain(rate)}E2'))} %"


def _number(number: Decimal) -> str:
    """Exact, with thousands set apart, without trailing zeros."""
    return f"{Decimal(plain(number)):,f}"
