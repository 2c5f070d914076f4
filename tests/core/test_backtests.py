"""Backtests in the core: pricing from what lines hold is pricing event by event, or it declines."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.core.backtests import (
    PricedLine,
    Split,
    Total,
    compare,
    differing,
    everything,
    moving,
    price_totals,
    priced_lines,
    split_for,
    with_candidates,
)
from pipeline.core.catalog import Catalog, Terms
from pipeline.core.cells import cell_text
from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle
from pipeline.core.documents import Entry, Item, kind_of, to_document
from pipeline.core.meters import Filter, Meter, compile_cell, compile_measure
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_ONE, scaled
from pipeline.core.periods import Period, month_of, to_micros
from pipeline.core.plans import Plan, Pool
from pipeline.core.rerating import Use, close_period

OCTOBER = month_of(to_micros(datetime(2026, 10, 15, tzinfo=UTC)), "UTC")
MIDDLE = to_micros(datetime(2026, 10, 12, 6, tzinfo=UTC))
DAY_US = 86_400_000_000
ACCOUNT = Account("acme", 1, "Acme", "UTC")


def meter(id: str, **fields: Any) -> Meter:
    plain = {"event_type": "call", "aggregation": "sum", "value": "n", "unit": "token", "filters": ()}
    return Meter(id=id, version=1, allow_negative=False, valid_from_us=0, **{**plain, **fields})


TOKENS = meter("tokens", dimensions=("region", "model"))
METERS = [
    TOKENS,
    meter("calls", aggregation="count", value=None),
    meter("eu-tokens", filters=(Filter("region", ("eu",)),)),
    meter("jobs", event_type="job", aggregation="count", value=None),
    meter("users", aggregation="unique", value="model"),
]


def per_unit(meter: str = "tokens", price: str = "0.1", **fields: Any) -> Charge:
    return Charge(fields.pop("id", meter), meter, "per_unit", unit_price=Decimal(price), **fields)


def plan(*charges: Charge, id: str = "standard", **fields: Any) -> Plan:
    return Plan(id, 1, "Standard", "USD", 0, charges, **fields)


def entry(item: Item, valid_from_us: int = 0, version: int = 1) -> Entry:
    return Entry(kind_of(item), item.id, version, valid_from_us, to_document(item))


def contract(*later: Phase) -> Contract:
    return Contract("main", 1, "acme", "standard", 0, None, later_phases=later)


def entries(*items: Item, contract: Contract = contract()) -> list[Entry]:  # noqa: B008
    return [entry(item) for item in (*METERS, ACCOUNT, contract, *items)]


def use(day: int, n: int = 1, *, event_type: str = "call", region: str = "eu", model: str = "m") -> Use:
    at_us = OCTOBER.start_us + day * DAY_US
    properties = {b"n": str(n).encode(), b"region": region.encode(), b"model": model.encode()}
    return Use(event_type, at_us, f"{event_type}-{day}-{n}-{region}-{model}", model, properties)


def rated(catalog: Catalog, uses: Sequence[Use], split: Split | None = None) -> tuple[list[Use], list[Total]]:
    """What the stream makes of events: those that have a price, and what the lines, or parts of them, hold of them."""
    kept, totals = [], {}
    for one in uses:
        terms = catalog.terms("acme", one.event_type, one.at_us)
        if not isinstance(terms, Terms) or terms.segment.period != OCTOBER:
            continue
        measured = [(charge, meter, compile_measure(meter)(one.properties)) for charge, meter in terms.priced]
        counted = [(charge, meter, quantity) for charge, meter, quantity in measured if isinstance(quantity, int)]
        if not counted:
            continue
        kept.append(one)
        for charge, meter, quantity in counted:
            segment = terms.segment
            cell = cell_text([value.decode() for value in compile_cell(charge.by)(one.properties)])
            part: dict[str, Any] = {}
            if split is not None:
                texts = [value.decode() for value in compile_cell(split.properties)(one.properties)]
                part = {"properties": tuple(zip(split.properties, texts, strict=True)), "alive": True}
                part |= {"subject": one.subject} if split.subjects else {}
            after = bisect_right(split.cuts, one.at_us) if split else 0
            key = (segment.start_us, segment.contract.id, charge.id, cell, after, *part.values())
            known = totals.get(key)
            if known is None:
                known = Total(
                    segment.contract.id,
                    segment.price_version,
                    segment.start_us,
                    charge.id,
                    meter.id,
                    cell,
                    0,
                    one.at_us,
                    one.at_us,
                    **part,
                )
            totals[key] = known._replace(
                quantity=known.quantity + quantity,
                first_event_us=min(known.first_event_us, one.at_us),
                last_event_us=max(known.last_event_us, one.at_us),
            )
    return kept, list(totals.values())


def candidate_of(today: Sequence[Entry], *items: Item) -> Catalog:
    return Catalog.empty().extend(with_candidates(today, items), 0)


def both_ways(
    today: Sequence[Entry],
    items: Sequence[Item],
    uses: Sequence[Use],
    *,
    only_moving: bool = False,
    in_parts: bool = False,
) -> tuple[list[PricedLine] | None, list[PricedLine], int]:
    """Priced from totals (of parts), priced event by event, and how many events the candidate has no price for."""
    catalog, candidate = Catalog.empty().extend(today, 0), candidate_of(today, *items)
    kept, totals = rated(catalog, uses)
    changed = {item.id for item in items if isinstance(item, Meter)}
    closed = close_period(candidate, "acme", OCTOBER, kept)
    charges = (moving if only_moving else everything)(catalog, candidate, "acme", OCTOBER)
    if in_parts and (split := split_for(candidate, "acme", OCTOBER, charges)):
        _, totals = rated(catalog, uses, split)
    return (
        price_totals(catalog, candidate, "acme", OCTOBER, totals, charges=charges, changed=changed),
        priced_lines(closed, charges),
        len(closed.refused),
    )


def said(lines: Sequence[PricedLine]) -> list[tuple[int, str, str, str, int, int]]:
    return sorted(
        (line.segment.start_us, line.segment.contract.id, line.charge.id, line.cell, line.quantity, line.amount)
        for line in lines
    )


TIERS = (Tier(5 * QUANTITY_ONE, Decimal("0.3"), Decimal(1)), Tier(None, Decimal("0.07")))
PRICES = st.sampled_from(["0.1", "0.333333333333333333", "2"])
CHARGES = st.one_of(
    st.builds(per_unit, st.sampled_from(["tokens", "calls", "eu-tokens", "jobs", "users"]), PRICES),
    st.builds(per_unit, st.just("tokens"), PRICES, by=st.sampled_from([("region",), ("model", "region")])),
    st.builds(per_unit, st.just("tokens"), PRICES, included=st.just(7 * QUANTITY_ONE), minimum=st.just(Decimal(3))),
    st.builds(per_unit, st.just("tokens"), PRICES, per_subject=st.just(True)),
    st.builds(
        Charge,
        st.just("tiered"),
        st.sampled_from(["tokens", "calls", "jobs"]),
        st.sampled_from(["graduated", "volume"]),
        tiers=st.just(TIERS),
        flat_on_zero=st.booleans(),
        maximum=st.sampled_from([None, Decimal(2)]),
        by=st.just(()),
    ),
    st.just(
        Charge(
            "matrix",
            "tokens",
            "matrix",
            unit_price=Decimal(1),
            by=("region",),
            cells=(Cell(("eu",), Decimal("0.5")),),
        )
    ),
    st.just(Charge("fee", None, "flat", unit_price=Decimal(31))),
    st.just(Charge("share", "calls", "percentage", rate=Decimal(1), fixed=Decimal("0.1"))),
)
PLANS = st.lists(CHARGES, min_size=1, max_size=4, unique_by=lambda charge: charge.id).map(lambda found: plan(*found))
USES = st.lists(
    st.builds(
        use,
        st.integers(0, 30),
        st.integers(0, 9),
        event_type=st.sampled_from(["call", "call", "job"]),
        region=st.sampled_from(["eu", "us", ""]),
        model=st.sampled_from(["a", "b,c"]),
    ),
    max_size=12,
    unique_by=lambda one: one.key,
)
CONTRACTS = st.sampled_from([contract(), contract(Phase(MIDDLE, "other"))])
#: A second subscription, which charges what the first does not, or goes before it by its id, or is of other periods.
BESIDE = st.sampled_from(["a", "z"]).flatmap(
    lambda id: st.builds(
        Contract,
        st.just(id),
        st.just(1),
        st.just("acme"),
        st.just("other"),
        st.sampled_from([0, MIDDLE - 4 * DAY_US]),
        st.sampled_from([None, MIDDLE + 9 * DAY_US]),
        cycle=st.sampled_from([Cycle(), Cycle("quarter")]),
    )
)


@settings(max_examples=150, deadline=None)
@given(
    first=PLANS,
    second=st.none() | PLANS,
    other=PLANS,
    new=PLANS,
    agreed=CONTRACTS,
    beside=st.none() | BESIDE,
    uses=USES,
    measure=st.booleans(),
    only=st.booleans(),
    parts=st.booleans(),
)
def test_totals_give_what_events_give(
    first: Plan,
    second: Plan | None,
    other: Plan,
    new: Plan,
    agreed: Contract,
    beside: Contract | None,
    uses: list[Use],
    measure: bool,
    only: bool,
    parts: bool,
) -> None:
    today = entries(first, replace(other, id="other"), contract=agreed)
    if second is not None:
        today.append(entry(second, MIDDLE - DAY_US, 2))
    if beside is not None:
        today.append(entry(beside))
    items: list[Item] = [new]
    if measure:
        items.append(meter("calls", aggregation="sum", value="n"))
    from_totals, from_events, unpriced = both_ways(today, items, uses, only_moving=only, in_parts=parts)
    event(f"{'parts' if parts else 'lines'}: {'declined' if from_totals is None else 'done'}")
    if from_totals is None:
        return
    assert unpriced == 0
    event(f"{'with' if beside else 'without'} another contract")
    assert said(from_totals) == said(from_events)


@pytest.mark.parametrize(
    ("old", "new", "enough"),
    [
        pytest.param([per_unit()], [per_unit(price="0.2")], "lines", id="a price"),
        pytest.param(
            [per_unit()], [Charge("tokens", "tokens", "graduated", tiers=TIERS)], "lines", id="another running model"
        ),
        pytest.param([per_unit(by=("region",))], [per_unit()], "lines", id="cells that become one"),
        pytest.param([per_unit(by=("region", "model"))], [per_unit(by=("model",))], "lines", id="fewer dimensions"),
        pytest.param([per_unit()], [per_unit(), per_unit(id="more")], "lines", id="another charge of a known meter"),
        pytest.param(
            [per_unit()], [per_unit(), Charge("fee", None, "flat", unit_price=Decimal(9))], "lines", id="a fee"
        ),
        pytest.param([per_unit()], [per_unit(), per_unit("jobs")], "lines", id="what was never used"),
        pytest.param([per_unit()], [per_unit(by=("region",))], "parts", id="cells of what is one"),
        pytest.param([per_unit()], [per_unit(per_subject=True)], "parts", id="by subject"),
        pytest.param([per_unit()], [per_unit("calls")], "events", id="another meter"),
        pytest.param([per_unit()], [per_unit(), per_unit("calls")], "events", id="one meter more"),
        pytest.param([per_unit()], [per_unit(), per_unit("users")], "events", id="a unique count"),
        pytest.param([per_unit()], [per_unit("jobs")], "events", id="usage that has no price any more"),
    ],
)
def test_when_totals_are_enough(old: list[Charge], new: list[Charge], enough: str) -> None:
    uses = [use(1, 3), use(20, 4, region="us"), use(20, 5, model="x"), use(21, 1, region="")]
    for parts in (False, True):
        from_totals, from_events, _ = both_ways(entries(plan(*old)), [plan(*new)], uses, in_parts=parts)
        assert (from_totals is not None) is (enough == "lines" or (parts and enough == "parts"))
        if from_totals is not None:
            assert said(from_totals) == said(from_events)


def test_two_versions_that_become_one_are_one_counter() -> None:
    """A tier counts on through the month where the candidate has held all along."""
    tiered = Charge("tokens", "tokens", "graduated", tiers=TIERS)
    today = [*entries(plan(tiered)), entry(plan(replace(tiered, included=1)), MIDDLE, 2)]
    from_totals, from_events, _ = both_ways(today, [plan(tiered)], [use(1, 4), use(20, 4)])
    assert from_totals is not None and said(from_totals) == said(from_events)
    assert [line.quantity for line in from_totals] == [8 * QUANTITY_ONE]


def test_a_segment_that_begins_amid_events_needs_parts_on_either_side() -> None:
    today = entries(plan(per_unit()), plan(per_unit(), id="other"))
    moved = [one for one in today if one.kind != "contract"] + [entry(contract(Phase(MIDDLE, "other")))]
    catalog, later = Catalog.empty().extend(today, 0), Catalog.empty().extend(moved, 0)
    for uses, exact in (([use(1), use(20)], False), ([use(1), use(2)], True)):
        _, totals = rated(catalog, uses)
        assert (price_totals(catalog, later, "acme", OCTOBER, totals, charges={"tokens"}) is not None) is exact
        _, parts = rated(catalog, uses, split_for(later, "acme", OCTOBER, {"tokens"}))
        from_parts = price_totals(catalog, later, "acme", OCTOBER, parts, charges={"tokens"})
        from_events = priced_lines(close_period(later, "acme", OCTOBER, uses), {"tokens"})
        assert from_parts is not None and said(from_parts) == said(from_events)


def test_events_that_would_be_another_contract_s_need_to_be_looked_at() -> None:
    """The candidate lets the contract of the lower id charge calls as well: it goes before the one that does today."""
    beside = Contract("a", 1, "acme", "other", MIDDLE, None)
    today = [*entries(plan(per_unit()), plan(per_unit("jobs"), id="other")), entry(beside)]
    candidate = plan(per_unit("jobs"), per_unit(price="2"), id="other")
    from_totals, from_events, _ = both_ways(today, [candidate], [use(1), use(20), use(21, event_type="job")])
    assert from_totals is None
    assert [(one[1], one[2], one[4]) for one in said(from_events) if one[4]] == [
        ("main", "tokens", QUANTITY_ONE),
        ("a", "jobs", QUANTITY_ONE),
        ("a", "tokens", QUANTITY_ONE),
    ]
    untouched, _, _ = both_ways(today, [plan(per_unit(price="3"))], [use(1), use(20), use(21, event_type="job")])
    assert untouched is not None, "nor do contracts beside each other stand in the way"


@pytest.mark.parametrize(
    "wrong",
    [{"price_version": "standard@7"}, {"contract": "other"}, {"segment_start_us": MIDDLE}, {"last_event_us": 2**62}],
)
def test_lines_that_today_s_catalog_did_not_rate_are_not_trusted(wrong: dict[str, Any]) -> None:
    today = entries(plan(per_unit()))
    catalog = Catalog.empty().extend(today, 0)
    _, (total,) = rated(catalog, [use(1), use(20)])
    assert price_totals(catalog, catalog, "acme", OCTOBER, [total], charges={"tokens"}) is not None
    assert price_totals(catalog, catalog, "acme", OCTOBER, [total._replace(**wrong)], charges={"tokens"}) is None


def test_cells_whose_events_cancel_out_need_them() -> None:
    """Voided or given back: the sum cannot tell whether the cell's flat fee is still due."""
    tiered = Charge("tokens", "tokens", "graduated", tiers=TIERS, by=("region",))
    catalog = Catalog.empty().extend(entries(plan(tiered)), 0)
    _, (total,) = rated(catalog, [use(1)])
    assert price_totals(catalog, catalog, "acme", OCTOBER, [total], charges={"tokens"}) is not None
    for alive, lines in ((None, None), (False, 0), (True, 1)):
        nothing = total._replace(quantity=0, alive=alive)
        found = price_totals(catalog, catalog, "acme", OCTOBER, [nothing], charges={"tokens"})
        assert (found if found is None else len(found)) == lines


def test_pools_need_events() -> None:
    pooled = plan(per_unit(), pools=(Pool("shared", "token", 5 * QUANTITY_ONE, ("tokens",)),))
    from_totals, from_events, _ = both_ways(entries(plan(per_unit())), [pooled], [use(1, 4), use(2, 4)])
    assert from_totals is None
    assert [line.amount for line in from_events] == [scaled(Decimal("0.3"), AMOUNT_DECIMALS)]


def test_what_differs_in_a_month() -> None:
    today = [*entries(plan(per_unit())), entry(plan(per_unit(price="0.2")), MIDDLE, 2)]
    old, new, newest = plan(per_unit()), plan(per_unit(price="0.2")), plan(per_unit(price="0.3"))
    november = Period(OCTOBER.end_us, OCTOBER.end_us + 30 * DAY_US)

    def said_of(item: Item, period: Period = OCTOBER) -> list[Item]:
        return differing(today, [item], period.start_us, period.end_us)

    assert said_of(old) == [old] and said_of(new) == [new] and said_of(newest) == [newest]
    assert said_of(new, november) == [] and said_of(old, november) == [old]
    assert said_of(TOKENS) == []
    assert said_of(plan(per_unit(), id="brand-new")) != []
    with pytest.raises(ValueError, match="expected meters, plans and price lists to backtest, got account"):
        with_candidates(today, [ACCOUNT])


def test_what_may_move() -> None:
    users, fee = per_unit("users"), Charge("fee", None, "flat", unit_price=Decimal(1))
    pool = Pool("shared", "token", 5 * QUANTITY_ONE, ("tokens",))
    today = entries(plan(per_unit(), users), plan(per_unit(), id="other"))
    catalog = Catalog.empty().extend(today, 0)

    def moves(*items: Item) -> set[str]:
        return set(moving(catalog, candidate_of(today, *items), "acme", OCTOBER))

    assert moves(plan(per_unit(), users)) == moves(plan(per_unit(price="0.2"), id="other")) == set()
    assert moves(plan(per_unit(price="0.2"), users)) == {"tokens"}
    assert moves(plan(per_unit(), users, pools=(pool,))) == {"tokens"}
    assert moves(plan(users, fee)) == {"tokens", "fee"}
    assert moves(replace(TOKENS, value="m")) == {"tokens"}
    assert set(everything(catalog, catalog, "acme", OCTOBER)) == {"tokens", "users"}


def test_a_charge_that_stays_needs_no_events() -> None:
    """A unique count beside it does not hold up a price by unit."""
    today = entries(plan(per_unit(), per_unit("users")))
    new, uses = [plan(per_unit(price="0.2"), per_unit("users"))], [use(1, 3), use(2, 4)]
    from_totals, from_events, _ = both_ways(today, new, uses, only_moving=True)
    assert from_totals is not None and said(from_totals) == said(from_events)
    assert both_ways(today, new, uses)[0] is None


def test_a_comparison_adds_up_segments_and_rounds_line_by_line() -> None:
    today = [*entries(plan(per_unit(price="0.005"))), entry(plan(per_unit(price="0.015")), MIDDLE, 2)]
    catalog = Catalog.empty().extend(today, 0)
    uses = [use(1), use(20)]
    both = {"tokens", "fee"}
    before = priced_lines(close_period(catalog, "acme", OCTOBER, uses), both)
    fee = Charge("fee", None, "flat", unit_price=Decimal(1))
    candidate = candidate_of(today, plan(per_unit(price="0.005"), fee))
    after = priced_lines(close_period(candidate, "acme", OCTOBER, uses), both)
    tokens, added = compare(before, after)
    assert (tokens.contract, tokens.charge, tokens.currency) == ("main", "tokens", "USD")
    assert tokens.before is not None and tokens.after is not None
    cent = scaled(Decimal("0.01"), AMOUNT_DECIMALS)
    assert (tokens.before.amount, tokens.before.billed, tokens.before.segments) == (2 * cent, 3 * cent, 2)
    assert (tokens.after.amount, tokens.after.billed, tokens.after.segments) == (cent, cent, 1)
    assert tokens.moved == -cent
    assert (added.charge, added.before, added.moved) == ("fee", None, 100 * cent)
