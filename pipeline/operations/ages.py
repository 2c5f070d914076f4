"""Spans of time as people say them."""

from datetime import datetime


def span(seconds: float) -> str:
    """``45 s``, ``12 min``, ``5 h``, ``3 d``: the largest unit that holds two or more, rounded down."""
    seconds = max(seconds, 0)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def age(at: datetime | None, now: datetime) -> str:
    """How long ago that was; a dash where nobody knows."""
    return "–" if at is None else span((now - at).total_seconds())
