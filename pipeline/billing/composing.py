"""From a document's arithmetic to the rows it is written as: what every document after an issued one shares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection

from pipeline.billing.close_money import settle
from pipeline.billing.documents import (
    Converted,
    NewDocument,
    NewLine,
    ToIssue,
    issue,
    issue_date,
    write_drafts,
)
from pipeline.billing.fx_rates import published
from pipeline.billing.invoicing_store import load, mark
from pipeline.billing.issued import Issued
from pipeline.billing.reckoning import Basis, Reckoned
from pipeline.billing.statements import DueKind, Key
from pipeline.core import fx
from pipeline.core.invoice import Document, Totals
from pipeline.core.money import Minor, minor_decimal, to_minor
from pipeline.core.parties import LegalEntity


def converted(original: Issued, earlier: Iterable[Totals], totals: Totals) -> Converted | None:
    """A credit note on an issued document, after ``earlier`` ones, at that one's rate.

    Cut from one ruler, what is credited so far, converted: so a document and the notes on all of it sum to 0 in every
    currency, however many they are.
    """
    if original.fx is None:
        return None
    quote, rate, day, source = original.fx
    before = tuple(earlier)
    since, upto = (
        fx.convert(
            fx.Rate(original.currency, quote, rate, day, source),
            original.currency,
            net=-sum(note.net for note in notes),
            tax=-sum(note.tax for note in notes),
        )
        for notes in (before, (*before, totals))
    )
    return Converted(quote, rate, day, source, since.net - upto.net, since.tax - upto.tax, since.total - upto.total)


def legal_entity(connection: "Connection[Any]", id: str, now: datetime) -> LegalEntity:
    """The legal entity as it numbers and dates documents now. Raises LookupError."""
    found = load(connection, applied_until=mark(connection), on=now.date(), accounts=()).legal_entity(id)
    if found is None:
        raise LookupError(f"expected a legal entity of the invoicing file, got {id!r}: `tally invoicing apply`")
    return found


def shown_as(connection: "Connection[Any]", basis: Basis, document: Document, now: datetime) -> Converted | None:
    """What a document comes to in the currency it is shown in beside its own, at the rate of its issue day.

    Raises fx.NoRate.
    """
    base, totals = document.currency, document.totals
    quote = shown_currency(basis, base)
    if quote is None:
        return None
    day = issue_date(basis.entity, now)
    return exchanged(base, quote, day, published(connection, day, (base, quote)), totals.net, totals.tax)


def shown_currency(basis: Basis, currency: str) -> str | None:
    """The currency a document is shown in beside its own; None where it is its own."""
    quote = basis.customer.document_currency or basis.entity.reporting_currency
    return None if quote == currency else quote


def exchanged(base: str, quote: str, day: date, rates: Iterable[fx.Rate], net: Minor, tax: Minor) -> Converted:
    """What a document comes to in another currency, at the last rate on or before its issue date. Raises fx.NoRate."""
    rate = fx.rate_on(base, quote, day, rates)
    shown = fx.convert(rate, base, net=net, tax=tax)
    return Converted(quote, rate.rate, rate.day, rate.source, shown.net, shown.tax, shown.total)


@dataclass(frozen=True, slots=True)
class ToWrite:
    """A reckoned document on its way to be issued, as ``close_money.settle`` takes it."""

    payer: str
    basis: Basis
    reckoned: Reckoned
    document: NewDocument
    container: int | None = None


def write_and_issue(
    connection: "Connection[Any]", new: ToWrite, *, made: Mapping[Key, int], actor: str, note: str, now: datetime
) -> tuple[int, str]:
    """Write a document, settle what it draws, and number it, in the caller's transaction; its id and number.

    ``made``: container lines made since it was reckoned. Raises ValueError as ``settle``, fx.NoRate.
    """
    converted_now = shown_as(connection, new.basis, new.reckoned.document, now)
    (id,) = write_drafts(connection, [with_lines(new.document, made)])
    settle(connection, [(id, new)], made, actor=actor, note=note)
    (number,) = issue(
        connection, [ToIssue(id, new.document.kind, new.basis.entity, converted_now)], now=now, actor=actor
    )
    return id, number.text


def with_lines(document: NewDocument, made: Mapping[Key, int]) -> NewDocument:
    """The document with its lines linked to the container's lines that were made when their entries were booked."""
    if not made:
        return document
    lines = (
        line if line.line_id is not None else replace(line, line_id=made.get(_key_of(line))) for line in document.lines
    )
    return replace(document, lines=tuple(lines))


def _key_of(row: NewLine) -> Key:
    """What a line is about."""
    kind: DueKind = "commitment" if row.kind == "commitment" else "usage" if row.meter else "fee"
    return Key(kind, row.account, row.contract, row.price_version, row.charge, row.cell, row.segment_start_us)


_INSERT_BALANCE = """
INSERT INTO billing.balance_entry (legal_entity, account, currency, amount, document_id, kind, by, note)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""


def add_to_balance(
    connection: "Connection[Any]",
    of: Issued,
    document_id: int,
    kind: str,
    amount: Minor,
    *,
    actor: str,
    note: str,
) -> None:
    """Book on the balance that ``of``'s customer carries forward, above 0 in his favour; 0 is no entry."""
    if amount:
        place = of.legal_entity, of.account, of.currency, minor_decimal(amount, of.currency), document_id, kind
        connection.execute(_INSERT_BALANCE, [*place, actor, note])


_SELECT_BALANCE = """
SELECT coalesce(sum(amount), 0) FROM billing.balance_entry WHERE legal_entity = %s AND account = %s AND currency = %s
"""


def balance_of(connection: "Connection[Any]", of: Issued) -> Minor:
    """What ``of``'s customer carries forward now."""
    place = [of.legal_entity, of.account, of.currency]
    (amount,) = connection.execute(_SELECT_BALANCE, place).fetchone() or (Decimal(0),)
    return to_minor(amount, of.currency)
