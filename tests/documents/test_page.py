"""What stands on the page, text by text."""

from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from pipeline.billing import credit_notes, voids
from pipeline.core.parties import Address, Policy
from pipeline.documents.brand import Brand
from pipeline.documents.language import language
from pipeline.documents.model import Discount, Document, Line, Notice, Span
from pipeline.documents.page import address_lines, page
from tests.documents import samples
from tests.documents.samples import document, fee_line, part, usage_line


def shown(of: Document) -> dict[str, Any]:
    return page(of, Brand(), language(of.language))


def totals_of(of: Document) -> dict[str, str]:
    return {row["label"]: row["amount"] for row in shown(of)["totals"]}


def line_of(line: Line, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = shown(document([line], **more))["groups"][0]["lines"][0]
    return found


def parts_of(line: Line, **more: Any) -> list[tuple[str, ...]]:
    return [tuple(one.values()) for one in line_of(line, **more)["parts"]]


def test_the_totals_lead_from_the_lines_to_what_is_due() -> None:
    of = document(
        [fee_line("Plan", "1", "100"), usage_line("Usage", "30", "unit", [part("usage", "0", "30", "1")])],
        percent="20",
        coupon=("Welcome", "10"),
        credits="40.40",
    )
    assert list(totals_of(of).items()) == [
        ("Subtotal", "€130.00"),
        ("Welcome 10 %", "−€13.00"),
        ("Total before tax", "€117.00"),
        ("VAT 20% on €117.00", "€23.40"),
        ("Total", "€140.40"),
        ("Paid with prepaid credits", "−€40.40"),
        ("Amount due", "€100.00"),
    ]
    assert shown(of)["headline"] == {"amount": "€100.00", "text": "due 2 December 2026"}


def test_what_an_account_pays_of_a_group_s_document_is_said() -> None:
    of = document([fee_line("Plan", "1", "100")], percent="0", credits="40.40")
    of = replace(of, accounts=(("north", "North Ltd"),), own_credits=(("north", Decimal("10.40")),))
    paid = [(label, amount) for label, amount in totals_of(of).items() if label.startswith("Paid")]
    assert paid == [("Paid with prepaid credits: North Ltd", "−€10.40"), ("Paid with prepaid credits", "−€30.00")]


def test_a_credit_note_says_what_it_gives_back() -> None:
    of = shown(samples.french_credit_note())
    assert of["title"] == "Avoir"
    assert of["headline"] == {"amount": "59,15\N{NO-BREAK SPACE}€", "text": "Montant crédité"}
    tokens = of["groups"][0]["lines"][0]
    assert (tokens["quantity"].replace("\N{NARROW NO-BREAK SPACE}", ""), tokens["amount"]) == ("3600000", "30,60")
    assert [one["amount"] for one in tokens["parts"]] == ["0,00", "6,00", "24,60"]
    assert dict(of["facts"])["Rectifie"].startswith("2026-000017 du")
    assert dict(of["facts"])["Motif"] == "Défaillance du service"
    assert of["payment"] is None
    assert "−" not in str(of)


def test_a_credit_note_s_discounts_are_taken_off_without_their_names() -> None:
    of = document([fee_line("Plan", "1", "100")], kind="credit_note", sign=-1, coupon=("Welcome", "10"))
    assert totals_of(replace(of, discounts=()))["Discount"] == "−€10.00"


def test_one_price_stands_on_the_line_and_tiers_below_it() -> None:
    plain = usage_line("Storage", "10", "GB", [part("usage", "0", "10", "0.025")])
    assert (line_of(plain)["price"], line_of(plain)["parts"]) == ("€0.025", [])
    tiered = samples.lines()[2]
    assert line_of(tiered)["price"] == ""
    assert parts_of(tiered) == [
        ("Included", "500,000", "free", "0.00"),
        ("500,000 to 1,000,000", "500,000", "€0.000012", "6.00"),
        ("1,000,000 to 3,600,000 + Flat fee €2.50", "2,600,000", "€0.0000085", "24.60"),
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part("usage", "0", "25400", "2", packages=26)], [("Packages", "26", "€2.00", "52.00")]),
        ([part("usage", "0", "0", "0", flat="5")], [("Flat fee", "", "", "5.00")]),
        ([part("usage", "0", "9", "1", flat="5")], [("All units + Flat fee €5.00", "9", "€1.00", "14.00")]),
        (
            [part("usage", "0", "9", "1"), part("minimum", "9", "9", "0", amount="1")],
            [("All units", "9", "€1.00", "9.00"), ("Up to the minimum", "", "", "1.00")],
        ),
        (
            [part("usage", "0", "9", "1"), part("maximum", "9", "9", "0", amount="-2.5")],
            [("All units", "9", "€1.00", "9.00"), ("Above the maximum", "", "", "−2.50")],
        ),
        (
            [part("pool", "0", "4", "0"), part("usage", "4", "9", "0.125")],
            [("From the shared pool", "4", "free", "0.000"), ("4 to 9", "5", "€0.125", "0.625")],
        ),
        (
            [part("events", "0", "900", "0.029", events=3, amount="27")],
            [("3 transactions", "900", "2.9%", "27.00")],
        ),
    ],
)
def test_parts_of_a_price(parts: list[Any], expected: list[tuple[str, ...]]) -> None:
    assert parts_of(usage_line("Usage", "9", "unit", parts)) == expected


def test_a_price_per_unit_of_money_is_a_percentage() -> None:
    assert line_of(usage_line("Fees", "900", "EUR", [part("usage", "0", "900", "0.029")]))["price"] == "2.9%"


def test_units_have_a_plural_in_english_where_they_are_words() -> None:
    units = [("token", "tokens"), ("GB-second", "GB-seconds"), ("GB", "GB"), ("kWh", "kWh"), ("news", "news")]
    for unit, plural in units:
        line = usage_line("Usage", "2", unit, [part("usage", "0", "2", "1")])
        assert line_of(line)["unit"] == plural
        assert line_of(line, language="de")["unit"] == unit


def test_a_consolidated_invoice_has_a_subtotal_per_account_and_corrections_last() -> None:
    groups = shown(samples.long())["groups"]
    assert [group["title"] for group in groups] == [
        "Acme Robotics Europe", "Acme Robotics USA", "Adjustments to earlier invoices",
    ]  # fmt: skip
    assert sum(Decimal(group["subtotal"][1]) for group in groups) == samples.long().totals.lines
    assert groups[2]["lines"][0]["notes"][1:] == ["Takes back line 4 of 2026-000009"]
    assert groups[2]["lines"][1]["notes"][1:] == ["Corrects line 4 of 2026-000009"]


def test_nothing_to_pay_and_a_balance_carried_on() -> None:
    paid = document([fee_line("Plan", "1", "100")], percent="0", credits="100")
    assert shown(paid)["headline"] == {"amount": "€0.00", "text": "Nothing to pay"}
    assert "Due" not in dict(shown(paid)["facts"])
    back = document([fee_line("Plan", "1", "-30")], percent="0")
    carried = replace(back, totals=replace(back.totals, balance=Decimal("-30"), payable=Decimal(0)))
    assert shown(carried)["headline"] == {"amount": "€30.00", "text": "Carried forward to your next invoice"}
    assert totals_of(carried)["Carried forward in your favour"] == "€30.00"


def test_coupons_after_tax_come_after_it() -> None:
    of = document([fee_line("Plan", "1", "100")], percent="20", credits="15")
    of = replace(of, policy=Policy(coupons="after_tax"), discounts=(Discount("Voucher", Decimal(10), after_tax=True),))
    assert list(totals_of(of).items())[2:] == [
        ("Total", "€120.00"),
        ("Voucher", "−€10.00"),
        ("Paid with prepaid credits", "−€5.00"),
        ("Amount due", "€105.00"),
    ]


def test_prices_with_tax_in_them_say_what_of_it_is_tax() -> None:
    of = document([fee_line("Plan", "1", "100")], percent="20")
    net = replace(of.totals, lines=Decimal(120))
    of = replace(of, policy=Policy(prices="inclusive"), totals=net)
    assert list(totals_of(of).items()) == [
        ("Subtotal, tax included", "€120.00"),
        ("Total, tax included", "€120.00"),
        ("incl. VAT 20% on €100.00", "€20.00"),
        ("Amount due", "€120.00"),
    ]
    assert shown(of)["columns"][-1] == "Amount incl. tax"


@pytest.mark.parametrize(
    ("address", "lines"),
    [
        (Address(("Torstraße 49",), "Berlin", "DE", "10119"), ["Torstraße 49", "10119 Berlin", "Deutschland"]),
        (
            Address(("1 Main St", "Suite 2"), "Austin", "US", "78701", "TX"),
            ["1 Main St", "Suite 2", "Austin, TX 78701"],
        ),
        (Address(("1 High St",), "London", "GB", "E1 6AN"), ["1 High St", "London", "E1 6AN"]),
        (Address((), "Tokio", "JP", "100-0005"), ["100-0005 Tokio", "Japan"]),
        (Address((), "", "", ""), []),
    ],
)
def test_addresses_are_written_as_in_their_country(address: Address, lines: list[str]) -> None:
    assert address_lines(address, language("de"))[: len(lines)] == lines


def test_notices_of_what_changed() -> None:
    notices = (
        *samples.NOTICES,
        Notice("price_changed", "Seats", date(2026, 11, 1)),
        Notice("plan_changed", "Team", date(2026, 10, 9)),
        Notice("text", text="We moved."),
    )
    assert shown(document(samples.lines(), notices=notices))["notices"]["texts"] == [
        "Tokens: from 1 October 2026 the price is €0.000012 per token, before €0.000014 per token",
        "API calls: counted in a new way from 15 October 2026. Calls that fail with a server error do not count.",
        "Seats: new prices from 1 November 2026",
        "New plan from 9 October 2026: Team",
        "We moved.",
    ]


def test_the_law_s_words_are_in_the_reader_s_language() -> None:
    assert shown(replace(samples.cross_border(), language="fr"))["tax_notes"] == [
        "Autoliquidation : TVA due par le preneur (articles 44 et 196 de la directive 2006/112/CE)."
    ]


def test_a_draft_asks_for_no_money() -> None:
    of = shown(samples.yen())
    assert (of["stamp"], of["number"], of["payment"]) == ("Draft, not an invoice", "", None)


def test_every_reason_has_words_and_an_unknown_one_no_underscores() -> None:
    for reason in (*credit_notes.REASONS, *voids.REASONS, "late_usage", "reissue", "threshold"):
        assert f"reason.{reason}" in language("de").texts
    assert dict(shown(replace(samples.cross_border(), reason="court_order"))["facts"])["Reason"] == "court order"


def test_a_void_document_is_due_at_no_time() -> None:
    of = shown(replace(samples.cross_border(), state="void"))
    assert (of["headline"]["text"], "Due" in dict(of["facts"])) == ("Void", False)


def test_the_annex_tells_the_rounding_of_each_line_and_holds_usage_only() -> None:
    rows = shown(samples.cross_border())["annex"]["rows"]
    assert [(row["position"], row["exact"], row["rounding"]) for row in rows] == [
        ("3", "30.60", "0.00"),
        ("4", "18.6860625", "0.0039375"),
        ("5", "52.00", "0.00"),
        ("6", "2,288.7666", "0.0034"),
    ]
    assert rows[0]["notes"] == ["12 of them arrived late", "project: atlas, borealis, cumulus, delta and more"]
    assert shown(document([fee_line("Plan", "1", "1")]))["annex"] is None
    assert page(samples.cross_border(), Brand(annex=False), language("en"))["annex"] is None


def test_a_line_of_another_period_says_which() -> None:
    line = fee_line("Plan", "1", "1", span=Span(date(2026, 11, 1), date(2026, 11, 30)))
    assert line_of(line)["notes"] == ["1–30 Nov 2026"]
