"""The discounts of a document's line as its ``detail`` keeps them, to JSON and back: key ``discounts``.

Amounts are strings of whole units with the currency's decimals, as everywhere in JSON.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from pipeline.core.discounts import LineDiscount
from pipeline.core.money import Minor, minor_decimal, to_minor


def as_json(discounts: Iterable[LineDiscount], currency: str) -> list[dict[str, Any]]:
    """For ``detail["discounts"]``; ``from_json`` reads it back without loss."""
    return [
        {
            "coupon": one.coupon,
            "grant": one.grant,
            "name": one.name,
            "shared": one.shared,
            "after_tax": one.after_tax,
            "amount": str(minor_decimal(one.amount, currency)),
        }
        for one in discounts
    ]


def from_json(detail: Mapping[str, Any], discount: Minor, currency: str) -> tuple[LineDiscount, ...]:
    """What ``as_json`` wrote into a line's detail; of one from before it was kept, ``discount`` under no name.

    Raises KeyError for a missing field, ValueError for an amount of too many decimals.
    """
    if "discounts" not in detail:
        return (LineDiscount(discount, shared=True),) if discount else ()
    return tuple(
        LineDiscount(
            to_minor(Decimal(one["amount"]), currency),
            one["coupon"],
            one["grant"],
            one["name"],
            one["shared"],
            one["after_tax"],
        )
        for one in detail["discounts"]
    )
