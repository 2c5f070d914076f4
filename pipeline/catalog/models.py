"""The shapes of price files and account files: which keys there are and what each field takes.

Checks that look at more than one field stand in ``files``.
"""

from copy import copy
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

from pipeline.catalog.fields import (
    Amount,
    Count,
    Currency,
    Days,
    EventType,
    Flag,
    Id,
    Name,
    PositivePrice,
    PositiveQuantity,
    Price,
    Property,
    Quantity,
    Rate,
    StrictModel,
    Time,
    TimeZone,
    Unit,
    Words,
    cell_value,
    choice,
    flag,
    ids,
    text,
    texts,
)
from pipeline.catalog.source import Data, expected, one_of
from pipeline.core.charges import STANDARD, Beyond, Bound, Model
from pipeline.core.cycles import Every
from pipeline.core.meters import Aggregation, RoundingMode, TimeUnit
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.plans import Prorate, ProrateBy


def _conditions(value: Data) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What a filter says of a property: words it may be, or a mapping of operators; as operators with their values."""
    if not isinstance(value, dict):
        return (("in", texts(value)),)
    return tuple(_condition(operator, operand) for operator, operand in sorted(value.items()))


def _condition(operator: str, operand: Data) -> tuple[str, tuple[str, ...]]:
    match operator:
        case "in" | "not_in":
            return operator, texts(operand)
        case "exists":
            return "exists" if flag(operand) else "absent", ()
        case "eq" | "lt" | "le" | "gt" | "ge":
            if not isinstance(operand, str):
                raise expected(f"a number after {operator}", operand)
            return operator, (operand,)
        case _:
            known = ["in", "not_in", "exists", "eq", "lt", "le", "gt", "ge"]
            raise expected(one_of(known), operator)


class EventTypeModel(StrictModel):
    id: EventType
    properties: Annotated[tuple[str, ...], BeforeValidator(texts)]


class ConversionModel(StrictModel):
    multiply: PositivePrice = Decimal(1)
    divide: PositivePrice = Decimal(1)


class RoundingModel(StrictModel):
    mode: Annotated[Any, BeforeValidator(choice(*get_args(RoundingMode)))]
    step: PositiveQuantity = QUANTITY_ONE


class MeterModel(StrictModel):
    id: Id
    event_type: EventType
    aggregation: Annotated[Any, BeforeValidator(choice(*get_args(Aggregation)))]
    value: Property | None = None
    expression: Annotated[str, BeforeValidator(text("an expression such as seconds * memory_mb"))] | None = None
    unit: Unit
    filters: dict[str, Annotated[tuple[tuple[str, tuple[str, ...]], ...], BeforeValidator(_conditions)]] | None = None
    convert: ConversionModel | None = None
    rounding: RoundingModel | None = None
    derived_per: Annotated[Any, BeforeValidator(choice("event", "total"))] = "event"
    level: Annotated[Any, BeforeValidator(choice("set", "add"))] = "set"
    time_unit: Annotated[Any, BeforeValidator(choice(*get_args(TimeUnit)))] = None
    carries_over: Flag = False
    dimensions: Words = ()
    allow_negative: Flag = False
    valid_from: Time | None = None


class PoolModel(StrictModel):
    id: Id
    unit: Unit
    included: Quantity
    charges: Annotated[tuple[str, ...], BeforeValidator(texts)]


class PlanModel(StrictModel):
    id: Id
    name: Name
    currency: Currency
    prorate: Annotated[Any, BeforeValidator(choice(*get_args(Prorate)))] = "pool"
    prorate_by: Annotated[Any, BeforeValidator(choice(*get_args(ProrateBy)))] = "second"
    trial_days: Days = 0
    valid_from: Time | None = None


class ChargeModel(StrictModel):
    """What every charge has."""

    id: Id
    model: Annotated[Any, BeforeValidator(choice(*get_args(Model)))]
    references: Words = ()
    minimum: Amount | None = None
    maximum: Amount | None = None
    prorate: Flag = True
    name: Name = ""
    tax_category: Annotated[str, BeforeValidator(text("a tax category such as standard", 64))] = STANDARD


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


class CellModel(StrictModel):
    when: dict[str, Annotated[str, BeforeValidator(cell_value)]]
    unit_price: Price


class MatrixModel(RunningModel):
    by: Words
    unit_price: Price
    cells: list[CellModel]


class _AnyTierModel(StrictModel):
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
    bound: Annotated[Any, BeforeValidator(choice(*get_args(Bound)))] = "inclusive"
    beyond: Annotated[str, BeforeValidator(choice(*get_args(Beyond)))] | None = None


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
        if name in ("meter", "references", "name", "tax_category") or (name == "model" and not whole):
            continue
        info = copy(info)
        if not whole and name != "id":
            info.default = None
        fields[name] = (info.annotation, info)
    return create_model(f"{model.__name__}Override", __base__=StrictModel, **fields)


#: By the model of the charge that is changed: some of its price fields.
OVERRIDES = {name: _override(model, whole=False) for name, model in CHARGE_MODELS.items()}
#: By the model that takes the place of the plan's: its price fields, as in a plan.
REPLACEMENTS = {name: _override(model, whole=True) for name, model in CHARGE_MODELS.items()}


class PoolOverrideModel(StrictModel):
    id: Id
    included: Quantity


class PriceListModel(StrictModel):
    id: Id
    name: Name
    plan: Id
    currency: Currency
    customer_segment: Id | None = None
    account: Id | None = None
    valid_from: Time | None = None


class AccountModel(StrictModel):
    id: Id
    name: Name
    time_zone: TimeZone = "UTC"
    customer_segment: Id | None = None
    parent: Id | None = None
    aliases: Annotated[tuple[str, ...], BeforeValidator(ids)] = ()
    #: From when the customer segment counts.
    valid_from: Time | None = None


def _cycle(value: Data) -> Data:
    """A word alone stands for a cycle by the calendar."""
    return {"every": value} if isinstance(value, str) else value


def _anchor(value: Data) -> date | str:
    if value == "start":
        return "start"
    try:
        return date.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        raise expected("a date that a period begins on such as 2026-01-31, or start, the contract's", value) from None


class CycleModel(StrictModel):
    every: Annotated[Any, BeforeValidator(choice(*get_args(Every)))]
    #: A date that a period begins on, or "start" for that of the contract's start; by the calendar unless given.
    anchor: Annotated[date | str | None, BeforeValidator(_anchor)] = None


class PhaseModel(StrictModel):
    start: Time
    plan: Id | None = None
    price_list: Id | None = None
    trial_days: Days | None = None


class ContractModel(StrictModel):
    id: Id | None = None
    plan: Id
    start: Time
    end: Time | None = None
    price_list: Id | None = None
    trial_days: Days | None = None
    legal_entity: Id | None = None
    cycle: Annotated[CycleModel | None, BeforeValidator(_cycle)] = None
