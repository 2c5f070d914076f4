"""The arithmetic of adjustments: what was booked and what is added is the month as it should be, in every column."""

from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.billing.adjustments import restated
from pipeline.billing.documents import NewLine
from pipeline.billing.reckoning import Basis, reckon
from pipeline.billing.statements import Booked, Difference, Due, Key
from pipeline.core.discounts import Coupon
from pipeline.core.invoice import Line
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.parties import COUPONS_APPLY, PRICES, TAX_ROUNDINGS, Policy
from pipeline.core.periods import Period
from tests.billing.invoicing import ENTITY, TAXES, customer

OCTOBER = Period(1_790_812_800_000_000, 1_793_491_200_000_000)
COLUMNS = ("exact", "amount", "discount", "net", "tax", "total", "paid_by_coupons")
POLICIES = st.builds(
    Policy,
    tax_rounding=st.sampled_from(TAX_ROUNDINGS),
    coupons=st.sampled_from(COUPONS_APPLY),
    prices=st.sampled_from(PRICES),
)
COUPONS = st.lists(
    st.sampled_from(
        [
            Coupon("some", 1, "7 %", percent=Decimal(7)),
            Coupon("line", 1, "a third off calls", level="line", percent=Decimal("33.3"), charges=frozenset({"c1"})),
            Coupon("fixed", 1, "5 off", amount=5 * 10**12, currency="EUR"),
        ]
    ),
    unique=True,
    max_size=3,
)
#: By charge: quantity, and exact amount in 1e-12; what is missing, or 0, is not owed. Few of each, so that some stay.
USED = st.tuples(st.integers(0, 1), st.sampled_from([0, 10**13, 12_345_678_901_234, 5 * 10**9]))
MONTHS = st.dictionaries(st.sampled_from(["c1", "c2", "c3"]), USED, max_size=3)


def owed(month: dict[str, tuple[int, int]]) -> list[Due]:
    return [
        Due(
            key=Key("usage", "acme", "acme-1", "api@1", charge, "", OCTOBER.start_us),
            legal_entity="ours",
            currency="EUR",
            plan="api",
            plan_version=1,
            meter="calls",
            quantity=quantity * QUANTITY_ONE,
            unit="call",
            exact_amount=amount,
            gross=amount,
            service=OCTOBER,
            tax_category="standard",
            charge=None,
            segment=None,
        )
        for charge, (quantity, amount) in sorted(month.items())
    ]


def booked(lines: list[tuple[Line, NewLine]], first: int) -> list[Booked]:
    """New lines as they stand once their document is issued."""
    return [
        Booked(
            key=Key("usage", "acme", "acme-1", "api@1", row.charge, "", OCTOBER.start_us),
            document_id=1,
            document_line_id=id,
            number="1",
            legal_entity="ours",
            currency="EUR",
            kind=row.kind,
            tax_date=date(2026, 10, 31),
            service=row.service,
            plan=row.plan,
            plan_version=1,
            meter=row.meter,
            line_id=None,
            quantity=row.quantity,
            unit=row.unit,
            tax_category=row.tax_category,
            line=replace(line, id=str(id)),
            detail=row.detail,
        )
        for id, (line, row) in enumerate(lines, first)
        if row.role == "new"
    ]


def column_sums(lines: list[Line]) -> list[Any]:
    taxes = [(one.tax, one.base, one.amount) for line in lines for one in line.taxes]
    for line in lines:
        assert sum(part.amount for part in line.discounts if not part.after_tax) == line.discount
    by_tax = {
        tax: (sum(b for t, b, _ in taxes if t == tax), sum(a for t, _, a in taxes if t == tax)) for tax, *_ in taxes
    }
    return [
        *(sum(getattr(line, name) for line in lines) for name in COLUMNS),
        {t: s for t, s in by_tax.items() if any(s)},
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(MONTHS, min_size=2, max_size=4), COUPONS, POLICIES)
def test_each_adjustment_brings_the_month_to_what_it_should_be(
    months: list[dict[str, tuple[int, int]]], coupons: list[Coupon], policy: Policy
) -> None:
    """However often a month changes; and nothing is adjusted where nothing changed."""
    basis = Basis(ENTITY, customer("acme"), TAXES.rates, date(2026, 10, 31), coupons=coupons, policy=policy)
    lines: list[tuple[Line, NewLine]] = []
    standing: list[Booked] = []
    for month in months:
        found, _ = restated(owed(month), standing, basis, "EUR", None)
        taken_back = {row.adjusts_id for _, row in found if row.role == "reversal"}
        assert len(taken_back) == sum(row.role == "reversal" for _, row in found)
        standing = [one for one in standing if one.document_line_id not in taken_back]
        standing += booked(found, 100 * (len(lines) + 1))
        lines += found
        whole = reckon([Difference((), due) for due in owed(month) if not due.is_nothing], basis, currency="EUR")
        assert column_sums([line for line, _ in lines]) == column_sums(list(whole.document.lines))
        # On a document of its own the difference is of the same coupons, and they pay the same of the total.
        shown = reckon([], replace(basis, coupons=()), currency="EUR", settled=found).document
        assert sum(one.amount for one in shown.discounts if not one.after_tax) == shown.totals.discount
        assert sum(one.amount for one in shown.discounts if one.after_tax) == shown.totals.credits
        assert all(one.restates for one in shown.discounts)
        assert sum(row.quantity for _, row in lines) == sum(row.quantity for row in whole.lines)
        assert restated(owed(month), standing, basis, "EUR", None)[0] == []
