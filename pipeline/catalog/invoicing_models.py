"""The shapes of invoicing files: which keys legal entities, customers, taxes and coupons have, what each field takes.

Checks that look at more than one field stand in ``invoicing_files``.
"""

import re
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any

from babel import Locale, UnknownLocaleError
from pydantic import BeforeValidator
from stdnum import bic, exceptions, iban

from pipeline.catalog.fields import (
    Amount,
    Count,
    Currency,
    Days,
    Flag,
    Id,
    Name,
    Rate,
    StrictModel,
    TimeZone,
    Words,
    choice,
    count,
    text,
    texts,
)
from pipeline.catalog.source import Data, expected, one_of
from pipeline.core.parties import COUPONS_APPLY, DOCUMENT_KINDS, PRICES, TAX_ROUNDINGS

_COUNTRY = re.compile(r"[A-Z]{2}")
#: What CLDR has beside the countries of ISO 3166-1: parts of them, unions, and codes for tests.
_NO_COUNTRY = frozenset({"AC", "CP", "CQ", "DG", "EA", "EU", "EZ", "IC", "QO", "TA", "UN", "XA", "XB", "ZZ"})
_COUNTRIES = frozenset(code for code in map(str, Locale("en").territories) if _COUNTRY.fullmatch(code)) - _NO_COUNTRY
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
#: Lines of an address beside city and country: more do not fit into an envelope's window.
_ADDRESS_LINES_MAX = 4
_TERMS_MAX = 4000
#: A close that waits longer meets the next one.
_GRACE_HOURS_MAX = 28 * 24
#: What is printed of a number: everything but braces, the year once and the serial once.
_NUMBER_PATTERN = re.compile(r"(?:[^{}]|\{year\}|\{serial(?::0[1-9])?\})+")


def _country(value: Data) -> str:
    if value not in _COUNTRIES:
        raise expected("a country code of ISO 3166 such as DE", value)
    return str(value)


def _language(value: Data) -> str:
    try:
        Locale.parse(value if isinstance(value, str) else "", sep="-")
    except (ValueError, UnknownLocaleError):
        raise expected("a language such as en or de-AT", value) from None
    return str(value)


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[Data], str]:
    def check(value: Data) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise expected(what, value)
        return value

    return check


def _address_lines(value: Data) -> tuple[str, ...]:
    lines = texts(value)
    if len(lines) > _ADDRESS_LINES_MAX:
        raise expected(f"at most {_ADDRESS_LINES_MAX} lines", f"{len(lines)} lines")
    return lines


def _iban(value: Data) -> str:
    try:
        return str(iban.validate(value if isinstance(value, str) else ""))
    except exceptions.ValidationError:
        raise expected("an IBAN with the right check digits", value) from None


def _bic(value: Data) -> str:
    try:
        return str(bic.validate(value if isinstance(value, str) else ""))
    except exceptions.ValidationError:
        raise expected("a BIC of 8 or 11 letters and digits", value) from None


def _countries(value: Data) -> frozenset[str]:
    return frozenset(map(_country, texts(value))) if value else frozenset()


def _day(value: Data) -> date:
    try:
        return date.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        raise expected("a day such as 2026-01-31", value) from None


def _number_pattern(value: Data) -> str:
    is_one = isinstance(value, str) and _NUMBER_PATTERN.fullmatch(value)
    if not is_one or value.count("{serial") != 1 or value.count("{year}") != 1:
        raise expected("a number with {year} once and {serial}, or {serial:06} for six digits, once", value)
    return str(value)


def _number_patterns(value: Data) -> dict[str, str]:
    """A pattern for each kind of document, or one for all."""
    if not isinstance(value, dict):
        return {"invoice": _number_pattern(value)}
    if unknown := [kind for kind in value if kind not in DOCUMENT_KINDS]:
        raise expected(one_of(DOCUMENT_KINDS), unknown[0])
    if "invoice" not in value:
        raise expected("a pattern for invoice, which the others have too unless they say another", None)
    return {kind: _number_pattern(pattern) for kind, pattern in value.items()}


def _categories(value: Data) -> dict[str, str]:
    if not isinstance(value, dict):
        raise expected("a mapping of charges to tax categories", value)
    return {charge: text("a tax category such as standard", 64)(category) for charge, category in value.items()}


Country = Annotated[str, BeforeValidator(_country)]
Language = Annotated[str, BeforeValidator(_language)]
Day = Annotated[date, BeforeValidator(_day)]
Text = Annotated[str, BeforeValidator(text("a text"))]
Category = Annotated[str, BeforeValidator(text("a tax category such as standard", 64))]
Email = Annotated[str, BeforeValidator(_matching(_EMAIL, "an e-mail address such as billing@example.com"))]
Colour = Annotated[str, BeforeValidator(_matching(_COLOUR, "a colour such as #1f2a44"))]


class AddressModel(StrictModel):
    lines: Annotated[tuple[str, ...], BeforeValidator(_address_lines)]
    postal_code: Text = ""
    city: Text
    region: Text = ""
    country: Country


class BrandingModel(StrictModel):
    #: Its file, from the folder of the file that names it.
    logo: Text | None = None
    primary: Colour | None = None
    accent: Colour | None = None


class LegalEntityModel(StrictModel):
    id: Id
    name: Name
    #: Read apart, as ``invoicing_files`` does with every field without a type: here only its name is known.
    address: Any = None
    branding: Any = None
    vat_number: Text | None = None
    registration: Text = ""
    reporting_currency: Currency = "EUR"
    time_zone: TimeZone = "UTC"
    tax_rounding: Annotated[Any, BeforeValidator(choice(*TAX_ROUNDINGS))] = "rate"
    coupons: Annotated[Any, BeforeValidator(choice(*COUPONS_APPLY))] = "before_tax"
    prices: Annotated[Any, BeforeValidator(choice(*PRICES))] = "exclusive"
    numbers: Annotated[dict[str, str], BeforeValidator(_number_patterns)] | None = None
    review: Flag = False
    payment_days: Days = 30
    grace_hours: Annotated[int, BeforeValidator(count(_GRACE_HOURS_MAX))] = 24
    registered_in: Annotated[frozenset[str], BeforeValidator(_countries)] = frozenset()
    one_stop_shop: Flag = False
    terms: Annotated[str, BeforeValidator(text("terms", _TERMS_MAX))] = ""
    language: Language = "en"
    iban: Annotated[str, BeforeValidator(_iban)] = ""
    bic: Annotated[str, BeforeValidator(_bic)] = ""
    bank: Text = ""
    email: Email | None = None
    phone: Text = ""
    website: Text = ""
    valid_from: Day | None = None


class ExemptionModel(StrictModel):
    reason: Text
    certificate: Text = ""
    valid_from: Day | None = None
    valid_until: Day | None = None


class CustomerCouponModel(StrictModel):
    coupon: Id
    start: Day
    end: Day | None = None


class CustomerModel(StrictModel):
    account: Id
    name: Name
    address: Any = None
    exemption: Any = None
    coupons: Any = None
    email: Email | None = None
    vat_number: Text | None = None
    language: Language | None = None
    purchase_order: Text = ""
    consolidates: Flag = False
    threshold: Amount | None = None
    threshold_repeats: Flag = True
    document_currency: Currency | None = None
    tax_categories: Annotated[dict[str, str], BeforeValidator(_categories)] | None = None
    valid_from: Day | None = None


class TaxModel(StrictModel):
    tax: Annotated[str, BeforeValidator(text("a tax such as VAT", 64))]
    country: Country
    region: Text = ""
    rates: Any = None


class TaxRateModel(StrictModel):
    category: Category = "standard"
    percent: Rate
    valid_from: Day
    valid_until: Day | None = None


class CouponModel(StrictModel):
    id: Id
    name: Name
    level: Annotated[Any, BeforeValidator(choice("line", "invoice"))] = "invoice"
    percent: Rate | None = None
    amount: Amount | None = None
    currency: Currency | None = None
    uses: Count | None = None
    charges: Words = ()
    plans: Words = ()
    valid_from: Day | None = None
