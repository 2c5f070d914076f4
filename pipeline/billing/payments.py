"""What settles an issued document: payments, refunds, write-offs. Entries are only added; the state is derived.

``billing.document_payment`` says of each issued document what is open and whether it is unpaid, partly paid, paid or
uncollectible. The document itself never changes. What is paid beyond it is the customer's: it goes into the balance
that his next documents are paid from.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.composing import add_to_balance, balance_of
from pipeline.billing.credits import lock_grants
from pipeline.billing.issued import Issued, read
from pipeline.core.balances import SettlementKind
from pipeline.core.money import Minor, minor_decimal, minor_units, to_minor


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
    #: What was paid beyond it and put into the customer's balance; below 0: taken out of it again.
    to_balance: Decimal = Decimal(0)
    #: Whether this very booking (document, kind, reference) was there before: nothing was booked now.
    repeated: bool = False


_SELECT_PAYMENT = "SELECT open_amount, state FROM billing.document_payment WHERE document_id = %s"
# One that was taken back may be booked anew.
_SELECT_REPEATED = """
SELECT amount FROM billing.settlement AS booked
WHERE document_id = %s AND kind = %s AND reference = %s AND takes_back_id IS NULL
    AND NOT EXISTS (SELECT FROM billing.settlement AS later WHERE later.takes_back_id = booked.id)
LIMIT 1
"""
_SELECT_SUM = "SELECT coalesce(sum(amount), 0) FROM billing.settlement WHERE document_id = %s AND kind = %s"
_INSERT = """
INSERT INTO billing.settlement (document_id, kind, amount, at, by, reference, takes_back_id)
VALUES (%s, %s, %s, %s, %s, %s, %s)
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

    What is paid beyond what is open ends a write-off, then goes into the customer's balance. The same reference on the
    same document is booked once: a repeat changes nothing and says so. Raises NoDocument, NotPayable for a void
    document, for None where nothing is open, for paying out more than is owed, and for a reference that another amount
    was booked with.
    """
    with connection.transaction():
        document = _payable(connection, id)
        left = open_amount(connection, document)
        pays_out = left < 0 or document.totals.payable < 0
        kind: SettlementKind = "refund" if pays_out else "payment"
        if reference:
            repeated = connection.execute(_SELECT_REPEATED, [id, kind, reference]).fetchone()
            if repeated is not None:
                before = abs(to_minor(repeated[0], document.currency))
                if amount is not None and (now := _minor(amount, document.currency)) != before:
                    raise NotPayable(
                        f"expected {_text(before, document)}, as was booked on {document.number} with reference "
                        f"{reference!r} before, got {_text(now, document)}: take that {kind} back, or give another "
                        "reference"
                    )
                return _settled(connection, document, minor_decimal(before, document.currency), repeated=True)
        if left == 0 and (amount is None or pays_out):
            raise _nothing_open(connection, document)
        wanted = abs(left) if amount is None else _minor(amount, document.currency)
        if wanted <= 0 or (pays_out and wanted > -left):
            upto = f" and up to the {_text(-left, document)} owed" if pays_out else ""
            raise NotPayable(f"expected an amount above 0{upto} on {document.number}, got {_text(wanted, document)}")
        book(connection, document, kind, -wanted if pays_out else wanted, at=at, reference=reference, actor=actor)
        beyond = 0 if pays_out else max(wanted - left, 0)
        to_balance = beyond - end_write_off(connection, document, beyond, at=at, reference=reference, actor=actor)
        _put_into_balance(connection, document, to_balance, at=at, reference=reference, actor=actor)
        return _settled(connection, document, minor_decimal(wanted, document.currency), to_balance)


_SELECT_STANDING = """
SELECT id, kind, amount, reference FROM billing.settlement AS booked
WHERE document_id = %(document)s AND kind IN ('payment', 'refund') AND takes_back_id IS NULL
    AND (%(payment)s::bigint IS NULL OR id = %(payment)s)
    AND NOT EXISTS (SELECT FROM billing.settlement AS later WHERE later.takes_back_id = booked.id)
ORDER BY id DESC LIMIT 1
"""


def take_back(
    connection: "Connection[Any]", id: int, payment: int | None, *, at: datetime, why: str, actor: str
) -> Settled:
    """Take back a payment or refund that was booked by mistake, or that bounced; None: the document's last one.

    Of a payment first what the document's payments put into the balance, which must still be there. Raises NoDocument,
    NotPayable where there is none, it was taken back before, or what it paid was given back or used since.
    """
    with connection.transaction():
        document = _payable(connection, id)
        row = connection.execute(_SELECT_STANDING, {"document": id, "payment": payment}).fetchone()
        if row is None:
            got = "none" if payment is None else f"{payment}, which is none"
            raise NotPayable(
                f"expected a payment or refund of {document.number} that stands, got {got}: "
                f"`tally invoices show {document.number}` shows them with their ids"
            )
        booked, kind, whole, reference = row
        amount = to_minor(whole, document.currency)
        if kind == "payment":
            _check_not_given_back(connection, document)
        from_balance = min(-_sum(connection, document, "balance"), amount) if kind == "payment" else 0
        book(connection, document, kind, -amount, at=at, reference=reference, actor=actor, takes_back=booked, note=why)
        _put_into_balance(connection, document, -from_balance, at=at, reference=reference, actor=actor)
        if (rest := balance_of(connection, document)) < 0:
            raise NotPayable(
                f"payment {booked} of {document.number} put {_text(from_balance, document)} into the balance, of which "
                f"{_text(-rest, document)} is used: void the later documents that used it first"
            )
        return _settled(connection, document, -whole, -from_balance)


def _put_into_balance(
    connection: "Connection[Any]", document: Issued, amount: Minor, *, at: datetime, reference: str, actor: str
) -> None:
    """Carry forward what was paid beyond a document, or below 0 take it out again; 0 is nothing."""
    if amount:
        book(connection, document, "balance", -amount, at=at, reference=reference, actor=actor)
        add_to_balance(connection, document, document.id, "overpayment", amount, actor=actor, note=reference)


_SELECT_GIVEN_BACK = """
SELECT string_agg(number, ', ' ORDER BY id) FROM billing.document
WHERE corrects_id = %(id)s AND kind = 'credit_note' AND state = 'issued'
HAVING -sum(payable_amount) > (
    SELECT coalesce(sum(amount), 0) FROM billing.settlement WHERE document_id = %(id)s AND kind = 'credit_note'
)
"""


def _check_not_given_back(connection: "Connection[Any]", document: Issued) -> None:
    """Refuse to take back a payment of which a credit note gave something back."""
    given_back = connection.execute(_SELECT_GIVEN_BACK, {"id": document.id}).fetchone()
    if given_back is not None:
        raise NotPayable(
            f"expected payments of {document.number} that nothing gave back, got credit note {given_back[0]} on what "
            "was paid: void it first"
        )


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
        return _settled(connection, document, minor_decimal(left, document.currency))


def end_write_off(
    connection: "Connection[Any]", document: Issued, amount: Minor, *, at: datetime, reference: str, actor: str
) -> Minor:
    """Take a write-off back for what is settled otherwise after all, in the caller's transaction; how much it was."""
    ended = max(min(amount, _sum(connection, document, "write_off")), 0)
    if ended:
        book(connection, document, "write_off", -ended, at=at, reference=reference, actor=actor)
    return ended


def book(
    connection: "Connection[Any]",
    document: Issued,
    kind: SettlementKind,
    amount: Minor,
    *,
    at: datetime,
    reference: str,
    actor: str,
    takes_back: int | None = None,
    note: str = "",
) -> None:
    """Write a settlement and its audit, in the caller's transaction; above 0 takes off what is payable."""
    whole = minor_decimal(amount, document.currency)
    connection.execute(_INSERT, [document.id, kind, whole, at, actor, reference, takes_back])
    detail = {"number": document.number, "amount": str(whole), "currency": document.currency, "reference": reference}
    if takes_back is not None:
        detail |= {"takes_back": str(takes_back), "note": note}
    connection.execute(_AUDIT, [actor, f"document.{kind}", f"document:{document.id}", Jsonb(detail)])


def open_amount(connection: "Connection[Any]", document: Issued) -> Minor:
    """What is left to pay; below 0: to be paid back. 0 for a void document."""
    row = connection.execute(_SELECT_PAYMENT, [document.id]).fetchone()
    return 0 if row is None else to_minor(row[0], document.currency)


def _sum(connection: "Connection[Any]", document: Issued, kind: SettlementKind) -> Minor:
    """What settlements of a kind come to."""
    (amount,) = connection.execute(_SELECT_SUM, [document.id, kind]).fetchone() or (Decimal(0),)
    return to_minor(amount, document.currency)


def _payable(connection: "Connection[Any]", id: int) -> Issued:
    """An issued document, held after its customer's balance, as whoever bills or voids holds them."""
    lock_grants(connection, read(connection, id).account)
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


def _settled(
    connection: "Connection[Any]", document: Issued, booked: Decimal, to_balance: Minor = 0, *, repeated: bool = False
) -> Settled:
    row = connection.execute(_SELECT_PAYMENT, [document.id]).fetchone()
    assert row is not None, "an issued document has a payment state"
    left, state = row
    beyond = minor_decimal(to_balance, document.currency)
    return Settled(document.id, document.number, document.currency, booked, left, state, beyond, repeated)


def _minor(amount: Decimal, currency: str) -> Minor:
    try:
        return to_minor(amount, currency)
    except ValueError as error:
        raise NotPayable(f"{error}: {currency} has {minor_units(currency)}") from None


def _text(amount: Minor, document: Issued) -> str:
    return f"{minor_decimal(amount, document.currency)} {document.currency}"
