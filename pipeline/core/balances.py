"""What is left to pay: the balance that goes on from document to document, and payments. Pure.

All amounts are in a currency's smallest unit.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from pipeline.core.money import Minor

SettlementKind: TypeAlias = Literal["payment", "refund", "write_off", "credit_note", "balance"]
PaymentState: TypeAlias = Literal["unpaid", "partly_paid", "paid", "uncollectible"]


class Carried(NamedTuple):
    """What a balance does to a document: due = applied + payable, after = balance before - applied."""

    #: Paid from the balance; below 0: put into it.
    applied: Minor
    payable: Minor
    #: The balance from now on, in the customer's favour.
    after: Minor


class Settlement(NamedTuple):
    """What settles a document after it was issued. Above 0 takes off what is open, so a refund is below 0.

    credit_note: what a credit note takes off it. balance: paid from the customer's balance; below 0, what was paid too
    much and put into the balance.
    """

    kind: SettlementKind
    amount: Minor


def carry(due: Minor, balance: Minor) -> Carried:
    """Pay what a document asks from the customer's balance; what it gives back (due below 0) goes into the balance.

    Raises ValueError for a balance below 0: what a customer owes is an open document.
    """
    if balance < 0:
        raise ValueError(f"expected a balance of 0 or more in the customer's favour, got {balance}")
    applied = min(due, balance)
    return Carried(applied, due - applied, balance - applied)


def open_amount(payable: Minor, settlements: Iterable[Settlement]) -> Minor:
    """What is still to be paid of a document; below 0: paid too much."""
    return payable - sum(settlement.amount for settlement in settlements)


def payment_state(payable: Minor, settlements: Iterable[Settlement]) -> PaymentState:
    """The payment state of an issued document, as the view ``billing.document_payment`` derives it; never stored."""
    found = list(settlements)
    if open_amount(payable, found) == 0:
        return "uncollectible" if sum(one.amount for one in found if one.kind == "write_off") else "paid"
    return "partly_paid" if sum(one.amount for one in found) else "unpaid"
