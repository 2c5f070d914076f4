"""The price list of a run, its versions, and what a quantity costs: exact fractions straight from the list.

Nothing here is the product's, so that its arithmetic is held against another one. Quantities and prices are texts in
the list, as in a price file, and fractions as soon as they are reckoned with.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from random import Random
from typing import Any

PLAN = "chaos"
METERS: list[dict[str, Any]] = [
    {"id": "input", "event_type": "llm.request", "aggregation": "sum", "value": "input_tokens", "unit": "token"},
    {"id": "output", "event_type": "llm.request", "aggregation": "sum", "value": "output_tokens", "unit": "token"},
    {
        "id": "requests",
        "event_type": "llm.request",
        "aggregation": "count",
        "unit": "request",
        "filters": {"model": ["small", "large"]},
    },
    {"id": "bytes", "event_type": "api.call", "aggregation": "sum", "value": "bytes", "unit": "byte"},
]
_METER = {meter["id"]: meter for meter in METERS}


def charges(seed: int, version: int) -> list[dict[str, Any]]:
    """The charges of one version of the plan, one of every model."""
    rng = Random(f"{seed}/prices/{version}")

    def price(decimals: int) -> str:
        return f"0.{rng.randrange(1, 10**decimals):0{decimals}d}"

    return [
        {
            "id": "input-tokens",
            "meter": "input",
            "model": "graduated",
            "included": "1000",
            "tiers": [
                {"up_to": "20000", "unit_price": price(6), "flat": price(2)},
                {"up_to": "150000.5", "unit_price": price(9)},
                {"unit_price": price(18), "flat": price(3)},
            ],
        },
        {
            "id": "output-tokens",
            "meter": "output",
            "model": "volume",
            "tiers": [{"up_to": "5000", "unit_price": price(5)}, {"unit_price": price(12), "flat": price(1)}],
        },
        {"id": "requests", "meter": "requests", "model": "package", "package_size": "7", "package_price": price(18)},
        {"id": "bytes", "meter": "bytes", "model": "per_unit", "unit_price": price(15)},
    ]


def write_price_file(path: Path, seed: int, version: int) -> Path:
    """The price file of a version. JSON is YAML too."""
    # Each version's segment has all of the included units: what shortens them is proven elsewhere.
    plan = {"id": PLAN, "name": "Chaos", "currency": "USD", "prorate": "none", "charges": charges(seed, version)}
    path.write_text(json.dumps({"meters": METERS, "plans": [plan]}))
    return path


def write_account_file(path: Path, zones: dict[str, str]) -> Path:
    """The file of these accounts (id → time zone), each with one contract."""
    contracts = [{"plan": PLAN, "start": "2020-01-01"}]
    accounts = [{"id": name, "name": name, "time_zone": zone, "contracts": contracts} for name, zone in zones.items()]
    path.write_text(json.dumps({"accounts": accounts}))
    return path


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the plan as it was published."""

    number: int
    valid_from_us: int
    charges: list[dict[str, Any]]


class PriceList:
    """All versions of the plan, by the time of an event."""

    def __init__(self, versions: Sequence[Version]) -> None:
        self._versions = sorted(versions, key=lambda version: version.valid_from_us)
        self._starts = [version.valid_from_us for version in self._versions]

    def at(self, at_us: int) -> Version:
        return self._versions[bisect_right(self._starts, at_us) - 1]

    def numbered(self, number: int) -> Version:
        return next(version for version in self._versions if version.number == number)


def measure(version: Version, event_type: str, properties: dict[str, str]) -> dict[str, Fraction] | str:
    """Quantity by charge, or the reason the event is refused for."""
    found: dict[str, Fraction] = {}
    metered = False
    for charge in version.charges:
        meter = _METER[charge["meter"]]
        if meter["event_type"] != event_type:
            continue
        metered = True
        if any(properties.get(name) not in values for name, values in meter.get("filters", {}).items()):
            continue
        if meter["aggregation"] == "count":
            found[charge["id"]] = Fraction(1)
            continue
        quantity = _number(properties.get(meter["value"]))
        if isinstance(quantity, str):
            return quantity
        found[charge["id"]] = quantity
    return found if metered else "no_charge"


def _number(text: str | None) -> Fraction | str:
    if text is None:
        return "missing_property"
    try:
        value = Decimal(text)
    except InvalidOperation:
        return "not_a_number"
    if not value.is_finite():
        return "not_finite"
    exact = Fraction(value)
    if exact < 0:
        return "negative_quantity"
    if exact >= 10**18:
        return "quantity_too_large"
    return "quantity_too_precise" if (exact * 10**9).denominator != 1 else exact


def cost(charge: dict[str, Any], quantity: Fraction) -> Fraction:
    """What a counter costs at this quantity, rounded once, half up, to 12 decimals."""
    units = max(quantity - Fraction(charge.get("included", "0")), Fraction(0))
    total = Fraction(0)
    match charge["model"]:
        case "per_unit":
            total = units * Fraction(charge["unit_price"])
        case "package":
            total = ceil(units / Fraction(charge["package_size"])) * Fraction(charge["package_price"])
        case "volume":
            tier = next(tier for tier in charge["tiers"] if "up_to" not in tier or units <= Fraction(tier["up_to"]))
            total = units * Fraction(tier["unit_price"]) + Fraction(tier.get("flat", "0"))
        case "graduated":
            below = Fraction(0)
            for number, tier in enumerate(charge["tiers"]):
                top = min(units, Fraction(tier["up_to"])) if "up_to" in tier else units
                if top > below or number == 0:
                    total += (top - below) * Fraction(tier["unit_price"]) + Fraction(tier.get("flat", "0"))
                    below = top
    return Fraction(floor(total * 10**12 + Fraction(1, 2)), 10**12)
