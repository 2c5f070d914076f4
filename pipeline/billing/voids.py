"""Voids: an issued document is withdrawn as if it had never been sent. Its number stays used, its rows as they are.

What it did beside itself is taken back by further entries: the balance it used or carried forward, the credits it drew.
What it billed is unbilled again, so a re-issue (``pipeline.billing.own_documents``) bills it.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, TypeAlias, get_args

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.alerts import update_now
from pipeline.billing.composing import add_to_balance, balance_of
from pipeline.billing.credits import lock_grants_of
from pipeline.billing.given_back import give_back_all, owners
from pipeline.billing.issued import Issued, read
from pipeline.billing.payments import book
from pipeline.core.money import Minor, minor_decimal, to_minor

#: Why a document is withdrawn, as a code. Values are written into tables: never rename one.
Reason: TypeAlias = Literal["wrong_customer", "wrong_details", "wrong_tax", "wrong_amount", "duplicate", "not_agreed"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class NotVoidable(ValueError):
    """The document cannot be withdrawn: says what stands in the way, and what to do."""


@dataclass(frozen=True, slots=True)
class Voided:
    """What a void took back, in whole units of the currency."""

    document: int
    number: str
    currency: str
    total: Decimal
    #: Given back to the customer's balance; below 0: taken out of it again.
    to_balance: Decimal
    #: Credits that can be drawn again.
    to_credits: Decimal


_VOID = """
UPDATE billing.document SET state = 'void', voided_at = %s, voided_by = %s, void_reason_code = %s, void_note = %s
WHERE id = %s
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def void(connection: "Connection[Any]", id: int, *, reason: Reason, note: str, actor: str, now: datetime) -> Voided:
    """Withdraw an issued document, in one transaction that holds the account's credits and balance, then the document.

    Refused where something builds on it: a credit note, a later document that took back one of its lines, a payment, a
    balance that is used up. Raises NoDocument, NotVoidable.
    """
    with connection.transaction():
        accounts = {read(connection, id).account, *owners(connection, id)}
        lock_grants_of(connection, accounts)
        document = read(connection, id, lock=True)
        _check(connection, document)
        if document.kind == "credit_note":
            _open_again(connection, document, actor=actor, now=now)
        to_balance = -_on_balance(connection, document)
        add_to_balance(connection, document, id, "void", to_balance, actor=actor, note=note)
        if (left := balance_of(connection, document)) < 0:
            put, used = minor_decimal(-to_balance, document.currency), minor_decimal(-left, document.currency)
            raise NotVoidable(
                f"{document.number} put {put} {document.currency} into the balance, "
                f"of which {used} is used: void the later documents that used it first"
            )
        reference = f"void of {document.number}"
        to_credits = give_back_all(connection, id, document.currency, actor=actor, note=reference)
        connection.execute(_VOID, [now, actor, reason, note, id])
        detail = {"number": document.number, "reason": reason, "note": note}
        connection.execute(_AUDIT, [actor, "document.void", f"document:{id}", Jsonb(detail)])
        for account in sorted(accounts):
            update_now(connection, account)
    return Voided(
        document=id,
        number=document.number,
        currency=document.currency,
        total=minor_decimal(document.totals.total, document.currency),
        to_balance=minor_decimal(to_balance, document.currency),
        to_credits=minor_decimal(to_credits, document.currency),
    )


# Credit notes on it; what took back its lines; and, of a credit note on a line that took another one back, what credits
# that one, which stands again by it.
_SELECT_LATER = """
WITH later AS (
    SELECT id FROM billing.document WHERE corrects_id = %(id)s AND kind = 'credit_note'
    UNION
    SELECT later.document_id FROM billing.document_line AS mine
        JOIN billing.document_line AS later ON later.adjusts_id = mine.id
    WHERE mine.document_id = %(id)s AND later.role = 'reversal'
    UNION
    SELECT document.id FROM billing.document_line AS mine
        JOIN billing.document_line AS reversal ON reversal.id = mine.adjusts_id AND reversal.role = 'reversal'
        JOIN billing.document_line AS later ON later.adjusts_id = reversal.adjusts_id
        JOIN billing.document ON document.id = later.document_id AND document.kind = 'credit_note'
    WHERE mine.document_id = %(id)s AND document.id > %(id)s
)
SELECT coalesce(document.number, 'a reviewed ' || document.kind), document.kind::text
FROM later JOIN billing.document USING (id) WHERE document.state IN ('reviewed', 'issued') AND id <> %(id)s
ORDER BY id LIMIT 1
"""
_SELECT_PAID = """
SELECT coalesce(sum(amount), 0) FROM billing.settlement
WHERE document_id = %s AND kind IN ('payment', 'refund', 'write_off')
"""


def _check(connection: "Connection[Any]", document: Issued) -> None:
    if document.state != "issued":
        raise NotVoidable(f"expected an issued document, got {document.number}, which is {document.state}")
    later = connection.execute(_SELECT_LATER, {"id": document.id}).fetchone()
    if later is not None:
        number, kind = later
        what = "credits it" if kind == "credit_note" else "takes back what it billed"
        raise NotVoidable(f"{document.number} stays: {number} {what}. Void {number} first")
    (paid,) = connection.execute(_SELECT_PAID, [document.id]).fetchone() or (Decimal(0),)
    if paid:
        raise NotVoidable(
            f"{document.number} stays: {paid} {document.currency} was paid, paid out or written off on it. Issue a "
            "credit note instead (`tally invoices credit`), or take the payment back (`tally invoices take-back`)"
        )
    if document.kind == "credit_note" and (document.totals.credits or _gave_credits(connection, document)):
        raise NotVoidable(
            f"{document.number} stays: it gave prepaid credits back, which may be used again. Void the grant, or agree "
            "on a charge"
        )


_SELECT_GAVE = "SELECT 1 FROM billing.credit_entry WHERE document_id = %s AND note = %s LIMIT 1"


def _gave_credits(connection: "Connection[Any]", note: Issued) -> bool:
    """Whether a credit note gave back net credits; see ``credit_notes.credit``."""
    return connection.execute(_SELECT_GAVE, [note.corrects_id, f"credit note {note.number}"]).fetchone() is not None


_SELECT_TAKEN_OFF = "SELECT coalesce(sum(amount), 0) FROM billing.settlement WHERE document_id = %s AND kind = %s"


def _open_again(connection: "Connection[Any]", note: Issued, *, actor: str, now: datetime) -> None:
    """What a credit note took off its document is open there again."""
    (amount,) = connection.execute(_SELECT_TAKEN_OFF, [note.id, "credit_note"]).fetchone() or (Decimal(0),)
    if amount:
        assert note.corrects_id is not None, "a credit note has its document"
        original = read(connection, note.corrects_id, lock=True)
        taken_off = to_minor(amount, note.currency)  # below 0 on the note, above 0 on its document
        book(connection, original, "credit_note", taken_off, at=now, reference=f"void of {note.number}", actor=actor)


_SELECT_BALANCE_OF = "SELECT coalesce(sum(amount), 0) FROM billing.balance_entry WHERE document_id = %s"


def _on_balance(connection: "Connection[Any]", document: Issued) -> Minor:
    """What a document put into its customer's balance; below 0 what it took out."""
    (amount,) = connection.execute(_SELECT_BALANCE_OF, [document.id]).fetchone() or (Decimal(0),)
    return to_minor(amount, document.currency)
