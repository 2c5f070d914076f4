"""The parked records of a partition, between being fetched and being tried again.

Trying is cheap, writing back is not: a parked record whose time has not come is written to the retry topic again with
the batch it stands in. So records are kept in hand until the first of them is due, or the catalog may have an answer
for one, and then all go at once. Pure: times are arguments, milliseconds since 1970 UTC.
"""

from collections.abc import Callable
from dataclasses import replace

from pipeline.core.usage import ParkedRecord
from pipeline.rating.batch import Batch
from pipeline.rating.correct import CorrectionRecord

#: Parked records are written back at most at this pace, milliseconds a record, however their due times are spread.
_WRITE_BACK_MS = 5
#: A full hand of parked records is moved behind those that came after it at the latest after this long.
_ROTATE_MS = 60_000


class RetryQueue:
    """Holds at most one batch, ``held``: the oldest parked records, in the order of the topic."""

    def __init__(self) -> None:
        self.held: Batch | None = None
        self._until_ms = 0
        self._handed_out_ms = 0
        # Catalog offset they were last looked at with, how far that look has to go, and if those in hand had theirs.
        self._catalog_seen = -1
        self._look_until = 0
        self._looked = False

    def add(self, more: Batch, *, behind: bool) -> None:
        """Take the batch that follows into hand too, and decide when to try. ``behind``: did more come than fits?"""
        held = self.held
        if held is not None:
            records = [*held.records, *more.records]
            more = replace(more, first_offset=held.first_offset, now_ms=held.now_ms, records=records)
        kept = (ParkedRecord, CorrectionRecord)
        due_ms = min((r.not_before_ms if isinstance(r, kept) else 0 for r in more.records), default=0)
        # All of them are written again when the first is due: many at once, seldom.
        self._until_ms = max(due_ms, self._handed_out_ms + len(more.records) * _WRITE_BACK_MS)
        if behind:
            self._until_ms = min(self._until_ms, more.now_ms + _ROTATE_MS)
        self.held, self._looked = more, False

    def due(
        self, now_ms: int, catalog_offset: int, behind_end: int | None, answered: Callable[[Batch], bool]
    ) -> Batch | None:
        """Hand out what is held, if its time has come or the catalog may have ``answered`` for a record of it.

        ``behind_end``: the offset after what waits behind, None when nothing does. ``answered`` is asked once for each
        hand and catalog offset.
        """
        if self.held is None:
            return None
        held = replace(self.held, now_ms=now_ms)
        if catalog_offset != self._catalog_seen:
            # What waits behind is looked at too: each batch up to there is written back, and the next one taken.
            self._catalog_seen = catalog_offset
            self._look_until = held.next_offset if behind_end is None else behind_end
            self._looked = False
        due = now_ms >= self._until_ms
        if not due and not self._looked:
            self._looked = True
            in_the_way = behind_end is not None and held.next_offset <= self._look_until
            due = in_the_way or answered(held)
        if not due:
            return None
        self.held = None
        self._handed_out_ms = now_ms
        return held
