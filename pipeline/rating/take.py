"""Taking a partition: the order in which a worker becomes its only owner (DESIGN §4).

1. ``init_transactions`` for the partition's transactional id: fences the old owner and aborts what it left open.
2. The committed offsets, read as stable: only now can no earlier transaction change them.
3. Both changelogs, read committed, from the local position to the end offset taken after step 1.
4. Where the changelogs were written further than the committed offsets, they are believed: each transaction moved both.
   A broker that was killed has answered with an offset long past, once in an hour of chaos.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from pipeline.infra.kafka import passes
from pipeline.infra.logs import get_logger
from pipeline.infra.topics import Topics
from pipeline.rating.batch import Source
from pipeline.rating.changelog import reached, unpack_quantity, unpack_seen
from pipeline.rating.manifest import SEEN_ROW_BYTES
from pipeline.rating.state import PartitionState, Positions

log = get_logger(__name__)

T = TypeVar("T")

_CALL_TIMEOUT_S = 10.0
#: Most records asked for at once, of up to 512 KiB each, and how long to wait for as many: what has come by then is
#: worked on meanwhile. With 2,000 a worker that restored 50M keys took 1.1 GB for a moment, now 0.4.
_RESTORE_RECORDS, _RESTORE_WAIT_S = 64, 0.05
#: Identities and totals applied together: they become a segment of the state without passing through its memory.
_RESTORE_ROWS = 250_000
#: What may wait in the client, for each of the partitions restored at a time.
_RESTORE_QUEUE_KIB = 16_384


class Interrupted(Exception):
    """The partition was revoked, or the worker stops, before it was taken."""


class UsageLost(Exception):
    """Records were deleted from a source topic before they were rated. Never skipped silently."""


class Taken(NamedTuple):
    """What was found in step 2, and how much was read in step 3."""

    #: Next offset to process of each source topic.
    next_offsets: dict[Source, int]
    #: What was committed with the offset of the events (``pipeline.core.limits``).
    note: str | None
    restored_seen: int
    restored_totals: int


def take(
    producer: Producer,
    state: PartitionState,
    *,
    kafka: Mapping[str, Any],
    group: str,
    topics: Topics,
    partition: int,
    stopped: Callable[[], bool],
) -> Taken:
    """Become the owner. Raises Interrupted, UsageLost, or KafkaException for what no waiting mends."""
    # Step 1.
    until_decided(lambda: producer.init_transactions(_CALL_TIMEOUT_S), stopped)
    consumer = Consumer(
        {
            **kafka,
            "group.id": group,
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 50,
            "queued.max.messages.kbytes": _RESTORE_QUEUE_KIB,
        }
    )
    try:
        # Step 2.
        sources = {
            Source.EVENTS: TopicPartition(topics.events, partition),
            Source.RETRY: TopicPartition(topics.retry, partition),
        }
        committed = {source: _committed(consumer, tp, stopped) for source, tp in sources.items()}
        # Step 3.
        seen, totals = _restore(consumer, state, topics, partition, stopped)
        # Step 4.
        offsets = {source: _believed(source, committed[source], state, tp) for source, tp in sources.items()}
        if state.positions is not None and not any(found.committed for found in offsets.values()):
            raise UsageLost(
                f"partition {partition} was rated before, but group {group} has no offsets any more: the broker forgot "
                "them (offsets.retention.minutes, with no rater up for that long). Set them with Kafka's own tools to "
                "the next_offset of the newest receipts"
            )
        for source, tp in sources.items():
            _check_there(consumer, tp, offsets[source].next_offset, stopped)
    finally:
        consumer.close()
    next_offsets = {source: found.next_offset for source, found in offsets.items()}
    return Taken(next_offsets, offsets[Source.EVENTS].note, seen, totals)


class _Offset(NamedTuple):
    """Whether an offset was committed, what with it, and the next one to process."""

    committed: bool
    note: str | None
    next_offset: int


def _committed(consumer: Consumer, tp: TopicPartition, stopped: Callable[[], bool]) -> _Offset:
    # librdkafka asks for stable offsets: it waits while a transaction that moves them is pending.
    committed = until_decided(lambda: consumer.committed([tp], _CALL_TIMEOUT_S), stopped)[0]
    if committed.error is not None:
        raise KafkaException(committed.error)
    if committed.offset == OFFSET_INVALID:
        return _Offset(False, None, 0)
    return _Offset(True, committed.metadata, committed.offset)


def _believed(source: Source, committed: _Offset, state: PartitionState, tp: TopicPartition) -> _Offset:
    """What was committed, or how far the changelogs say the source was processed, where that is further."""
    known = state.quantity(reached(source))
    if known is None or known <= committed.next_offset:
        return committed
    log.error(
        "committed_offset_went_back",
        topic=tp.topic,
        partition=tp.partition,
        committed=committed.next_offset if committed.committed else None,
        processed=known,
        then="goes on from where the changelogs are",
    )
    return _Offset(True, None, known)  # what was noted with another offset says nothing about this one


def _check_there(consumer: Consumer, tp: TopicPartition, next_offset: int, stopped: Callable[[], bool]) -> None:
    """Raises UsageLost where the log does not hold the next offset to process."""
    low, high = _watermarks(consumer, tp, stopped)
    if next_offset < low:
        raise UsageLost(
            f"{tp.topic}/{tp.partition}: offsets {next_offset} to {low - 1} were deleted before they were rated. "
            "Expected retention to outlast the raters' lag. Restore the records, or accept the loss by setting the "
            f"group's offset to {low} with Kafka's own tools"
        )
    if next_offset > high:
        raise UsageLost(
            f"{tp.topic}/{tp.partition} ends at {high}, but offset {next_offset} was reached already: "
            "the topic was recreated or lost its tail"
        )


def _restore(
    consumer: Consumer, state: PartitionState, topics: Topics, partition: int, stopped: Callable[[], bool]
) -> tuple[int, int]:
    """Bring the local state up to the changelogs' ends; return the number of identities and totals read."""
    ends: dict[str, int] = {}
    at: dict[str, int] = {}
    stored = state.positions or Positions(0, 0)
    for topic, position in ((topics.seen, stored.seen), (topics.totals, stored.totals)):
        tp = TopicPartition(topic, partition)
        low, high = _watermarks(consumer, tp, stopped)
        if position > high:
            # The log lost its tail. What the state knows beyond it would make events, read again, look like repeats.
            log.warning("changelog_behind_state", topic=topic, partition=partition, end=high, position=position)
            state.reset()
            return _restore(consumer, state, topics, partition, stopped)
        ends[topic], at[topic] = high, max(position, low)  # what retention took has expired anyway
    consumer.assign([TopicPartition(topic, partition, offset) for topic, offset in at.items() if offset < ends[topic]])
    open_topics = {topic for topic, offset in at.items() if offset < ends[topic]}
    keys = counters = 0
    seen: dict[int, list[bytes]] = {}
    totals: dict[bytes, int] = {}
    pending = 0
    while open_topics:
        if stopped():
            raise Interrupted
        for message in consumer.consume(_RESTORE_RECORDS, _RESTORE_WAIT_S):
            name, offset, error = message.topic() or "", message.offset(), message.error()
            if error is None:
                assert offset is not None
                at[name] = offset + 1
                value = message.value()
                if name == topics.seen:
                    day, entries = unpack_seen(value or b"")
                    seen.setdefault(day, []).append(entries)
                    keys += len(entries) // SEEN_ROW_BYTES
                    pending += len(entries) // SEEN_ROW_BYTES
                elif value is not None:
                    totals[message.key() or b""] = unpack_quantity(value)
                    counters += 1
                    pending += 1
            elif error.code() == KafkaError._PARTITION_EOF:
                at[name] = max(at[name], offset or 0)
            elif not passes(error):
                raise KafkaException(error)
        open_topics = {topic for topic in open_topics if at[topic] < ends[topic]}
        if pending >= _RESTORE_ROWS or (pending and not open_topics):
            state.apply(seen, totals, Positions(at[topics.seen], at[topics.totals]))
            seen, totals, pending = {}, {}, 0
    return keys, counters


def _watermarks(consumer: Consumer, tp: TopicPartition, stopped: Callable[[], bool]) -> tuple[int, int]:
    """First offset the log still holds, and the one after its last."""
    return until_decided(lambda: consumer.get_watermark_offsets(tp, _CALL_TIMEOUT_S), stopped)


def until_decided(call: Callable[[], T], stopped: Callable[[], bool]) -> T:
    """Call until the broker answers; a retriable error only says that it did not in time."""
    waited = False
    while True:
        if stopped():
            raise Interrupted
        try:
            result = call()
        except KafkaException as error:
            if not passes(error.args[0]):
                raise
            if not waited:
                log.warning("broker_away", error=str(error.args[0]))
                waited = True
            time.sleep(0.2)
        else:
            if waited:
                log.info("broker_back")
            return result
