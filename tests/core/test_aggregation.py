"""What a counter's events amount to, at the close and in the stream."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.aggregation import Opening, aggregate, carried, is_additive, running_step
from pipeline.core.members import Member
from pipeline.core.meters import Aggregation, Conversion, Meter, Rounding, RoundingMode, TimeUnit
from pipeline.core.money import QUANTITY_ONE, Quantity

HOUR_US = 3600 * 1_000_000
DAY_US = 24 * HOUR_US
PERIOD_US = 30 * DAY_US


def meter(aggregation: Aggregation, **fields: Any) -> Meter:
    value = None if aggregation == "count" else "seats"
    plain = Meter("m", 1, "change", aggregation, value, "seat", (), True, 0)
    if aggregation == "time_weighted":
        plain = replace(plain, time_unit="hour")
    return replace(plain, **fields)


def units(number: str) -> Quantity:
    return int(Decimal(number) * QUANTITY_ONE)


def opened(number: str) -> Opening:
    return Opening(units(number))


def members(*events: tuple[int, str]) -> list[Member]:
    """Events at hours of the period, in the order of their keys."""
    return [Member(hour * HOUR_US, f"k{n}", units(number), number) for n, (hour, number) in enumerate(events)]


def total(measured: Meter, events: list[Member], opening: Opening | None = None) -> Quantity:
    return aggregate(measured, events, 0, PERIOD_US, opening, period_us=PERIOD_US)


CARRIES = {"carries_over": True}
ADDS = {"level": "add"}
#: Tokens by the thousand begun.
THOUSANDS = {"convert": Conversion(divide=Decimal(1000)), "rounding": Rounding("up"), "derived_per": "total"}

TOTALS: dict[str, tuple[Meter, list[Member], Opening | None, str]] = {
    "sum": (meter("sum"), members((1, "5"), (2, "-2"), (3, "0.5")), None, "3.5"),
    "sum of nothing": (meter("sum"), [], None, "0"),
    "sum that carries over": (meter("sum", **CARRIES), members((1, "-2")), opened("10"), "8"),
    "sum that does not": (meter("sum"), members((1, "-2")), opened("10"), "-2"),
    "count": (meter("count"), members((1, "1"), (2, "1")), None, "2"),
    "max": (meter("max"), members((1, "5"), (2, "9"), (3, "7")), None, "9"),
    "max of nothing": (meter("max"), [], None, "0"),
    "max below zero": (meter("max"), members((1, "-5"), (2, "-9")), None, "-5"),
    "max, where what stood is above all events": (meter("max", **CARRIES), members((1, "500")), opened("1000"), "1000"),
    "max, where nothing happened": (meter("max", **CARRIES), [], opened("500"), "500"),
    "max of seats added and given back": (meter("max", **ADDS), members((1, "5"), (2, "3"), (3, "-4")), None, "8"),
    "max of seats on top of those that stood": (
        meter("max", **ADDS, **CARRIES),
        members((1, "-4"), (2, "3")),
        opened("10"),
        "10",
    ),
    "min": (meter("min"), members((1, "5"), (2, "9")), None, "5"),
    "min, with what stood": (meter("min", **CARRIES), members((1, "5")), opened("3"), "3"),
    "latest by time, not arrival": (meter("latest"), list(reversed(members((1, "5"), (2, "9")))), None, "9"),
    "latest of one instant by key": (meter("latest"), list(reversed(members((1, "5"), (1, "2")))), None, "2"),
    "latest that stood": (meter("latest", **CARRIES), [], opened("4"), "4"),
    "latest after changes": (meter("latest", **ADDS, **CARRIES), members((1, "5"), (2, "-2")), opened("4"), "7"),
    "average": (meter("average"), members((1, "1"), (2, "2"), (3, "2")), None, "1.666666667"),
    "average of nothing": (meter("average"), [], None, "0"),
    "unique": (meter("unique"), members((1, "1"), (2, "2"), (3, "1")), None, "2"),
    "unique with those seen before": (
        meter("unique", **CARRIES),
        members((1, "1"), (2, "2")),
        Opening(texts=frozenset(("2", "3"))),
        "3",
    ),
    "seat-hours, from the first event": (meter("time_weighted"), members((700, "2"), (710, "3")), None, "50"),
    "seat-hours, from what stood": (meter("time_weighted", **CARRIES), members((700, "2")), opened("1"), "740"),
    "seat-hours of changes": (
        meter("time_weighted", **ADDS, **CARRIES),
        members((700, "2"), (710, "-3")),
        opened("1"),
        "730",
    ),
    "seat-hours where nothing happened": (meter("time_weighted", **CARRIES), [], opened("2"), "1440"),
    "seat-seconds": (meter("time_weighted", time_unit="second"), members((719, "0.5")), None, "1800"),
    "seat-minutes": (meter("time_weighted", time_unit="minute"), members((719, "0.5")), None, "30"),
    "seat-days": (meter("time_weighted", time_unit="day"), members((719, "6")), None, "0.25"),
    "the mean over the period": (
        meter("time_weighted", time_unit="period", **ADDS, **CARRIES),
        members((3 * 24, "-2000"), (5 * 24, "-200")),
        opened("2500"),
        "533.333333333",
    ),
    "two changes in one instant": (meter("time_weighted", **ADDS), members((719, "2"), (719, "3")), None, "5"),
    "thousands begun of the total, not of each event": (
        meter("sum", **THOUSANDS),
        members((1, "700"), (2, "700")),
        None,
        "2",
    ),
    "thirds add up before they are rounded": (
        meter("sum", convert=Conversion(divide=Decimal(3)), rounding=Rounding("up"), derived_per="total"),
        members((1, "2"), (2, "2"), (3, "2")),
        None,
        "2",
    ),
    "an average rounded from its exact value": (
        meter("average", rounding=Rounding("up"), derived_per="total"),
        members((1, "0"), (2, "0"), (3, "0.000000001")),
        None,
        "1",
    ),
    "packs of users": (meter("unique", **THOUSANDS), members((1, "1"), (2, "2")), None, "1"),
}


@pytest.mark.parametrize(("measured", "events", "opening", "expected"), TOTALS.values(), ids=TOTALS)
def test_total(measured: Meter, events: list[Member], opening: Opening | None, expected: str) -> None:
    assert total(measured, events, opening) == units(expected)


def test_a_high_watermark_from_month_to_month() -> None:
    """1000 at the start of month 1, 500 in the middle of month 3: billed 1000, 1000, 1000, 500."""
    measured, opening, billed = meter("max", **CARRIES), None, []
    for events in (members((0, "1000")), [], members((360, "500")), []):
        billed.append(total(measured, events, opening))
        opening = carried(measured, events, opening)
    assert billed == [units(number) for number in ("1000", "1000", "1000", "500")]


def test_segments_of_a_period_share_its_time_weighted_mean() -> None:
    measured = meter("time_weighted", time_unit="period", **CARRIES)
    before, after = members((0, "4")), members((300, "10"))
    first = aggregate(measured, before, 0, 240 * HOUR_US, None, period_us=PERIOD_US)
    opening = carried(measured, before)
    second = aggregate(measured, after, 240 * HOUR_US, PERIOD_US, opening, period_us=PERIOD_US)
    assert first + second == total(measured, before + after) == units("7.5")


@pytest.mark.parametrize("hour", [9, 20])
def test_a_member_outside_the_span(hour: int) -> None:
    events = [Member(hour * HOUR_US, "k", units("1"))]
    with pytest.raises(
        ValueError, match="expected members from 1970-01-01T10:00:00Z until before 1970-01-01T20:00:00Z"
    ):
        aggregate(meter("time_weighted"), events, 10 * HOUR_US, 20 * HOUR_US, period_us=PERIOD_US)


ADDITIVE = {
    "sum": (meter("sum"), True),
    "count": (meter("count"), True),
    "converted event by event": (meter("sum", convert=Conversion(divide=Decimal(3))), True),
    "converted as a total": (meter("sum", **THOUSANDS), False),
    "carrying over": (meter("sum", **CARRIES), False),
    **{name: (meter(name), False) for name in get_args(Aggregation) if name not in ("sum", "count")},
}


@pytest.mark.parametrize(("measured", "expected"), ADDITIVE.values(), ids=ADDITIVE)
def test_what_is_additive(measured: Meter, expected: bool) -> None:
    assert is_additive(measured) is expected


STEPS: dict[str, tuple[Meter, list[int] | None]] = {
    "sum": (meter("sum"), [5, 3, 10]),
    "count": (meter("count"), [5, 3, 10]),
    "sum that carries over, from nothing": (meter("sum", **CARRIES), [5, 3, 10]),
    "max": (meter("max"), [5, 5, 7]),
    "min": (meter("min"), [5, -2, -2]),
    "latest": (meter("latest"), [5, -2, 7]),
    "latest of changes": (meter("latest", **ADDS), [5, 3, 10]),
    "max of changes": (meter("max", **ADDS), None),
    "min of changes": (meter("min", **ADDS), None),
    "average": (meter("average"), None),
    "unique": (meter("unique"), None),
    "time_weighted": (meter("time_weighted"), None),
    "a total that is converted": (meter("sum", **THOUSANDS), None),
}


@pytest.mark.parametrize(("measured", "expected"), STEPS.values(), ids=STEPS)
def test_running_step(measured: Meter, expected: list[int] | None) -> None:
    step = running_step(measured)
    if expected is None:
        assert step is None
        return
    assert step is not None
    running, after = None, []
    for quantity in (5, -2, 7):
        running = step(running, quantity)
        after.append(running)
    assert after == expected


# Laws, and a naive second reading with fractions.

SPAN_US = 1000
quantities = st.integers(-(10**12), 10**12)
events = st.lists(
    st.builds(Member, st.integers(0, SPAN_US - 1), st.text("abc", max_size=2), quantities, st.sampled_from("xyz")),
    max_size=8,
    unique_by=lambda member: (member.at_us, member.key),
)
derivations = st.one_of(
    st.just({}),
    st.builds(
        lambda factor, mode, step: {
            "convert": factor,
            "rounding": Rounding(mode, step),
            "derived_per": "total",
        },
        st.builds(Conversion, st.integers(1, 99).map(Decimal), st.integers(1, 99).map(Decimal)),
        st.sampled_from(get_args(RoundingMode)),
        st.integers(1, 10**10),
    ),
)


@st.composite
def meters(draw: st.DrawFn) -> Meter:
    aggregation: Aggregation = draw(st.sampled_from(get_args(Aggregation)))
    fields: dict[str, Any] = {**draw(derivations), "carries_over": aggregation != "average" and draw(st.booleans())}
    if aggregation in ("max", "min", "latest", "time_weighted"):
        fields["level"] = draw(st.sampled_from(("set", "add")))
    if aggregation == "time_weighted":
        fields["time_unit"] = draw(st.sampled_from(get_args(TimeUnit)))
    return meter(aggregation, **fields)


openings = st.none() | st.builds(Opening, quantities, st.frozensets(st.sampled_from("wxyz")))


def naive(measured: Meter, events: list[Member], opening: Opening | None) -> Fraction:
    """Instant by instant, without a thought of speed; in units of 1e-9, before any rounding."""
    stood = opening if measured.carries_over else None
    level = Fraction(stood.quantity if stood else 0)
    ordered = sorted(events, key=lambda event: (event.at_us, event.key))
    levels = [level] if stood else []
    area = Fraction(0)
    for now in range(SPAN_US):
        for event in (event for event in ordered if event.at_us == now):
            level = level + event.quantity if measured.level == "add" else Fraction(event.quantity)
            levels.append(level)
        area += level
    every = [Fraction(event.quantity) for event in events]
    match measured.aggregation:
        case "sum" | "count":
            return sum(every, Fraction(stood.quantity if stood else 0))
        case "unique":
            seen = {event.text for event in events} | (stood.texts if stood else set())
            return Fraction(len(seen) * QUANTITY_ONE)
        case "average":
            return sum(every, Fraction(0)) / len(every) if every else Fraction(0)
        case "max":
            return max(levels, default=Fraction(0))
        case "min":
            return min(levels, default=Fraction(0))
        case "latest":
            return levels[-1] if levels else Fraction(0)
        case "time_weighted":
            seconds = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "period": None}[measured.time_unit or ""]
            return area / (2 * SPAN_US if seconds is None else seconds * 1_000_000)


def rounded(exact: Fraction, mode: Literal["up", "down", "half_up", "half_even"]) -> int:
    below = abs(exact).numerator // abs(exact).denominator
    rest = abs(exact) - below
    half = Fraction(1, 2)
    above = {
        "up": rest > 0,
        "down": False,
        "half_up": rest >= half,
        "half_even": rest > half or (rest == half and below % 2 == 1),
    }[mode]
    return (below + above) * (1 if exact >= 0 else -1)


@given(meters(), events, openings)
def test_as_a_naive_reading_of_the_definition(measured: Meter, events: list[Member], opening: Opening | None) -> None:
    exact = naive(measured, events, opening)
    if measured.derived_per == "total":
        assert measured.convert is not None and measured.rounding is not None
        exact *= Fraction(measured.convert.multiply) / Fraction(measured.convert.divide)
        step = measured.rounding.step
        expected = rounded(exact / step, measured.rounding.mode) * step
    else:
        expected = rounded(exact, "half_up")
    assert aggregate(measured, events, 0, SPAN_US, opening, period_us=2 * SPAN_US) == expected


@given(meters(), events, openings, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(
    measured: Meter, events: list[Member], opening: Opening | None, random: Any
) -> None:
    shuffled = random.sample(events, len(events))
    assert carried(measured, shuffled, opening) == carried(measured, events, opening)
    assert aggregate(measured, shuffled, 0, SPAN_US, opening, period_us=SPAN_US) == aggregate(
        measured, events, 0, SPAN_US, opening, period_us=SPAN_US
    )


@given(meters(), events, openings, st.integers(0, SPAN_US))
def test_what_carries_over_is_the_same_span_by_span(
    measured: Meter, events: list[Member], opening: Opening | None, cut: int
) -> None:
    early, late = [e for e in events if e.at_us < cut], [e for e in events if e.at_us >= cut]
    assert carried(measured, late, carried(measured, early, opening)) == carried(measured, events, opening)


@given(meters(), events)
def test_the_stream_is_right_where_it_knows_and_events_come_in_order(measured: Meter, events: list[Member]) -> None:
    step = running_step(measured)
    if step is None or not events:
        return
    running = None
    for event in sorted(events):
        running = step(running, event.quantity)
    assert running == aggregate(measured, events, 0, SPAN_US, None, period_us=SPAN_US)


@given(events, st.integers(0, 8))
def test_additive_quantities_add_up_however_split(events: list[Member], cut: int) -> None:
    whole, left, right = (
        aggregate(meter("sum"), part, 0, SPAN_US, period_us=SPAN_US) for part in (events, events[:cut], events[cut:])
    )
    assert whole == left + right
