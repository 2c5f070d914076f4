"""What an event would cost alone, by any model."""

from dataclasses import replace
from decimal import Decimal

import pytest

from pipeline.core.catalog import Segment, Terms
from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.contracts import Contract
from pipeline.core.meters import Conversion, Meter
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.periods import Period
from pipeline.core.plans import Plan
from pipeline.operations.at_risk import price_alone

DAY = 86_400_000_000
SUM = Meter("m", 1, "e", "sum", "v", "unit", (), False, 0, dimensions=("region",))
SEATS = replace(SUM, aggregation="time_weighted", time_unit="period")
PER_UNIT = Charge("c", "m", "per_unit", unit_price=Decimal(2))
SHARE = Charge("c", "m", "percentage", rate=Decimal(1), fixed=Decimal("0.30"))
MATRIX = replace(PER_UNIT, model="matrix", by=("region",), cells=(Cell(("eu",), Decimal(3)),))
BOUNDED = Charge("c", "m", "graduated", tiers=(Tier(9 * QUANTITY_ONE, Decimal(1)),), beyond="park")


def terms(*priced: tuple[Charge, Meter]) -> Terms:
    charges = tuple(charge for charge, _ in priced)
    plan = Plan("p", 1, "P", "EUR", 0, charges)
    month = Period(0, 30 * DAY)
    segment = Segment("a", Contract("a-main", 1, "a", "p", 0, None), plan, month, 0, month.end_us, charges)
    return Terms(segment, priced, 0, month.end_us)


CASES: dict[str, tuple[tuple[tuple[Charge, Meter], ...], str | None]] = {
    "two charges": (((PER_UNIT, SUM), (replace(PER_UNIT, id="d"), SUM)), "40"),
    "a percentage": (((SHARE, SUM),), "0.4"),
    "a cell": (((MATRIX, SUM),), "30"),
    "a level that stands for the rest of the month": (((PER_UNIT, SEATS),), "10"),
    "a total that is converted": (
        ((PER_UNIT, replace(SUM, derived_per="total", convert=Conversion(divide=Decimal(5)))),),
        "4",
    ),
    "no minimum": (((replace(PER_UNIT, minimum=Decimal(99)), SUM),), "20"),
    "beyond a last tier that parks": (((BOUNDED, SUM),), None),
    "an amount it does not bring": (((Charge("c", "m", "dynamic", amount_property="price"), SUM),), None),
    "a quantity it does not bring": (((PER_UNIT, replace(SUM, value="w")),), None),
}


@pytest.mark.parametrize(("priced", "expected"), CASES.values(), ids=CASES)
def test_price_alone(priced: tuple[tuple[Charge, Meter], ...], expected: str | None) -> None:
    money = price_alone(terms(*priced), 15 * DAY, {b"v": b"10", b"region": b"eu"})
    assert (None if money is None else money.amount) == (None if expected is None else Decimal(expected))
    assert money is None or money.currency == "EUR"
