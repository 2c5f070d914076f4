"""Tax: which ones a sale bears on its tax date, and what they come to. Pure.

``treatment`` decides for services supplied electronically: domestic sales, sales within the EU to a business (reverse
charge) or a consumer, sales abroad. Rates are data, a dated table: none is ever assumed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from math import lcm
from typing import Literal, NamedTuple, TypeAlias

from pipeline.core.apportion import round_to, round_together
from pipeline.core.money import Minor, round_half_up_div
from pipeline.core.parties import Address, Customer, LegalEntity, Policy, TaxRounding

TreatmentKind: TypeAlias = Literal["standard", "reverse_charge", "exempt", "outside_scope"]

_EU = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
#: Member states of the EU since 2021, ISO 3166-1 alpha-2.
EU = frozenset(_EU.split())
#: Prefixes of VAT numbers that are not the country's code (Directive 2006/112/EC, Article 215).
_COUNTRY_OF_PREFIX: Mapping[str, str] = {"EL": "GR"}

REVERSE_CHARGE_NOTE = "Reverse charge: the customer is liable for the tax (Directive 2006/112/EC, Articles 44 and 196)"


class NoTaxRate(ValueError):
    """The table has no rate for a place and category on a day: a document must not guess one."""


@dataclass(frozen=True, slots=True)
class TaxRate:
    """A rate of a country's, or region's, tax for a category of sales, from a day until a later row's or its end."""

    #: "VAT", "GST", "PST": taxes of different names are charged beside each other, none on top of another.
    tax: str
    #: ISO 3166-1 alpha-2.
    country: str
    #: As charges and customers name it: "standard", "reduced".
    category: str
    percent: Decimal
    valid_from: date
    #: First day it is not charged any more; None: until a later row of the same tax, place and category.
    valid_until: date | None = None
    #: As ``Address.region``; "": the whole country.
    region: str = ""


class Tax(NamedTuple):
    """One tax at one rate: what the tax table of a document is grouped by. Percent is 0 unless it is standard."""

    tax: str
    treatment: TreatmentKind
    #: Whose tax it is.
    country: str
    percent: Decimal
    #: Why it is not charged, where it is not: the law wants it said on the document.
    note: str = ""


#: The taxes of a sale, beside each other. Never empty: a sale without tax has one of percent 0 that says why.
Treatment: TypeAlias = tuple[Tax, ...]


class LineTax(NamedTuple):
    """What one tax of one line comes to, in the currency's smallest unit."""

    tax: Tax
    base: Minor
    amount: Minor


# -- which taxes


def treatment(
    entity: LegalEntity, customer: Customer, category: str, tax_date: date, table: Iterable[TaxRate]
) -> Treatment:
    """The taxes of a sale on a day, decided in this order:

    1. The customer is exempt on that day: no tax, with the reason and its certificate.
    2. Seller and customer are in the same country: its rates.
    3. Both in the EU, and the customer has a VAT number of another member state: reverse charge.
    4. Both in the EU, the customer a consumer: the rates of the customer's country where the seller is registered
       there or has the one-stop shop, else those of the seller's.
    5. The seller is registered in the customer's country: its rates.
    6. Otherwise outside the scope of the seller's tax.

    The form of a VAT number is checked where customers are read in. Raises NoTaxRate.
    """
    home, place = entity.address, customer.address
    rows = list(table)
    if customer.exemption is not None and customer.exemption.valid_on(tax_date):
        paper = f" ({customer.exemption.certificate})" if customer.exemption.certificate else ""
        return (Tax(_tax_of(place, rows), "exempt", place.country, Decimal(0), customer.exemption.reason + paper),)
    if home.country == place.country:
        return _charged(place, category, tax_date, rows)
    if home.country in EU and place.country in EU:
        vat_country = _vat_country(customer.vat_number)
        if vat_country in EU and vat_country != home.country:
            tax = _tax_of(home, rows)
            return (Tax(tax, "reverse_charge", place.country, Decimal(0), REVERSE_CHARGE_NOTE),)
        # With a number of the seller's own country the customer buys through an establishment there.
        registered = entity.one_stop_shop or place.country in entity.registered_in
        abroad = registered and vat_country != home.country
        return _charged(place if abroad else home, category, tax_date, rows)
    if place.country in entity.registered_in:
        return _charged(place, category, tax_date, rows)
    tax = _tax_of(home, rows)
    note = f"Outside the scope of {tax} in {home.country}: supplied in {place.country}"
    return (Tax(tax, "outside_scope", home.country, Decimal(0), note),)


def _vat_country(vat_number: str | None) -> str | None:
    if vat_number is None:
        return None
    return _COUNTRY_OF_PREFIX.get(vat_number[:2], vat_number[:2])


def _charged(place: Address, category: str, day: date, table: Iterable[TaxRate]) -> Treatment:
    valid: dict[tuple[str, str], TaxRate] = {}
    for row in table:
        here = row.country == place.country and row.region in ("", place.region)
        if here and row.category == category and row.valid_from <= day:
            key = (row.region, row.tax)
            if key not in valid or valid[key].valid_from < row.valid_from:
                valid[key] = row
    rates = [row for _, row in sorted(valid.items()) if row.valid_until is None or day < row.valid_until]
    if not rates:
        where = f"{place.country}-{place.region}" if place.region else place.country
        raise NoTaxRate(
            f"expected a tax rate of {where} for category {category} on {day}, got none: add it to the taxes"
        )
    return tuple(Tax(row.tax, "standard", row.country, row.percent) for row in rates)


def _tax_of(place: Address, table: Iterable[TaxRate]) -> str:
    """What a country calls its tax; one it charges in all of it before one of its regions."""
    return min(((row.region, row.tax) for row in table if row.country == place.country), default=("", "VAT"))[1]


# -- what they come to


class _Part(NamedTuple):
    """What a tax of a line comes to, exact: ``numerator`` over a denominator that all parts have in common."""

    line: int
    tax: Tax
    numerator: int


def compute(amounts: Sequence[Minor], treatments: Sequence[Treatment], policy: Policy) -> list[tuple[LineTax, ...]]:
    """The taxes of each line, from its amount after discounts, which has the taxes in it where prices are inclusive.

    Rounded half up, once for each line and tax, each tax, or all of the document, as the policy says; what is rounded
    together is parted by largest remainder, over taxes first, then over lines. Ties go to the first line. A line's
    base is its amount, less its taxes where they were in it.
    """
    inclusive = policy.prices == "inclusive"
    ratios = {found: _ratios(found, inclusive) for found in dict.fromkeys(treatments)}
    common = lcm(*(denominator for _, denominator in ratios.values()))
    parts = [
        _Part(line, tax, amount * numerator * (common // denominator))
        for line, (amount, found) in enumerate(zip(amounts, treatments, strict=True))
        for numerators, denominator in (ratios[found],)
        for tax, numerator in zip(found, numerators, strict=True)
    ]
    due: list[list[tuple[Tax, Minor]]] = [[] for _ in amounts]
    for part, tax_amount in zip(parts, _rounded(parts, common, policy.tax_rounding), strict=True):
        due[part.line].append((part.tax, tax_amount))
    taxes = []
    for amount, of_line in zip(amounts, due, strict=True):
        base = amount - sum(tax_amount for _, tax_amount in of_line) if inclusive else amount
        taxes.append(tuple(LineTax(tax, base, tax_amount) for tax, tax_amount in of_line))
    return taxes


def _ratios(found: Treatment, inclusive: bool) -> tuple[list[int], int]:
    """Each tax as a part of the line's amount: numerators over a denominator."""
    ratios = [tax.percent.as_integer_ratio() for tax in found]
    common = lcm(*(denominator for _, denominator in ratios))
    numerators = [numerator * (common // denominator) for numerator, denominator in ratios]
    return numerators, 100 * common + (sum(numerators) if inclusive else 0)


def _rounded(parts: Sequence[_Part], common: int, rounding: TaxRounding) -> list[Minor]:
    numerators = [part.numerator for part in parts]
    if rounding == "line":
        return [round_half_up_div(numerator, common) for numerator in numerators]
    groups: dict[Tax, list[int]] = {}
    for number, part in enumerate(parts):
        groups.setdefault(part.tax, []).append(number)
    taxes = sorted(groups)  # not in the order of lines, which is not to decide which tax a tie goes to
    sums = [sum(numerators[number] for number in groups[tax]) for tax in taxes]
    wholes = (
        round_together(sums, common) if rounding == "invoice" else [round_half_up_div(exact, common) for exact in sums]
    )
    rounded = [0] * len(parts)
    for tax, whole in zip(taxes, wholes, strict=True):
        of_lines = round_to(whole, [numerators[number] for number in groups[tax]], common)
        for number, amount in zip(groups[tax], of_lines, strict=True):
            rounded[number] = amount
    return rounded
