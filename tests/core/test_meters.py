"""From an event's properties to a quantity."""

from dataclasses import replace
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, ROUND_UP, Decimal, localcontext
from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.meters import (
    Aggregation,
    Conversion,
    Filter,
    Meter,
    Operator,
    Rounding,
    RoundingMode,
    TimeUnit,
    compile_cell,
    compile_measure,
    faults,
    plain_property,
)
from pipeline.core.reasons import Reason, Rejection, Stage


def meter(
    aggregation: Aggregation = "sum",
    *,
    value: str | None = "tokens",
    filters: tuple[Filter, ...] = (),
    allow_negative: bool = False,
    expression: str | None = None,
    convert: Conversion | None = None,
    rounding: Rounding | None = None,
    derived_per: Literal["event", "total"] = "event",
    level: Literal["set", "add"] = "set",
    time_unit: TimeUnit | None = None,
    carries_over: bool = False,
    dimensions: tuple[str, ...] = (),
) -> Meter:
    if aggregation == "count" or expression is not None:
        value = None
    if aggregation == "time_weighted":
        time_unit = time_unit or "hour"
    return Meter(
        "m",
        1,
        "call",
        aggregation,
        value,
        "token",
        filters,
        allow_negative,
        0,
        expression,
        convert,
        rounding,
        derived_per,
        level,
        time_unit,
        carries_over,
        dimensions,
    )


def by(divide: str, multiply: str = "1") -> Conversion:
    return Conversion(Decimal(multiply), Decimal(divide))


QUANTITIES = {
    "sums a whole number": (meter(), {b"tokens": b"4808"}, 4808 * 10**9),
    "zeros before are no digits": (meter(), {b"tokens": b"00000000000000000005"}, 5 * 10**9),
    "sums a fraction": (meter(), {b"tokens": b"0.25"}, 250_000_000),
    "a name outside ASCII": (meter(value="größe"), {"größe".encode(): b"1"}, 10**9),
    "counts without looking at any property": (meter("count"), {}, 10**9),
    "a filter passes": (meter(filters=(Filter("model", ("a", "b")),)), {b"tokens": b"1", b"model": b"b"}, 10**9),
    "a filter leaves out": (meter(filters=(Filter("model", ("a",)),)), {b"tokens": b"1", b"model": b"b"}, None),
    "a missing property does not pass a filter": (meter(filters=(Filter("model", ("a",)),)), {b"tokens": b"1"}, None),
    "all filters must pass": (
        meter("count", filters=(Filter("x", ("1",)), Filter("y", ("1",)))),
        {b"x": b"1", b"y": b"2"},
        None,
    ),
    "left out before its value is looked at": (
        meter(filters=(Filter("model", ("a",)),)),
        {b"tokens": b"many", b"model": b"b"},
        None,
    ),
    "negative where allowed": (meter(allow_negative=True), {b"tokens": b"-2"}, -2 * 10**9),
    "a level is measured like a sum": (meter("max"), {b"tokens": b"7"}, 7 * 10**9),
    "a different text is one": (meter("unique"), {b"tokens": b"ann"}, 10**9),
    "an expression": (meter(expression="input + 4 * output"), {b"input": b"1.5", b"output": b"2"}, 9_500_000_000),
    "an expression of a value with 18 decimals": (
        meter(expression="a * 1000000000"),
        {b"a": b"0.000000000000000001"},
        1,
    ),
    "an expression's result is rounded once, half up": (meter(expression="a / 3 * 2"), {b"a": b"1"}, 666_666_667),
    "an absent property with a default": (meter(expression="default(a, 2)"), {}, 2 * 10**9),
    "negative within an expression": (meter(expression="a - b"), {b"a": b"1", b"b": b"-1"}, 2 * 10**9),
    "an expression below zero where allowed": (meter(expression="-a", allow_negative=True), {b"a": b"1"}, -(10**9)),
    "converted": (meter(convert=by("1024")), {b"tokens": b"1536"}, 1_500_000_000),
    "multiplied and divided in one step": (meter(convert=by("3", "3")), {b"tokens": b"1"}, 10**9),
    "converted and rounded once, half up": (meter(convert=by("3")), {b"tokens": b"5"}, 1_666_666_667),
    "minutes begun": (meter(convert=by("60"), rounding=Rounding("up")), {b"tokens": b"61"}, 2 * 10**9),
    "a whole number of steps stays": (meter(rounding=Rounding("up", 60 * 10**9)), {b"tokens": b"120"}, 120 * 10**9),
    "an expression converted and rounded": (
        meter(expression="a * b", convert=by("10"), rounding=Rounding("down", 500_000_000)),
        {b"a": b"3", b"b": b"9"},
        2_500_000_000,
    ),
    "of a total, an event stays as measured": (
        meter(convert=by("60"), rounding=Rounding("up"), derived_per="total"),
        {b"tokens": b"61"},
        61 * 10**9,
    ),
    "an expression of a total": (
        meter(expression="a / 3", rounding=Rounding("up"), derived_per="total"),
        {b"a": b"1"},
        333_333_333,
    ),
}


@pytest.mark.parametrize(("measured", "properties", "expected"), QUANTITIES.values(), ids=QUANTITIES)
def test_quantity(measured: Meter, properties: dict[bytes, bytes], expected: int | None) -> None:
    assert compile_measure(measured)(properties) == expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("up", (2, 3, -2, -3, 2)),
        ("down", (1, 2, -1, -2, 2)),
        ("half_up", (2, 3, -2, -3, 2)),
        ("half_even", (2, 2, -2, -2, 2)),
    ],
)
def test_rounding_modes(mode: RoundingMode, expected: tuple[int, ...]) -> None:
    measure = compile_measure(meter(rounding=Rounding(mode), allow_negative=True))
    texts = (b"1.5", b"2.5", b"-1.5", b"-2.5", b"2")
    assert tuple(measure({b"tokens": text}) for text in texts) == tuple(whole * 10**9 for whole in expected)


PASSES: dict[str, tuple[Filter, dict[bytes, bytes], bool]] = {
    "not in, another": (Filter("x", ("a", "b"), "not_in"), {b"x": b"c"}, True),
    "not in, one of them": (Filter("x", ("a", "b"), "not_in"), {b"x": b"b"}, False),
    "not in, without the property": (Filter("x", ("a",), "not_in"), {}, True),
    "exists": (Filter("x", operator="exists"), {b"x": b""}, True),
    "exists, without the property": (Filter("x", operator="exists"), {}, False),
    "absent": (Filter("x", operator="absent"), {}, True),
    "absent, with the property": (Filter("x", operator="absent"), {b"x": b""}, False),
    "equal by number": (Filter("x", ("1.50",), "eq"), {b"x": b"15e-1"}, True),
    "not equal by number": (Filter("x", ("1.5",), "eq"), {b"x": b"1.51"}, False),
    "less": (Filter("x", ("10",), "lt"), {b"x": b"9.999"}, True),
    "less, at the bound": (Filter("x", ("10",), "lt"), {b"x": b"10"}, False),
    "less or equal, at the bound": (Filter("x", ("10",), "le"), {b"x": b"10.0"}, True),
    "less or equal, above": (Filter("x", ("10",), "le"), {b"x": b"10.1"}, False),
    "greater, as numbers go": (Filter("x", ("9",), "gt"), {b"x": b"10"}, True),
    "greater, at the bound": (Filter("x", ("9",), "gt"), {b"x": b"9"}, False),
    "greater or equal, at the bound": (Filter("x", ("-9",), "ge"), {b"x": b"-9"}, True),
    "greater or equal, below": (Filter("x", ("-9",), "ge"), {b"x": b"-9.1"}, False),
    "finer than any quantity": (Filter("x", ("0",), "gt"), {b"x": b"1e-40"}, True),
    "greater than any quantity": (
        Filter("x", ("1e39",), "lt"),
        {b"x": b"999999999999999999999999999999999999999"},
        True,
    ),
    "a number, without the property": (Filter("x", ("1",), "lt"), {}, False),
}


@pytest.mark.parametrize(("filter_", "properties", "passes"), PASSES.values(), ids=PASSES)
def test_filters(filter_: Filter, properties: dict[bytes, bytes], passes: bool) -> None:
    assert compile_measure(meter("count", filters=(filter_,)))(properties) == (10**9 if passes else None)


REJECTIONS = {
    "no such property": ({}, Reason.MISSING_PROPERTY, "expected a number as tokens, got no such property"),
    "a word": ({b"tokens": b"many"}, Reason.NOT_A_NUMBER, "expected a decimal number as tokens, got 'many'"),
    "empty": ({b"tokens": b""}, Reason.NOT_A_NUMBER, "expected a decimal number as tokens, got ''"),
    "NaN": ({b"tokens": b"NaN"}, Reason.NOT_FINITE, "expected a finite number as tokens, got 'NaN'"),
    "negative": ({b"tokens": b"-1"}, Reason.NEGATIVE_QUANTITY, "expected 0 or more as tokens, got '-1'"),
    "10^40": (
        {b"tokens": b"1e40"},
        Reason.QUANTITY_TOO_LARGE,
        "expected at most 18 digits before the point as tokens, got '1e40'",
    ),
    "19 digits": (
        {b"tokens": b"1000000000000000000"},
        Reason.QUANTITY_TOO_LARGE,
        "expected at most 18 digits before the point as tokens, got '1000000000000000000'",
    ),
    "ten decimals": (
        {b"tokens": b"1.0000000001"},
        Reason.QUANTITY_TOO_PRECISE,
        "expected at most 9 decimals as tokens, got '1.0000000001'",
    ),
    "a long value is cut": (
        {b"tokens": b"x" * 10_000},
        Reason.NOT_A_NUMBER,
        f"expected a decimal number as tokens, got '{'x' * 39}…'",
    ),
}


@pytest.mark.parametrize(("properties", "reason", "message"), REJECTIONS.values(), ids=REJECTIONS)
def test_rejection(properties: dict[bytes, bytes], reason: Reason, message: str) -> None:
    assert compile_measure(meter())(properties) == Rejection(Stage.RATE, reason, message)


DERIVED_REJECTIONS: dict[str, tuple[Meter, dict[bytes, bytes], Reason, str]] = {
    "a filter by a number that is none": (
        meter("count", filters=(Filter("ms", ("100",), "lt"),)),
        {b"ms": b"fast"},
        Reason.NOT_A_NUMBER,
        "expected a decimal number as ms to filter by, got 'fast'",
    ),
    "an empty text": (
        meter("unique"),
        {b"tokens": b""},
        Reason.MISSING_PROPERTY,
        "expected a text as tokens, got none",
    ),
    "no text": (meter("unique"), {}, Reason.MISSING_PROPERTY, "expected a text as tokens, got none"),
    "no property of an expression": (
        meter(expression="a + b"),
        {b"a": b"1"},
        Reason.MISSING_PROPERTY,
        "expected a number as b, got no such property",
    ),
    "a word in an expression": (
        meter(expression="a + b"),
        {b"a": b"1", b"b": b"x"},
        Reason.NOT_A_NUMBER,
        "expected a decimal number as b, got 'x'",
    ),
    "19 digits in an expression": (
        meter(expression="a / 10"),
        {b"a": b"1000000000000000000"},
        Reason.QUANTITY_TOO_LARGE,
        "expected at most 18 digits before the point as a, got '1000000000000000000'",
    ),
    "a default is for what is absent, not for what is wrong": (
        meter(expression="default(a, 0)"),
        {b"a": b""},
        Reason.NOT_A_NUMBER,
        "expected a decimal number as a, got ''",
    ),
    "19 decimals in an expression": (
        meter(expression="a"),
        {b"a": b"0.0000000000000000001"},
        Reason.QUANTITY_TOO_PRECISE,
        "expected at most 18 decimals as a, got '0.0000000000000000001'",
    ),
    "division by 0": (
        meter(expression="a / b"),
        {b"a": b"1", b"b": b"0"},
        Reason.NOT_FINITE,
        "expected a finite result of a / b, got a division by 0",
    ),
    "a negative result": (
        meter(expression="a - b"),
        {b"a": b"1", b"b": b"2"},
        Reason.NEGATIVE_QUANTITY,
        "expected 0 or more as a - b, got less",
    ),
    "a result of 19 digits": (
        meter(expression="a * b"),
        {b"a": b"1000000000", b"b": b"1000000000"},
        Reason.QUANTITY_TOO_LARGE,
        "expected at most 18 digits before the point of a * b as billed, got more",
    ),
    "converted to 19 digits": (
        meter(convert=by("1", "1000")),
        {b"tokens": b"1000000000000000"},
        Reason.QUANTITY_TOO_LARGE,
        "expected at most 18 digits before the point of tokens as billed, got more",
    ),
    "converted from a word": (
        meter(convert=by("60")),
        {b"tokens": b"many"},
        Reason.NOT_A_NUMBER,
        "expected a decimal number as tokens, got 'many'",
    ),
}


@pytest.mark.parametrize(
    ("measured", "properties", "reason", "message"), DERIVED_REJECTIONS.values(), ids=DERIVED_REJECTIONS
)
def test_derived_rejection(measured: Meter, properties: dict[bytes, bytes], reason: Reason, message: str) -> None:
    assert compile_measure(measured)(properties) == Rejection(Stage.RATE, reason, message)


def test_filters_are_asked_in_order_and_the_first_verdict_counts() -> None:
    measure = compile_measure(meter("count", filters=(Filter("kind", ("call",)), Filter("ms", ("100",), "lt"))))
    assert measure({b"kind": b"ping", b"ms": b"fast"}) is None


def test_a_cell_is_the_values_of_its_dimensions_in_their_order() -> None:
    cell = compile_cell(("region", "größe"))
    assert cell({"größe".encode(): b"xl", b"region": b"eu", b"other": b"1"}) == (b"eu", b"xl")
    assert cell({b"region": b"eu"}) == (b"eu", b"")
    assert compile_cell(())({b"region": b"eu"}) == ()


PLAIN = {
    "a sum": (meter(), "tokens"),
    "a level": (meter("latest"), "tokens"),
    "derived only from the total": (meter(rounding=Rounding("up"), derived_per="total"), "tokens"),
    "a count": (meter("count"), None),
    "a unique count": (meter("unique"), None),
    "filtered": (meter(filters=(Filter("x", ("1",)),)), None),
    "an expression": (meter(expression="tokens"), None),
    "converted": (meter(convert=by("60")), None),
    "rounded": (meter(rounding=Rounding("up")), None),
}


@pytest.mark.parametrize(("measured", "expected"), PLAIN.values(), ids=PLAIN)
def test_what_needs_no_more_than_its_property(measured: Meter, expected: str | None) -> None:
    assert plain_property(measured) == expected


FAULTS: dict[str, tuple[Meter, list[tuple[str, str]]]] = {
    "none": (meter(), []),
    "an aggregation that is not ours": (
        meter("median"),  # type: ignore[arg-type]
        [("aggregation", "expected one of sum, count, max, min, latest, average, unique, time_weighted, got 'median'")],
    ),
    "a sum of nothing": (
        meter(value=None),
        [("value", "expected the property to take the sum of, or an expression instead")],
    ),
    "a sum of the empty name": (
        meter(value=""),
        [("value", "expected the property to take the sum of, or an expression instead")],
    ),
    "a value and an expression": (
        replace(meter(), expression="a"),
        [("value", "expected the property to take the sum of, or an expression instead")],
    ),
    "a count of a value": (
        replace(meter("count"), value="tokens"),
        [("value", "expected neither value nor expression: a count counts every event as 1")],
    ),
    "different numbers": (
        meter("unique", expression="a"),
        [("value", "expected the property whose different texts are counted, and no expression")],
    ),
    "an expression that is none": (meter(expression="a +"), [("expression", "expected an expression such as")]),
    "division by 0": (meter(convert=by("0")), [("convert", "expected numbers above 0, got 0")]),
    "a factor without end": (
        meter(convert=by("0.1234567890123456789")),
        [("convert", "expected a number with at most 18 decimals, got 0.1234567890123456789")],
    ),
    "a factor that is no number": (meter(convert=by("NaN")), [("convert", "expected numbers above 0, got NaN")]),
    "a mode that is not ours": (
        meter(rounding=Rounding("ceiling")),  # type: ignore[arg-type]
        [("rounding", "expected one of up, down, half_up, half_even as its mode, got 'ceiling'")],
    ),
    "a step of 0": (meter(rounding=Rounding("up", 0)), [("rounding", "expected a step above 0, got 0")]),
    "a total without anything to do": (
        meter(derived_per="total"),
        [("derived_per", "expected convert or rounding to apply to the total, got neither")],
    ),
    "a count converted event by event": (
        meter("count", convert=by("1000")),
        [("derived_per", "expected total: the events of a count have no quantity of their own")],
    ),
    "derived per month": (
        meter(derived_per="month"),  # type: ignore[arg-type]
        [("derived_per", "expected event or total, got 'month'")],
    ),
    "a sum of a level": (
        meter(level="add"),
        [("level", "expected set: a sum is of events, not of a level that they change")],
    ),
    "a level that is kept": (
        meter("max", level="keep"),  # type: ignore[arg-type]
        [("level", "expected set or add, got 'keep'")],
    ),
    "time without a unit": (
        replace(meter("time_weighted"), time_unit=None),
        [("time_unit", "expected one of second, minute, hour, day, period, got none")],
    ),
    "a unit of time without time": (
        meter(time_unit="hour"),
        [("time_unit", "expected none: a sum does not multiply by time")],
    ),
    "an average that carries over": (
        meter("average", carries_over=True),
        [("carries_over", "expected false: an average of events has nothing that goes on; see time_weighted")],
    ),
    "a filter without values": (
        meter(filters=(Filter("x"),)),
        [("filters", "expected at least one value to compare x with, got none")],
    ),
    "a filter without a property": (
        meter(filters=(Filter("", ("a",)),)),
        [("filters", "expected a property, got an empty name")],
    ),
    "existence of a value": (
        meter(filters=(Filter("x", ("a",), "exists"),)),
        [("filters", "expected no values with exists of x, got ['a']")],
    ),
    "less than a word": (
        meter(filters=(Filter("x", ("a",), "lt"),)),
        [("filters", "expected one decimal number to compare x with, got ['a']")],
    ),
    "less than two numbers": (
        meter(filters=(Filter("x", ("1", "2"), "lt"),)),
        [("filters", "expected one decimal number to compare x with, got ['1', '2']")],
    ),
    "an operator that is not ours": (
        meter(filters=(Filter("x", ("a",), "like"),)),  # type: ignore[arg-type]
        [("filters", "expected one of in, not_in, exists, absent, eq, lt, le, gt, ge for x, got 'like'")],
    ),
    "a dimension twice": (
        meter(dimensions=("region", "region")),
        [("dimensions", "expected different properties, got ['region', 'region']")],
    ),
    "several": (
        meter(value=None, dimensions=("",)),
        [
            ("value", "expected the property to take the sum of, or an expression instead"),
            ("dimensions", "expected different properties, got ['']"),
        ],
    ),
}


@pytest.mark.parametrize(("measured", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults(measured: Meter, expected: list[tuple[str, str]]) -> None:
    found = faults(measured)
    assert [fault.field for fault in found] == [field for field, _ in expected]
    for fault, (_, message) in zip(found, expected, strict=True):
        assert fault.message.startswith(message)
    if found:
        with pytest.raises(ValueError, match=f"^meter m: {found[0].field}: expected "):
            compile_measure(measured)
    else:
        compile_measure(measured)


# A naive second reading of what an event measures, with fractions and Python's decimal module.

quantities = st.decimals("-1e9", "1e9", places=9, allow_nan=False)
factors = st.decimals("0.001", "100000", places=3, allow_nan=False)
MODES: dict[RoundingMode, str] = {
    "up": ROUND_UP,
    "down": ROUND_DOWN,
    "half_up": ROUND_HALF_UP,
    "half_even": ROUND_HALF_EVEN,
}


@given(quantities, factors, factors, st.sampled_from(sorted(MODES)), st.integers(1, 10**12))
def test_converted_and_rounded_as_decimals_are(
    value: Decimal, multiply: Decimal, divide: Decimal, mode: RoundingMode, step: int
) -> None:
    measured = meter(convert=Conversion(multiply, divide), rounding=Rounding(mode, step), allow_negative=True)
    with localcontext(prec=200):
        exact = Fraction(value) * Fraction(multiply) / Fraction(divide) * 10**9 / step
        whole, rest = divmod(abs(exact.numerator), exact.denominator)
        # What decides a rounding: below, at or above the half, or nothing.
        tail = Decimal(0) if not rest else Decimal(2 + (2 * rest > exact.denominator) - (2 * rest < exact.denominator))
        steps = (whole + tail * Decimal("0.25")).quantize(Decimal(1), MODES[mode]).copy_sign(Decimal(exact.numerator))
    assert compile_measure(measured)({b"tokens": str(value).encode()}) == int(steps) * step


numbers = st.decimals("-1e20", "1e20", places=18, allow_nan=False)


@given(numbers, numbers | st.just(Decimal("0.5")), st.sampled_from(("eq", "lt", "le", "gt", "ge")))
def test_numbers_are_compared_as_decimals_are(number: Decimal, bound: Decimal, compare: Operator) -> None:
    measured = meter("count", filters=(Filter("x", (str(bound),), compare),))
    expected = getattr(number, f"__{compare}__")(bound)
    assert compile_measure(measured)({b"x": str(number).encode()}) == (10**9 if expected else None)


@given(*[st.decimals("-1e6", "1e6", places=18, allow_nan=False)] * 3, factors, factors)
def test_an_expression_is_computed_and_converted_exactly_then_rounded_once(
    a: Decimal, b: Decimal, c: Decimal, multiply: Decimal, divide: Decimal
) -> None:
    measured = meter(expression="(a - b) * c / 7", convert=Conversion(multiply, divide), allow_negative=True)
    exact = (Fraction(a) - Fraction(b)) * Fraction(c) / 7 * Fraction(multiply) / Fraction(divide) * 10**9
    nearest = int(abs(exact) + Fraction(1, 2)) * (1 if exact > 0 else -1)
    properties = {name: str(value).encode() for name, value in ((b"a", a), (b"b", b), (b"c", c))}
    got = compile_measure(measured)(properties)
    if abs(nearest) < 10**27:
        assert got == nearest
    else:
        assert isinstance(got, Rejection) and got.reason == Reason.QUANTITY_TOO_LARGE
