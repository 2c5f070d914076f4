"""Fees in advance: which are due, and that a close bills their difference, whatever changed meanwhile."""

from collections import defaultdict
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.catalog import Catalog
from pipeline.core.charges import Charge
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle
from pipeline.core.documents import Entry, Item, kind_of, to_document
from pipeline.core.fees import FeeKey, due_in_advance, fees_of
from pipeline.core.money import amount_decimal, plain
from pipeline.core.periods import Period, parse_instant
from pipeline.core.plans import Plan
from pipeline.core.proration import change, remaining
from pipeline.core.rerating import close_period


def at(day: str) -> int:
    return parse_instant(f"{day}T00:00:00Z")


FEE = Charge("base", None, "flat", unit_price=Decimal(30), in_advance=True)
ARREARS = Charge("support", None, "flat", unit_price=Decimal(9))
BASIC = Plan("basic", 1, "Basic", "EUR", 0, (FEE, ARREARS))
PRO = Plan("pro", 1, "Pro", "EUR", 0, (replace(FEE, unit_price=Decimal(90)), ARREARS))
ACCOUNT = Account("a", 1, "A", "UTC")
CONTRACT = Contract("a-main", 1, "a", "basic", at("2026-01-01"), None)
SEPTEMBER = Period(at("2026-09-01"), at("2026-10-01"))
#: On day 11 of 30 the customer changes to the dearer plan.
UPGRADED = replace(CONTRACT, version=2, later_phases=(Phase(at("2026-09-11"), "pro"),))


def catalog(*items: Item) -> Catalog:
    entries = [
        Entry(kind_of(item), item.id, item.version, getattr(item, "valid_from_us", 0), to_document(item))
        for item in items
    ]
    return Catalog.empty().extend(entries, len(entries))


def amounts(catalog: Catalog, at_us: int) -> list[tuple[str, str, str]]:
    found = due_in_advance(catalog, "a", at_us)
    return [(fee.segment.contract.id, fee.charge.id, plain(amount_decimal(fee.amount))) for fee in found]


def billed(before: Catalog, after: Catalog, period: Period) -> dict[FeeKey, int]:
    """What the period's document bills of the fee in advance: what should be minus what was booked."""
    billed: defaultdict[FeeKey, int] = defaultdict(int)
    for line in close_period(after, "a", period, []).lines:
        if line.charge.in_advance:
            billed[FeeKey(line.segment.contract.id, line.charge.id, line.segment.start_us)] += line.amount
    for fee in fees_of(before, "a", period):
        billed[fee.key] -= fee.amount
    return {key: amount for key, amount in billed.items() if amount}


def test_the_fee_of_the_period_that_begins_is_due() -> None:
    known = catalog(ACCOUNT, CONTRACT, BASIC)
    assert amounts(known, SEPTEMBER.start_us) == [("a-main", "base", "30")]
    assert due_in_advance(known, "a", SEPTEMBER.start_us)[0].segment.period == SEPTEMBER
    assert amounts(known, at("2025-12-31")) == [], "the contract has not begun"
    assert amounts(catalog(ACCOUNT, replace(CONTRACT, end_us=at("2026-09-01")), BASIC), at("2026-09-01")) == []
    assert due_in_advance(known, "nobody", SEPTEMBER.start_us) == ()


def test_what_is_known_to_change_in_the_period_is_due_as_it_will_be() -> None:
    assert amounts(catalog(ACCOUNT, UPGRADED, BASIC, PRO), SEPTEMBER.start_us) == [
        ("a-main", "base", "10"),
        ("a-main", "base", "60"),
    ]


def test_a_year_in_advance_is_due_as_long_as_it_lasts() -> None:
    """Beside a contract by months: whichever month closes finds it, and bills the difference to what was booked."""
    yearly = Contract("a-year", 1, "a", "pro", at("2026-04-01"), None, cycle=Cycle("year", 1, 4))
    known = catalog(ACCOUNT, CONTRACT, BASIC, yearly, PRO)
    for month in ("2026-04-01", "2026-09-01", "2027-03-01"):
        assert sorted(amounts(known, at(month))) == [("a-main", "base", "30"), ("a-year", "base", "90")]
    assert {fee.key for fee in due_in_advance(known, "a", at("2026-04-01"))}.issuperset(
        fee.key for fee in due_in_advance(known, "a", at("2027-03-01")) if fee.segment.contract.id == "a-year"
    )


def test_nothing_is_due_in_a_trial() -> None:
    trial = replace(CONTRACT, trial_days=20)
    assert amounts(catalog(ACCOUNT, trial, BASIC), at("2026-01-01")) == [("a-main", "base", "10.645161290323")]


def test_a_period_that_went_as_foreseen_bills_its_fee_no_more() -> None:
    known = catalog(ACCOUNT, CONTRACT, BASIC)
    assert billed(known, known, SEPTEMBER) == {}


def test_an_upgrade_gives_back_what_is_unused_and_charges_the_rest() -> None:
    before, after = catalog(ACCOUNT, CONTRACT, BASIC, PRO), catalog(ACCOUNT, UPGRADED, BASIC, PRO)
    found = billed(before, after, SEPTEMBER)
    expected = change(30 * 10**12, 90 * 10**12, remaining(20, 30))
    assert list(found.values()) == [expected.credit, expected.charge] == [-20 * 10**12, 60 * 10**12]
    assert [key.segment_start_us for key in found] == [at("2026-09-01"), at("2026-09-11")]


def test_a_contract_that_ends_early_gets_its_rest_back() -> None:
    ended = replace(CONTRACT, version=2, end_us=at("2026-09-11"))
    found = billed(catalog(ACCOUNT, CONTRACT, BASIC), catalog(ACCOUNT, ended, BASIC), SEPTEMBER)
    assert list(found.values()) == [-20 * 10**12]
    never = replace(CONTRACT, version=2, end_us=at("2026-09-01"))
    found = billed(catalog(ACCOUNT, CONTRACT, BASIC), catalog(ACCOUNT, never, BASIC), SEPTEMBER)
    assert list(found.values()) == [-30 * 10**12], "also what was booked for a period that never was"


@pytest.mark.parametrize(
    ("by", "expected"), [("second", ["-19.5", "58.5"]), ("day", ["-20", "60"]), ("period", ["90"])]
)
def test_how_an_upgrade_at_noon_is_counted(by: Any, expected: list[str]) -> None:
    """On day 11 of 30 at noon: 19.5 days are left by time, 20 by days, and by whole periods nothing is given back."""
    plans = [replace(plan, prorate_by=by) for plan in (BASIC, PRO)]
    noon = replace(UPGRADED, later_phases=(Phase(at("2026-09-11") + 12 * 3_600_000_000, "pro"),))
    found = billed(catalog(ACCOUNT, CONTRACT, *plans), catalog(ACCOUNT, noon, *plans), SEPTEMBER)
    assert [plain(amount_decimal(amount)) for amount in found.values()] == expected


@given(
    st.lists(st.integers(SEPTEMBER.start_us + 1, SEPTEMBER.end_us - 1), max_size=4, unique=True).map(sorted),
    st.sampled_from(["second", "day"]),
    st.integers(0, 4),
)
def test_a_period_costs_the_same_however_much_of_it_was_paid_in_advance(
    changes: list[int], by: Any, known_before: int
) -> None:
    """Booked in advance, by a catalog that knows of some of the changes, plus billed at the close = as it should be."""
    plans = [replace(plan, prorate_by=by) for plan in (BASIC, PRO)]

    def with_changes(times: list[int]) -> Catalog:
        phases = tuple(Phase(time, ("pro", "basic")[number % 2]) for number, time in enumerate(times))
        return catalog(ACCOUNT, replace(CONTRACT, later_phases=phases), *plans)

    before, after = with_changes(changes[:known_before]), with_changes(changes)
    booked = sum(fee.amount for fee in fees_of(before, "a", SEPTEMBER))
    due = sum(fee.amount for fee in fees_of(after, "a", SEPTEMBER))
    assert booked + sum(billed(before, after, SEPTEMBER).values()) == due
    if not changes:
        assert due == 30 * 10**12
