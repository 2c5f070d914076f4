"""What the broker itself says of the logs, for reconciling: where they begin and end, and what stands in them.

Offsets are not records: transaction markers and aborted records take offsets too. Where it matters, records are read
and counted, as a reader of committed records sees them.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from pipeline.billing.intake import Place
from pipeline.infra.kafka import passes
from pipeline.infra.settings import Settings
from pipeline.infra.topics import TopicMismatch

#: Longest wait for one answer of the broker, seconds.
_BROKER_ANSWER_S = 15.0
#: Wait before asking a partition between two leaders again, seconds.
_ASK_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Log:
    """One partition's log: its first offset, its end for a reader of committed records, and what is left to read.

    ``left`` are the offsets from a stage's position to the end; 0 when none of them holds a committed record.
    """

    start: int
    end: int
    left: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Offsets ``[first, following)`` of one partition."""

    partition: int
    first: int
    following: int


def logs(settings: Settings, topics: tuple[str, ...], positions: dict[Place, int]) -> dict[Place, Log]:
    """The logs of all partitions of the topics, seen from these positions; from 0 where there is none.

    Raises TopicMismatch when a topic does not exist, KafkaException when the broker does not answer.
    """
    bounds = _bounds_once_known(settings, topics)
    behind = {place: positions.get(place, 0) for place, log in bounds.items() if log.end > positions.get(place, 0)}
    unread = _holding_records(settings, behind)
    return {
        place: Log(log.start, log.end, log.end - behind[place]) if place in unread else log
        for place, log in bounds.items()
    }


def count_records(settings: Settings, topic: str, runs: Iterable[Run]) -> dict[Run, int]:
    """How many committed records stand in each run, by reading all of them (some 100,000 a second).

    They lie between the log's start and end. Raises KafkaException when the broker does not answer.
    """
    ordered = sorted(runs, key=lambda run: (run.partition, run.first))
    counts = dict.fromkeys(ordered, 0)
    if not ordered:
        return counts
    spans: list[list[Run]] = []
    for run in ordered:
        if spans and (spans[-1][-1].partition, spans[-1][-1].following) == (run.partition, run.first):
            spans[-1].append(run)
        else:
            spans.append([run])
    consumer = _reader(settings)
    try:
        for span in spans:
            _count_span(consumer, topic, span, counts)
    finally:
        consumer.close()
    return counts


def _count_span(consumer: Consumer, topic: str, span: list[Run], counts: dict[Run, int]) -> None:
    """Read runs of one partition that touch, from the first to the last."""
    consumer.assign([TopicPartition(topic, span[0].partition, span[0].first)])
    following = iter(span)
    run = next(following)
    while True:
        message = consumer.poll(_BROKER_ANSWER_S)
        if message is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer about {topic} {run.partition}"))
        if (error := message.error()) is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                return
            if not passes(error):
                raise KafkaException(error)
            continue
        offset = message.offset()
        assert offset is not None, "a message that was read has an offset"
        while offset >= run.following:
            if (another := next(following, None)) is None:
                return
            run = another
        counts[run] += 1


def _holding_records(settings: Settings, positions: dict[Place, int]) -> set[Place]:
    """The places where a committed record is left from the position on."""
    if not positions:
        return set()
    consumer = _reader(settings)
    heard: dict[Place, bool] = {}
    until = time.monotonic() + _BROKER_ANSWER_S
    try:
        consumer.assign([TopicPartition(*place, position) for place, position in positions.items()])
        while len(heard) < len(positions):
            message = consumer.poll(max(until - time.monotonic(), 0.0))
            if message is None:
                silent = sorted(positions.keys() - heard.keys())
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer about {silent}"))
            place = (str(message.topic()), int(message.partition() or 0))
            if (error := message.error()) is None:
                heard.setdefault(place, True)
            elif error.code() == KafkaError._PARTITION_EOF:
                heard.setdefault(place, False)
            elif not passes(error):
                raise KafkaException(error)
    finally:
        consumer.close()
    return {place for place, holds in heard.items() if holds}


def _reader(settings: Settings) -> Consumer:
    return Consumer(
        settings.kafka
        | {
            "group.id": settings.topic_prefix + "reconcile",  # required by the library, never joined
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",  # where retention has taken what was read
            "fetch.wait.max.ms": 10,  # most partitions hold nothing more: hear of it at once
        }
    )


def _bounds_once_known(settings: Settings, topics: tuple[str, ...]) -> dict[Place, Log]:
    """``_bounds``, asked again while a partition is between two leaders, as it is right after it was created."""
    until = time.monotonic() + _BROKER_ANSWER_S
    while True:
        try:
            return _bounds(settings, topics)
        except KafkaException as error:
            if not passes(error.args[0]) or time.monotonic() >= until:
                raise
            time.sleep(_ASK_AGAIN_S)


def _bounds(settings: Settings, topics: tuple[str, ...]) -> dict[Place, Log]:
    """Starts and ends of all partitions of the topics, as a reader of committed records sees them."""
    admin = AdminClient(settings.kafka)
    known = admin.list_topics(timeout=_BROKER_ANSWER_S).topics
    if missing := [topic for topic in topics if topic not in known]:
        raise TopicMismatch(f"topics {', '.join(missing)} do not exist: run `tally up`")
    places = [TopicPartition(topic, partition) for topic in topics for partition in known[topic].partitions]

    def ask(spec: OffsetSpec) -> dict[Place, int]:
        asked = admin.list_offsets(dict.fromkeys(places, spec), isolation_level=IsolationLevel.READ_COMMITTED)
        return {(p.topic, p.partition): future.result(_BROKER_ANSWER_S).offset for p, future in asked.items()}

    # The start first: it may move while we ask, but never past an end asked later.
    starts = ask(OffsetSpec.earliest())  # type: ignore[no-untyped-call]
    ends = ask(OffsetSpec.latest())  # type: ignore[no-untyped-call]
    return {place: Log(starts[place], end) for place, end in ends.items()}
