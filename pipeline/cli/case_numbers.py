"""Numbers of worked examples: from their text to scaled integers, and results back to exact fractions."""

from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, TypeAlias

from pipeline.core.credits import minor_step
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, Amount, Minor, Quantity, minor_units, scaled

#: A case's ``inputs``.
Inputs: TypeAlias = Mapping[str, Any]
#: What comes out, by the names that ``expected`` uses. Numbers are exact, in whole units; under names that end in
#: ``_cents``, in the currency's smallest unit.
Results: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[Inputs], Results]


def decimal_of(value: object) -> Decimal:
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"expected a number, got {value!r}") from None


def quantity_of(value: object) -> Quantity:
    return scaled(decimal_of(value), QUANTITY_DECIMALS)


def amount_of(value: object) -> Amount:
    return scaled(decimal_of(value), AMOUNT_DECIMALS)


def currency_of(inputs: Inputs) -> str:
    return str(inputs.get("currency", "USD"))


def named_amount(inputs: Inputs, name: str) -> Amount:
    """The input of a name, in whole units, or of the same name with ``_cents``, in the smallest unit."""
    cents = f"{name}_cents" if name else "cents"
    if cents in inputs:
        exact = decimal_of(inputs[cents]) * minor_step(currency_of(inputs))
        return scaled(exact, 0)
    return amount_of(inputs[name or "amount"])


def units_of(quantity: Quantity) -> Fraction:
    return Fraction(quantity, 10**QUANTITY_DECIMALS)


def money_of(amount: Amount) -> Fraction:
    return Fraction(amount, 10**AMOUNT_DECIMALS)


def both(name: str, amount: Minor, currency: str) -> Results:
    """A rounded amount under its name in whole units, and with ``_cents`` in the smallest."""
    return {name: Fraction(amount, 10 ** minor_units(currency)), f"{name}_cents": Fraction(amount)}
