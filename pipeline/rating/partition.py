"""One source partition: its queue, its thread, its state and its producer, from assignment to revocation.

Both topics of a partition (events and retry) go through here, one batch at a time, so that one state and one producer
see everything in one order. The event loop only hands over fetched lists; whatever blocks, blocks this thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.periods import to_micros
from pipeline.core.usage import ParkedRecord, Record
from pipeline.infra.avro import DEAD_LETTER, Schemas, WireError
from pipeline.infra.logs import get_logger
from pipeline.infra.topics import Topics
from pipeline.rating.batch import (
    NO_EVENTS_FAULT,
    Batch,
    Outcome,
    Shape,
    Source,
    any_due,
    process,
    process_one_by_one,
)
from pipeline.rating.catalog_feed import STALE_S, CatalogFeed
from pipeline.rating.changelog import day_of
from pipeline.rating.commit import BatchAborted, Committer, Membership, new_producer
from pipeline.rating.faust_batches import Fetched
from pipeline.rating.state import PartitionState
from pipeline.rating.take import Interrupted, UsageLost, take

log = get_logger(__name__)

#: Largest batch by bytes: what one transaction may have to hold in memory.
BATCH_BYTES_MAX = 32 * 1024 * 1024
#: A parked batch is looked at this often for a catalog change.
_RETRY_LOOK_S = 0.25
#: Pause before an aborted batch is tried again, while the group decides who owns the partition.
_ABORT_PAUSE_S = 0.2
#: Aborts of one batch after which the worker gives up: a rebalance would have taken it away long before.
_ABORTS_MAX = 300
#: Batches of events after which parked ones get a turn, however many events wait.
_EVENTS_IN_A_ROW = 10
_CATALOG_LOOK_S = 0.5
#: How long, and how often, lists may begin behind a hole before it is certain that the log no longer holds what is
#: missing: after a seek those may still come that were on their way, and a fetch that waits at the broker.
_HOLE_S, _HOLE_TIMES = 5.0, 5
#: Parked records are written back at most at this pace, milliseconds a record, however their due times are spread.
_WRITE_BACK_MS = 5
#: A full batch of parked records is moved behind those that came after it at the latest after this long.
_RETRY_ROTATE_MS = 60_000


@dataclass(frozen=True, slots=True)
class RaterConfig:
    """What all partitions of a worker share."""

    kafka: dict[str, Any]
    group: str
    topics: Topics
    schemas: Schemas
    shape: Shape
    batch_records: int
    state_dir: Path
    stamp: dict[str, str]
    worker: str


class PartitionListener:
    """What a partition tells its worker. Called from the partition's thread."""

    def full(self, partition: int, source: Source, is_full: bool) -> None:
        """Stop or resume fetching of one source."""

    def seek(self, partition: int, source: Source, offset: int) -> None:
        """Fetch again from an offset: the log has records before what came."""

    def failed(self, partition: int, error: BaseException) -> None:
        """The worker must exit."""

    def committed(self, partition: int, batch: Batch, outcome: Outcome, seconds: float) -> None:
        """A batch became true."""


class PartitionRater(threading.Thread):
    """Owner of one partition."""

    def __init__(
        self,
        partition: int,
        membership: Membership,
        config: RaterConfig,
        feed: CatalogFeed,
        listener: PartitionListener,
        *,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        super().__init__(name=f"partition-{partition}", daemon=True)
        self.partition = partition
        self.next_offsets: dict[Source, int] = {}
        self._membership = membership
        self._config = config
        self._feed = feed
        self._listener = listener
        self._on_step = on_step
        self._queues: dict[Source, deque[Fetched]] = {source: deque() for source in Source}
        self._queued = dict.fromkeys(Source, 0)
        self._full = dict.fromkeys(Source, False)
        # Offset of the last hole in what came, how often it was met, and since when.
        self._holes: dict[Source, tuple[int, int, float]] = {}
        self._changed = threading.Condition()
        self._committer: Committer | None = None
        self._stopping = False
        self._in_a_row = 0
        # Parked records taken from the queue and not due yet.
        self._held: Batch | None = None
        self._held_until_ms = 0
        self._written_back_ms = 0
        # Catalog offset they were last looked at with, how far that look has to go, and if those in hand had theirs.
        self._catalog_seen = -1
        self._look_until = 0
        self._looked = False

    # -- from the event loop

    @property
    def stuck(self) -> bool:
        """Does the thread wait in a call that will not come back?"""
        return self._committer is not None and self._committer.stuck

    def offer(self, source: Source, fetched: Fetched) -> None:
        """Queue a fetched list. Never blocks; says ``full`` when there is enough."""
        with self._changed:
            self._queues[source].append(fetched)
            self._queued[source] += len(fetched.records)
            self._tell_full(source)
            self._changed.notify()

    def stop(self) -> None:
        """Stop after the batch in hand. ``join`` waits for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    # -- the thread

    def run(self) -> None:
        state: PartitionState | None = None
        try:
            config = self._config
            state = PartitionState(config.state_dir / str(self.partition), config.stamp)
            # Made here and given up with the thread: a fenced producer is never initialised again.
            producer = new_producer(config.kafka, f"{config.topics.prefix}rater-{self.partition}")
            started = time.monotonic()
            taken = take(
                producer,
                state,
                kafka=config.kafka,
                group=config.group,
                topics=config.topics,
                partition=self.partition,
                stopped=lambda: self._stopping,
            )
            self.next_offsets = taken.next_offsets
            log.info(
                "partition_taken",
                partition=self.partition,
                generation=self._membership.generation,
                restored_identities=taken.restored_seen,
                restored_totals=taken.restored_totals,
                seconds=round(time.monotonic() - started, 3),
            )
            committer = self._committer = Committer(
                producer,
                topics=config.topics,
                schemas=config.schemas,
                partition=self.partition,
                partitions=config.shape.partitions,
                worker=config.worker,
                stopped=lambda: self._stopping,
                on_step=self._on_step,
            )
            while (batch := self._next_batch()) is not None:
                self._rate(batch, committer, state)
        except Interrupted:
            pass
        except BaseException as error:  # noqa: BLE001  handed on: the worker must exit
            self._listener.failed(self.partition, error)
        finally:
            if state is not None:
                state.close()

    def _rate(self, batch: Batch, committer: Committer, state: PartitionState) -> None:
        """Process and commit a batch; when its transaction is aborted, again, unless the partition went."""
        aborted = 0
        while True:
            self._await_catalog()
            started = time.monotonic()
            view = self._feed.view
            try:
                outcome = process(batch, state, view, self._config.shape)
            except NO_EVENTS_FAULT:
                raise
            except Exception as error:
                log.exception("batch_failed", partition=self.partition, first_offset=batch.first_offset)
                outcome, errors = process_one_by_one(batch, state, view, self._config.shape)
                if not errors:
                    log.error("batch_failed_only_as_a_whole", partition=self.partition, error=repr(error))
            try:
                committer.commit(batch, outcome, view.offset, self._membership, state)
            except BatchAborted as error:
                aborted += 1
                if aborted == 1:
                    log.warning("batch_aborted", partition=self.partition, error=str(error))
                if aborted > _ABORTS_MAX:
                    raise
                with self._changed:
                    if self._stopping:
                        raise Interrupted from error
                    self._changed.wait(_ABORT_PAUSE_S)
                continue
            self.next_offsets[batch.source] = batch.next_offset
            if batch.source is Source.EVENTS and batch.records:
                # Neither clock alone may make it forget: the broker's could jump ahead, this machine's too.
                state.forget_before(day_of(min(batch.records[-1].timestamp, batch.now_ms)))
            self._listener.committed(self.partition, batch, outcome, time.monotonic() - started)
            return

    def _await_catalog(self) -> None:
        """Wait while the catalog may have prices this worker does not know. Raises Interrupted when stopped."""
        if self._feed.age_s <= STALE_S:
            return
        log.warning("catalog_away", partition=self.partition, seconds=round(self._feed.age_s))
        while self._feed.age_s > STALE_S:
            with self._changed:
                if self._stopping:
                    raise Interrupted
                self._changed.wait(_CATALOG_LOOK_S)
        log.info("catalog_back", partition=self.partition)

    # -- the next batch

    def _next_batch(self) -> Batch | None:
        """Wait for a batch that may be processed now; None when stopping."""
        with self._changed:
            while not self._stopping:
                first, second = self._in_turn()
                batch = first() or second()
                if batch is not None:
                    self._in_a_row = self._in_a_row + 1 if batch.source is Source.EVENTS else 0
                    return batch
                self._changed.wait(None if self._held is None else _RETRY_LOOK_S)
        return None

    def _in_turn(self) -> tuple[Callable[[], Batch | None], Callable[[], Batch | None]]:
        """Events come first; after a row of their batches the parked ones do, or a backlog would starve them."""

        def events() -> Batch | None:
            return self._merge(Source.EVENTS)

        if self._in_a_row < _EVENTS_IN_A_ROW:
            return events, self._due_retry
        self._in_a_row = 0
        return self._due_retry, events

    def _merge(self, source: Source, start: int | None = None, held: int = 0, size: int = 0) -> Batch | None:
        """Join queued lists to one batch; cut what was processed before; ask again for what is missing.

        ``start``, ``held`` records and ``size`` bytes: what there is of the batch already, if not nothing.
        """
        queue = self._queues[source]
        records: list[Record] = []
        start = at = self.next_offsets[source] if start is None else start
        while queue and size < BATCH_BYTES_MAX:
            fetched = queue[0]
            if fetched.from_offset > at:
                if at > start:
                    break  # commit what came before the hole first
                self._seek_hole(source, at, fetched)
                return None
            room = self._config.batch_records - held - len(records)
            if room <= 0:
                break
            queue.popleft()
            self._queued[source] -= len(fetched.records)
            if fetched.next_offset <= at:
                continue
            some: Sequence[Record] = fetched.records
            if fetched.from_offset < at:
                some = [record for record in some if record.offset >= at]
            at = fetched.next_offset
            if len(some) > room:
                some, rest = some[:room], list(some[room:])
                at = some[-1].offset + 1
                queue.appendleft(fetched._replace(from_offset=at, records=rest))
                self._queued[source] += len(rest)
            records.extend(some)
            size += sum(len(record.value or b"") for record in some)
        self._tell_full(source)
        if at == start:
            return None
        return Batch(source, self.partition, start, at, records, _now_ms())

    def _due_retry(self) -> Batch | None:
        """The parked records in hand, once the first of them is due or the catalog may have an answer for one."""
        self._extend_held()
        if self._held is None:
            return None
        held = replace(self._held, now_ms=_now_ms())
        view, behind = self._feed.view, self._queues[Source.RETRY]
        if view.offset != self._catalog_seen:
            # What is queued behind is looked at too: each batch up to there is written back, and the next one taken.
            self._catalog_seen = view.offset
            self._look_until = behind[-1].next_offset if behind else held.next_offset
            self._looked = False
        due = held.now_ms >= self._held_until_ms
        if not due and not self._looked:
            self._looked = True
            in_the_way = bool(behind) and held.next_offset <= self._look_until
            due = in_the_way or any_due(held, view, self._config.shape)
        if not due:
            return None
        self._held = None
        self._written_back_ms = held.now_ms
        return held

    def _extend_held(self) -> None:
        """Take what came of parked records into hand, as far as a batch holds it, and decide when to look at them."""
        held = self._held
        if not self._queues[Source.RETRY]:
            return
        if held is None:
            more = self._merge(Source.RETRY)
        else:
            size = sum(len(record.value or b"") for record in held.records)
            more = self._merge(Source.RETRY, held.next_offset, len(held.records), size)
        if more is None:
            return
        records: list[Record] = [unpark(record, self._config.schemas) for record in more.records]
        if held is not None:
            more = replace(more, first_offset=held.first_offset, now_ms=held.now_ms, records=[*held.records, *records])
        else:
            more = replace(more, records=records)
        due_ms = min((r.not_before_ms if isinstance(r, ParkedRecord) else 0 for r in more.records), default=0)
        # All of them are written again when the first is due: many at once, seldom.
        self._held_until_ms = max(due_ms, self._written_back_ms + len(more.records) * _WRITE_BACK_MS)
        if self._queues[Source.RETRY]:
            self._held_until_ms = min(self._held_until_ms, more.now_ms + _RETRY_ROTATE_MS)
        self._held, self._looked = more, False

    def _seek_hole(self, source: Source, at: int, fetched: Fetched) -> None:
        """Fetch again from ``at``. Raises UsageLost when that keeps bringing later records only."""
        known, times, since = self._holes.get(source, (None, 0, 0.0))
        times, since = (times + 1, since) if known == at else (1, time.monotonic())
        self._holes[source] = (at, times, since)
        if times > _HOLE_TIMES and time.monotonic() - since > _HOLE_S:
            raise UsageLost(
                f"{fetched.tp.topic}/{self.partition}: expected records from offset {at}, but fetching from there "
                f"brings none before {fetched.from_offset}: they were deleted before they were rated"
            )
        self._queues[source].clear()
        self._queued[source] = 0
        self._tell_full(source)
        self._listener.seek(self.partition, source, at)

    def _tell_full(self, source: Source) -> None:
        full = self._queued[source] >= 2 * self._config.batch_records
        if full != self._full[source]:
            self._full[source] = full
            self._listener.full(self.partition, source, full)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def unpark(record: Record, schemas: Schemas) -> Record:
    """The parked event in a message of ``usage.retry``; the message itself when it holds none."""
    try:
        letter = schemas.decode(record.value, DEAD_LETTER)
    except WireError:
        return record
    return ParkedRecord(
        topic=letter["origin_topic"],
        partition=letter["origin_partition"],
        offset=letter["origin_offset"],
        timestamp=to_micros(letter["origin_appended_at"]) // 1000,
        key=letter["key"],
        value=letter["value"],
        letter=record.value or b"",
        letter_key=record.key,
        attempts=letter["attempts"],
        replays=letter["replays"],
        parked_at_ms=to_micros(letter["parked_at"]) // 1000,
        not_before_ms=to_micros(letter["not_before"]) // 1000,
        catalog_offset=letter["catalog_offset"],
    )
