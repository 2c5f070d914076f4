"""Who sells and who buys: legal entities with their policies, and customers as invoices know them. Pure data.

Both are versioned documents (``tally invoicing apply``): a document is made by the version that is valid at its tax
date, and keeps a copy of what was printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Literal, TypeAlias, get_args

from pipeline.core.money import Amount

#: What is rounded once to the smallest unit: the tax of each line, of each rate, or of the whole document.
TaxRounding: TypeAlias = Literal["line", "rate", "invoice"]
#: Whether invoice coupons lower what is taxed, or what is left to pay. Line coupons always lower the price.
CouponsApply: TypeAlias = Literal["before_tax", "after_tax"]
#: Whether prices are without tax or have it in them.
Prices: TypeAlias = Literal["exclusive", "inclusive"]
DocumentKind: TypeAlias = Literal["invoice", "credit_note", "adjustment", "progress"]

TAX_ROUNDINGS: tuple[TaxRounding, ...] = get_args(TaxRounding)
COUPONS_APPLY: tuple[CouponsApply, ...] = get_args(CouponsApply)
PRICES: tuple[Prices, ...] = get_args(Prices)
DOCUMENT_KINDS: tuple[DocumentKind, ...] = get_args(DocumentKind)

#: One series for all kinds of documents. ``{year}``: of the issue date; ``{serial}``: its place in the series, from 1.
NUMBER_PATTERN_DEFAULT = "{year}-{serial:06}"


@dataclass(frozen=True, slots=True)
class Address:
    """A postal address. ``country`` is ISO 3166-1 alpha-2; ``region`` the part after the hyphen of ISO 3166-2."""

    lines: tuple[str, ...]
    city: str
    country: str
    postal_code: str = ""
    region: str = ""


@dataclass(frozen=True, slots=True)
class Branding:
    """How documents look. ``logo`` is the hex SHA-256 of the stored image, "" is none; colours are ``#rrggbb``."""

    logo: str = ""
    primary: str = "#1f2a44"
    accent: str = "#3d6fd9"


@dataclass(frozen=True, slots=True)
class Policy:
    """How a legal entity reckons. Printed on its documents, since it decides cents."""

    tax_rounding: TaxRounding = "rate"
    coupons: CouponsApply = "before_tax"
    prices: Prices = "exclusive"


@dataclass(frozen=True, slots=True)
class LegalEntity:
    """A company of ours that sells: contracts name it, its invoices are numbered in its own series."""

    id: str
    version: int
    name: str
    address: Address
    #: Without spaces, with the country's prefix: DE123456788. None: not registered.
    vat_number: str | None = None
    #: Currency its books are kept in, ISO 4217: what tax is reported in.
    reporting_currency: str = "EUR"
    #: IANA zone of its calendar: issue dates, due dates, the year of its numbers.
    time_zone: str = "UTC"
    policy: Policy = Policy()
    #: Kind -> pattern. Kinds with the same pattern share a series; a kind not named has the invoice's.
    number_patterns: Mapping[DocumentKind, str] = field(default_factory=lambda: {"invoice": NUMBER_PATTERN_DEFAULT})
    #: Whether a person has to look at every document before it is issued.
    review: bool = False
    #: Calendar days from the issue date to the due date.
    payment_days: int = 30
    #: How long after a period's end late usage is waited for.
    grace_hours: int = 24
    #: Countries besides its own where it is registered and charges their tax.
    registered_in: frozenset[str] = frozenset()
    #: Whether it charges EU consumers the tax of their country (One Stop Shop), else that of its own: allowed up to
    #: EUR 10,000 a year (Directive 2006/112/EC, Article 59c).
    one_stop_shop: bool = False
    #: Printed as they are.
    terms: str = ""
    #: BCP 47: what a customer without a language of its own gets.
    language: str = "en"
    branding: Branding = Branding()
    bank: str = ""
    iban: str = ""
    bic: str = ""
    email: str = ""
    phone: str = ""
    website: str = ""
    #: Number in the register of companies, and which register.
    registration: str = ""


@dataclass(frozen=True, slots=True)
class Exemption:
    """Why a customer pays no tax, and the paper that proves it; both are printed."""

    reason: str
    certificate: str = ""
    valid_from: date | None = None
    #: First day it does not count any more.
    valid_until: date | None = None

    def valid_on(self, day: date) -> bool:
        return (self.valid_from is None or self.valid_from <= day) and (
            self.valid_until is None or day < self.valid_until
        )


@dataclass(frozen=True, slots=True)
class CustomerCoupon:
    """A coupon given to a customer, for periods that start on a day of ``[start, end)``; an end of None never comes."""

    coupon: str
    start: date
    end: date | None = None

    def valid_on(self, day: date) -> bool:
        return self.start <= day and (self.end is None or day < self.end)


@dataclass(frozen=True, slots=True)
class Customer:
    """An account as a buyer."""

    account: str
    version: int
    name: str
    address: Address
    email: str = ""
    #: Without spaces, with the prefix of its country; its form was checked when it was applied. None: a consumer.
    vat_number: str | None = None
    exemption: Exemption | None = None
    #: BCP 47; None: the legal entity's.
    language: str | None = None
    purchase_order: str = ""
    #: Whether this account's invoice takes in the lines of the accounts whose parent it is.
    consolidates: bool = False
    #: An amount (1e-12 of its contract's currency) of unbilled usage that is billed as soon as it is reached; None:
    #: never before the period's end.
    threshold: Amount | None = None
    #: Whether that happens each time in a period, or the first time only.
    threshold_repeats: bool = True
    #: Currency that documents show beside their own, ISO 4217; None: the legal entity's reporting currency.
    document_currency: str | None = None
    #: Charge -> tax category, where it is not the charge's own.
    tax_categories: Mapping[str, str] = field(default_factory=dict)
    #: In the sequence they are applied in.
    coupons: tuple[CustomerCoupon, ...] = ()
    #: The account's, IANA; "" where it is not known. Not the customer's own: it stands with the account.
    billing_time_zone: str = ""
