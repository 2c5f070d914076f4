"""Our own worked examples, with their arithmetic in their notes, for what others' leave open."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.cases import run

FILES = sorted(Path(__file__).parent.glob("*.json"))
CASES = [case for file in FILES for case in json.loads(file.read_text())]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_case(case: dict[str, Any]) -> None:
    assert run(case).differences == ()
    assert case["note"]


def test_ids_are_unique() -> None:
    assert len({case["id"] for case in CASES}) == len(CASES)


def altered(expected: Any) -> Iterator[Any]:
    """The expectation with each of its values in turn a step off."""
    if not isinstance(expected, dict | list):
        try:
            number = Decimal(str(expected))
        except ArithmeticError:
            yield f"not {expected}"
        else:
            yield str(number + Decimal(1).scaleb(number.as_tuple().exponent))
        return
    for key in expected if isinstance(expected, dict) else range(len(expected)):
        for value in altered(expected[key]):
            changed = deepcopy(expected)
            changed[key] = value
            yield changed


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_step_off_fails(case: dict[str, Any]) -> None:
    assert list(altered(case["expected"]))
    for expected in altered(case["expected"]):
        (difference,) = run({**case, "expected": expected}).differences
        assert ": expected " in difference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "per_unnit"}, "expected a model of "),
        ({"inputs": {"unit": "2"}}, "expected an input 'quantity', got none"),
        ({"inputs": {"unit": "x", "quantity": "1"}}, "cannot be priced: expected a number, got 'x'"),
        ({"inputs": {"unit": "-1", "quantity": "1"}}, "cannot be priced: charge case: expected a unit_price of 0"),
        (
            {"model": "unit_conversion", "inputs": {"unit": "2", "quantity": "5", "divide_by": "0"}},
            "cannot be priced: ",
        ),
        ({"inputs": ["2", "5"]}, "cannot be priced: "),
        ({"inputs": {"unit": "1e999999999", "quantity": "5"}}, "cannot be priced: "),
        ({"expected": {"surprise": "1"}}, "surprise: expected 1, got no such result"),
        ({"expected": {"tier_amounts": ["1", "2"]}}, r"tier_amounts: expected .*, got \[10\]"),
    ],
    ids=[
        "unknown model",
        "an input missing",
        "no number",
        "no price",
        "a division by 0",
        "no object",
        "too great",
        "unknown result",
        "another length",
    ],
)
def test_what_cannot_be_compared_fails(change: dict[str, Any], message: str) -> None:
    case = {"id": "c", "model": "per_unit", "inputs": {"unit": "2", "quantity": "5"}, "expected": {"total": "10"}}
    assert run(case).differences == ()
    (difference,) = run({**case, **change}).differences
    assert re.search(message, difference)
