"""How events move counters whose amounts are no differences of a running price, and what a counter's quantity costs.

===========  ============================================================  ===========================================
rule         when                                                          the event's amount
===========  ============================================================  ===========================================
by event     percentage, dynamic                                           its own price
limited      … with free events, or a maximum of the period                the same, within what those before it leave
pooled       the charge shares a pool of included units                    price of what the pool leaves, after - before
stepped      the meter's quantity moves, but does not add up (a maximum)   price(after) - price(before)
untold       no running number tells the quantity (unique, average, …)     0
===========  ============================================================  ===========================================

But for the first, amounts are provisional (class period): made in the order events arrive, and the close prices anew.
A charge that goes by none of these is what ``rate`` itself prices, and its fast path: events add their quantity.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from pipeline.core.aggregation import RunningStep, running_step
from pipeline.core.charges import (
    PER_EVENT,
    Charge,
    EventPrice,
    Price,
    charge_class,
    compile_event_price,
    compile_price,
    free_of,
    price_lines,
    price_of,
    scaled_amount,
)
from pipeline.core.meters import Meter, Properties
from pipeline.core.money import Amount, Quantity
from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.rating import compiled

#: The running quantity of a counter, what the batch and the event did so far included.
Read: TypeAlias = Callable[[bytes], Quantity | None]


class Step(NamedTuple):
    """What an event does to a counter: the counter's quantity before and after, its amount, and all that moves."""

    before: Quantity
    after: Quantity
    amount: Amount
    totals: tuple[tuple[bytes, Quantity], ...]


#: From an event's quantity and properties to what it does. What it counts besides the counter's quantity has names that
#: begin with a control character: no counter's does, which begins with its account.
Rule: TypeAlias = Callable[[Quantity, Properties, Read], Step | Rejection]


class PoolCounter(NamedTuple):
    """A shared pool in one segment: the name of what counts the units used of it, and how many are included."""

    counter: bytes
    included: Quantity


def compile_rule(
    charge: Charge, meter: Meter, counter: bytes, cell: tuple[str, ...] = (), pool: PoolCounter | None = None
) -> Rule | None:
    """How an event moves a counter of the charge; None where its amount is what its quantity adds to the price.

    Raises ValueError for a charge that cannot be priced.
    """
    step = running_step(meter)
    if charge.model in PER_EVENT:
        price = compile_event_price(charge)
        limited = charge_class(charge, meter) == "period"
        return _limited(charge, counter, step, price) if limited and step else _by_event(counter, step, price)
    if step is None:
        return _untold
    if pool is not None:
        return _pooled(counter, compile_counter_price(charge, cell), pool)
    if meter.aggregation in ("sum", "count"):
        return None
    return _stepped(counter, step, compile_counter_price(charge, cell))


def compile_counter_price(charge: Charge, cell: tuple[str, ...] = ()) -> Price:
    """As ``compile_price``, compiled where it can be."""
    lines = price_lines(charge, cell)
    if lines is None:
        return compile_price(charge, cell)
    exact = price_of(lines)
    if compiled.fastpath is None:
        return exact
    try:
        plain: Price = compiled.fastpath.PlainLines(lines, exact)
    except OverflowError:
        return exact
    return plain


def _by_event(counter: bytes, step: RunningStep | None, price: EventPrice) -> Rule:
    def rule(quantity: Quantity, properties: Properties, read: Read) -> Step | Rejection:
        amount = price(quantity, properties)
        if isinstance(amount, Rejection):
            return amount
        if step is None:
            return Step(0, 0, amount, ())
        before = read(counter)
        after = step(before, quantity)
        return Step(before or 0, after, amount, ((counter, after),))

    return rule


def _limited(charge: Charge, counter: bytes, step: RunningStep, price: EventPrice) -> Rule:
    """Free events and the maximum, in the order events arrive; the maximum of a split charge is left to the close."""
    counted, spent = b"\x1fevents\x1f" + counter, b"\x1fspent\x1f" + counter
    maximum = None if charge.maximum is None or charge.split else scaled_amount(charge, charge.maximum, "maximum")

    def rule(quantity: Quantity, properties: Properties, read: Read) -> Step | Rejection:
        before, events, cost_before = read(counter), read(counted) or 0, read(spent) or 0
        units = max(quantity, 0)
        free = free_of(charge, events, max(before or 0, 0), units)
        cost = 0 if free == units else price(units - (free or 0), properties)
        if isinstance(cost, Rejection):
            return cost
        after, cost_after = step(before, quantity), cost_before + cost
        amount = cost if maximum is None else min(cost_after, maximum) - min(cost_before, maximum)
        totals = ((counter, after), (counted, events + 1), (spent, cost_after))
        return Step(before or 0, after, amount, totals)

    return rule


def _pooled(counter: bytes, price: Price, pool: PoolCounter) -> Rule:
    """The pool pays first; what it leaves is priced as the counter's quantity."""
    paid = b"\x1fpaid\x1f" + counter  # units of the counter that the pool paid for

    def covered(used: Quantity) -> Quantity:
        return min(max(used, 0), pool.included)

    def rule(quantity: Quantity, _: Properties, read: Read) -> Step | Rejection:
        used, before, paid_before = read(pool.counter) or 0, read(counter), read(paid) or 0
        paid_after = paid_before + covered(used + quantity) - covered(used)
        after = (before or 0) + quantity
        amount = _difference(price, None if before is None else before - paid_before, after - paid_after)
        if isinstance(amount, Rejection):
            return amount
        return Step(before or 0, after, amount, ((pool.counter, used + quantity), (paid, paid_after), (counter, after)))

    return rule


def _stepped(counter: bytes, step: RunningStep, price: Price) -> Rule:
    def rule(quantity: Quantity, _: Properties, read: Read) -> Step | Rejection:
        before = read(counter)
        after = step(before, quantity)
        amount = _difference(price, before, after)
        return amount if isinstance(amount, Rejection) else Step(before or 0, after, amount, ((counter, after),))

    return rule


def _untold(_: Quantity, __: Properties, ___: Read) -> Step:
    return Step(0, 0, 0, ())


def _difference(price: Price, before: Quantity | None, after: Quantity) -> Amount | Rejection:
    """``price(after) - price(before)``; a counter without an event yet costs nothing."""
    cost_after, cost_before = price(after), 0 if before is None else price(before)
    return BEYOND_LAST_TIER if cost_after is None or cost_before is None else cost_after - cost_before


BEYOND_LAST_TIER = Rejection(
    Stage.RATE,
    Reason.BEYOND_LAST_TIER,
    "expected a running quantity that the charge's tiers price, got one beyond the last of them, where it parks: "
    "publish a price for it",
)
