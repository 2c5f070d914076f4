"""Prices of single events: a percentage of each, or the amount each brings."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.charges import Charge, check_charge, compile_event_price
from pipeline.core.money import amount_decimal, plain, scaled
from pipeline.core.reasons import Reason, Rejection, Stage

SHARE = Charge("c", "m", "percentage", rate=Decimal("1.2"), fixed=Decimal("0.10"))
GIVEN = Charge("c", "m", "dynamic", amount_property="price")
LIMITED = replace(
    SHARE, rate=Decimal("2.99"), fixed=Decimal(0), event_minimum=Decimal("1.75"), event_maximum=Decimal(12)
)

CASES = {
    "percentage and fixed fee": (SHARE, "50", {}, "0.7"),
    "percentage of nothing: the fixed fee": (SHARE, "0", {}, "0.1"),
    "percentage, given back costs what nothing costs": (SHARE, "-50", {}, "0.1"),
    "percentage, at least": (LIMITED, "10", {}, "1.75"),
    "percentage, in between": (LIMITED, "80", {}, "2.392"),
    "percentage, at most": (LIMITED, "10000", {}, "12"),
    "percentage, rounded once half up": (replace(SHARE, rate=Decimal("5E-9"), fixed=Decimal(0)), "0.01", {}, "1E-12"),
    "percentage, free events are the close's matter": (replace(SHARE, free_events=9), "50", {}, "0.7"),
    "a given amount": (GIVEN, "7", {b"price": b"0.70"}, "0.7"),
    "a given amount, marked up": (replace(GIVEN, multiplier=Decimal("1.33333")), "1", {b"price": b"10"}, "13.3333"),
    "a given amount, at most": (replace(GIVEN, event_maximum=Decimal(5)), "1", {b"price": b"10"}, "5"),
    "a given amount, at least": (replace(GIVEN, event_minimum=Decimal(5)), "1", {b"price": b"0"}, "5"),
    "a given amount of twelve decimals": (GIVEN, "1", {b"price": b"0.000000000001"}, "1E-12"),
}


@pytest.mark.parametrize(("charge", "quantity", "properties", "expected"), CASES.values(), ids=CASES)
def test_event_price(charge: Charge, quantity: str, properties: dict[bytes, bytes], expected: str) -> None:
    check_charge(charge)
    amount = compile_event_price(charge)(scaled(Decimal(quantity), 9), properties)
    assert isinstance(amount, int)
    assert plain(amount_decimal(amount)) == plain(Decimal(expected))


@pytest.mark.parametrize(
    ("properties", "reason", "message"),
    [
        ({}, Reason.MISSING_PROPERTY, "expected an amount as price, got no such property"),
        ({b"price": b"ten"}, Reason.NOT_A_NUMBER, "got 'ten'"),
        ({b"price": b"NaN"}, Reason.NOT_FINITE, "got 'NaN'"),
        ({b"price": b"1e18"}, Reason.QUANTITY_TOO_LARGE, "at most 18 digits"),
        ({b"price": b"1e-13"}, Reason.QUANTITY_TOO_PRECISE, "12 after the point"),
        ({b"price": b"-1"}, Reason.NEGATIVE_QUANTITY, "an amount of 0 or more"),
        ({b"price": b"x" * 100}, Reason.NOT_A_NUMBER, "xxx…'"),
    ],
    ids=["none", "no number", "not finite", "too large", "too precise", "negative", "long: quoted in part"],
)
def test_refuses_an_amount(properties: dict[bytes, bytes], reason: Reason, message: str) -> None:
    refused = compile_event_price(GIVEN)(10**9, properties)
    assert isinstance(refused, Rejection)
    assert (refused.stage, refused.reason) == (Stage.RATE, reason)
    assert message in refused.message


def test_prices_no_single_event_of_other_models() -> None:
    with pytest.raises(ValueError, match="a model that prices single events, got per_unit"):
        compile_event_price(Charge("c", "m", "per_unit", unit_price=Decimal(1)))


@given(
    st.decimals(0, 100, places=16, allow_nan=False),
    st.decimals(0, 10, places=18, allow_nan=False),
    st.integers(0, 10**27),
)
def test_a_percentage_equals_fractions_rounded_once(rate: Decimal, fixed: Decimal, quantity: int) -> None:
    exact = (Fraction(quantity, 10**9) * Fraction(rate) / 100 + Fraction(fixed)) * 10**12
    price = compile_event_price(replace(SHARE, rate=rate, fixed=fixed))
    assert price(quantity, {}) == (exact + Fraction(1, 2)).__floor__()
