"""Samples in the database: written by the code that the close writes with, then numbered by hand."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing.documents import NewDiscount, NewDocument, NewLine, NewTax, write_drafts
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, minor_units, plain, scaled
from pipeline.core.parties import Address
from pipeline.core.periods import Period, to_micros
from pipeline.documents.model import Document, Line, Party, Span

_ISSUE = """
UPDATE billing.document SET state = 'issued', number = %s, number_series = %s, number_year = 2026,
    number_serial = %s, issue_date = %s, due_date = %s, issued_at = now(), issued_by = 'test',
    fx_currency = %s, fx_rate = %s, fx_date = %s, fx_source = %s, fx_net_amount = %s, fx_tax_amount = %s,
    fx_total_amount = %s
WHERE id = %s
"""


def store(
    connection: "Connection[Any]",
    document: Document,
    *,
    corrects_id: int | None = None,
    adjusts: Mapping[int, int] | None = None,
) -> int:
    """Write a document, and issue it where it has a number; ``adjusts``: positions to ids of lines of another."""
    digits = minor_units(document.currency)
    minor = lambda amount: scaled(amount, digits)  # noqa: E731
    totals = document.totals
    [id] = write_drafts(
        connection,
        [
            NewDocument(
                kind=document.kind,
                legal_entity=document.seller.id,
                account=document.buyer.id,
                currency=document.currency,
                period=_period(document.span, document.time_zone),
                tax_date=document.tax_date,
                lines_amount=minor(totals.lines),
                discounts_amount=minor(totals.discounts),
                net_amount=minor(totals.net),
                tax_amount=minor(totals.tax),
                total_amount=minor(totals.total),
                credits_amount=minor(totals.credits),
                balance_amount=minor(totals.balance),
                payable_amount=minor(totals.payable),
                lines=tuple(_line(document, line, adjusts or {}) for line in document.lines),
                taxes=tuple(
                    NewTax(tax.name, tax.treatment, tax.percent, minor(tax.base), minor(tax.amount), tax.note)
                    for tax in document.taxes
                ),
                discounts=tuple(
                    NewDiscount(
                        minor(one.amount), coupon="c", name=one.name, line=None if one.line is None else one.line - 1
                    )
                    for one in document.discounts
                ),
                created_by="test",
                content=_content(document),
                corrects_id=corrects_id,
                reason_code=document.reason or None,
                note=document.note,
            )
        ],
    )
    if document.number:
        fx = document.exchange
        rates = [fx.currency, fx.rate, fx.day, fx.source, fx.net, fx.tax, fx.total] if fx else [None] * 7
        names = [document.number, document.kind, id, document.issue_date, document.due_date]
        connection.execute(_ISSUE, [*names, *rates, id])
    return id


def _period(span: Span, zone: str) -> Period:
    midnight = lambda day: to_micros(datetime.combine(day, time(), ZoneInfo(zone)).astimezone(UTC))  # noqa: E731
    return Period(midnight(span.first), midnight(span.last + timedelta(days=1)))


def _line(document: Document, line: Line, adjusts: Mapping[int, int]) -> NewLine:
    digits, period = minor_units(document.currency), _period(line.span, document.time_zone)
    return NewLine(
        kind=line.kind,
        account=line.account,
        charge=line.charge,
        service=period,
        segment_start_us=period.start_us,
        quantity=scaled(line.quantity, QUANTITY_DECIMALS),
        exact_amount=scaled(line.exact, AMOUNT_DECIMALS),
        amount=scaled(line.amount, digits),
        discount=scaled(line.discount, digits),
        net=scaled(line.net, digits),
        tax=scaled(line.tax, digits),
        total=scaled(line.total, digits),
        tax_category="standard",
        unit=line.unit,
        contract=line.contract,
        plan=line.plan,
        plan_version=line.plan_version,
        price_version=line.price_version,
        meter=line.meter,
        adjusts_id=adjusts.get(line.position),
        role="reversal" if line.reversal else "new",
        detail=_detail(document, line),
    )


def _detail(document: Document, line: Line) -> dict[str, Any]:
    sign = -1 if document.is_credit else 1  # a credit note keeps the parts of the invoice
    detail: dict[str, Any] = {
        "name": line.name,
        "description": line.description,
        "cell": dict(line.cell),
        "parts": [
            {
                "kind": part.kind,
                "packages": part.packages,
                "events": part.events,
                "amount": plain(part.amount * sign),
                **{key: plain(getattr(part, key)) for key in ("over", "up_to", "quantity", "unit_price", "flat")},
            }
            for part in line.parts
        ],
        "taxes": [
            {
                "tax": tax.name,
                "treatment": tax.treatment,
                "country": "DE",
                "percent": plain(tax.percent),
                "note": tax.note,
                "base": str(tax.base),
                "amount": str(tax.amount),
            }
            for tax in line.taxes
        ],
    }
    if line.share:
        part, whole, _ = line.share
        detail["share"] = {"start": whole - part, "end": whole, "whole": whole}
    if line.usage:
        usage = line.usage
        assert usage.first_at and usage.last_at
        detail |= {
            "events": usage.events,
            "late_events": usage.late_events,
            "first_event_at": usage.first_at.isoformat(),
            "last_event_at": usage.last_at.isoformat(),
            "references": {one.name: {"values": list(one.values), "more": one.more} for one in usage.references},
        }
    return detail


def _content(document: Document) -> dict[str, Any]:
    bank, branding, policy = document.bank, document.branding, document.policy
    return {
        "seller": _party(document.seller)
        | {"iban": bank.iban, "bic": bank.bic, "bank": bank.name, "time_zone": document.time_zone}
        | {"branding": {"logo": branding.logo, "primary": branding.primary, "accent": branding.accent}},
        "buyer": _party(document.buyer)
        | {"purchase_order": document.purchase_order, "reference": document.buyer_reference},
        "language": document.language,
        "terms": document.terms,
        "policies": {
            "tax_rounding": policy.tax_rounding,
            "coupons": policy.coupons,
            "prices": policy.prices,
        },
        "accounts": dict(document.accounts),
        "notices": [
            {
                "kind": notice.kind,
                "name": notice.name,
                "since": _text(notice.since),
                "before": _text(notice.before),
                "after": _text(notice.after),
                "unit": notice.unit,
                "text": notice.text,
            }
            for notice in document.notices
        ],
    }


def _text(value: date | Decimal | None) -> str | None:
    return None if value is None else str(value)


def _party(party: Party) -> dict[str, Any]:
    facts = ("name", "vat_number", "registration", "email", "phone", "website")
    return {key: getattr(party, key) for key in facts} | {"address": _address(party.address)}


def _address(address: Address) -> dict[str, Any]:
    return {
        "lines": list(address.lines),
        "postcode": address.postal_code,
        "city": address.city,
        "region": address.region,
        "country": address.country,
    }
