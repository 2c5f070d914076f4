"""From what is owed to a document: the rows of ``billing.document`` and its lines, by ``core.invoice.build``. Pure.

The close, adjustments and bills within a period come this way; they differ in what they give as ``Basis``.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

from pipeline.billing import line_discounts, line_taxes
from pipeline.billing.documents import NewDocument, NewLine, discount_rows, line_columns, tax_rows, totals_columns
from pipeline.billing.statements import Booked, Difference, Due, Key
from pipeline.core.charges import scaled_amount
from pipeline.core.credit_notes import reversal
from pipeline.core.credits import Grant, Owed
from pipeline.core.discounts import Coupon
from pipeline.core.invoice import Document, Item, Limits, Line, LineKind, build
from pipeline.core.money import Minor, minor_decimal
from pipeline.core.parties import Address, Customer, DocumentKind, LegalEntity, Policy
from pipeline.core.periods import Period
from pipeline.core.tax import TaxRate, treatment


@dataclass(frozen=True, slots=True)
class Basis:
    """What a document is reckoned on besides its lines, as of its tax date."""

    entity: LegalEntity
    customer: Customer
    taxes: Sequence[TaxRate]
    tax_date: date
    #: In the sequence they are applied in.
    coupons: Sequence[Coupon] = ()
    #: What is left of the customer's net and total credits in the document's currency.
    grants: Sequence[Grant] = ()
    #: Carried forward, in the customer's favour.
    balance: Minor = 0
    #: None: the legal entity's.
    policy: Policy | None = None


@dataclass(frozen=True, slots=True)
class Reckoned:
    """A document's arithmetic, and its lines as rows; they are in the same order."""

    document: Document
    lines: tuple[NewLine, ...]


def item_id(key: Key) -> str:
    """A due's id among the items of a document."""
    return "|".join(map(str, key))


def item_of(due: Due, customer: Customer, uses: tuple[Owed, ...] = ()) -> Item:
    """A due as ``core.invoice`` takes it. ``uses``: when it was used, for credits; else at its service period's end."""
    return Item(
        id=item_id(due.key),
        amount=due.exact_amount,
        kind=due.key.kind,
        plan=due.plan,
        charge=due.key.charge,
        tax_category=customer.tax_categories.get(due.key.charge, due.tax_category),
        limits=_limits(due),
        gross=due.gross,
        uses=uses,
        at_us=due.service.end_us - 1,
        account=due.key.account,
    )


def _limits(due: Due) -> Limits | None:
    charge, segment = due.charge, due.segment
    if charge is None or segment is None or (charge.maximum is None and charge.minimum is None):
        return None
    minimum = None if charge.minimum is None else scaled_amount(charge, charge.minimum, "minimum")
    if minimum is not None and charge.prorate:
        minimum = segment.portion.of(minimum)
    maximum = None if charge.maximum is None else scaled_amount(charge, charge.maximum, "maximum")
    group = (due.key.account, due.key.contract, due.key.price_version, due.key.segment_start_us, charge.id)
    return Limits("|".join(map(str, group)), maximum, minimum)


def reckon(
    left: Sequence[Difference],
    basis: Basis,
    *,
    currency: str,
    uses: Mapping[Key, tuple[Owed, ...]] | None = None,
    settled: Sequence[tuple[Line, NewLine]] = (),
) -> Reckoned:
    """Reckon a document over what is left to bill. Lines of earlier documents are taken back as they were billed.

    ``settled``: lines reckoned elsewhere (adjustments), with their rows; they come last.

    Raises ValueError for a currency, coupon or category that cannot be reckoned with (``tax.NoTaxRate`` among them).
    """
    dues = [one.due for one in left if one.due is not None]
    items = [item_of(due, basis.customer, (uses or {}).get(due.key, ())) for due in dues]
    backs = [(reversal_of(booked), booked) for one in left for booked in one.taken_back]
    categories = {item.tax_category for item in items}
    document = build(
        items,
        currency=currency,
        policy=basis.policy or basis.entity.policy,
        treatments={
            category: treatment(basis.entity, basis.customer, category, basis.tax_date, basis.taxes)
            for category in categories
        },
        coupons=basis.coupons,
        grants=basis.grants,
        balance=basis.balance,
        settled=[*(line for line, _ in backs), *(line for line, _ in settled)],
    )
    lines = {line.id: line for line in document.lines}
    category_of = {item.id: item.tax_category for item in items}
    rows: list[tuple[Line, NewLine]] = []
    taken_back = iter(backs)
    for one in left:
        for _ in one.taken_back:
            line, booked = next(taken_back)
            rows.append((line, reversal_row(line, booked, currency, kind=booked.kind, document=booked.number)))
        if one.due is not None:
            line = lines[item_id(one.due.key)]
            rows.append((line, _due_row(one, one.due, line, category_of[line.id], currency)))
    rows += settled
    return Reckoned(replace(document, lines=tuple(line for line, _ in rows)), tuple(row for _, row in rows))


def reversal_of(booked: Booked) -> Line:
    """The line that takes a booked one back."""
    return reversal(booked.line, f"reversal of {booked.document_line_id}")


def _due_row(one: Difference, due: Due, line: Line, tax_category: str, currency: str) -> NewLine:
    key = due.key
    return NewLine(
        kind=key.kind,
        account=key.account,
        charge=key.charge,
        service=due.service,
        segment_start_us=key.segment_start_us,
        quantity=due.quantity,
        **line_columns(line),
        tax_category=tax_category,
        unit=due.unit,
        contract=key.contract,
        plan=due.plan,
        plan_version=due.plan_version,
        price_version=key.price_version,
        meter=due.meter,
        cell=key.cell,
        line_id=due.line_id,
        adjusts_id=one.taken_back[0].document_line_id if one.taken_back else None,
        detail={**due.detail, **reckoned_detail(line, currency)},
    )


def reversal_row(line: Line, booked: Booked, currency: str, *, kind: LineKind, **detail: Any) -> NewLine:
    """The row of a line that takes a booked one back; ``detail``: what it says besides that one's."""
    key = booked.key
    return NewLine(
        kind=kind,
        account=key.account,
        charge=key.charge,
        service=booked.service,
        segment_start_us=key.segment_start_us,
        quantity=-booked.quantity,
        **line_columns(line),
        tax_category=booked.tax_category,
        unit=booked.unit,
        contract=key.contract,
        plan=booked.plan,
        plan_version=booked.plan_version,
        price_version=key.price_version,
        meter=booked.meter,
        cell=key.cell,
        line_id=booked.line_id,
        adjusts_id=booked.document_line_id,
        role="reversal",
        detail={**booked.detail, **reckoned_detail(line, currency), **detail},
    )


def reckoned_detail(line: Line, currency: str) -> dict[str, Any]:
    """What a line's detail keeps of its taxes and discounts, for documents that take it back or restate it."""
    taxes = line_taxes.as_json(line.taxes, currency)
    if not line.discounts:
        return {"taxes": taxes}
    return {"taxes": taxes, "discounts": line_discounts.as_json(line.discounts, currency)}


def compose(
    reckoned: Reckoned,
    basis: Basis,
    *,
    kind: DocumentKind,
    payer: str,
    period: Period,
    actor: str,
    run_id: int | None = None,
    content: Mapping[str, Any] | None = None,
) -> NewDocument:
    """The rows of a reckoned document, with what is printed beside the numbers."""
    document = reckoned.document
    return NewDocument(
        kind=kind,
        legal_entity=basis.entity.id,
        account=payer,
        currency=document.currency,
        period=period,
        tax_date=basis.tax_date,
        **totals_columns(document.totals),
        lines=reckoned.lines,
        taxes=tax_rows(document),
        discounts=discount_rows(document),
        created_by=actor,
        run_id=run_id,
        content={**content_of(basis), **_credits_of(reckoned.document, basis), **(content or {})},
    )


def _credits_of(document: Document, basis: Basis) -> dict[str, Any]:
    """What accounts' own credits pay of the total, by account; nothing where they pay nothing."""
    account_of = {one.id: one.account for one in basis.grants if one.account and one.reduces == "total"}
    paid: defaultdict[str, Minor] = defaultdict(int)
    for drawn in document.draws:
        if drawn.grant in account_of:
            paid[account_of[drawn.grant]] += drawn.amount
    credits = {account: str(minor_decimal(amount, document.currency)) for account, amount in sorted(paid.items())}
    return {"credits": credits} if credits else {}


def content_of(basis: Basis) -> dict[str, Any]:
    """Who sells and buys, and on which terms, as JSON: what a document shows for good, whatever changes later."""
    entity, customer = basis.entity, basis.customer
    return {
        **_seller(_Same(entity)),
        "buyer": {
            "name": customer.name,
            "address": _address(customer.address),
            "email": customer.email,
            "vat_number": customer.vat_number,
            "purchase_order": customer.purchase_order,
            "account": customer.account,
            "version": customer.version,
            # Its periods are days of this zone, not of the seller's.
            "time_zone": customer.billing_time_zone,
        },
        "language": customer.language or entity.language,
    }


class _Same:
    """An entity by its id and version, which name its content: for the cache, since it holds a mapping."""

    __slots__ = ("entity",)

    def __init__(self, entity: LegalEntity) -> None:
        self.entity = entity

    def __hash__(self) -> int:
        return hash((self.entity.id, self.entity.version))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.entity == other.entity


@lru_cache(maxsize=64)
def _seller(same: _Same) -> dict[str, Any]:
    entity = same.entity
    return {
        "seller": {
            "id": entity.id,
            "version": entity.version,
            "name": entity.name,
            "address": _address(entity.address),
            "vat_number": entity.vat_number,
            "registration": entity.registration,
            "email": entity.email,
            "phone": entity.phone,
            "website": entity.website,
            "bank": entity.bank,
            "iban": entity.iban,
            "bic": entity.bic,
            "time_zone": entity.time_zone,
            "branding": {
                "logo": entity.branding.logo,
                "primary": entity.branding.primary,
                "accent": entity.branding.accent,
            },
        },
        "terms": entity.terms,
        "payment_days": entity.payment_days,
        "policies": {
            "tax_rounding": entity.policy.tax_rounding,
            "coupons": entity.policy.coupons,
            "prices": entity.policy.prices,
        },
    }


def _address(address: Address) -> dict[str, Any]:
    return {
        "lines": list(address.lines),
        "postcode": address.postal_code,
        "city": address.city,
        "region": address.region,
        "country": address.country,
    }
