"""Coupons in their sequence: what each takes, of which lines, and never more than there is."""

from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.discounts import Coupon, check_coupon, invoice_discounts, line_discounts, usable
from pipeline.core.items import Item, Limits
from pipeline.core.money import AMOUNT_DECIMALS
from pipeline.core.parties import CustomerCoupon

CENT = 10 ** (AMOUNT_DECIMALS - 2)


def percent(of: str, *charges: str, **more: Any) -> Coupon:
    return Coupon(f"{of}%", 1, f"{of} percent", percent=Decimal(of), charges=frozenset(charges), **more)


def amount(cents: int, *charges: str, **more: Any) -> Coupon:
    return Coupon(f"{cents}c", 1, "", amount=cents * CENT, currency="EUR", charges=frozenset(charges), **more)


def item(id: str, cents: int, **more: Any) -> Item:
    return Item(id, cents * CENT, charge=more.pop("charge", id), **more)


def limited(id: str, gross: int, cents: int, limits: Limits) -> Item:
    return item(id, cents, charge="c", gross=gross * CENT, limits=limits)


def off_lines(items: Sequence[Item], *coupons: Coupon) -> list[tuple[str | None, int]]:
    return [(discount.line, discount.amount) for discount in line_discounts(items, coupons, "EUR")]


# -- line coupons


def test_a_percentage_is_rounded_once_on_each_line() -> None:
    items = [item("a", 105), item("b", 15), item("c", -105)]
    assert off_lines(items, percent("10", level="line")) == [("a", 11), ("b", 2), ("c", -11)]


def test_an_amount_is_split_over_the_lines_it_applies_to() -> None:
    items = [item("a1", 100, charge="a"), item("a2", 100, charge="a"), item("a3", 100, charge="a"), item("b", 100)]
    assert off_lines(items, amount(100, "a", level="line")) == [("a1", 34), ("a2", 33), ("a3", 33)]


def test_each_sees_what_those_before_it_left() -> None:
    items = [item("a", 1000)]
    assert off_lines(items, percent("10", level="line"), amount(100, level="line")) == [("a", 100), ("a", 100)]
    assert off_lines(items, amount(950, level="line"), percent("10", level="line")) == [("a", 950), ("a", 5)]
    assert off_lines(items, amount(950, level="line"), amount(950, level="line")) == [("a", 950), ("a", 50)]


def test_it_applies_to_charges_and_plans_and_to_no_commitment() -> None:
    items = [
        item("a", 1000, plan="basic"),
        item("b", 1000, plan="pro"),
        item("due", 1000, kind="commitment", plan="pro"),
    ]
    assert off_lines(items, percent("10", level="line", plans=frozenset({"pro"}))) == [("b", 100)]
    assert off_lines(items, percent("10", "a", level="line", plans=frozenset({"pro"}))) == []
    assert off_lines(items, percent("10")) == []


@pytest.mark.parametrize(
    ("gross", "minimum", "maximum", "of", "off"),
    [
        (10_000, None, None, "20", 2_000),
        (10_000, 9_000, None, "20", 1_000),
        (10_000, 10_000, None, "20", 0),
        (8_000, 9_000, None, "20", 0),
        (10_000, None, 9_000, "20", 1_000),
        (10_000, None, 7_000, "20", 0),
        (10_000, 7_500, 9_000, "20", 1_000),
        (10_000, 8_500, 9_000, "20", 500),
    ],
    ids=[
        "no limit",
        "down to the minimum",
        "at the minimum",
        "below the minimum",
        "from the maximum",
        "above the maximum still",
        "between both",
        "from the maximum to the minimum",
    ],
)
def test_maximum_and_minimum_hold_after_line_discounts(
    gross: int, minimum: int | None, maximum: int | None, of: str, off: int
) -> None:
    """Law 6: line discounts, then the maximum, then the minimum."""
    limits = Limits("c", *(None if limit is None else limit * CENT for limit in (maximum, minimum)))
    priced = limits.applied(gross * CENT) // CENT
    items = [limited("a", gross, priced, limits)]
    assert sum(cents for _, cents in off_lines(items, percent(of, level="line"))) == off


def test_limits_hold_over_all_lines_of_a_charge() -> None:
    """100.00 + 50.00 under a maximum of 120.00; without 20 % of the first line 130.00: the maximum still."""
    limits = Limits("c", maximum=12_000 * CENT)
    items = [limited("a", 10_000, 8_000, limits), limited("b", 5_000, 4_000, limits)]
    assert off_lines(items, Coupon("x", 1, "", "line", percent=Decimal(20), plans=frozenset({"none"}))) == []
    items[0] = Item("a", 8_000 * CENT, plan="p", charge="c", gross=10_000 * CENT, limits=limits)
    on_a = Coupon("x", 1, "", "line", percent=Decimal(20), plans=frozenset({"p"}))
    assert off_lines(items, on_a) == []
    half = Coupon("x", 1, "", "line", percent=Decimal(50), plans=frozenset({"p"}))
    assert off_lines(items, half) == [("a", 2_000)]


def test_no_line_is_discounted_below_0_by_rounding() -> None:
    """Two lines of 0.4 cents are 0.00 each; free they would be 0.8 cents less together, one cent rounded."""
    limits = Limits("c", maximum=8 * CENT // 10)
    lines = [Item(id, 4 * CENT // 10, charge="c", gross=100 * CENT, limits=limits) for id in "ab"]
    assert off_lines(lines, percent("100", level="line")) == []


def test_two_coupons_share_what_a_minimum_leaves() -> None:
    limits = Limits("c", minimum=9_000 * CENT)
    items = [limited("a", 10_000, 10_000, limits)]
    both = percent("10", level="line"), percent("10", level="line")
    assert off_lines(items, *both) == [("a", 526), ("a", 474)]  # 1,000 in proportion to 1,000 and 900


# -- invoice coupons


def off_invoice(cents: Sequence[int], *coupons: Coupon) -> tuple[list[int], list[int]]:
    items = [item("abcdefgh"[number], one) for number, one in enumerate(cents)]
    discounts, borne = invoice_discounts(items, cents, coupons, "EUR")
    return [discount.amount for discount in discounts], borne


@pytest.mark.parametrize(
    ("cents", "coupons", "taken", "borne"),
    [
        ([10_000], [percent("10"), percent("10")], [1_000, 900], [1_900]),
        ([5_000], [amount(3_000), amount(3_000)], [3_000, 2_000], [5_000]),
        ([100, 100, 100], [amount(100)], [100], [34, 33, 33]),
        ([105], [percent("10")], [11], [11]),
        ([1_000, 1_000], [amount(500, "a"), percent("50")], [500, 750], [750, 500]),
        ([1_000, -400], [percent("10")], [60], [100, -40]),
        ([1_000, -1_000], [percent("10"), amount(5)], [], [0, 0]),
        ([1_000, -2_000], [amount(5)], [], [0, 0]),
        ([1_000, -2_000], [amount(500, "a")], [500], [500, 0]),
        ([4], [percent("10")], [], [0]),
        ([1], [percent("100")], [1], [1]),
        ([0, 0], [percent("100"), amount(5)], [], [0, 0]),
        ([100], [percent("10", level="line")], [], [0]),
        ([], [percent("10")], [], []),
    ],
    ids=[
        "one after the other",
        "down to 0 and no further",
        "shares add up",
        "half up",
        "one on a line, one on what is left",
        "a line below 0 bears less than nothing",
        "lines that cancel out",
        "lines below 0",
        "on the line above 0 alone",
        "rounded to nothing",
        "all of it",
        "nothing to take from",
        "a line coupon",
        "no line",
    ],
)
def test_invoice_coupons(cents: list[int], coupons: list[Coupon], taken: list[int], borne: list[int]) -> None:
    assert off_invoice(cents, *coupons) == (taken, borne)


COUPONS = st.lists(
    st.one_of(
        st.builds(
            lambda of, on: percent(str(of), *on),
            st.decimals("0.01", "100", places=2),
            st.sets(st.sampled_from("abcd")),
        ),
        st.builds(lambda cents, on: amount(cents, *on), st.integers(1, 5_000), st.sets(st.sampled_from("abcd"))),
    ),
    max_size=4,
)


@given(st.lists(st.integers(0, 5_000), max_size=5), COUPONS)
def test_no_line_is_taken_below_0_and_shares_add_up(cents: list[int], coupons: list[Coupon]) -> None:
    items = [item("abcde"[number], one) for number, one in enumerate(cents)]
    discounts, borne = invoice_discounts(items, cents, coupons, "EUR")
    assert sum(discount.amount for discount in discounts) == sum(borne)
    assert all(0 <= part <= whole for part, whole in zip(borne, cents, strict=True))
    exact = dict.fromkeys("abcde", Fraction(0))
    for discount in discounts:
        assert sum(share for _, share in discount.shares) == discount.amount * CENT
        for id, share in discount.shares:
            exact[id] += Fraction(share, CENT)
    assert all(abs(part - exact[one.id]) < 1 for part, one in zip(borne, items, strict=True))


# -- which coupons count


def test_usable_ones_in_the_customers_sequence() -> None:
    coupons = {
        coupon.id: coupon
        for coupon in (
            Coupon("forever", 1, "", percent=Decimal(10)),
            Coupon("once", 1, "", percent=Decimal(10), uses=1),
            Coupon("thrice", 1, "", percent=Decimal(10), uses=3),
            Coupon("dollars", 1, "", amount=100 * CENT, currency="USD"),
        )
    }
    given = [
        CustomerCoupon("thrice", date(2026, 1, 1)),
        CustomerCoupon("once", date(2026, 1, 1)),
        CustomerCoupon("dollars", date(2026, 1, 1)),
        CustomerCoupon("forever", date(2026, 2, 1), date(2026, 4, 1)),
    ]

    def ids(day: date, **used: int) -> list[str]:
        return [coupon.id for coupon in usable(given, coupons, used, day, "EUR")]

    assert ids(date(2026, 1, 31)) == ["thrice", "once"]
    assert ids(date(2026, 2, 1), once=1, thrice=2) == ["thrice", "forever"]
    assert ids(date(2026, 4, 1), once=1, thrice=3) == []
    with pytest.raises(ValueError, match="expected a coupon of dollars, forever, once, thrice, got 'lost'"):
        usable([CustomerCoupon("lost", date(2026, 1, 1))], coupons, {}, date(2026, 1, 1), "EUR")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected a percentage or an amount, got neither"),
        ({"percent": Decimal(5), "amount": CENT, "currency": "EUR"}, "expected a percentage or an amount, got both"),
        ({"percent": Decimal(0)}, "expected a percentage above 0 up to 100, got 0"),
        ({"percent": Decimal("100.01")}, "expected a percentage above 0 up to 100, got 100.01"),
        ({"percent": Decimal("NaN")}, "expected a percentage above 0 up to 100, got NaN"),
        ({"amount": CENT}, "expected a currency with an amount, and only then"),
        ({"percent": Decimal(5), "currency": "EUR"}, "expected a currency with an amount, and only then"),
        ({"amount": CENT, "currency": "JPY"}, "expected an amount above 0 in steps of JPY's smallest unit"),
        ({"amount": 0, "currency": "EUR"}, "expected an amount above 0 in steps of EUR's smallest unit"),
        ({"percent": Decimal(5), "uses": 0}, "expected 1 use or more, got 0"),
    ],
)
def test_a_coupon_that_cannot_be_applied(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"coupon x: {message}"):
        check_coupon(Coupon("x", 1, "", **given))


def test_an_amount_of_another_currency_is_refused() -> None:
    dollars = Coupon("x", 1, "", amount=CENT, currency="USD")
    with pytest.raises(ValueError, match="coupon x: expected an amount in EUR, got one in USD"):
        invoice_discounts([item("a", 5)], [5], [dollars], "EUR")
