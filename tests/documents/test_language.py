"""Numbers, money and days as readers of a language write them, exact to the last digit."""

import string
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from pipeline.documents.language import language
from pipeline.documents.texts import TEXTS

NARROW, NBSP = "\N{NARROW NO-BREAK SPACE}", "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("tag", "money", "number", "percent", "span"),
    [
        ("en-GB", "€1,234,567.50", "1,234,567.5", "19%", "1–31 Oct 2026"),
        ("de", f"1.234.567,50{NBSP}€", "1.234.567,5", f"19{NBSP}%", "1.–31. Okt. 2026"),
        ("fr", f"1{NARROW}234{NARROW}567,50{NBSP}€", f"1{NARROW}234{NARROW}567,5", f"19{NBSP}%", "1–31 oct. 2026"),
    ],
)
def test_formats(tag: str, money: str, number: str, percent: str, span: str) -> None:
    spoken = language(tag)
    assert spoken.money(Decimal("1234567.5"), "EUR") == money
    assert spoken.number(Decimal("1234567.500")) == number
    assert spoken.percent(Decimal("19.00")) == percent
    assert spoken.span(date(2026, 10, 1), date(2026, 10, 31)) == span


def test_decimals_are_those_of_iso_4217_not_of_habit() -> None:
    spoken = language("en")
    assert spoken.money(Decimal("1235"), "JPY") == "¥1,235"
    assert spoken.amount(Decimal("1.5"), "KWD") == "1.500"
    assert spoken.amount(Decimal("1.5"), "IQD") == "1.500"  # CLDR writes it without any
    assert spoken.price(Decimal("0.000003"), "USD") == "$0.000003"
    assert spoken.price(Decimal("15"), "USD") == "$15.00"


def test_no_digit_is_lost() -> None:
    spoken = language("en")
    whole = "12345678901234567890123456"  # more digits than Decimal's default context keeps
    assert spoken.exact(Decimal(f"{whole}.123456789012"), "EUR").replace(",", "") == f"{whole}.123456789012"
    assert spoken.number(Decimal("999999999999999999.999999999")) == "999,999,999,999,999,999.999999999"


def test_below_zero_has_a_minus_not_a_hyphen() -> None:
    assert language("en").money(Decimal("-3"), "EUR") == "\N{MINUS SIGN}€3.00"


def test_times_are_of_the_zone() -> None:
    at = datetime(2026, 10, 31, 23, 30, tzinfo=UTC)
    assert language("de").instant(at, "Europe/Berlin") == "01.11.2026 00:30:00"


def test_every_language_says_everything_with_the_same_blanks() -> None:
    def blanks(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english = TEXTS["en"]
    for tag, texts in TEXTS.items():
        assert set(texts) == set(english), tag
        assert {key: blanks(text) for key, text in texts.items()} == {
            key: blanks(text) for key, text in english.items()
        }, tag
        assert all(texts.values()), tag


@pytest.mark.parametrize("tag", ["ja", "nonsense", "", "x-y-z"])
def test_a_language_without_words_is_written_in_english_whole(tag: str) -> None:
    assert (language(tag).tag, language(tag).say("invoice")) == ("en", "Invoice")


def test_a_brand_s_words_come_first() -> None:
    words = {"de": {"invoice": "Beleg"}, "nl": {**TEXTS["en"], "invoice": "Factuur"}}
    assert language("de-AT", words).say("invoice") == "Beleg"
    assert language("de-AT", words).say("total") == TEXTS["de"]["total"]
    assert (language("nl", words).tag, language("nl", words).say("invoice")) == ("nl", "Factuur")
