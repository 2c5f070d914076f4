"""When a partition has refused so much that it stops: a bad deploy must not drain a whole topic into dead letters.

Two limits: dead letters in a row, and their share of the last records. What they look at travels in the metadata of
the committed offset, as ``note``: as durable as the offset itself, moved with it, and shown by ``tally status``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Limits:
    """How many dead letters a partition takes."""

    run_max: int  #: in a row; 0 means no limit
    percent_max: int  #: of the last ``window`` records; 100 means no limit
    window: int  #: records, at least 1


@dataclass(frozen=True, slots=True)
class Refusals:
    """What the limits look at, up to one offset of a partition."""

    run: int = 0  #: dead letters in a row, at the end
    longest: int = 0  #: longest row of them that ended in the last batch, or has not ended
    #: (records, dead letters) of the last batches: as few as hold a window, or all there were.
    batches: tuple[tuple[int, int], ...] = ()

    def then(self, count: int, dead: Sequence[int], window: int) -> Self:
        """After one more batch of ``count`` records; ``dead``: which of them, in order, became dead letters."""
        run, longest, before = self.run, 0, -1
        for index in dead:
            run = run + 1 if index == before + 1 else 1
            longest, before = max(longest, run), index
        if before < count - 1:
            run = 0
        batches = (*self.batches, (count, len(dead)))
        records = sum(count for count, _ in batches)
        first = 0
        while records - batches[first][0] >= window:
            records -= batches[first][0]
            first += 1
        return type(self)(run, longest, batches[first:])

    def broken(self, limits: Limits) -> str | None:
        """Which limit is broken, in words; None when none is. A share counts once there is a whole window."""
        if 0 < limits.run_max < self.longest:
            return f"{self.longest:,} dead letters in a row (limit {limits.run_max:,})"
        records, dead = self._sums()
        if records >= limits.window and dead * 100 > limits.percent_max * records:
            return f"{dead:,} dead letters among the last {records:,} records (limit {limits.percent_max} %)"
        return None

    def note(self, stopped: str | None) -> str:
        """As text of at most a few hundred bytes; ``stopped``: why the partition stops here, if it does."""
        records, dead = self._sums()
        note = {"run": self.run, "longest": self.longest, "records": records, "dead": dead, "stopped": stopped}
        return json.dumps(note)

    @classmethod
    def from_note(cls, note: str | None) -> Self:
        """Read back; whatever is no note (an offset set by another tool has none) begins anew."""
        match _parsed(note):
            case {"run": int(run), "longest": int(longest), "records": int(records), "dead": int(dead)}:
                return cls(run, longest, ((records, dead),))
        return cls()

    def _sums(self) -> tuple[int, int]:
        return sum(count for count, _ in self.batches), sum(dead for _, dead in self.batches)


def stopped_by(note: str | None) -> str | None:
    """Why a partition stopped, as its note says; None when it did not."""
    match _parsed(note):
        case {"stopped": str(why)}:
            return why
    return None


def _parsed(note: str | None) -> object:
    try:
        return json.loads(note or "")
    except ValueError:
        return None
