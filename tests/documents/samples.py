"""Documents to render: made of few numbers, the rest computed, so that every column adds up as the close makes it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from pipeline.core.money import minor_units
from pipeline.core.parties import Address, Branding
from pipeline.core.tax import REVERSE_CHARGE_NOTE
from pipeline.documents.model import (
    Bank,
    Discount,
    Document,
    DocumentReference,
    Exchange,
    Line,
    LineReference,
    Notice,
    Part,
    Party,
    Reference,
    Span,
    Tax,
    Totals,
    Usage,
)

OCTOBER = Span(date(2026, 10, 1), date(2026, 10, 31))
NOVEMBER = Span(date(2026, 11, 1), date(2026, 11, 30))

SELLER = Party(
    id="nordwind",
    name="Nordwind Cloud GmbH",
    address=Address(("Torstraße 49",), "Berlin", "DE", "10119"),
    vat_number="DE136695976",
    registration="HRB 215731 B, Amtsgericht Charlottenburg",
    email="billing@nordwind.example",
    website="nordwind.example",
)
BANK = Bank("DE89370400440532013000", "COBADEFFXXX", "Commerzbank")
BUYER = Party(
    id="acme",
    name="Acme Robotics SAS",
    address=Address(("18 rue de la Paix", "Bâtiment C"), "Paris", "FR", "75002"),
    vat_number="FR40303265045",
    email="compta@acme-robotics.example",
)


def rounded(amount: Decimal, currency: str) -> Decimal:
    return amount.quantize(Decimal(1).scaleb(-minor_units(currency)), ROUND_HALF_UP)


def part(kind: str, over: str, up_to: str, price: str, **more: Any) -> Part:
    quantity = Decimal(up_to) - Decimal(over)
    flat = Decimal(more.pop("flat", "0"))
    packages = more.pop("packages", None)
    units = quantity if packages is None else Decimal(packages)
    amount = more.pop("amount", None)
    return Part(
        kind=kind,
        over=Decimal(over),
        up_to=Decimal(up_to),
        quantity=quantity,
        packages=packages,
        events=more.pop("events", None),
        unit_price=Decimal(price),
        flat=flat,
        amount=Decimal(price) * units + flat if amount is None else Decimal(amount),
    )


def usage_line(name: str, quantity: str, unit: str, parts: Sequence[Part], **more: Any) -> Line:
    exact = sum((one.amount for one in parts), Decimal(0))
    events = more.pop("events", 1200)
    references = more.pop("references", ())
    usage = Usage(
        events,
        more.pop("late", 0),
        datetime(2026, 10, 1, 0, 3, 11, tzinfo=UTC),
        datetime(2026, 10, 31, 21, 58, 2, tzinfo=UTC),
        references,
    )
    return _line(
        name, exact, kind="usage", quantity=Decimal(quantity), unit=unit, parts=tuple(parts), usage=usage, **more
    )


def fee_line(name: str, quantity: str, price: str, **more: Any) -> Line:
    return _line(name, Decimal(quantity) * Decimal(price), kind="fee", quantity=Decimal(quantity), unit="", **more)


def _line(name: str, exact: Decimal, **more: Any) -> Line:
    zero = Decimal(0)
    standard = {
        "id": 0, "position": 0, "span": OCTOBER, "amount": zero, "discount": zero, "net": zero, "tax": zero,
        "total": zero, "taxes": (), "account": "acme", "charge": name.lower().replace(" ", "-"), "plan": "pro",
    }  # fmt: skip
    return Line(name=name, exact=exact, **(standard | more))


def document(
    lines: Sequence[Line],
    *,
    currency: str = "EUR",
    percent: str | None = "19",
    treatment: str = "standard",
    tax_note: str = "",
    coupon: tuple[str, str] | None = None,
    credits: str = "0",
    sign: int = 1,
    exchange: tuple[str, str] | None = None,
    buyer: Party = BUYER,
    **more: Any,
) -> Document:
    """A document of these lines: numbered, each rounded once, taxed at one rate, with a coupon in per cent on each."""
    rate = Decimal(percent or 0)
    made, discounts = [], []
    for position, line in enumerate(lines, 1):
        amount = rounded(line.exact * sign, currency)
        off = rounded(amount * Decimal(coupon[1]) / 100, currency) if coupon else Decimal(0)
        net = amount - off
        tax = rounded(net * rate / 100, currency)
        if line.account == "acme":
            line = replace(line, account=buyer.id)
        made.append(
            replace(
                line,
                id=1000 + position,
                position=position,
                exact=line.exact * sign,
                quantity=line.quantity * sign,
                parts=tuple(replace(p, quantity=p.quantity, amount=p.amount * sign) for p in line.parts),
                amount=amount,
                discount=off,
                net=net,
                tax=tax,
                total=net + tax,
                taxes=(Tax("VAT", treatment, rate, net, tax),),  # type: ignore[arg-type]
            )
        )
    total_of = lambda name: sum((getattr(line, name) for line in made), Decimal(0))  # noqa: E731
    if coupon and total_of("discount"):
        discounts.append(Discount(f"{coupon[0]} {coupon[1]} %", total_of("discount")))
    totals = Totals(
        lines=total_of("amount"),
        discounts=total_of("discount"),
        net=total_of("net"),
        tax=total_of("tax"),
        total=total_of("total"),
        credits=Decimal(credits),
        balance=Decimal(0),
        payable=total_of("total") - Decimal(credits),
    )
    standard = {
        "id": 17, "kind": "invoice", "state": "issued", "number": "2026-000017", "issue_date": date(2026, 11, 2),
        "tax_date": date(2026, 10, 31), "due_date": date(2026, 12, 2), "span": OCTOBER, "language": "en-GB",
        "seller": SELLER, "buyer": buyer, "time_zone": "Europe/Berlin", "bank": BANK,
        "branding": Branding(primary="#12263f", accent="#1f6feb"),
        "exchange": _exchange(totals, *exchange) if exchange else None,
    }  # fmt: skip
    return Document(
        currency=currency,
        lines=tuple(made),
        taxes=(Tax("VAT", treatment, rate, totals.net, totals.tax, tax_note),),  # type: ignore[arg-type]
        totals=totals,
        discounts=tuple(discounts),
        **(standard | more),
    )


def _exchange(totals: Totals, currency: str, rate: str) -> Exchange:
    net, tax = (rounded(amount * Decimal(rate), currency) for amount in (totals.net, totals.tax))
    return Exchange(currency, Decimal(rate), date(2026, 10, 30), "ECB", net, tax, net + tax)


def lines() -> list[Line]:
    """Every shape of line: graduated tiers, one price, packages, cells, a fee, a prorated one, a minimum."""
    return [
        fee_line("Pro plan", "1", "249.00", description="Base fee, in advance", span=NOVEMBER),
        fee_line("Seats", "12", "7.75", share=(15, 30, "day"), span=Span(date(2026, 10, 17), date(2026, 10, 31)),
                 parts=(part("fee", "0", "12", "15.50", amount="93.00"),)),
        usage_line(
            "Tokens",
            "3600000",
            "token",
            [
                part("included", "0", "500000", "0"),
                part("usage", "500000", "1000000", "0.000012"),
                part("usage", "1000000", "3600000", "0.0000085", flat="2.50"),
            ],
            cell=(("model", "large"), ("region", "eu")),
            references=(Reference("project", ("atlas", "borealis", "cumulus", "delta"), more=True),),
            events=48213,
            late=12,
        ),
        usage_line("Storage", "812.4375", "GB", [part("usage", "0", "812.4375", "0.023")], events=744),
        usage_line("API calls", "25400", "call", [part("usage", "0", "25400", "2", packages=26)], events=25400),
        usage_line(
            "Payments",
            "184230.55",
            "EUR",
            [part("events", "0", "184230.55", "0.012", flat="0.25", events=312, amount="2288.7666")],
            events=312,
            references=(Reference("order_id", ("PO-88121", "PO-88122", "PO-88140")),),
        ),
    ]  # fmt: skip


NOTICES = (
    Notice("price_changed", "Tokens", date(2026, 10, 1), Decimal("0.000014"), Decimal("0.000012"), "token"),
    Notice("meter_changed", "API calls", date(2026, 10, 15), text="Calls that fail with a server error do not count."),
)
TERMS = "Payable without deduction within 30 days. The general terms of 1 January 2026 apply."


def domestic() -> Document:
    buyer = replace(
        BUYER,
        id="muster",
        name="Muster Maschinenbau GmbH & Co. KG",
        address=Address(("Industriestraße 12",), "München", "DE", "80339"),
        vat_number="DE811128135",
    )
    return document(
        lines(), buyer=buyer, language="de", terms="Zahlbar ohne Abzug innerhalb von 30 Tagen.", notices=NOTICES,
        purchase_order="4500128834", coupon=("Starterrabatt", "10"), credits="100.00",
    )  # fmt: skip


def cross_border() -> Document:
    return document(
        lines(), percent=None, treatment="reverse_charge", tax_note=REVERSE_CHARGE_NOTE, terms=TERMS, notices=NOTICES,
        exchange=("USD", "1.0823"),
    )  # fmt: skip


def french_credit_note() -> Document:
    return document(
        lines()[2:4], kind="credit_note", number="AV-2026-000003", language="fr", sign=-1, percent="20", due_date=None,
        corrects=DocumentReference("2026-000017", "invoice", date(2026, 11, 2)), reason="service_failure",
        tax_date=date(2026, 11, 2),
    )  # fmt: skip


def yen() -> Document:
    buyer = Party(
        "tokyo", "Hoshi Analytics K.K.", Address(("1-9-1 Marunouchi",), "Chiyoda-ku", "JP", "100-0005", "Tokyo")
    )
    return document(
        lines()[2:5],
        state="draft",
        number="",
        issue_date=None,
        currency="JPY",
        percent="10",
        buyer=buyer,
        language="en-GB",
    )


def long() -> Document:
    """Three pages of lines of two children, some with names that do not fit, and corrections of an earlier invoice."""
    made = []
    for number in range(44):
        account = "acme-eu" if number < 22 else "acme-us"
        name = f"Compute, node pool {number + 1}"
        if number % 9 == 4:
            name += " with a reserved capacity agreement for the Frankfurt and Dublin regions, second amendment"
        made.append(
            usage_line(
                name, f"{1234567 * (number + 1) % 91237}.25", "GB-second",
                [part("usage", "0", f"{1234567 * (number + 1) % 91237}.25", "0.0000166667")],
                account=account, cell=(("pool", f"p-{number + 1:03}"),), events=977 * (number + 3) % 5000 + 1,
            )
        )  # fmt: skip
    old = lines()[3]
    made += [
        replace(old, exact=-old.exact, quantity=-old.quantity, parts=(), reversal=True, kind="adjustment",
                adjusts=LineReference("2026-000009", 4), span=Span(date(2026, 9, 1), date(2026, 9, 30)), usage=None),
        replace(old, exact=old.exact + 3, quantity=old.quantity + 3, parts=(), kind="adjustment",
                adjusts=LineReference("2026-000009", 4), span=Span(date(2026, 9, 1), date(2026, 9, 30)), usage=None),
    ]  # fmt: skip
    return document(
        made, accounts=(("acme-eu", "Acme Robotics Europe"), ("acme-us", "Acme Robotics USA")), percent="19",
        buyer=replace(BUYER, name="Acme Robotics Holding and International Services Société par actions simplifiée"),
    )  # fmt: skip
