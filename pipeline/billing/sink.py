"""The sink: rated usage, receipts and letters from Kafka into PostgreSQL, each exactly once.

A consumer group shares the partitions out; where to read on is PostgreSQL's word alone (``billing.sink_position``),
moved in the transaction that writes the rows (``pipeline.billing.commit``). Kafka's committed offsets are a copy for
lag tools. Whatever goes wrong with a batch, the answer is one: drop it, leave the group, come back, and read on from
the table.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from psycopg import Connection, OperationalError

from pipeline.billing.commit import PositionTaken, Reached, Step, Written, commit, prepare
from pipeline.billing.intake import Batch, Intake, Place
from pipeline.billing.lines import Lines
from pipeline.billing.months import ensure_months, next_month
from pipeline.core.periods import to_datetime
from pipeline.infra import metrics, runtime
from pipeline.infra.avro import Schemas, load_schemas
from pipeline.infra.kafka import passes
from pipeline.infra.logs import get_logger
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

#: Most messages in one transaction. Beyond some thousands a transaction's fixed cost (about 10 ms) no longer shows.
BATCH_MESSAGES = 10_000
#: Bytes of messages after which a batch is closed: bounds memory where events are large.
BATCH_BYTES = 32 * 1024 * 1024
#: Longest wait for a batch to fill, seconds: what the sink adds to the way of an event at a low rate.
BATCH_WAIT_S = 0.05
#: The broker holds a fetch back until so many bytes came, or for so long: answered at once, there is a fetch for every
#: few records of every partition.
_FETCH_BYTES_MIN, _FETCH_WAIT_S = 256 * 1024, 0.025
#: Messages asked of the consumer at a time.
_FETCH_MESSAGES = 2_000
#: Wait before coming back after a failure, seconds: doubled each time up to the longest.
_BACKOFF_FIRST_S, _BACKOFF_LONGEST_S = 0.2, 10.0
#: Longest wait for one answer of the broker, seconds.
_BROKER_ANSWER_S = 10.0
#: Wait before asking a partition between two leaders again, seconds.
_ASK_AGAIN_S = 0.1
#: Time between two looks at the lag, seconds.
_LAG_EVERY_S = 5.0
#: How often the consumer says how it stands with its group, seconds.
_MEMBERSHIP_EVERY_S = 2.0
#: A consumer out of its group for longer gives way to a new one, seconds. Finding the coordinator and joining take
#: well under a second; a broker that comes back needs 5 to 15 s, and a new consumer then costs nothing.
OUT_OF_GROUP_S = 20.0

log = get_logger(__name__)


class LogTruncated(Exception):
    """A partition's log does not hold the stored position: records that were never written to Postgres are gone."""


class OutOfGroup(Exception):
    """The consumer has lost its group and does not come back by itself."""


def run(settings: Settings, stop: threading.Event, *, reached: Reached | None = None) -> None:
    """Write until ``stop`` is set; waits with back-off while Kafka or PostgreSQL is away, and says so once.

    ``reached`` is told of every step of a commit. Raises LogTruncated when retention or a new topic has taken records
    that were not written yet; KafkaException when the broker refuses for good (authorization, no such topic);
    psycopg.Error for anything but an absent or overloaded server. These need a person.
    """
    runtime.collect_seldom()
    sink = _Sink(settings, stop, reached or (lambda _: None))
    backoff, postgres_away = _BACKOFF_FIRST_S, False
    while not stop.is_set():
        committed = sink.batches
        try:
            if postgres_away:
                # Ask before joining: a member that cannot write only costs the group rebalances.
                connect(settings.dsn, application="sink").close()
                postgres_away = False
                log.info("back", service="PostgreSQL")
            sink.session()
            return
        except PositionTaken as error:
            log.warning("position taken", problem=str(error), then="rejoins and reads on from the stored positions")
        except OperationalError as error:
            if _rolled_back(error):
                log.warning("rolled back", problem=str(error).strip(), then="rejoins and writes the batch again")
            elif not _postgres_absent(error):
                raise
            elif not postgres_away:
                postgres_away = True
                log.warning("away", service="PostgreSQL", problem=str(error).strip(), then="waits and comes back")
        except KafkaException as error:
            if not passes(cause := cast(KafkaError, error.args[0])):
                raise
            sink.kafka_gone(cause)
        except OutOfGroup as error:
            sink.out_of_group(error)
        if sink.batches > committed:
            backoff = _BACKOFF_FIRST_S
        stop.wait(backoff)
        backoff = min(backoff * 2, _BACKOFF_LONGEST_S)


class _Sink:
    """One consumer after another, each with a database connection of its own."""

    def __init__(self, settings: Settings, stop: threading.Event, reached: Reached) -> None:
        self.batches = 0
        self._settings = settings
        self._stop = stop
        self._reached = reached
        self._topics = Topics(settings.topic_prefix)
        self._schemas: Schemas = load_schemas(settings.registry_url)
        self._months: set[date] = set()
        #: Where to read on: behind all that was handed on to be written.
        self._positions: dict[Place, int] = {}
        self._writing: tuple[Batch, Future[Written]] | None = None
        self._kafka_away = False
        self._membership = Membership()

    def session(self) -> None:
        """Join the group and write until stopped. Raises what ends it; nothing of an unfinished batch stays.

        One thread reads and decodes while another writes the batch before: PostgreSQL's time and Python's overlap.
        """
        self._writing = None
        topics = self._topics
        with (
            connect(self._settings.dsn, application="sink", autocommit=True) as connection,
            ThreadPoolExecutor(1, thread_name_prefix="sink-writer") as thread,
        ):
            prepare(connection)
            intake, lines = Intake(topics, self._schemas), Lines()
            self._ahead(connection)
            self._membership = Membership()
            consumer = Consumer(_consumer_config(self._settings, self._on_error, self._membership.told))
            try:
                consumer.subscribe(
                    [topics.rated, topics.receipts, topics.retry, topics.dead_letter, topics.controls],
                    on_assign=lambda _, partitions: self._assigned(consumer, connection, partitions),
                    on_revoke=lambda _, partitions: self._revoked(partitions),
                    on_lost=lambda _, partitions: self._revoked(partitions),
                )
                look_at_lag = time.monotonic()
                while not self._stop.is_set():
                    messages = self._fetch(consumer)
                    # Decoded while the batch before is still being written.
                    batch = intake.sort(messages, self._positions)
                    self._settle(consumer)
                    if batch.moves:
                        self._begin(thread, connection, batch, lines)
                    elif self._kafka_away:
                        self._look_for_kafka(consumer)
                    self._membership.check()
                    if time.monotonic() >= look_at_lag:
                        self._show_lag(consumer)
                        look_at_lag = time.monotonic() + _LAG_EVERY_S
                self._settle(consumer)
            finally:
                consumer.close()  # tells _revoked

    def _begin(self, thread: ThreadPoolExecutor, connection: "Connection[Any]", batch: Batch, lines: Lines) -> None:
        """Have a batch written in the other thread. From here on its messages count as read."""
        for place, (_, following) in batch.moves.items():
            self._positions[place] = following
        self._writing = batch, thread.submit(self._write, connection, batch, lines)

    def _settle(self, consumer: Consumer) -> None:
        """Wait for the batch that is being written, if one is. Raises what its writing met."""
        if self._writing is None:
            return
        (batch, future), self._writing = self._writing, None
        written = future.result()
        for place, (_, following) in batch.moves.items():
            if place in self._positions:  # else it was revoked meanwhile, and is another's to show
                metrics.SINK_POSITION.labels(*place).set(following)
        self.batches += 1
        metrics.SINK_BATCHES.inc()
        metrics.SINK_ROWS.inc(written.billed)
        for reason, count in written.quarantined.items():
            metrics.SINK_QUARANTINED.labels(reason).inc(count)
        consumer.commit(
            offsets=[TopicPartition(*place, following) for place, (_, following) in batch.moves.items()],
            asynchronous=True,
        )
        self._reached(Step.OFFSETS_COMMITTED)

    def _await_writing(self) -> None:
        """Let the batch that is being written finish, well or not: ``_settle`` tells which."""
        if self._writing is not None:
            wait([self._writing[1]])

    def _write(self, connection: "Connection[Any]", batch: Batch, lines: Lines) -> Written:
        for poison in batch.poison:
            log.error(
                "undecodable",
                topic=poison.topic,
                partition=poison.partition,
                offset=poison.offset,
                problem=poison.problem,
                then="stands in billing.quarantine with its bytes",
            )
        self._ensure_months(connection, batch)
        with metrics.SINK_COMMIT.time():
            return commit(connection, batch, lines, self._topics, self._reached, grace_s=self._settings.sequence_grace)

    # -- reading

    def _fetch(self, consumer: Consumer) -> list[Message]:
        """Messages without errors, as many as come within the wait; none of them read before the stored position."""
        messages: list[Message] = []
        size = 0
        until = time.monotonic() + BATCH_WAIT_S
        while len(messages) < BATCH_MESSAGES and size < BATCH_BYTES and (left := until - time.monotonic()) > 0:
            for message in consumer.consume(_FETCH_MESSAGES, left):
                if (error := message.error()) is not None:
                    self._on_message_error(message, error)
                else:
                    messages.append(message)
                    size += len(message)
        # A rebalance in the middle may have taken partitions away.
        messages = [m for m in messages if (cast(str, m.topic()), cast(int, m.partition())) in self._positions]
        if messages and self._kafka_away:
            self._kafka_back()
        return messages

    def _assigned(self, consumer: Consumer, connection: "Connection[Any]", partitions: list[TopicPartition]) -> None:
        places = [(p.topic, p.partition) for p in partitions]
        self._await_writing()
        stored = _read_positions(connection, places)
        for place in places:
            low, high = _log_bounds(consumer, place)
            if place not in stored:
                # Before the first read the log's beginning is where to start; the insert says so once and for all.
                stored[place] = _insert_position(connection, place, low)
                if low > 0:
                    log.warning("log begins late", topic=place[0], partition=place[1], offset=low)
            if not low <= stored[place] <= high:
                raise LogTruncated(
                    f"{place[0]} {place[1]} holds offsets {low} to {high}, but the sink has written up to "
                    f"{stored[place]}: records are missing. If they are lost for good, say where to go on: UPDATE "
                    f"billing.sink_position SET next_offset = {low} WHERE topic = '{place[0]}' "
                    f"AND partition = {place[1]}; `tally reconcile` then names the hole"
                )
        self._positions = stored
        consumer.assign([TopicPartition(*place, offset) for place, offset in stored.items()])
        log.info("assigned", partitions=_by_topic(places))

    def _revoked(self, partitions: list[TopicPartition]) -> None:
        self._await_writing()
        for partition in partitions:
            if self._positions.pop((partition.topic, partition.partition), None) is not None:
                with suppress(KeyError):
                    metrics.forget(partition.topic, partition.partition, metrics.SINK_POSITION, metrics.SINK_LAG)
        if partitions:
            log.info("revoked", partitions=_by_topic([(p.topic, p.partition) for p in partitions]))

    def _show_lag(self, consumer: Consumer) -> None:
        """Lag by what the consumer has heard of the log's end: asks nobody, so it may be a fetch old."""
        for (topic, partition), position in self._positions.items():
            _, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
            if high >= 0:
                metrics.SINK_LAG.labels(topic, partition).set(max(high - position, 0))

    # -- trouble

    def _on_error(self, error: KafkaError) -> None:
        """Told by librdkafka from within ``consume``; it reconnects by itself."""
        if error.fatal():
            raise KafkaException(error)
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.kafka_gone(error)

    def _on_message_error(self, message: Message, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise LogTruncated(f"{message.topic()} {message.partition()}: {error.str()}; it shrank while it was read")
        # Polled too late (PostgreSQL kept it waiting): librdkafka rejoins by itself.
        if error.code() != KafkaError._MAX_POLL_EXCEEDED and not passes(error):
            raise KafkaException(error)

    def kafka_gone(self, error: KafkaError) -> None:
        if not self._kafka_away:
            self._kafka_away = True
            log.warning("away", service="Kafka", problem=error.str(), then="waits and comes back")

    def out_of_group(self, error: OutOfGroup) -> None:
        if not self._kafka_away:  # else it was said why
            log.warning("out of group", problem=str(error), then="comes back with a new consumer")

    def _look_for_kafka(self, consumer: Consumer) -> None:
        with suppress(KafkaException):
            consumer.list_topics(self._topics.rated, timeout=1.0)
            self._kafka_back()

    def _kafka_back(self) -> None:
        self._kafka_away = False
        log.info("back", service="Kafka")

    # -- months

    def _ahead(self, connection: "Connection[Any]") -> None:
        """Partitions of this month and the next, before anyone waits for them."""
        month = datetime.now(UTC).date().replace(day=1)
        self._create_months(connection, {month, next_month(month)})

    def _ensure_months(self, connection: "Connection[Any]", batch: Batch) -> None:
        months = {_month(day) for day in {message.row.head.timestamp_us // _DAY_US for message in batch.rated}}
        if not months <= self._months:
            self._create_months(connection, months)

    def _create_months(self, connection: "Connection[Any]", months: set[date]) -> None:
        ensure_months(connection, months - self._months)
        self._months |= months


class Membership:
    """Whether a consumer is in its group, by what librdkafka says of itself.

    It rejoins by itself, but not always: told by a broker that it is no longer the coordinator, librdkafka 2.16 may
    wait for a connection to ask others on that it never opens ("no broker available for coordinator query"; 7 minutes
    and on in a chaos run). The broker is there, the process lives, and nothing is read.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._out_since: float | None = None
        self._states = ""

    def told(self, statistics: str) -> None:
        """What ``stats_cb`` is called with. Waiting for the group's other members counts as being in it."""
        group = json.loads(statistics)["cgrp"]
        if group["state"] == "up" and group["join_state"] not in ("init", "wait-metadata"):
            self._out_since = None
        elif self._out_since is None:
            self._out_since = self._now_s()
        self._states = f"{group['state']}, {group['join_state']}"

    def check(self) -> None:
        """Raises OutOfGroup when the consumer has been out of its group for longer than OUT_OF_GROUP_S."""
        if self._out_since is not None and (out := self._now_s() - self._out_since) > OUT_OF_GROUP_S:
            raise OutOfGroup(f"for {out:.0f} s, in the states {self._states}")


_DAY_US = 24 * 60 * 60 * 1_000_000


def _month(day: int) -> date:
    return to_datetime(day * _DAY_US).date().replace(day=1)


def _by_topic(places: list[Place]) -> dict[str, list[int]]:
    """For the log: the partitions of each topic."""
    by_topic: dict[str, list[int]] = {}
    for topic, partition in sorted(places):
        by_topic.setdefault(topic, []).append(partition)
    return by_topic


def _consumer_config(
    settings: Settings, on_error: Callable[[KafkaError], None], on_statistics: Callable[[str], None]
) -> dict[str, Any]:
    return settings.kafka | {
        "group.id": settings.topic_prefix + "sink",
        # `tally status` names a group's members by it: which process is there, and which is not.
        "client.id": f"tally-sink-{os.getpid()}",
        # What a rater has not committed does not exist.
        "isolation.level": "read_committed",
        # Positions are PostgreSQL's: nothing is read on from Kafka's, nothing skips to an end of the log.
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "partition.assignment.strategy": "range",
        "session.timeout.ms": int(settings.session_timeout * 1000),
        "fetch.min.bytes": _FETCH_BYTES_MIN,
        "fetch.wait.max.ms": int(_FETCH_WAIT_S * 1000),
        "error_cb": on_error,
        "statistics.interval.ms": int(_MEMBERSHIP_EVERY_S * 1000),
        "stats_cb": on_statistics,
    }


def _log_bounds(consumer: Consumer, place: Place) -> tuple[int, int]:
    """Asked again while the partition is between two leaders, as it is right after it was created: librdkafka turns
    what a rebalance callback raises into something that no ``except`` meets.
    """
    until = time.monotonic() + _BROKER_ANSWER_S
    while True:
        try:
            bounds = consumer.get_watermark_offsets(TopicPartition(*place), timeout=_BROKER_ANSWER_S)
            break
        except KafkaException as error:
            if not passes(error.args[0]) or time.monotonic() >= until:
                raise
            time.sleep(_ASK_AGAIN_S)
    if bounds is None:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer on the offsets of {place[0]} {place[1]}"))
    return bounds


_READ_POSITIONS = """
SELECT topic, partition, next_offset FROM billing.sink_position
JOIN unnest(%s::text[], %s::integer[]) AS wanted (topic, partition) USING (topic, partition)
"""
_INSERT_POSITION = """
WITH inserted AS (
    INSERT INTO billing.sink_position (topic, partition, next_offset) VALUES (%s, %s, %s)
    ON CONFLICT DO NOTHING RETURNING next_offset
)
SELECT next_offset FROM inserted
"""


def _read_positions(connection: "Connection[Any]", places: list[Place]) -> dict[Place, int]:
    rows = connection.execute(_READ_POSITIONS, [[topic for topic, _ in places], [p for _, p in places]])
    return {(topic, partition): next_offset for topic, partition, next_offset in rows}


def _insert_position(connection: "Connection[Any]", place: Place, beginning: int) -> int:
    inserted = connection.execute(_INSERT_POSITION, [*place, beginning]).fetchone()
    return beginning if inserted else _read_positions(connection, [place])[place]


#: SQLSTATE classes of a server that is away, overloaded or was interrupted, none of them the statement's fault:
#: connection, resources, lock not available, operator, system.
_ABSENT_STATES = ("08", "53", "55", "57", "58")
#: SQLSTATE class of a transaction that PostgreSQL rolled back in favour of another: deadlock, serialization.
_ROLLED_BACK_STATE = "40"


def _postgres_absent(error: OperationalError) -> bool:
    return error.sqlstate is None or error.sqlstate.startswith(_ABSENT_STATES)


def _rolled_back(error: OperationalError) -> bool:
    return error.sqlstate is not None and error.sqlstate.startswith(_ROLLED_BACK_STATE)
