"""One batch becomes true: the transaction protocol between a partition's rater, Kafka and the local state.

Exceptions
----------
CommitError
├── BatchAborted   nothing of the batch happened; it may be processed again
└── StateUnknown   fenced, fatal, or an outcome nobody can tell: the worker must exit and restore
"""

import hashlib
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from pipeline.core.periods import to_micros
from pipeline.core.usage import ParkedRecord, Refused
from pipeline.infra.avro import DEAD_LETTER, RECEIPTS, Record, Schemas
from pipeline.infra.kafka import passes
from pipeline.infra.logs import get_logger
from pipeline.infra.topics import RECORD_BYTES_MAX, Topics, partition_of
from pipeline.rating.batch import Batch, Outcome, Source, not_before_ms
from pipeline.rating.changelog import by_expiry, pack_quantity, pack_seen, reached
from pipeline.rating.state import PartitionState, Positions

log = get_logger(__name__)

#: An open transaction holds up every reader of its partitions; a dead worker's is aborted by the broker after this.
TRANSACTION_TIMEOUT_MS = 15_000
#: How long one call into the client may take before we look around and say that the broker is away.
CALL_TIMEOUT_S = 5.0
#: Twice that, and a call has missed its own timeout: ``send_offsets_to_transaction`` has none in truth, and may wait
#: for ever when the broker restarts meanwhile (librdkafka issues 5456 and 5511).
STUCK_S = 2 * CALL_TIMEOUT_S
#: Most of a message that a letter holds, bytes: with both, and the rest of it, a letter stays below RECORD_BYTES_MAX.
_VALUE_KEPT, _KEY_KEPT = 1024 * 1024, 64 * 1024


class CommitError(Exception):
    """A batch was not committed. See the tree at the top of this module."""


class BatchAborted(CommitError):
    """The transaction was aborted: nothing of the batch happened."""


class StateUnknown(CommitError):
    """Fenced, fatal, or undecided: only a new producer and restored state can tell what is true."""


class Membership(NamedTuple):
    """Who this worker is in the consumer group, as of one assignment; each new one makes new owners with a new one."""

    group: str
    generation: int
    member: str

    def metadata(self) -> bytes:
        """As confluent-kafka passes group metadata on. Metadata of an idle consumer would fence nothing."""
        return (
            b"CGMDv2:"
            + struct.pack("<i", self.generation)
            + self.group.encode()
            + b"\0"
            + self.member.encode()
            + b"\0\x01"
        )


def new_producer(kafka: dict[str, Any], transactional_id: str) -> Producer:
    """A transactional producer. It fences nothing until ``init_transactions``, which only taking a partition calls."""
    return Producer(
        {
            **kafka,
            "transactional.id": transactional_id,
            "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS,
            "acks": "all",
            "compression.type": "lz4",
            "linger.ms": 5,
            "message.max.bytes": RECORD_BYTES_MAX,
            # A usual batch fits whole; one of huge events waits for room (``_produce``).
            "queue.buffering.max.messages": 2_000_000,
            "queue.buffering.max.kbytes": 1_048_576,
        }
    )


class Committer:
    """Commits the batches of one source partition with one producer, for as long as that producer lives."""

    def __init__(
        self,
        producer: Producer,
        *,
        topics: Topics,
        schemas: Schemas,
        partition: int,
        partitions: int,
        worker: str,
        turn: AbstractContextManager[Any] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._producer = producer
        self._topics = topics
        self._schemas = schemas
        self._partition = partition
        self._partitions = partitions
        self._worker = worker
        self._turn = turn or nullcontext()
        self._stopped = stopped
        self._on_step = on_step
        self._calling_since: float | None = None

    @property
    def stuck(self) -> bool:
        """Is a call into the client under way that will not come back? Read from other threads."""
        since = self._calling_since
        return since is not None and time.monotonic() - since > STUCK_S

    def commit(
        self,
        batch: Batch,
        outcome: Outcome,
        catalog_offset: int,
        membership: Membership,
        state: PartitionState,
        note: str = "",
    ) -> None:
        """Make a batch true, whole or not at all. ``note`` is committed with its offset.

        1. Begin the transaction.
        2. Produce rated rows, letters and the receipt.
        3. Produce both changelogs.
        4. Send the offsets, with the group's real generation.
        5. Commit.
        6. Only then write the changes to the local state.

        A kill before step 5 leaves nothing; after it, step 6 is made good by restoring the changelogs. Raises
        BatchAborted or StateUnknown.
        """
        positions = state.positions or Positions(0, 0)
        totals = outcome.totals | {reached(batch.source): batch.next_offset}
        seen = by_expiry(outcome.used_up, batch.now_ms)
        ends = [positions.seen, positions.totals]
        try:
            # Step 1.
            self._producer.begin_transaction()
            self._on_step("begun")
            # Step 2.
            with self._turn:
                self._produce_rows(outcome.rows)
            self._on_step("rows_produced")
            self._produce_letters(batch, outcome, catalog_offset)
            self._produce_receipt(batch, outcome, catalog_offset, membership.generation)
            self._on_step("receipt_produced")
            # Step 3.
            self._produce_changelogs(totals, seen, ends)
            self._on_step("changelogs_produced")
            # Step 4.
            offsets = [TopicPartition(self._source(batch), self._partition, batch.next_offset, note)]
            member = membership.metadata()
            self._call(lambda: self._producer.send_offsets_to_transaction(offsets, member, CALL_TIMEOUT_S))
            self._on_step("offsets_sent")
            # Step 5.
            self._call(lambda: self._producer.commit_transaction(CALL_TIMEOUT_S))
            self._on_step("committed")
        except KafkaException as error:
            self._abort(error.args[0])
        # Step 6.
        state.apply(seen, totals, Positions(*ends))
        self._on_step("applied")

    # -- what is produced

    def _produce_rows(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        produce, topic, partition = self._producer.produce, self._topics.rated, self._partition
        for key, value in rows:
            try:
                produce(topic, value, key, partition)
            except BufferError:
                self._produce(topic, value, key, partition)

    def _produce(self, topic: str, value: bytes, key: bytes | None, partition: int, **options: Any) -> None:
        """Produce, waiting for room in the client's queue when a batch of huge events fills it."""
        while True:
            try:
                self._producer.produce(topic, value, key, partition, **options)
                return
            except BufferError:
                self._producer.poll(0.1)

    def _produce_letters(self, batch: Batch, outcome: Outcome, catalog_offset: int) -> None:
        for refused in outcome.dead:
            letter = self._letter(refused, batch, catalog_offset, not_before_ms=0)
            key = refused.account or (refused.record.key or b"")[:_KEY_KEPT] or None
            self._produce(self._topics.dead_letter, letter, key, self._partition)
        for refused in outcome.parked:
            # On its own partition it can be tried at once; there it waits, longer each time.
            home = partition_of(refused.account or b"", self._partitions)
            due_ms = not_before_ms(_attempts(refused), batch.now_ms) if home == self._partition else batch.now_ms
            letter = self._letter(refused, batch, catalog_offset, not_before_ms=due_ms)
            self._produce(self._topics.retry, letter, refused.account, home)
        for record in outcome.waiting:
            self._produce(self._topics.retry, record.letter, record.letter_key, self._partition)

    def _letter(self, refused: Refused, batch: Batch, catalog_offset: int, *, not_before_ms: int) -> bytes:
        record, rejection = refused.record, refused.rejection
        parked = record if isinstance(record, ParkedRecord) else None
        key, key_cut = _kept("key", record.key, _KEY_KEPT)
        value, value_cut = _kept("value", record.value, _VALUE_KEPT)
        return self._schemas.encode(
            DEAD_LETTER,
            {
                "origin_topic": parked.topic if parked else self._source(batch),
                "origin_partition": parked.partition if parked else self._partition,
                "origin_offset": record.offset,
                "origin_appended_at": record.timestamp,
                "stage": rejection.stage.value,
                "reason": rejection.reason.value,
                "message": rejection.message + key_cut + value_cut,
                "attempts": _attempts(refused),
                "replays": parked.replays if parked else 0,
                "parked_at": parked.parked_at_ms if parked else batch.now_ms,
                "not_before": not_before_ms,
                "catalog_offset": catalog_offset,
                "account": _text(refused.account),
                "idempotency_key": _text(refused.key),
                "event_type": _text(refused.event_type),
                "event_time": _time(refused.timestamp_us),
                "key": key,
                "value": value,
            },
        )

    def _produce_receipt(self, batch: Batch, outcome: Outcome, catalog_offset: int, generation: int) -> None:
        receipt = {
            "topic": self._source(batch),
            "partition": self._partition,
            "first_offset": batch.first_offset,
            "next_offset": batch.next_offset,
            "catalog_offset": catalog_offset,
            "records": outcome.records,
            "rated": len(outcome.rated),
            "duplicates": len(outcome.repeats),
            "parked": len(outcome.parked) + len(outcome.waiting),
            "dead_lettered": len(outcome.dead),
            "corrections": len(outcome.corrected),
            "rated_rows": len(outcome.rows),
            "resolutions": [] if batch.source is Source.EVENTS else _resolutions(outcome),
            "latest_event_at": outcome.latest_event_us,
            "sequences": [
                {"source": source.decode(), "block": block, "bits": bits.to_bytes(bits.bit_length() + 7 >> 3, "little")}
                for (source, block), bits in outcome.sequences.items()
            ],
            "worker": self._worker,
            "generation": generation,
        }
        self._produce(self._topics.receipts, self._schemas.encode(RECEIPTS, receipt), None, self._partition)

    def _source(self, batch: Batch) -> str:
        return self._topics.events if batch.source is Source.EVENTS else self._topics.retry

    def _produce_changelogs(self, totals: dict[bytes, int], seen: dict[int, list[bytes]], ends: list[int]) -> None:
        """Changelog records; ``ends`` is moved behind them when the broker reports where they were written."""

        def moves(index: int) -> Callable[[KafkaError | None, Message], None]:
            def delivered(error: KafkaError | None, message: Message) -> None:
                if error is None:
                    offset = message.offset()
                    assert offset is not None
                    ends[index] = max(ends[index], offset + 1)

            return delivered

        for block in pack_seen(seen):
            self._produce(self._topics.seen, block, None, self._partition, on_delivery=moves(0))
        # One producer writes a partition in order: the last delivery stands behind all others.
        last = len(totals)
        for number, (counter, quantity) in enumerate(totals.items(), 1):
            report = {"on_delivery": moves(1)} if number == last else {}
            self._produce(self._topics.totals, pack_quantity(quantity), counter, self._partition, **report)

    # -- errors

    def _call(self, step: Callable[[], None]) -> None:
        """Run a step until it is decided: a retriable error says only that the broker did not answer in time."""
        waited = False
        while True:
            self._calling_since = time.monotonic()
            try:
                step()
            except KafkaException as error:
                # An abortable error may carry the code of a passing one; the same call would answer so for ever.
                if error.args[0].txn_requires_abort() or not passes(error.args[0]):
                    raise
                if self._stopped():
                    raise StateUnknown(
                        f"partition {self._partition}: stopped before {error.args[0]} was decided"
                    ) from error
                if not waited:
                    log.warning("broker_away", partition=self._partition, error=str(error.args[0]))
                    waited = True
                time.sleep(0.1)
            else:
                if waited:
                    log.info("broker_back", partition=self._partition)
                return
            finally:
                self._calling_since = None

    def _abort(self, error: KafkaError) -> None:
        """After an error in the transaction: abort if that is allowed and raise BatchAborted, else StateUnknown."""
        if error.fatal() or not error.txn_requires_abort():
            raise StateUnknown(f"partition {self._partition}: {error}")
        try:
            self._call(lambda: self._producer.abort_transaction(CALL_TIMEOUT_S))
        except KafkaException as failed:
            raise StateUnknown(
                f"partition {self._partition}: {failed.args[0]} while aborting after {error}"
            ) from failed
        raise BatchAborted(f"partition {self._partition}: {error}")


def _kept(name: str, data: bytes | None, most: int) -> tuple[bytes | None, str]:
    """What of a message's key or value goes into its letter, and a word on what was cut.

    The broker limits what came by its compressed size, so it may be larger than any record we could write. All of it
    stands at its origin for as long as the topic keeps it.
    """
    if data is None or len(data) <= most:
        return data, ""
    digest = hashlib.sha256(data).hexdigest()
    return data[:most], f"; of its {name} the first {most} of {len(data)} bytes are kept, SHA-256 of all {digest}"


def _attempts(refused: Refused) -> int:
    """Times it was tried, this time included."""
    return (refused.record.attempts if isinstance(refused.record, ParkedRecord) else 0) + 1


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _time(at_us: int | None) -> int | None:
    """A time that any reader of the letter can show; the original bytes keep one that is out of all calendars."""
    return at_us if at_us is not None and _FIRST_US <= at_us <= _LAST_US else None


_FIRST_US, _LAST_US = to_micros(datetime.min.replace(tzinfo=UTC)), to_micros(datetime.max.replace(tzinfo=UTC))


def _resolutions(outcome: Outcome) -> list[Record]:
    return [
        {"origin_partition": record.partition, "origin_offset": record.offset, "outcome": name}
        for name, records in (
            ("rated", [event.record for event in outcome.rated]),
            ("duplicate", [event.record for event in outcome.repeats]),
            ("parked", [refused.record for refused in outcome.parked]),
            ("dead_lettered", [refused.record for refused in outcome.dead]),
        )
        for record in records
        if isinstance(record, ParkedRecord)
    ]
