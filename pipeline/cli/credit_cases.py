"""Worked examples of credits and commitments, by the functions that settle them: a part of ``case_models``."""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from pipeline.cli.case_numbers import Inputs, Results, Run, amount_of, both, quantity_of
from pipeline.cli.invoice_cases import document
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
)
from pipeline.core.members import Member
from pipeline.core.money import (
    Amount,
    amount_decimal,
    quantity_decimal,
)
from pipeline.core.periods import parse_instant

_HOUR_US = 3_600_000_000


def _uses(amounts: Iterable[Amount]) -> list[Owed]:
    return [Owed(0, f"{number:06}", str(number), "usage", amount) for number, amount in enumerate(amounts)]


def _grant(given: Mapping[str, Any]) -> Grant:
    expires = given.get("expires")
    return Grant(
        str(given["id"]),
        amount_of(given["amount"]),
        end_us=None if expires is None else parse_instant(expires if "T" in expires else f"{expires}T00:00:00Z"),
        kind=given.get("kind", "prepaid"),
        priority=int(given.get("priority", 0)),
    )


def _credit_burn(inputs: Inputs) -> Results:
    drawn = draw(map(_grant, inputs["grants"]), _uses([amount_of(inputs["usage"])]))
    return {
        "balances": {grant: amount_decimal(left) for grant, left in drawn.left.items()},
        "deductions": {part.grant: amount_decimal(part.amount) for part in drawn.draws},
        "overage": amount_decimal(sum(drawn.uncovered.values())),
    }


def _burn_one(amount: object, usage: Iterable[Amount], *, overdraft: Amount = 0) -> Drawn:
    return draw([Grant("g", amount_of(amount))], _uses(usage), overdraft=overdraft)


def _credit_rollover(inputs: Inputs) -> Results:
    drawn = _burn_one(inputs["amount"], [amount_of(inputs["usage"])])
    rule = Rollover(
        maximum=amount_of(inputs["reset_max_rollover"]),
        minimum=amount_of(inputs.get("reset_min_rollover", 0)),
        preserve_overage=bool(inputs.get("preserve_overage", False)),
    )
    balance = rolled_over(drawn.left["g"], rule, overage=sum(drawn.uncovered.values()))
    return {"balance_after_reset": amount_decimal(balance)}


def _credits_applied_to_lines(inputs: Inputs) -> Results:
    lines = [amount_of(line) for line in inputs["lines"]]
    drawn = _burn_one(inputs["credits"], lines)
    paid = {part.line: part.amount for part in drawn.draws}
    credits = [paid.get(str(number), 0) for number in range(len(lines))]
    return {
        "line_totals": [amount_decimal(line - credit) for line, credit in zip(lines, credits, strict=True)],
        "credits_per_line": [amount_decimal(credit) for credit in credits],
    }


def _credit_overdraft(inputs: Inputs) -> Results:
    usage = amount_of(inputs["usage"])
    drawn = _burn_one(inputs["balance"], [usage], overdraft=usage)
    return {
        "deducted": amount_decimal(drawn.amount),
        "overdraft": amount_decimal(drawn.overdraft),
        "effective_balance": amount_decimal(drawn.balance),
    }


def _credit_then_invoice(inputs: Inputs) -> Results:
    drawn = _burn_one(inputs["credit_balance"], [amount_of(inputs["charge"])])
    return {
        "credits_consumed": amount_decimal(drawn.amount),
        "invoice_remainder": amount_decimal(sum(drawn.uncovered.values())),
    }


def _credit_draw_rounding(inputs: Inputs) -> Results:
    """The document's total, with tax, paid in steps of the currency's smallest unit."""
    wallet = amount_of(inputs["wallet"])
    found = document(inputs, {"charge": amount_of(inputs["charge"])}, grants=[Grant("wallet", wallet)])
    paid = found.totals.credits * minor_step(found.currency)
    return {
        **both("credits_applied", found.totals.credits, found.currency),
        **both("invoice_total", found.totals.payable, found.currency),
        "wallet_balance": amount_decimal(wallet - paid),
    }


def _credit_burn_units(inputs: Inputs) -> Results:
    counter = Counter("usage")
    quantity = quantity_of(inputs["quantity"])
    grant = Grant("g", quantity_of(inputs["credits"]), reduces="units", charges=frozenset({"usage"}))
    _, units = draw_units([grant], {counter: [Member(0, "usage", quantity)]})
    return {"billable": quantity_decimal(quantity - units.get(counter, 0))}


def _wallet_conversion(inputs: Inputs) -> Results:
    return {
        "credits": amount_decimal(credits_for(amount_of(inputs["topup_amount"]), Decimal(inputs["conversion_rate"])))
    }


def _per_unit(inputs: Inputs) -> Callable[[object], Amount]:
    price = compile_price(Charge("usage", "usage", "per_unit", unit_price=Decimal(inputs["unit"])))

    def cost(quantity: object) -> Amount:
        return price(quantity_of(quantity)) or 0

    return cost


def _settled(inputs: Inputs, committed: Amount, spent: Amount) -> Settlement:
    return settle(
        committed,
        spent,
        true_up=bool(inputs.get("true_up", True)),
        overage_factor=Decimal(inputs.get("overage_factor", "1")),
    )


def _settlement_outcome(settlement: Settlement) -> Results:
    return {
        "parts": [amount_decimal(part) for part in settlement.parts],
        "true_up": amount_decimal(settlement.true_up),
        "total": amount_decimal(settlement.total),
    }


def _commitment_overage(inputs: Inputs) -> Results:
    cost = _per_unit(inputs)
    return _settlement_outcome(_settled(inputs, cost(inputs["commit_quantity"]), cost(inputs["quantity"])))


def _commitment_amount_window(inputs: Inputs) -> Results:
    cost = _per_unit(inputs)
    return _settlement_outcome(_settled(inputs, amount_of(inputs["commit_amount"]), cost(inputs["quantity"])))


def _commitment_windowed(inputs: Inputs) -> Results:
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
CREDIT_CASES: Mapping[str, Run] = {
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
