"""One source partition: its queue, its thread, its state and its producer, from assignment to revocation.

Both topics of a partition (events and retry) go through here, one batch at a time, so that one state and one producer
see everything in one order. The event loop only hands over fetched lists; whatever blocks, blocks this thread.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.catalog import STALE_S
from pipeline.core.corrections import Correction
from pipeline.core.limits import Limits
from pipeline.core.periods import to_micros
from pipeline.core.usage import ParkedRecord, Record
from pipeline.infra.avro import CORRECTIONS, DEAD_LETTER, Schemas, WireError
from pipeline.infra.avro import Record as Letter
from pipeline.infra.going_on import GoingOn
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
from pipeline.rating.catalog_feed import CatalogFeed
from pipeline.rating.changelog import day_of
from pipeline.rating.commit import BatchAborted, Committer, Membership, new_producer
from pipeline.rating.correct import CorrectionRecord
from pipeline.rating.faust_batches import Fetched
from pipeline.rating.gate import Gate
from pipeline.rating.inbox import Hole, Inbox, Run
from pipeline.rating.pace import Pace
from pipeline.rating.retry_queue import RetryQueue
from pipeline.rating.state import PartitionState
from pipeline.rating.take import Interrupted, UsageLost, take, until_decided

log = get_logger(__name__)

#: Largest batch by bytes: what one transaction may have to hold in memory.
BATCH_BYTES_MAX = 32 * 1024 * 1024
#: How often to look if parked records in hand are due, the catalog has news for them, or stopped events may go on.
_LOOK_S = 0.25
#: Pause before an aborted batch is tried again, while the group decides who owns the partition.
_ABORT_PAUSE_S = 0.2
#: Aborts of one batch after which the worker gives up: a rebalance would have taken it away long before.
_ABORTS_MAX = 300
#: Batches of events after which parked ones get a turn, however many events wait.
_EVENTS_IN_A_ROW = 10
_CATALOG_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class RaterConfig:
    """What all partitions of a worker share."""

    kafka: dict[str, Any]
    group: str
    topics: Topics
    schemas: Schemas
    shape: Shape
    batch_records: int
    limits: Limits
    going_on: GoingOn
    state_dir: Path
    stamp: dict[str, str]
    worker: str
    snapshot_dir: Path | None = None
    snapshot_interval_s: float = 600.0
    #: Held by the one partition that computes. All need the interpreter's lock for that; without a turn they take it
    #: from each other at every record, and each finds the processor's cache full of another's data: a tenth more time.
    turn: threading.Lock = field(default_factory=threading.Lock)

    def open_state(self, partition: int) -> PartitionState:
        """The state of a partition on this worker's disk. Raises StateFailed."""
        return PartitionState(
            self.state_dir / str(partition),
            self.stamp,
            snapshots=None if self.snapshot_dir is None else self.snapshot_dir / str(partition),
            snapshot_interval_s=self.snapshot_interval_s,
        )


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

    def aborted(self, partition: int) -> None:
        """A batch's transaction was aborted; it runs again."""

    def stopped(self, partition: int, why: str | None) -> None:
        """A limit stopped the partition's events; None: they go on."""


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
        interval_s: float = 0.0,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """``interval_s``: for how long events gather between the beginnings of two transactions."""
        super().__init__(name=f"partition-{partition}", daemon=True)
        self.partition = partition
        self.next_offsets: dict[Source, int] = {}
        self.seen_keys = 0
        self._membership = membership
        self._config = config
        self._feed = feed
        self._listener = listener
        self._on_step = on_step
        self._inboxes = {source: Inbox(config.batch_records) for source in Source}
        self._full = dict.fromkeys(Source, False)
        self._retry_queue = RetryQueue()
        self._pace = Pace(interval_s, config.batch_records)
        self._changed = threading.Condition()
        self._committer: Committer | None = None
        self._stopping = False
        self._in_a_row = 0
        self._gate = Gate(partition, config.limits, config.going_on, listener.stopped)

    # -- from the event loop

    @property
    def stuck(self) -> bool:
        """Does the thread wait in a call that will not come back?"""
        return self._committer is not None and self._committer.stuck

    @property
    def stopped_by(self) -> str | None:
        """Why its events wait for a person; None when they do not."""
        return self._gate.stopped_by

    def offer(self, source: Source, fetched: Fetched) -> None:
        """Queue a fetched list. Never blocks; says ``full`` when there is enough."""
        with self._changed:
            inbox = self._inboxes[source]
            first = not inbox
            inbox.add(fetched)
            self._tell_full(source)
            # Where events gather already, the thread knows when to look, unless they have become enough.
            if first or source is Source.RETRY or not self._pace.wait_s(inbox.records, time.monotonic()):
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
            state = config.open_state(self.partition)
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
            until_decided(
                lambda: self._gate.begin(taken.note, taken.next_offsets[Source.EVENTS]), lambda: self._stopping
            )
            self.next_offsets, self.seen_keys = taken.next_offsets, state.seen_keys
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
                turn=config.turn,
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
                with self._config.turn:
                    outcome = process(batch, state, view, self._config.shape)
            except NO_EVENTS_FAULT:
                raise
            except Exception as error:
                log.exception("batch_failed", partition=self.partition, first_offset=batch.first_offset)
                outcome, errors = process_one_by_one(batch, state, view, self._config.shape)
                if not errors:
                    log.error("batch_failed_only_as_a_whole", partition=self.partition, error=repr(error))
            verdict = self._gate.judge(batch, outcome) if batch.source is Source.EVENTS else None
            try:
                committer.commit(batch, outcome, view.offset, self._membership, state, verdict.note if verdict else "")
            except BatchAborted as error:
                aborted += 1
                self._listener.aborted(self.partition)
                if aborted == 1:
                    log.warning("batch_aborted", partition=self.partition, error=str(error))
                if aborted > _ABORTS_MAX:
                    raise
                with self._changed:
                    if self._stopping:
                        raise Interrupted from error
                    self._changed.wait(_ABORT_PAUSE_S)
                continue
            if verdict is not None:
                self._gate.committed(verdict, batch.next_offset)
            self.next_offsets[batch.source], self.seen_keys = batch.next_offset, state.seen_keys
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
        while True:
            # Asks Kafka: not under the lock, which the event loop takes too.
            self._gate.look(self.next_offsets[Source.EVENTS])
            with self._changed:
                if self._stopping:
                    return None
                first, second = self._in_turn()
                batch = first() or second()
                if batch is not None:
                    self._in_a_row = self._in_a_row + 1 if batch.source is Source.EVENTS else 0
                    return batch
                self._changed.wait(self._look_again_s())

    def _look_again_s(self) -> float | None:
        """How long to wait for something to come before looking anyway; None: until it does."""
        looks = [_LOOK_S] if self._retry_queue.held is not None or self._gate.stopped_by is not None else []
        if (events := self._inboxes[Source.EVENTS]) and self._gate.stopped_by is None:
            looks.append(self._pace.wait_s(events.records, time.monotonic()))
        return min(looks, default=None)

    def _in_turn(self) -> tuple[Callable[[], Batch | None], Callable[[], Batch | None]]:
        """Events come first; after a row of their batches the parked ones do, or a backlog would starve them."""
        if self._in_a_row < _EVENTS_IN_A_ROW:
            return self._events, self._parked
        self._in_a_row = 0
        return self._parked, self._events

    def _events(self) -> Batch | None:
        """Events that came, unless a limit stopped them or more of them are waited for."""
        now_s = time.monotonic()
        if self._gate.stopped_by is not None or self._pace.wait_s(self._inboxes[Source.EVENTS].records, now_s):
            return None
        run = self._take(Source.EVENTS, self.next_offsets[Source.EVENTS], self._config.batch_records, BATCH_BYTES_MAX)
        if run is None:
            return None
        self._pace.begun(now_s)
        return Batch(Source.EVENTS, self.partition, *run, _now_ms())

    def _parked(self) -> Batch | None:
        """Parked events, once the first of them is due or the catalog may have an answer for one."""
        config, queue, view, inbox = self._config, self._retry_queue, self._feed.view, self._inboxes[Source.RETRY]
        if inbox:
            start, records, size = self.next_offsets[Source.RETRY], 0, 0
            if (held := queue.held) is not None:
                start, records = held.next_offset, len(held.records)
                size = sum(len(record.value or b"") for record in held.records)
            run = self._take(Source.RETRY, start, config.batch_records - records, BATCH_BYTES_MAX - size)
            if run is not None:
                came = [unpark(record, config.schemas) for record in run.records]
                batch = Batch(Source.RETRY, self.partition, run.first_offset, run.next_offset, came, _now_ms())
                queue.add(batch, behind=bool(inbox))
        return queue.due(_now_ms(), view.offset, inbox.end, lambda held: any_due(held, view, config.shape))

    def _take(self, source: Source, start: int, records_max: int, bytes_max: int) -> Run | None:
        """What came from ``start`` on. What is missing is fetched again; raises UsageLost when it never comes."""
        inbox = self._inboxes[source]
        run = inbox.take(start, records_max, bytes_max)
        if isinstance(run, Hole):
            if inbox.drop_behind(run, time.monotonic()):
                raise UsageLost(
                    f"{source} of partition {self.partition}: expected records from offset {run.expected}, but "
                    f"fetching from there brings none before {run.found}: they were deleted before they were rated"
                )
            self._listener.seek(self.partition, source, run.expected)
            run = None
        self._tell_full(source)
        return run

    def _tell_full(self, source: Source) -> None:
        full = self._inboxes[source].full
        if full != self._full[source]:
            self._full[source] = full
            self._listener.full(self.partition, source, full)


def _could_be_written(letter: Letter) -> bool:
    """Could a rater or a replay have written it? Else its numbers lead where no calendar and no back-off does."""
    return bool(
        0 <= letter["origin_partition"] <= _INT_MAX
        and letter["origin_offset"] >= 0
        and _YEAR_FIRST <= letter["origin_appended_at"].year <= _YEAR_LAST
        and 0 <= letter["attempts"] < _INT_MAX  # one more has to fit
        and 0 <= letter["replays"] <= _INT_MAX
    )


_INT_MAX = 2**31 - 1
#: Years in which every time zone can count, as in the catalog.
_YEAR_FIRST, _YEAR_LAST = 1970, 9998
_TIMESTAMP_MAX_MS = to_micros(datetime(_YEAR_LAST, 1, 1, tzinfo=UTC)) // 1000


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def unpark(record: Record, schemas: Schemas) -> Record:
    """The parked event or correction in a message of ``usage.retry``; the message itself when it holds neither."""
    try:
        letter = schemas.decode(record.value, DEAD_LETTER)
    except WireError:
        return _correction(record, schemas)
    if not _could_be_written(letter):
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


def _correction(record: Record, schemas: Schemas) -> Record:
    """The correction in a message; the message itself when it holds none."""
    try:
        said = Correction.from_record(schemas.decode(record.value, CORRECTIONS))
    except (WireError, ValueError):
        return record
    if not 0 <= record.timestamp <= _TIMESTAMP_MAX_MS:  # its producer's word, and what it is remembered by
        return record
    return CorrectionRecord(record.offset, record.timestamp, record.key, record.value or b"", said)
