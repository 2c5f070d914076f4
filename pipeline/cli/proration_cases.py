"""Worked examples of proration: parts of fees by the functions that price them, and the document they go into.

A part of ``case_models``.
"""

from collections.abc import Mapping
from datetime import date
from fractions import Fraction

from pipeline.cli.case_numbers import Inputs, Results, Run, both, named_amount, quantity_of
from pipeline.cli.invoice_cases import document, line_amounts, shown
from pipeline.core.charges import Charge, check_charge
from pipeline.core.closing import Span, closing_price
from pipeline.core.money import Amount, amount_decimal
from pipeline.core.periods import Period
from pipeline.core.proration import Change, Portion, change, periods_between, remaining


def fee(unit: Amount, portion: Portion, quantity: object = 1) -> Amount:
    """What a flat charge of so many seats costs in a portion of its period, exact (1e-12)."""
    charge = Charge("fee", None, "flat", amount_decimal(unit), quantity=quantity_of(quantity))
    check_charge(charge)
    return closing_price(charge, None, [], Span(0, 1, Period(0, 1), portion)).amount


# -- a change within a period that was paid in advance


def _plan_change(inputs: Inputs) -> Results:
    """Each side is a line, rounded by itself, the credit below 0; the document is their sum."""
    return _changed(inputs, change(named_amount(inputs, "old_price"), named_amount(inputs, "new_price"), _rest(inputs)))


def _plan_change_days(inputs: Inputs) -> Results:
    """As above; these examples write the credit without its sign."""
    found = _plan_change(inputs)
    return {**found, "credit": -found["credit"], "credit_cents": -found["credit_cents"]}


def _seats(inputs: Inputs) -> Results:
    unit = named_amount(inputs, "unit")
    old, new = (fee(unit, _WHOLE, inputs[name]) for name in ("old_seats", "new_seats"))
    return _changed(inputs, change(old, new, _rest(inputs)))


_WHOLE = Portion(0, 1, 1)


def _changed(inputs: Inputs, found: Change) -> Results:
    bill = document(inputs, {"credit": found.credit, "charge": found.charge})
    return {**line_amounts(bill), **both("net", bill.totals.net, bill.currency)}


def _rest(inputs: Inputs) -> Portion:
    """What is left of the period: a fraction of it, or days, that of the change included."""
    if "fraction_remaining" in inputs:
        rest = Fraction(str(inputs["fraction_remaining"]))
        return remaining(rest.numerator, rest.denominator)
    name = "days_remaining" if "days_remaining" in inputs else "days_remaining_inclusive"
    return remaining(int(inputs[name]), int(inputs["period_days"]))


def _upgrade_in_advance(inputs: Inputs) -> Results:
    """The new plan for the rest of the period; of the old one, what was invoiced is credited in full, or its rest."""
    old, new, rest = named_amount(inputs, "old_price"), named_amount(inputs, "new_price"), _rest(inputs)
    match inputs.get("old_plan_credit", "unused"):
        case "full":
            credit = -named_amount(inputs, "already_invoiced")
        case "unused":
            credit = change(old, new, rest).credit
        case other:
            raise ValueError(f"expected old_plan_credit to be full or unused, got {other!r}")
    bill = document(inputs, {"credit": credit, "new_plan_prorated": fee(new, rest)})
    return {**line_amounts(bill), **both("net", bill.totals.net, bill.currency)}


# -- a fee for a part of its period


def _seat(inputs: Inputs) -> Results:
    portion = Portion(0, int(inputs["days_used"]), int(inputs["days_in_period"]))
    return shown(document(inputs, {"fee": fee(named_amount(inputs, "unit"), portion, inputs.get("quantity", 1))}))


def _partly(inputs: Inputs) -> Results:
    """From a first day that is counted to the period's end, or to a last day that is counted too."""
    whole = int(inputs["period_days"])
    days = next((int(inputs[name]) for name in ("days", "days_inclusive") if name in inputs), None)
    if days is None:
        first, last = (date.fromisoformat(inputs[name]) for name in ("from_date", "to_date"))
        days = (last - first).days + 1
    bill = document(inputs, {"fee": fee(named_amount(inputs, "amount"), remaining(days, whole))})
    return {**shown(bill), **line_amounts(bill)}


#: Billing periods of so many months; others are of so many days.
_MONTHS: Mapping[str, int] = {
    "MONTHLY": 1,
    "BIMESTRIAL": 2,
    "QUARTERLY": 3,
    "TRIANNUAL": 4,
    "BIANNUAL": 6,
    "ANNUAL": 12,
    "SESQUIENNIAL": 18,
    "BIENNIAL": 24,
    "TRIENNIAL": 36,
}
_DAYS: Mapping[str, int] = {
    "DAILY": 1,
    "WEEKLY": 7,
    "BIWEEKLY": 14,
    "THIRTY_DAYS": 30,
    "THIRTY_ONE_DAYS": 31,
    "SIXTY_DAYS": 60,
    "NINETY_DAYS": 90,
}


def _factor(inputs: Inputs) -> Results:
    start, end = (date.fromisoformat(inputs[name]) for name in ("start", "end"))
    period = inputs["billing_period"]
    if period in _DAYS:
        return {"factor": Fraction((end - start).days, _DAYS[period])}
    if period not in _MONTHS:
        raise ValueError(f"expected a billing period of {', '.join((*_DAYS, *_MONTHS))}, got {period!r}")
    return {"factor": periods_between(start, end, _MONTHS[period])}


#: The models of proration. Each raises KeyError or ValueError for inputs it does not understand.
PRORATION_CASES: Mapping[str, Run] = {
    "proration_factor": _factor,
    "proration_first_period": _partly,
    "proration_plan_change": _plan_change,
    "proration_plan_change_days": _plan_change_days,
    "proration_seat": _seat,
    "proration_seats": _seats,
    "proration_termination": _partly,
    "proration_upgrade_in_advance": _upgrade_in_advance,
}
