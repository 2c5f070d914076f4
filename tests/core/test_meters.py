"""From an event's properties to a quantity."""

import pytest

from pipeline.core.meters import Filter, Meter, compile_measure
from pipeline.core.reasons import Reason, Rejection, Stage


def meter(
    *, count: bool = False, value: str | None = "tokens", filters: tuple[Filter, ...] = (), allow_negative: bool = False
) -> Meter:
    return Meter("m", 1, "call", "count" if count else "sum", value, "token", filters, allow_negative, 0)


QUANTITIES = {
    "sums a whole number": (meter(), {b"tokens": b"4808"}, 4808 * 10**9),
    "sums a fraction": (meter(), {b"tokens": b"0.25"}, 250_000_000),
    "a name outside ASCII": (meter(value="größe"), {"größe".encode(): b"1"}, 10**9),
    "counts without looking at any property": (meter(count=True, value=None), {}, 10**9),
    "a filter passes": (meter(filters=(Filter("model", ("a", "b")),)), {b"tokens": b"1", b"model": b"b"}, 10**9),
    "a filter leaves out": (meter(filters=(Filter("model", ("a",)),)), {b"tokens": b"1", b"model": b"b"}, None),
    "a missing property does not pass a filter": (meter(filters=(Filter("model", ("a",)),)), {b"tokens": b"1"}, None),
    "all filters must pass": (
        meter(count=True, filters=(Filter("x", ("1",)), Filter("y", ("1",)))),
        {b"x": b"1", b"y": b"2"},
        None,
    ),
    "left out before its value is looked at": (
        meter(filters=(Filter("model", ("a",)),)),
        {b"tokens": b"many", b"model": b"b"},
        None,
    ),
    "negative where allowed": (meter(allow_negative=True), {b"tokens": b"-2"}, -2 * 10**9),
}


@pytest.mark.parametrize(("measured", "properties", "expected"), QUANTITIES.values(), ids=QUANTITIES)
def test_quantity(measured: Meter, properties: dict[bytes, bytes], expected: int | None) -> None:
    assert compile_measure(measured)(properties) == expected


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


def test_a_sum_needs_a_value_property() -> None:
    with pytest.raises(ValueError, match="needs the property to sum"):
        compile_measure(meter(value=None))
