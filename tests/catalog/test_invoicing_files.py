"""Invoicing files: what they mean, and every mistake with its line."""

import hashlib
from datetime import date
from decimal import Decimal
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import BaseModel

from pipeline.catalog import invoicing_models as models
from pipeline.catalog.invoicing_files import Drafts, read_invoicing_files
from pipeline.catalog.source import read
from pipeline.catalog.vat_numbers import checked
from pipeline.core.discounts import Coupon
from pipeline.core.invoicing_documents import TaxTable
from pipeline.core.parties import Address, Branding, Customer, CustomerCoupon, Exemption, LegalEntity, Policy
from pipeline.core.tax import TaxRate
from pipeline.infra.resources import demo_dir


def invoicing(folder: Path, text: str) -> Drafts:
    file = folder / "invoicing.yaml"
    file.write_text(dedent(text))
    return read_invoicing_files([file])


def findings(drafts: Drafts) -> list[str]:
    """The findings as a person sees them, with the file's bare name."""
    return [str(finding).replace(finding.file, Path(finding.file).name) for finding in drafts.findings]


def test_a_file_with_everything(tmp_path: Path) -> None:
    logo = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
    (tmp_path / "logo.svg").write_bytes(logo)
    drafts = invoicing(
        tmp_path,
        """\
        legal_entities:
          - id: gmbh
            name: Tally GmbH
            address: {lines: [Weg 1, Hof], postal_code: "01067", city: Dresden, country: DE}
            vat_number: DE 123-456-788
            tax_rounding: line
            coupons: after_tax
            prices: inclusive
            numbers: {invoice: "R{year}-{serial:04}", credit_note: "G{year}-{serial}"}
            registered_in: [FR]
            iban: DE89 3704 0044 0532 0130 00
            branding: {logo: logo.svg, primary: "#001122"}
            valid_from: 2026-01-01
        customers:
          - account: acme
            name: Acme
            address: {lines: Rue 1, city: Paris, country: FR}
            exemption: {reason: Embassy, valid_until: 2027-01-01}
            threshold: 500.25
            tax_categories: {books: reduced}
            coupons: [{coupon: off, start: 2026-01-01, end: 2026-07-01}]
        taxes:
          - tax: VAT
            country: DE
            rates: [{percent: 19, valid_from: 2021-01-01}, {category: reduced, percent: 7, valid_from: 2021-01-01}]
          - {tax: QST, country: CA, region: QC, rates: [{percent: 9.975, valid_from: 2013-01-01}]}
        coupons:
          - {id: off, name: Ten off, percent: 10, uses: 3, charges: [a, b]}
          - {id: five, name: Five, level: line, amount: 5.50, currency: EUR}
        """,
    )
    assert findings(drafts) == []
    digest = hashlib.sha256(logo).hexdigest()
    assert {(a.sha256, a.media_type, a.content) for a in drafts.assets.values()} == {(digest, "image/svg+xml", logo)}
    entity = LegalEntity(
        "gmbh",
        0,
        "Tally GmbH",
        Address(("Weg 1", "Hof"), "Dresden", "DE", "01067"),
        "DE123456788",
        policy=Policy("line", "after_tax", "inclusive"),
        number_patterns={"invoice": "R{year}-{serial:04}", "credit_note": "G{year}-{serial}"},
        registered_in=frozenset({"FR"}),
        iban="DE89370400440532013000",
        branding=Branding(digest, "#001122"),
    )
    customer = Customer(
        "acme",
        0,
        "Acme",
        Address(("Rue 1",), "Paris", "FR"),
        exemption=Exemption("Embassy", valid_until=date(2027, 1, 1)),
        threshold=500_250_000_000_000,
        tax_categories={"books": "reduced"},
        coupons=(CustomerCoupon("off", date(2026, 1, 1), date(2026, 7, 1)),),
    )
    vat = (
        TaxRate("VAT", "DE", "standard", Decimal(19), date(2021, 1, 1)),
        TaxRate("VAT", "DE", "reduced", Decimal(7), date(2021, 1, 1)),
    )
    qst = TaxRate("QST", "CA", "standard", Decimal("9.975"), date(2013, 1, 1), region="QC")
    assert [(draft.item, draft.valid_from) for draft in drafts.items] == [
        (entity, date(2026, 1, 1)),
        (customer, None),
        (Coupon("off", 0, "Ten off", percent=Decimal(10), uses=3, charges=frozenset({"a", "b"})), None),
        (Coupon("five", 0, "Five", "line", amount=5_500_000_000_000, currency="EUR"), None),
        (TaxTable("DE/VAT", 0, vat), None),
        (TaxTable("CA-QC/QST", 0, (qst,)), None),
    ]


ENTITY = "{id: e, name: E, address: {lines: [a], city: B, country: DE}"
CUSTOMER = "{account: a, name: A, address: {lines: [a], city: B, country: DE}"
MISTAKES = {
    "nothing we know": (
        "legal_entity: []",
        [
            "1: expected legal_entities, customers, taxes or coupons, got none of them",
            "1: legal_entity: unknown key 'legal_entity': did you mean 'legal_entities'?",
        ],
    ),
    "a misspelt key": (
        "legal_entities: [{id: e, name: E, adress: {}}]",
        [
            "1: legal_entities[e].address: expected a value, got nothing",
            "1: legal_entities[e].adress: unknown key 'adress': did you mean 'address'?",
        ],
    ),
    "a country": (
        "customers: [{account: a, name: A, address: {lines: [a], city: B, country: UK}}]",
        ["1: customers[#1].address.country: expected a country code of ISO 3166 such as DE, got 'UK'"],
    ),
    "too many lines": (
        "customers: [{account: a, name: A, address: {lines: [a, b, c, d, e], city: B, country: DE}}]",
        ["1: customers[#1].address.lines: expected at most 4 lines, got '5 lines'"],
    ),
    "a VAT number with a digit wrong": (
        f"customers: [{CUSTOMER}, vat_number: DE123456789}}]",
        [
            "1: customers[#1].vat_number: expected a VAT number with the right check digits: one of them was mistyped, "
            "got 'DE123456789'"
        ],
    ),
    "a VAT number of another country": (
        f"legal_entities: [{ENTITY}, vat_number: ATU12345675}}]",
        [
            "1: legal_entities[e].vat_number: expected a VAT number that begins with DE, as the address is in DE, "
            "got 'ATU12345675'"
        ],
    ),
    "an IBAN, a BIC, an address, a language": (
        f"legal_entities: [{ENTITY}, iban: DE00, bic: X, email: me, language: klingon}}]",
        [
            "1: legal_entities[e].bic: expected a BIC of 8 or 11 letters and digits, got 'X'",
            "1: legal_entities[e].email: expected an e-mail address such as billing@example.com, got 'me'",
            "1: legal_entities[e].iban: expected an IBAN with the right check digits, got 'DE00'",
            "1: legal_entities[e].language: expected a language such as en or de-AT, got 'klingon'",
        ],
    ),
    "numbers without a serial": (
        f"legal_entities: [{ENTITY}, numbers: 'R{{year}}'}}]",
        [
            "1: legal_entities[e].numbers: expected a number with {year} once and {serial}, or {serial:06} for six "
            "digits, once, got 'R{year}'"
        ],
    ),
    "numbers that reach into Python": (
        f"legal_entities: [{ENTITY}, numbers: '{{year}}{{serial.__class__}}'}}]",
        [
            "1: legal_entities[e].numbers: expected a number with {year} once and {serial}, or {serial:06} for six "
            "digits, once, got '{year}{serial.__class__}'"
        ],
    ),
    "numbers that may meet": (
        f"legal_entities: [{ENTITY}, numbers: {{invoice: '{{year}}{{serial}}', "
        "credit_note: '{year}{serial:02}'}}]",
        [
            "1: legal_entities[e].numbers: expected patterns that never make the same number, got {year}{serial} and "
            "{year}{serial:02}"
        ],
    ),
    "numbers of a kind there is not": (
        f"legal_entities: [{ENTITY}, numbers: {{bill: '{{year}}{{serial}}'}}}}]",
        ["1: legal_entities[e].numbers: expected invoice, credit_note, adjustment or progress, got 'bill'"],
    ),
    "a logo that is not there": (
        f"legal_entities: [{ENTITY}, branding: {{logo: none.png}}}}]",
        ["1: legal_entities[e].branding.logo: expected a file that can be read, got"],
    ),
    "a logo that is no image": (
        f"legal_entities: [{ENTITY}, branding: {{logo: invoicing.yaml}}}}]",
        [
            "1: legal_entities[e].branding.logo: expected an image, SVG, PNG or JPEG, got another kind of file",
        ],
    ),
    "twice the same": (
        f"customers:\n- {CUSTOMER}}}\n- {CUSTOMER}}}",
        ["3: customers[#2].account: expected each account once, got 'a' again after invoicing.yaml:2"],
    ),
    "coupons that end before they start": (
        f"customers: [{CUSTOMER}, coupons: [{{coupon: c, start: 2026-02-01, end: 2026-02-01}}]}}]",
        [
            "1: customers[#1].coupons[#1].end: expected a day after 2026-02-01, the first, got 2026-02-01: the end is "
            "the first day without"
        ],
    ),
    "a tax without rates": (
        "taxes: [{tax: VAT, country: DE}]",
        ["1: taxes[#1].rates: expected at least one rate, got nothing"],
    ),
    "rates of one day, a rate above all": (
        "taxes: [{tax: VAT, country: DE, rates: [{percent: 101, valid_from: 2021-01-01}, "
        "{percent: 19, valid_from: 2021-01-01}]}]",
        [
            "1: taxes[#1].rates[#1].percent: expected at most 100, got '101'",
            "1: taxes[#1].rates[#2].valid_from: expected one rate of a category from a day on, got 2021-01-01 again "
            "after invoicing.yaml:1",
        ],
    ),
    "the same tax twice": (
        "taxes:\n- {tax: VAT, country: DE, rates: [{percent: 1, valid_from: 2021-01-01}]}\n"
        "- {tax: VAT, country: DE, rates: [{percent: 2, valid_from: 2022-01-01}]}",
        ["3: taxes[#2].tax: expected each tax of a place once, got DE/VAT again after invoicing.yaml:2"],
    ),
    "a coupon of nothing": (
        "coupons: [{id: c, name: C}]",
        ["1: coupons[c].percent: expected percent or amount, got neither"],
    ),
    "a coupon of both, in half cents, for nobody": (
        "coupons: [{id: c, name: C, percent: 0, amount: 1.005, currency: EUR, uses: 0}]",
        [
            "1: coupons[c].amount: expected an amount above 0 with at most 2 decimals, got '1.005'",
            "1: coupons[c].percent: expected a number above 0 and at most 100, got '0'",
            "1: coupons[c].percent: expected percent or amount, got both",
            "1: coupons[c].uses: expected the billing periods it counts in, from 1, or nothing for all, got 0",
        ],
    ),
    "an amount of no currency": (
        "coupons: [{id: c, name: C, amount: 5}]",
        ["1: coupons[c].currency: expected a currency with an amount and none without"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = findings(invoicing(tmp_path, text))
    assert [
        one.replace(f"{tmp_path}/", "")[: len("invoicing.yaml:") + len(told)]
        for one, told in zip(found, expected, strict=True)
    ] == [f"invoicing.yaml:{told}" for told in expected]


def test_a_large_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2**20))
    found = findings(invoicing(tmp_path, f"legal_entities: [{ENTITY}, branding: {{logo: logo.png}}}}]"))
    assert found == [
        "invoicing.yaml:1: legal_entities[e].branding.logo: expected an image of at most 1,048,576 bytes, got 1,048,584"
    ]


def keys_of(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for part in value.values() for key in keys_of(part)}
    return {key for part in value for key in keys_of(part)} if isinstance(value, list) else set()


def test_the_demo_file_and_the_one_with_every_key() -> None:
    for name in ("invoicing.yaml", "all-invoicing.yaml"):
        assert read_invoicing_files([demo_dir() / name]).findings == []
    used = keys_of(read(demo_dir() / "all-invoicing.yaml").data)
    shapes = [one for one in vars(models).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    every = {name for shape in shapes for name in shape.model_fields}
    assert every - used == {"logo"}  # a file, which the example does without


@pytest.mark.parametrize(
    ("number", "country", "written"),
    [
        ("DE 123 456 788", "DE", "DE123456788"),
        ("el094259216", "GR", "EL094259216"),
        ("GB 980780684", "GB", "GB980780684"),
        ("XI 980780684", "GB", "XI980780684"),
        ("CHE-107.787.577 IVA", "CH", "CHE107787577IVA"),
        ("NO 995 525 828 MVA", "NO", "NO995525828MVA"),
        ("AU 83 914 571 673", "AU", "AU83914571673"),
        ("US 12-3456789", "US", "US123456789"),  # no VAT number, and nothing to check
    ],
)
def test_vat_numbers_are_written_one_way(number: str, country: str, written: str) -> None:
    assert checked(number, country) == written
    assert checked(written, country) == written


@pytest.mark.parametrize("number", ["", "DE", "123456788", "DE12345678", "DE123456788X", "DE１２３456788"])
def test_what_is_no_vat_number(number: str) -> None:
    with pytest.raises(ValueError, match="VAT number"):
        checked(number, "DE")
