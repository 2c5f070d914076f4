"""Which terms hold for an event, and for how long."""

import json
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import documents
from pipeline.core.aggregation import Opening
from pipeline.core.catalog import Catalog, Segment, Terms
from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.closing import Span, closing_price
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle
from pipeline.core.documents import Entry, Item, from_document, kind_of, to_document
from pipeline.core.meters import Conversion, Filter, Meter, Rounding
from pipeline.core.periods import Period, month_of, parse_instant
from pipeline.core.plans import Override, Plan, Pool, PoolOverride, PriceList
from pipeline.core.proration import Portion
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
    valid_from = 0 if isinstance(item, Contract) else item.valid_from_us
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


@pytest.mark.parametrize(
    "change",
    [
        {"aggregation": "max"},
        {"aggregation": "latest", "level": "add"},
        {"aggregation": "time_weighted", "time_unit": "period"},
        {"carries_over": True},
        {"derived_per": "total", "convert": Conversion(divide=Decimal(1000))},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_meter_that_makes_its_total_in_another_way_begins_a_segment(change: dict[str, Any]) -> None:
    """So that events of before stay what they were: a peak of the 10th does not swallow the sum of the 9th."""
    same = replace(METER, version=2, valid_from_us=at("2026-03-05"), value="billed_tokens")
    newer = replace(same, version=3, valid_from_us=at("2026-03-10"), **change)
    known = catalog(ACCOUNT, CONTRACT, METER, same, newer, PLAN)
    cuts = [segment.start_us for segment in known.segments("acct", at("2026-03-01"), at("2026-04-01"))]
    assert cuts == [at("2026-03-01"), at("2026-03-10")]
    later = known.segment("acct", at("2026-03-10"))
    assert isinstance(later, Segment)
    assert (later.start_us, later.end_us) == (at("2026-03-10"), at("2026-04-01"))


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


def test_periods_are_those_of_the_contract_s_cycle() -> None:
    quarterly = replace(CONTRACT, cycle=Cycle("quarter", 31))
    found = terms(replace(ACCOUNT, time_zone="Asia/Tokyo"), quarterly, METER, PLAN, when="2026-04-29T15")
    assert isinstance(found, Terms)
    assert found.segment.period == Period(at("2026-04-29T15"), at("2026-07-30T15"))
    assert (found.segment.start_us, found.segment.end_us) == (at("2026-04-29T15"), at("2026-07-30T15"))


# Several contracts at a time ------------------------------------------------------------------------------------------

SUPPORT = replace(PLAN, id="support", charges=(Charge("fee", None, "flat", unit_price=Decimal(300)),))
TICKETS = replace(METER, id="tickets", event_type="ticket.opened")
DESK = replace(PLAN, id="desk", charges=(Charge("tickets", "tickets", "per_unit", unit_price=Decimal(5)),))
HELP = Contract("acct-help", 1, "acct", "support", at("2026-02-10"), None, cycle=Cycle("year", 1, 4))


def test_an_event_is_the_contract_s_whose_plan_charges_it() -> None:
    known = catalog(ACCOUNT, CONTRACT, METER, PLAN, replace(HELP, plan="desk"), TICKETS, DESK)
    found = {type: known.terms("acct", type, at("2026-03-15")) for type in ("llm.request", "ticket.opened", "fax")}
    assert [one.segment.contract.id for one in found.values() if isinstance(one, Terms)] == ["acct-main", "acct-help"]
    refused = found["fax"]
    assert isinstance(refused, Rejection)
    assert refused.reason is Reason.NO_CHARGE
    assert refused.message == (
        "expected an event type that plan 'desk' version 1 or 'standard' version 1 charges, got 'fax'"
    )


def test_where_two_charge_an_event_the_lower_id_counts() -> None:
    known = catalog(ACCOUNT, CONTRACT, METER, PLAN, replace(HELP, plan="standard", end_us=at("2026-03-20")))
    found = [known.terms("acct", "llm.request", at(day)) for day in ("2026-02-09", "2026-02-10", "2026-03-20")]
    assert [one.segment.contract.id for one in found if isinstance(one, Terms)] == [
        "acct-main",
        "acct-help",
        "acct-main",
    ]
    assert isinstance(found[0], Terms)
    assert (found[0].end_us, found[0].segment.end_us) == (at("2026-02-10"), at("2026-03-01")), "its segment goes on"


def test_an_event_waits_while_one_of_the_contracts_has_no_price() -> None:
    """Who charges it cannot be told yet."""
    later = replace(DESK, valid_from_us=at("2026-03-20"))
    known = catalog(ACCOUNT, CONTRACT, METER, PLAN, replace(HELP, plan="desk"), TICKETS, later)
    found = known.terms("acct", "llm.request", at("2026-03-15"))
    assert isinstance(found, Rejection)
    assert found.reason is Reason.NO_PRICE


def test_each_contract_has_segments_and_periods_of_its_own() -> None:
    known = catalog(ACCOUNT, CONTRACT, METER, PLAN, HELP, SUPPORT)
    year, april = Period(at("2025-04-01"), at("2026-04-01")), Period(at("2026-04-01"), at("2026-05-01"))
    march = Period(at("2026-03-01"), at("2026-04-01"))
    assert [(one.contract.id, one.start_us) for one in known.segments("acct", at("2026-02-20"), at("2026-04-02"))] == [
        ("acct-main", at("2026-02-01")),
        ("acct-help", at("2026-02-10")),
        ("acct-main", at("2026-03-01")),
        ("acct-help", at("2026-04-01")),
        ("acct-main", at("2026-04-01")),
    ]
    assert [one.contract.id for one in known.segments_of("acct", march)] == ["acct-main"]
    assert [one.contract.id for one in known.segments_of("acct", year)] == ["acct-help"]
    assert known.periods_ending("acct", march) == (year, march)
    assert known.periods_ending("acct", april) == (april,)
    assert known.periods_at("acct", at("2026-03-31T23")) == (year, march)
    assert known.periods_at("nobody", at("2026-03-31T23")) == ()


def test_contracts_of_one_cycle_share_their_periods() -> None:
    known = catalog(ACCOUNT, CONTRACT, METER, PLAN, replace(HELP, cycle=Cycle()), SUPPORT)
    march = month_of(at("2026-03-15"), "UTC")
    assert known.periods_ending("acct", march) == (march,)
    assert [one.contract.id for one in known.segments_of("acct", march)] == ["acct-help", "acct-main"]


def test_a_period_counts_while_a_contract_is_in_force_in_it() -> None:
    known = catalog(ACCOUNT, replace(CONTRACT, end_us=at("2026-03-01")), METER, PLAN)
    assert known.periods_ending("acct", month_of(at("2026-01-01"), "UTC")) != ()
    assert known.periods_ending("acct", month_of(at("2026-03-01"), "UTC")) == ()
    assert known.periods_ending("acct", month_of(at("2025-12-01"), "UTC")) == ()


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
    "the phase's price list is not there yet": (
        (ACCOUNT, replace(CONTRACT, price_list="vip"), METER, PLAN),
        "2026-03-15",
        Reason.NO_PRICE,
        "price list 'vip' in the catalog, got none",
    ),
    "a price list that does not fit the plan": (
        (
            ACCOUNT,
            CONTRACT,
            METER,
            PLAN,
            PriceList(
                "vip", 1, "VIP", "standard", "USD", 0, (Override("tokens", (("package_size", 5),)),), account="acct"
            ),
        ),
        "2026-03-15",
        Reason.NO_PRICE,
        "charge tokens: expected fields of a per_unit charge, got package_size",
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


def price_list(id: str, price: str, *, version: int = 1, valid_from: str = "2026-01-01", **scope: str) -> PriceList:
    overrides = (Override("tokens", (("unit_price", Decimal(price)),)),)
    return PriceList(id, version, id.title(), "standard", "USD", at(valid_from), overrides, **scope)


EDUCATION = price_list("education", "0.000002", customer_segment="education")
OWN = price_list("acct-own", "0.000001", account="acct")
NAMED = price_list("ramp", "0.0000005")


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
    replace(ACCOUNT, version=3, customer_segment="education", valid_from_us=at("2026-03-14")),
    replace(
        CONTRACT,
        version=3,
        end_us=at("2026-03-20"),
        later_phases=(Phase(at("2026-03-11"), "standard", "ramp"), Phase(at("2026-03-13"), "standard", trial_days=4)),
    ),
    replace(EDUCATION, valid_from_us=at("2026-03-15")),
    replace(EDUCATION, version=2, valid_from_us=at("2026-03-23"), overrides=()),
    replace(OWN, version=2, valid_from_us=at("2026-03-06"), overrides=(Override("tokens", (("package_size", 5),)),)),
    replace(OWN, version=3, valid_from_us=at("2026-03-07")),
    OWN,
    NAMED,
    # A subscription beside the others, which from its second version on charges the same events, and goes before them.
    Contract("acct-extra", 1, "acct", "extra", at("2026-03-04"), at("2026-03-24"), cycle=Cycle("quarter", 9)),
    replace(PLAN, id="extra", charges=(replace(CHARGE, id="calls", meter="calls"),)),
    replace(PLAN, id="extra", version=2, valid_from_us=at("2026-03-17"), charges=(replace(CHARGE, id="more"),)),
    replace(METER, id="calls", event_type="call"),
    replace(METER, id="calls", version=2, event_type="call", valid_from_us=at("2026-03-09")),
]
BOUNDARIES = [
    f"2026-03-{day:02}" for day in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 22, 23, 24, 25)
] + [
    "2026-02-28T22",
    "2026-03-31T21",
]
TIMES = st.integers(at("2026-02-27"), at("2026-04-03")) | st.sampled_from(
    [at(boundary) + offset for boundary in BOUNDARIES for offset in (-1, 0)]
)


@given(st.permutations(PIECES), st.integers(0, len(PIECES)), TIMES)
def test_the_order_and_repetition_of_entries_do_not_matter(pieces: list[Item], cut: int, when: int) -> None:
    in_order = catalog(*PIECES).terms("acct", "llm.request", when)
    shuffled = catalog(*pieces[:cut]).extend([entry(item) for item in pieces], 99)
    assert shuffled.terms("acct", "llm.request", when) == in_order


@given(st.sets(st.sampled_from(PIECES)), TIMES, TIMES, st.sampled_from(["llm.request", "call"]))
def test_terms_hold_for_every_time_they_say_and_for_no_other(
    pieces: set[Item], one: int, other: int, event_type: str
) -> None:
    known = catalog(*pieces)
    found = known.terms("acct", event_type, one)
    if isinstance(found, Rejection):
        return
    assert found.segment.start_us <= found.start_us <= one < found.end_us <= found.segment.end_us
    assert (known.terms("acct", event_type, other) == found) == (found.start_us <= other < found.end_us)


@given(st.sets(st.sampled_from(PIECES)))
def test_segments_of_a_contract_tile_the_time_that_it_has_terms(pieces: set[Item]) -> None:
    known = catalog(*pieces)
    start, end = at("2026-02-20"), at("2026-04-05")
    found = known.segments("acct", start, end)
    for contract in known.contracts.values():
        segments = [segment for segment in found if segment.contract == contract]
        for segment in segments:
            for time in (max(segment.start_us, start), min(segment.end_us, end) - 1):
                assert known.segment("acct", time, contract.id) == segment
        edges = [start, *(edge for one in segments for edge in (one.start_us, one.end_us)), end]
        for left, right in zip(edges[::2], edges[1::2], strict=True):
            if left < right:
                assert isinstance(known.segment("acct", left, contract.id), Rejection)
                assert isinstance(known.segment("acct", right - 1, contract.id), Rejection)


# Price lists, phases, trials ------------------------------------------------------------------------------------------


def segment(*items: Item, when: str) -> Segment:
    found = catalog(ACCOUNT, METER, PLAN, CONTRACT, *items).segment("acct", at(when))
    assert isinstance(found, Segment), found
    return found


def priced(found: Segment) -> tuple[str, str]:
    """Its price version and the price of its first charge."""
    return found.price_version, f"{found.charges[0].unit_price:f}"


STUDENT = replace(ACCOUNT, version=2, customer_segment="education")
RAMPED = replace(CONTRACT, version=2, price_list="ramp")
LISTS: dict[str, tuple[tuple[Item, ...], tuple[str, str]]] = {
    "the plan's price": ((EDUCATION, NAMED), ("standard@1", "0.000003")),
    "its customer segment's": ((STUDENT, EDUCATION, NAMED), ("standard@1+education@1", "0.000002")),
    "its own": ((STUDENT, EDUCATION, OWN), ("standard@1+education@1+acct-own@1", "0.000001")),
    "its contract's": (
        (STUDENT, EDUCATION, OWN, RAMPED, NAMED),
        ("standard@1+education@1+acct-own@1+ramp@1", "0.0000005"),
    ),
    "another plan's list does not count": (
        (STUDENT, replace(EDUCATION, plan="other"), replace(OWN, plan="other")),
        ("standard@1", "0.000003"),
    ),
    "a list that has ended": (
        (STUDENT, EDUCATION, replace(EDUCATION, version=2, overrides=())),
        ("standard@1", "0.000003"),
    ),
    "a list that overrides what the plan lacks": (
        (STUDENT, replace(EDUCATION, overrides=(Override("images", (("unit_price", Decimal(9)),)),))),
        ("standard@1+education@1", "0.000003"),
    ),
}


@pytest.mark.parametrize(("items", "expected"), LISTS.values(), ids=LISTS)
def test_the_strongest_price_list_wins(items: tuple[Item, ...], expected: tuple[str, str]) -> None:
    assert priced(segment(*items, when="2026-03-15")) == expected


def test_price_lists_win_field_by_field_and_a_model_replaces_the_price() -> None:
    metered = replace(CHARGE, references=("order",), included=10**9)
    plan = replace(
        PLAN, version=2, charges=(metered, replace(CHARGE, id="other")), pools=(Pool("p", "token", 5, ("other",)),)
    )
    more = replace(
        EDUCATION, overrides=(Override("tokens", (("included", 7 * 10**9),)),), pools=(PoolOverride("p", 9),)
    )
    both = segment(plan, STUDENT, more, OWN, when="2026-03-15")
    assert both.charges == (replace(metered, included=7 * 10**9, unit_price=Decimal("0.000001")), plan.charges[1])
    assert both.pools == (Pool("p", "token", 9, ("other",)),)
    packaged = (("model", "package"), ("package_price", Decimal(5)), ("package_size", 10**11))
    repriced = segment(plan, STUDENT, more, replace(OWN, overrides=(Override("tokens", packaged),)), when="2026-03-15")
    assert repriced.charges[0] == Charge(
        "tokens", "tokens", "package", package_size=10**11, package_price=Decimal(5), references=("order",)
    )


def test_a_customer_segment_counts_from_its_own_time() -> None:
    moved = replace(
        ACCOUNT, version=2, customer_segment="education", valid_from_us=at("2026-03-10"), time_zone="Asia/Tokyo"
    )
    before, after = (segment(moved, EDUCATION, when=day) for day in ("2026-03-09T23", "2026-03-10"))
    assert (priced(before)[0], before.end_us) == ("standard@1", at("2026-03-10"))
    assert (priced(after)[0], after.start_us) == ("standard@1+education@1", at("2026-03-10"))
    assert before.period.start_us == at("2026-02-28T15"), "all else of an account counts for all times"


RAMP = replace(
    CONTRACT,
    version=2,
    end_us=at("2026-06-01"),
    trial_days=14,
    later_phases=(Phase(at("2026-03-05"), "standard", "ramp"), Phase(at("2026-04-15"), "plus", trial_days=2)),
)
PLUS = replace(PLAN, id="plus")


def test_a_contract_s_phases_are_segments_of_their_own() -> None:
    known = catalog(ACCOUNT, METER, PLAN, PLUS, RAMP, NAMED)
    found = known.segments("acct", at("2026-01-01"), at("2026-12-01"))
    assert [(one.price_version, one.start_us, one.end_us) for one in found] == [
        (version, at(start), at(end))
        for version, start, end in [
            ("standard@1+trial", "2026-01-10", "2026-01-24"),
            ("standard@1", "2026-01-24", "2026-02-01"),
            ("standard@1", "2026-02-01", "2026-03-01"),
            ("standard@1", "2026-03-01", "2026-03-05"),
            ("standard@1+ramp@1", "2026-03-05", "2026-04-01"),
            ("standard@1+ramp@1", "2026-04-01", "2026-04-15"),
            ("plus@1+trial", "2026-04-15", "2026-04-17"),
            ("plus@1", "2026-04-17", "2026-05-01"),
            ("plus@1", "2026-05-01", "2026-06-01"),
        ]
    ]


def test_a_trial_is_free_and_shows_what_was_used() -> None:
    fee = Charge("fee", None, "flat", unit_price=Decimal(49))
    by = replace(CHARGE, id="by", by=("model",), per_subject=True, minimum=Decimal(5))
    plan = replace(PLAN, version=2, trial_days=14, charges=(CHARGE, fee, by), pools=(Pool("p", "token", 5, ("by",)),))
    found = segment(plan, OWN, when="2026-01-23T23")
    assert found.trial
    assert found.pools == ()
    assert found.charges == (
        replace(CHARGE, unit_price=Decimal(0)),
        replace(fee, unit_price=Decimal(0)),
        replace(by, unit_price=Decimal(0), minimum=None),
    )
    assert not segment(plan, when="2026-01-24").trial
    assert not segment(plan, replace(CONTRACT, version=2, trial_days=0), when="2026-01-10").trial, (
        "its contract says no"
    )


def test_trial_days_are_days_of_the_time_zone() -> None:
    """Clocks in New York go forward on 8 March: the trial has an hour less than 7 times 24."""
    new_york = replace(ACCOUNT, version=2, time_zone="America/New_York")
    contract = replace(CONTRACT, version=2, start_us=at("2026-03-05T05"), trial_days=7)
    assert segment(new_york, contract, when="2026-03-06").end_us == at("2026-03-12T04")


def test_an_alias_is_not_what_usage_carries() -> None:
    known = catalog(replace(ACCOUNT, aliases=("crm-1", "legacy")), CONTRACT, METER, PLAN)
    found = known.terms("crm-1", "llm.request", at("2026-03-15"))
    assert isinstance(found, Rejection)
    assert found.reason is Reason.UNKNOWN_ACCOUNT
    assert found.message.endswith("got 'crm-1', an alias of 'acct': send usage under the account's id")
    assert known.aliases == {"crm-1": "acct", "legacy": "acct"}


def test_a_flat_fee_is_of_the_segment_and_of_no_event() -> None:
    fee = Charge("fee", None, "flat", unit_price=Decimal(49))
    found = terms(ACCOUNT, CONTRACT, METER, replace(PLAN, charges=(fee, CHARGE)), when="2026-03-15")
    assert isinstance(found, Terms)
    assert (found.segment.charges, [charge for charge, _ in found.priced]) == ((fee, CHARGE), [CHARGE])


# Proration ------------------------------------------------------------------------------------------------------------

UNITS = 10**9
TIERED = Charge(
    "tiered",
    "tokens",
    "graduated",
    tiers=(Tier(310 * UNITS, Decimal(2)), Tier(620 * UNITS, Decimal(1)), Tier(None, Decimal("0.5"))),
    included=31 * UNITS,
)
POOLED = replace(PLAN, charges=(TIERED, CHARGE), pools=(Pool("p", "token", 3100 * UNITS, ("tokens",)),))
#: A contract from 11 to 22 January: 11 of 31 days.
PART = replace(CONTRACT, start_us=at("2026-01-11"), end_us=at("2026-01-22"))


@pytest.mark.parametrize(
    ("prorate", "pool", "included", "bounds"),
    [("pool", 1100, 11, (310, 620)), ("pool_and_tiers", 1100, 11, (110, 220)), ("none", 3100, 31, (310, 620))],
)
def test_a_segment_has_its_share_of_the_period(prorate: Any, pool: int, included: int, bounds: tuple[int, int]) -> None:
    found = catalog(ACCOUNT, METER, PART, replace(POOLED, prorate=prorate)).segment("acct", at("2026-01-15"))
    assert isinstance(found, Segment)
    assert found.pools[0].included == pool * UNITS
    assert found.charges[0].included == included * UNITS
    assert [tier.up_to for tier in found.charges[0].tiers] == [bounds[0] * UNITS, bounds[1] * UNITS, None]
    assert found.charges[1] == CHARGE


#: Two upgrades in March and the contract's end, all of them in the midst of a day.
CUT = replace(
    CONTRACT,
    start_us=at("2026-03-10T09"),
    end_us=at("2026-03-25T15"),
    later_phases=(Phase(at("2026-03-12T18"), "plus"), Phase(at("2026-03-20T01"), "standard")),
)
PLUS_MARCH = replace(PLAN, id="plus")


def cut(prorate_by: Any, *more: Item) -> list[Portion]:
    plans = (replace(plan, prorate_by=prorate_by) for plan in (PLAN, PLUS_MARCH))
    return [one.portion for one in catalog(ACCOUNT, METER, *plans, CUT, *more).segments("acct", 0, at("2027-01-01"))]


def test_a_day_belongs_to_what_begins_on_it_and_the_last_one_to_the_contract() -> None:
    assert cut("day") == [Portion(9, 11, 31), Portion(11, 19, 31), Portion(19, 25, 31)]
    # Unless another takes over: it has that day.
    next_one = Contract("next", 1, "acct", "standard", at("2026-03-25T15"), at("2026-03-31T10"))
    assert cut("day", next_one)[2:] == [Portion(19, 24, 31), Portion(24, 31, 31)]
    assert cut("day", replace(next_one, end_us=at("2026-03-31")))[3] == Portion(24, 30, 31)


def test_by_time_a_segment_has_its_microseconds() -> None:
    hours = [portion.start // 3_600_000_000 for portion in cut("second")]
    assert hours == [9 * 24 + 9, 11 * 24 + 18, 19 * 24 + 1]


def test_by_period_each_stay_on_a_plan_is_due_once() -> None:
    newer = replace(PLAN, version=2, valid_from_us=at("2026-03-22"), prorate_by="period")
    assert cut("period", newer) == [Portion(0, 1, 1), Portion(0, 1, 1), Portion(0, 1, 1), Portion(1, 1, 1)]


def test_by_period_included_units_are_whole_in_every_segment() -> None:
    newer = replace(POOLED, version=2, valid_from_us=at("2026-03-22"), prorate_by="period")
    found = catalog(ACCOUNT, CONTRACT, METER, replace(POOLED, prorate_by="period"), newer).segments(
        "acct", at("2026-03-01"), at("2026-04-01")
    )
    assert [one.pools[0].included for one in found] == [3100 * UNITS, 3100 * UNITS]
    assert not any(one.shortens(TIERED) for one in found)


def test_what_begins_to_cost_after_a_trial_is_due_once() -> None:
    trial = replace(CONTRACT, trial_days=10)
    fee = replace(PLAN, prorate_by="period", charges=(Charge("fee", None, "flat", unit_price=Decimal(49)),))
    newer = replace(fee, version=2, valid_from_us=at("2026-01-25"))
    found = catalog(ACCOUNT, trial, METER, fee, newer).segments("acct", at("2026-01-01"), at("2026-03-01"))
    amounts = [closing_price(one.charges[0], None, [], one.span).amount // 10**12 for one in found]
    assert [one.trial for one in found] == [True, False, False, False]
    assert amounts == [0, 49, 0, 49]


def test_calendar_days_count_whole_where_clocks_change() -> None:
    """Berlin's 29 March 2026 has 23 hours, and is one of 31 days all the same."""
    berlin = replace(ACCOUNT, time_zone="Europe/Berlin")
    ends = replace(CONTRACT, end_us=at("2026-03-29T10"))
    found = catalog(berlin, ends, METER, replace(PLAN, prorate_by="day")).segment("acct", at("2026-03-15"))
    assert isinstance(found, Segment)
    assert found.portion == Portion(0, 29, 31)


@pytest.mark.parametrize("prorate", ["pool", "pool_and_tiers", "none"])
def test_levels_pay_for_their_time_so_nothing_of_their_price_is_prorated(prorate: Any) -> None:
    """100 seats, 31 of them free, all month: 69 x 2.00, however the month is cut."""
    seats = replace(
        METER, id="seats", event_type="seats", aggregation="time_weighted", time_unit="period", carries_over=True
    )
    plan = replace(PLAN, charges=(replace(TIERED, meter="seats", per_level=True),), prorate=prorate)
    upgraded = replace(plan, version=2, valid_from_us=at("2026-03-08"))
    known = catalog(ACCOUNT, CONTRACT, seats, plan, upgraded)
    amounts = [
        closing_price(
            segment.charges[0],
            seats,
            [],
            Span(segment.start_us, segment.end_us, segment.period),
            opening=Opening(100 * UNITS),
        ).amount
        for segment in known.segments("acct", at("2026-03-01"), at("2026-04-01"))
    ]
    assert len(amounts) == 2
    assert sum(amounts) == 138 * 10**12


@given(
    st.lists(st.integers(at("2026-03-01") + 1, at("2026-04-01") - 1), max_size=6, unique=True).map(sorted),
    st.integers(0, 10**13),
    st.integers(1, 10**12),
    st.sampled_from(["second", "day"]),
)
def test_the_segments_of_a_period_have_the_whole_together(
    cuts: list[int], included: int, bound: int, prorate_by: Any
) -> None:
    """However often a price changes within a month, the shares add up, and every tier keeps some room."""
    charge = replace(
        TIERED, included=included, tiers=(Tier(bound, Decimal(2)), Tier(bound + 1, Decimal(1)), Tier(None))
    )
    versions = [
        replace(
            POOLED,
            version=n + 1,
            valid_from_us=cut,
            prorate="pool_and_tiers",
            prorate_by=prorate_by,
            charges=(charge,),
        )
        for n, cut in enumerate([0, *cuts])
    ]
    known = catalog(ACCOUNT, METER, CONTRACT, *versions)
    found = known.segments("acct", at("2026-03-01"), at("2026-04-01"))
    assert len(found) == len(cuts) + 1
    assert sum(one.pools[0].included for one in found) == POOLED.pools[0].included
    assert sum(one.charges[0].included for one in found) == included
    for one in found:
        first, second, _ = (tier.up_to for tier in one.charges[0].tiers)
        assert 0 < (first or 0) < (second or 0)


# Documents ----------------------------------------------------------------------------------------------------------

ITEMS: list[Item] = [
    ACCOUNT,
    CONTRACT,
    ended(CONTRACT, "2026-03-15"),
    METER,
    Meter("calls", 3, "call", "count", None, "call", (Filter("model", ("a", "b")),), True, at("2026-03-01")),
    replace(ACCOUNT, customer_segment="education", parent="group", aliases=("a", "b"), valid_from_us=at("2026-03-01")),
    replace(RAMP, price_list="vip", legal_entity="acme-inc"),
    Meter(
        "levels",
        1,
        "seats",
        "time_weighted",
        None,
        "seat-hour",
        (Filter("plan", ("free",), "not_in"), Filter("seats", ("0",), "gt"), Filter("region", (), "exists")),
        False,
        0,
        expression="seats * 2",
        convert=Conversion(divide=Decimal(1024)),
        rounding=Rounding("up", 60 * UNITS),
        level="add",
        time_unit="hour",
        carries_over=True,
        dimensions=("region",),
    ),
    replace(
        EDUCATION,
        overrides=(
            Override("a", (("included", 5), ("model", "graduated"), ("tiers", (Tier(None, Decimal(1)),)))),
            Override("b", (("cells", (Cell(("x",), Decimal(2)),)), ("free_events", 3))),
        ),
        pools=(PoolOverride("p", 7),),
    ),
    NAMED,
    PLAN,
    replace(POOLED, prorate="pool_and_tiers", trial_days=30),
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
            Charge("p", "tokens", "package", package_size=100 * 10**9, package_price=Decimal(5), min_packages=1),
            Charge(
                "s",
                "tokens",
                "stairstep",
                tiers=(Tier(10**9, flat=Decimal(5), cap=Decimal(9)),),
                beyond="park",
                bound="exclusive",
                minimum=Decimal(1),
                maximum=Decimal(50),
            ),
            Charge("r", "tokens", "graduated_percentage", tiers=(Tier(None, rate=Decimal("1.5")),)),
            Charge(
                "m",
                "tokens",
                "matrix",
                unit_price=Decimal(1),
                by=("model",),
                cells=(Cell(("large",), Decimal(3)),),
                per_subject=True,
            ),
            Charge(
                "%",
                "tokens",
                "percentage",
                rate=Decimal("2.9"),
                fixed=Decimal("0.30"),
                free_events=5,
                free_amount=10**11,
                event_minimum=Decimal("0.5"),
                event_maximum=Decimal(20),
            ),
            Charge("d", "tokens", "dynamic", amount_property="cost", multiplier=Decimal("1.2")),
            Charge("l", "tokens", "per_unit", unit_price=Decimal(7), per_level=True),
            Charge("f", None, "flat", unit_price=Decimal(49), in_advance=True, quantity=3 * 10**9, prorate=False),
        ),
    ),
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: f"{kind_of(item)} {item.id}")
def test_an_item_survives_being_written_and_read(item: Item) -> None:
    assert from_document(entry(item)) == item


def test_what_came_later_is_written_only_where_it_is_used() -> None:
    """So what was published before is read as it was meant, and does not change by being published again."""
    assert to_document(ACCOUNT) == {"name": "Acct", "time_zone": "UTC"}
    assert to_document(CONTRACT).keys() == {"account", "plan", "start", "end"}
    assert to_document(METER).keys() == {"event_type", "aggregation", "value", "unit", "filters", "allow_negative"}
    assert to_document(PLAN).keys() == {"name", "currency", "charges"}
    assert to_document(PLAN)["charges"][0].keys() == {
        "id",
        "meter",
        "model",
        "unit_price",
        "tiers",
        "package_size",
        "package_price",
        "included",
        "references",
        "flat_on_zero",
    }


def test_every_field_of_every_item_is_in_its_document() -> None:
    """What a table forgets would be lost on the way to the rater."""
    beside = {"id", "version", "valid_from_us"}  # in the entry
    for cls, table in documents._TABLES.items():
        written = {field.attribute for field in table.values()}
        nested = cls in (Charge, Pool)  # their ids stand in the document
        assert written == {field.name for field in fields(cls)} - (set() if nested else beside), cls


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
        pytest.param(
            METER,
            {"aggregation": "median"},
            "average, unique or time_weighted, got 'median'",
            id="an aggregation unknown here",
        ),
        pytest.param(METER, {"value": None}, "expected the property to take the sum of", id="a sum of nothing"),
        pytest.param(NAMED, {"overrides": [{"charge": "c", "meter": "m"}]}, r"\['meter'\]", id="another meter"),
        pytest.param(NAMED, {"currency": "XXX"}, "ISO 4217", id="a price list's currency unknown here"),
        pytest.param(PLAN, {"currency": "XXX"}, "ISO 4217", id="a currency unknown here"),
        pytest.param(PLAN, {"charges": [{"id": "c", "meter": "m"}]}, "no field 'model'", id="a charge without model"),
    ],
)
def test_a_document_not_understood_in_full_is_refused(item: Item, change: dict[str, Any], message: str) -> None:
    good = entry(item)
    with pytest.raises(ValueError, match=f"cannot read {kind_of(item)} '{item.id}' version 1: .*{message}"):
        from_document(replace(good, document={**good.document, **change}))
