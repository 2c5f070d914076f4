"""Closing prices (law 3): what a counter costs in the end, from its stored members in order of event time, then key.

Rating in the stream is a difference; this is the truth it is held against. The close books closing price minus rows.

In this order: shared pools are allotted → each counter is priced → a charge's maximum → its minimum.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from pipeline.core.aggregation import Opening, aggregate, standing
from pipeline.core.charges import (
    PER_EVENT,
    Charge,
    Share,
    ShareKind,
    event_shares,
    flat_fee,
    level_shares,
    limit_share,
    scaled_amount,
    tier_shares,
)
from pipeline.core.members import Member
from pipeline.core.meters import Meter
from pipeline.core.money import Amount, Micros, Quantity
from pipeline.core.periods import Period
from pipeline.core.plans import Pool
from pipeline.core.proration import Portion, share_of

__all__ = ["Closing", "Counter", "Member", "Span", "close_pools", "close_segment", "closing_price"]


class Counter(NamedTuple):
    """Which counter within one segment: the charge, its cell (a value per dimension, "" = absent) and subject."""

    charge: str
    cell: tuple[str, ...] = ()
    subject: str = ""


class Span(NamedTuple):
    """A segment ``[start_us, end_us)`` and the billing period it is a part of."""

    start_us: Micros
    end_us: Micros
    period: Period
    #: What it is of the period where fees and minimums are prorated; None: by the time that passes.
    portion: Portion | None = None


@dataclass(frozen=True, slots=True)
class Closing:
    """A counter's quantity (1e-9) and closing price (1e-12), and the arithmetic: amounts of parts add up to amount."""

    quantity: Quantity
    amount: Amount
    parts: tuple[Share, ...]


def close_segment(
    charges: Sequence[tuple[Charge, Meter | None]],
    pools: Sequence[Pool],
    usage: Mapping[Counter, Sequence[Member]],
    span: Span,
    *,
    openings: Mapping[Counter, Opening] | None = None,
    credited: Mapping[Counter, Quantity] | None = None,
) -> dict[Counter, Closing]:
    """Every counter of a segment at its closing price: pools allotted, minimums and maximums applied.

    ``charges`` are the segment's effective charges in the plan's order, each with its meter. One without usage has the
    counter of cell () and subject "" at price 0: a first tier's flat fee, a minimum. A charge that is split into cells
    or subjects has counters only where there is usage or something stood before, other than 0; its minimum and maximum
    concern all of them together. Above the maximum each gives off its part in proportion to its amount (largest
    remainder); what is missing to the minimum stands on the counter of cell () and subject "".

    ``credited``: units of each counter that credits pay for (``pipeline.core.credits.credit_segment``).

    Raises ValueError as ``closing_price``.
    """
    openings, credited = openings or {}, credited or {}
    pooled: dict[Counter, Quantity] = {}
    for pool in pools:
        pooled |= close_pools(pool, usage)
    counters: defaultdict[str, list[Counter]] = defaultdict(list)
    stood = {counter for counter, opening in openings.items() if opening != Opening()}
    for counter in sorted({*usage, *stood}):
        counters[counter.charge].append(counter)
    closings: dict[Counter, Closing] = {}
    for charge, meter in charges:
        whole = Counter(charge.id)
        due = counters[charge.id] or ([] if charge.split else [whole])
        closed = {
            counter: closing_price(
                charge,
                meter,
                usage.get(counter, ()),
                span,
                cell=counter.cell,
                opening=openings.get(counter),
                pooled=pooled.get(counter, 0),
                credited=credited.get(counter, 0),
            )
            for counter in due
        }
        closings |= _limited(charge, closed, span) if charge.split else closed
    return closings


def closing_price(
    charge: Charge,
    meter: Meter | None,
    members: Iterable[Member],
    span: Span,
    *,
    cell: tuple[str, ...] = (),
    opening: Opening | None = None,
    pooled: Quantity = 0,
    credited: Quantity = 0,
) -> Closing:
    """What one counter costs. Members in any order: the result does not depend on it.

    ``meter`` is None for a flat charge only. ``opening``: what stood before the span, for meters that carry over.
    ``pooled``: units a shared pool pays for (``close_pools``), before the charge's own included ones; ``credited``:
    units that credits pay for, after these. Minimum and maximum of a charge that is split into cells or subjects
    concern all its counters: ``close_segment`` applies them.

    Raises ValueError for a charge that cannot be priced and for a quantity beyond a last tier that parks: rows never
    lie there, but a back-dated price may not reach as far as they do.
    """
    if charge.model == "flat":
        closing = _flat(charge, span)
    elif charge.model in PER_EVENT:
        shares = event_shares(charge, sorted(members))
        closing = _closing(sum(share.quantity for share in shares), shares)
    elif meter is None:
        raise ValueError(f"charge {charge.id}: expected a meter for model {charge.model}, got none")
    else:
        closing = _metered(charge, meter, list(members), span, cell, opening, pooled, credited)
    return closing if charge.split else _limited(charge, {Counter(charge.id): closing}, span)[Counter(charge.id)]


def close_pools(pool: Pool, usage: Mapping[Counter, Sequence[Member]]) -> dict[Counter, Quantity]:
    """How many units of a pool each counter gets: in the pool's order of charges, then event time, then key.

    The meters of its charges are additive, so quantities are the members' own. A counter gets no more than it used in
    the end: what events below zero give back is there for others, so nobody pays while units are left. A counter that
    gets nothing is left out.
    """
    left = pool.included
    allotted: defaultdict[Counter, Quantity] = defaultdict(int)
    for charge in pool.charges:
        drawing = {counter: members for counter, members in usage.items() if counter.charge == charge}
        totals = {counter: sum(member.quantity for member in members) for counter, members in drawing.items()}
        events = [(member, counter) for counter, members in drawing.items() for member in members]
        used: defaultdict[Counter, Quantity] = defaultdict(int)
        for member, counter in sorted(events):
            used[counter] += member.quantity
            wanted = min(used[counter], totals[counter]) - allotted[counter]
            if wanted > 0:
                taken = min(wanted, left)
                allotted[counter] += taken
                left -= taken
    return {counter: quantity for counter, quantity in allotted.items() if quantity}


def _closing(quantity: Quantity, parts: Sequence[Share]) -> Closing:
    return Closing(quantity, sum(part.amount for part in parts), tuple(parts))


def _metered(
    charge: Charge,
    meter: Meter,
    members: Sequence[Member],
    span: Span,
    cell: tuple[str, ...],
    opening: Opening | None,
    pooled: Quantity,
    credited: Quantity,
) -> Closing:
    period_us = span.period.end_us - span.period.start_us
    quantity = aggregate(meter, members, span.start_us, span.end_us, opening, period_us=period_us)
    if not charge.per_level:
        return _closing(quantity, tier_shares(charge, quantity, cell, pooled, credited))
    levels = standing(meter, members, Period(span.start_us, span.end_us), opening if meter.carries_over else None)
    return _closing(quantity, level_shares(charge, levels, period_us))


def _flat(charge: Charge, span: Span) -> Closing:
    amount = _share(charge, flat_fee(charge), span)
    price = charge.unit_price or Decimal(0)
    return _closing(charge.quantity, [Share(None, 0, charge.quantity, price, Decimal(0), None, amount, "fee")])


def _share(charge: Charge, amount: Amount, span: Span) -> Amount:
    """The segment's share of an amount per period, cut so that the segments of a period add up to it."""
    if not charge.prorate:
        return amount
    if span.portion is not None:
        return span.portion.of(amount)
    return share_of(amount, span.period, span.start_us, span.end_us)


def _limited(charge: Charge, closings: Mapping[Counter, Closing], span: Span) -> dict[Counter, Closing]:
    """A charge's counters, in order, after its maximum and minimum: each a part where it changes the amount."""
    total = sum(closing.amount for closing in closings.values())
    limited = dict(closings)
    if charge.maximum is not None:
        over = total - scaled_amount(charge, charge.maximum, "maximum")
        if over > 0:
            parts = _split(over, [closing.amount for closing in closings.values()])
            for (counter, closing), part in zip(closings.items(), parts, strict=True):
                limited[counter] = _with(closing, "maximum", -part)
            total -= over
    if charge.minimum is not None:
        missing = _share(charge, scaled_amount(charge, charge.minimum, "minimum"), span) - total
        if missing > 0:
            whole = Counter(charge.id)
            limited[whole] = _with(limited.get(whole, Closing(0, 0, ())), "minimum", missing)
    return limited


def _with(closing: Closing, kind: ShareKind, amount: Amount) -> Closing:
    if not amount:
        return closing
    return _closing(closing.quantity, [*closing.parts, limit_share(kind, closing.quantity, amount)])


def _split(amount: Amount, weights: Sequence[int]) -> list[Amount]:
    """The amount in proportion to the weights, adding up to it: largest remainder, then the first of equals."""
    whole = sum(weights)
    parts = [amount * weight // whole for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda i: -(amount * weights[i] % whole))
    for i in by_rest[: amount - sum(parts)]:
        parts[i] += 1
    return parts
