"""Legal entities, customers, taxes and coupons as documents: there and back without loss, nothing passed over."""

import json
from dataclasses import replace
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.discounts import Coupon
from pipeline.core.invoicing_documents import Item, TaxTable, from_document, id_of, kind_of, to_document
from pipeline.core.money import scaled
from pipeline.core.parties import Address, Branding, Customer, CustomerCoupon, Exemption, LegalEntity, Policy
from pipeline.core.tax import TaxRate

ADDRESS = Address(("Weg 1",), "Berlin", "DE")
ITEMS = [
    LegalEntity("e", 3, "E", ADDRESS),
    LegalEntity(
        "e",
        1,
        "E",
        replace(ADDRESS, postal_code="10115", region="BE"),
        "DE123456788",
        policy=Policy("invoice", "after_tax", "inclusive"),
        number_patterns={"invoice": "{year}-{serial}", "progress": "P{year}-{serial}"},
        registered_in=frozenset({"FR", "AT"}),
        branding=Branding("00", "#ffffff"),
        review=True,
        one_stop_shop=True,
    ),
    Customer("a", 2, "A", ADDRESS),
    Customer(
        "a",
        1,
        "A",
        ADDRESS,
        exemption=Exemption("Embassy", "1/2", date(2026, 1, 1)),
        threshold=1,
        tax_categories={"b": "reduced", "a": "reduced"},
        coupons=(CustomerCoupon("c", date(2026, 1, 1)), CustomerCoupon("d", date(2026, 1, 1), date(2027, 1, 1))),
    ),
    TaxTable("DE/VAT", 1, (TaxRate("VAT", "DE", "standard", Decimal("19.0"), date(2021, 1, 1), date(2030, 1, 1)),)),
    Coupon("c", 1, "C", "line", Decimal("10"), uses=2, charges=frozenset({"x", "y"})),
    Coupon("c", 1, "C", amount=10**12 + 1, currency="EUR"),
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: type(item).__name__)
def test_there_and_back(item: Item) -> None:
    stored = json.loads(json.dumps(to_document(item)))
    assert from_document(kind_of(item), id_of(item), item.version, stored) == item
    assert "version" not in stored


@given(threshold=st.integers(min_value=0, max_value=10**30))
def test_amounts_are_exact_in_whole_units(threshold: int) -> None:
    item = Customer("a", 1, "A", ADDRESS, threshold=threshold)
    document = to_document(item)
    assert scaled(Decimal(document["threshold"]), 12) == threshold
    assert from_document("customer", "a", 1, document) == item


def test_equal_items_are_equal_documents_whatever_the_order() -> None:
    one = Coupon("c", 1, "C", percent=Decimal("10.0"), charges=frozenset(["x", "y", "z"]))
    other = Coupon("c", 1, "C", percent=Decimal(10), charges=frozenset(["z", "y", "x"]))
    assert json.dumps(to_document(one)) == json.dumps(to_document(other))


def test_what_is_the_default_is_not_written() -> None:
    assert to_document(ITEMS[0]) == {
        "name": "E",
        "address": {"lines": ["Weg 1"], "city": "Berlin", "country": "DE"},
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"colour": "red"}, r"unknown fields \['colour'\]: written by a newer version\?"),
        ({"name": 1}, "expected str as name, got 1"),
        ({"review": "yes"}, "expected bool as review, got 'yes'"),
        ({"review": 1}, "expected bool as review, got 1"),
        ({"payment_days": True}, "expected int as payment_days, got True"),
        ({"policy": {"prices": "free"}}, "as prices, got 'free'"),
        ({"address": {"lines": "a"}}, "as lines, got 'a'"),
        ({"address": None}, "expected the fields of Address, got None"),
    ],
)
def test_what_was_not_written_by_this_program_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot read legal_entity 'e' version 3: .*{problem}"):
        from_document("legal_entity", "e", 3, to_document(ITEMS[0]) | change)
