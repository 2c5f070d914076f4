"""Worked examples of whole documents, by the code that the close runs: a part of ``case_models``.

Examples give a line and ask for what it comes to; here they are items, coupons, credits and taxes of ``invoice.build``.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal, TypeVar

from pipeline.cli.case_numbers import (
    Inputs,
    Results,
    Run,
    amount_of,
    both,
    currency_of,
    decimal_of,
    named_amount,
    quantity_of,
)
from pipeline.core.balances import Settlement, open_amount
from pipeline.core.charges import Charge, compile_price
from pipeline.core.credit_notes import credit_note, credited, reversal
from pipeline.core.credits import Grant, minor_step
from pipeline.core.discounts import Coupon, check_coupon
from pipeline.core.invoice import Document, Item, Line, build
from pipeline.core.money import Amount
from pipeline.core.parties import COUPONS_APPLY, PRICES, TAX_ROUNDINGS, CouponsApply, Policy
from pipeline.core.tax import Tax, Treatment
from pipeline.core.thresholds import reached

#: Where a tax is named in percent: one, or several beside each other.
_TAX_NAMES = ("tax_pct", "vat_pct", "rates_pct")
_POLICY_NAMES = ("tax_rounding", "prices", "coupons_apply")

_Choice = TypeVar("_Choice", bound=str)


# -- reading inputs


def document(
    inputs: Inputs,
    amounts: Mapping[str, Amount],
    *,
    taxes: Mapping[str, Inputs] | None = None,
    coupons: Iterable[Coupon] = (),
    grants: Iterable[Grant] = (),
    coupons_apply: CouponsApply = "before_tax",
    balance: Amount = 0,
    settled: Sequence[Line] = (),
) -> Document:
    """The document of these exact amounts, one line each, named as they are.

    ``taxes``: what names the tax of each line; the whole case does where a line is not in it, or names none.
    """
    treatments = {id: _treatment((taxes or {}).get(id, {})) or _treatment(inputs) or (_NO_TAX,) for id in amounts}
    currency = currency_of(inputs)
    coupons = list(coupons)
    for coupon in coupons:
        check_coupon(coupon)
    return build(
        [Item(id, amount, charge=id, tax_category=id) for id, amount in amounts.items()],
        currency=currency,
        policy=Policy(
            tax_rounding=_choice(inputs.get("tax_rounding", "rate"), TAX_ROUNDINGS),
            coupons=_choice(inputs.get("coupons_apply", coupons_apply), COUPONS_APPLY),
            prices=_choice(inputs.get("prices", "exclusive"), PRICES),
        ),
        treatments=treatments,
        coupons=coupons,
        grants=grants,
        balance=balance // minor_step(currency),
        settled=settled,
    )


_NO_TAX = Tax("none", "outside_scope", "", Decimal(0))


def _choice(value: str, allowed: tuple[_Choice, ...]) -> _Choice:
    for one in allowed:
        if one == value:
            return one
    raise ValueError(f"expected {' or '.join(allowed)}, got {value!r}")


def _treatment(inputs: Inputs) -> Treatment:
    for name in _TAX_NAMES:
        if name in inputs:
            percents = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
            return tuple(
                Tax(f"tax {number}", "standard", "", decimal_of(percent)) for number, percent in enumerate(percents)
            )
    return ()


def _coupon(number: int, given: Inputs, currency: str, level: Literal["line", "invoice"] = "invoice") -> Coupon:
    on = given.get("applies_to", given.get("target", "all"))
    charges = frozenset[str]() if on == "all" else frozenset([on] if isinstance(on, str) else on)
    if "percent" in given:
        return Coupon(str(number), 1, "", level, percent=decimal_of(given["percent"]), charges=charges)
    amount = named_amount({"currency": currency, **given}, "" if "cents" in given else "amount")
    return Coupon(str(number), 1, "", level, amount=amount, currency=currency, charges=charges)


def _coupons(inputs: Inputs) -> list[Coupon]:
    """Invoice coupons in their order: whole ones, or lists of percentages and amounts."""
    currency = currency_of(inputs)
    given = [
        *inputs.get("coupons_in_order", inputs.get("coupons", ())),
        *({"percent": percent} for percent in inputs.get("percents", inputs.get("coupon_percents", ()))),
        *({"amount": amount} for amount in inputs.get("amounts", inputs.get("coupon_amounts", ()))),
    ]
    return [_coupon(number, coupon, currency) for number, coupon in enumerate(given)]


def shown(found: Document) -> Results:
    """Every total of a document, in whole and in smallest units."""
    currency, totals = found.currency, found.totals
    coupons = sum(discount.amount for discount in found.discounts if discount.coupon)
    results: Results = {}
    for name, amount in {
        "fees": totals.amount,
        "coupons": coupons,
        "subtotal": totals.net,
        "net": totals.net,
        "taxable": totals.net,
        "tax": totals.tax,
        "vat": totals.tax,
        "total_tax": totals.tax,
        "total": totals.total,
        "total_due": totals.payable,
    }.items():
        results |= both(name, amount, currency)
    results["taxes"] = [both("", row.amount, currency)[""] for row in found.taxes]
    results["discounts"] = [both("", discount.amount, currency)[""] for discount in found.discounts]
    return results


def line_amounts(found: Document) -> Results:
    """Each line's amount by its name, in whole and in smallest units."""
    results: Results = {}
    for line in found.lines:
        results |= both(line.id, line.amount, found.currency)
    return results


# -- tax and coupons


def _tax(inputs: Inputs) -> Results:
    """Every input that is not an option is a line."""
    options = {"currency", "lines", *_TAX_NAMES, *_POLICY_NAMES}
    amounts = {name: amount_of(value) for name, value in inputs.items() if name not in options}
    lines = {line["id"]: line for line in inputs.get("lines", ())}
    amounts |= {id: _line_amount(inputs, line) for id, line in lines.items()}
    return shown(document(inputs, amounts, taxes=lines))


def _line_amount(inputs: Inputs, line: Inputs) -> Amount:
    return named_amount({"currency": currency_of(inputs), **line}, "" if "cents" in line else "amount")


def _discounted(inputs: Inputs) -> Results:
    """One line, and coupons in a row."""
    coupons = _coupons(inputs)
    if "percent" in inputs:
        coupons.append(_coupon(len(coupons), {"percent": inputs["percent"]}, currency_of(inputs)))
    found = document(inputs, {"line": named_amount(inputs, "subtotal")}, coupons=coupons)
    return shown(found)


def _allocation(inputs: Inputs) -> Results:
    """What each line bears of coupons on some of them, exact, before it is rounded."""
    lines = {line["id"]: line for line in inputs["lines"]}
    amounts = {id: _line_amount(inputs, line) for id, line in lines.items()}
    found = document(inputs, amounts, taxes=lines, coupons=_coupons(inputs))
    borne: dict[str, Amount] = dict.fromkeys(lines, 0)
    for discount in found.discounts:
        for id, share in discount.shares:
            borne[id] += share
    step = minor_step(found.currency)
    return {**shown(found), "line_coupon_cents": [Fraction(share, step) for share in borne.values()]}


# -- the order of steps


def _order(inputs: Inputs) -> Results:
    """Coupons and credits before tax or after it. Subtotal: what is taxed; where lines are given, what they come to."""
    currency = currency_of(inputs)
    lines = {line["id"]: line for line in inputs.get("lines", ())}
    amounts = {id: _line_amount(inputs, line) for id, line in lines.items()} or {"fees": amount_of(inputs["fees"])}
    on_lines = [inputs["line_coupon"]] if "line_coupon" in inputs else inputs.get("line_coupons", ())
    coupons = [_coupon(number, given, currency, "line") for number, given in enumerate(on_lines)]
    for name, key in (
        ("invoice_coupon_percent", "percent"),
        ("invoice_coupon_amount", "amount"),
        ("coupons", "amount"),
    ):
        if name in inputs:
            coupons.append(_coupon(len(coupons), {key: inputs[name]}, currency))
    when = _when(str(inputs.get("policy", "")))
    credits = inputs.get("wallet_credits", inputs.get("prepaid_credits"))
    reduces: Literal["net", "total"] = "net" if when.get("credits") == "before" else "total"
    found = document(
        inputs,
        amounts,
        taxes=lines,
        coupons=coupons,
        grants=[] if credits is None else [Grant("credits", amount_of(credits), reduces=reduces)],
        coupons_apply="after_tax" if when.get("coupons") == "after" else "before_tax",
    )
    off_lines = sum(discount.amount for discount in found.discounts if discount.line and discount.coupon)
    return {
        **shown(found),
        **both("total", found.totals.payable, currency),
        **both("after_line_coupon", found.totals.amount - off_lines, currency),
        **(both("subtotal", found.totals.amount, currency) if lines else {}),
    }


def _when(policy: str) -> dict[str, str]:
    """``coupons_and_credits_after_tax``, ``coupons_before_tax_credits_after``: when each is taken off."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for word in policy.split("_"):
        if word in ("coupons", "credits"):
            waiting.append(word)
        elif word in ("before", "after"):
            found |= dict.fromkeys(waiting, word)
            waiting = []
        elif word not in ("and", "tax", ""):
            raise ValueError(f"expected a policy such as coupons_before_tax_credits_after, got {policy!r}")
    return found


# -- after the invoice


def _balance(inputs: Inputs) -> Results:
    """An invoice, what is credited on it, paid and refunded, and what it takes from the balance or puts into it.

    ``credit_adj`` is a line of the invoice; ``item_adj`` and ``repair_adj`` are credit notes on the line of charges.
    """
    currency, step = currency_of(inputs), minor_step(currency_of(inputs))
    charges, into_balance = amount_of(inputs.get("charges", 0)), amount_of(inputs.get("cba", 0))
    credit = {"credit": amount_of(inputs["credit_adj"])} if "credit_adj" in inputs else {}
    found = document(inputs, {"charges": charges, **credit}, balance=max(-into_balance, 0))
    credited_before = 0
    notes: list[Document] = []
    for name in ("item_adj", "repair_adj"):
        part = -amount_of(inputs.get(name, 0))
        if part:
            line = credited(found.lines[0], name, part, charges, before=credited_before)
            notes.append(credit_note(found, [line], [note.totals for note in notes]))
            credited_before += part
    payments = [
        Settlement("payment", amount_of(inputs.get("paid", 0)) // step),
        Settlement("refund", amount_of(inputs.get("refunded", 0)) // step),
        *(Settlement("credit_note", -note.totals.payable) for note in notes),
        # What of it the document has not put there itself, because it is below 0.
        Settlement("balance", -(max(into_balance, 0) // step + min(found.totals.balance, 0))),
    ]
    charged = found.totals.total + sum(note.totals.total for note in notes)
    return {
        **both("charged", max(charged, 0), currency),
        **both("balance", open_amount(found.totals.payable, payments), currency),
    }


def _credit_unused(inputs: Inputs) -> Results:
    """An invoice paid in advance, and the credit note for the days that were not used."""
    found = document(inputs, {"fee": named_amount(inputs, "amount")})
    line = credited(found.lines[0], "credit", int(inputs["unused_days"]), int(inputs["period_days"]))
    totals = credit_note(found, [line]).totals
    return {
        **both("invoice_tax", found.totals.tax, found.currency),
        **both("invoice_total", found.totals.total, found.currency),
        **both("subtotal", -totals.net, found.currency),
        **both("tax", -totals.tax, found.currency),
        **both("total", -totals.total, found.currency),
    }


def _threshold(inputs: Inputs) -> Results:
    """Usage is billed as it reaches the threshold, the first time only unless the case says otherwise; the period's
    invoice bills all of it and takes that back."""
    price = compile_price(Charge("usage", "usage", "per_unit", unit_price=decimal_of(inputs["unit"])))
    threshold, repeats = named_amount(inputs, "threshold"), bool(inputs.get("repeats", False))
    quantity = used = billed = 0
    progress: list[Line] = []
    for _, more in inputs["usage"]:
        quantity += quantity_of(more)
        used = price(quantity) or 0
        if reached(threshold, used, billed, times=len(progress), repeats=repeats):
            (line,) = document(inputs, {f"progress {len(progress)}": used - billed}).lines
            progress.append(line)
            billed = used
    taken_back = [reversal(line, f"less {line.id}") for line in progress]
    final = document(inputs, {"fee": named_amount(inputs, "base_fee"), "usage": used}, settled=taken_back)
    currency = final.currency
    return {
        **both("mid_period_invoice", sum(line.total for line in progress), currency),
        **both("final_fees", final.totals.amount + sum(line.amount for line in progress), currency),
        **both("final_credit", sum(line.total for line in progress), currency),
        **both("final_total", final.totals.total, currency),
    }


#: The models of invoices. Each raises KeyError or ValueError for inputs it does not understand.
INVOICE_CASES: Mapping[str, Run] = {
    "tax": _tax,
    "tax_parallel": _tax,
    "discount_percent": _discounted,
    "coupon_chain": _discounted,
    "coupon_floor": _discounted,
    "coupon_allocation_tax": _allocation,
    "invoice_order": _order,
    "invoice_balance": _balance,
    "credit_note_unused": _credit_unused,
    "threshold_billing": _threshold,
}
