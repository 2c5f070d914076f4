"""Worked examples of credits and commitments, by the functions that settle them: a part of ``case_models``."""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

from pipeline.core.charges import Charge, compile_price
from pipeline.core.closing import Counter
from pipeline.core.commitments import Commitment, Settlement, Spend, settle, settle_windows
from pipeline.core.credits import (
    Drawn,
    Grant,
    Owed,
    Rollover,
    credits_for,
    draw,
    draw_units,
    minor_step,
    rolled_over,
    spread,
)
from pipeline.core.members import Member
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    QUANTITY_DECIMALS,
    Amount,
    Quantity,
    amount_decimal,
    quantity_decimal,
    round_to_minor,
    scaled,
)
from pipeline.core.periods import parse_instant

#: A case's ``inputs``, and what comes out, by the names that ``expected`` uses.
Inputs: TypeAlias = Mapping[str, Any]
Outcome: TypeAlias = dict[str, Any]

_HOUR_US = 3_600_000_000


def _amount(text: object) -> Amount:
    return scaled(Decimal(str(text)), AMOUNT_DECIMALS)


def _quantity(text: object) -> Quantity:
    return scaled(Decimal(str(text)), QUANTITY_DECIMALS)


def _uses(amounts: Iterable[Amount]) -> list[Owed]:
    return [Owed(0, f"{number:06}", str(number), "usage", amount) for number, amount in enumerate(amounts)]


def _grant(given: Mapping[str, Any]) -> Grant:
    expires = given.get("expires")
    return Grant(
        str(given["id"]),
        _amount(given["amount"]),
        end_us=None if expires is None else parse_instant(expires if "T" in expires else f"{expires}T00:00:00Z"),
        kind=given.get("kind", "prepaid"),
        priority=int(given.get("priority", 0)),
    )


def _credit_burn(inputs: Inputs) -> Outcome:
    drawn = draw(map(_grant, inputs["grants"]), _uses([_amount(inputs["usage"])]))
    return {
        "balances": {grant: amount_decimal(left) for grant, left in drawn.left.items()},
        "deductions": {part.grant: amount_decimal(part.amount) for part in drawn.draws},
        "overage": amount_decimal(sum(drawn.uncovered.values())),
    }


def _burn_one(amount: object, usage: Iterable[Amount], *, overdraft: Amount = 0) -> Drawn:
    return draw([Grant("g", _amount(amount))], _uses(usage), overdraft=overdraft)


def _credit_rollover(inputs: Inputs) -> Outcome:
    drawn = _burn_one(inputs["amount"], [_amount(inputs["usage"])])
    rule = Rollover(
        maximum=_amount(inputs["reset_max_rollover"]),
        minimum=_amount(inputs.get("reset_min_rollover", 0)),
        preserve_overage=bool(inputs.get("preserve_overage", False)),
    )
    balance = rolled_over(drawn.left["g"], rule, overage=sum(drawn.uncovered.values()))
    return {"balance_after_reset": amount_decimal(balance)}


def _credits_applied_to_lines(inputs: Inputs) -> Outcome:
    lines = [_amount(line) for line in inputs["lines"]]
    drawn = _burn_one(inputs["credits"], lines)
    paid = {part.line: part.amount for part in drawn.draws}
    credits = [paid.get(str(number), 0) for number in range(len(lines))]
    return {
        "line_totals": [amount_decimal(line - credit) for line, credit in zip(lines, credits, strict=True)],
        "credits_per_line": [amount_decimal(credit) for credit in credits],
    }


def _credit_overdraft(inputs: Inputs) -> Outcome:
    usage = _amount(inputs["usage"])
    drawn = _burn_one(inputs["balance"], [usage], overdraft=usage)
    return {
        "deducted": amount_decimal(drawn.amount),
        "overdraft": amount_decimal(drawn.overdraft),
        "effective_balance": amount_decimal(drawn.balance),
    }


def _credit_then_invoice(inputs: Inputs) -> Outcome:
    drawn = _burn_one(inputs["credit_balance"], [_amount(inputs["charge"])])
    return {
        "credits_consumed": amount_decimal(drawn.amount),
        "invoice_remainder": amount_decimal(sum(drawn.uncovered.values())),
    }


def _credit_draw_rounding(inputs: Inputs) -> Outcome:
    """The document's total, its tax as the case gives it, paid in steps of the currency's smallest unit."""
    currency = inputs["currency"]
    charge = Decimal(inputs["charge"])
    tax = round_to_minor(charge * Decimal(inputs["tax_pct"]) / 100, currency)
    total = _amount(round_to_minor(charge, currency) + tax)
    owed = spread(total, _uses([_amount(charge)]), step=minor_step(currency))
    drawn = draw([Grant("g", _amount(inputs["wallet"]))], owed)
    return {
        "credits_applied": amount_decimal(drawn.amount),
        "invoice_total": amount_decimal(sum(drawn.uncovered.values())),
        "wallet_balance": amount_decimal(drawn.balance),
    }


def _credit_burn_units(inputs: Inputs) -> Outcome:
    counter = Counter("usage")
    quantity = _quantity(inputs["quantity"])
    grant = Grant("g", _quantity(inputs["credits"]), reduces="units", charges=frozenset({"usage"}))
    _, units = draw_units([grant], {counter: [Member(0, "usage", quantity)]})
    return {"billable": quantity_decimal(quantity - units.get(counter, 0))}


def _wallet_conversion(inputs: Inputs) -> Outcome:
    return {"credits": amount_decimal(credits_for(_amount(inputs["topup_amount"]), Decimal(inputs["conversion_rate"])))}


def _per_unit(inputs: Inputs) -> Callable[[object], Amount]:
    price = compile_price(Charge("usage", "usage", "per_unit", unit_price=Decimal(inputs["unit"])))

    def cost(quantity: object) -> Amount:
        return price(_quantity(quantity)) or 0

    return cost


def _settled(inputs: Inputs, committed: Amount, spent: Amount) -> Settlement:
    return settle(
        committed,
        spent,
        true_up=bool(inputs.get("true_up", True)),
        overage_factor=Decimal(inputs.get("overage_factor", "1")),
    )


def _settlement_outcome(settlement: Settlement) -> Outcome:
    return {
        "parts": [amount_decimal(part) for part in settlement.parts],
        "true_up": amount_decimal(settlement.true_up),
        "total": amount_decimal(settlement.total),
    }


def _commitment_overage(inputs: Inputs) -> Outcome:
    cost = _per_unit(inputs)
    return _settlement_outcome(_settled(inputs, cost(inputs["commit_quantity"]), cost(inputs["quantity"])))


def _commitment_amount_window(inputs: Inputs) -> Outcome:
    cost = _per_unit(inputs)
    return _settlement_outcome(_settled(inputs, _amount(inputs["commit_amount"]), cost(inputs["quantity"])))


def _commitment_windowed(inputs: Inputs) -> Outcome:
    if inputs["window"] not in ("hour", "day"):
        raise ValueError(f"expected a window of hour or day, got {inputs['window']!r}")
    length_us = _HOUR_US * (24 if inputs["window"] == "day" else 1)
    cost = _per_unit(inputs)
    usage = inputs["usage_per_window"]
    commitment = Commitment(
        "case",
        cost(inputs["commit_quantity_per_window"]),
        0,
        len(usage) * length_us,
        window=inputs["window"],
        true_up=bool(inputs.get("true_up", True)),
        overage_factor=Decimal(inputs.get("overage_factor", "1")),
    )
    spends = [Spend(number * length_us, "usage", cost(quantity)) for number, quantity in enumerate(usage)]
    windows = settle_windows(commitment, spends, "UTC", 0, len(usage) * length_us)
    totals = [window.settlement.total for window in windows]
    return {"window_totals": [amount_decimal(total) for total in totals], "total": amount_decimal(sum(totals))}


#: The models of credits and commitments. Each raises KeyError or ValueError for inputs it does not understand.
CREDIT_CASES: Mapping[str, Callable[[Inputs], Outcome]] = {
    "commitment_amount_window": _commitment_amount_window,
    "commitment_overage": _commitment_overage,
    "commitment_windowed": _commitment_windowed,
    "credit_burn": _credit_burn,
    "credit_burn_units": _credit_burn_units,
    "credit_draw_rounding": _credit_draw_rounding,
    "credit_overdraft": _credit_overdraft,
    "credit_rollover": _credit_rollover,
    "credit_rollover_preserve_overage": _credit_rollover,
    "credit_then_invoice": _credit_then_invoice,
    "credits_applied_to_lines": _credits_applied_to_lines,
    "wallet_conversion": _wallet_conversion,
}
