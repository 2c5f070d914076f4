"""Which terms hold for an event, and for how long."""

import json
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.catalog import Catalog, Terms
from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Entry, Item, from_document, kind_of, to_document
from pipeline.core.meters import Filter, Meter
from pipeline.core.periods import parse_instant
from pipeline.core.plans import Plan
from pipeline.core.reasons import Reason, Rejection, Stage


def at(text: str) -> int:
    """A date, or a date and hour, in UTC."""
    return parse_instant(f"{text}:00:00Z" if "T" in text else f"{text}T00:00:00Z")


ACCOUNT = Account("acct", 1, "Acct", "UTC")
CONTRACT = Contract("acct-main", 1, "acct", "standard", at("2026-01-10"), None)
METER = Meter("tokens", 1, "llm.request", "sum", "tokens", "token", (), False, 0)
CHARGE = Charge("tokens", "tokens", "per_unit", unit_price=Decimal("0.000003"))
PLAN = Plan("standard", 1, "Standard", "USD", 0, (CHARGE,))


def entry(item: Item) -> Entry:
    valid_from = item.valid_from_us if isinstance(item, Meter | Plan) else 0
    # Through JSON, as it comes from the topic.
    document: dict[str, Any] = json.loads(json.dumps(to_document(item)))
    return Entry(kind_of(item), item.id, item.version, valid_from, document)


def catalog(*items: Item) -> Catalog:
    return Catalog.empty().extend([entry(item) for item in items], len(items))


def terms(*items: Item, when: str, event_type: str = "llm.request") -> Terms | Rejection:
    return catalog(*items).terms("acct", event_type, at(when))


def test_the_usual_case() -> None:
    found = terms(ACCOUNT, CONTRACT, METER, PLAN, when="2026-03-15")
    assert isinstance(found, Terms)
    assert found.priced == ((CHARGE, METER),)
    assert (found.segment.contract, found.segment.plan) == (CONTRACT, PLAN)
    assert (found.start_us, found.end_us) == (at("2026-03-01"), at("2026-04-01"))
    assert (found.segment.start_us, found.segment.end_us) == (at("2026-03-01"), at("2026-04-01"))


def ended(contract: Contract, day: str) -> Contract:
    return replace(contract, end_us=at(day))


WINDOWS = {
    "a contract that begins within the month": ((), "2026-01-15", "2026-01-10", "2026-02-01"),
    "a plan version that takes over within the month": (
        (replace(PLAN, version=2, valid_from_us=at("2026-03-10")),),
        "2026-03-09T23",
        "2026-03-01",
        "2026-03-10",
    ),
    "the version that took over": (
        (replace(PLAN, version=2, valid_from_us=at("2026-03-10")),),
        "2026-03-10",
        "2026-03-10",
        "2026-04-01",
    ),
    "a version of another plan changes nothing": (
        (replace(PLAN, id="other", version=2, valid_from_us=at("2026-03-10")),),
        "2026-03-15",
        "2026-03-01",
        "2026-04-01",
    ),
    "a contract that ends within the month": (
        (replace(ended(CONTRACT, "2026-03-20"), version=2),),
        "2026-03-15",
        "2026-03-01",
        "2026-03-20",
    ),
}


@pytest.mark.parametrize(("more", "when", "start", "end"), WINDOWS.values(), ids=WINDOWS)
def test_a_segment_is_the_longest_part_with_one_contract_plan_and_price(
    more: tuple[Item, ...], when: str, start: str, end: str
) -> None:
    found = terms(ACCOUNT, CONTRACT, METER, PLAN, *more, when=when)
    assert isinstance(found, Terms)
    assert (found.segment.start_us, found.segment.end_us) == (at(start), at(end))
    assert (found.start_us, found.end_us) == (at(start), at(end))


def test_a_new_meter_version_ends_the_terms_but_not_the_segment() -> None:
    newer = replace(METER, version=2, valid_from_us=at("2026-03-10"), value="billed_tokens")
    before = terms(ACCOUNT, CONTRACT, METER, newer, PLAN, when="2026-03-09T23")
    after = terms(ACCOUNT, CONTRACT, METER, newer, PLAN, when="2026-03-10")
    assert isinstance(before, Terms)
    assert isinstance(after, Terms)
    assert before.segment == after.segment
    assert (before.priced[0][1], before.end_us) == (METER, at("2026-03-10"))
    assert (after.priced[0][1], after.start_us) == (newer, at("2026-03-10"))


def test_a_charge_begins_with_its_meter() -> None:
    later = replace(METER, id="images", valid_from_us=at("2026-03-10"))
    plan = replace(PLAN, charges=(CHARGE, replace(CHARGE, id="images", meter="images")))
    before = terms(ACCOUNT, CONTRACT, METER, later, plan, when="2026-03-09T23")
    after = terms(ACCOUNT, CONTRACT, METER, later, plan, when="2026-03-10")
    assert isinstance(before, Terms)
    assert isinstance(after, Terms)
    assert [charge.id for charge, _ in before.priced] == ["tokens"]
    assert before.end_us == after.start_us == at("2026-03-10")
    assert [charge.id for charge, _ in after.priced] == ["tokens", "images"]


def test_periods_are_months_of_the_account_s_time_zone() -> None:
    found = terms(replace(ACCOUNT, time_zone="Asia/Tokyo"), CONTRACT, METER, PLAN, when="2026-03-31T15")
    assert isinstance(found, Terms)
    assert found.segment.period.start_us == at("2026-03-31T15")


REJECTIONS: dict[str, tuple[tuple[Item, ...], str, Reason, str]] = {
    "no such account": ((CONTRACT, METER, PLAN), "2026-03-15", Reason.UNKNOWN_ACCOUNT, "got 'acct'"),
    "no contract at all": ((ACCOUNT, METER, PLAN), "2026-03-15", Reason.NO_CONTRACT, "got none so far"),
    "the contract begins later": (
        (ACCOUNT, CONTRACT, METER, PLAN),
        "2026-01-09T23",
        Reason.NO_CONTRACT,
        "2026-01-09T23",
    ),
    "the contract has ended": (
        (ACCOUNT, ended(CONTRACT, "2026-03-15"), METER, PLAN),
        "2026-03-15",
        Reason.CONTRACT_ENDED,
        "contract 'acct-main' ended at 2026-03-15T00:00:00Z",
    ),
    "between two contracts": (
        (ACCOUNT, ended(CONTRACT, "2026-03-01"), replace(CONTRACT, id="next", start_us=at("2026-04-01")), METER, PLAN),
        "2026-03-15",
        Reason.CONTRACT_ENDED,
        "contract 'acct-main' ended",
    ),
    "the plan is not there yet": ((ACCOUNT, CONTRACT, METER), "2026-03-15", Reason.NO_PRICE, "plan 'standard'"),
    "no version of the plan counts yet": (
        (ACCOUNT, CONTRACT, METER, replace(PLAN, valid_from_us=at("2026-04-01"))),
        "2026-03-15",
        Reason.NO_PRICE,
        "at 2026-03-15T00:00:00Z, got none",
    ),
    "a meter of the plan is not there yet": (
        (ACCOUNT, CONTRACT, PLAN),
        "2026-03-15",
        Reason.NO_PRICE,
        "meter 'tokens'",
    ),
    "nothing meters this type": (
        (ACCOUNT, CONTRACT, replace(METER, event_type="image"), PLAN),
        "2026-03-15",
        Reason.NO_CHARGE,
        "got 'llm.request'",
    ),
}


@pytest.mark.parametrize(("items", "when", "reason", "message"), REJECTIONS.values(), ids=REJECTIONS)
def test_rejection(items: tuple[Item, ...], when: str, reason: Reason, message: str) -> None:
    found = terms(*items, when=when)
    assert isinstance(found, Rejection)
    assert (found.stage, found.reason) == (Stage.ENRICH, reason)
    assert message in found.message


def test_a_snapshot_never_changes() -> None:
    first = catalog(ACCOUNT, METER, PLAN)
    second = first.extend([entry(CONTRACT)], 7)
    assert isinstance(first.terms("acct", "llm.request", at("2026-03-15")), Rejection)
    assert isinstance(second.terms("acct", "llm.request", at("2026-03-15")), Terms)
    assert (first.offset, second.offset) == (3, 7)


PIECES: list[Item] = [
    ACCOUNT,
    replace(ACCOUNT, version=2, time_zone="Asia/Amman"),
    CONTRACT,
    replace(CONTRACT, version=2, end_us=at("2026-03-20")),
    replace(CONTRACT, id="a-lower-id", start_us=at("2026-03-12"), end_us=at("2026-03-16")),
    replace(CONTRACT, id="z-higher-id", start_us=at("2026-03-18"), end_us=at("2026-03-25")),
    METER,
    replace(METER, version=2, valid_from_us=at("2026-03-08")),
    PLAN,
    replace(PLAN, version=2, valid_from_us=at("2026-03-05")),
    replace(PLAN, version=3, valid_from_us=at("2026-03-22")),
    replace(PLAN, version=4, valid_from_us=at("2026-03-05")),
]
BOUNDARIES = [f"2026-03-{day:02}" for day in (1, 5, 8, 10, 12, 16, 18, 20, 22, 25)] + ["2026-02-28T22", "2026-03-31T21"]
TIMES = st.integers(at("2026-02-27"), at("2026-04-03")) | st.sampled_from(
    [at(boundary) + offset for boundary in BOUNDARIES for offset in (-1, 0)]
)


@given(st.permutations(PIECES), st.integers(0, len(PIECES)), TIMES)
def test_the_order_and_repetition_of_entries_do_not_matter(pieces: list[Item], cut: int, when: int) -> None:
    in_order = catalog(*PIECES).terms("acct", "llm.request", when)
    shuffled = catalog(*pieces[:cut]).extend([entry(item) for item in pieces], 99)
    assert shuffled.terms("acct", "llm.request", when) == in_order


@given(st.sets(st.sampled_from(PIECES)), TIMES, TIMES)
def test_terms_hold_for_every_time_they_say_and_for_no_other(pieces: set[Item], one: int, other: int) -> None:
    known = catalog(*pieces)
    found = known.terms("acct", "llm.request", one)
    if isinstance(found, Rejection):
        return
    assert found.segment.start_us <= found.start_us <= one < found.end_us <= found.segment.end_us
    assert (known.terms("acct", "llm.request", other) == found) == (found.start_us <= other < found.end_us)


# Documents ----------------------------------------------------------------------------------------------------------

ITEMS: list[Item] = [
    ACCOUNT,
    CONTRACT,
    ended(CONTRACT, "2026-03-15"),
    METER,
    Meter("calls", 3, "call", "count", None, "call", (Filter("model", ("a", "b")),), True, at("2026-03-01")),
    PLAN,
    Plan(
        "all",
        2,
        "All models",
        "KWD",
        at("2026-03-01"),
        (
            replace(CHARGE, references=("order_id",), included=5 * 10**8),
            Charge(
                "g",
                "tokens",
                "graduated",
                tiers=(Tier(10**9, Decimal("0.1"), Decimal(2)), Tier(None, Decimal("1E-18"))),
            ),
            Charge("v", "tokens", "volume", tiers=(Tier(None, Decimal("0.10")),), flat_on_zero=False),
            Charge("p", "tokens", "package", package_size=100 * 10**9, package_price=Decimal(5)),
        ),
    ),
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: f"{kind_of(item)} {item.id}")
def test_an_item_survives_being_written_and_read(item: Item) -> None:
    assert from_document(entry(item)) == item


def test_equal_prices_make_equal_documents() -> None:
    longer = replace(PLAN, charges=(replace(CHARGE, unit_price=Decimal("0.00000300")),))
    assert to_document(longer) == to_document(PLAN)
    assert to_document(PLAN)["charges"][0]["unit_price"] == "0.000003"


@pytest.mark.parametrize(
    ("item", "change", "message"),
    [
        pytest.param(ACCOUNT, {"time_zone": "Mars/Olympus"}, "Mars/Olympus", id="a time zone unknown here"),
        pytest.param(ACCOUNT, {"vip": "yes"}, r"unknown fields \['vip'\]", id="a field of a newer version"),
        pytest.param(CONTRACT, {"start": None}, "expected str as start, got None", id="a field of another type"),
        pytest.param(METER, {"aggregation": "median"}, "sum or count, got 'median'", id="an aggregation unknown here"),
        pytest.param(METER, {"value": None}, "needs the property to sum", id="a sum of nothing"),
        pytest.param(PLAN, {"currency": "XXX"}, "ISO 4217", id="a currency unknown here"),
        pytest.param(PLAN, {"charges": [{"id": "c"}]}, "no field 'model'", id="a charge without model"),
    ],
)
def test_a_document_not_understood_in_full_is_refused(item: Item, change: dict[str, Any], message: str) -> None:
    good = entry(item)
    with pytest.raises(ValueError, match=f"cannot read {kind_of(item)} '{item.id}' version 1: .*{message}"):
        from_document(replace(good, document={**good.document, **change}))
