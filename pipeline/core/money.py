"""Exact numbers: quantities, amounts, and the one rounding to a currency's minor unit.

Inside the core and the rater numbers are *scaled integers*: a quantity counts 1e-9 of its unit, an amount 1e-12 of its
currency. Decimal stands only at the edges (SQL, JSON, YAML, display). Nothing here looks at the decimal context, so
nothing rounds unasked.
"""

import re
from decimal import Decimal
from typing import TypeAlias

from pipeline.core.reasons import Reason

QUANTITY_DECIMALS = 9
AMOUNT_DECIMALS = 12
#: Most digits before the point of a quantity that an event may bring.
QUANTITY_INTEGER_DIGITS = 18
#: Most decimals of a price: finer than any price list seen, and its product with a quantity stays a small integer.
PRICE_DECIMALS = 18

#: A quantity in units of 1e-9.
Quantity: TypeAlias = int
#: An amount of money in units of 1e-12 of its currency.
Amount: TypeAlias = int
#: An amount of money that was rounded, in its currency's smallest unit (``minor_units``): cents.
Minor: TypeAlias = int
#: An instant, in microseconds since 1970 UTC.
Micros: TypeAlias = int

#: One whole unit.
QUANTITY_ONE: Quantity = 10**QUANTITY_DECIMALS

_NUMBER = re.compile(rb"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?)([0-9]+))?")
_NOT_FINITE = re.compile(rb"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
#: An exponent with more digits than this is out of every range, whatever its value.
_EXPONENT_DIGITS = 9

_MINOR_UNITS = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: (
        "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF "
        "CHW CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG "
        "HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR "
        "MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD "
        "SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XCD XCG "
        "YER ZAR ZMW ZWG"
    ),
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
_MINOR_UNITS_OF = {code: digits for digits, codes in _MINOR_UNITS.items() for code in codes.split()}


def quantity_decimal(quantity: Quantity) -> Decimal:
    """The quantity in whole units, exact, with all 9 decimals."""
    return _shifted(quantity, QUANTITY_DECIMALS)


def amount_decimal(amount: Amount) -> Decimal:
    """The amount in whole units of its currency, exact, with all 12 decimals."""
    return _shifted(amount, AMOUNT_DECIMALS)


def scaled(value: Decimal, decimals: int) -> int:
    """The value in units of 10**-decimals. Raises ValueError when it is not finite or has more decimals."""
    if not value.is_finite() or value.adjusted() > 100:
        raise ValueError(f"expected a number with at most {decimals} decimals, got {value}")
    numerator, denominator = value.as_integer_ratio()
    result, rest = divmod(numerator * _ten_to(decimals), denominator)
    if rest:
        raise ValueError(f"expected a number with at most {decimals} decimals, got {value}")
    return result


def plain(value: Decimal) -> str:
    """The number as a person writes it: no exponent, no trailing zeros, no minus before zero."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def parse_decimal(
    text: bytes | str, *, decimals: int = QUANTITY_DECIMALS, integer_digits: int = QUANTITY_INTEGER_DIGITS
) -> int | Reason:
    """The number in units of 10**-decimals, or the rule it breaks.

    Takes an optional sign, ASCII digits, an optional point and an optional exponent, and nothing else: no space, no
    underscore, no digit of another script. Zeros before and after do not count as digits, so ``1.0000000000`` is 1.
    Work and memory are bounded by the length of the text, however large its exponent.

    Returns NOT_A_NUMBER, NOT_FINITE (NaN or infinity), QUANTITY_TOO_LARGE or QUANTITY_TOO_PRECISE.
    """
    if isinstance(text, str):
        text = text.encode()
    whole, _, fraction = text.partition(b".")
    if whole.isdigit() and fraction.isdigit() and len(whole) <= integer_digits and len(fraction) <= decimals:
        return int(whole + fraction.ljust(decimals, b"0"))  # nearly every value that is not a whole number
    match = _NUMBER.fullmatch(text)
    if match is None:
        return Reason.NOT_FINITE if _NOT_FINITE.fullmatch(text) else Reason.NOT_A_NUMBER
    sign, whole, fraction, exponent_sign, exponent_digits = match.groups(b"")
    if not whole and not fraction:
        return Reason.NOT_A_NUMBER
    digits = (whole + fraction).lstrip(b"0")
    significant = digits.rstrip(b"0")
    if not significant:
        return 0
    exponent_digits = exponent_digits.lstrip(b"0")
    if len(exponent_digits) > _EXPONENT_DIGITS:
        return Reason.QUANTITY_TOO_PRECISE if exponent_sign == b"-" else Reason.QUANTITY_TOO_LARGE
    exponent = int(exponent_digits or b"0")
    # The value is int(significant) * 10**power.
    power = (-exponent if exponent_sign == b"-" else exponent) - len(fraction) + len(digits) - len(significant)
    if len(significant) + power > integer_digits:
        return Reason.QUANTITY_TOO_LARGE
    if power < -decimals:
        return Reason.QUANTITY_TOO_PRECISE
    value = int(significant) * _ten_to(power + decimals)
    return -value if sign == b"-" else value


def round_half_up_div(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, halves away from zero. The denominator is positive."""
    quotient, rest = divmod(abs(numerator), denominator)
    if 2 * rest >= denominator:
        quotient += 1
    return quotient if numerator >= 0 else -quotient


def minor_units(currency: str) -> int:
    """Decimals of a currency's smallest unit by ISO 4217: USD 2, JPY 0, KWD 3. Raises ValueError when unknown."""
    try:
        return _MINOR_UNITS_OF[currency]
    except KeyError:
        raise ValueError(f"expected a currency code of ISO 4217 such as USD, got {currency!r}") from None


def minor_decimal(amount: Minor, currency: str) -> Decimal:
    """Smallest units as whole units of the currency, exact, with its decimals. Raises ValueError when unknown."""
    return _shifted(amount, minor_units(currency))


def to_minor(amount: Decimal, currency: str) -> Minor:
    """The amount in the currency's smallest unit. Raises ValueError when it is finer, or the currency unknown."""
    return scaled(amount, minor_units(currency))


def round_to_minor(amount: Decimal, currency: str) -> Decimal:
    """The amount rounded half up (away from zero) to the currency's minor unit, with exactly its decimals."""
    digits = minor_units(currency)
    numerator, denominator = amount.as_integer_ratio()
    return _shifted(round_half_up_div(numerator * 10**digits, denominator), digits)


def _shifted(value: int, decimals: int) -> Decimal:
    # From text, because Decimal arithmetic (scaleb too) rounds to the context's precision.
    return Decimal(f"{value}E-{decimals}")


def _ten_to(power: int) -> int:
    # pow of two ints is an int for powers of 0 or more; the type checker cannot know.
    return int(10**power)
