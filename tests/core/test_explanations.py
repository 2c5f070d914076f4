"""Explanations: words made of the numbers beside them, and parts that add up."""

from collections.abc import Mapping
from dataclasses import asdict
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.catalog import Segment
from pipeline.core.charges import Cell, Charge, Tier, compile_price, event_shares, tier_shares
from pipeline.core.closing import Closing, Member, Span, closing_price
from pipeline.core.contracts import Contract
from pipeline.core.explanations import Wording, explain_parts, explain_share, explain_span
from pipeline.core.meters import Meter
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, QUANTITY_ONE, scaled
from pipeline.core.periods import Period
from pipeline.core.plans import Plan
from pipeline.core.proration import WHOLE, Portion

UNIT = QUANTITY_ONE
DAY_US = 86_400_000_000
OCTOBER = Period(0, 31 * DAY_US)
CALLS = Meter("calls", 1, "call", "sum", "n", "call", (), False, 0)
TIERS = (Tier(100 * UNIT, Decimal("0.1"), Decimal(5)), Tier(None, Decimal("0.05")))


def charge(model: Any, **fields: Any) -> Charge:
    return Charge("c", None if model == "flat" else "calls", model, **fields)


def texts(charge: Charge, quantity: int, cell: tuple[str, ...] = (), pooled: int = 0, share: str = "") -> list[str]:
    wording = Wording(charge, "call", "USD", cell, share)
    return [part.text for part in explain_parts(tier_shares(charge, quantity * UNIT, cell, pooled * UNIT), wording)]


@pytest.mark.parametrize(
    ("priced", "quantity", "options", "expected"),
    [
        pytest.param(charge("per_unit", unit_price=Decimal("0.05")), 1, {}, ["1 call at 0.05 USD each"], id="one unit"),
        pytest.param(
            charge("per_unit", unit_price=Decimal("0.05"), included=10 * UNIT),
            2_010,
            {"pooled": 5, "share": "15 of 31 days"},
            [
                "5 calls from the shared pool: free",
                "10 calls included, for 15 of 31 days: free",
                "1,995 calls at 0.05 USD each",
            ],
            id="pool, then included, then priced",
        ),
        pytest.param(
            charge("graduated", tiers=TIERS),
            1_234,
            {},
            [
                "the first 100 calls at 0.1 USD each, and 5 USD flat",
                "1,134 calls over 100 up to 1,234 at 0.05 USD each",
            ],
            id="graduated",
        ),
        pytest.param(
            charge("graduated", tiers=TIERS), 0, {}, ["5 USD flat, due without usage"], id="a flat fee at zero"
        ),
        pytest.param(
            charge("volume", tiers=TIERS),
            101,
            {},
            ["all 101 calls at 0.05 USD each: the total is over 100 calls"],
            id="volume, last tier",
        ),
        pytest.param(
            charge("volume", tiers=TIERS, bound="exclusive"),
            99,
            {},
            ["all 99 calls at 0.1 USD each, and 5 USD flat: the total is below 100 calls"],
            id="volume, a bound that does not belong to it",
        ),
        pytest.param(
            charge("stairstep", tiers=(Tier(10 * UNIT, flat=Decimal(20)), Tier(None, flat=Decimal(30)))),
            3,
            {},
            ["3 calls: 20 USD for a total up to 10 calls"],
            id="stairstep",
        ),
        pytest.param(
            charge("package", package_size=100 * UNIT, package_price=Decimal(7)),
            101,
            {},
            ["2 packages of 100 calls, 7 USD each"],
            id="package",
        ),
        pytest.param(
            charge("graduated_percentage", tiers=(Tier(None, rate=Decimal("1.25")),)),
            400,
            {},
            ["the first 400 calls: 1.25 %"],
            id="percentage of tiers",
        ),
        pytest.param(
            charge("matrix", by=("size", "region"), unit_price=Decimal(1), cells=(Cell(("large", ""), Decimal(3)),)),
            2,
            {"cell": ("large", "")},
            ["2 calls (large, none) at 3 USD each"],
            id="matrix cell",
        ),
        pytest.param(
            charge("per_unit", unit_price=Decimal(1), maximum=Decimal(50)),
            80,
            {},
            ["80 calls at 1 USD each", "what lies above the maximum of 50 USD"],
            id="maximum",
        ),
    ],
)
def test_words(priced: Charge, quantity: int, options: Mapping[str, Any], expected: list[str]) -> None:
    assert texts(priced, quantity, **options) == expected


def test_words_of_single_events() -> None:
    percentage = charge(
        "percentage", rate=Decimal("1.2"), fixed=Decimal("0.3"), free_events=1, event_maximum=Decimal(40)
    )
    members = [Member(n, "", 100 * UNIT) for n in range(3)]
    assert [
        part.text for part in explain_parts(event_shares(percentage, members), Wording(percentage, "USD", "USD"))
    ] == [
        "1 event free, 100 USD in all",
        "2 events: 1.2 % of 200 and 0.3 USD each, at most 40 USD each",
    ]
    dynamic = charge("dynamic", amount_property="fee", multiplier=Decimal("1.5"))
    brought = [Member(0, "", UNIT, amount=10**12)]
    assert [part.text for part in explain_parts(event_shares(dynamic, brought), Wording(dynamic, "call", "EUR"))] == [
        "1 event at the amounts they brought, times 1.5"
    ]


def test_words_of_what_only_the_close_knows() -> None:
    seats = charge("flat", unit_price=Decimal(20), quantity=3 * UNIT)
    half = Span(0, 15 * DAY_US, OCTOBER)
    share = explain_span(half.start_us, half.end_us, half.period)
    (fee,) = explain_parts(closing_price(seats, None, [], half).parts, Wording(seats, "unit", "USD", (), share))
    assert (fee.text, fee.amount) == ("3 × 20 USD, for 15 of 31 days", Decimal("29.032258064516"))
    at_least = charge("per_unit", unit_price=Decimal(1), minimum=Decimal(62))
    _, missing = explain_parts(
        closing_price(at_least, CALLS, [Member(0, "", UNIT)], half).parts, Wording(at_least, "call", "USD", (), share)
    )
    assert missing.text == "what is missing to the minimum of 62 USD, for 15 of 31 days"
    assert missing.amount == 29


@pytest.mark.parametrize(
    ("end_us", "expected"),
    [
        (31 * DAY_US, ""),
        (DAY_US, "1 of 31 days"),
        (DAY_US // 2, "12 of 744 hours"),
        (1, "1 of 2,678,400,000,000 microseconds"),
    ],
)
def test_how_much_of_a_period(end_us: int, expected: str) -> None:
    assert explain_span(0, end_us, OCTOBER) == expected


@pytest.mark.parametrize(
    ("by", "portion", "expected"),
    [
        ("second", Portion(0, 15 * DAY_US, 31 * DAY_US), "15 of 31 days"),
        ("day", Portion(14, 31, 31), "17 of 31 days"),
        ("day", WHOLE, ""),
        ("period", WHOLE, ""),
        ("period", Portion(1, 1, 1), "no part: its first segment had all of it"),
    ],
)
def test_a_segment_s_share_as_its_plan_prorates(by: Any, portion: Portion, expected: str) -> None:
    plan = Plan("p", 1, "P", "USD", 0, (), prorate_by=by)
    contract = Contract("a-main", 1, "a", "p", 0, None)
    segment = Segment("a", contract, plan, OCTOBER, 0, 15 * DAY_US, (), portion=portion)
    assert explain_share(segment) == expected


# -- parts add up

prices = st.decimals(0, 1000, places=6)
bounds = st.lists(st.integers(1, 10**6), min_size=0, max_size=3, unique=True).map(sorted)


@st.composite
def charges(draw: st.DrawFn) -> Charge:
    model = draw(st.sampled_from(["per_unit", "graduated", "volume", "stairstep", "package", "block"]))
    included, maximum = draw(st.integers(0, 1000)) * UNIT // 7, draw(st.none() | prices)
    common: dict[str, Any] = {"included": included, "maximum": maximum}
    if model == "per_unit":
        return charge(model, unit_price=draw(prices), **common)
    size = draw(st.integers(1, 500)) * UNIT
    if model == "package":
        return charge(model, package_size=size, package_price=draw(prices), **common)
    tiers = tuple(
        Tier(
            None if bound is None else bound * UNIT, Decimal(0) if model == "stairstep" else draw(prices), draw(prices)
        )
        for bound in (*draw(bounds), None)
    )
    return charge(model, tiers=tiers, package_size=size if model == "block" else None, **common)


@given(charges(), st.integers(0, 10**7).map(lambda n: n * UNIT // 3), st.integers(0, 50).map(lambda n: n * UNIT))
def test_parts_add_up_to_price_and_quantity(priced: Charge, quantity: int, pooled: int) -> None:
    closing = Closing(quantity, 0, tuple(tier_shares(priced, quantity, (), pooled)))
    parts = [asdict(part) for part in explain_parts(closing.parts, Wording(priced, "call", "USD"))]
    if not pooled:
        cost = compile_price(priced)(quantity)
        assert sum(scaled(part["amount"], AMOUNT_DECIMALS) for part in parts) == cost
    covered = sum(scaled(part["quantity"], QUANTITY_DECIMALS) for part in parts)
    assert covered == quantity
    for part in parts:
        assert part["quantity"] == part["up_to"] - part["over"]
        assert part["text"]
    for before, after in pairwise(parts):
        assert before["up_to"] == after["over"]
