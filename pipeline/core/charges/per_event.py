"""What one event costs by itself: a percentage of its quantity, or an amount that it brings.

Free events and a maximum need the whole period: the close counts them (``closing``), the price here knows neither.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TypeAlias

from pipeline.core.charges.model import Charge
from pipeline.core.charges.numbers import (
    PRICE_TO_PRODUCT,
    PRODUCT_TO_AMOUNT,
    scaled_amount,
    scaled_price,
    scaled_rate,
)
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    PRICE_DECIMALS,
    QUANTITY_INTEGER_DIGITS,
    Amount,
    Quantity,
    parse_decimal,
    round_half_up_div,
)
from pipeline.core.reasons import Reason, Rejection, Stage

#: From an event's quantity and its properties (UTF-8) to what it costs.
EventPrice: TypeAlias = Callable[[Quantity, Mapping[bytes, bytes]], Amount | Rejection]

_ONE = 10**PRICE_DECIMALS
#: Characters of a refused value quoted in the message.
_QUOTED_MAX = 40


def compile_event_price(charge: Charge) -> EventPrice:
    """A function from an event's quantity and properties to its exact cost, rounded once to 12 decimals.

    A quantity below 0 costs what 0 costs. For dynamic charges it returns a Rejection of stage ``rate`` when the event's
    amount is missing, no finite number, negative, or has more than 18 integer digits or 12 decimals.

    Raises ValueError for a charge that cannot be priced, and for a model that prices no single event.
    """
    if charge.model == "dynamic":
        cost, amount = compile_amount_price(charge), compile_amount(charge)

        def dynamic(_: Quantity, properties: Mapping[bytes, bytes]) -> Amount | Rejection:
            given = amount(properties)
            return given if isinstance(given, Rejection) else cost(given)

        return dynamic
    percentage = compile_percentage(charge)
    return lambda quantity, _: percentage(quantity)


def compile_amount(charge: Charge) -> Callable[[Mapping[bytes, bytes]], Amount | Rejection]:
    """A function that reads the amount an event brings for a dynamic charge, 1e-12, before the multiplier.

    Rejections as ``compile_event_price``. Raises ValueError for a charge without amount_property.
    """
    if not charge.amount_property:
        raise ValueError(f"charge {charge.id}: expected the amount_property that a dynamic charge reads, got none")
    name, key = charge.amount_property, charge.amount_property.encode()

    def amount(properties: Mapping[bytes, bytes]) -> Amount | Rejection:
        text = properties.get(key)
        if text is None:
            return _refused(Reason.MISSING_PROPERTY, f"expected an amount as {name}, got no such property")
        found = parse_decimal(text, decimals=AMOUNT_DECIMALS, integer_digits=QUANTITY_INTEGER_DIGITS)
        if isinstance(found, Reason):
            return _refused(found, f"expected {_EXPECTED} as {name}, got {_quoted(text)}")
        if found < 0:
            return _refused(Reason.NEGATIVE_QUANTITY, f"expected {_EXPECTED} as {name}, got {_quoted(text)}")
        return found

    return amount


def compile_amount_price(charge: Charge) -> Callable[[Amount], Amount]:
    """What an event of a dynamic charge costs, from the amount it brings."""
    multiplier = scaled_price(charge, charge.multiplier, "multiplier")
    return _within_limits(charge, lambda amount: round_half_up_div(amount * multiplier, _ONE))


def compile_percentage(charge: Charge) -> Callable[[Quantity], Amount]:
    """What an event of a percentage charge costs, from the quantity of it that is not free."""
    if charge.model != "percentage":
        raise ValueError(f"charge {charge.id}: expected a model that prices single events, got {charge.model}")
    rate = scaled_rate(charge, charge.rate, "rate")
    fixed = scaled_price(charge, charge.fixed, "fixed") * PRICE_TO_PRODUCT
    return _within_limits(
        charge, lambda quantity: round_half_up_div(max(quantity, 0) * rate + fixed, PRODUCT_TO_AMOUNT)
    )


def _within_limits(charge: Charge, cost: Callable[[int], Amount]) -> Callable[[int], Amount]:
    if charge.event_minimum is None and charge.event_maximum is None:
        return cost
    least = scaled_amount(charge, charge.event_minimum or Decimal(0), "event_minimum")
    if charge.event_maximum is None:
        return lambda number: max(cost(number), least)
    most = scaled_amount(charge, charge.event_maximum, "event_maximum")
    if most < least:
        raise ValueError(
            f"charge {charge.id}: expected an event_maximum of at least the event_minimum {charge.event_minimum}, "
            f"got {charge.event_maximum}"
        )
    return lambda number: min(max(cost(number), least), most)


_EXPECTED = (
    f"an amount of 0 or more with at most {QUANTITY_INTEGER_DIGITS} digits before and {AMOUNT_DECIMALS} after the point"
)


def _refused(reason: Reason, message: str) -> Rejection:
    return Rejection(Stage.RATE, reason, message)


def _quoted(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return repr(shown if len(shown) <= _QUOTED_MAX else shown[: _QUOTED_MAX - 1] + "…")
