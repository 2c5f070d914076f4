"""What is measured: from an event's properties to an exact quantity.

A meter says which events count (event type, filters), how much each one is (``value``, ``expression`` or 1), and how a
counter's events make one quantity (``aggregation``: see ``aggregation``). Of an event, in this order: filters → value
or expression → convert → round.

=============  ==================================================================  ========  ======================
aggregation    a counter's quantity                                                additive  each event is
=============  ==================================================================  ========  ======================
sum            of the events' quantities                                           yes       value or expression
count          of the events                                                       yes       1
max, min       the greatest, least level                                           no        value or expression
latest         the last level                                                      no        value or expression
average        the mean of the events' quantities                                  no        value or expression
unique         how many different texts ``value`` has                              no        1
time_weighted  level times time: seats × hours                                     no        value or expression
=============  ==================================================================  ========  ======================

A *level* is what stands until the next event: each event sets it, or (``level="add"``) changes it by its quantity. Not
additive is also every meter that carries over, since a counter alone does not know what came before its segment, and
every meter that converts or rounds the total (``derived_per="total"``).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from operator import eq, ge, gt, le, lt
from typing import Literal, NamedTuple, TypeAlias, get_args

from pipeline.core.expressions import NUMBER_ONE, compile_expression
from pipeline.core.money import (
    PRICE_DECIMALS,
    QUANTITY_DECIMALS,
    QUANTITY_INTEGER_DIGITS,
    QUANTITY_ONE,
    Micros,
    Quantity,
    parse_decimal,
    plain,
    quantity_decimal,
    round_half_up_div,
    scaled,
)
from pipeline.core.reasons import Reason, Rejection, Stage

Aggregation: TypeAlias = Literal["sum", "count", "max", "min", "latest", "average", "unique", "time_weighted"]
Operator: TypeAlias = Literal["in", "not_in", "exists", "absent", "eq", "lt", "le", "gt", "ge"]
#: As Python's decimal module names them: up is away from zero, down towards it; half up is away from zero too.
RoundingMode: TypeAlias = Literal["up", "down", "half_up", "half_even"]
#: What a level is multiplied by the time in. ``period`` is the whole billing period: a time-weighted mean.
TimeUnit: TypeAlias = Literal["second", "minute", "hour", "day", "period"]
Properties: TypeAlias = Mapping[bytes, bytes]
#: From an event's properties (UTF-8) to its quantity; None when a filter leaves the event out.
Measure: TypeAlias = Callable[[Properties], Quantity | Rejection | None]
#: From an exact quantity, a numerator in units of 1e-9 over a denominator, to a quantity.
Derive: TypeAlias = Callable[[int, int], Quantity]
#: From an event's properties (UTF-8) to the values of some dimensions; a property that is absent is empty.
Cell: TypeAlias = Callable[[Properties], tuple[bytes, ...]]


@dataclass(frozen=True, slots=True)
class Filter:
    """Passes events by one property.

    ``in``, ``not_in``: by its text, one of ``values`` or none of them. ``exists``, ``absent``: by its being there,
    without values. ``eq``, ``lt``, ``le``, ``gt``, ``ge``: by its number, against the one decimal in ``values``; a text
    that is no number is refused, since whether it counts cannot be known. An event without the property passes
    ``not_in`` and ``absent`` only.
    """

    property: str
    values: tuple[str, ...] = ()
    operator: Operator = "in"


@dataclass(frozen=True, slots=True)
class Conversion:
    """Multiplies a quantity, then divides it: ``Conversion(divide=Decimal(1024))`` makes KiB of bytes."""

    multiply: Decimal = Decimal(1)
    divide: Decimal = Decimal(1)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounds to a multiple of ``step``: ``Rounding("up", 60 * QUANTITY_ONE)`` to minutes begun, of seconds."""

    mode: RoundingMode
    step: Quantity = QUANTITY_ONE


@dataclass(frozen=True, slots=True)
class Meter:
    """One version of a meter. Its meaning never changes: what must, is a new version from its own ``valid_from``."""

    id: str
    version: int
    event_type: str
    aggregation: Aggregation
    #: The property measured; what ``unique`` tells apart.
    value: str | None
    #: Of the quantity that is priced: after conversion, and after aggregation.
    unit: str
    #: All must pass.
    filters: tuple[Filter, ...]
    allow_negative: bool
    valid_from_us: Micros
    #: Arithmetic over properties instead of ``value``, see ``expressions``: ``"seconds * memory_mb / 1024"``.
    expression: str | None = None
    #: Exact, then rounded: by ``rounding``, or else once, half up, to 1e-9.
    convert: Conversion | None = None
    rounding: Rounding | None = None
    #: What ``convert`` and ``rounding`` apply to. ``event``: each event's quantity (every call is billed by minutes
    #: begun). ``total``: the counter's quantity (the month's bytes are billed by GB begun): rated rows then hold what
    #: was measured, and only the close can price it.
    derived_per: Literal["event", "total"] = "event"
    #: What an event does to the level: ``set`` it, or ``add`` its quantity to it (below zero with ``allow_negative``).
    level: Literal["set", "add"] = "set"
    time_unit: TimeUnit | None = None
    #: Whether a segment opens with what stood before it: a level, a sum, the values already seen. Else from nothing.
    carries_over: bool = False
    #: Properties by which charges may split the quantity into cells.
    dimensions: tuple[str, ...] = ()


class Fault(NamedTuple):
    """A mistake in a meter: the field it is in, and what was expected and what came."""

    field: str
    message: str


def faults(meter: Meter) -> list[Fault]:
    """Every mistake of a meter that could not be measured as it stands; none for one that ``compile_measure`` takes."""
    found = [*_faults_of_value(meter), *_faults_of_derivation(meter), *_faults_of_level(meter)]
    for filter_ in meter.filters:
        found += [Fault("filters", message) for message in _faults_of_filter(filter_)]
    if not all(meter.dimensions) or len(set(meter.dimensions)) < len(meter.dimensions):
        found.append(Fault("dimensions", f"expected different properties, got {list(meter.dimensions)}"))
    return found


def totals_alike(one: Meter, other: Meter) -> bool:
    """Whether two versions make one quantity of a counter's events in the same way, however they measure each event."""
    return _of_total(one) == _of_total(other)


def compile_measure(meter: Meter) -> Measure:
    """A function that measures one event of the meter's type. Raises ValueError for a meter with ``faults``.

    Its quantity is of the event alone, so it is also what a rated row holds; ``derived_per="total"`` leaves it as
    measured. It returns a Rejection of stage ``rate`` where a property it needs is missing or no number within limits
    (18 integer digits; 9 decimals, in an expression 18), where the result is negative though the meter does not allow
    it, not finite (a division by 0) or has more than 18 integer digits.
    """
    found = faults(meter)
    if found:
        raise ValueError(f"meter {meter.id}: " + "; ".join(f"{fault.field}: {fault.message}" for fault in found))
    match meter.aggregation:
        case "count":
            measure: Measure = lambda _: QUANTITY_ONE  # noqa: E731
        case "unique":
            measure = _one_if_present(meter)
        case _:
            measure = _sum_of(meter) if meter.expression is None else _result_of(meter, meter.expression)
    return _filtered(meter.filters, measure)


def plain_property(meter: Meter) -> str | None:
    """The property whose number is every event's quantity as it stands, if so: what a rater may read without asking."""
    derived = meter.derived_per == "event" and (meter.convert or meter.rounding)
    return None if meter.aggregation in ("count", "unique") or meter.filters or derived else meter.value


def properties_read(meter: Meter) -> frozenset[str]:
    """Every property of an event that the meter looks at: to filter by, to measure, or to split by."""
    expressed = frozenset[str]() if meter.expression is None else compile_expression(meter.expression).names
    value = () if meter.value is None else (meter.value,)
    return expressed.union(value, meter.dimensions, (filter_.property for filter_ in meter.filters))


def compile_derivation(meter: Meter) -> Derive:
    """A function that converts and rounds, as the meter says, an exact quantity: in one division, so rounded once."""
    convert, rounding = meter.convert or Conversion(), meter.rounding or Rounding("half_up", step=1)
    factor = Fraction(Fraction(convert.multiply), Fraction(convert.divide))
    step, divide = rounding.step, _ROUNDED_DIVISION[rounding.mode]
    multiplier, divisor = factor.numerator, factor.denominator * step
    return lambda numerator, denominator: divide(numerator * multiplier, denominator * divisor) * step


def compile_cell(names: tuple[str, ...]) -> Cell:
    """A function from an event's properties to the values of these, in this order; absent is empty."""
    keys = tuple(name.encode() for name in names)
    return lambda properties: tuple([properties.get(key, b"") for key in keys])


# From here on: how a measure is put together. All of it runs once per meter; what it returns runs once per event.


def _of_total(meter: Meter) -> tuple[object, ...]:
    derived = (meter.convert, meter.rounding) if meter.derived_per == "total" else None
    return meter.aggregation, meter.level, meter.time_unit, meter.carries_over, derived


#: Characters of a refused value quoted in the message.
_QUOTED_MAX = 40
#: Numbers that filters compare may be finer and greater than a quantity: nothing is computed with them.
_COMPARED_DIGITS = 40
_COMPARED_ONE: int = 10**_COMPARED_DIGITS
#: A quantity that an event may have is below this.
_TOO_LARGE: Quantity = 10 ** (QUANTITY_INTEGER_DIGITS + QUANTITY_DECIMALS)


def _sum_of(meter: Meter) -> Measure:
    assert meter.value is not None  # faults saw to it
    name, allow_negative = meter.value, meter.allow_negative
    key = name.encode()

    def measure(properties: Properties) -> Quantity | Rejection:
        text = properties.get(key)
        # Nearly every value is a plain whole number; bytes.isdigit knows ASCII digits only.
        if text is not None and text.isdigit() and len(text) <= QUANTITY_INTEGER_DIGITS:
            return int(text) * QUANTITY_ONE
        if text is None:
            return _missing(name)
        quantity = parse_decimal(text)
        if isinstance(quantity, Reason):
            return Rejection(Stage.RATE, quantity, f"expected {_EXPECTED[quantity]} as {name}, got {_quoted(text)}")
        if quantity < 0 and not allow_negative:
            return Rejection(Stage.RATE, Reason.NEGATIVE_QUANTITY, f"expected 0 or more as {name}, got {_quoted(text)}")
        return quantity

    if meter.derived_per == "total" or not (meter.convert or meter.rounding):
        return measure
    derive = compile_derivation(meter)

    def derived(properties: Properties) -> Quantity | Rejection:
        quantity = measure(properties)
        return _within(derive(quantity, 1), name) if isinstance(quantity, int) else quantity

    return derived


def _result_of(meter: Meter, text: str) -> Measure:
    expression, allow_negative = compile_expression(text), meter.allow_negative
    names = [(name, name.encode(), name in expression.optional) for name in sorted(expression.names)]
    derive = compile_derivation(meter) if meter.derived_per == "event" else round_half_up_div

    def measure(properties: Properties) -> Quantity | Rejection:
        numbers: dict[str, int | None] = {}
        for name, key, optional in names:
            raw = properties.get(key)
            if raw is None:
                if not optional:
                    return _missing(name)
                numbers[name] = None
            elif raw.isdigit() and len(raw) <= QUANTITY_INTEGER_DIGITS:
                numbers[name] = int(raw) * NUMBER_ONE
            else:
                number = parse_decimal(raw, decimals=PRICE_DECIMALS)
                if isinstance(number, Reason):
                    wanted = _EXPECTED_IN_EXPRESSION[number]
                    return Rejection(Stage.RATE, number, f"expected {wanted} as {name}, got {_quoted(raw)}")
                numbers[name] = number
        try:
            numerator, denominator = expression.evaluate(numbers)
        except ZeroDivisionError:
            return Rejection(Stage.RATE, Reason.NOT_FINITE, f"expected a finite result of {text}, got a division by 0")
        if numerator < 0 and not allow_negative:
            return Rejection(Stage.RATE, Reason.NEGATIVE_QUANTITY, f"expected 0 or more as {text}, got less")
        return _within(derive(numerator * QUANTITY_ONE, denominator), text)

    return measure


def _one_if_present(meter: Meter) -> Measure:
    assert meter.value is not None  # faults saw to it
    name, key = meter.value, meter.value.encode()
    # An empty text names nobody.
    none = Rejection(Stage.RATE, Reason.MISSING_PROPERTY, f"expected a text as {name}, got none")
    return lambda properties: QUANTITY_ONE if properties.get(key) else none


def _within(quantity: Quantity, what: str) -> Quantity | Rejection:
    if -_TOO_LARGE < quantity < _TOO_LARGE:
        return quantity
    wanted = _EXPECTED[Reason.QUANTITY_TOO_LARGE]
    return Rejection(Stage.RATE, Reason.QUANTITY_TOO_LARGE, f"expected {wanted} of {what} as billed, got more")


def _missing(name: str) -> Rejection:
    return Rejection(Stage.RATE, Reason.MISSING_PROPERTY, f"expected a number as {name}, got no such property")


def _up(numerator: int, denominator: int) -> int:
    quotient = -(-abs(numerator) // denominator)
    return quotient if numerator >= 0 else -quotient


def _down(numerator: int, denominator: int) -> int:
    quotient = abs(numerator) // denominator
    return quotient if numerator >= 0 else -quotient


def _half_even(numerator: int, denominator: int) -> int:
    quotient, rest = divmod(numerator, denominator)
    return quotient + (2 * rest > denominator or (2 * rest == denominator and quotient % 2))


_ROUNDED_DIVISION: dict[RoundingMode, Callable[[int, int], int]] = {
    "up": _up,
    "down": _down,
    "half_up": round_half_up_div,
    "half_even": _half_even,
}


def _filtered(filters: tuple[Filter, ...], measure: Measure) -> Measure:
    if not filters:
        return measure
    passes = [_passes(filter_) for filter_ in filters]

    def filtered(properties: Properties) -> Quantity | Rejection | None:
        for passed in passes:
            verdict = passed(properties)
            if verdict is not True:
                return verdict or None
        return measure(properties)

    return filtered


def _passes(filter_: Filter) -> Callable[[Properties], bool | Rejection]:
    """Whether an event passes, or why that cannot be known."""
    name, key = filter_.property, filter_.property.encode()
    texts = frozenset(value.encode() for value in filter_.values)
    match filter_.operator:
        case "in":
            return lambda properties: properties.get(key) in texts
        case "not_in":
            return lambda properties: properties.get(key) not in texts
        case "exists":
            return lambda properties: key in properties
        case "absent":
            return lambda properties: key not in properties
        case "eq" | "lt" | "le" | "gt" | "ge" as numeric:
            compare, bound = _COMPARISONS[numeric], _compared(filter_.values[0])
            assert not isinstance(bound, Reason)  # faults saw to it

            def passes(properties: Properties) -> bool | Rejection:
                text = properties.get(key)
                if text is None:
                    return False
                number = _compared(text)
                if isinstance(number, Reason):
                    return Rejection(
                        Stage.RATE, number, f"expected {_EXPECTED[number]} as {name} to filter by, got {_quoted(text)}"
                    )
                return compare(number, bound)

            return passes


def _compared(text: bytes | str) -> int | Reason:
    if isinstance(text, bytes) and text.isdigit() and len(text) <= QUANTITY_INTEGER_DIGITS:
        return int(text) * _COMPARED_ONE
    return parse_decimal(text, decimals=_COMPARED_DIGITS, integer_digits=_COMPARED_DIGITS)


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {"eq": eq, "lt": lt, "le": le, "gt": gt, "ge": ge}


def _faults_of_value(meter: Meter) -> Iterator[Fault]:
    aggregation, value, expression = meter.aggregation, meter.value, meter.expression
    if aggregation not in get_args(Aggregation):
        yield Fault("aggregation", f"expected one of {', '.join(get_args(Aggregation))}, got {aggregation!r}")
        return
    match aggregation:
        case "count":
            if value is not None or expression is not None:
                yield Fault("value", "expected neither value nor expression: a count counts every event as 1")
        case "unique":
            if not value or expression is not None:
                yield Fault("value", "expected the property whose different texts are counted, and no expression")
        case _:
            if (value is None) == (expression is None) or value == "":
                got = "neither" if value is None else "both" if expression is not None else "no name"
                yield Fault(
                    "value", f"expected the property to take the {aggregation} of, or an expression instead, got {got}"
                )
    if expression is not None:
        try:
            compile_expression(expression)
        except ValueError as error:
            yield Fault("expression", str(error))


def _faults_of_derivation(meter: Meter) -> Iterator[Fault]:
    if meter.convert is not None:
        for number in (meter.convert.multiply, meter.convert.divide):
            if not number.is_finite() or number <= 0:
                yield Fault("convert", f"expected numbers above 0, got {number}")
            else:
                try:
                    scaled(number, PRICE_DECIMALS)
                except ValueError as error:
                    yield Fault("convert", str(error))
    if meter.rounding is not None:
        if meter.rounding.mode not in _ROUNDED_DIVISION:
            modes = ", ".join(_ROUNDED_DIVISION)
            yield Fault("rounding", f"expected one of {modes} as its mode, got {meter.rounding.mode!r}")
        if meter.rounding.step <= 0:
            step = plain(quantity_decimal(meter.rounding.step))
            yield Fault("rounding", f"expected a step above 0, got {step}")
    derives = meter.convert is not None or meter.rounding is not None
    if meter.derived_per not in ("event", "total"):
        yield Fault("derived_per", f"expected event or total, got {meter.derived_per!r}")
    elif meter.derived_per == "total" and not derives:
        yield Fault("derived_per", "expected convert or rounding to apply to the total, got neither")
    elif meter.derived_per == "event" and derives and meter.aggregation in ("count", "unique"):
        yield Fault("derived_per", f"expected total: the events of a {meter.aggregation} have no quantity of their own")


def _faults_of_level(meter: Meter) -> Iterator[Fault]:
    if meter.level not in ("set", "add"):
        yield Fault("level", f"expected set or add, got {meter.level!r}")
    if meter.level == "add" and meter.aggregation not in _OF_LEVELS:
        yield Fault("level", f"expected set: a {meter.aggregation} is of events, not of a level that they change")
    if meter.aggregation == "time_weighted":
        if meter.time_unit not in get_args(TimeUnit):
            got = "none" if meter.time_unit is None else repr(meter.time_unit)
            yield Fault("time_unit", f"expected one of {', '.join(get_args(TimeUnit))}, got {got}")
    elif meter.time_unit is not None:
        yield Fault("time_unit", f"expected none: a {meter.aggregation} does not multiply by time")
    if meter.carries_over and meter.aggregation == "average":
        yield Fault("carries_over", "expected false: an average of events has nothing that goes on; see time_weighted")


def _faults_of_filter(filter_: Filter) -> Iterator[str]:
    name, operator, values = filter_.property, filter_.operator, filter_.values
    if not name:
        yield "expected a property, got an empty name"
    match operator:
        case "in" | "not_in":
            if not values:
                yield f"expected at least one value to compare {name} with, got none"
        case "exists" | "absent":
            if values:
                yield f"expected no values with {operator} of {name}, got {list(values)}"
        case "eq" | "lt" | "le" | "gt" | "ge":
            if len(values) != 1 or isinstance(_compared(values[0]), Reason):
                yield f"expected one decimal number to compare {name} with, got {list(values)}"
        case _:
            yield f"expected one of {', '.join(get_args(Operator))} for {name}, got {operator!r}"


_OF_LEVELS = ("max", "min", "latest", "time_weighted")
_EXPECTED = {
    Reason.NOT_A_NUMBER: "a decimal number",
    Reason.NOT_FINITE: "a finite number",
    Reason.QUANTITY_TOO_LARGE: f"at most {QUANTITY_INTEGER_DIGITS} digits before the point",
    Reason.QUANTITY_TOO_PRECISE: f"at most {QUANTITY_DECIMALS} decimals",
}
_EXPECTED_IN_EXPRESSION = {**_EXPECTED, Reason.QUANTITY_TOO_PRECISE: f"at most {PRICE_DECIMALS} decimals"}


def _quoted(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return repr(shown if len(shown) <= _QUOTED_MAX else shown[: _QUOTED_MAX - 1] + "…")
