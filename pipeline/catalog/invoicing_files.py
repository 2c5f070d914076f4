"""Invoicing files: legal entities, customers, taxes and coupons in YAML, to the core's types or every mistake with its
line. Files given together are one whole; what a name means that none of them defines, applying finds out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from pipeline.catalog import vat_numbers
from pipeline.catalog.invoicing_models import (
    AddressModel,
    BrandingModel,
    CouponModel,
    CustomerCouponModel,
    CustomerModel,
    ExemptionModel,
    LegalEntityModel,
    TaxModel,
    TaxRateModel,
)
from pipeline.catalog.source import (
    Finding,
    Part,
    Source,
    Where,
    get,
    one_of,
    read,
    shown,
    suggestion,
    uncollected,
)
from pipeline.core.discounts import Coupon
from pipeline.core.invoicing_documents import Item, TaxTable
from pipeline.core.money import AMOUNT_DECIMALS, minor_units, scaled
from pipeline.core.parties import (
    Address,
    Branding,
    Customer,
    CustomerCoupon,
    DocumentKind,
    Exemption,
    LegalEntity,
    Policy,
)
from pipeline.core.tax import TaxRate

SECTIONS = ("legal_entities", "customers", "taxes", "coupons")
#: Largest image; printed at a few centimetres, more would only slow documents down.
IMAGE_BYTES_MAX = 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draft:
    """An item as a file has it, not applied yet: its version is 0. ``valid_from`` None: it counts at all times."""

    item: Item
    where: Where
    valid_from: date | None
    #: Names of other things in it, and where they stand: coupons, charges, plans.
    names: tuple[tuple[str, str, Where], ...] = ()


@dataclass(frozen=True, slots=True)
class Asset:
    """An image, by its content."""

    sha256: str
    media_type: str
    content: bytes


@dataclass(slots=True)
class Drafts:
    """What some files hold. Only without findings is it whole."""

    items: list[Draft] = field(default_factory=list)
    assets: dict[str, Asset] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@uncollected()
def read_invoicing_files(paths: Sequence[Path]) -> Drafts:
    """What invoicing files hold. Raises OSError when a file cannot be read; all else is a finding."""
    drafts, sources = Drafts(), [read(path) for path in paths]
    for source in sources:
        _check_sections(source)
    parts = {
        section: [part for source in sources for part in Part(source, (), source.data).parts(section)]
        for section in SECTIONS
    }
    for part in parts["legal_entities"]:
        _read_legal_entity(part, drafts)
    for part in parts["customers"]:
        _read_customer(part, drafts)
    for part in parts["coupons"]:
        _read_coupon(part, drafts)
    _read_taxes(parts["taxes"], drafts)
    for section, key in (("legal_entities", "id"), ("customers", "account"), ("coupons", "id")):
        _report_repeats(parts[section], key)
    found = (finding for source in sources for finding in source.findings)
    drafts.findings = sorted({*drafts.findings, *found})
    return drafts


def _check_sections(source: Source) -> None:
    """A file has some of the sections and nothing else."""
    if isinstance(source.data, dict):
        for other in source.data.keys() - set(SECTIONS):
            source.report((other,), f"unknown key {other!r}{suggestion(other, list(SECTIONS))}", key=True)
        if not source.data.keys() & set(SECTIONS):
            source.report((), f"expected {one_of(SECTIONS)}, got none of them")
    elif not source.findings:
        source.report((), f"expected a mapping with {one_of(SECTIONS)}, got {shown(source.data)}")


def _report_repeats(parts: Sequence[Part], key: str) -> None:
    first: dict[str, Where] = {}
    for part in parts:
        name, where = get(part.data, key), part.where(key)
        if isinstance(name, str) and (known := first.setdefault(name, where)) is not where:
            part.report(key, f"expected each {key} once, got {name!r} again after {known.file}:{known.line}")


# Legal entities and customers ---------------------------------------------------------------------------------------


def _read_legal_entity(part: Part, drafts: Drafts) -> None:
    address = _address(part)
    branding = _branding(part, drafts)
    model = part.validated(LegalEntityModel, without=("address", "branding"))
    if model is None or address is None:
        return
    policy = Policy(**_given(model, {"tax_rounding", "coupons", "prices"}))
    item = LegalEntity(
        version=0,
        address=address,
        policy=policy,
        branding=branding,
        vat_number=_vat_number(part, model.vat_number, address),
        **_given(model, {one.name for one in fields(LegalEntity)} - {"vat_number"}),
    )
    if model.numbers is not None:
        item = replace(item, number_patterns=cast(Mapping[DocumentKind, str], model.numbers))
    _check_series(part, item.number_patterns)
    drafts.items.append(Draft(item, part.where("id"), model.valid_from))


def _check_series(part: Part, patterns: Mapping[DocumentKind, str]) -> None:
    """Kinds of documents with different patterns are numbered for themselves: then no two numbers may be the same."""
    known: dict[str, str] = {}
    for pattern in dict.fromkeys(patterns.values()):
        for serial in (1, 10, 100_000, 1_000_000_000):
            number = pattern.format(year=2026, serial=serial)
            other = known.setdefault(number, pattern)
            if other != pattern:
                part.report("numbers", f"expected patterns that never make the same number, got {other} and {pattern}")
                return


def _read_customer(part: Part, drafts: Drafts) -> None:
    address = _address(part)
    exemption = _one(part, "exemption", ExemptionModel)
    if exemption is not None:
        _in_order(part, "exemption", exemption.valid_from, exemption.valid_until)
    coupons, names = [], []
    for place in part.parts("coupons"):
        model = place.validated(CustomerCouponModel)
        if model is not None:
            _in_order(place, "end", model.start, model.end)
            coupons.append(CustomerCoupon(model.coupon, model.start, model.end))
            names.append(("coupon", model.coupon, place.where("coupon")))
    customer = part.validated(CustomerModel, without=("address", "exemption", "coupons"))
    if customer is None or address is None:
        return
    item = Customer(
        version=0,
        address=address,
        vat_number=_vat_number(part, customer.vat_number, address),
        exemption=None if exemption is None else Exemption(**_given(exemption)),
        threshold=None if customer.threshold is None else scaled(customer.threshold, AMOUNT_DECIMALS),
        coupons=tuple(coupons),
        **_given(customer, {one.name for one in fields(Customer)} - {"vat_number", "threshold"}),
    )
    names += [("charge", charge, part.where("tax_categories")) for charge in sorted(item.tax_categories)]
    names.append(("account", item.account, part.where("account")))
    drafts.items.append(Draft(item, part.where("account"), customer.valid_from, tuple(names)))


def _address(part: Part) -> Address | None:
    if get(part.data, "address") is None:
        if isinstance(part.data, dict):
            part.report("address", "expected a value, got nothing")
        return None
    model = _one(part, "address", AddressModel)
    return None if model is None else Address(**_given(model))


def _vat_number(part: Part, number: str | None, address: Address) -> str | None:
    if number is None:
        return None
    try:
        return vat_numbers.checked(number, address.country)
    except ValueError as error:
        part.report("vat_number", f"expected {error}, got {shown(number)}")
        return None


def _branding(part: Part, drafts: Drafts) -> Branding:
    model = _one(part, "branding", BrandingModel)
    if model is None:
        return Branding()
    branding = Branding(**_given(model, {"primary", "accent"}))
    if model.logo is None:
        return branding
    where = part.source.where((*part.path, "branding", "logo"))
    try:
        content = (Path(part.source.file).parent / model.logo).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path no system takes
        drafts.findings.append(where.finding(f"expected a file that can be read, got {error}"))
        return branding
    media_type = _media_type(content)
    if media_type is None:
        drafts.findings.append(where.finding("expected an image, SVG, PNG or JPEG, got another kind of file"))
    elif len(content) > IMAGE_BYTES_MAX:
        most = f"{IMAGE_BYTES_MAX:,} bytes"
        drafts.findings.append(where.finding(f"expected an image of at most {most}, got {len(content):,}"))
    else:
        digest = hashlib.sha256(content).hexdigest()
        drafts.assets[digest] = Asset(digest, media_type, content)
        return replace(branding, logo=digest)
    return branding


def _media_type(content: bytes) -> str | None:
    """What an image's first bytes say it is."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if b"<svg" in content[:1000]:
        return "image/svg+xml"
    return None


# Taxes and coupons --------------------------------------------------------------------------------------------------


def _read_taxes(parts: Sequence[Part], drafts: Drafts) -> None:
    first: dict[str, Where] = {}
    for part in parts:
        model = part.validated(TaxModel, without=("rates",))
        places = part.parts("rates")
        if isinstance(part.data, dict) and not places and get(part.data, "rates") in (None, []):
            part.report("rates", "expected at least one rate, got nothing")
        rates, seen = [], dict[tuple[str, date], Where]()
        for place in places:
            rate = place.validated(TaxRateModel)
            if rate is None:
                continue
            if rate.percent > 100:
                place.report("percent", f"expected at most 100, got {shown(place.data['percent'])}")
            _in_order(place, "valid_until", rate.valid_from, rate.valid_until)
            where = place.where("valid_from")
            if (known := seen.setdefault((rate.category, rate.valid_from), where)) is not where:
                again = f"{rate.valid_from} again after {known.file}:{known.line}"
                place.report("valid_from", f"expected one rate of a category from a day on, got {again}")
            rates.append(rate)
        if model is None:
            continue
        place_name = f"{model.country}-{model.region}" if model.region else model.country
        name, where = f"{place_name}/{model.tax}", part.where("tax")
        if (known := first.setdefault(name, where)) is not where:
            part.report("tax", f"expected each tax of a place once, got {name} again after {known.file}:{known.line}")
        place_of: dict[str, Any] = {"tax": model.tax, "country": model.country, "region": model.region}
        table = TaxTable(name, 0, tuple(TaxRate(**place_of, **dict(rate)) for rate in rates))
        drafts.items.append(Draft(table, where, None))


def _read_coupon(part: Part, drafts: Drafts) -> None:
    model = part.validated(CouponModel)
    if model is None:
        return
    if (model.percent is None) == (model.amount is None):
        part.report("percent", f"expected percent or amount, got {'neither' if model.percent is None else 'both'}")
    if model.percent is not None and not 0 < model.percent <= 100:
        part.report("percent", f"expected a number above 0 and at most 100, got {shown(part.data['percent'])}")
    if (model.amount is None) != (model.currency is None):
        part.report("currency", "expected a currency with an amount and none without")
    if model.amount is not None and model.currency is not None:
        digits = minor_units(model.currency)
        if model.amount <= 0 or -int(model.amount.normalize().as_tuple().exponent) > digits:
            got = shown(part.data["amount"])
            part.report("amount", f"expected an amount above 0 with at most {digits} decimals, got {got}")
    if model.uses == 0:
        part.report("uses", "expected the billing periods it counts in, from 1, or nothing for all, got 0")
    item = Coupon(
        version=0,
        amount=None if model.amount is None else scaled(model.amount, AMOUNT_DECIMALS),
        charges=frozenset(model.charges),
        plans=frozenset(model.plans),
        **_given(model, {"id", "name", "level", "percent", "currency", "uses"}),
    )
    names = [("charge", name, part.where("charges")) for name in model.charges]
    names += [("plan", name, part.where("plans")) for name in model.plans]
    drafts.items.append(Draft(item, part.where("id"), model.valid_from, tuple(names)))


# Parts ----------------------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def _one(part: Part, key: str, model: type[M]) -> M | None:
    """What stands under a key, as a model; None where nothing does, or after its mistakes were reported."""
    data = get(part.data, key)
    return None if data is None else part.source.validated(model, (*part.path, key), data)


def _given(model: BaseModel, names: set[str] | None = None) -> dict[str, Any]:
    """The fields that were given, of these names: what was not, the core's types have a default for."""
    return {
        name: getattr(model, name)
        for name in model.model_fields_set
        if (names is None or name in names) and getattr(model, name) is not None
    }


def _in_order(part: Part, key: str, start: date | None, end: date | None) -> None:
    if start is not None and end is not None and end <= start:
        part.report(key, f"expected a day after {start}, the first, got {end}: the end is the first day without")
