"""What settles an issued document: payments, refunds, write-offs. Entries are only added; the state is derived.

``billing.document_payment`` says of each issued document what is open and whether it is unpaid, partly paid, paid or
uncollectible. The document itself never changes.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.issued import Issued, minor, read
from pipeline.core.balances import SettlementKind
from pipeline.core.money import Minor, minor_units, scaled


class NotPayable(ValueError):
    """The amount cannot be booked on the document: says what was expected, what came, and what to do."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What is left of a document after a booking, in whole units of its currency."""

    document: int
    number: str
    currency: str
    booked: Decimal
    open: Decimal
    state: str
    #: Whether this very booking (document, kind, reference) was there before: nothing was booked now.
    repeated: bool = False


_SELECT_PAYMENT = "SELECT open_amount, state FROM billing.document_payment WHERE document_id = %s"
_SELECT_REPEATED = (
    "SELECT amount FROM billing.settlement WHERE document_id = %s AND kind = %s AND reference = %s LIMIT 1"
)
_INSERT = """
INSERT INTO billing.settlement (document_id, kind, amount, at, by, reference) VALUES (%s, %s, %s, %s, %s, %s)
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def pay(
    connection: "Connection[Any]",
    id: int,
    amount: Decimal | None,
    *,
    at: datetime,
    reference: str,
    actor: str,
) -> Settled:
    """Book a payment of an invoice, or of a credit note the refund that was paid out; None: all that is open.

    The same reference on the same document is booked once: a repeat changes nothing and says so. Raises NoDocument,
    NotPayable for a void document, where nothing is open, and for more than what is open.
    """
    with connection.transaction():
        document = _payable(connection, id)
        credit = open_amount(connection, document) < 0 or document.totals.payable < 0
        kind: SettlementKind = "refund" if credit else "payment"
        if reference:
            repeated = connection.execute(_SELECT_REPEATED, [id, kind, reference]).fetchone()
            if repeated is not None:
                return _settled(connection, document, abs(repeated[0]), repeated=True)
        left = abs(open_amount(connection, document))
        if left == 0:
            raise _nothing_open(connection, document)
        wanted = left if amount is None else _minor(amount, document.currency)
        if not 0 < wanted <= left:
            raise NotPayable(
                f"expected an amount above 0 and up to the {_text(left, document)} open on {document.number}, got "
                f"{_text(wanted, document)}: book what is beyond it on the document it belongs to"
            )
        book(connection, document, kind, -wanted if credit else wanted, at=at, reference=reference, actor=actor)
        return _settled(connection, document, _whole(wanted, document))


def write_off(connection: "Connection[Any]", id: int, *, at: datetime, why: str, actor: str) -> Settled:
    """Give up what is open on an invoice: it is uncollectible. Raises NoDocument, NotPayable where nothing is owed."""
    with connection.transaction():
        document = _payable(connection, id)
        left = open_amount(connection, document)
        if left == 0:
            raise _nothing_open(connection, document)
        if left < 0:
            raise NotPayable(
                f"expected an amount that the customer owes on {document.number}, got {_text(left, document)}, "
                "which is to be paid out: `tally invoices pay` books that"
            )
        book(connection, document, "write_off", left, at=at, reference=why, actor=actor)
        return _settled(connection, document, _whole(left, document))


def book(
    connection: "Connection[Any]",
    document: Issued,
    kind: SettlementKind,
    amount: Minor,
    *,
    at: datetime,
    reference: str,
    actor: str,
) -> None:
    """Write a settlement and its audit, in the caller's transaction; above 0 takes off what is payable."""
    whole = _whole(amount, document)
    connection.execute(_INSERT, [document.id, kind, whole, at, actor, reference])
    detail = {"number": document.number, "amount": str(whole), "currency": document.currency, "reference": reference}
    connection.execute(_AUDIT, [actor, f"document.{kind}", f"document:{document.id}", Jsonb(detail)])


def open_amount(connection: "Connection[Any]", document: Issued) -> Minor:
    """What is left to pay; below 0: to be paid back. 0 for a void document."""
    row = connection.execute(_SELECT_PAYMENT, [document.id]).fetchone()
    return 0 if row is None else minor(row[0], document.currency)


def _payable(connection: "Connection[Any]", id: int) -> Issued:
    document = read(connection, id, lock=True)
    if document.state != "issued":
        raise NotPayable(f"expected an issued document, got {document.number}, which is {document.state}")
    return document


def _nothing_open(connection: "Connection[Any]", document: Issued) -> NotPayable:
    state = _settled(connection, document, Decimal(0)).state.replace("_", " ")
    return NotPayable(
        f"nothing is open on {document.number}, which is {state}: `tally invoices show {document.number}` tells what "
        "settled it"
    )


def _settled(connection: "Connection[Any]", document: Issued, booked: Decimal, *, repeated: bool = False) -> Settled:
    row = connection.execute(_SELECT_PAYMENT, [document.id]).fetchone()
    assert row is not None, "an issued document has a payment state"
    left, state = row
    return Settled(document.id, document.number, document.currency, booked, left, state, repeated)


def _minor(amount: Decimal, currency: str) -> Minor:
    try:
        return scaled(amount, minor_units(currency))
    except ValueError as error:
        raise NotPayable(f"{error}: {currency} has {minor_units(currency)}") from None


def _whole(amount: Minor, document: Issued) -> Decimal:
    return Decimal(f"{amount}E-{minor_units(document.currency)}")


def _text(amount: Minor, document: Issued) -> str:
    return f"{_whole(amount, document)} {document.currency}"
