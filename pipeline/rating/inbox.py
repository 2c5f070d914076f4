"""Fetched lists of one source of a partition, on their way into batches. Pure: no thread, no clock of its own."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.core.usage import Record
from pipeline.rating.faust_batches import Fetched

#: How long, and how often, lists may begin behind a hole before it is certain that the log no longer holds what is
#: missing: after a seek those may still come that were on their way, and a fetch that waits at the broker.
_HOLE_S, _HOLE_TIMES = 5.0, 5


class Run(NamedTuple):
    """All records in ``[first_offset, next_offset)``."""

    first_offset: int
    next_offset: int
    records: list[Record]


class Hole(NamedTuple):
    """Offsets from ``expected`` up to ``found`` were passed over by the fetch: dropped on the way, or deleted."""

    expected: int
    found: int


class Inbox:
    """What was fetched and not processed yet, in order."""

    def __init__(self, batch_records: int) -> None:
        """``batch_records``: the most a batch takes; two batches' worth make the inbox full."""
        self._full_at = 2 * batch_records
        self._lists: deque[Fetched] = deque()
        self._records = 0
        # Offset of the last hole, how often it was met, and since when (seconds, monotonic).
        self._hole: tuple[int, int, float] = (-1, 0, 0.0)

    def __bool__(self) -> bool:
        return bool(self._lists)

    @property
    def records(self) -> int:
        """How many wait."""
        return self._records

    @property
    def full(self) -> bool:
        """Is there enough to stop fetching?"""
        return self._records >= self._full_at

    @property
    def end(self) -> int | None:
        """The offset after all that was fetched; None when nothing waits."""
        return self._lists[-1].next_offset if self._lists else None

    def add(self, fetched: Fetched) -> None:
        self._lists.append(fetched)
        self._records += len(fetched.records)

    def take(self, start: int, records_max: int, bytes_max: int) -> Run | Hole | None:
        """Join lists into one run from ``start``, cutting what lies before it; None when nothing follows.

        The run stops before a hole; one that begins with a hole is the hole.
        """
        lists, records, size, at = self._lists, list[Record](), 0, start
        while lists and size < bytes_max:
            fetched = lists[0]
            if fetched.from_offset > at:
                if at == start:
                    return Hole(at, fetched.from_offset)
                break  # what came before the hole is processed first
            room = records_max - len(records)
            if room <= 0:
                break
            lists.popleft()
            self._records -= len(fetched.records)
            if fetched.next_offset <= at:
                continue
            some: Sequence[Record] = fetched.records
            if fetched.from_offset < at:
                some = [record for record in some if record.offset >= at]
            at = fetched.next_offset
            if len(some) > room:
                some, rest = some[:room], list(some[room:])
                at = some[-1].offset + 1
                lists.appendleft(fetched._replace(from_offset=at, records=rest))
                self._records += len(rest)
            records.extend(some)
            size += sum(len(record.value or b"") for record in some)
        return None if at == start else Run(start, at, records)

    def drop_behind(self, hole: Hole, now_s: float) -> bool:
        """Forget what came, so that it is fetched again; True once that was done long and often enough in vain."""
        at, times, since = self._hole
        times, since = (times + 1, since) if at == hole.expected else (1, now_s)
        self._hole = (hole.expected, times, since)
        self._lists.clear()
        self._records = 0
        return times > _HOLE_TIMES and now_s - since > _HOLE_S
