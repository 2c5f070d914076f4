"""Closing prices: every class of charge, whatever order usage arrived in; pools, limits and segments."""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.aggregation import Opening
from pipeline.core.charges import (
    Cell,
    Charge,
    Share,
    Tier,
    charge_class,
    compile_event_price,
    compile_price,
)
from pipeline.core.closing import Closing, Counter, Member, Span, close_pools, close_segment, closing_price
from pipeline.core.meters import Meter, Rounding
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_ONE, amount_decimal, plain, scaled
from pipeline.core.periods import Period
from pipeline.core.plans import Pool

MONTH = Period(0, 30 * 86_400_000_000)
SPAN = Span(MONTH.start_us, MONTH.end_us, MONTH)
ONE = QUANTITY_ONE

SUM = Meter("m", 1, "e", "sum", "v", "unit", (), True, 0, dimensions=("region",))
METERS = [
    SUM,
    replace(SUM, aggregation="count", value=None),
    replace(SUM, aggregation="max"),
    replace(SUM, aggregation="latest", carries_over=True),
    replace(SUM, aggregation="unique"),
    replace(SUM, aggregation="average"),
    replace(SUM, aggregation="time_weighted", time_unit="period"),
]
PER_UNIT = Charge("calls", "m", "per_unit", unit_price=Decimal(2))
VOLUME = Charge("calls", "m", "volume", tiers=(Tier(10 * ONE, Decimal(2), Decimal(5)), Tier(None, Decimal(1))))
SHARE = Charge("calls", "m", "percentage", rate=Decimal("1.2"), fixed=Decimal("0.10"))
GIVEN = Charge("calls", "m", "dynamic", amount_property="price", multiplier=Decimal("1.5"))
FEE = Charge("base", None, "flat", unit_price=Decimal(100))


def used(*quantities: object) -> list[Member]:
    """Events a second apart, of these quantities."""
    return [Member(i * 1_000_000, f"k{i}", scaled(Decimal(str(q)), 9)) for i, q in enumerate(quantities)]


def shown(amount: int) -> str:
    return plain(amount_decimal(amount))


def parts(closing: Closing) -> list[tuple[str, str, str]]:
    return [(part.kind, plain(Decimal(part.quantity).scaleb(-9)), shown(part.amount)) for part in closing.parts]


# -- single counters


CASES: dict[str, tuple[Charge, Meter | None, list[Member], str]] = {
    "units": (PER_UNIT, SUM, used(1, 2, 3), "12"),
    "no usage": (PER_UNIT, SUM, [], "0"),
    "no usage, the first tier's flat fee": (VOLUME, SUM, [], "5"),
    "no usage, a minimum": (replace(PER_UNIT, minimum=Decimal(7)), SUM, [], "7"),
    "below the minimum": (replace(PER_UNIT, minimum=Decimal(7)), SUM, used(3), "7"),
    "above the minimum": (replace(PER_UNIT, minimum=Decimal(7)), SUM, used(4), "8"),
    "above the maximum": (replace(PER_UNIT, maximum=Decimal(7)), SUM, used(4), "7"),
    "a cheaper volume tier": (VOLUME, SUM, used(10, 1), "11"),
    "a peak": (PER_UNIT, replace(SUM, aggregation="max"), used(3, 8, 5), "16"),
    "different users": (
        PER_UNIT,
        replace(SUM, aggregation="unique"),
        [Member(i, f"k{i}", ONE, text) for i, text in enumerate(["ann", "bob", "ann"])],
        "4",
    ),
    "a total rounded up as one": (
        PER_UNIT,
        replace(SUM, derived_per="total", rounding=Rounding("up")),
        used("0.4", "0.4", "0.4"),
        "4",
    ),
    "percentages": (SHARE, SUM, used(50, 100), "2"),
    "percentages, at most so much together": (replace(SHARE, maximum=Decimal("1.5")), SUM, used(50, 100), "1.5"),
    "percentages, free while both limits last": (
        replace(SHARE, free_events=3, free_amount=500 * ONE),
        SUM,
        used(200, 100, 100, 50),
        "0.7",
    ),
    "percentages, an event across the free amount pays for what lies beyond": (
        Charge("c", "m", "percentage", rate=Decimal("1.3"), fixed=Decimal(2), free_events=3, free_amount=250 * ONE),
        SUM,
        used(50, 100, 250, 400),
        "11.15",
    ),
    "percentages, the free amount used up exactly": (replace(SHARE, free_amount=100 * ONE), SUM, used(100, 50), "0.7"),
    "percentages, an event of nothing once the free amount is used up": (
        replace(SHARE, free_amount=100 * ONE),
        SUM,
        used(100, 0),
        "0.1",
    ),
    "percentages, what is given back does not bring back the free amount": (
        replace(SHARE, free_amount=100 * ONE),
        SUM,
        used(100, -100, 50),
        "0.8",
    ),
    "percentages, free events of any size": (replace(SHARE, free_events=1), SUM, used(10**9, 50), "0.7"),
    "percentages, no event is free": (replace(SHARE, free_events=0), SUM, used(50), "0.7"),
    "given amounts": (GIVEN, SUM, [Member(0, "a", ONE, amount=7), Member(0, "b", ONE, amount=2)], "14E-12"),
    "a fee": (FEE, None, [], "100"),
    "seats at a fee": (replace(FEE, quantity=3 * ONE), None, [], "300"),
}


@pytest.mark.parametrize(("charge", "meter", "members", "expected"), CASES.values(), ids=CASES)
def test_closing_price(charge: Charge, meter: Meter | None, members: list[Member], expected: str) -> None:
    closing = closing_price(charge, meter, members, SPAN)
    assert shown(closing.amount) == plain(Decimal(expected))
    assert sum(part.amount for part in closing.parts) == closing.amount


def test_free_events_are_those_first_in_time_then_by_key() -> None:
    charge = replace(SHARE, free_events=1)
    early, same_time = Member(5, "z", 50 * ONE), Member(5, "a", 100 * ONE)
    closing = closing_price(charge, SUM, [early, same_time, Member(9, "0", 0)], SPAN)
    assert parts(closing) == [("included", "100", "0"), ("events", "50", "0.8")]
    assert [part.events for part in closing.parts] == [1, 2]


def test_a_quantity_beyond_a_tier_that_parks_cannot_be_closed() -> None:
    charge = replace(PER_UNIT, model="graduated", tiers=(Tier(ONE, Decimal(1)),), beyond="park")
    with pytest.raises(ValueError, match="within its last tier"):
        closing_price(charge, SUM, used(2), SPAN)


def test_usage_needs_a_meter() -> None:
    with pytest.raises(ValueError, match="expected a meter"):
        closing_price(PER_UNIT, None, [], SPAN)


# -- levels

SEATS = replace(SUM, aggregation="time_weighted", level="add", time_unit="period")
BY_LEVEL = replace(VOLUME, model="graduated", per_level=True)
DAY = 86_400_000_000


def changes(*deltas: tuple[int, int]) -> list[Member]:
    """Seats that come and go, each at the start of a day counted from 0."""
    return [Member(day * DAY, f"k{day}", delta * ONE) for day, delta in deltas]


def test_each_level_is_priced_for_the_time_it_stood() -> None:
    closing = closing_price(BY_LEVEL, SEATS, changes((15, 12), (24, -8)), SPAN)
    # 0 for 15 days, 12 for 9 days, 4 for 6 days of 30; the first tier holds 10 at 2, flat fee 5; the second 1 each.
    assert parts(closing) == [("usage", "3.8", "12.6"), ("usage", "0.6", "0.6")]
    assert closing.quantity == scaled(Decimal("4.4"), 9)


def test_a_mean_is_priced_where_levels_are_not() -> None:
    closing = closing_price(replace(BY_LEVEL, per_level=False), SEATS, changes((15, 12), (24, -8)), SPAN)
    assert parts(closing) == [("usage", "4.4", "13.8")]


def test_a_level_per_unit_after_included_ones() -> None:
    charge = replace(PER_UNIT, per_level=True, included=2 * ONE)
    assert parts(closing_price(charge, SEATS, changes((15, 12)), SPAN)) == [
        ("included", "1", "0"),
        ("usage", "5", "10"),
    ]


def test_a_level_that_stood_for_no_time_reaches_no_tier() -> None:
    (share,) = closing_price(BY_LEVEL, SEATS, [*changes((0, 12)), Member(0, "z", -12 * ONE)], SPAN).parts
    assert (share.quantity, shown(share.amount)) == (0, "5")


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 40)), max_size=8))
def test_levels_equal_the_price_of_each_level_for_its_days(deltas: list[tuple[int, int]]) -> None:
    """A month's levels, and 30 months of one level each: the tiers' units cost as much per day."""
    found = [Member(day * DAY, f"k{i}", quantity * ONE) for i, (day, quantity) in enumerate(deltas)]
    free_of_flats = replace(BY_LEVEL, tiers=tuple(replace(tier, flat=Decimal(0)) for tier in BY_LEVEL.tiers))
    price = compile_price(free_of_flats)
    days = [sum(quantity for day, quantity in deltas if day <= today) * ONE for today in range(30)]
    exact = Fraction(sum(price(level) or 0 for level in days), 30)
    amount = closing_price(free_of_flats, SEATS, found, SPAN).amount
    assert abs(amount - exact) <= Fraction(1, 2)


# -- segments of a period


def spans(cuts: list[int]) -> Iterator[Span]:
    bounds = sorted({MONTH.start_us, *cuts, MONTH.end_us})
    return (Span(start, end, MONTH) for start, end in pairwise(bounds))


amounts = st.decimals(0, 10**6, places=12, allow_nan=False)
instants = st.integers(MONTH.start_us, MONTH.end_us)


@given(amounts, st.lists(instants, max_size=5))
def test_a_fee_and_a_minimum_cut_into_segments_add_up_to_the_whole(amount: Decimal, cuts: list[int]) -> None:
    fee, least = replace(FEE, unit_price=amount), replace(PER_UNIT, minimum=amount)
    whole = scaled(amount, AMOUNT_DECIMALS)
    assert sum(closing_price(fee, None, [], span).amount for span in spans(cuts)) == whole
    assert sum(closing_price(least, SUM, [], span).amount for span in spans(cuts)) == whole


def test_what_is_not_prorated_is_due_whole_in_a_segment() -> None:
    half = Span(MONTH.start_us, MONTH.end_us // 2, MONTH)
    assert shown(closing_price(FEE, None, [], half).amount) == "50"
    assert shown(closing_price(replace(FEE, prorate=False), None, [], half).amount) == "100"


# -- pools

POOL = Pool("pool", "unit", 10 * ONE, ("calls", "texts"))
CALLS, TEXTS = Counter("calls"), Counter("texts")


def test_a_pool_goes_to_charges_in_their_order_then_by_time() -> None:
    allotted = close_pools(POOL, {TEXTS: used(5), CALLS: used(3, 4)})
    assert allotted == {CALLS: 7 * ONE, TEXTS: 3 * ONE}


def test_within_a_charge_the_earlier_event_draws_from_the_pool() -> None:
    eu, us = Counter("calls", ("eu",)), Counter("calls", ("us",))
    usage = {eu: [Member(7, "a", 6 * ONE), Member(9, "a", 6 * ONE)], us: [Member(8, "a", 3 * ONE)]}
    assert close_pools(POOL, usage) == {eu: 7 * ONE, us: 3 * ONE}


def test_what_is_given_back_is_free_for_later_events() -> None:
    assert close_pools(POOL, {CALLS: used(8, -5), TEXTS: used(9)}) == {CALLS: 3 * ONE, TEXTS: 7 * ONE}


def test_what_is_given_back_is_there_for_events_before_it_too() -> None:
    """Eleven units in all, less one given back at the end: the pool pays for all ten."""
    eu, us = Counter("calls", ("eu",)), Counter("calls", ("us",))
    usage = {eu: [Member(1, "a", 6 * ONE), Member(9, "b", -ONE)], us: [Member(5, "c", 5 * ONE)]}
    assert close_pools(POOL, usage) == {eu: 5 * ONE, us: 5 * ONE}


def test_pool_units_come_before_included_ones() -> None:
    charge = replace(PER_UNIT, included=2 * ONE)
    closings = close_segment([(charge, SUM)], [replace(POOL, charges=("calls",))], {CALLS: used(15)}, SPAN)
    assert parts(closings[CALLS]) == [("pool", "10", "0"), ("included", "2", "0"), ("usage", "3", "6")]


counters = st.builds(
    Counter,
    st.sampled_from(["calls", "texts", "other"]),
    st.sampled_from([(), ("eu",), ("us",)]),
    st.sampled_from(["", "ann"]),
)
members = st.builds(
    Member,
    st.integers(MONTH.start_us, MONTH.end_us - 1),
    st.text("abc", max_size=2),
    st.integers(0, 10**12),
    st.sampled_from(["", "x", "y"]),
    amount=st.integers(0, 10**15),
)
usages = st.dictionaries(counters, st.lists(members, max_size=6), max_size=6)


given_back = members.map(lambda member: member._replace(quantity=member.quantity - 3 * 10**11))


@given(
    st.integers(0, 10**13),
    st.dictionaries(counters, st.lists(given_back, max_size=6), max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_pool_is_spent_to_the_last_unit_in_whatever_order_events_came(
    included: int, usage: dict[Counter, list[Member]], random: Random
) -> None:
    pool = replace(POOL, included=included)
    allotted = close_pools(pool, usage)
    total = {counter: max(sum(m.quantity for m in found), 0) for counter, found in usage.items()}
    drawing = sum(quantity for counter, quantity in total.items() if counter.charge in pool.charges)
    assert sum(allotted.values()) == min(included, drawing)
    assert all(0 < quantity <= total[counter] for counter, quantity in allotted.items())
    # Nobody of a later charge gets a unit while one of an earlier charge still wants.
    if any(counter.charge == "texts" for counter in allotted):
        assert all(allotted.get(c, 0) == total[c] for c in usage if c.charge == "calls")
    assert close_pools(pool, _shuffled(usage, random)) == allotted


def _shuffled(usage: dict[Counter, list[Member]], random: Random) -> dict[Counter, list[Member]]:
    entries = [(counter, random.sample(found, len(found))) for counter, found in usage.items()]
    random.shuffle(entries)
    return dict(entries)


# -- whole segments

SPLIT = replace(PER_UNIT, by=("region",))
EU, US = Counter("calls", ("eu",)), Counter("calls", ("us",))


def test_cells_have_their_own_prices_and_tiers() -> None:
    matrix = replace(SPLIT, model="matrix", cells=(Cell(("eu",), Decimal(3)),), included=ONE)
    closings = close_segment([(matrix, SUM)], [], {EU: used(2), US: used(2)}, SPAN)
    assert {counter: shown(closing.amount) for counter, closing in closings.items()} == {EU: "3", US: "2"}


def test_a_maximum_over_cells_takes_off_each_in_proportion() -> None:
    closings = close_segment([(replace(SPLIT, maximum=Decimal(10)), SUM)], [], {EU: used(10), US: used(5)}, SPAN)
    assert [shown(closings[c].amount) for c in (EU, US)] == ["6.666666666667", "3.333333333333"]
    assert [closings[c].parts[-1].kind for c in (EU, US)] == ["maximum", "maximum"]


def test_of_equal_cells_the_first_give_off_what_cannot_be_split() -> None:
    cells = [Counter("calls", (name,)) for name in "hgfedcba"]
    charge = replace(SPLIT, maximum=Decimal("15.999999999997"))
    closings = close_segment([(charge, SUM)], [], {counter: used(1) for counter in cells}, SPAN)
    lowered = [counter.cell[0] for counter in cells if closings[counter].amount < 2 * 10**12]
    assert sorted(lowered) == ["a", "b", "c"]


def test_a_minimum_over_cells_stands_on_the_counter_of_no_cell() -> None:
    closings = close_segment([(replace(SPLIT, minimum=Decimal(10)), SUM)], [], {EU: used(2)}, SPAN)
    assert shown(closings[EU].amount) == "4"
    assert parts(closings[Counter("calls")]) == [("minimum", "0", "6")]


def test_a_charge_without_usage_has_its_counter_a_split_one_has_none() -> None:
    charges = [(FEE, None), (VOLUME, SUM), (replace(SPLIT, id="split"), SUM)]
    closings = close_segment(charges, [], {}, SPAN)
    assert {counter.charge: shown(closing.amount) for counter, closing in closings.items()} == {
        "base": "100",
        "calls": "5",
    }


def test_a_level_that_carries_over_is_charged_without_an_event() -> None:
    meter = replace(SUM, aggregation="latest", carries_over=True)
    closings = close_segment([(PER_UNIT, meter)], [], {}, SPAN, openings={CALLS: Opening(4 * ONE)})
    assert shown(closings[CALLS].amount) == "8"


def test_so_is_each_cell_s_level() -> None:
    meter = replace(SUM, aggregation="latest", carries_over=True)
    closings = close_segment([(SPLIT, meter)], [], {EU: used(3)}, SPAN, openings={US: Opening(4 * ONE)})
    assert {counter: shown(closing.amount) for counter, closing in closings.items()} == {EU: "6", US: "8"}


def test_a_subject_whose_seats_were_given_back_is_absent() -> None:
    """Else each would pay the first tier's flat fee for ever."""
    charge = replace(VOLUME, per_subject=True)
    meter = replace(SUM, aggregation="latest", carries_over=True)
    ann, bob = Counter("calls", (), "ann"), Counter("calls", (), "bob")
    closings = close_segment([(charge, meter)], [], {}, SPAN, openings={ann: Opening(ONE), bob: Opening(0)})
    assert list(closings) == [ann]


@pytest.mark.parametrize(("carries_over", "expected"), [(True, "8"), (False, "0")])
def test_only_a_meter_that_carries_over_opens_with_a_level(carries_over: bool, expected: str) -> None:
    charge, meter = replace(PER_UNIT, per_level=True), replace(SEATS, carries_over=carries_over)
    assert shown(closing_price(charge, meter, [], SPAN, opening=Opening(4 * ONE)).amount) == expected


# -- laws, for every class

RUNNING = [
    PER_UNIT,
    replace(PER_UNIT, included=10**11, minimum=Decimal(50), maximum=Decimal(900)),
    VOLUME,
    replace(VOLUME, model="graduated", minimum=Decimal(50)),
    Charge("calls", "m", "package", package_size=7 * 10**9, package_price=Decimal("0.3"), min_packages=1),
]
BY_EVENT = [SHARE, replace(SHARE, event_maximum=Decimal(2)), GIVEN]
OF_THE_PERIOD = [
    replace(SHARE, free_events=2, free_amount=10**12, minimum=Decimal(3)),
    replace(SHARE, event_maximum=Decimal(2), maximum=Decimal(5)),
    replace(SPLIT, maximum=Decimal(700), minimum=Decimal(20)),
]
SPLIT_TIERS = replace(SPLIT, per_subject=True, model="graduated", tiers=VOLUME.tiers)
usage_charges = st.sampled_from([*RUNNING, *BY_EVENT, *OF_THE_PERIOD, SPLIT_TIERS])


def test_the_charges_of_the_laws_have_their_classes() -> None:
    assert {charge_class(charge, SUM) for charge in RUNNING} == {"running"}
    assert {charge_class(charge, SUM) for charge in BY_EVENT} == {"per_event"}
    assert {charge_class(charge, SUM) for charge in OF_THE_PERIOD} == {"period"}


@given(usage_charges, st.sampled_from(METERS), usages, st.integers(0, 10**13), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(
    charge: Charge, meter: Meter, usage: dict[Counter, list[Member]], included: int, random: Random
) -> None:
    charges = [(charge, meter), (replace(charge, id="texts"), meter), (replace(charge, id="other"), meter)]
    closings = close_segment(charges, [replace(POOL, included=included)], usage, SPAN)
    assert close_segment(charges, [replace(POOL, included=included)], _shuffled(usage, random), SPAN) == closings
    for closing in closings.values():
        assert sum(part.amount for part in closing.parts) == closing.amount


final = st.sampled_from([*RUNNING, *BY_EVENT])


@given(final, st.lists(members, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_rows_of_final_classes_add_up_to_the_closing_price(charge: Charge, found: list[Member], random: Random) -> None:
    """The rows as the rater books them, in any order: only what the close alone books is missing from them."""
    closing = closing_price(charge, SUM, found, SPAN)
    random.shuffle(found)
    booked_by_the_close = sum(part.amount for part in closing.parts if part.kind == "minimum")
    rows = _running_rows(charge, found) if charge in RUNNING else _event_rows(charge, found)
    assert sum(rows) + booked_by_the_close == closing.amount


running = st.sampled_from(RUNNING)


@given(st.tuples(running, running), st.lists(members, max_size=8), instants, st.randoms(use_true_random=False))
def test_rows_add_up_across_a_version_change_in_whatever_order_they_arrive(
    versions: tuple[Charge, Charge], found: list[Member], cut_us: int, random: Random
) -> None:
    random.shuffle(found)
    rows = closed = 0
    for charge, early in zip(versions, (True, False), strict=True):
        charge = replace(charge, minimum=None)  # which the close alone books
        segment = [member for member in found if (member.at_us < cut_us) is early]
        rows += sum(_running_rows(charge, segment))
        closed += closing_price(charge, SUM, segment, SPAN).amount if segment else 0
    assert rows == closed


def _running_rows(charge: Charge, found: list[Member]) -> Iterator[int]:
    price = compile_price(charge)
    total = cost = 0
    for member in found:
        total += member.quantity
        after = price(total)
        assert after is not None
        yield after - cost
        cost = after


def _event_rows(charge: Charge, found: list[Member]) -> Iterator[int]:
    price = compile_event_price(charge)
    for member in found:
        amount = price(member.quantity, {b"price": f"{member.amount}e-12".encode()})
        assert isinstance(amount, int)
        yield amount


@given(usages, amounts, amounts)
def test_limits_over_cells_hold_to_the_last_decimal(
    usage: dict[Counter, list[Member]], least: Decimal, more: Decimal
) -> None:
    charge = replace(SPLIT, per_subject=True, minimum=least, maximum=least + more)
    usage = {counter: found for counter, found in usage.items() if counter.charge == "calls"}
    free = close_segment([(replace(charge, minimum=None, maximum=None), SUM)], [], usage, SPAN)
    closings = close_segment([(charge, SUM)], [], usage, SPAN)
    unlimited = sum(closing.amount for closing in free.values())
    lowest, highest = scaled(least, AMOUNT_DECIMALS), scaled(least + more, AMOUNT_DECIMALS)
    assert sum(closing.amount for closing in closings.values()) == max(lowest, min(unlimited, highest))
    assert all(closing.amount >= 0 for closing in closings.values())


def test_shares_of_a_closing_say_what_a_percentage_was_of() -> None:
    (share,) = closing_price(SHARE, SUM, used(50, 100), SPAN).parts
    assert share == Share(None, 0, 150 * ONE, Decimal("0.012"), Decimal("0.10"), None, 2 * 10**12, "events", 2)
