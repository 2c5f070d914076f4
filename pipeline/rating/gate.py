"""Whether a partition's events may go on: the dead-letter limits, what broke one of them, and a person's word.

The batch that breaks a limit is committed like any other, and its offset says that the partition stops there: the
letters are true, nothing waits half done, and whoever owns the partition next stays stopped too. Held back instead, it
would be refused anew by each owner, after as many letters as the limit allows, with nobody to look at them.
Parked and replayed events pass and do not count: no more of them come than were let in, and replays are a person's.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from confluent_kafka import KafkaException

from pipeline.core.limits import Limits, Refusals, stopped_by
from pipeline.infra.going_on import GoingOn
from pipeline.infra.kafka import passes
from pipeline.infra.logs import get_logger
from pipeline.rating.batch import Batch, Outcome

log = get_logger(__name__)

#: How often a stopped partition looks if a person lets it go on.
_LOOK_S = 1.0


class Verdict(NamedTuple):
    """What the limits look at once a batch is committed, and why that stops the partition, if it does."""

    refusals: Refusals
    why: str | None

    @property
    def note(self) -> str:
        """What is committed with the batch's offset."""
        return self.refusals.note(self.why)


class Gate:
    """The gate of one partition. Its owner's thread uses it; others may read ``stopped_by``."""

    def __init__(
        self, partition: int, limits: Limits, going_on: GoingOn, tell: Callable[[int, str | None], None]
    ) -> None:
        """``tell`` is called with the partition when it stops (why) and when it goes on (None)."""
        #: Why events wait for a person; None when they do not.
        self.stopped_by: str | None = None
        self._partition = partition
        self._limits = limits
        self._going_on = going_on
        self._tell = tell
        self._refusals = Refusals()
        # Below this offset a person minds no dead letters.
        self._free_until = 0
        self._next_look_s = 0.0

    def begin(self, note: str | None, next_offset: int) -> None:
        """Go on where the last owner was; where a limit had stopped it that would do so still, stay stopped.

        Raises KafkaException when the broker does not answer.
        """
        self._free_until = self._going_on.until(self._partition)
        if self._free_until >= next_offset:
            return
        self._refusals = Refusals.from_note(note)
        if stopped_by(note) is not None:
            self._stop(self._refusals.broken(self._limits), next_offset)

    def judge(self, batch: Batch, outcome: Outcome) -> Verdict:
        """What a batch of events does to the limits, if it is committed."""
        if batch.next_offset <= self._free_until:
            return Verdict(Refusals(), None)
        refused = {one.record.offset for one in outcome.dead}
        dead = [index for index, one in enumerate(batch.records) if one.offset in refused] if refused else []
        refusals = self._refusals.then(len(batch.records), dead, self._limits.window)
        return Verdict(refusals, refusals.broken(self._limits))

    def committed(self, verdict: Verdict, next_offset: int) -> None:
        """The batch of the verdict was committed: now it counts."""
        self._refusals = verdict.refusals
        self._stop(verdict.why, next_offset)

    def look(self, next_offset: int) -> None:
        """While stopped at ``next_offset``, ask Kafka now and then if a person lets it go on.

        Raises KafkaException for what no waiting mends.
        """
        if self.stopped_by is None or time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_S
        try:
            until = self._going_on.until(self._partition)
        except KafkaException as error:
            if not passes(error.args[0]):
                raise
            return
        if until >= next_offset:
            log.warning("partition_resumed", partition=self._partition, no_limit_before=until)
            self._free_until, self._refusals, self.stopped_by = until, Refusals(), None
            self._tell(self._partition, None)

    def _stop(self, why: str | None, next_offset: int) -> None:
        if why is None:
            return
        self.stopped_by = why
        log.error(
            "partition_stopped",
            partition=self._partition,
            next_offset=next_offset,
            why=why,
            then=f"its events wait: `tally dlq list`, mend the cause, then `tally dlq resume {self._partition}`",
        )
        self._tell(self._partition, why)
