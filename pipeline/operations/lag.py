"""How far each stage is behind, who works on it, and what stands in the way: one look at Kafka, one at PostgreSQL.

Behind means records that could be worked on now. Transaction markers are offsets and no records, and a parked event
whose time has not come is waiting, not lag: where offsets differ, the records themselves are looked at.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from psycopg import Connection

from pipeline.core.periods import to_micros
from pipeline.infra.avro import DEAD_LETTER, Schemas, WireError
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.operations.dead_letters import ReasonCount, Selection, reasons
from pipeline.operations.groups import answered, committed
from pipeline.operations.peek import Place, peek, place_of
from pipeline.operations.stops import Stop, stops

#: Longest wait for Kafka's first answer, seconds.
KAFKA_ANSWERS_S = 5.0
#: Longest wait for each further answer, seconds.
_ANSWER_S = 10.0
#: Parked records looked at on a partition of the retry topic; beyond that its offsets count.
_PARKED_LOOKED_AT = 500


class Away(Exception):
    """A service does not answer, and why."""


class Member(NamedTuple):
    """A worker in a consumer group. Places as ``topic/partition``."""

    id: str
    client: str
    host: str
    partitions: list[str]


class Group(NamedTuple):
    """A consumer group as its broker sees it."""

    name: str
    state: str
    members: list[Member]


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """One stage's place in one partition.

    ``lag`` counts what could be worked on now: offsets, markers between records included, and 0 when no record is left.
    ``waiting`` are parked events before their time. ``oldest_at`` is when the first of the lag was appended.
    """

    topic: str
    partition: int
    position: int | None
    end: int
    lag: int
    waiting: int
    oldest_at: datetime | None
    member: str | None


@dataclass(frozen=True, slots=True)
class StageLag:
    """One stage: its group, its lag in all partitions, and its speed."""

    stage: str
    group: Group
    partitions: list[PartitionLag]
    #: Offsets a second of the topic the stage is measured by: usage.events, usage.rated. None with one look only.
    per_second: float | None

    @property
    def lag(self) -> int:
        return sum(one.lag for one in self.partitions)

    @property
    def waiting(self) -> int:
        return sum(one.waiting for one in self.partitions)

    @property
    def seconds_left(self) -> float | None:
        """Time to the end of today's lag at the present rate; None when it stands still or nobody measured."""
        return self.lag / self.per_second if self.per_second else None


@dataclass(frozen=True, slots=True)
class Relay:
    """Published catalog versions on their way to the topic."""

    pending: int
    oldest_at: datetime | None


@dataclass(frozen=True, slots=True)
class Refused:
    """What PostgreSQL holds of events that were not rated, and of rows that were not billed."""

    dead_letters: list[ReasonCount]
    parked: list[ReasonCount]
    quarantined: dict[str, int]


# -- Kafka


class KafkaLook:
    """One connection to Kafka, for as many looks as are wanted."""

    def __init__(self, settings: Settings) -> None:
        """Raises Away when no broker answers, or a topic is missing."""
        self._settings = settings
        self._topics = Topics(settings.topic_prefix)
        said: list[str] = []
        try:
            config: dict[str, Any] = {
                **settings.kafka,
                # The client's own reason (refused, unknown host, bad certificate) comes through this call back only.
                "error_cb": lambda error: said.append(error.str()),
                "log_level": 0,  # it goes into the answer, not onto the terminal
            }
        except ValueError as error:
            raise Away(str(error)) from error
        self._admin = AdminClient(config)
        try:
            known = self._admin.list_topics(timeout=KAFKA_ANSWERS_S).topics
        except KafkaException as error:
            self._admin.poll(0)
            raise Away(f"Kafka does not answer: {said[0] if said else error.args[0].str()}") from error
        topics = self._topics
        self.rater_topics = (topics.events, topics.retry)
        self.sink_topics = (topics.rated, topics.receipts, topics.retry, topics.dead_letter, topics.controls)
        names = dict.fromkeys((*self.rater_topics, *self.sink_topics))
        if missing := [name for name in names if name not in known]:
            raise Away(f"topic {missing[0]} does not exist: run `tally up`, or `tally topics` on your own Kafka")
        self.places = [(name, partition) for name in names for partition in sorted(known[name].partitions)]

    def ends(self) -> dict[Place, int]:
        """The offset after the last stable record or marker of every partition."""
        specs = {TopicPartition(*place): OffsetSpec.latest() for place in self.places}  # type: ignore[no-untyped-call]

        def ask() -> dict[Place, int]:
            committed = IsolationLevel.READ_COMMITTED
            futures = self._admin.list_offsets(specs, isolation_level=committed, request_timeout=_ANSWER_S)
            return {(tp.topic, tp.partition): future.result(_ANSWER_S).offset for tp, future in futures.items()}

        return answered(ask, _ANSWER_S)

    def rater_positions(self) -> dict[Place, int]:
        """What the raters' group has committed; a partition never committed is missing."""
        group = f"{self._settings.topic_prefix}rater"
        found = committed(self._admin, group, _ANSWER_S)
        return {(tp.topic, tp.partition): tp.offset for tp in found if tp.offset >= 0}

    def stops(self) -> list[Stop]:
        """Partitions that a dead-letter limit stopped."""
        return stops(self._settings, self._admin)

    def group(self, name: str) -> Group:
        name = f"{self._settings.topic_prefix}{name}"
        answer = self._admin.describe_consumer_groups([name], request_timeout=_ANSWER_S)[name].result(_ANSWER_S)
        members = [
            Member(
                member.member_id,
                member.client_id,
                member.host.removeprefix("/"),
                [f"{tp.topic}/{tp.partition}" for tp in sorted(member.assignment.topic_partitions, key=_by_place)],
            )
            for member in sorted(answer.members, key=lambda m: (m.host, m.member_id))
        ]
        return Group(name, answer.state.name.lower(), members)

    def stage(
        self,
        stage: str,
        topics: Iterable[str],
        positions: Mapping[Place, int],
        ends: Mapping[Place, int],
        per_second: float | None,
        schemas: Schemas,
    ) -> StageLag:
        """A stage's lag at these positions. A partition without one is read from its beginning."""
        group = self.group(stage)
        owners = {place: member.id for member in group.members for place in member.partitions}
        chosen = [place for topic in topics for place in self.places if place[0] == topic]
        behind = {place: positions.get(place, 0) for place in chosen if positions.get(place, 0) < ends[place]}
        found: defaultdict[Place, list[tuple[int, int]]] = defaultdict(list)  # (append or create time, due time), ms
        parked_topic = self._topics.retry if stage == "rater" else None
        parked = {place: start for place, start in behind.items() if place[0] == parked_topic}
        for message in peek(self._settings, {p: s for p, s in behind.items() if p not in parked}, most=1):
            found[place_of(message)].append((message.timestamp()[1], 0))
        for message in peek(self._settings, parked, most=_PARKED_LOOKED_AT):
            found[place_of(message)].append((message.timestamp()[1], _due_ms(message.value(), schemas)))
        now_ms = time.time_ns() // 1_000_000
        lags = []
        for place in chosen:
            records = found[place]
            due = [at for at, due_ms in records if due_ms <= now_ms]
            waiting = len(records) - len(due)
            lag = 0
            if due:
                counted = place in parked and len(records) < _PARKED_LOOKED_AT
                lag = len(due) if counted else ends[place] - behind[place] - waiting
            lags.append(
                PartitionLag(
                    *place,
                    position=positions.get(place),
                    end=ends[place],
                    lag=lag,
                    waiting=waiting,
                    oldest_at=datetime.fromtimestamp(min(due) / 1000, UTC) if due else None,
                    member=owners.get(f"{place[0]}/{place[1]}"),
                )
            )
        return StageLag(stage, group, lags, per_second)


def _by_place(tp: TopicPartition) -> Place:
    return tp.topic, tp.partition


def _due_ms(value: bytes | None, schemas: Schemas) -> int:
    """When a parked event is tried again; what is no letter is refused at once."""
    try:
        return to_micros(schemas.decode(value, DEAD_LETTER)["not_before"]) // 1000
    except WireError:
        return 0


# -- PostgreSQL

_POSITIONS = "SELECT topic, partition, next_offset FROM billing.sink_position"
_OUTBOX = "SELECT count(*), min(created_at) FROM billing.outbox WHERE relayed_at IS NULL"
_QUARANTINED = "SELECT reason, count(*) FROM billing.quarantine GROUP BY reason ORDER BY reason"


def sink_positions(connection: "Connection[Any]") -> dict[Place, int]:
    return {(topic, partition): offset for topic, partition, offset in connection.execute(_POSITIONS)}


def relay(connection: "Connection[Any]") -> Relay:
    row = connection.execute(_OUTBOX).fetchone()
    assert row is not None
    return Relay(*row)


def refused(connection: "Connection[Any]") -> Refused:
    return Refused(
        dead_letters=reasons(connection, Selection("dead_lettered")),
        parked=reasons(connection, Selection("parked")),
        quarantined=dict(connection.execute(_QUARANTINED).fetchall()),
    )


# -- rates


def per_second(topic: str, before: tuple[float, Mapping[Place, int]], now: tuple[float, Mapping[Place, int]]) -> float:
    """Offsets a second that a stage moved on a topic between two looks."""
    (before_at, before_positions), (now_at, positions) = before, now
    moved = sum(offset - before_positions.get(place, 0) for place, offset in positions.items() if place[0] == topic)
    return max(moved, 0) / (now_at - before_at)
