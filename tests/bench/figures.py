"""What a figure is, and how the runs behind it become one: by the median, ratios run by run."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Runs behind every figure that is compared with a peer's, in turn with it.
RUNS = 3


class Skipped(Exception):
    """This machine lacks what the figure needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    #: ours / peer's, run by run, median
    ratio: float | None = None

    def as_json(self) -> dict[str, object]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


def compared(name: str, unit: str, ours: Sequence[float], peer: str, peers: Sequence[float]) -> Figure:
    """A figure beside a peer's, of runs that took turns."""
    ratio = median(mine / theirs for mine, theirs in zip(ours, peers, strict=True))
    return Figure(name, median(ours), unit, peer, median(peers), ratio)


def median(values: Iterable[float]) -> float:
    return float(statistics.median(values))
