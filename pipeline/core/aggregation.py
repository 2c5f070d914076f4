"""What the events of one counter amount to: exact, and the same whatever order they came in.

The close calls ``aggregate`` with a counter's stored members. The stream, which sees one event at a time and keeps one
number per counter, calls ``running_step``; what it cannot know so it leaves to the close.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from pipeline.core.members import Member
from pipeline.core.meters import Meter, TimeUnit, compile_derivation
from pipeline.core.money import QUANTITY_ONE, Micros, Quantity, round_half_up_div
from pipeline.core.periods import Period, format_instant

#: From a counter's running quantity (None before its first event) and an event's quantity to the quantity after it.
RunningStep: TypeAlias = Callable[[Quantity | None, Quantity], Quantity]


@dataclass(frozen=True, slots=True)
class Opening:
    """What stood when a span began, for a meter that carries over. See ``carried``."""

    #: The level, or the sum or count of everything before.
    quantity: Quantity = 0
    #: The texts seen before, for ``unique``.
    texts: frozenset[str] = frozenset()


def is_additive(meter: Meter) -> bool:
    """Whether a counter's quantity is the sum of its rows', so order and splitting do not matter (class running)."""
    return meter.aggregation in ("sum", "count") and not meter.carries_over and meter.derived_per == "event"


def running_step(meter: Meter) -> RunningStep | None:
    """How the stream moves a counter with an event, in the order events arrive.

    Exact for additive meters; provisional for others: a level may be set out of order, or have been set before the
    segment. None where what the stream sees is not what is priced: an average, different texts, levels times time, the
    extreme of a level that events add to, a total that is converted or rounded.
    """
    if meter.derived_per == "total":
        return None
    match meter.aggregation, meter.level:
        case ("sum" | "count", _) | ("latest", "add"):
            return lambda before, quantity: (before or 0) + quantity
        case "latest", _:
            return lambda _, quantity: quantity
        case "max", "set":
            return lambda before, quantity: quantity if before is None else max(before, quantity)
        case "min", "set":
            return lambda before, quantity: quantity if before is None else min(before, quantity)
        case _:
            return None


def aggregate(
    meter: Meter,
    members: Iterable[Member],
    start_us: Micros,
    end_us: Micros,
    opening: Opening | None = None,
    *,
    period_us: Micros,
) -> Quantity:
    """The quantity of a counter over the span ``[start_us, end_us)`` as it is priced, total conversion included.

    Exact, and rounded once: by the meter's rounding if that is of the total, or else half up to 1e-9. No members and
    nothing carried over is 0. ``opening`` counts only for a meter that carries over. ``period_us`` is the length of the
    billing period that the span is of, so that the time-weighted means of a period's segments add up.

    Raises ValueError for a level times time with a member outside the span.
    """
    stood = opening if meter.carries_over else None
    numerator, denominator = _exact(meter, members, Period(start_us, end_us), stood, period_us)
    if meter.derived_per == "total":
        return compile_derivation(meter)(numerator, denominator)
    return round_half_up_div(numerator, denominator)


def carried(meter: Meter, members: Iterable[Member], opening: Opening | None = None) -> Opening | None:
    """What the span after these members opens with; None for a meter that does not carry over.

    Of a max or min it is the last level, not the extreme. Whether the members of several spans come at once or span by
    span makes no difference.
    """
    if not meter.carries_over:
        return None
    opening = opening or Opening()
    match meter.aggregation:
        case "sum" | "count":
            return Opening(opening.quantity + sum(member.quantity for member in members))
        case "unique":
            return Opening(texts=opening.texts.union(member.text for member in members))
        case _:
            levels = [level for _, level in _levels(meter, members, opening)]
            return Opening(levels[-1]) if levels else opening


def standing(
    meter: Meter, members: Iterable[Member], span: Period, opening: Opening | None = None
) -> Iterator[tuple[Quantity, Micros]]:
    """The levels of a span in order of time, each with how long it stood (µs): from the opening, or 0, to the end.

    Raises ValueError for a member outside the span.
    """
    level, since_us = 0 if opening is None else opening.quantity, span.start_us
    for at_us, next_level in _levels(meter, members, opening):
        if not span.start_us <= at_us < span.end_us:
            raise ValueError(
                f"expected members from {format_instant(span.start_us)} until before {format_instant(span.end_us)}, "
                f"got one at {format_instant(at_us)}"
            )
        yield level, at_us - since_us
        level, since_us = next_level, at_us
    yield level, span.end_us - since_us


def _exact(
    meter: Meter, members: Iterable[Member], span: Period, opening: Opening | None, period_us: Micros
) -> tuple[int, int]:
    """The quantity before any rounding, as numerator in units of 1e-9 and denominator."""
    stood = 0 if opening is None else opening.quantity
    match meter.aggregation:
        case "sum" | "count":
            return stood + sum(member.quantity for member in members), 1
        case "unique":
            seen = frozenset() if opening is None else opening.texts
            return len(seen.union(member.text for member in members)) * QUANTITY_ONE, 1
        case "average":
            quantities = [member.quantity for member in members]
            return sum(quantities), len(quantities) or 1
        case "time_weighted":
            assert meter.time_unit is not None  # faults saw to it
            unit_us = period_us if meter.time_unit == "period" else _UNIT_US[meter.time_unit]
            return sum(level * time_us for level, time_us in standing(meter, members, span, opening)), unit_us
        case aggregation:
            levels = [] if opening is None else [stood]
            levels += [level for _, level in _levels(meter, members, opening)]
            if not levels:
                return 0, 1
            return _OF_LEVELS[aggregation](levels), 1


def _levels(meter: Meter, members: Iterable[Member], opening: Opening | None) -> Iterator[tuple[Micros, Quantity]]:
    """The level after each event, in order of time, then key."""
    level = 0 if opening is None else opening.quantity
    for at_us, _, quantity, *_ in sorted(members):
        level = level + quantity if meter.level == "add" else quantity
        yield at_us, level


_OF_LEVELS: dict[str, Callable[[list[Quantity]], Quantity]] = {
    "max": max,
    "min": min,
    "latest": lambda levels: levels[-1],
}
_UNIT_US: dict[TimeUnit, Micros] = {
    "second": 1_000_000,
    "minute": 60 * 1_000_000,
    "hour": 3600 * 1_000_000,
    "day": 24 * 3600 * 1_000_000,
}
