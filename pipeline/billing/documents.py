"""Documents in the database: written as drafts, issued with a number, voided; whoever makes them, they go this way.

Money is in the currency's smallest unit here (``Minor``) and whole units in the tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, TypeAlias, TypedDict
from zoneinfo import ZoneInfo

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.numbers import Number, range_of, take
from pipeline.core.invoice import Document, Line, LineKind, Totals
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, Amount, Micros, Minor, Quantity, minor_units
from pipeline.core.parties import DocumentKind, LegalEntity
from pipeline.core.periods import Period, to_datetime

Role: TypeAlias = Literal["new", "reversal"]


@dataclass(frozen=True, slots=True)
class NewLine:
    """A line to write. Quantity in 1e-9 of its unit, exact amount in 1e-12, the rest in smallest units."""

    kind: LineKind
    #: Whose it is; of a consolidated invoice the child.
    account: str
    charge: str
    #: Service period.
    service: Period
    segment_start_us: Micros
    quantity: Quantity
    exact_amount: Amount
    amount: Minor
    discount: Minor
    net: Minor
    tax: Minor
    total: Minor
    tax_category: str
    unit: str = ""
    contract: str = ""
    plan: str = ""
    plan_version: int = 0
    price_version: str = ""
    meter: str = ""
    cell: str = ""
    #: The container's line behind it.
    line_id: int | None = None
    #: The document line it takes back or stands in for.
    adjusts_id: int | None = None
    role: Role = "new"
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewTax:
    """A row of the tax table."""

    tax: str
    treatment: str
    percent: Decimal
    base: Minor
    amount: Minor
    note: str = ""


@dataclass(frozen=True, slots=True)
class NewDiscount:
    """A coupon's or a net credit's discount; ``line`` is the index of the line it is on, None the whole document."""

    amount: Minor
    coupon: str = ""
    grant: int | None = None
    name: str = ""
    line: int | None = None
    #: Whether it is of lines that take back or restate those of other documents: then it is no use of the coupon.
    restates: bool = False


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document to write, with all of its rows; amounts as ``core.invoice.Totals``, in smallest units."""

    kind: DocumentKind
    legal_entity: str
    #: Who pays.
    account: str
    currency: str
    period: Period
    tax_date: date
    lines_amount: Minor
    discounts_amount: Minor
    net_amount: Minor
    tax_amount: Minor
    total_amount: Minor
    credits_amount: Minor
    balance_amount: Minor
    payable_amount: Minor
    lines: tuple[NewLine, ...]
    taxes: tuple[NewTax, ...]
    discounts: tuple[NewDiscount, ...]
    created_by: str
    content: Mapping[str, Any] = field(default_factory=dict)
    corrects_id: int | None = None
    reason_code: str | None = None
    note: str = ""
    run_id: int | None = None


class LineColumns(TypedDict):
    """Money of a line, as ``NewLine`` takes it."""

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
    """The header, as ``NewDocument`` takes it."""

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


def discount_rows(document: Document) -> tuple[NewDiscount, ...]:
    place = {line.id: number for number, line in enumerate(document.lines)}
    return tuple(
        NewDiscount(
            amount=one.amount,
            coupon=one.coupon,
            grant=int(one.grant) if one.grant else None,
            name=one.name,
            line=None if one.line is None else place[one.line],
            restates=one.restates,
        )
        for one in document.discounts
    )


@dataclass(frozen=True, slots=True)
class Converted:
    """What a document comes to in another currency, in its smallest unit, and the rate it was converted by."""

    currency: str
    rate: Decimal
    day: date
    source: str
    net: Minor
    tax: Minor
    total: Minor


@dataclass(frozen=True, slots=True)
class ToIssue:
    """A draft about to be issued: by which entity, as which kind."""

    id: int
    kind: DocumentKind
    entity: LegalEntity
    fx: Converted | None = None


# Writing --------------------------------------------------------------------------------------------------------------

_TAKE_IDS = "SELECT nextval(pg_get_serial_sequence(%s, 'id')) FROM generate_series(1, %s)"
_COPY_DOCUMENTS = """
COPY billing.document (id, kind, legal_entity, account, currency, period_start, period_end, tax_date, corrects_id,
    reason_code, note, lines_amount, discounts_amount, net_amount, tax_amount, total_amount, credits_amount,
    balance_amount, payable_amount, content, run_id, created_by) FROM STDIN
"""
_COPY_LINES = """
COPY billing.document_line (id, document_id, position, kind, account, line_id, adjusts_id, role, period_start,
    period_end, contract, plan, plan_version, price_version, charge, meter, cell, segment_start, quantity, unit,
    exact_amount, amount, discount_amount, net_amount, tax_amount, total_amount, tax_category, detail) FROM STDIN
"""
_COPY_TAXES = """
COPY billing.document_tax (document_id, position, tax, treatment, percent, base_amount, tax_amount, note) FROM STDIN
"""
_COPY_DISCOUNTS = """
COPY billing.document_discount (document_id, position, coupon, document_line_id, amount, grant_id, name, restates)
FROM STDIN
"""


def write_drafts(connection: "Connection[Any]", documents: Sequence[NewDocument]) -> list[int]:
    """Write documents with all their rows, as drafts; return their ids, in order. In the caller's transaction.

    Raises psycopg.errors.UniqueViolation for a second invoice of a payer's period.
    """
    if not documents:
        return []
    ids = _take_ids(connection, "billing.document", len(documents))
    line_ids = iter(_take_ids(connection, "billing.document_line", sum(len(one.lines) for one in documents)))
    lines_of = [[next(line_ids) for _ in one.lines] for one in documents]
    rows = list(zip(ids, documents, lines_of, strict=True))
    _copy(connection, _COPY_DOCUMENTS, (_document_row(id, one) for id, one, _ in rows))
    _copy(
        connection,
        _COPY_LINES,
        (
            _line_row(line_id, id, position, minor_units(one.currency), line)
            for id, one, of_lines in rows
            for position, (line_id, line) in enumerate(zip(of_lines, one.lines, strict=True), 1)
        ),
    )
    _copy(
        connection,
        _COPY_TAXES,
        (
            (id, position, tax.tax, tax.treatment, tax.percent, *_money(one.currency, tax.base, tax.amount), tax.note)
            for id, one, _ in rows
            for position, tax in enumerate(one.taxes, 1)
        ),
    )
    if any(one.discounts for one in documents):
        _copy(
            connection,
            _COPY_DISCOUNTS,
            (
                (
                    id,
                    position,
                    discount.coupon,
                    None if discount.line is None else of_lines[discount.line],
                    *_money(one.currency, discount.amount),
                    discount.grant,
                    discount.name,
                    discount.restates,
                )
                for id, one, of_lines in rows
                for position, discount in enumerate(one.discounts, 1)
            ),
        )
    return ids


def _take_ids(connection: "Connection[Any]", table: str, count: int) -> list[int]:
    return [id for (id,) in connection.execute(_TAKE_IDS, [table, count])]


def _copy(connection: "Connection[Any]", statement: str, rows: Iterable[Sequence[Any]]) -> None:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _document_row(id: int, document: NewDocument) -> tuple[Any, ...]:
    return (
        id,
        document.kind,
        document.legal_entity,
        document.account,
        document.currency,
        to_datetime(document.period.start_us),
        to_datetime(document.period.end_us),
        document.tax_date,
        document.corrects_id,
        document.reason_code,
        document.note,
        *_money(
            document.currency,
            document.lines_amount,
            document.discounts_amount,
            document.net_amount,
            document.tax_amount,
            document.total_amount,
            document.credits_amount,
            document.balance_amount,
            document.payable_amount,
        ),
        Jsonb(document.content),
        document.run_id,
        document.created_by,
    )


def _line_row(id: int, document_id: int, position: int, digits: int, line: NewLine) -> tuple[Any, ...]:
    return (
        id,
        document_id,
        position,
        line.kind,
        line.account,
        line.line_id,
        line.adjusts_id,
        line.role,
        to_datetime(line.service.start_us),
        to_datetime(line.service.end_us),
        line.contract,
        line.plan,
        line.plan_version,
        line.price_version,
        line.charge,
        line.meter,
        line.cell,
        to_datetime(line.segment_start_us),
        _text(line.quantity, QUANTITY_DECIMALS),
        line.unit,
        _text(line.exact_amount, AMOUNT_DECIMALS),
        _text(line.amount, digits),
        _text(line.discount, digits),
        _text(line.net, digits),
        _text(line.tax, digits),
        _text(line.total, digits),
        line.tax_category,
        Jsonb(line.detail),
    )


def _money(currency: str, *amounts: Minor) -> list[str]:
    digits = minor_units(currency)
    return [_text(amount, digits) for amount in amounts]


def _text(value: int, decimals: int) -> str:
    """As PostgreSQL reads it, digit by digit."""
    return f"{value}e-{decimals}"


# Issuing --------------------------------------------------------------------------------------------------------------

_ISSUE = """
UPDATE billing.document SET state = 'issued', number = issued.number, number_series = issued.series,
    number_year = issued.year, number_serial = issued.serial, issue_date = issued.day, due_date = issued.due,
    issued_at = %(at)s, issued_by = %(by)s
FROM unnest(%(ids)s::bigint[], %(numbers)s::text[], %(series)s::text[], %(years)s::integer[], %(serials)s::bigint[],
    %(days)s::date[], %(due)s::date[]) AS issued (id, number, series, year, serial, day, due)
WHERE document.id = issued.id AND document.state IN ('draft', 'reviewed')
"""
_SET_FX = """
UPDATE billing.document SET fx_currency = %s, fx_rate = %s, fx_date = %s, fx_source = %s, fx_net_amount = %s,
    fx_tax_amount = %s, fx_total_amount = %s
WHERE id = %s
"""


class NotIssuable(ValueError):
    """A document is no draft any more: somebody issued or replaced it."""


def issue(connection: "Connection[Any]", drafts: Sequence[ToIssue], *, now: datetime, actor: str) -> list[Number]:
    """Number and issue drafts, in order, as the last step of the transaction that makes or reviewed them.

    Issue and due dates are days of the legal entity's calendar at ``now``. Raises NotIssuable.
    """
    if not drafts:
        return []
    days = [issue_date(draft.entity, now) for draft in drafts]
    converted = [(draft.id, draft.fx) for draft in drafts if draft.fx is not None]
    if converted:
        with connection.cursor() as cursor:
            cursor.executemany(_SET_FX, [_fx_row(id, fx) for id, fx in converted])
    wanted = [range_of(draft.entity, draft.kind, day.year) for draft, day in zip(drafts, days, strict=True)]
    numbers = take(connection, wanted)
    issued = connection.execute(
        _ISSUE,
        {
            "at": now,
            "by": actor,
            "ids": [draft.id for draft in drafts],
            "numbers": [number.text for number in numbers],
            "series": [number.range.series for number in numbers],
            "years": [number.range.year for number in numbers],
            "serials": [number.serial for number in numbers],
            "days": days,
            "due": [day + timedelta(days=draft.entity.payment_days) for draft, day in zip(drafts, days, strict=True)],
        },
    )
    if issued.rowcount != len(drafts):
        raise NotIssuable(f"expected {len(drafts)} drafts to issue, got {issued.rowcount}: others are issued already")
    return numbers


def issue_date(entity: LegalEntity, now: datetime) -> date:
    """The day it is for a legal entity."""
    return now.astimezone(ZoneInfo(entity.time_zone)).date()


def _fx_row(id: int, fx: Converted) -> tuple[Any, ...]:
    return (fx.currency, fx.rate, fx.day, fx.source, *_money(fx.currency, fx.net, fx.tax, fx.total), id)


# What a draft is replaced by is another row: its rows go with it.
_DELETE_DRAFTS = "DELETE FROM billing.document WHERE id = ANY(%s) AND state = 'draft'"


def delete_drafts(connection: "Connection[Any]", ids: Sequence[int]) -> None:
    """Take back drafts, with all their rows. Reviewed and issued documents stay as they are."""
    if ids:
        connection.execute(_DELETE_DRAFTS, [list(ids)])
