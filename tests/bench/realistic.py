"""A catalog as a company has it after some years, and usage that meets all of it.

50 plans, 1,000 accounts, 100 of them with prices of their own. Five charges per event type: tiers, a matrix by model
and region, calls with some included, packages, and a share of what was spent. Every event makes five rows.
"""

import random
import time
from decimal import Decimal
from typing import Any

from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Item
from pipeline.core.meters import Filter, Meter
from pipeline.core.plans import Override, Plan, PriceList
from tests.bench import world

PLANS, OVERRIDES = 50, 100
#: Rows that an event makes.
CHARGES = 5
_MODELS, _REGIONS = ("small", "medium", "large"), ("eu", "us", "ap")
_UNIT = 10**9
_DAY_US = 86_400_000_000


def catalog() -> list[Item]:
    items: list[Item] = [meter for kind in world.TYPES for meter in _meters(kind)]
    for number in range(PLANS):
        charges = tuple(charge for kind in world.TYPES for charge in _charges(kind, number))
        items.append(Plan(f"plan-{number}", 1, f"Plan {number}", "USD", 0, charges))
    for number in range(world.ACCOUNTS):
        account, plan = f"acct-{number:05d}", f"plan-{number % PLANS}"
        items.append(Account(account, 1, account, "UTC"))
        items.append(Contract(f"{account}-main", 1, account, plan, 0, None))
        if number < OVERRIDES:
            cheaper = tuple(Override(f"c-{kind}-calls", (("unit_price", Decimal("0.0003")),)) for kind in world.TYPES)
            items.append(PriceList(f"deal-{number}", 1, "Deal", plan, "USD", 0, cheaper, account=account))
    return items


def _meters(kind: str) -> list[Meter]:
    def meter(name: str, aggregation: Any = "sum", *filters: Filter) -> Meter:
        value = name if aggregation == "sum" else None
        return Meter(f"m-{kind}-{name}", 1, kind, aggregation, value, "unit", filters, False, 0)

    by_model = Filter("model", _MODELS)
    return [meter("input"), meter("output"), meter("calls", "count"), meter("bytes", "sum", by_model), meter("spend")]


def _charges(kind: str, number: int) -> list[Charge]:
    base = Decimal(2000 + 137 * number) / 10**9

    def charge(name: str, model: Any, **prices: Any) -> Charge:
        return Charge(f"c-{kind}-{name}", f"m-{kind}-{name}", model, **prices)

    tiers = (
        Tier(20_000 * _UNIT, base * 4),
        Tier(150_000 * _UNIT, base * 3),
        Tier(None, base * 2),
    )
    cells = tuple(
        Cell((model, region), base * (3 + at + len(region)))
        for at, model in enumerate(_MODELS)
        for region in _REGIONS[:2]
    )
    return [
        charge("input", "graduated", tiers=tiers),
        charge("output", "matrix", unit_price=base * 5, by=("model", "region"), cells=cells),
        charge("calls", "per_unit", unit_price=Decimal("0.0005"), included=1000 * _UNIT),
        charge("bytes", "package", package_size=1_000_000 * _UNIT, package_price=Decimal("0.01")),
        charge("spend", "percentage", rate=Decimal("2.9"), fixed=Decimal("0.002")),
    ]


def events(count: int, seed: int = 7) -> list[world.Message]:
    """Times rise over 19 days up to yesterday; every event has all that the charges ask for."""
    dice = random.Random(seed)
    now = time.time_ns() // 1000
    first, last = now - 20 * _DAY_US, now - _DAY_US
    return [
        world.message(
            key=f"{dice.getrandbits(128):032x}",
            account=f"acct-{dice.randrange(world.ACCOUNTS):05d}",
            event_type=world.TYPES[dice.random() < 0.3],
            timestamp=first + number * (last - first) // count,
            sequence=number + 1,
            properties={
                "input": str(dice.randrange(1, 2001)),
                "output": str(dice.randrange(1, 501)),
                "bytes": str(dice.randrange(1, 100_000)),
                "spend": f"{dice.randrange(1, 5000) / 100:.2f}",
                "model": _MODELS[dice.randrange(3)],
                "region": _REGIONS[number % 3],
            },
        )
        for number in range(count)
    ]
