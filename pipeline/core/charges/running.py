"""What a counter's quantity costs: from a cumulative quantity to an exact amount, whatever way it came about."""

from bisect import bisect_left
from collections.abc import Callable
from decimal import Decimal
from itertools import accumulate
from math import gcd
from typing import NamedTuple, TypeAlias

from pipeline.core.charges.model import Charge
from pipeline.core.charges.numbers import PRICE_TO_AMOUNT, PRODUCT_TO_AMOUNT, scaled_amount, scaled_price
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
from pipeline.core.money import QUANTITY_ONE, Amount, Quantity, round_half_up_div

#: From a counter's cumulative quantity to its cost.
Cost: TypeAlias = Callable[[Quantity], Amount]
#: The same; None for a quantity beyond a last tier that parks.
Price: TypeAlias = Callable[[Quantity], Amount | None]


class Lines(NamedTuple):
    """A price that is a straight line within each tier, in integers.

    Up to ``included`` a quantity costs ``at_zero``. Beyond, with t the number of bounds below it, it costs
    ``(quantity * factors[t] + offsets[t]) // divisor``. That is never negative, and rounds half up: the offsets hold
    half a divisor.
    """

    included: Quantity
    at_zero: Amount
    bounds: tuple[Quantity, ...]
    factors: tuple[int, ...]
    offsets: tuple[int, ...]
    divisor: int


def compile_price(charge: Charge, cell: tuple[str, ...] = ()) -> Price:
    """A function from a counter's cumulative quantity to its exact cost, rounded once to 12 decimals.

    ``cell``: the values of the charge's dimensions, for a matrix. The maximum is in it, unless the charge is split into
    several counters, which share it: the close applies that one, and every minimum. Beyond a last tier that parks the
    function returns None; no other function does.

    Raises ValueError for a charge that cannot be priced (``check_charge`` says which) and for the models without a
    cumulative quantity: percentage and dynamic (``compile_event_price``), flat (``closing``).
    """
    cost, maximum, limit = compile_cost(charge, cell), counter_maximum(charge), park_limit(charge)
    if maximum is not None:
        cost = _at_most(maximum, cost)
    return cost if limit is None else _up_to(limit, cost)


def price_lines(charge: Charge, cell: tuple[str, ...] = ()) -> Lines | None:
    """The price as straight lines; None for a charge whose price is none. Raises ValueError as ``compile_price``.

    None are packages and blocks, tiers with a cap, a last tier that parks, and a maximum of the counter's own.
    """
    lines = _lines(charge, cell)
    return None if counter_maximum(charge) is not None or park_limit(charge) is not None else lines


def counter_maximum(charge: Charge) -> Amount | None:
    """The charge's maximum as its one counter's; None where there is none, or several counters share it."""
    return None if charge.maximum is None or charge.split else scaled_amount(charge, charge.maximum, "maximum")


def compile_cost(charge: Charge, cell: tuple[str, ...] = ()) -> Cost:
    """``compile_price`` without its ends: no maximum, and beyond a last tier its price goes on."""
    lines = _lines(charge, cell)
    if lines is not None:
        return price_of(lines)
    match charge.model:
        case "package":
            return _package(charge)
        case "block":
            blocks = _through(charge, tier_prices(charge))
            return lambda quantity: blocks(blocks_begun(charge, quantity) * QUANTITY_ONE)
        case _:
            tiers = _through(charge, tier_prices(charge))
            included = charge.included
            return lambda quantity: tiers(quantity - included)


# Hot path: each closure is one multiplication, one addition and one floor division. Costs are 0 or more, so that
# (cost + divisor // 2) // divisor rounds half up.


def price_of(lines: Lines) -> Cost:
    """What ``compile_price`` gives for a charge whose price is these lines."""
    included, at_zero, bounds, factors, offsets, divisor = lines
    if not bounds:
        (factor,), (offset,) = factors, offsets
        return lambda quantity: (quantity * factor + offset) // divisor if quantity > included else at_zero

    def price(quantity: Quantity) -> Amount:
        if quantity <= included:
            return at_zero
        tier = bisect_left(bounds, quantity)
        return (quantity * factors[tier] + offsets[tier]) // divisor

    return price


def _package(charge: Charge) -> Cost:
    price, size = scaled_price(charge, charge.package_price, "package_price"), block_size(charge)
    divisor, factor = _reduced(PRICE_TO_AMOUNT, price)
    included, least = charge.included, charge.min_packages
    half, round_up = divisor // 2, size - 1 - included
    at_zero = (least * factor + half) // divisor
    if not least:
        return lambda quantity: ((quantity + round_up) // size * factor + half) // divisor if quantity > included else 0
    return lambda quantity: max(((quantity + round_up) // size * factor + half) // divisor, at_zero)


def _through(charge: Charge, tiers: list[TierPrice]) -> Cost:
    """Tier by tier, for what is no straight line. From units after the included ones (blocks, in a block charge)."""
    below = [0, *accumulate(tier.cost(tier.upper - tier.lower) for tier in tiers if tier.upper is not None)]
    graduated = charge.model in THROUGH_TIERS

    def cost(units: Quantity) -> Amount:
        last = reached(charge, units, tiers) - 1
        if last < 0:
            return 0
        tier, units = tiers[last], max(units, 0)
        product = below[last] + tier.cost(units - tier.lower) if graduated else tier.cost(units)
        return round_half_up_div(product, PRODUCT_TO_AMOUNT)

    return cost


def _at_most(maximum: Amount, cost: Cost) -> Cost:
    return lambda quantity: min(cost(quantity), maximum)


def _up_to(limit: Quantity, cost: Cost) -> Price:
    return lambda quantity: cost(quantity) if quantity <= limit else None


# Straight lines: slope times quantity plus intercept.


def _lines(charge: Charge, cell: tuple[str, ...]) -> Lines | None:
    if charge.included < 0:
        raise ValueError(f"charge {charge.id}: expected 0 or more included units, got {charge.included}")
    if charge.model in TIERED:
        tiers = tier_prices(charge)
        capped = any(tier.cap is not None for tier in tiers)
        return None if capped or charge.model == "block" else _tier_lines(charge, tiers)
    match charge.model:
        case "per_unit":
            return _straight(scaled_price(charge, charge.unit_price, "unit_price"), charge.included)
        case "matrix":
            return _straight(scaled_price(charge, cell_price(charge, cell), "unit_price"), charge.included)
        case "package":
            return None
        case _:
            raise ValueError(
                f"charge {charge.id}: expected a model that prices a cumulative quantity, got {charge.model}"
            )


def cell_price(charge: Charge, cell: tuple[str, ...]) -> Decimal | None:
    """A matrix' unit price for the values of its dimensions: the default's where no cell has them."""
    return next((priced.unit_price for priced in charge.cells if priced.values == cell), charge.unit_price)


def _straight(price: int, included: Quantity) -> Lines:
    divisor, factor = _reduced(PRODUCT_TO_AMOUNT, price)
    return Lines(included, 0, (), (factor,), (divisor // 2 - included * factor,), divisor)


def _tier_lines(charge: Charge, tiers: list[TierPrice]) -> Lines:
    included = charge.included
    slopes = [tier.slope for tier in tiers]
    if charge.model in THROUGH_TIERS:
        below = [0, *accumulate(tier.cost(tier.upper - tier.lower) for tier in tiers if tier.upper is not None)]
        intercepts = [
            cost + tier.flat - (included + tier.lower) * tier.slope for cost, tier in zip(below, tiers, strict=True)
        ]
    else:
        intercepts = [tier.flat - included * tier.slope for tier in tiers]
    divisor, *reduced = _reduced(PRODUCT_TO_AMOUNT, *slopes, *intercepts)
    # A bound that belongs to the next tier is one step of 1e-9 lower.
    exclusive = charge.bound == "exclusive"
    return Lines(
        included=included,
        at_zero=round_half_up_div(tiers[0].flat, PRODUCT_TO_AMOUNT) if charge.flat_on_zero else 0,
        bounds=tuple(included + tier.upper - exclusive for tier in tiers if tier.upper is not None),
        factors=tuple(reduced[: len(tiers)]),
        offsets=tuple(intercept + divisor // 2 for intercept in reduced[len(tiers) :]),
        divisor=divisor,
    )


def _reduced(*values: int) -> list[int]:
    """The values without their common factor: smaller integers, same ratios, faster arithmetic."""
    common = gcd(*values)
    return [value // common for value in values]
