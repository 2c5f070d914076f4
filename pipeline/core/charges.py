"""Price models: what a counter's cumulative quantity costs.

=========  ============================================================================================
per_unit   every unit costs the unit price
graduated  each tier's units cost that tier's price; a tier's flat fee is added once the tier is reached
volume     all units cost the price of the tier the total lies in, plus that tier's flat fee
package    every package begun costs the package price
=========  ============================================================================================

All of them: included units come first and are free; tiers and packages count the units after them. A tier's bound
belongs to it (a total of exactly ``up_to`` is still in the tier). The exact result is rounded once, half up, to 12
decimals. A negative total (corrections) costs what zero costs.

Whether the first tier's flat fee is due before any unit beyond the included ones is the charge's choice,
``flat_on_zero``: it is by default, so price(0) may be above 0. A counter that saw no event is absent and costs nothing
until the close, which prices it at 0 and books that fee.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from math import gcd
from typing import Literal, NamedTuple, TypeAlias

from pipeline.core.money import (
    AMOUNT_DECIMALS,
    PRICE_DECIMALS,
    QUANTITY_DECIMALS,
    Amount,
    Quantity,
    round_half_up_div,
    scaled,
)

Model: TypeAlias = Literal["per_unit", "graduated", "volume", "package"]
#: From a counter's cumulative quantity to its cost.
Price: TypeAlias = Callable[[Quantity], Amount]

# Prices are integers of 1e-18. A price times a quantity (1e-9) is a product of 1e-27, rounded to an amount (1e-12).
_PRICE_TO_AMOUNT = 10 ** (PRICE_DECIMALS - AMOUNT_DECIMALS)
_PRICE_TO_PRODUCT = 10**QUANTITY_DECIMALS
_PRODUCT_TO_AMOUNT = _PRICE_TO_AMOUNT * _PRICE_TO_PRODUCT


@dataclass(frozen=True, slots=True)
class Tier:
    """Units up to a cumulative total (inclusive, after included units; None for the last tier) and what they cost."""

    up_to: Quantity | None
    unit_price: Decimal
    flat: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Charge:
    """How a plan prices one meter. Prices are in whole units of the plan's currency, per whole unit of the meter.

    Which of the price fields are set follows from the model. ``references`` are properties whose distinct values
    finance sees on the invoice line.
    """

    id: str
    meter: str
    model: Model
    unit_price: Decimal | None = None
    tiers: tuple[Tier, ...] = ()
    package_size: Quantity | None = None
    package_price: Decimal | None = None
    included: Quantity = 0
    references: tuple[str, ...] = ()
    flat_on_zero: bool = True


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


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a counter's quantity priced alike, for showing the arithmetic.

    ``tier`` is None for included units and models without tiers. ``packages`` is the number of packages charged at
    ``unit_price`` each, None outside that model. ``first`` and ``last`` bound the part within the cumulative quantity:
    it holds the units after ``first`` up to and with ``last``.
    """

    tier: Tier | None
    first: Quantity
    last: Quantity
    unit_price: Decimal
    flat: Decimal
    packages: int | None
    amount: Amount

    @property
    def quantity(self) -> Quantity:
        return self.last - self.first


def compile_price(charge: Charge) -> Price:
    """A function from a counter's cumulative quantity to its exact cost, rounded once to 12 decimals.

    Raises ValueError for a charge that cannot be priced: a field of its model missing, a negative price or one with
    more than 18 decimals, tiers whose bounds do not ascend, a last tier with a bound.
    """
    lines = price_lines(charge)
    if lines is not None:
        return price_of(lines)
    if charge.package_size is None or charge.package_size <= 0:
        raise ValueError(f"charge {charge.id}: expected a package_size above 0, got {charge.package_size}")
    return _package(_price(charge, charge.package_price, "package_price"), charge.package_size, charge.included)


def price_lines(charge: Charge) -> Lines | None:
    """The price as straight lines; None for the model that is none (package). Raises ValueError as compile_price."""
    if charge.included < 0:
        raise ValueError(f"charge {charge.id}: expected 0 or more included units, got {charge.included}")
    match charge.model:
        case "per_unit":
            return _straight(_price(charge, charge.unit_price, "unit_price"), charge.included)
        case "graduated" | "volume":
            return _tiered(charge)
        case "package":
            return None


def tier_shares(charge: Charge, quantity: Quantity) -> list[Share]:
    """The arithmetic behind price(quantity): its parts in order, amounts adding up to it exactly.

    Each amount is rounded on its own; what that leaves of the total goes to the last part. Included units are a part of
    their own, at price 0. No parts: nothing is charged and nothing was included.
    """
    total = compile_price(charge)(quantity)
    quantity = max(quantity, 0)
    priced = max(quantity - charge.included, 0)
    free = quantity - priced
    shares = [Share(None, 0, free, Decimal(0), Decimal(0), None, 0)] if free else []
    match charge.model:
        case "per_unit":
            if priced and charge.unit_price is not None:
                shares.append(_share(charge, None, free, quantity, charge.unit_price))
        case "package":
            if priced and charge.package_price is not None and charge.package_size is not None:
                packages = -(-priced // charge.package_size)
                shares.append(Share(None, free, quantity, charge.package_price, Decimal(0), packages, total))
        case "graduated":
            first = free
            for tier in _reached(charge, priced):
                last = quantity if tier.up_to is None else min(free + tier.up_to, quantity)
                shares.append(_share(charge, tier, first, last, tier.unit_price))
                first = last
        case "volume":
            for tier in _reached(charge, priced)[-1:]:
                shares.append(_share(charge, tier, free, quantity, tier.unit_price))
    if shares:
        rest = total - sum(share.amount for share in shares[:-1])
        shares[-1] = replace(shares[-1], amount=rest)
    return shares


# Hot path: each closure is one multiplication, one addition and one floor division. Costs are 0 or more, so that
# (cost + divisor // 2) // divisor rounds half up.


def price_of(lines: Lines) -> Price:
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


def _package(price: int, size: Quantity, included: Quantity) -> Price:
    divisor, factor = _reduced(_PRICE_TO_AMOUNT, price)
    half, round_up = divisor // 2, size - 1 - included

    def package(quantity: Quantity) -> Amount:
        return ((quantity + round_up) // size * factor + half) // divisor if quantity > included else 0

    return package


def _straight(price: int, included: Quantity) -> Lines:
    divisor, factor = _reduced(_PRODUCT_TO_AMOUNT, price)
    return Lines(included, 0, (), (factor,), (divisor // 2 - included * factor,), divisor)


def _tiered(charge: Charge) -> Lines:
    """Within each tier the cost is a straight line over the quantity: slope times quantity plus intercept."""
    included = charge.included
    slopes, intercepts = [], []
    below = 0  # graduated: cost of the tiers before this one
    lower = 0
    tiers = _checked_tiers(charge)
    for tier, price, flat in tiers:
        slopes.append(price)
        if charge.model == "graduated":
            intercepts.append(below + flat - (included + lower) * price)
            if tier.up_to is not None:
                below += flat + (tier.up_to - lower) * price
                lower = tier.up_to
        else:
            intercepts.append(flat - included * price)
    divisor, *reduced = _reduced(_PRODUCT_TO_AMOUNT, *slopes, *intercepts)
    return Lines(
        included=included,
        at_zero=round_half_up_div(tiers[0][2], _PRODUCT_TO_AMOUNT) if charge.flat_on_zero else 0,
        bounds=tuple(included + tier.up_to for tier, _, _ in tiers if tier.up_to is not None),
        factors=tuple(reduced[: len(tiers)]),
        offsets=tuple(intercept + divisor // 2 for intercept in reduced[len(tiers) :]),
        divisor=divisor,
    )


def _checked_tiers(charge: Charge) -> list[tuple[Tier, int, int]]:
    """Each tier with its unit price (1e-18) and flat fee (1e-27)."""
    bounds = [tier.up_to for tier in charge.tiers]
    if not bounds or bounds[-1] is not None:
        raise ValueError(f"charge {charge.id}: expected tiers, the last without up_to, got bounds {bounds}")
    last = 0
    for bound in bounds[:-1]:
        if bound is None or bound <= last:
            raise ValueError(f"charge {charge.id}: expected tier bounds that ascend from above 0, got {bounds}")
        last = bound
    return [
        (
            tier,
            _price(charge, tier.unit_price, "unit_price"),
            _price(charge, tier.flat, "flat") * _PRICE_TO_PRODUCT,
        )
        for tier in charge.tiers
    ]


def _price(charge: Charge, value: Decimal | None, name: str) -> int:
    """A price in units of 1e-18."""
    if value is None or not value.is_finite() or value < 0:
        raise ValueError(f"charge {charge.id}: expected a {name} of 0 or more, got {value}")
    return scaled(value, PRICE_DECIMALS)


def _reduced(*values: int) -> list[int]:
    """The values without their common factor: smaller integers, same ratios, faster arithmetic."""
    common = gcd(*values)
    return [value // common for value in values]


def _reached(charge: Charge, priced: Quantity) -> tuple[Tier, ...]:
    """The tiers that ``priced`` units after the included ones go through; at 0, the first where its flat fee is due."""
    if not priced:
        return charge.tiers[:1] if charge.flat_on_zero and charge.tiers[0].flat else ()
    bounds = [tier.up_to for tier in charge.tiers if tier.up_to is not None]
    return charge.tiers[: bisect_left(bounds, priced) + 1]


def _share(charge: Charge, tier: Tier | None, first: Quantity, last: Quantity, unit_price: Decimal) -> Share:
    flat = Decimal(0) if tier is None else tier.flat
    cost = (last - first) * _price(charge, unit_price, "unit_price") + _price(charge, flat, "flat") * _PRICE_TO_PRODUCT
    return Share(tier, first, last, unit_price, flat, None, round_half_up_div(cost, _PRODUCT_TO_AMOUNT))
