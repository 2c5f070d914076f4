"""Lengths of time as they are typed: 30s, 15m, 2h, 1d."""

import re
from datetime import timedelta

_DURATION = re.compile(r"([0-9]{1,6})([smhd])")
_UNIT = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def duration(text: str) -> timedelta | None:
    """A number of seconds, minutes, hours or days; None for any other text."""
    match = _DURATION.fullmatch(text)
    return None if match is None else timedelta(**{_UNIT[match[2]]: int(match[1])})
