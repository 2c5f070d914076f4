"""What the fields of our YAML files take, whatever the file: each says what was expected where something else came."""

import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict

from pipeline.catalog.source import Data, expected, one_of, suggestion
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    PRICE_DECIMALS,
    QUANTITY_DECIMALS,
    Micros,
    minor_units,
    parse_decimal,
)
from pipeline.core.periods import parse_instant, to_datetime
from pipeline.core.reasons import Reason

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NAME_MAX = 200
_TEXT_MAX = 255


def _id(value: Data) -> str:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise expected("an id (a letter or digit, then letters, digits and . _ : -, at most 128)", value)
    return value


def ids(value: Data) -> tuple[str, ...]:
    return tuple(_id(name) for name in _texts_or_none(value))


def text(what: str, most: int = _TEXT_MAX) -> Callable[[Data], str]:
    def check(value: Data) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > most:
            raise expected(f"{what}, at most {most} characters", value)
        return value

    return check


def texts(value: Data) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v and len(v) <= _TEXT_MAX for v in values):
        raise expected("a word or a list of words", next((v for v in values if not isinstance(v, str)), value))
    if len(set(values)) < len(values):
        repeated = next(v for n, v in enumerate(values) if v in values[:n])
        raise expected("each value once", repeated)
    return tuple(values)


def _number(value: Data, decimals: int, *, above: int) -> int:
    what = "a number above 0" if above == 0 else "a number of 0 or more"
    number = parse_decimal(value, decimals=decimals) if isinstance(value, str) else Reason.NOT_A_NUMBER
    match number:
        case Reason.QUANTITY_TOO_PRECISE:
            raise expected(f"at most {decimals} decimals", value)
        case Reason.QUANTITY_TOO_LARGE:
            raise expected("at most 18 digits before the point", value)
        case Reason():
            raise expected(what, value)
    if number <= above:
        raise expected(what, value)
    return number


def _price(value: Data) -> Decimal:
    _number(value, PRICE_DECIMALS, above=-1)
    return Decimal(value)


def _positive_price(value: Data) -> Decimal:
    _number(value, PRICE_DECIMALS, above=0)
    return Decimal(value)


def _rate(value: Data) -> Decimal:
    _number(value, PRICE_DECIMALS - 2, above=-1)
    return Decimal(value)


def _amount(value: Data) -> Decimal:
    _number(value, AMOUNT_DECIMALS, above=-1)
    return Decimal(value)


def count(most: int) -> Callable[[Data], int]:
    def check(value: Data) -> int:
        number = parse_decimal(value, decimals=0) if isinstance(value, str) else Reason.NOT_A_NUMBER
        if isinstance(number, Reason) or not 0 <= number <= most:
            raise expected(f"a whole number from 0 to {most}", value)
        return number

    return check


def _quantity(value: Data) -> int:
    return _number(value, QUANTITY_DECIMALS, above=-1)


def _positive_quantity(value: Data) -> int:
    return _number(value, QUANTITY_DECIMALS, above=0)


def choice(*words: str) -> Callable[[Data], Any]:
    def check(value: Data) -> str:
        if value not in words:
            hint = suggestion(value, list(words)) if isinstance(value, str) else ""
            raise expected(one_of(list(words)), value, hint if "did you mean" in hint else "")
        return str(value)

    return check


def flag(value: Data) -> bool:
    return bool(choice("true", "false")(value) == "true")


def _currency(value: Data) -> str:
    try:
        minor_units(str(value))
    except ValueError:
        raise expected("a currency code of ISO 4217 such as USD", value) from None
    return str(value)


def _time_zone(value: Data) -> str:
    try:
        return ZoneInfo(value if isinstance(value, str) else "").key
    except (ValueError, OSError, KeyError):  # what zoneinfo raises for a name it cannot look up, a folder, no name
        raise expected("an IANA time zone such as Europe/Berlin", value) from None


def _time(value: Data) -> date | Micros:
    """A date, or an instant in microseconds since 1970 UTC; from 1970 to 9998, where every time zone can count."""
    what = "a date such as 2026-01-31 or a time with zone such as 2026-01-31T09:00:00Z"
    if not isinstance(value, str):
        raise expected(what, value)
    try:
        time = date.fromisoformat(value) if _DATE.fullmatch(value) else parse_instant(value)
    except ValueError:
        raise expected(what, value) from None
    if not 1970 <= (time if isinstance(time, date) else to_datetime(time)).year <= 9998:
        raise expected("a year from 1970 to 9998", value)
    return time


def _texts_or_none(value: Data) -> tuple[str, ...]:
    return () if value is None or value == [] else texts(value)


def cell_value(value: Data) -> str:
    """A property's value in a cell; nothing stands for an absent property."""
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _TEXT_MAX:
        raise expected(f"a value, at most {_TEXT_MAX} characters", value)
    return value


Id = Annotated[str, BeforeValidator(_id)]
EventType = Annotated[str, BeforeValidator(text("an event type", 128))]
Property = Annotated[str, BeforeValidator(text("a property's name"))]
Words = Annotated[tuple[str, ...], BeforeValidator(_texts_or_none)]
Unit = Annotated[str, BeforeValidator(text("a unit such as token", 64))]
Price = Annotated[Decimal, BeforeValidator(_price)]
PositivePrice = Annotated[Decimal, BeforeValidator(_positive_price)]
#: Per cent: 1.2 is 1.2 %.
Rate = Annotated[Decimal, BeforeValidator(_rate)]
Amount = Annotated[Decimal, BeforeValidator(_amount)]
Quantity = Annotated[int, BeforeValidator(_quantity)]
PositiveQuantity = Annotated[int, BeforeValidator(_positive_quantity)]
Count = Annotated[int, BeforeValidator(count(10**9))]
#: Of a trial.
Days = Annotated[int, BeforeValidator(count(366))]
Currency = Annotated[str, BeforeValidator(_currency)]
Flag = Annotated[bool, BeforeValidator(flag)]
Name = Annotated[str, BeforeValidator(text("a name", _NAME_MAX))]
Time = Annotated[date | int, BeforeValidator(_time)]
TimeZone = Annotated[str, BeforeValidator(_time_zone)]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
