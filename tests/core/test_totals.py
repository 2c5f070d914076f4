"""A close from what lines hold is a close from the events behind them, or it declines."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import event, given, settings

from pipeline.core.catalog import Catalog, Terms
from pipeline.core.cells import cell_text
from pipeline.core.charges import Charge
from pipeline.core.contracts import Contract
from pipeline.core.meters import compile_cell, compile_measure
from pipeline.core.plans import Plan
from pipeline.core.rerating import Use, close_period
from pipeline.core.totals import LineSum, close_sums
from tests.core.test_backtests import (
    CONTRACTS,
    DAY_US,
    MIDDLE,
    OCTOBER,
    PLANS,
    TIERS,
    USES,
    entries,
    entry,
    meter,
    per_unit,
    plan,
    use,
)


def lines(catalog: Catalog, uses: Sequence[Use]) -> tuple[list[Use], list[LineSum]]:
    """What the stream makes of events: those that have a price, and what the lines hold of them."""
    kept = []
    found: dict[tuple[object, ...], LineSum] = {}
    for one in uses:
        terms = catalog.terms("acme", one.event_type, one.at_us)
        if not isinstance(terms, Terms):
            continue
        counted = 0
        for charge, measured in terms.priced:
            quantity = compile_measure(measured)(one.properties)
            if not isinstance(quantity, int):
                continue
            counted += 1
            segment = terms.segment
            cell = cell_text([value.decode() for value in compile_cell(charge.by)(one.properties)])
            names = (
                segment.contract.id,
                segment.price_version,
                segment.start_us,
                charge.id,
                measured.id,
                measured.version,
            )
            held = found.get((*names, cell), LineSum(*names, cell, 0, 0, one.at_us, one.at_us))
            found[(*names, cell)] = held._replace(
                quantity=held.quantity + quantity,
                events=held.events + 1,
                first_event_us=min(held.first_event_us or 0, one.at_us),
                last_event_us=max(held.last_event_us or 0, one.at_us),
            )
        kept += [one] if counted else []
    return kept, list(found.values())


@settings(max_examples=150, deadline=None)
@given(first=PLANS, second=PLANS, other=PLANS, agreed=CONTRACTS, uses=USES)
def test_lines_close_as_their_events_do(
    first: Plan, second: Plan, other: Plan, agreed: Contract, uses: list[Use]
) -> None:
    """A plan that changes within the month, for another one maybe; charges of every class."""
    versions = entries(first, replace(other, id="other"), contract=agreed)
    catalog = Catalog.empty().extend([*versions, entry(second, MIDDLE - DAY_US, 2)], 0)
    kept, sums = lines(catalog, uses)
    closed = close_sums(catalog, "acme", OCTOBER, sums)
    event("declined" if closed is None else "done")
    if closed is not None:
        assert closed == close_period(catalog, "acme", OCTOBER, kept)


def declines(catalog: Catalog, sums: Sequence[LineSum], unsettled: Sequence[str] = ()) -> bool:
    return close_sums(catalog, "acme", OCTOBER, sums, unsettled=unsettled) is None


def test_declines_where_only_events_can_tell() -> None:
    uses = [use(3, 5), use(4, 2)]
    catalog = Catalog.empty().extend(entries(plan(per_unit())), 0)
    _, sums = lines(catalog, uses)
    assert not declines(catalog, sums)
    assert not declines(catalog, [sum._replace(events=0) for sum in sums]), "lines that entries made say nothing"
    assert declines(catalog, sums, ["tokens"]), "the meter may count events that stand nowhere"
    for changed in (
        {"price_version": "standard@9"},
        {"contract": "another"},
        {"segment_start_us": MIDDLE},
        {"charge": "gone"},
        {"meter": "calls"},
        {"meter_version": 2},
        {"last_event_us": OCTOBER.end_us},
        {"first_event_us": OCTOBER.start_us - 1},
    ):
        assert declines(catalog, [sum._replace(**changed) for sum in sums]), changed  # type: ignore[arg-type]
    later = Catalog.empty().extend(
        [*entries(plan(per_unit())), entry(replace(meter("tokens"), version=2), MIDDLE, 2)], 0
    )
    assert declines(later, [sum._replace(last_event_us=MIDDLE) for sum in sums]), "another version measured the last"
    for charge in (
        Charge("tokens", "tokens", "graduated", tiers=TIERS, per_subject=True),
        per_unit("users", id="tokens"),
        Charge("tokens", "calls", "percentage", rate=TIERS[0].unit_price),
    ):
        other = Catalog.empty().extend(entries(plan(charge)), 0)
        assert declines(other, lines(other, uses)[1]), charge
    split = Catalog.empty().extend(entries(plan(per_unit(by=("region",)))), 0)
    _, sums = lines(split, uses)
    assert declines(split, [sum._replace(quantity=0) for sum in sums]), "a cell that was voided, or is 0"
