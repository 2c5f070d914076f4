"""A charge's Decimals as scaled integers, checked on the way.

Prices are integers of 1e-18. A price times a quantity (1e-9) is a product of 1e-27, rounded once to an amount (1e-12).
"""

from decimal import Decimal

from pipeline.core.charges.model import Charge
from pipeline.core.money import AMOUNT_DECIMALS, PRICE_DECIMALS, QUANTITY_DECIMALS, Amount, round_half_up_div, scaled

PRICE_TO_AMOUNT = 10 ** (PRICE_DECIMALS - AMOUNT_DECIMALS)
PRICE_TO_PRODUCT = 10**QUANTITY_DECIMALS
PRODUCT_TO_AMOUNT = PRICE_TO_AMOUNT * PRICE_TO_PRODUCT
#: 1 % is 0.01.
_PERCENT_DECIMALS = 2


def scaled_price(charge: Charge, value: Decimal | None, name: str) -> int:
    """A price, 1e-18. ValueError when it is missing, negative, not finite, or has more than 18 decimals."""
    return _scaled(charge, value, name, PRICE_DECIMALS)


def scaled_rate(charge: Charge, value: Decimal | None, name: str) -> int:
    """A rate in per cent as a price per unit, 1e-18. ValueError as ``scaled_price``; at most 16 decimals."""
    return _scaled(charge, value, name, PRICE_DECIMALS - _PERCENT_DECIMALS)


def scaled_amount(charge: Charge, value: Decimal | None, name: str) -> Amount:
    """A fixed amount, 1e-12. ValueError as ``scaled_price``; at most 12 decimals."""
    return _scaled(charge, value, name, AMOUNT_DECIMALS)


def flat_fee(charge: Charge) -> Amount:
    """What a flat charge costs per period, 1e-12. ValueError as ``scaled_price``."""
    price = scaled_price(charge, charge.unit_price, "unit_price")
    return round_half_up_div(charge.quantity * price, PRODUCT_TO_AMOUNT)


def _scaled(charge: Charge, value: Decimal | None, name: str, decimals: int) -> int:
    if value is None or not value.is_finite() or value < 0:
        raise ValueError(f"charge {charge.id}: expected a {name} of 0 or more, got {value}")
    try:
        return scaled(value, decimals)
    except ValueError as error:
        raise ValueError(f"charge {charge.id}: {name}: {error}") from error
