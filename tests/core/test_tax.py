"""Which taxes a sale bears, and what they come to under each policy."""

from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.parties import TAX_ROUNDINGS, Address, Customer, Exemption, LegalEntity, Policy, TaxRounding
from pipeline.core.tax import REVERSE_CHARGE_NOTE, LineTax, NoTaxRate, Tax, TaxRate, Treatment, compute, treatment

DAY = date(2026, 10, 31)


def rate(country: str, percent: str, *, since: int = 2020, tax: str = "VAT", **more: Any) -> TaxRate:
    return TaxRate(tax, country, more.pop("category", "standard"), Decimal(percent), date(since, 1, 1), **more)


TABLE = [
    rate("DE", "16", since=2020),
    rate("DE", "19", since=2021),
    rate("DE", "21", since=2027),
    rate("DE", "7", category="reduced"),
    rate("FR", "20"),
    rate("GB", "20"),
    rate("CA", "5", tax="GST"),
    rate("CA", "7", tax="PST", region="BC"),
    rate("CA", "9.975", tax="QST", region="QC"),
    rate("GR", "24", valid_until=date(2026, 10, 1)),
]


def address(place: str) -> Address:
    country, _, region = place.partition("-")
    return Address(("1 Street",), "City", country, region=region)


def taxes(seller: str, buyer: str, *, category: str = "standard", day: date = DAY, **more: Any) -> Treatment:
    of_seller = {name: more.pop(name) for name in ("one_stop_shop", "registered_in") if name in more}
    entity = LegalEntity("seller", 1, "Seller", address(seller), **of_seller)
    return treatment(entity, Customer("buyer", 1, "Buyer", address(buyer), **more), category, day, TABLE)


def percents(found: Treatment) -> list[tuple[str, str, str]]:
    return [(one.country, one.tax, str(one.percent)) for one in found]


# -- which taxes


@pytest.mark.parametrize(
    ("seller", "buyer", "more", "expected"),
    [
        ("DE", "DE", {}, [("DE", "VAT", "19")]),
        ("DE", "DE", {"vat_number": "DE123456788"}, [("DE", "VAT", "19")]),
        ("DE", "DE", {"category": "reduced"}, [("DE", "VAT", "7")]),
        ("DE", "DE", {"day": date(2020, 12, 31)}, [("DE", "VAT", "16")]),
        ("DE", "DE", {"day": date(2021, 1, 1)}, [("DE", "VAT", "19")]),
        ("CA", "CA-BC", {}, [("CA", "GST", "5"), ("CA", "PST", "7")]),
        ("CA", "CA-AB", {}, [("CA", "GST", "5")]),
        ("DE", "FR", {}, [("DE", "VAT", "19")]),
        ("DE", "FR", {"one_stop_shop": True}, [("FR", "VAT", "20")]),
        ("DE", "FR", {"registered_in": frozenset({"FR"})}, [("FR", "VAT", "20")]),
        ("DE", "FR", {"one_stop_shop": True, "vat_number": "DE123456788"}, [("DE", "VAT", "19")]),
        ("DE", "FR", {"one_stop_shop": True, "vat_number": "GB123456782"}, [("FR", "VAT", "20")]),
        ("DE", "GB", {"registered_in": frozenset({"GB"})}, [("GB", "VAT", "20")]),
    ],
    ids=[
        "domestic",
        "domestic business",
        "domestic, another category",
        "the last day of a rate",
        "the first day of the next",
        "two taxes beside each other",
        "another region's tax does not count",
        "EU consumer, small seller",
        "EU consumer, one-stop shop",
        "EU consumer, registered there",
        "establishment in the seller's country",
        "a number from outside the EU is no number",
        "registered abroad",
    ],
)
def test_rates(seller: str, buyer: str, more: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    found = taxes(seller, buyer, **more)
    assert percents(found) == expected
    assert {one.treatment for one in found} == {"standard"}


@pytest.mark.parametrize(("buyer", "vat_number"), [("FR", "FR40303265045"), ("GR", "EL094259216"), ("PL", "FR1")])
def test_reverse_charge(buyer: str, vat_number: str) -> None:
    assert taxes("DE", buyer, vat_number=vat_number, one_stop_shop=True) == (
        Tax("VAT", "reverse_charge", buyer, Decimal(0), REVERSE_CHARGE_NOTE),
    )


@pytest.mark.parametrize(("seller", "buyer"), [("DE", "US"), ("DE", "GB"), ("US", "DE"), ("GB", "DE")])
def test_abroad_is_outside_the_scope_even_for_a_business(seller: str, buyer: str) -> None:
    (found,) = taxes(seller, buyer, vat_number="DE123456788")
    assert (found.treatment, found.percent, found.tax) == ("outside_scope", Decimal(0), "VAT")
    assert found.note == f"Outside the scope of VAT in {seller}: supplied in {buyer}"


def test_an_exemption_goes_first_for_its_time_and_shows_its_certificate() -> None:
    exemption = Exemption("diplomatic mission", "A-17", date(2026, 1, 1), date(2027, 1, 1))
    (found,) = taxes("CA", "CA-BC", exemption=exemption)
    assert found == Tax("GST", "exempt", "CA", Decimal(0), "diplomatic mission (A-17)")
    assert len(taxes("CA", "CA-BC", exemption=exemption, day=date(2025, 12, 31))) == 2
    assert len(taxes("CA", "CA-BC", exemption=exemption, day=date(2027, 1, 1))) == 2


@pytest.mark.parametrize(
    ("buyer", "more"),
    [("DE", {"category": "books"}), ("DE", {"day": date(2019, 12, 31)}), ("GR", {"one_stop_shop": True})],
    ids=["category", "before the first", "after the last"],
)
def test_no_rate_is_guessed(buyer: str, more: dict[str, Any]) -> None:
    with pytest.raises(NoTaxRate, match=f"expected a tax rate of {buyer} for category"):
        taxes("DE", buyer, **more)


# -- what they come to


def charged(*of: str) -> Treatment:
    return tuple(Tax(f"tax {number}", "standard", "DE", Decimal(percent)) for number, percent in enumerate(of))


def amounts(found: list[tuple[LineTax, ...]]) -> list[list[int]]:
    return [[part.amount for part in line] for line in found]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        # 0.5 each: three lines round up by themselves; 1.5 together; with 0.7 of the other rate 2.2 in all.
        ("line", [[1], [1], [1], [1]]),
        ("rate", [[1], [1], [0], [1]]),
        ("invoice", [[1], [0], [0], [1]]),
    ],
)
def test_what_is_rounded_once(rounding: TaxRounding, expected: list[list[int]]) -> None:
    lines = [5, 5, 5, 10]
    found = compute(lines, [charged("10")] * 3 + [charged("7")], Policy(rounding))
    assert amounts(found) == expected
    assert [part.base for line in found for part in line] == lines


@pytest.mark.parametrize("of", [("5", "10"), ("10", "5")])
def test_a_tie_between_taxes_does_not_depend_on_the_order_of_lines(of: tuple[str, str]) -> None:
    """0.5 each, 1 in all: to the tax of the lower rate, wherever its line stands."""
    found = compute([{"5": 10, "10": 5}[one] for one in of], [charged(one) for one in of], Policy("invoice"))
    assert {str(part.tax.percent): part.amount for line in found for part in line} == {"5": 1, "10": 0}


def test_taxes_beside_each_other_are_of_the_same_base() -> None:
    (line,) = compute([10_000], [charged("6", "2")], Policy())
    assert [(part.base, part.amount) for part in line] == [(10_000, 600), (10_000, 200)]


def test_two_taxes_of_one_name_and_rate_are_two() -> None:
    same = Tax("GST", "standard", "CA", Decimal(5))
    assert amounts(compute([1000], [(same, same)], Policy())) == [[50, 50]]


@pytest.mark.parametrize(
    ("gross", "of", "expected", "net"),
    [
        (11_900, ["19"], [1900], 10_000),
        (100, ["20"], [17], 83),
        (11_497, ["5", "9.975"], [500, 997], 10_000),
        (-11_900, ["19"], [-1900], -10_000),
        (0, ["19"], [0], 0),
    ],
    ids=["exact", "rounded", "two taxes", "a credit", "nothing"],
)
def test_prices_with_tax_in_them(gross: int, of: list[str], expected: list[int], net: int) -> None:
    (line,) = compute([gross], [charged(*of)], Policy(prices="inclusive"))
    assert [part.amount for part in line] == expected
    assert {part.base for part in line} == {net}


LINES = st.lists(
    st.tuples(
        st.integers(-(10**7), 10**7),
        st.lists(st.sampled_from(["0", "5", "7.7", "8.25", "9.975", "20"]), min_size=1, max_size=3, unique=True),
    ),
    max_size=7,
)


@given(LINES, st.sampled_from(TAX_ROUNDINGS), st.booleans())
def test_taxes_are_off_by_less_than_what_their_policy_rounds(
    lines: list[tuple[int, list[str]]], rounding: TaxRounding, inclusive: bool
) -> None:
    policy = Policy(rounding, prices="inclusive" if inclusive else "exclusive")
    found = compute([amount for amount, _ in lines], [charged(*of) for _, of in lines], policy)
    half, all_exact = Fraction(1, 2), Fraction(0)
    by_tax: dict[Tax, Fraction] = {}
    for (amount, _), line in zip(lines, found, strict=True):
        whole = 100 + (sum(Fraction(part.tax.percent) for part in line) if inclusive else 0)
        for part in line:
            exact = Fraction(amount) * Fraction(part.tax.percent) / whole
            assert abs(part.amount - exact) <= (half if rounding == "line" else 1)
            assert part.base == amount - (sum(one.amount for one in line) if inclusive else 0)
            by_tax[part.tax] = by_tax.get(part.tax, Fraction(0)) + part.amount - exact
            all_exact += part.amount - exact
    if rounding == "rate":
        assert all(abs(off) <= half for off in by_tax.values())
    if rounding == "invoice":
        assert abs(all_exact) <= half
