"""Closing prices of whole periods, and that rows + entries come to them, however usage arrived."""

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.billing.close_entries import Cause
from pipeline.billing.rerate import differences
from pipeline.core.catalog import Catalog
from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.credits import Grant
from pipeline.core.cycles import Cycle
from pipeline.core.documents import Entry, kind_of, to_document
from pipeline.core.meters import Filter, Meter
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_ONE, amount_decimal, round_half_up_div, scaled
from pipeline.core.periods import format_instant, parse_instant
from pipeline.core.plans import Plan, Pool
from pipeline.core.rerating import Use, carried_event_types, close_period, first_moment
from tests.scenarios.story import World

UNIT = QUANTITY_ONE
OCTOBER = parse_instant("2026-10-01T00:00:00Z")
HOUR_US = 3_600_000_000
MONTH = "2026-10"


def meter(id: str, aggregation: Any = "sum", **fields: Any) -> Meter:
    value = None if aggregation == "count" else fields.pop("value", "n")
    given = {"event_type": "call", "unit": "call", "filters": (), "allow_negative": False, "valid_from_us": 0} | fields
    return Meter(id=id, version=1, aggregation=aggregation, value=value, **given)


METERS = (
    meter("calls"),
    meter("count", "count"),
    meter("peak", "max"),
    meter("users", "unique", value="user"),
    meter("average", "average"),
    meter("level", "time_weighted", time_unit="period", carries_over=True),
    meter("eu", filters=(Filter("region", ("eu",)),)),
)
TIERS = (Tier(20 * UNIT, Decimal("0.3"), Decimal(1)), Tier(None, Decimal("0.1"), Decimal(2)))
CHARGES = (
    Charge("graduated", "calls", "graduated", tiers=TIERS, included=7 * UNIT),
    Charge("volume", "calls", "volume", tiers=TIERS),
    Charge("package", "calls", "package", package_size=10 * UNIT, package_price=Decimal(3)),
    Charge("by-region", "calls", "matrix", Decimal(1), by=("region",), cells=(Cell(("eu",), Decimal(2)),)),
    Charge("by-user", "count", "graduated", tiers=TIERS, per_subject=True),
    Charge("fee-each", "calls", "percentage", rate=Decimal("2.9"), fixed=Decimal("0.3"), event_maximum=Decimal(1)),
    Charge("free-first", "calls", "percentage", rate=Decimal(1), free_events=2),
    Charge("peak", "peak", "per_unit", Decimal(5)),
    Charge("users", "users", "per_unit", Decimal(4)),
    Charge("average", "average", "per_unit", Decimal(3)),
    Charge("level", "level", "per_unit", Decimal(10)),
    Charge("pooled-1", "calls", "per_unit", Decimal("0.2")),
    Charge("pooled-2", "eu", "per_unit", Decimal("0.7")),
    Charge("least", "calls", "per_unit", Decimal("0.01"), minimum=Decimal(5)),
    Charge("most", "calls", "per_unit", Decimal(1), maximum=Decimal(30)),
    Charge("fee", None, "flat", Decimal(9)),
)
#: What the stream knows for sure: their entries are 0.
FINAL = {"graduated", "volume", "package", "by-region", "by-user", "fee-each", "most"}
POOL = Pool("pool", "call", 40 * UNIT, ("pooled-1", "pooled-2"))


def plan(version: int = 1, valid_from_us: int = 0, factor: int = 1, id: str = "all") -> Plan:
    charges = tuple(replace(one, unit_price=one.unit_price * factor) if one.unit_price else one for one in CHARGES)
    return Plan(id, version, "All", "USD", valid_from_us, charges, (POOL,))


ACCOUNT = Account("acme", 1, "Acme", "UTC")
CONTRACT = Contract("acme-1", 1, "acme", "all", 0, None)


def entries(*items: Account | Contract | Meter | Plan) -> list[Entry]:
    return [
        Entry(kind_of(item), item.id, item.version, getattr(item, "valid_from_us", 0), to_document(item))
        for item in items
    ]


def world(*items: Account | Contract | Meter | Plan) -> World:
    made = World(Path())
    made.versions = entries(*METERS, *items)
    return made


@st.composite
def usage(draw: st.DrawFn) -> list[tuple[int, str]]:
    """Lines of a story in order of arrival, with the hour each happened."""
    count = draw(st.integers(1, 9))
    lines = []
    for number in range(count):
        hour = draw(st.integers(0, 31 * 24 - 1))
        n, region, user = draw(st.integers(0, 30)), draw(st.sampled_from(["eu", "us"])), draw(st.sampled_from("abc"))
        at = format_instant(OCTOBER + hour * HOUR_US)
        lines.append((hour, f"{at} acme/k{number} call {user} n={n} region={region} user={user}"))
    return lines


def total(of: World) -> int:
    return sum(line.amount for line in of.lines("acme", MONTH))


@given(usage(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_rows_and_entries_are_the_closing_price_whatever_the_order(lines: list[tuple[int, str]], shuffle: Any) -> None:
    shuffled = [line for _, line in lines]
    shuffle.shuffle(shuffled)
    bills = []
    for arrived in (sorted(line for _, line in lines), shuffled):
        one = world(plan(), ACCOUNT, CONTRACT)
        one.use(arrived, "2026-10-31T23:59:59Z")
        assert {entry.terms.charge for entry in one.missing("acme", MONTH)} & FINAL == set()
        one.rerate("acme", MONTH)
        assert one.missing("acme", MONTH) == []
        bills.append(
            {(line.terms.charge, line.terms.cell): (line.quantity, line.amount) for line in one.lines("acme", MONTH)}
        )
    assert bills[0] == bills[1]


@given(usage(), usage())
@settings(max_examples=15, deadline=None)
def test_add_and_void_is_as_if_it_had_not_been(kept: list[tuple[int, str]], gone: list[tuple[int, str]]) -> None:
    without = world(plan(), ACCOUNT, CONTRACT)
    without.use([line for _, line in kept], "2026-10-31T23:59:59Z")
    without.rerate("acme", MONTH)
    mixed = world(plan(), ACCOUNT, CONTRACT)
    extra = [line.replace("acme/k", "acme/gone") for _, line in gone]
    for pair in zip([line for _, line in kept] + [""] * len(extra), extra + [""] * len(kept), strict=True):
        mixed.use(pair, "2026-10-31T23:59:59Z")
    for _, line in gone:
        mixed.void("acme", line.split()[1].replace("acme/k", "gone"))
    mixed.rerate("acme", MONTH)
    assert total(mixed) == total(without)
    bills = [
        {_line_name(line.terms): line.amount for line in one.lines("acme", MONTH) if line.amount}
        for one in (mixed, without)
    ]
    assert bills[0] == bills[1]


def _line_name(terms: Any) -> tuple[str, str, int]:
    return terms.charge, terms.cell, terms.segment_start_us


@given(usage(), st.integers(1, 31 * 24 - 1))
@settings(max_examples=15, deadline=None)
def test_a_back_dated_price_ends_where_a_timely_one_had(lines: list[tuple[int, str]], hour: int) -> None:
    """Usage rated by version 1 throughout, and usage rated by both as they should have been: the same bill."""
    late, timely = world(plan(), ACCOUNT, CONTRACT), world(plan(), ACCOUNT, CONTRACT)
    second = plan(2, OCTOBER + hour * HOUR_US, factor=2)
    timely.versions += entries(second)
    for one in (late, timely):
        one.use([line for _, line in lines], "2026-10-31T23:59:59Z")
    late.versions += entries(second)
    bills = []
    for one in (late, timely):
        one.rerate("acme", MONTH)
        assert one.missing("acme", MONTH) == []
        found = {(line.terms.price_version, *_line_name(line.terms)): line.amount for line in one.lines("acme", MONTH)}
        bills.append({name: amount for name, amount in found.items() if amount})
    assert bills[0] == bills[1]


# -- single rules


def closed(items: Sequence[Any], uses: Sequence[Use], earlier: Sequence[Use] = ()) -> dict[str, Decimal]:
    """Charge and, where there are some, cell → closing price."""
    catalog = Catalog.empty().extend(entries(*METERS, *items), 1)
    period = next(iter(catalog.segments("acme", OCTOBER, OCTOBER + 1))).period
    found = close_period(catalog, "acme", period, uses, earlier)
    assert found.refused == ()
    assert found.amount == sum(line.amount for line in found.lines)
    return {line.charge.id + line.cell: amount_decimal(line.amount) for line in found.lines}


def use(key: str, day: int, **properties: str) -> Use:
    encoded = {name.encode(): value.encode() for name, value in properties.items()}
    return Use("call", OCTOBER + (day - 1) * 24 * HOUR_US, key, "", encoded)


def small(*charges: Charge, **fields: Any) -> Plan:
    return Plan("all", 1, "All", "USD", 0, charges, **fields)


def test_a_charge_without_usage_owes_what_it_owes_at_zero() -> None:
    charges = [one for one in CHARGES if one.id in ("graduated", "by-user", "least", "fee")]
    assert closed([small(*charges), ACCOUNT, CONTRACT], []) == {"graduated": 1, "least": 5, "fee": 9}


def test_a_level_goes_on_over_months_and_plans() -> None:
    """Set to 4 in September; Acme changes plan in the middle of October, and nobody touches the level."""
    level = next(one for one in CHARGES if one.id == "level")
    middle = OCTOBER + 31 * 12 * HOUR_US
    contract = Contract("acme-1", 1, "acme", "all", 0, None, later_phases=(Phase(middle, "other"),))
    other = Plan("other", 1, "Other", "USD", 0, (level,))
    catalog = Catalog.empty().extend(entries(*METERS, small(level), other, ACCOUNT, contract), 1)
    period = next(iter(catalog.segments("acme", OCTOBER, OCTOBER + 1))).period
    assert carried_event_types(catalog, "acme", period) == {"call"}
    found = close_period(catalog, "acme", period, [], [use("sep", -5, n="4")])
    assert [(line.segment.plan.id, amount_decimal(line.amount)) for line in found.lines] == [("all", 20), ("other", 20)]
    assert carried_event_types(catalog, "acme", period) == {"call"}


QUARTERLY = Contract("acme-2", 1, "acme", "all", OCTOBER + 10 * 24 * HOUR_US, None, cycle=Cycle("quarter"))


def test_contracts_of_other_periods_are_closed_on_their_own() -> None:
    """From 11 October on Acme is billed by quarters: October has ten days of the month, the quarter the rest of it."""
    month = Contract("acme-1", 1, "acme", "all", 0, QUARTERLY.start_us)
    level = next(one for one in CHARGES if one.id == "level")
    catalog = Catalog.empty().extend(entries(*METERS, small(CHARGES[1], level), ACCOUNT, month, QUARTERLY), 1)
    october, quarter = catalog.periods_at("acme", OCTOBER)
    assert first_moment(catalog, "acme", october) == OCTOBER
    assert first_moment(catalog, "acme", quarter) == QUARTERLY.start_us, "so what October left is earlier"
    before = use("a", 2, n="4")
    found = [
        close_period(catalog, "acme", october, [before]),
        close_period(catalog, "acme", quarter, [use("b", 20, n="4")], [before]),
    ]
    assert [[(line.segment.contract.id, line.charge.id) for line in one.lines] for one in found] == [
        [("acme-1", "volume"), ("acme-1", "level")],
        [("acme-2", "volume"), ("acme-2", "level")],
    ]
    levels = [one.lines[1].amount for one in found]
    # 4 from 2 to 11 October, of 31 days; then on to the year's end, 82 of the quarter's 92 days.
    quantities = [round_half_up_div(4 * UNIT * days, of) for days, of in ((9, 31), (82, 92))]
    assert levels == [quantity * scaled(Decimal(10), AMOUNT_DECIMALS) // UNIT for quantity in quantities]


def test_usage_billed_in_another_period_is_refused_not_dropped() -> None:
    catalog = Catalog.empty().extend(entries(*METERS, small(CHARGES[1]), ACCOUNT, QUARTERLY), 1)
    found = close_period(catalog, "acme", closed_period(), [use("k", 20)])
    ((_, rejection),) = found.refused
    assert rejection.message == (
        "expected a contract with the period it was billed in, got 'acme-2' with 2026-10-01T00:00:00Z to "
        "2027-01-01T00:00:00Z"
    )


@pytest.mark.parametrize(("first", "then", "prices"), [("sum", "max", [11, 5]), ("max", "sum", [9, 7])])
def test_events_keep_the_way_their_meter_made_one_quantity_of_them(first: str, then: str, prices: list[int]) -> None:
    charge = Charge("c", "n", "per_unit", Decimal(1))
    changed = replace(meter("n", then), version=2, valid_from_us=OCTOBER + 10 * 24 * HOUR_US)
    catalog = Catalog.empty().extend(entries(meter("n", first), changed, small(charge), ACCOUNT, CONTRACT), 1)
    uses = [use("a", 5, n="9"), use("b", 6, n="2"), use("c", 15, n="5"), use("d", 16, n="2")]
    period = catalog.segments("acme", OCTOBER, OCTOBER + 1)[0].period
    found = close_period(catalog, "acme", period, uses)
    assert [amount_decimal(line.amount) for line in found.lines] == prices


def test_unit_credits_go_on_over_a_change_of_price() -> None:
    """10 units: all 6 calls of the first price and 4 of the 9 at twice of it, whichever event came first."""
    charge = Charge("c", "calls", "per_unit", Decimal(1))
    dearer = replace(small(replace(charge, unit_price=Decimal(2))), version=2, valid_from_us=OCTOBER + 240 * HOUR_US)
    catalog = Catalog.empty().extend(entries(*METERS, small(charge), dearer, ACCOUNT, CONTRACT), 1)
    grant = Grant("units", 10 * UNIT, reduces="units", charges=frozenset({"c"}))
    uses = [use("a", 5, n="6"), use("b", 15, n="9")]
    for arrived in (uses, uses[::-1]):
        found = close_period(catalog, "acme", closed_period(), arrived, grants=[grant])
        assert [(line.units, amount_decimal(line.amount)) for line in found.lines] == [
            ({"units": 6 * UNIT}, 0),
            ({"units": 4 * UNIT}, 10),
        ]


def test_of_meters_that_start_anew_earlier_events_do_not_matter() -> None:
    catalog = Catalog.empty().extend(entries(*METERS, small(CHARGES[0]), ACCOUNT, CONTRACT), 1)
    period = next(iter(catalog.segments("acme", OCTOBER, OCTOBER + 1))).period
    assert carried_event_types(catalog, "acme", period) == frozenset()


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        pytest.param([small(CHARGES[0]), ACCOUNT], "no_contract", id="no contract"),
        pytest.param([small(CHARGES[9]), ACCOUNT, CONTRACT], "missing_property", id="not measurable"),
        pytest.param([small(CHARGES[12]), ACCOUNT, CONTRACT], "no_charge", id="counted by no charge"),
    ],
)
def test_what_has_no_price_today_is_refused_not_dropped(items: list[Any], problem: str) -> None:
    catalog = Catalog.empty().extend(entries(*METERS, *items), 1)
    period = closed_period()
    found = close_period(catalog, "acme", period, [use("k", 3, region="us")])
    assert [(one.key, rejection.reason.value) for one, rejection in found.refused] == [("k", problem)]


def closed_period() -> Any:
    catalog = Catalog.empty().extend(entries(*METERS, small(CHARGES[0]), ACCOUNT, CONTRACT), 1)
    return next(iter(catalog.segments("acme", OCTOBER, OCTOBER + 1))).period


def test_rows_that_do_not_add_up_are_named_as_that() -> None:
    one = world(small(CHARGES[1]), ACCOUNT, CONTRACT)
    one.use(["2026-10-05T00:00:00Z acme/k call - n=5"], None)
    (row,) = one.rows
    one.rows = [row._replace(amount=row.amount + 1)]
    (entry,) = one.missing("acme", MONTH)
    assert (entry.reasons, entry.amount, entry.quantity) == ((Cause.ROWS_DIFFER,), -1, 0)


def test_rows_that_do_not_add_up_are_named_beside_a_credit() -> None:
    """5 calls at 1.00, of which 2 are credited: that explains 2.00, and not a row that was lost or repeated."""
    one = world(small(Charge("c", "calls", "per_unit", Decimal(1))), ACCOUNT, CONTRACT)
    one.use(["2026-10-05T00:00:00Z acme/k call - n=5"], None)
    grant = Grant("units", 2 * UNIT, reduces="units", charges=frozenset({"c"}))
    closed = close_period(one.catalog, "acme", closed_period(), [use("k", 5, n="5")], grants=[grant])
    (line,) = one.lines("acme", MONTH)
    whole = line.amount

    def reasons(rows: int, booked: int = 0) -> tuple[Cause, ...]:
        (entry,) = differences(closed, [replace(line, amount=rows + booked, booked=booked)])
        return entry.reasons

    assert whole == scaled(Decimal(5), AMOUNT_DECIMALS)
    assert reasons(whole) == (Cause.CREDITED,)
    assert reasons(whole, booked=-whole) == (Cause.CREDITED,)
    assert reasons(2 * whole) == reasons(whole - 1) == (Cause.CREDITED, Cause.ROWS_DIFFER)


def test_a_segment_cut_short_gives_less_for_free() -> None:
    """Rated with a whole month's 31 included units; then the contract is ended after half the month."""
    charge = Charge("calls", "calls", "per_unit", Decimal(1), included=31 * UNIT)
    one = world(small(charge), ACCOUNT, CONTRACT)
    one.use(["2026-10-05T00:00:00Z acme/k call - n=31"], None)
    ended = Contract("acme-1", 2, "acme", "all", 0, OCTOBER + 10 * 24 * HOUR_US)
    one.versions += entries(ended)
    (entry,) = one.missing("acme", MONTH)
    assert (entry.reasons, entry.amount) == ((Cause.PRORATED,), scaled(Decimal(21), AMOUNT_DECIMALS))


def test_differences_of_nothing_are_nothing() -> None:
    catalog = Catalog.empty().extend(entries(*METERS, small(CHARGES[1]), ACCOUNT), 1)
    assert differences(close_period(catalog, "acme", closed_period(), []), []) == []
