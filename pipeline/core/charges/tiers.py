"""A charge's tiers in integers."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.core.charges.model import Charge, Tier
from pipeline.core.charges.numbers import PRICE_TO_PRODUCT, PRODUCT_TO_AMOUNT, scaled_amount, scaled_price, scaled_rate
from pipeline.core.money import QUANTITY_ONE, Quantity, plain, quantity_decimal

#: Models whose tiers a quantity goes through, paying each; in the others the tier it ends in prices all of it.
THROUGH_TIERS = frozenset({"graduated", "graduated_percentage", "block"})
TIERED = frozenset({*THROUGH_TIERS, "volume", "stairstep"})


@dataclass(frozen=True, slots=True)
class TierPrice:
    """Units after the included ones, from ``lower`` up to ``upper``, and what they cost: integers.

    In a block charge a unit is a block.
    """

    tier: Tier | None  #: None: the one price of a charge without tiers
    lower: Quantity
    #: None for the last tier, also for one with a bound: whether anything lies beyond is not its matter.
    upper: Quantity | None
    slope: int  #: 1e-18 per unit
    flat: int  #: 1e-27
    cap: int | None  #: 1e-27

    def cost(self, units: Quantity) -> int:
        """So many units in this tier with its flat fee, 1e-27."""
        cost = self.flat + units * self.slope
        return cost if self.cap is None else min(cost, self.cap)


def tier_prices(charge: Charge) -> list[TierPrice]:
    """The tiers that hold anything: of a block charge, prorated, some may be shorter than a block.

    Raises ValueError for no tiers, bounds that do not ascend, a last tier bounded without ``beyond`` or the reverse,
    and prices that are none.
    """
    tiers = charge.tiers
    bounds = [tier.up_to for tier in tiers]
    if not bounds or (bounds[-1] is None) != (charge.beyond is None):
        expected = "tiers, the last without up_to" if charge.beyond is None else "tiers, the last with up_to for beyond"
        raise ValueError(f"charge {charge.id}: expected {expected}, got bounds {in_units(bounds)}")
    lower = 0
    prices = []
    for number, tier in enumerate(tiers, 1):
        upper = tier.up_to
        if (upper is None and number < len(tiers)) or (upper is not None and upper <= lower):
            raise ValueError(f"charge {charge.id}: expected tier bounds that ascend from above 0, got {bounds}")
        slope, flat, cap = _numbers(charge, tier)
        first, end = _units(charge, lower), None if number == len(tiers) else _units(charge, upper or 0)
        if end is None or end > first:
            prices.append(TierPrice(tier, first, end, slope, flat, cap))
        lower = upper or 0
    return prices


def reached(charge: Charge, units: Quantity, prices: list[TierPrice]) -> int:
    """How many tiers ``units`` after the included ones reach. At 0 the first is, where its flat fee is due at once."""
    if units <= 0:
        return int(charge.flat_on_zero)
    exclusive = charge.bound == "exclusive"
    return 1 + sum(price.upper is not None and units > price.upper - exclusive for price in prices)


def park_limit(charge: Charge) -> Quantity | None:
    """The greatest cumulative quantity that the charge prices, included units too; None: it prices any."""
    if charge.beyond != "park" or not charge.tiers or charge.tiers[-1].up_to is None:
        return None
    return charge.included + charge.tiers[-1].up_to - (charge.bound == "exclusive")


def block_size(charge: Charge) -> Quantity:
    if charge.package_size is None or charge.package_size <= 0:
        raise ValueError(f"charge {charge.id}: expected a package_size above 0, got {charge.package_size}")
    return charge.package_size


def blocks_begun(charge: Charge, quantity: Quantity) -> int:
    """How many blocks or packages a cumulative quantity is charged: those begun, at least ``min_packages``."""
    return max(-(-max(quantity - charge.included, 0) // block_size(charge)), charge.min_packages)


def in_units(bounds: Iterable[Quantity | None]) -> list[str]:
    """Bounds as people write them."""
    return ["none" if bound is None else plain(quantity_decimal(bound)) for bound in bounds]


def _units(charge: Charge, bound: Quantity) -> Quantity:
    """A bound in what is priced. A block belongs to the tier it begins in."""
    return bound if charge.model != "block" else -(-bound // block_size(charge)) * QUANTITY_ONE


def _numbers(charge: Charge, tier: Tier) -> tuple[int, int, int | None]:
    flat = scaled_price(charge, tier.flat, "flat") * PRICE_TO_PRODUCT
    cap = None if tier.cap is None else scaled_amount(charge, tier.cap, "cap") * PRODUCT_TO_AMOUNT
    match charge.model:
        case "stairstep":
            return 0, flat, cap
        case "graduated_percentage":
            return scaled_rate(charge, tier.rate, "rate"), flat, cap
        case _:
            return scaled_price(charge, tier.unit_price, "unit_price"), flat, cap
