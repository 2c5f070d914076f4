"""From a document's arithmetic to the rows it is written as: what every document after an issued one shares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, TypedDict

from psycopg import Connection

from pipeline.billing.close_money import settle
from pipeline.billing.documents import (
    Converted,
    NewDocument,
    NewLine,
    NewTax,
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
from pipeline.core.invoice import Document, Line, Totals
from pipeline.core.money import Amount, Minor, minor_units
from pipeline.core.parties import LegalEntity


class LineColumns(TypedDict):
    """Money of a line, as ``documents.NewLine`` takes it."""

    exact_amount: Amount
    amount: Minor
    discount: Minor
    net: Minor
    tax: Minor
    total: Minor


def line_columns(line: Line) -> LineColumns:
    return {
        "exact_amount": line.exact,
        "amount": line.amount,
        "discount": line.discount,
        "net": line.net,
        "tax": line.tax,
        "total": line.total,
    }


class TotalsColumns(TypedDict):
    """The header, as ``documents.NewDocument`` takes it."""

    lines_amount: Minor
    discounts_amount: Minor
    net_amount: Minor
    tax_amount: Minor
    total_amount: Minor
    credits_amount: Minor
    balance_amount: Minor
    payable_amount: Minor


def totals_columns(totals: Totals) -> TotalsColumns:
    return {
        "lines_amount": totals.amount,
        "discounts_amount": totals.discount,
        "net_amount": totals.net,
        "tax_amount": totals.tax,
        "total_amount": totals.total,
        "credits_amount": totals.credits,
        "balance_amount": totals.balance,
        "payable_amount": totals.payable,
    }


def tax_rows(document: Document) -> tuple[NewTax, ...]:
    return tuple(
        NewTax(one.tax.tax, one.tax.treatment, one.tax.percent, one.base, one.amount, one.tax.note)
        for one in document.taxes
    )


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
    base = document.currency
    quote = basis.customer.document_currency or basis.entity.reporting_currency
    if quote == base:
        return None
    day = issue_date(basis.entity, now)
    rate = fx.rate_on(base, quote, day, published(connection, day, (base, quote)))
    shown = fx.convert(rate, base, net=document.totals.net, tax=document.totals.tax)
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
    lines = tuple(
        replace(row, line_id=made.get(key_of_row(row))) if row.line_id is None else row for row in new.document.lines
    )
    (id,) = write_drafts(connection, [replace(new.document, lines=lines)])
    settle(connection, [(id, new)], made, actor=actor, note=note)
    (number,) = issue(
        connection, [ToIssue(id, new.document.kind, new.basis.entity, converted_now)], now=now, actor=actor
    )
    return id, number.text


def key_of_row(row: NewLine) -> Key:
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
        place = of.legal_entity, of.account, of.currency, whole(amount, of.currency), document_id, kind
        connection.execute(_INSERT_BALANCE, [*place, actor, note])


def whole(amount: Minor, currency: str) -> Decimal:
    """In whole units of the currency, exact."""
    return Decimal(f"{amount}E-{minor_units(currency)}")
