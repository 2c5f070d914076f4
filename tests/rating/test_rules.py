"""Charges that are more than one running price: cells, subjects, events' own prices, pools, meters that are no sums."""

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.cells import cell_text
from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.closing import Span, closing_price
from pipeline.core.members import Member
from pipeline.core.meters import Filter
from pipeline.core.money import amount_decimal
from pipeline.core.periods import month_of, parse_instant
from pipeline.core.plans import Override, Pool, PriceList
from pipeline.core.reasons import Reason
from pipeline.rating import enrich
from pipeline.rating.enrich import TermsView, counter_of
from tests.rating.world import (
    NOW_US,
    UNIT,
    Memory,
    account,
    contract,
    message,
    meter,
    per_unit,
    plan,
    reasons,
    rows,
    run,
    usage,
    view,
)


def terms(*charges: Charge, meters: Sequence[Any] = (), pools: tuple[Pool, ...] = ()) -> TermsView:
    """Acme on a plan of these charges; by default they count meter ``tokens``."""
    return view(*(meters or (meter(),)), replace(plan(*charges), pools=pools), account(), contract())


def use(number: int, subject: str = "", **properties: str) -> Any:
    return message(usage(f"k{number}", subject=subject, properties={"tokens": "10"} | properties), number)


def story(found: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in found]


# -- cells and subjects

MATRIX = Charge(
    id="c",
    meter="tokens",
    model="matrix",
    unit_price=Decimal(1),
    by=("model", "region"),
    cells=(Cell(("large", "eu"), Decimal(3)), Cell(("large", ""), Decimal(2))),
)


def test_each_cell_of_a_matrix_has_its_price_and_its_counter() -> None:
    events = [
        use(0, model="large", region="eu"),
        use(1, model="large"),
        use(2, model="small", region="a,b"),
        use(3, model="large", region="eu"),
        use(4),
    ]
    assert story(rows(run(events, terms(MATRIX))), "cell", "quantity_before", "amount", "price_class") == [
        ("large,eu", 0, 30, "running"),
        ("large,", 0, 20, "running"),
        (r"small,a\,b", 0, 10, "running"),
        ("large,eu", 10, 30, "running"),
        (",", 0, 10, "running"),
    ]


def test_each_subject_goes_through_the_tiers_by_itself() -> None:
    charge = Charge(
        "c", "tokens", "graduated", tiers=(Tier(15 * UNIT, Decimal(2)), Tier(None, Decimal(1))), per_subject=True
    )
    events = [use(0, "ada"), use(1, "bob"), use(2, "ada"), use(3)]
    found = rows(run(events, terms(charge)))
    assert story(found, "quantity_before", "amount") == [(0, 20), (0, 20), (10, 15), (0, 20)]
    assert {row["cell"] for row in found} == {""}, "one line for all of them"


def test_a_cell_too_long_for_a_line_is_a_dead_letter_and_nothing_of_it_is_kept() -> None:
    terms_view = terms(MATRIX, per_unit(id="other"))
    for long in ("x" * 401, "é" * 201, "," * 201):
        outcome = run([use(0, model=long), use(1, model="x" * 399)], terms_view)
        assert reasons(outcome) == [Reason.DIMENSION_TOO_LONG]
        assert story(rows(outcome), "charge", "quantity_before") == [("c", 0), ("other", 0)]
    assert len(split_of(terms_view).met) == 1


def split_of(terms_view: TermsView) -> Any:
    return terms_view.find(b"acme", b"completion", NOW_US).priced[0]  # type: ignore[union-attr]


def test_more_cells_than_are_remembered_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [use(i, model=str(i * 7 % 5), region=str(i % 3)) for i in range(60)]
    remembered = run(events, terms(MATRIX))
    monkeypatch.setattr(enrich, "_CELLS_BYTES_MAX", 4 * (enrich._CELL_BYTES + 5))
    state, forgetful = Memory(), terms(MATRIX)
    found = []
    for event in events:
        outcome = run([event], forgetful, state)
        state.apply(outcome)
        found += outcome.rows
        assert len(split_of(forgetful).met) <= 4
    assert found == remembered.rows


def test_long_subjects_take_no_more_memory_than_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject may be as long as an event: 100,000 of them remembered would be 25 GB."""
    monkeypatch.setattr(enrich, "_CELLS_BYTES_MAX", 1_000_000)
    forgetful, held = terms(replace(per_unit(), per_subject=True)), []
    for number in range(12):
        run([use(number, subject=str(number).ljust(200_000, "x"))], forgetful, Memory())
        held.append(len(split_of(forgetful).met))
    assert max(held) == 4


SUBJECTS = st.binary(max_size=140).map(lambda raw: raw.replace(b"a", b"\x1f#"))


@given(st.tuples(SUBJECTS, SUBJECTS), st.tuples(st.text(max_size=3), st.text(max_size=3)))
def test_no_two_counters_have_one_name(subjects: tuple[bytes, bytes], cells: tuple[str, str]) -> None:
    """Cells hold no control character (``tests/core/test_cells.py``), subjects any but NUL, of any length."""
    names = [
        counter_of("acme", "c1", "c", 7, cell_text([cell]), subject)
        for cell, subject in zip(cells, subjects, strict=True)
    ]
    assert (names[0] == names[1]) == (cells[0] == cells[1] and subjects[0] == subjects[1])


def test_the_counters_of_plain_charges_keep_their_names() -> None:
    """They stand in changelogs that earlier versions wrote."""
    assert counter_of("acme", "c1", "c", 7) == b"acme\x1fc1\x1fc\x1f7\x1f"


# -- an event's own price


def test_a_percentage_prices_each_event_by_itself() -> None:
    charge = Charge(
        "c", "tokens", "percentage", rate=Decimal(10), fixed=Decimal("0.5"), event_maximum=Decimal(4), by=("model",)
    )
    events = [use(0, tokens="10"), use(1, tokens="100"), use(2, tokens="20")]
    assert story(rows(run(events, terms(charge))), "quantity_before", "quantity_after", "amount", "price_class") == [
        (0, 10, Decimal("1.5"), "per_event"),
        (10, 110, 4, "per_event"),
        (110, 130, Decimal("2.5"), "per_event"),
    ]


def test_a_dynamic_charge_takes_the_amount_the_event_brings_or_refuses_the_event_whole() -> None:
    charge = Charge("c", "tokens", "dynamic", amount_property="cost", multiplier=Decimal("1.2"))
    outcome = run([use(0, cost="2.5"), use(1), use(2, cost="-1")], terms(per_unit(id="first"), charge))
    assert story(rows(outcome), "charge", "amount") == [("first", Decimal("0.1")), ("c", 3)]
    assert reasons(outcome) == [Reason.MISSING_PROPERTY, Reason.NEGATIVE_QUANTITY]
    assert set(outcome.totals.values()) == {10 * UNIT}


# -- class period: provisional


def test_the_running_maximum_is_priced_as_it_rises() -> None:
    peak = meter(aggregation="max")
    events = [use(i, tokens=tokens) for i, tokens in enumerate(("10", "4", "12"))]
    found = rows(run(events, terms(per_unit("2"), meters=(peak,))))
    assert story(found, "quantity", "quantity_before", "quantity_after", "amount", "price_class") == [
        (10, 0, 10, 20, "period"),
        (4, 10, 10, 0, "period"),
        (12, 10, 12, 4, "period"),
    ]


def test_what_no_running_number_tells_is_left_to_the_close() -> None:
    users = meter(aggregation="unique", value="user")
    outcome = run([use(0, user="ada"), use(1, user="ada")], terms(per_unit("2"), meters=(users,)))
    found = story(rows(outcome), "quantity", "quantity_before", "quantity_after", "amount", "price_class")
    assert found == [(1, 0, 0, 0, "period")] * 2
    assert outcome.totals == {}


def test_charges_draw_from_their_pool_in_the_order_events_arrive() -> None:
    """25 units are free for both together; one event may draw for both."""
    pool = Pool("shared", "token", 25 * UNIT, ("in", "out"))
    meters = (meter("in", value="input"), meter("out", value="output"))
    charges = (per_unit("1", "in", "in"), per_unit("10", "out", "out"))
    terms_view, state = terms(*charges, meters=meters, pools=(pool,)), Memory()
    found = []
    for number, (inward, outward) in enumerate((("10", "10"), ("3", "4"), ("1", "0"))):
        outcome = run([use(number, input=inward, output=outward)], terms_view, state)
        state.apply(outcome)
        found += rows(outcome)
    assert story(found, "charge", "quantity_before", "quantity_after", "amount", "price_class") == [
        ("in", 0, 10, 0, "period"),
        ("out", 0, 10, 0, "period"),
        ("in", 10, 13, 0, "period"),
        ("out", 10, 14, 20, "period"),
        ("in", 13, 14, 1, "period"),
        ("out", 14, 14, 0, "period"),
    ]


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=12))
def test_a_pool_pays_for_no_more_than_it_holds_whatever_is_given_back(uses: list[tuple[int, int]]) -> None:
    """Where it is used up at the end, it paid for all of itself; else for everything."""
    pool = Pool("shared", "token", 20 * UNIT, ("in", "out"))
    meters = (
        meter("in", value="input", allow_negative=True),
        meter("out", value="output", allow_negative=True),
    )
    free = terms(per_unit("1", "in", "in"), per_unit("1", "out", "out"), meters=meters)
    pooled = terms(per_unit("1", "in", "in"), per_unit("1", "out", "out"), meters=meters, pools=(pool,))
    events = [use(i, input=str(a), output=str(b)) for i, (a, b) in enumerate(uses)]
    outcome = run(events, pooled)
    assert story(rows(outcome), "quantity_after") == story(rows(run(events, free)), "quantity_after")
    used = sum(a + b for a, b in uses)
    paid = sum(units for counter, units in outcome.totals.items() if counter.startswith(b"\x1fpaid"))
    assert paid == min(max(used, 0), 20) * UNIT


RATE = Charge("c", "tokens", "percentage", rate=Decimal("2.5"), fixed=Decimal("0.3"), event_minimum=Decimal("0.4"))


@pytest.mark.parametrize(
    ("charge", "aggregation"),
    [
        (replace(RATE, free_events=3), "sum"),
        (replace(RATE, free_amount=40 * UNIT), "sum"),
        (replace(RATE, free_events=4, free_amount=40 * UNIT, maximum=Decimal(2)), "sum"),
        (Charge("c", "tokens", "dynamic", amount_property="tokens", maximum=Decimal(90)), "sum"),
        (replace(per_unit("1.5"), included=5 * UNIT, maximum=Decimal(60)), "max"),
        (per_unit("1.5"), "min"),
        (Charge("c", "tokens", "package", package_size=7 * UNIT, package_price=Decimal(1)), "latest"),
    ],
    ids=["free events", "free amount", "free events and amount, maximum", "maximum", "max", "min", "latest"],
)
@given(uses=st.lists(st.integers(0, 60), min_size=1, max_size=9))
def test_where_events_arrive_in_the_order_of_their_times_the_estimate_is_the_closing_price(
    charge: Charge, aggregation: str, uses: list[int]
) -> None:
    measured = meter(aggregation=aggregation)
    found = rows(run([use(i, tokens=str(tokens)) for i, tokens in enumerate(uses)], terms(charge, meters=(measured,))))
    members = [Member(NOW_US + i, "", n * UNIT, amount=n * 10**12) for i, n in enumerate(uses)]
    month = month_of(NOW_US, "UTC")
    closed = closing_price(charge, measured, members, Span(month.start_us, month.end_us, month))
    assert sum(row["amount"] for row in found) == amount_decimal(closed.amount)
    assert {row["price_class"] for row in found} == {"period"}


def test_a_segment_shorter_than_its_period_is_provisional_where_something_of_the_charge_is_prorated() -> None:
    start = parse_instant("2026-03-05T00:00:00Z")
    charge = replace(per_unit("1"), included=31 * UNIT)
    items = (meter(), plan(charge, per_unit("1", "bare")), account())
    short = rows(run([use(0)], view(*items, contract(start_us=start))))
    whole = rows(run([use(0)], view(*items, contract())))
    assert story(short, "charge", "price_class") == [("c", "period"), ("bare", "running")]
    assert story(whole, "charge", "price_class") == [("c", "running"), ("bare", "running")]


# -- prices


def test_an_accounts_price_list_overrides_and_stands_in_the_row() -> None:
    listed = PriceList(
        "acme-deal",
        3,
        "Deal",
        "basic",
        "USD",
        0,
        overrides=(Override("c", (("unit_price", Decimal("0.5")),)),),
        account="acme",
    )
    (row,) = rows(run([use(0)], view(meter(), plan(per_unit("1")), listed, account(), contract())))
    assert (row["amount"], row["price_version"], row["plan_version"]) == (5, "basic@1+acme-deal@3", 1)


def test_beyond_a_last_tier_that_parks_the_event_waits_whole() -> None:
    bounded = Charge("c", "tokens", "graduated", tiers=(Tier(25 * UNIT, Decimal(1)),), beyond="park")
    outcome = run([use(0), use(1), use(2), use(3, tokens="5")], terms(per_unit(id="first"), bounded))
    assert [refused.rejection.reason for refused in outcome.parked] == [Reason.BEYOND_LAST_TIER]
    assert story(rows(outcome), "charge", "quantity_after") == [
        ("first", 10),
        ("c", 10),
        ("first", 20),
        ("c", 20),
        ("first", 25),
        ("c", 25),
    ]


def test_quantities_given_back_are_priced_back_and_nothing_costs_less_than_zero_units() -> None:
    seats = meter(allow_negative=True)
    events = [use(i, tokens=tokens) for i, tokens in enumerate(("3", "-1", "-4", "5"))]
    found = rows(run(events, terms(per_unit("2"), meters=(seats,))))
    assert story(found, "quantity_after", "amount") == [(3, 6), (2, -2), (-2, -4), (3, 6)]


def test_one_event_moves_several_meters_and_is_left_out_of_those_it_does_not_pass() -> None:
    meters = (
        meter("all", aggregation="count", value=None),
        meter("big", filters=(Filter("tokens", ("100",), "ge"),)),
        meter("peak", aggregation="max"),
    )
    charges = tuple(per_unit("1", name, name) for name in ("all", "big", "peak"))
    found = rows(run([use(0, tokens="40"), use(1, tokens="200")], terms(*charges, meters=meters)))
    assert story(found, "charge", "quantity") == [
        ("all", 1),
        ("peak", 40),
        ("all", 1),
        ("big", 200),
        ("peak", 200),
    ]


# -- the law, through the rater: order and splitting do not matter

RUNNING = (
    replace(MATRIX, id="matrix"),
    Charge(
        "tiers",
        "tokens",
        "volume",
        tiers=(Tier(30 * UNIT, Decimal("0.3")), Tier(None, Decimal("0.2"), Decimal(1))),
        per_subject=True,
        by=("region",),
    ),
    Charge("packages", "tokens", "package", package_size=7 * UNIT, package_price=Decimal("0.9"), by=("model",)),
    Charge("share", "tokens", "percentage", rate=Decimal("1.5"), event_minimum=Decimal("0.01")),
)
USES = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from("ab"), st.sampled_from(["eu", "us"]), st.sampled_from(["x", "y"])),
    max_size=12,
)


@settings(deadline=None)
@given(USES, st.data())
def test_arrival_order_and_batches_change_no_total_of_running_and_per_event_charges(
    uses: list[tuple[int, str, str, str]], data: st.DataObject
) -> None:
    events = [
        use(number, subject, tokens=str(tokens), model=model, region=region)
        for number, (tokens, model, region, subject) in enumerate(uses)
    ]
    at_once = run(events, terms(*RUNNING))
    state, terms_view, found = Memory(), terms(*RUNNING), []
    shuffled = data.draw(st.permutations(events))
    cut = data.draw(st.integers(0, len(events)))
    for part in (shuffled[:cut], shuffled[cut:]):
        outcome = run([event._replace(offset=i) for i, event in enumerate(part)], terms_view, state)
        state.apply(outcome)
        found += rows(outcome)
    assert state.totals == at_once.totals
    assert _amounts(found) == _amounts(rows(at_once))


def _amounts(found: list[dict[str, Any]]) -> dict[tuple[str, str], Decimal]:
    sums: dict[tuple[str, str], Decimal] = {}
    for row in found:
        line = (row["charge"], row["cell"])
        sums[line] = sums.get(line, Decimal(0)) + row["amount"]
    return sums
