"""The shapes of price files and account files: which keys there are and what each field takes.

Checks that look at more than one field stand in ``files``.
"""

import re
from collections.abc import Callable
from copy import copy
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, get_args
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

from pipeline.catalog.source import Data, expected, one_of, suggestion
from pipeline.core.charges import Beyond, Bound, Model
from pipeline.core.meters import Aggregation, RoundingMode, TimeUnit
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    PRICE_DECIMALS,
    QUANTITY_DECIMALS,
    QUANTITY_ONE,
    Micros,
    minor_units,
    parse_decimal,
)
from pipeline.core.periods import parse_instant, to_datetime
from pipeline.core.plans import Prorate
from pipeline.core.reasons import Reason

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NAME_MAX = 200
_TEXT_MAX = 255


def _id(value: Data) -> str:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise expected("an id (a letter or digit, then letters, digits and . _ : -, at most 128)", value)
    return value


def _ids(value: Data) -> tuple[str, ...]:
    return tuple(_id(name) for name in _texts_or_none(value))


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


def _conditions(value: Data) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What a filter says of a property: words it may be, or a mapping of operators; as operators with their values."""
    if not isinstance(value, dict):
        return (("in", _texts(value)),)
    return tuple(_condition(operator, operand) for operator, operand in sorted(value.items()))


def _condition(operator: str, operand: Data) -> tuple[str, tuple[str, ...]]:
    match operator:
        case "in" | "not_in":
            return operator, _texts(operand)
        case "exists":
            return "exists" if _flag(operand) else "absent", ()
        case "eq" | "lt" | "le" | "gt" | "ge":
            if not isinstance(operand, str):
                raise expected(f"a number after {operator}", operand)
            return operator, (operand,)
        case _:
            known = ["in", "not_in", "exists", "eq", "lt", "le", "gt", "ge"]
            raise expected(one_of(known), operator)


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


def _count(most: int) -> Callable[[Data], int]:
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


def _texts_or_none(value: Data) -> tuple[str, ...]:
    return () if value is None or value == [] else _texts(value)


def _value(value: Data) -> str:
    """A property's value in a cell; nothing stands for an absent property."""
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _TEXT_MAX:
        raise expected(f"a value, at most {_TEXT_MAX} characters", value)
    return value


Id = Annotated[str, BeforeValidator(_id)]
EventType = Annotated[str, BeforeValidator(_text("an event type", 128))]
Property = Annotated[str, BeforeValidator(_text("a property's name"))]
Words = Annotated[tuple[str, ...], BeforeValidator(_texts_or_none)]
Unit = Annotated[str, BeforeValidator(_text("a unit such as token", 64))]
Price = Annotated[Decimal, BeforeValidator(_price)]
PositivePrice = Annotated[Decimal, BeforeValidator(_positive_price)]
#: Per cent: 1.2 is 1.2 %.
Rate = Annotated[Decimal, BeforeValidator(_rate)]
Amount = Annotated[Decimal, BeforeValidator(_amount)]
Quantity = Annotated[int, BeforeValidator(_quantity)]
PositiveQuantity = Annotated[int, BeforeValidator(_positive_quantity)]
Count = Annotated[int, BeforeValidator(_count(10**9))]
#: Of a trial.
Days = Annotated[int, BeforeValidator(_count(366))]
Currency = Annotated[str, BeforeValidator(_currency)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Name = Annotated[str, BeforeValidator(_text("a name", _NAME_MAX))]
Time = Annotated[date | int, BeforeValidator(_time)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EventTypeModel(_Model):
    id: EventType
    properties: Annotated[tuple[str, ...], BeforeValidator(_texts)]


class ConversionModel(_Model):
    multiply: PositivePrice = Decimal(1)
    divide: PositivePrice = Decimal(1)


class RoundingModel(_Model):
    mode: Annotated[Any, BeforeValidator(_choice(*get_args(RoundingMode)))]
    step: PositiveQuantity = QUANTITY_ONE


class MeterModel(_Model):
    id: Id
    event_type: EventType
    aggregation: Annotated[Any, BeforeValidator(_choice(*get_args(Aggregation)))]
    value: Property | None = None
    expression: Annotated[str, BeforeValidator(_text("an expression such as seconds * memory_mb"))] | None = None
    unit: Unit
    filters: dict[str, Annotated[tuple[tuple[str, tuple[str, ...]], ...], BeforeValidator(_conditions)]] | None = None
    convert: ConversionModel | None = None
    rounding: RoundingModel | None = None
    derived_per: Annotated[Any, BeforeValidator(_choice("event", "total"))] = "event"
    level: Annotated[Any, BeforeValidator(_choice("set", "add"))] = "set"
    time_unit: Annotated[Any, BeforeValidator(_choice(*get_args(TimeUnit)))] = None
    carries_over: Flag = False
    dimensions: Words = ()
    allow_negative: Flag = False
    valid_from: Time | None = None


class PoolModel(_Model):
    id: Id
    unit: Unit
    included: Quantity
    charges: Annotated[tuple[str, ...], BeforeValidator(_texts)]


class PlanModel(_Model):
    id: Id
    name: Name
    currency: Currency
    prorate: Annotated[Any, BeforeValidator(_choice(*get_args(Prorate)))] = "pool"
    trial_days: Days = 0
    valid_from: Time | None = None


class ChargeModel(_Model):
    """What every charge has."""

    id: Id
    model: Annotated[Any, BeforeValidator(_choice(*get_args(Model)))]
    references: Words = ()
    minimum: Amount | None = None
    maximum: Amount | None = None
    prorate: Flag = True


class MeteredModel(ChargeModel):
    """A charge on what a meter counts."""

    meter: Id
    by: Words = ()
    per_subject: Flag = False


class RunningModel(MeteredModel):
    """A charge with a price for a running quantity."""

    included: Quantity = 0


class PerUnitModel(RunningModel):
    unit_price: Price
    per_level: Flag = False


class CellModel(_Model):
    when: dict[str, Annotated[str, BeforeValidator(_value)]]
    unit_price: Price


class MatrixModel(RunningModel):
    by: Words
    unit_price: Price
    cells: list[CellModel]


class _AnyTierModel(_Model):
    #: Where the tier before ends. Not needed; where it stands it is checked.
    above: Quantity | None = None
    up_to: PositiveQuantity | None = None
    cap: Amount | None = None


class TierModel(_AnyTierModel):
    unit_price: Price = Decimal(0)
    flat: Price = Decimal(0)


class StepModel(_AnyTierModel):
    flat: Price


class RateTierModel(_AnyTierModel):
    rate: Rate = Decimal(0)
    flat: Price = Decimal(0)


class _AnyTieredModel(RunningModel):
    flat_on_zero: Flag = True
    bound: Annotated[Any, BeforeValidator(_choice(*get_args(Bound)))] = "inclusive"
    beyond: Annotated[str, BeforeValidator(_choice(*get_args(Beyond)))] | None = None


class VolumeModel(_AnyTieredModel):
    tiers: list[TierModel]


class GraduatedModel(VolumeModel):
    per_level: Flag = False


class StairstepModel(_AnyTieredModel):
    tiers: list[StepModel]


class BlockModel(VolumeModel):
    package_size: PositiveQuantity
    min_packages: Count = 0


class GraduatedPercentageModel(_AnyTieredModel):
    tiers: list[RateTierModel]


class PackageModel(RunningModel):
    package_size: PositiveQuantity
    package_price: Price
    min_packages: Count = 0


class PercentageModel(MeteredModel):
    rate: Rate
    fixed: Amount = Decimal(0)
    free_events: Count | None = None
    free_amount: Quantity | None = None
    event_minimum: Amount | None = None
    event_maximum: Amount | None = None


class DynamicModel(MeteredModel):
    amount_property: Property
    multiplier: Price = Decimal(1)
    event_minimum: Amount | None = None
    event_maximum: Amount | None = None


class FlatModel(ChargeModel):
    unit_price: Price
    quantity: Quantity = QUANTITY_ONE
    in_advance: Flag = False


class UnknownModel(ChargeModel):
    """Where the model is not one of ours, the price fields cannot be judged. Never valid."""

    model_config = ConfigDict(extra="ignore")


CHARGE_MODELS: dict[str, type[ChargeModel]] = {
    "per_unit": PerUnitModel,
    "graduated": GraduatedModel,
    "volume": VolumeModel,
    "package": PackageModel,
    "stairstep": StairstepModel,
    "block": BlockModel,
    "graduated_percentage": GraduatedPercentageModel,
    "matrix": MatrixModel,
    "percentage": PercentageModel,
    "dynamic": DynamicModel,
    "flat": FlatModel,
}


def _override(model: type[ChargeModel], *, whole: bool) -> type[BaseModel]:
    """A charge as a price list changes it: its price alone; ``whole`` with all that the model needs, else in parts."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if name in ("meter", "references") or (name == "model" and not whole):
            continue
        info = copy(info)
        if not whole and name != "id":
            info.default = None
        fields[name] = (info.annotation, info)
    return create_model(f"{model.__name__}Override", __base__=_Model, **fields)


#: By the model of the charge that is changed: some of its price fields.
OVERRIDES = {name: _override(model, whole=False) for name, model in CHARGE_MODELS.items()}
#: By the model that takes the place of the plan's: its price fields, as in a plan.
REPLACEMENTS = {name: _override(model, whole=True) for name, model in CHARGE_MODELS.items()}


class PoolOverrideModel(_Model):
    id: Id
    included: Quantity


class PriceListModel(_Model):
    id: Id
    name: Name
    plan: Id
    currency: Currency
    customer_segment: Id | None = None
    account: Id | None = None
    valid_from: Time | None = None


class AccountModel(_Model):
    id: Id
    name: Name
    time_zone: Annotated[str, BeforeValidator(_time_zone)] = "UTC"
    customer_segment: Id | None = None
    parent: Id | None = None
    aliases: Annotated[tuple[str, ...], BeforeValidator(_ids)] = ()
    #: From when the customer segment counts.
    valid_from: Time | None = None


class PhaseModel(_Model):
    start: Time
    plan: Id | None = None
    price_list: Id | None = None
    trial_days: Days | None = None


class ContractModel(_Model):
    id: Id | None = None
    plan: Id
    start: Time
    end: Time | None = None
    price_list: Id | None = None
    trial_days: Days | None = None
    legal_entity: Id | None = None
