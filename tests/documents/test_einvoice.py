"""The e-invoice holds the norm's rules and says what the document says; what cannot be said is refused."""

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Any

import facturx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from pipeline.core.parties import Policy
from pipeline.documents.einvoice import NotRepresentable, cii_xml
from pipeline.documents.model import Document, DocumentReference, Line, Tax
from tests.documents import samples
from tests.documents.samples import document, fee_line, part, usage_line
from tests.documents.schematron import broken_rules

RAM = "{urn:un:unece:uncefact:data:standard:ReusableAggregateBusinessInformationEntity:100}"


def texts(xml: bytes, *path: str) -> list[str]:
    """The texts at a path of names, each anywhere below the one before."""
    found = [etree.fromstring(xml)]
    for name in path:
        found = [one for parent in found for one in parent.iter(f"{RAM}{name}")]
    return [" ".join("".join(one.itertext()).split()) for one in found]


def consumer() -> Document:
    """Outside the scope of VAT: no VAT number may stand in it."""
    buyer = replace(samples.BUYER, vat_number="", address=replace(samples.BUYER.address, country="US", region="TX"))
    note = "Outside the scope of VAT in DE: supplied in US"
    return document(samples.lines(), percent=None, treatment="outside_scope", tax_note=note, buyer=buyer)


def exempt() -> Document:
    return document(samples.lines(), percent=None, treatment="exempt", tax_note="Diplomatic mission (paper 12/2026)")


def zero() -> Document:
    return document(samples.lines(), percent="0")


def dollars() -> Document:
    return document(samples.lines(), currency="USD", exchange=("EUR", "0.92"), credits="17.01")


def issued_yen() -> Document:
    return replace(samples.yen(), state="issued", number="2026-000019", issue_date=date(2026, 11, 2))


def carried() -> Document:
    """A total below 0, carried on."""
    of = document([fee_line("Plan", "1", "10"), usage_line("Back", "-3", "call", [part("usage", "0", "3", "-9")])])
    return replace(of, totals=replace(of.totals, balance=of.totals.total, payable=Decimal(0)), due_date=None)


def nothing() -> Document:
    return document([fee_line("Trial", "1", "0")])


def inclusive() -> Document:
    """Lines whose amounts have the tax in them; what is net stands beside."""
    of = document(samples.lines(), percent="20", coupon=("Welcome", "10"))
    lines = tuple(replace(line, amount=line.total, discount=Decimal(0)) for line in of.lines)
    return replace(of, policy=Policy(prices="inclusive"), lines=lines, discounts=())


def credit_with_discount() -> Document:
    of = samples.document(
        samples.lines(), kind="credit_note", sign=-1, coupon=("Welcome", "10"), due_date=None,
        corrects=DocumentReference("2026-000017", "invoice", date(2026, 11, 2)),
    )  # fmt: skip
    return replace(of, discounts=())


@pytest.mark.parametrize(
    "sample",
    [
        samples.domestic, samples.cross_border, samples.french_credit_note, samples.long, consumer, exempt, zero,
        dollars, issued_yen, carried, nothing, inclusive, credit_with_discount,
    ],
    ids=lambda sample: sample.__name__,
)  # fmt: skip
def test_the_norm_finds_nothing_wrong(sample: Callable[[], Document]) -> None:
    of = sample()
    xml = cii_xml(of)
    assert broken_rules(xml) == []
    sign = -1 if of.is_credit else 1
    paid = Decimal(texts(xml, "DuePayableAmount")[0])
    assert (texts(xml, "TypeCode")[0], paid) == ("381" if of.is_credit else "380", of.totals.payable * sign)
    lines = [Decimal(text) for text in texts(xml, "SpecifiedTradeSettlementLineMonetarySummation", "LineTotalAmount")]
    assert lines == [line.net * sign for line in of.lines]


@pytest.mark.parametrize(
    ("was", "becomes", "rule"),
    [
        (b"<ram:GrandTotalAmount>2926.03", b"<ram:GrandTotalAmount>2926.04", "BR-CO-15"),
        (b"<ram:CategoryCode>S", b"<ram:CategoryCode>E", "BR-"),
        (b"<ram:TypeCode>380", b"<ram:TypeCode>999", "'ram:TypeCode' is not allowed"),
        (b"<ram:ID>2026-000017", b"<ram:ID>", "BR-02"),
    ],
)
def test_the_rules_do_find_what_is_wrong(was: bytes, becomes: bytes, rule: str) -> None:
    xml = cii_xml(samples.domestic())
    assert was in xml
    assert any(rule in text for text in broken_rules(xml.replace(was, becomes, 1)))


def test_what_the_schema_refuses_is_never_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = facturx.generate_cii_xml
    monkeypatch.setattr(
        facturx, "generate_cii_xml", lambda *terms, **more: made(*terms, **more).replace(b"BICID", b"BIC")
    )
    with pytest.raises(etree.DocumentInvalid, match="BIC"):
        cii_xml(samples.domestic())


def test_who_pays_whom_how_and_for_what() -> None:
    xml = cii_xml(replace(samples.domestic(), buyer_reference="04011000-12345-03"))
    assert texts(xml, "SellerTradeParty", "Name")[0] == "Nordwind Cloud GmbH"
    assert texts(xml, "SpecifiedTaxRegistration") == ["DE136695976", "DE811128135"]
    assert texts(xml, "BuyerReference") == ["04011000-12345-03"]
    assert texts(xml, "BuyerOrderReferencedDocument") == ["4500128834"]
    assert texts(xml, "SpecifiedTradeSettlementPaymentMeans", "TypeCode") == ["58"]
    assert texts(xml, "IBANID") == ["DE89370400440532013000"]
    assert texts(xml, "TotalPrepaidAmount") == ["100.00"]
    assert texts(xml, "SpecifiedTradeProduct", "Name")[2] == "Tokens"
    assert texts(xml, "ApplicableProductCharacteristic") == ["model large", "region eu"]
    assert texts(xml, "SpecifiedTradeAllowanceCharge", "Reason") == ["Starterrabatt 10 %"] * 6


def test_a_credit_note_names_what_it_corrects_and_asks_for_no_payment() -> None:
    xml = cii_xml(samples.french_credit_note())
    assert texts(xml, "InvoiceReferencedDocument", "IssuerAssignedID") == ["2026-000017"]
    assert texts(xml, "SpecifiedTradeSettlementPaymentMeans") == texts(xml, "DueDateDateTime") == []


def price_of(line: Line) -> tuple[str, str, list[str], str]:
    xml = cii_xml(document([line], percent="19"))
    return (
        texts(xml, "BilledQuantity")[0],
        texts(xml, "NetPriceProductTradePrice", "ChargeAmount")[0],
        texts(xml, "NetPriceProductTradePrice", "BasisQuantity"),
        texts(xml, "SpecifiedTradeSettlementLineMonetarySummation", "LineTotalAmount")[0],
    )


def test_quantity_times_price_is_the_amount_whatever_the_price_model() -> None:
    one_price = usage_line("Compute", "60000", "GB-second", [part("usage", "0", "60000", "0.0000166667")])
    assert price_of(one_price) == ("60000", "16.6667", ["1000000"], "1.00")
    tiered = samples.lines()[2]
    assert price_of(tiered) == ("3600000", "30.6", ["3600000"], "30.60")
    assert price_of(fee_line("Minimum", "0", "0")) == ("1", "0", [], "0.00")
    back = fee_line("Unused seats", "4", "-12.50")
    assert price_of(back) == ("-4", "50", ["4"], "-50.00")


def two_taxes() -> Document:
    of = samples.domestic()
    line = replace(of.lines[0], taxes=(*of.lines[0].taxes, Tax("City", "standard", *[Decimal(1)] * 3)))
    return replace(of, lines=(line, *of.lines[1:]))


@pytest.mark.parametrize(
    ("of", "why"),
    [
        (samples.yen, "is a draft: an invoice begins with its number"),
        (lambda: replace(samples.domestic(), lines=()), "2026-000017 has no line"),
        (two_taxes, "2026-000017: line 1 has 2 taxes, EN 16931 knows one"),
        (lambda: replace(samples.domestic(), currency="KWD"), "knows two decimals, KWD has more"),
        (lambda: replace(samples.domestic(), seller=replace(samples.SELLER, vat_number="")), "no VAT number"),
    ],
)
def test_what_it_cannot_say_is_refused(of: Callable[[], Document], why: str) -> None:
    with pytest.raises(NotRepresentable, match=why):
        cii_xml(of())


amounts = st.decimals(min_value="-9999.999999", max_value="99999.999999", places=6)
lines_of_any_kind = st.one_of(
    st.builds(lambda price: fee_line("Fee", "1", str(price)), amounts),
    st.builds(
        lambda quantity, price: usage_line("Use", quantity, "call", [part("usage", "0", quantity, price)]),
        st.integers(0, 10**12).map(str),
        st.decimals(min_value=0, max_value=1, places=9).map(str),
    ),
)


@settings(max_examples=25, deadline=None)
@given(
    lines=st.lists(lines_of_any_kind, min_size=1, max_size=6),
    percent=st.sampled_from(["0", "5.5", "19", "20"]),
    coupon=st.none() | st.integers(1, 100).map(lambda percent: ("Coupon", str(percent))),
    credit=st.booleans(),
)
def test_any_document_holds_the_norm(lines: list[Line], percent: str, coupon: Any, credit: bool) -> None:
    more: dict[str, Any] = {"kind": "credit_note", "sign": -1} if credit else {}
    of = document(lines, percent=percent, coupon=coupon, **more)
    xml = cii_xml(of)
    assert broken_rules(xml) == []
    assert xml == cii_xml(of)
