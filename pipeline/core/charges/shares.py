"""The arithmetic behind a price, part by part, for showing it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal, TypeAlias

from pipeline.core.charges.model import Charge, Tier
from pipeline.core.charges.numbers import PRODUCT_TO_AMOUNT, scaled_price, scaled_rate
from pipeline.core.charges.per_event import compile_amount_price, compile_percentage
from pipeline.core.charges.running import cell_price, compile_cost, counter_maximum
from pipeline.core.charges.tiers import (
    THROUGH_TIERS,
    TIERED,
    TierPrice,
    block_size,
    blocks_begun,
    park_limit,
    reached,
    tier_prices,
)
from pipeline.core.members import Member
from pipeline.core.money import PRICE_DECIMALS, QUANTITY_ONE, Amount, Micros, Quantity, round_half_up_div

#: pool, included: free units. usage: priced units, with the flat fee of their tier. events: single events' own prices.
#: fee: a flat charge. minimum: what is missing to it. maximum: what lies above it, negative.
ShareKind: TypeAlias = Literal["pool", "included", "credits", "usage", "events", "fee", "minimum", "maximum"]


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a counter's quantity priced alike.

    ``tier`` is None for free units and models without tiers. ``packages`` is the number of packages or blocks charged
    at ``unit_price`` each, ``events`` the number of events in it; None outside their models. ``first`` and ``last``
    bound the part within the cumulative quantity: it holds the units after ``first`` up to and with ``last``; a part
    that is no usage has first = last. ``unit_price`` is per whole unit (of a percentage, 0.012 for 1.2 %; of a dynamic
    charge its multiplier), ``flat`` the tier's flat fee or, of events, the fixed fee of each.
    """

    tier: Tier | None
    first: Quantity
    last: Quantity
    unit_price: Decimal
    flat: Decimal
    packages: int | None
    amount: Amount
    kind: ShareKind = "usage"
    events: int | None = None

    @property
    def quantity(self) -> Quantity:
        return self.last - self.first


def tier_shares(
    charge: Charge, quantity: Quantity, cell: tuple[str, ...] = (), pooled: Quantity = 0, credited: Quantity = 0
) -> list[Share]:
    """The arithmetic behind price(quantity): its parts in order, amounts adding up to it exactly.

    Each amount is rounded on its own; what that leaves of the price goes to the last part. What a maximum takes off
    is a negative part after it. ``pooled``: free units from a shared pool, before the charge's own included ones;
    ``credited``: units that credits pay for, after these. All are parts at price 0. No parts: nothing is charged and
    nothing was free.

    Raises ValueError as ``compile_price``, and for a quantity beyond a last tier that parks.
    """
    included = pooled + charge.included
    if pooled or credited:
        charge = replace(charge, included=included + credited)
    limit, maximum = park_limit(charge), counter_maximum(charge)
    if limit is not None and quantity > limit:
        raise ValueError(f"charge {charge.id}: expected a quantity within its last tier, got {quantity}e-9")
    cost = compile_cost(charge, cell)(quantity)
    quantity = max(quantity, 0)
    shares = [
        *_free("pool", 0, min(quantity, pooled)),
        *_free("included", pooled, min(quantity, included)),
        *_free("credits", included, min(quantity, included + credited)),
        *_priced(charge, quantity, cell),
    ]
    shares = _adding_up(shares, cost)
    if maximum is not None and cost > maximum:
        shares.append(limit_share("maximum", quantity, maximum - cost))
    return shares


def level_shares(charge: Charge, standing: Iterable[tuple[Quantity, Micros]], period_us: Micros) -> list[Share]:
    """What levels cost, each for the time it stood out of a period's: for charges ``per_level``, tier by tier.

    Quantities are means over the period. A tier's flat fee is due in full once a level that stood reached it.
    Raises ValueError as ``compile_price``.
    """
    levels = [(max(level, 0), time_us) for level, time_us in standing if time_us]
    highest = max((level for level, _ in levels), default=0) - charge.included
    if charge.model == "graduated":
        tiers = tier_prices(charge)
        tiers = tiers[: reached(charge, highest, tiers)]
    else:
        price = scaled_price(charge, charge.unit_price, "unit_price")
        tiers = [TierPrice(None, 0, None, price, 0, None)] if highest > 0 else []

    def below(bound: Quantity | None) -> int:
        """What of the levels lies up to a bound, times how long, in 1e-9 units times microseconds."""
        return sum((level if bound is None else min(level, bound)) * time_us for level, time_us in levels)

    def mean(level_time: int) -> Quantity:
        return round_half_up_div(level_time, period_us)

    shares = _free("included", 0, mean(below(charge.included)))
    whole = 0
    for number, tier in enumerate(tiers, 1):
        upper = None if tier.upper is None or number == len(tiers) else charge.included + tier.upper
        first, last = below(charge.included + tier.lower), below(upper)
        cost = tier.flat * period_us + (last - first) * tier.slope
        whole += cost
        amount = round_half_up_div(cost, PRODUCT_TO_AMOUNT * period_us)
        shares.append(_tier_share(tier, mean(first), mean(last), None, amount))
    return _adding_up(shares, round_half_up_div(whole, PRODUCT_TO_AMOUNT * period_us))


def event_shares(charge: Charge, members: Iterable[Member]) -> list[Share]:
    """What a counter of a percentage or dynamic charge costs: its free part, then its events, each priced by itself.

    ``members`` in order of event time, then key. An event is free while fewer than ``free_events`` came before it and
    less than ``free_amount`` was used before it. One that goes beyond that amount costs what an event of the quantity
    beyond it costs, fixed fee and all. Raises ValueError as ``compile_event_price``.
    """
    if charge.model == "dynamic":
        price_of_amount = compile_amount_price(charge)
        amounts = [price_of_amount(member.amount) for member in members]
        quantity = sum(member.quantity for member in members)
        return [_events(0, quantity, charge.multiplier, Decimal(0), sum(amounts), len(amounts))] if amounts else []
    price = compile_percentage(charge)
    used = free = amount = events = charged = 0
    for events, member in enumerate(members, 1):
        quantity = max(member.quantity, 0)
        free_of_it = free_of(charge, events - 1, used, quantity)
        used += quantity
        if free_of_it is not None:
            free += free_of_it
            if free_of_it == quantity:
                continue
        charged += 1
        amount += price(quantity - (free_of_it or 0))
    rate = Decimal(f"{scaled_rate(charge, charge.rate, 'rate')}E-{PRICE_DECIMALS}")
    shares = []
    if events > charged:
        shares.append(Share(None, 0, free, Decimal(0), Decimal(0), None, 0, "included", events - charged))
    if charged:
        shares.append(_events(free, used, rate, charge.fixed, amount, charged))
    return shares


def free_of(charge: Charge, events_before: int, used_before: Quantity, quantity: Quantity) -> Quantity | None:
    """How much of a percentage charge's event is free; None when the event is not free at all."""
    if charge.free_events is None and charge.free_amount is None:
        return None
    if charge.free_events is not None and events_before >= charge.free_events:
        return None
    if charge.free_amount is None:
        return quantity
    return min(quantity, charge.free_amount - used_before) if used_before < charge.free_amount else None


def _events(first: Quantity, last: Quantity, rate: Decimal, fixed: Decimal, amount: Amount, events: int) -> Share:
    return Share(None, first, last, rate, fixed, None, amount, "events", events)


def limit_share(kind: ShareKind, quantity: Quantity, amount: Amount) -> Share:
    """What a minimum adds, or a maximum takes off, at the end of the parts."""
    return Share(None, quantity, quantity, Decimal(0), Decimal(0), None, amount, kind)


def _adding_up(shares: list[Share], total: Amount) -> list[Share]:
    """The shares, the last one with what the others leave of the total."""
    rest = total - sum(share.amount for share in shares[:-1])
    return [*shares[:-1], replace(shares[-1], amount=rest)] if shares else []


def _free(kind: ShareKind, first: Quantity, last: Quantity) -> list[Share]:
    return [Share(None, first, last, Decimal(0), Decimal(0), None, 0, kind)] if last > first else []


def _priced(charge: Charge, quantity: Quantity, cell: tuple[str, ...]) -> list[Share]:
    """Parts beyond the free units. The last one's amount is set by the caller, from the total."""
    free = min(quantity, charge.included)
    units = quantity - free
    if charge.model in TIERED:
        return _tiers(charge, free, quantity)
    if charge.model == "package":
        packages = blocks_begun(charge, quantity)
        price = charge.package_price or Decimal(0)
        return [Share(None, free, quantity, price, Decimal(0), packages, 0)] if packages else []
    price = cell_price(charge, cell) or Decimal(0)
    return [Share(None, free, quantity, price, Decimal(0), None, 0)] if units else []


def _tiers(charge: Charge, free: Quantity, quantity: Quantity) -> list[Share]:
    block = block_size(charge) if charge.model == "block" else None
    units = quantity - free if block is None else blocks_begun(charge, quantity) * QUANTITY_ONE
    tiers = tier_prices(charge)
    tiers = tiers[: reached(charge, units, tiers)]
    if units <= 0 and tiers and not tiers[0].flat:
        return []
    if charge.model not in THROUGH_TIERS:
        return [_tier(tier, free, quantity, units, None) for tier in tiers[-1:]]
    shares = []
    for number, tier in enumerate(tiers, 1):
        upper = units if number == len(tiers) or tier.upper is None else tier.upper
        # Of blocks, the last is begun by the last unit: it may reach beyond it.
        first, last = (
            (free + tier.lower, free + upper)
            if block is None
            else (free + tier.lower // QUANTITY_ONE * block, free + upper // QUANTITY_ONE * block)
        )
        packages = None if block is None else (upper - tier.lower) // QUANTITY_ONE
        shares.append(_tier(tier, min(first, quantity), min(last, quantity), upper - tier.lower, packages))
    return shares


def _tier(price: TierPrice, first: Quantity, last: Quantity, units: Quantity, packages: int | None) -> Share:
    return _tier_share(price, first, last, packages, round_half_up_div(price.cost(units), PRODUCT_TO_AMOUNT))


def _tier_share(price: TierPrice, first: Quantity, last: Quantity, packages: int | None, amount: Amount) -> Share:
    unit_price = Decimal(f"{price.slope}E-{PRICE_DECIMALS}")
    flat = Decimal(0) if price.tier is None else price.tier.flat
    return Share(price.tier, first, last, unit_price, flat, packages, amount)
