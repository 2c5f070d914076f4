"""The rate of a day, and a finished document at it."""

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.fx import NoRate, Rate, convert, rate_on


def rate(quote: str, of: str, day: int, *, base: str = "EUR", source: str = "ECB") -> Rate:
    return Rate(base, quote, Decimal(of), date(2026, 10, day), source)


FRIDAY, MONDAY = 2, 5
PUBLISHED = [
    rate("USD", "1.0877", FRIDAY),
    rate("USD", "1.0991", MONDAY),
    rate("GBP", "0.8731", FRIDAY),
    rate("JPY", "163.52", FRIDAY),
    rate("SEK", "11.2", FRIDAY, source="Riksbank"),
]


@pytest.mark.parametrize(
    ("base", "quote", "day", "expected", "of"),
    [
        ("EUR", "USD", 2, "1.0877", 2),
        ("EUR", "USD", 4, "1.0877", 2),
        ("EUR", "USD", 5, "1.0991", 5),
        ("USD", "EUR", 4, "0.919371150133", 2),
        ("USD", "GBP", 4, "0.802702951181", 2),
        ("USD", "GBP", 6, "0.802702951181", 2),
        ("USD", "USD", 6, "1", 6),
    ],
    ids=[
        "its day",
        "a Sunday",
        "the next",
        "the other way round",
        "by a third currency",
        "the last day both were published",
        "the same currency",
    ],
)
def test_the_last_rate_on_or_before_a_day(base: str, quote: str, day: int, expected: str, of: int) -> None:
    found = rate_on(base, quote, date(2026, 10, day), PUBLISHED)
    assert (found.base, found.quote, found.rate, found.day) == (base, quote, Decimal(expected), date(2026, 10, of))


def test_published_goes_before_following() -> None:
    published = [rate("EUR", "0.92", FRIDAY, base="USD"), *PUBLISHED]
    assert rate_on("USD", "EUR", date(2026, 10, FRIDAY), published).rate == Decimal("0.92")


@pytest.mark.parametrize(
    ("base", "quote", "day"), [("EUR", "USD", 1), ("EUR", "USD", 13), ("EUR", "CHF", 5), ("USD", "SEK", 5)]
)
def test_no_rate_is_guessed(base: str, quote: str, day: int) -> None:
    """Before the first, too long after the last, never published, or from sources that do not belong together."""
    with pytest.raises(NoRate, match=f"expected a rate of {quote} for {base} published from .* to 2026-10-{day:02}"):
        rate_on(base, quote, date(2026, 10, day), PUBLISHED)


@pytest.mark.parametrize(
    ("quote", "of", "net", "tax", "expected"),
    [
        ("USD", "1.0877", 10_000, 1_900, (10_877, 2_067, 12_944)),  # 129.4363; 20.6663
        ("JPY", "163.52", 10_000, 1_900, (16_352, 3_107, 19_459)),  # 19,458.88; 3,106.88
        ("KWD", "0.334", 10_000, 1_900, (33_400, 6_346, 39_746)),
        ("USD", "1.0877", -10_000, -1_900, (-10_877, -2_067, -12_944)),
    ],
    ids=["two decimals", "none", "three", "a credit note"],
)
def test_a_document_is_converted_once(quote: str, of: str, net: int, tax: int, expected: tuple[int, int, int]) -> None:
    found = convert(rate(quote, of, FRIDAY), "EUR", net=net, tax=tax)
    assert (found.net, found.tax, found.total) == expected


@given(
    st.lists(st.integers(-(10**8), 10**8), max_size=4),
    st.integers(-(10**9), 10**9),
    st.decimals("0.0001", "20000", places=6),
    st.sampled_from(["USD", "JPY", "KWD"]),
)
def test_parts_add_up(taxes: list[int], net: int, of: Decimal, quote: str) -> None:
    found = convert(Rate("EUR", quote, of, date(2026, 10, 2), "ECB"), "EUR", net=net, tax=sum(taxes), taxes=taxes)
    assert found.net + found.tax == found.total
    assert not taxes or sum(found.taxes) == found.tax


def test_what_does_not_fit_is_refused() -> None:
    dollars = rate("USD", "1.0877", FRIDAY)
    with pytest.raises(ValueError, match="expected a rate for one GBP, got one for EUR"):
        convert(dollars, "GBP", net=1, tax=0)
    with pytest.raises(ValueError, match=r"expected taxes that add up to 5, got \[2, 2\]"):
        convert(dollars, "EUR", net=1, tax=5, taxes=[2, 2])
