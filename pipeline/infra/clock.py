"""Instants between the forms they travel in. Reading the clock is left to those who need to know the time."""

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICRO = timedelta(microseconds=1)


def micros(instant: datetime) -> int:
    """Microseconds since 1970 UTC of an aware instant, exactly (a float of seconds would lose the last digits)."""
    return (instant - EPOCH) // _MICRO


def instant(micros: int) -> datetime:
    """The UTC instant of microseconds since 1970. Raises OverflowError outside the years 1 to 9999."""
    return EPOCH + timedelta(microseconds=micros)
