"""Exact numbers: parsing, rounding, currencies."""

from decimal import Context, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.money import (
    amount_decimal,
    minor_units,
    parse_decimal,
    plain,
    quantity_decimal,
    round_half_up_div,
    round_to_minor,
    scaled,
)
from pipeline.core.reasons import Reason

GOOD = {
    "a whole number": (b"12345", 12345 * 10**9),
    "zero": (b"0", 0),
    "minus zero": (b"-0.0", 0),
    "a fraction": (b"123.5", 123_500_000_000),
    "all nine decimals": (b"0.000000001", 1),
    "trailing zeros do not count": (b"1.0000000000", 10**9),
    "leading zeros do not count": (b"0000000000000000000000001", 10**9),
    "a plus sign": (b"+5", 5 * 10**9),
    "negative": (b"-1.5", -1_500_000_000),
    "no digit before the point": (b".5", 5 * 10**8),
    "no digit after the point": (b"5.", 5 * 10**9),
    "an exponent": (b"1.25e3", 1250 * 10**9),
    "a negative exponent": (b"1E-9", 1),
    "an exponent that only moves zeros": (b"10e-10", 1),
    "the largest": (b"9" * 18 + b"." + b"9" * 9, 10**27 - 1),
    "the largest by exponent": (b"1e17", 10**26),
    "zero with a huge exponent": (b"0e999999999999999999", 0),
    "text of str": ("2.5", 2_500_000_000),
}
BAD = {
    "empty": (b"", Reason.NOT_A_NUMBER),
    "a word": (b"many", Reason.NOT_A_NUMBER),
    "only a point": (b".", Reason.NOT_A_NUMBER),
    "only an exponent": (b"e5", Reason.NOT_A_NUMBER),
    "an underscore": (b"1_000", Reason.NOT_A_NUMBER),
    "a comma": (b"1,000", Reason.NOT_A_NUMBER),
    "a space before": (b" 1", Reason.NOT_A_NUMBER),
    "a newline after": (b"1\n", Reason.NOT_A_NUMBER),
    "hexadecimal": (b"0x10", Reason.NOT_A_NUMBER),
    "digits of another script": ("١٢".encode(), Reason.NOT_A_NUMBER),
    "a superscript": ("²".encode(), Reason.NOT_A_NUMBER),
    "not UTF-8": (b"\xff\xfe", Reason.NOT_A_NUMBER),
    "two points": (b"1.2.3", Reason.NOT_A_NUMBER),
    "NaN": (b"NaN", Reason.NOT_FINITE),
    "infinity": (b"-Infinity", Reason.NOT_FINITE),
    "inf": (b"inf", Reason.NOT_FINITE),
    "19 digits": (b"1" + b"0" * 18, Reason.QUANTITY_TOO_LARGE),
    "10^40": (b"1e40", Reason.QUANTITY_TOO_LARGE),
    "10^18": (b"1e18", Reason.QUANTITY_TOO_LARGE),
    "a huge exponent": (b"1e99999999999999999999", Reason.QUANTITY_TOO_LARGE),
    "100,000 digits": (b"9" * 100_000, Reason.QUANTITY_TOO_LARGE),
    "ten decimals": (b"0.0000000001", Reason.QUANTITY_TOO_PRECISE),
    "ten decimals after a whole number": (b"1.0000000001", Reason.QUANTITY_TOO_PRECISE),
    "a huge negative exponent": (b"1e-99999999999999999999", Reason.QUANTITY_TOO_PRECISE),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD)
def test_parses(text: bytes | str, expected: int) -> None:
    assert parse_decimal(text) == expected


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_names_the_rule_a_number_breaks(text: bytes, expected: Reason) -> None:
    assert parse_decimal(text) is expected


@given(st.integers(-(10**27) + 1, 10**27 - 1))
def test_every_quantity_survives_being_written_and_read(quantity: int) -> None:
    assert parse_decimal(str(quantity_decimal(quantity))) == quantity
    assert parse_decimal(plain(quantity_decimal(quantity))) == quantity
    assert scaled(quantity_decimal(quantity), 9) == quantity


@given(st.text(alphabet="0123456789+-.eE_ naif", max_size=30))
def test_agrees_with_decimal_wherever_both_take_the_text(text: str) -> None:
    parsed = parse_decimal(text, decimals=30, integer_digits=40)
    if isinstance(parsed, int):
        assert Fraction(Decimal(text)) == Fraction(parsed, 10**30)


@given(st.integers(-(10**40), 10**40))
def test_no_decimal_context_can_round_a_conversion(value: int) -> None:
    with localcontext(Context(prec=3)):
        assert Fraction(amount_decimal(value)) == Fraction(value, 10**12)
        assert Fraction(quantity_decimal(value)) == Fraction(value, 10**9)


def test_scaled_refuses_to_round() -> None:
    with pytest.raises(ValueError, match=r"at most 2 decimals, got 0\.005"):
        scaled(Decimal("0.005"), 2)
    with pytest.raises(ValueError, match="got NaN"):
        scaled(Decimal("NaN"), 2)
    with pytest.raises(ValueError, match=r"got 1E\+999999"):
        scaled(Decimal("1E+999999"), 2)


@given(st.integers(), st.integers(1, 10**20))
def test_rounds_half_away_from_zero(numerator: int, denominator: int) -> None:
    exact = Fraction(numerator, denominator)
    rounded = round_half_up_div(numerator, denominator)
    assert abs(rounded - exact) <= Fraction(1, 2)
    if abs(rounded - exact) == Fraction(1, 2):
        assert abs(rounded) > abs(exact)


PLAIN = {
    "trailing zeros": ("1.500", "1.5"),
    "whole": ("20.00", "20"),
    "an exponent": ("1E+3", "1000"),
    "tiny": ("0.000003000", "0.000003"),
    "minus zero": ("-0.00", "0"),
    "zeros before the point stay": ("100", "100"),
}


@pytest.mark.parametrize(("value", "expected"), PLAIN.values(), ids=PLAIN)
def test_plain(value: str, expected: str) -> None:
    assert plain(Decimal(value)) == expected


ROUNDED = {
    "cents, half up": ("2.675", "USD", "2.68"),
    "cents, just below half": ("2.674999999999", "USD", "2.67"),
    "half away from zero": ("-2.675", "USD", "-2.68"),
    "yen have no cents": ("0.5", "JPY", "1"),
    "dinars have fils": ("1.0005", "KWD", "1.001"),
    "zeros are shown": ("3", "EUR", "3.00"),
    "more digits than a decimal context keeps": ("123456789012345678901234567890.125", "USD", None),
}


@pytest.mark.parametrize(("amount", "currency", "expected"), ROUNDED.values(), ids=ROUNDED)
def test_rounds_to_the_minor_unit(amount: str, currency: str, expected: str | None) -> None:
    assert str(round_to_minor(Decimal(amount), currency)) == (expected or "123456789012345678901234567890.13")


@pytest.mark.parametrize(
    ("currency", "digits"), [("USD", 2), ("JPY", 0), ("KRW", 0), ("BHD", 3), ("KWD", 3), ("TND", 3), ("CLF", 4)]
)
def test_minor_units(currency: str, digits: int) -> None:
    assert minor_units(currency) == digits


@pytest.mark.parametrize("currency", ["", "usd", "XXX", "BTC", "US"])
def test_unknown_currency_is_refused(currency: str) -> None:
    with pytest.raises(ValueError, match="ISO 4217"):
        minor_units(currency)
