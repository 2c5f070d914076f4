"""Price models against a table of cases, and against the same rules written a second time in fractions."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import ceil
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.core.charges import (
    Cell,
    Charge,
    Tier,
    charge_class,
    charge_faults,
    check_charge,
    check_metering,
    compile_price,
    price_lines,
    price_of,
    tier_shares,
)
from pipeline.core.meters import Meter
from pipeline.core.money import amount_decimal, plain, scaled


def q(text: str) -> int:
    return scaled(Decimal(text), 9)


def tiers(*lines: tuple[str | None, str, str]) -> tuple[Tier, ...]:
    return tuple(Tier(None if up is None else q(up), Decimal(unit), Decimal(flat)) for up, unit, flat in lines)


DEMO = tiers(("500000", "0.000003", "0"), ("1200000", "0.0000025", "0"), (None, "0.000002", "0"))
FLATS = tiers(("10", "10", "2"), ("20", "5", "3"), (None, "5", "3"))

PER_UNIT = Charge("c", "m", "per_unit", unit_price=Decimal("0.000015"))
GRADUATED = Charge("c", "m", "graduated", tiers=DEMO)
GRADUATED_FLAT = Charge("c", "m", "graduated", tiers=FLATS)
VOLUME = Charge("c", "m", "volume", tiers=tiers(("5", "7", "0"), ("10", "6.5", "0"), (None, "6", "0")))
VOLUME_FLAT = Charge("c", "m", "volume", tiers=tiers(("100", "2", "10"), ("200", "1", "0"), (None, "0.5", "50")))
PACKAGE = Charge("c", "m", "package", package_size=q("100"), package_price=Decimal("5"))
PACKAGE_MIN = replace(PACKAGE, min_packages=1)
STAIRSTEP = Charge("c", "m", "stairstep", tiers=tiers(("1000", "0", "50"), ("5000", "0", "200"), (None, "0", "350")))
BLOCK = Charge(
    "c", "m", "block", package_size=q("100"), tiers=tiers(("200", "5", "0"), ("500", "4", "1"), (None, "3", "0"))
)
PERCENT = Charge(
    "c",
    "m",
    "graduated_percentage",
    tiers=tuple(
        Tier(up_to, flat=Decimal(flat), rate=Decimal(rate))
        for up_to, rate, flat in ((q("10"), "1", "200"), (q("20"), "2", "300"), (None, "3", "400"))
    ),
)
CAPPED = Charge(
    "c", "m", "graduated", tiers=(Tier(q("5"), Decimal(1), Decimal("0.5"), cap=Decimal(3)), Tier(None, Decimal(2)))
)
BOUNDED = Charge("c", "m", "graduated", tiers=tiers(("5", "2", "0"), ("10", "1", "0")), beyond="last_tier")
MATRIX = Charge(
    "c",
    "m",
    "matrix",
    unit_price=Decimal("0.2"),
    by=("region", "size"),
    cells=(Cell(("eu", "small"), Decimal("0.1")), Cell(("eu", ""), Decimal("0.4"))),
)

CASES = {
    "per unit, nothing": (PER_UNIT, "0", "0"),
    "per unit, one": (PER_UNIT, "1", "0.000015"),
    "per unit, a fraction of a unit": (PER_UNIT, "0.5", "0.0000075"),
    "per unit, below zero costs what zero costs": (PER_UNIT, "-5", "0"),
    "per unit, included units are free": (replace(PER_UNIT, included=q("100")), "100", "0"),
    "per unit, one unit past the included": (replace(PER_UNIT, included=q("100")), "101", "0.000015"),
    "per unit, rounded once half up at 12 decimals": (
        replace(PER_UNIT, unit_price=Decimal("0.0000000000005")),
        "1",
        "0.000000000001",
    ),
    "per unit, just below half": (replace(PER_UNIT, unit_price=Decimal("0.00000000000049")), "1", "0"),
    "per unit, eighteen decimals": (
        replace(PER_UNIT, unit_price=Decimal("0.000000000000000001")),
        "1000000",
        "0.000000000001",
    ),
    "graduated, nothing": (GRADUATED, "0", "0"),
    "graduated, the last unit of the first tier": (GRADUATED, "500000", "1.5"),
    "graduated, crosses a tier by one unit": (GRADUATED, "500001", "1.5000025"),
    "graduated, crosses a tier by a billionth": (GRADUATED, "500000.000000001", "1.500000000000"),
    "graduated, crosses two tiers": (GRADUATED, "1200001", "3.250002"),
    "graduated, first flat fee at zero": (GRADUATED_FLAT, "0", "2"),
    "graduated, no flat fee at zero where the charge says so": (replace(GRADUATED_FLAT, flat_on_zero=False), "0", "0"),
    "graduated, first flat fee from the first unit": (replace(GRADUATED_FLAT, flat_on_zero=False), "1", "12"),
    "graduated, second flat fee not yet due on the bound": (GRADUATED_FLAT, "10", "102"),
    "graduated, second flat fee past the bound": (GRADUATED_FLAT, "11", "110"),
    "graduated, tiers begin after the included units": (replace(GRADUATED_FLAT, included=q("5")), "16", "110"),
    "graduated, flat fee due while all is included": (replace(GRADUATED_FLAT, included=q("5")), "5", "2"),
    "volume, the bound belongs to its tier": (VOLUME, "5", "35"),
    "volume, crosses a tier by one unit": (VOLUME, "6", "39"),
    "volume, far into the last tier": (VOLUME, "25", "150"),
    "volume, a cheaper tier costs less in total": (VOLUME_FLAT, "101", "101"),
    "volume, flat fee at zero": (VOLUME_FLAT, "0", "10"),
    "volume, tiers begin after the included units": (replace(VOLUME, included=q("2")), "7", "35"),
    "package, nothing": (PACKAGE, "0", "0"),
    "package, one begun": (PACKAGE, "1", "5"),
    "package, exactly full": (PACKAGE, "100", "5"),
    "package, the next one begun by a billionth": (PACKAGE, "100.000000001", "10"),
    "package, after included units": (replace(PACKAGE, included=q("100")), "201", "10"),
    "package, all included": (replace(PACKAGE, included=q("200")), "121", "0"),
    "package, price finer than an amount": (
        replace(PACKAGE, package_price=Decimal("0.0000000000004")),
        "300",
        "0.000000000001",
    ),
    "package, at least one, nothing used": (PACKAGE_MIN, "0", "5"),
    "package, at least one, one begun": (PACKAGE_MIN, "1", "5"),
    "package, at least one, two begun": (PACKAGE_MIN, "101", "10"),
    "package, at least one, all included": (replace(PACKAGE_MIN, included=q("200")), "121", "5"),
    "stairstep, the first step": (STAIRSTEP, "1000", "50"),
    "stairstep, one unit into the second": (STAIRSTEP, "1001", "200"),
    "stairstep, past the last bound": (STAIRSTEP, "70000", "350"),
    "stairstep, nothing": (STAIRSTEP, "0", "50"),
    "stairstep, nothing, nothing due": (replace(STAIRSTEP, flat_on_zero=False), "0", "0"),
    "block, nothing": (BLOCK, "0", "0"),
    "block, one begun": (BLOCK, "1", "5"),
    "block, the first tier full: 2 x 5": (BLOCK, "200", "10"),
    "block, one unit into the second tier: 2 x 5 + 1 + 4": (BLOCK, "201", "15"),
    "block, into the last tier: 2 x 5 + 1 + 3 x 4 + 1 x 3": (BLOCK, "501", "26"),
    "block, at least two": (replace(BLOCK, min_packages=2), "1", "10"),
    "block, a bound inside a block: it belongs to the tier it begins in": (
        replace(BLOCK, tiers=tiers(("150", "5", "0"), (None, "4", "0"))),
        "300",
        "14",
    ),
    "block, after included units": (replace(BLOCK, included=q("50")), "150", "5"),
    "graduated percentage, the flat fee at zero": (PERCENT, "0", "200"),
    "graduated percentage, the first tier": (PERCENT, "10", "200.1"),
    "graduated percentage, into the second": (PERCENT, "11", "500.12"),
    "cap, below it": (CAPPED, "2", "2.5"),
    "cap, reached": (CAPPED, "2.5", "3"),
    "cap, beyond it within the tier": (CAPPED, "5", "3"),
    "cap, of the tier only": (CAPPED, "6", "5"),
    "cap, below zero": (CAPPED, "-9", "0.5"),
    "cap, of a volume tier": (replace(CAPPED, model="volume"), "4", "3"),
    "cap, of the flat fee too": (
        replace(CAPPED, tiers=(Tier(None, Decimal(1), Decimal(5), cap=Decimal(3)),)),
        "0",
        "3",
    ),
    "a bounded last tier that goes on": (BOUNDED, "13", "18"),
    "a bounded last tier that parks, on the bound": (replace(BOUNDED, beyond="park"), "10", "15"),
    "a bounded last tier that parks, included units before": (
        replace(BOUNDED, beyond="park", included=q("7")),
        "17",
        "15",
    ),
    "exclusive, a volume's bound belongs to the next tier": (replace(VOLUME, bound="exclusive"), "5", "32.5"),
    "exclusive, just below a volume's bound": (replace(VOLUME, bound="exclusive"), "4.5", "31.5"),
    "exclusive, the next tier's flat fee is due on the bound": (
        replace(GRADUATED_FLAT, bound="exclusive"),
        "10",
        "105",
    ),
    "exclusive, with a cap": (replace(CAPPED, bound="exclusive", tiers=(*CAPPED.tiers[:1], FLATS[2])), "5", "6"),
    "maximum, below": (replace(VOLUME, maximum=Decimal(30)), "4", "28"),
    "maximum, above": (replace(VOLUME, maximum=Decimal(30)), "5", "30"),
    "maximum, shared by cells: not in a counter's price": (
        replace(VOLUME, maximum=Decimal(30), by=("region",)),
        "5",
        "35",
    ),
    "minimum: not in the price": (replace(VOLUME, minimum=Decimal(30)), "1", "7"),
}


@pytest.mark.parametrize(("charge", "quantity", "expected"), CASES.values(), ids=CASES)
def test_price(charge: Charge, quantity: str, expected: str) -> None:
    check_charge(charge)
    assert shown(compile_price(charge)(q(quantity))) == plain(Decimal(expected))


def shown(amount: int | None) -> str:
    assert amount is not None
    return plain(amount_decimal(amount))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [(("eu", "small"), "1"), (("eu", "large"), "2"), (("eu", ""), "4"), (("us", "small"), "2"), ((), "2")],
    ids=["its cell", "one value differs", "an absent property is empty", "another value differs", "none: the default"],
)
def test_matrix(cell: tuple[str, ...], expected: str) -> None:
    assert shown(compile_price(MATRIX, cell)(q("10"))) == expected
    assert [shown(share.amount) for share in tier_shares(MATRIX, q("10"), cell)] == [expected]


@pytest.mark.parametrize(
    ("charge", "quantity"),
    [
        (replace(BOUNDED, beyond="park"), q("10") + 1),
        (replace(BOUNDED, beyond="park", bound="exclusive"), q("10")),
        (replace(BOUNDED, beyond="park", included=q("2")), q("12") + 1),
        (replace(BLOCK, tiers=BLOCK.tiers[:2], beyond="park"), q("500") + 1),
    ],
    ids=["a billionth beyond", "on an exclusive bound", "after included units", "of blocks"],
)
def test_beyond_the_last_tier_has_no_price(charge: Charge, quantity: int) -> None:
    price = compile_price(charge)
    assert price(quantity) is None
    assert price(quantity - 1) is not None
    with pytest.raises(ValueError, match="within its last tier"):
        tier_shares(charge, quantity)


BROKEN = {
    "per unit without a price": (replace(PER_UNIT, unit_price=None), "unit_price of 0 or more, got None"),
    "a negative price": (replace(PER_UNIT, unit_price=Decimal(-1)), "unit_price of 0 or more, got -1"),
    "a price that is no number": (replace(PER_UNIT, unit_price=Decimal("NaN")), "unit_price of 0 or more, got NaN"),
    "more than 18 decimals": (replace(PER_UNIT, unit_price=Decimal("1E-19")), "at most 18 decimals"),
    "negative included units": (replace(PER_UNIT, included=-1), "0 or more included units"),
    "no tiers": (replace(GRADUATED, tiers=()), "the last without up_to"),
    "the last tier bounded, and not said what lies beyond": (replace(GRADUATED, tiers=DEMO[:1]), "last without up_to"),
    "beyond a tier that has no end": (replace(GRADUATED, beyond="park"), "the last with up_to"),
    "bounds that do not ascend": (replace(VOLUME, tiers=(DEMO[1], DEMO[0], DEMO[2])), "bounds that ascend"),
    "an open tier in the middle": (replace(VOLUME, tiers=(DEMO[2], DEMO[2])), "bounds that ascend"),
    "a first tier of nothing": (replace(VOLUME, tiers=(Tier(0, Decimal(1)), DEMO[2])), "bounds that ascend"),
    "a package of nothing": (replace(PACKAGE, package_size=0), "package_size above 0"),
    "a package without price": (replace(PACKAGE, package_price=None), "package_price of 0 or more"),
    "packages below zero": (replace(PACKAGE, min_packages=-1), "min_packages of 0 or more"),
    "a block of nothing": (replace(BLOCK, package_size=None), "package_size above 0"),
    "a tier shorter than a block": (
        replace(BLOCK, package_size=q("10"), tiers=tiers(("5", "1", "0"), ("8", "1", "0"), (None, "1", "0"))),
        r"a block at least in each tier, got bounds \['5', '8'\] with blocks of 10",
    ),
    "blocks with exclusive bounds": (replace(BLOCK, bound="exclusive"), "bounds that belong to their tier"),
    "a percentage tier without rate": (replace(PERCENT, tiers=DEMO), "rate of 0 or more, got None"),
    "a rate finer than 16 decimals": (
        replace(PERCENT, tiers=(Tier(None, rate=Decimal("1E-17")),)),
        "rate: expected a number with at most 16",
    ),
    "a cap finer than an amount": (replace(CAPPED, tiers=(Tier(None, cap=Decimal("1E-13")),)), "at most 12 decimals"),
    "a matrix without dimensions": (replace(MATRIX, by=(), cells=()), "dimensions"),
    "a matrix without default": (replace(MATRIX, unit_price=None), "unit_price of 0 or more"),
    "a cell with too few values": (replace(MATRIX, cells=(Cell(("eu",), Decimal(1)),)), "a value for each of"),
    "a cell twice": (replace(MATRIX, cells=MATRIX.cells[:1] * 2), "each cell once"),
    "a negative price in a cell": (replace(MATRIX, cells=(Cell(("a", "b"), Decimal(-1)),)), "got -1"),
    "cells of another model": (replace(PER_UNIT, cells=MATRIX.cells), "in a matrix only"),
    "a negative maximum": (replace(PER_UNIT, maximum=Decimal(-1)), "maximum of 0 or more"),
    "a negative minimum": (replace(PER_UNIT, minimum=Decimal(-1)), "minimum of 0 or more"),
    "a minimum above the maximum": (
        replace(PER_UNIT, minimum=Decimal(2), maximum=Decimal(1)),
        "maximum of at least the minimum 2, got 1",
    ),
    "usage without a meter": (replace(PER_UNIT, meter=None), "expected a meter"),
    "a flat fee with a meter": (Charge("c", "m", "flat", unit_price=Decimal(1)), "no meter"),
    "a flat fee without price": (Charge("c", None, "flat"), "unit_price of 0 or more"),
    "a flat fee by region": (Charge("c", None, "flat", Decimal(1), by=("region",)), "no cells or subjects"),
    "seats below zero": (Charge("c", None, "flat", Decimal(1), quantity=-1), "a quantity of 0 or more"),
    "free events of units": (replace(PER_UNIT, free_events=3), "in a percentage charge only"),
    "a percentage without rate": (Charge("c", "m", "percentage"), "rate of 0 or more"),
    "a percentage with included units": (Charge("c", "m", "percentage", rate=Decimal(1), included=1), "no included"),
    "free events below zero": (Charge("c", "m", "percentage", rate=Decimal(1), free_events=-1), "free_events of 0"),
    "a free amount below zero": (Charge("c", "m", "percentage", rate=Decimal(1), free_amount=-1), "free_amount of 0"),
    "an event's limits crossed": (
        Charge("c", "m", "percentage", rate=Decimal(1), event_minimum=Decimal(2), event_maximum=Decimal(1)),
        "event_maximum of at least the event_minimum 2, got 1",
    ),
    "levels of packages": (replace(PACKAGE, per_level=True), "per_unit or graduated for per_level"),
    "levels with a capped tier": (replace(CAPPED, per_level=True), "no caps of tiers per_level"),
    "levels that park": (replace(BOUNDED, beyond="park", per_level=True), "a last tier that goes on"),
    "a dynamic charge without its property": (Charge("c", "m", "dynamic"), "amount_property"),
}


@pytest.mark.parametrize(("charge", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_what_cannot_be_priced(charge: Charge, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_charge(charge)


def test_every_mistake_is_told() -> None:
    charge = replace(PACKAGE, package_price=None, free_events=3, min_packages=-1, minimum=Decimal(-1), meter=None)
    assert len(charge_faults(charge)) == 5
    with pytest.raises(ValueError, match=r"^charge c: expected .*; expected .*; expected .*; expected .*; expected"):
        check_charge(charge)


def test_a_tier_that_proration_left_no_block_costs_nothing() -> None:
    charge = replace(
        BLOCK, package_size=q("10"), tiers=tiers(("5", "1", "0"), ("8", "100", "70"), (None, "2", "0")), included=0
    )
    price = compile_price(charge)
    assert [price(q(used)) for used in ("10", "11", "30")] == [10**12, 3 * 10**12, 5 * 10**12]
    assert [part.packages for part in tier_shares(charge, q("30"))] == [1, 2]


@pytest.mark.parametrize("model", ["percentage", "dynamic", "flat"])
def test_models_without_a_cumulative_quantity_have_no_such_price(model: Any) -> None:
    with pytest.raises(ValueError, match="a model that prices a cumulative quantity"):
        compile_price(Charge("c", None, model, unit_price=Decimal(1)))


# Classes, and what fits which meter ---------------------------------------------------------------------------------

SUM = Meter("m", 1, "e", "sum", "v", "unit", (), False, 0, dimensions=("region", "size"))
PEAK = replace(SUM, aggregation="max")
TOTAL = replace(SUM, derived_per="total")
SHARE = Charge("c", "m", "percentage", rate=Decimal(1))
GIVEN = Charge("c", "m", "dynamic", amount_property="price")
LIMIT = Decimal(9)

CLASSES = {
    "units of a sum": (GRADUATED, SUM, False, "running"),
    "units of a sum, at most so much": (replace(GRADUATED, maximum=LIMIT), SUM, False, "running"),
    "units of a sum, at least so much": (replace(GRADUATED, minimum=LIMIT), SUM, False, "running"),
    "a matrix": (MATRIX, SUM, False, "running"),
    "a matrix, all cells at most so much": (replace(MATRIX, maximum=LIMIT), SUM, False, "period"),
    "seats, all at most so much": (replace(PER_UNIT, per_subject=True, maximum=LIMIT), SUM, False, "period"),
    "a peak": (GRADUATED, PEAK, False, "period"),
    "a total converted as one": (PER_UNIT, TOTAL, False, "period"),
    "from a shared pool": (PER_UNIT, SUM, True, "period"),
    "a percentage": (SHARE, SUM, False, "per_event"),
    "a percentage within limits": (replace(SHARE, event_minimum=LIMIT), SUM, False, "per_event"),
    "a percentage, the first events free": (replace(SHARE, free_events=1), SUM, False, "period"),
    "a percentage, the first amount free": (replace(SHARE, free_amount=1), SUM, False, "period"),
    "a percentage, all at most so much": (replace(SHARE, maximum=LIMIT), SUM, False, "period"),
    "a given amount": (GIVEN, SUM, False, "per_event"),
    "a flat fee": (Charge("c", None, "flat", Decimal(1)), None, False, "period"),
}


@pytest.mark.parametrize(("charge", "meter", "pooled", "expected"), CLASSES.values(), ids=CLASSES)
def test_class(charge: Charge, meter: Meter | None, pooled: bool, expected: str) -> None:
    check_charge(charge)
    assert charge_class(charge, meter, pooled=pooled) == expected


@pytest.mark.parametrize(
    ("charge", "meter", "pooled", "message"),
    [
        (SHARE, PEAK, False, "a meter of sum or count"),
        (replace(PER_UNIT, per_level=True), SUM, False, "a time-weighted meter"),
        (GIVEN, TOTAL, False, "a meter of sum or count"),
        (PER_UNIT, PEAK, True, "a meter of sum or count"),
        (SHARE, SUM, True, "a charge by quantity"),
        (replace(PER_UNIT, by=("planet",)), SUM, False, "dimensions of meter m, .*planet"),
    ],
    ids=[
        "a percentage of a peak",
        "levels of a sum",
        "amounts of a total",
        "a pool of peaks",
        "a percentage of a pool",
        "no dimension",
    ],
)
def test_refuses_what_its_meter_does_not_fit(charge: Charge, meter: Meter, pooled: bool, message: str) -> None:
    check_metering(PER_UNIT, SUM)
    with pytest.raises(ValueError, match=message):
        check_metering(charge, meter, pooled=pooled)


# Laws, for charges of every model -----------------------------------------------------------------------------------

prices = st.decimals(0, 1000, places=18, allow_nan=False) | st.sampled_from(
    [Decimal("0.000003"), Decimal("0.1"), Decimal("5E-13"), Decimal(0)]
)
quantities = st.integers(0, 10**27) | st.integers(0, 1000).map(lambda n: n * 10**9) | st.integers(0, 10**12)
included = st.just(0) | quantities


rates = st.decimals(0, 100, places=16, allow_nan=False)
caps = st.decimals(0, 1000, places=12, allow_nan=False)
maximums = st.none() | caps


@st.composite
def tiered(draw: st.DrawFn) -> Charge:
    bounds = sorted(draw(st.sets(quantities.filter(bool), max_size=5)))
    beyond = draw(st.sampled_from([None, "last_tier", "park"])) if bounds else None
    capped = draw(st.booleans())
    model = draw(st.sampled_from(["graduated", "volume", "stairstep", "graduated_percentage", "block"]))
    return Charge(
        "c",
        "m",
        model,
        tiers=tuple(
            Tier(bound, draw(prices), draw(prices), draw(rates), draw(st.none() | caps) if capped else None)
            for bound in (bounds if beyond else [*bounds, None])
        ),
        package_size=draw(st.integers(10**6, 10**15)),
        min_packages=draw(st.integers(0, 2)),
        included=draw(included),
        flat_on_zero=draw(st.booleans()),
        beyond=beyond,
        bound="inclusive" if model == "block" else draw(st.sampled_from(["inclusive", "exclusive"])),
        maximum=draw(maximums),
    )


#: A block longer than a tier is refused.
valid_tiered = tiered().filter(lambda charge: not charge_faults(charge))
charges = st.one_of(
    st.builds(
        Charge,
        st.just("c"),
        st.just("m"),
        st.just("per_unit"),
        unit_price=prices,
        included=included,
        maximum=maximums,
    ),
    st.builds(
        Charge,
        st.just("c"),
        st.just("m"),
        st.just("package"),
        package_size=st.integers(1, 10**15),
        package_price=prices,
        included=included,
        min_packages=st.integers(0, 3),
        maximum=maximums,
    ),
    valid_tiered,
)


def cost_in_fractions(charge: Charge, quantity: int) -> Fraction | None:
    """The rules of the price models once more, tier by tier, without scaled integers: whole units, whole currency."""
    units = max(whole(quantity - charge.included), Fraction(0))
    last = charge.tiers[-1].up_to if charge.tiers else None
    if charge.beyond == "park" and last is not None and not within(charge, units, whole(last)):
        return None
    cost = uncapped_in_fractions(charge, units)
    # A maximum applies to the exact amount: whether it or the rounding comes first makes no difference at 12 decimals.
    return cost if charge.maximum is None else min(cost, Fraction(charge.maximum))


def uncapped_in_fractions(charge: Charge, units: Fraction) -> Fraction:
    if charge.model == "per_unit":
        return units * Fraction(charge.unit_price or 0)
    size = whole(charge.package_size or 0)
    if charge.model == "package":
        return max(ceil(units / size), charge.min_packages) * Fraction(charge.package_price or 0)
    bounds = [None if tier.up_to is None else whole(tier.up_to) for tier in charge.tiers]
    if charge.model == "block":
        bounds = [None if bound is None else Fraction(ceil(bound / size)) for bound in bounds]
        units = Fraction(max(ceil(units / size), charge.min_packages))
    if not units and not charge.flat_on_zero:
        return Fraction(0)
    cost, lower = Fraction(0), Fraction(0)
    for tier, bound in zip(charge.tiers, [*bounds[:-1], None], strict=True):
        upper = units if bound is None else min(bound, units)
        match charge.model:
            case "stairstep":
                cost = Fraction(tier.flat)
            case "volume":
                cost = Fraction(tier.flat) + units * Fraction(tier.unit_price)
            case "graduated_percentage":
                cost += capped(tier, Fraction(tier.flat) + (upper - lower) * Fraction(tier.rate or 0) / 100)
            case _:
                cost += capped(tier, Fraction(tier.flat) + (upper - lower) * Fraction(tier.unit_price))
        if bound is None or within(charge, units, bound):
            return capped(tier, cost) if charge.model in ("volume", "stairstep") else cost
        lower = upper
    raise AssertionError("the last tier holds every quantity")


def whole(quantity: int) -> Fraction:
    return Fraction(quantity, 10**9)


def within(charge: Charge, units: Fraction, bound: Fraction) -> bool:
    return not units or (units <= bound if charge.bound == "inclusive" else units < bound)


def capped(tier: Tier, cost: Fraction) -> Fraction:
    return cost if tier.cap is None else min(cost, Fraction(tier.cap))


def near_bounds(charge: Charge) -> list[int]:
    """Where a price changes its course, and a step to each side."""
    size = charge.package_size or 1
    turns = [0, size, *(tier.up_to for tier in charge.tiers if tier.up_to is not None)]
    return [charge.included + turn + step for turn in turns for step in (-1, 0, 1)]


@given(charges, quantities)
def test_integer_arithmetic_equals_fractions_rounded_once(charge: Charge, quantity: int) -> None:
    check_charge(charge)
    price = compile_price(charge)
    for one in (quantity, *near_bounds(charge)):
        cost = cost_in_fractions(charge, one)
        assert price(one) == (None if cost is None else (cost * 10**12 + Fraction(1, 2)).__floor__())


@given(charges, quantities)
def test_lines_say_the_same_as_the_price(charge: Charge, quantity: int) -> None:
    lines, price = price_lines(charge), compile_price(charge)
    if lines is not None:
        of_lines = price_of(lines)
        assert [of_lines(one) for one in near_bounds(charge)] == [price(one) for one in near_bounds(charge)]


@given(charges, st.lists(st.integers(-(10**14), 10**15), max_size=20), st.randoms(use_true_random=False))
def test_order_and_splitting_of_usage_do_not_matter(charge: Charge, parts: list[int], random: Random) -> None:
    price = compile_price(charge)

    def billed(pieces: list[int]) -> int | None:
        """The sum of the amounts of single events, as the rater books them: the first against an absent counter."""
        amounts, total, cost = [], 0, 0
        for piece in pieces:
            total += piece
            after = price(total)
            if after is None:
                return None
            amounts.append(after - cost)
            cost = after
        return sum(amounts)

    shuffled = parts[:]
    random.shuffle(shuffled)
    expected = price(sum(parts)) if parts else 0
    for pieces in (parts, shuffled, [sum(parts)] if parts else []):
        # A running total on the way may lie beyond a last tier that parks, where the end does not.
        assert billed(pieces) == expected or (charge.beyond == "park" and billed(pieces) is None)


@given(charges, quantities, st.just(0) | quantities)
def test_shares_add_up_exactly(charge: Charge, quantity: int, pooled: int) -> None:
    total = compile_price(replace(charge, included=charge.included + pooled))(quantity)
    assume(total is not None)
    shares = tier_shares(charge, quantity, pooled=pooled)
    assert sum(share.amount for share in shares) == total
    assert all(left.last == right.first for left, right in pairwise(shares))
    assert all(share.amount >= 0 for share in shares if share.kind != "maximum")
    assert sum(share.quantity for share in shares if share.kind in ("pool", "included")) == min(
        quantity, pooled + charge.included
    )
    usage = [share for share in shares if share.kind == "usage"]
    if charge.model not in ("stairstep", "package") or usage:
        assert sum(share.quantity for share in shares) == (quantity if shares else 0)


def test_shares_show_each_tier() -> None:
    shown = [
        (share.quantity // 10**9, plain(share.unit_price), plain(share.flat), plain(amount_decimal(share.amount)))
        for share in tier_shares(replace(GRADUATED_FLAT, included=q("5")), q("26"))
    ]
    assert shown == [(5, "0", "0", "0"), (10, "10", "2", "102"), (10, "5", "3", "53"), (1, "5", "3", "8")]


def test_shares_show_packages() -> None:
    free, packed = tier_shares(replace(PACKAGE, included=q("100")), q("201"))
    assert (free.quantity, free.amount) == (q("100"), 0)
    assert (packed.quantity, packed.packages, packed.amount) == (q("101"), 2, 10 * 10**12)


def test_shares_show_blocks_by_tier() -> None:
    shares = tier_shares(BLOCK, q("450"))
    assert [(share.quantity // 10**9, share.packages, shown(share.amount)) for share in shares] == [
        (200, 2, "10"),
        (250, 3, "13"),
    ]


def test_shares_show_the_pool_before_the_included_units_and_the_maximum_last() -> None:
    charge = replace(PER_UNIT, unit_price=Decimal(1), included=q("10"), maximum=Decimal(20))
    shares = tier_shares(charge, q("55"), pooled=q("5"))
    assert [(share.kind, share.quantity // 10**9, shown(share.amount)) for share in shares] == [
        ("pool", 5, "0"),
        ("included", 10, "0"),
        ("usage", 40, "40"),
        ("maximum", 0, "-20"),
    ]


def test_shares_of_a_flat_fee_without_usage() -> None:
    (only,) = tier_shares(VOLUME_FLAT, -3)
    assert (only.quantity, only.flat, only.amount) == (0, Decimal(10), 10 * 10**12)


def test_nothing_used_and_nothing_due_has_no_shares() -> None:
    assert tier_shares(PER_UNIT, 0) == []
    assert tier_shares(replace(VOLUME_FLAT, flat_on_zero=False), 0) == []
