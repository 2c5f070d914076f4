"""The shapes of price files and account files: which keys there are and what each field takes.

Checks that look at more than one field stand in ``files``.
"""

import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict

from pipeline.catalog.source import Data, expected, one_of, suggestion
from pipeline.core.money import PRICE_DECIMALS, QUANTITY_DECIMALS, Micros, minor_units, parse_decimal
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


def _text(what: str, most: int = _TEXT_MAX) -> Callable[[Data], str]:
    def check(value: Data) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > most:
            raise expected(f"{what}, at most {most} characters", value)
        return value

    return check


def _texts(value: Data) -> tuple[str, ...]:
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


def _quantity(value: Data) -> int:
    return _number(value, QUANTITY_DECIMALS, above=-1)


def _positive_quantity(value: Data) -> int:
    return _number(value, QUANTITY_DECIMALS, above=0)


def _choice(*words: str) -> Callable[[Data], Any]:
    def check(value: Data) -> str:
        if value not in words:
            hint = suggestion(value, list(words)) if isinstance(value, str) else ""
            raise expected(one_of(list(words)), value, hint if "did you mean" in hint else "")
        return str(value)

    return check


def _flag(value: Data) -> bool:
    return bool(_choice("true", "false")(value) == "true")


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


Id = Annotated[str, BeforeValidator(_id)]
Property = Annotated[str, BeforeValidator(_text("a property's name"))]
Price = Annotated[Decimal, BeforeValidator(_price)]
Quantity = Annotated[int, BeforeValidator(_quantity)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Name = Annotated[str, BeforeValidator(_text("a name", _NAME_MAX))]
Time = Annotated[date | int, BeforeValidator(_time)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeterModel(_Model):
    id: Id
    event_type: Annotated[str, BeforeValidator(_text("an event type", 128))]
    aggregation: Annotated[Any, BeforeValidator(_choice("sum", "count"))]
    value: Property | None = None
    unit: Annotated[str, BeforeValidator(_text("a unit such as token", 64))]
    filters: dict[str, Annotated[tuple[str, ...], BeforeValidator(_texts)]] | None = None
    allow_negative: Flag = False
    valid_from: Time | None = None


class PlanModel(_Model):
    id: Id
    name: Name
    currency: Annotated[str, BeforeValidator(_currency)]
    valid_from: Time | None = None


class ChargeModel(_Model):
    id: Id
    meter: Id
    model: Annotated[Any, BeforeValidator(_choice("per_unit", "graduated", "volume", "package"))]
    included: Quantity = 0
    references: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()


class TierModel(_Model):
    up_to: Annotated[int, BeforeValidator(_positive_quantity)] | None = None
    unit_price: Price = Decimal(0)
    flat: Price = Decimal(0)


class PerUnitModel(ChargeModel):
    unit_price: Price


class TieredModel(ChargeModel):
    tiers: list[TierModel]
    flat_on_zero: Flag = True


class PackageModel(ChargeModel):
    package_size: Annotated[int, BeforeValidator(_positive_quantity)]
    package_price: Price


class UnknownModel(ChargeModel):
    """Where the model is not one of ours, the price fields cannot be judged. Never valid."""

    unit_price: Any = None
    tiers: Any = None
    flat_on_zero: Any = None
    package_size: Any = None
    package_price: Any = None


CHARGE_MODELS: dict[str, type[ChargeModel]] = {
    "per_unit": PerUnitModel,
    "graduated": TieredModel,
    "volume": TieredModel,
    "package": PackageModel,
}


class AccountModel(_Model):
    id: Id
    name: Name
    time_zone: Annotated[str, BeforeValidator(_time_zone)] = "UTC"


class ContractModel(_Model):
    id: Id | None = None
    plan: Id
    start: Time
    end: Time | None = None
