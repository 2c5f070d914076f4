"""The taxes of a document's line as its ``detail`` keeps them, to JSON and back: key ``taxes``, in their order.

Amounts are strings of whole units with the currency's decimals, as everywhere in JSON.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from pipeline.core.money import Minor, minor_decimal, plain, to_minor
from pipeline.core.tax import LineTax, Tax


def as_json(taxes: Iterable[LineTax], currency: str) -> list[dict[str, str]]:
    """For ``detail["taxes"]``; ``from_json`` reads it back without loss."""
    return [
        {
            "tax": one.tax.tax,
            "treatment": one.tax.treatment,
            "country": one.tax.country,
            "percent": plain(one.tax.percent),
            "note": one.tax.note,
            "base": _text(one.base, currency),
            "amount": _text(one.amount, currency),
        }
        for one in taxes
    ]


def from_json(taxes: Iterable[Mapping[str, Any]], currency: str) -> tuple[LineTax, ...]:
    """What ``as_json`` wrote. Raises KeyError for a missing field, ValueError for an amount of too many decimals."""
    return tuple(
        LineTax(
            Tax(one["tax"], one["treatment"], one["country"], Decimal(one["percent"]), one["note"]),
            _minor(one["base"], currency),
            _minor(one["amount"], currency),
        )
        for one in taxes
    )


def _text(amount: Minor, currency: str) -> str:
    return str(minor_decimal(amount, currency))


def _minor(text: str, currency: str) -> Minor:
    return to_minor(Decimal(text), currency)
