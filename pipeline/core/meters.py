"""What is measured: from an event's properties to an exact quantity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.core.money import (
    QUANTITY_DECIMALS,
    QUANTITY_INTEGER_DIGITS,
    QUANTITY_ONE,
    Micros,
    Quantity,
    parse_decimal,
)
from pipeline.core.reasons import Reason, Rejection, Stage

Aggregation: TypeAlias = Literal["sum", "count"]
Properties: TypeAlias = Mapping[bytes, bytes]
#: From an event's properties (UTF-8) to its quantity; None when a filter leaves the event out.
Measure: TypeAlias = Callable[[Properties], Quantity | Rejection | None]

#: Characters of a refused value quoted in the message.
_QUOTED_MAX = 40


@dataclass(frozen=True, slots=True)
class Filter:
    """Passes events whose property has one of the values; an event without the property does not pass."""

    property: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Meter:
    """One version of a meter: the events of a type that pass all filters, summed by a property or counted."""

    id: str
    version: int
    event_type: str
    aggregation: Aggregation
    value: str | None
    unit: str
    filters: tuple[Filter, ...]
    allow_negative: bool
    valid_from_us: Micros


def compile_measure(meter: Meter) -> Measure:
    """A function that measures one event of the meter's type. Raises ValueError for a sum without a value property.

    It returns a Rejection of stage ``rate`` when the value property is missing, is not a finite number, is negative
    where the meter does not allow it, or has more than 18 integer digits or 9 decimals.
    """
    if meter.aggregation == "count":
        return _filtered(meter.filters, lambda _: QUANTITY_ONE)
    if meter.value is None:
        raise ValueError(f"meter {meter.id}: a sum needs the property to sum as its value")
    return _filtered(meter.filters, _sum_of(meter.value, meter.allow_negative))


def _sum_of(name: str, allow_negative: bool) -> Measure:
    key = name.encode()

    def measure(properties: Properties) -> Quantity | Rejection:
        text = properties.get(key)
        # Nearly every value is a plain whole number; bytes.isdigit knows ASCII digits only.
        if text is not None and text.isdigit() and len(text) <= QUANTITY_INTEGER_DIGITS:
            return int(text) * QUANTITY_ONE
        if text is None:
            return Rejection(Stage.RATE, Reason.MISSING_PROPERTY, f"expected a number as {name}, got no such property")
        quantity = parse_decimal(text)
        if isinstance(quantity, Reason):
            return Rejection(Stage.RATE, quantity, f"expected {_EXPECTED[quantity]} as {name}, got {_quoted(text)}")
        if quantity < 0 and not allow_negative:
            return Rejection(Stage.RATE, Reason.NEGATIVE_QUANTITY, f"expected 0 or more as {name}, got {_quoted(text)}")
        return quantity

    return measure


def _filtered(filters: tuple[Filter, ...], measure: Measure) -> Measure:
    if not filters:
        return measure
    wanted = [(f.property.encode(), frozenset(value.encode() for value in f.values)) for f in filters]

    def filtered(properties: Properties) -> Quantity | Rejection | None:
        for key, values in wanted:
            if properties.get(key) not in values:
                return None
        return measure(properties)

    return filtered


_EXPECTED = {
    Reason.NOT_A_NUMBER: "a decimal number",
    Reason.NOT_FINITE: "a finite number",
    Reason.QUANTITY_TOO_LARGE: f"at most {QUANTITY_INTEGER_DIGITS} digits before the point",
    Reason.QUANTITY_TOO_PRECISE: f"at most {QUANTITY_DECIMALS} decimals",
}


def _quoted(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return repr(shown if len(shown) <= _QUOTED_MAX else shown[: _QUOTED_MAX - 1] + "…")
