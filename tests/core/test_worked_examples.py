"""Worked examples of other billing systems, where they use a model of ours."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.charges import Charge, Tier, compile_price, tier_shares
from pipeline.core.money import amount_decimal, scaled

FILE = Path(__file__).parents[2].parent / "shared" / "cases" / "worked_examples.json"
MODELS = ("per_unit", "graduated", "volume", "package")
CASES = [case for case in json.loads(FILE.read_text()) if case["model"] in MODELS] if FILE.exists() else []

if not CASES:
    pytest.skip(f"no worked examples at {FILE.name}: they are not part of the repository", allow_module_level=True)


def charge(model: Any, inputs: dict[str, Any]) -> Charge:
    # Some examples stop at the last bound they need; ours go on, which changes nothing below it.
    lines = inputs.get("tiers", [])
    tiers = [
        Tier(
            None if line is lines[-1] else scaled(Decimal(line["up_to"]), 9),
            Decimal(line["unit"]),
            Decimal(line["flat"]),
        )
        for line in lines
    ]
    return Charge(
        "case",
        "case",
        model,
        unit_price=Decimal(inputs["unit"]) if "unit" in inputs else None,
        tiers=tuple(tiers),
        package_size=scaled(Decimal(inputs["package_size"]), 9) if "package_size" in inputs else None,
        package_price=Decimal(inputs["package_price"]) if "package_price" in inputs else None,
        included=scaled(Decimal(inputs.get("free_units", "0")), 9),
        flat_on_zero=inputs.get("flat_on_zero", True),
    )


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_worked_example(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    quantity = scaled(Decimal(inputs["quantity"]), 9)
    priced = charge(case["model"], inputs)
    assert amount_decimal(compile_price(priced)(quantity)) == Decimal(expected["total"])
    shares = tier_shares(priced, quantity)
    if "tier_amounts" in expected:
        assert [amount_decimal(share.amount) for share in shares] == [Decimal(a) for a in expected["tier_amounts"]]
    if "packages" in expected:
        assert shares[-1].packages == int(expected["packages"])
