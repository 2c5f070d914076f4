"""Partitions that a dead-letter limit stopped, as their committed offsets say, and letting them go on."""

from contextlib import closing
from typing import Any, NamedTuple

from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.core.limits import stopped_by
from pipeline.infra.going_on import GoingOn
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.operations.groups import committed

_ANSWER_S = 10.0


class Stop(NamedTuple):
    """A partition of ``usage.events`` whose raters wait for a person: where, and which limit was broken."""

    partition: int
    next_offset: int
    why: str


class NotStopped(Exception):
    """There is nothing to resume."""


def stops(settings: Settings, admin: AdminClient) -> list[Stop]:
    """The stopped partitions, in order. ``admin`` is a client of the settings' Kafka.

    Raises KafkaException or TimeoutError when the broker does not answer.
    """
    topics = Topics(settings.topic_prefix)
    found = sorted(
        Stop(tp.partition, tp.offset, why)
        for tp in committed(admin, f"{topics.prefix}rater", _ANSWER_S)
        if tp.topic == topics.events and (why := stopped_by(tp.metadata)) is not None
    )
    if not found:
        return []
    with closing(GoingOn(settings.kafka, topics)) as going_on:
        return [stop for stop in found if going_on.until(stop.partition) < stop.next_offset]


def resume(connection: "Connection[Any]", settings: Settings, partition: int, *, why: str, to_end: bool) -> int:
    """Let a stopped partition go on; return the offset before which no dead letter counts.

    That is where it stopped, so that the limits count anew from there, or with ``to_end`` the present end of the
    partition. Its audit entry and the word to the raters are written together, or neither.

    Raises NotStopped; KafkaException or TimeoutError when the broker does not answer; psycopg.Error.
    """
    topics, admin = Topics(settings.topic_prefix), AdminClient(settings.kafka)
    stop = next((stop for stop in stops(settings, admin) if stop.partition == partition), None)
    if stop is None:
        raise NotStopped(f"partition {partition} is not stopped: no dead-letter limit is broken there")
    until = max(stop.next_offset, _end(admin, topics.events, partition)) if to_end else stop.next_offset
    detail = {"why": why, "stopped_by": stop.why, "next_offset": stop.next_offset, "no_limit_before": until}
    with connection.transaction(), closing(GoingOn(settings.kafka, topics)) as going_on:
        connection.execute(_AUDIT, [settings.actor, f"{topics.events}/{partition}", Jsonb(detail)])
        going_on.say(partition, until)
    return until


_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, 'dlq.resume', %s, %s)"


def _end(admin: AdminClient, topic: str, partition: int) -> int:
    """The offset after the partition's last stable record."""
    place = TopicPartition(topic, partition)
    spec = {place: OffsetSpec.latest()}  # type: ignore[no-untyped-call]
    futures = admin.list_offsets(spec, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=_ANSWER_S)
    return int(futures[place].result(_ANSWER_S).offset)
