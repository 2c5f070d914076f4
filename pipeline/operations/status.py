"""The state of a deployment in one object: what is behind, how fast it moves, who works, what waits for a person, and
what usage may be missing.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from confluent_kafka import KafkaException
from psycopg import Connection

from pipeline.core.gaps import Gap, HourTotal, Silence, because, when
from pipeline.infra.avro import load_schemas
from pipeline.infra.postgres import NotReady, connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.operations.gaps import Gaps, open_gaps, short_hours, silent_sources
from pipeline.operations.lag import (
    Away,
    KafkaLook,
    Refused,
    Relay,
    StageLag,
    per_second,
    refused,
    relay,
    sink_positions,
)
from pipeline.operations.peek import Place
from pipeline.operations.stops import Stop

#: Time between the two looks that rates are made of, seconds.
BETWEEN_LOOKS_S = 1.0


class Moment(NamedTuple):
    """Where the stages stood at one moment (monotonic seconds). None where that service is away."""

    at: float
    rater: Mapping[Place, int] | None
    sink: Mapping[Place, int] | None


@dataclass(frozen=True, slots=True)
class Missing:
    """Usage that may be missing."""

    gaps: Gaps
    #: Hours of which less arrived than their producer says it emitted.
    short: list[HourTotal]
    silent: list[Silence]


@dataclass(frozen=True, slots=True)
class Status:
    """One look. None where a service is away; its problem says why."""

    at: datetime
    kafka_problem: str | None
    postgres_problem: str | None
    rater: StageLag | None
    sink: StageLag | None
    relay: Relay | None
    refused: Refused | None
    #: Partitions that a dead-letter limit stopped.
    stopped: list[Stop] | None
    missing: Missing | None
    #: Voided documents of which something is billed nowhere since: to be issued anew.
    unbilled_voids: int | None

    @property
    def reachable(self) -> bool:
        return self.kafka_problem is None and self.postgres_problem is None

    @property
    def caught_up(self) -> bool:
        """Every stage was reached and has nothing to do."""
        stages = (self.rater, self.sink)
        return (
            not self.stopped
            and self.relay is not None
            and self.relay.pending == 0
            and all(s is not None and s.lag == 0 for s in stages)
        )


class Watcher:
    """Looks again and again; connects anew after a service was away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._schemas = load_schemas(settings.registry_url)
        self._topics = Topics(settings.topic_prefix)
        self._kafka: KafkaLook | None = None
        self._postgres: Connection[Any] | None = None
        self._before: Moment | None = None

    def close(self) -> None:
        if self._postgres is not None:
            self._postgres.close()

    def look(self) -> Status:
        """Look now. Rates come from the last look, the first time from one a second before; while a service is away
        there may be none.
        """
        before, (now, kafka_problem, postgres_problem) = self._before, self._moment()
        if before is None and kafka_problem is None and postgres_problem is None:
            before = now
            time.sleep(BETWEEN_LOOKS_S)
            now, kafka_problem, postgres_problem = self._moment()
        self._before = now
        rater = sink = stopped = None
        pending = rest = missing = voids = None
        if self._kafka is not None:
            topics, kafka = self._topics, self._kafka
            try:
                ends, stopped = kafka.ends(), kafka.stops()
                if now.rater is not None:
                    rate = _rate(topics.events, before and (before.at, before.rater), (now.at, now.rater))
                    rater = kafka.stage("rater", kafka.rater_topics, now.rater, ends, rate, self._schemas)
                if now.sink is not None:
                    rate = _rate(topics.rated, before and (before.at, before.sink), (now.at, now.sink))
                    sink = kafka.stage("sink", kafka.sink_topics, now.sink, ends, rate, self._schemas)
            except (KafkaException, TimeoutError) as error:
                kafka_problem, self._kafka = _said(error), None
        if self._postgres is not None:
            try:
                pending, rest = relay(self._postgres), refused(self._postgres)
                missing = self._missing(self._postgres, caught_up=bool(rater and sink and not rater.lag + sink.lag))
                voids = _unbilled_voids(self._postgres)
            except psycopg.Error as error:
                postgres_problem = self._lost_postgres(error)
        now_at, problems = datetime.now(UTC), (kafka_problem, postgres_problem)
        return Status(now_at, *problems, rater, sink, pending, rest, stopped, missing, voids)

    def _missing(self, connection: "Connection[Any]", *, caught_up: bool) -> Missing:
        grace_s = self._settings.sequence_grace
        return Missing(
            gaps=open_gaps(connection, grace_s=grace_s),
            short=short_hours(connection, grace_s=grace_s),
            silent=silent_sources(connection, datetime.now(UTC), caught_up=caught_up),
        )

    def _moment(self) -> tuple[Moment, str | None, str | None]:
        """Where the stages stand, and what does not answer."""
        kafka_problem = postgres_problem = None
        rater = sink = None
        try:
            self._kafka = self._kafka or KafkaLook(self._settings)
            rater = self._kafka.rater_positions()
        except (Away, KafkaException, TimeoutError) as error:
            kafka_problem, self._kafka = _said(error), None
        try:
            self._postgres = self._postgres or connect(self._settings.dsn, application="status", autocommit=True)
            sink = sink_positions(self._postgres)
        except ValueError as error:  # no address known
            postgres_problem = str(error)
        except psycopg.Error as error:
            postgres_problem = self._lost_postgres(error)
        return Moment(time.monotonic(), rater, sink), kafka_problem, postgres_problem

    def _lost_postgres(self, error: psycopg.Error) -> str:
        if self._postgres is not None:
            self._postgres.close()
        self._postgres = None
        if isinstance(error, NotReady):
            return str(error)
        if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
            return "PostgreSQL has no tables of Tally yet: run `tally up`, or `tally migrate` on your own server"
        return f"PostgreSQL does not answer: {_line(str(error))}"


def _unbilled_voids(connection: "Connection[Any]") -> int:
    row = connection.execute("SELECT count(*) FROM billing.unbilled_void").fetchone()
    assert row is not None, "an aggregate gives one row"
    return int(row[0])


def _said(error: Exception) -> str:
    return f"Kafka does not answer: {error.args[0].str()}" if isinstance(error, KafkaException) else str(error)


def _line(text: str) -> str:
    return " ".join(text.split())


def _rate(
    topic: str, before: tuple[float, Mapping[Place, int] | None] | None, now: tuple[float, Mapping[Place, int]]
) -> float | None:
    if before is None or before[1] is None:
        return None
    return per_second(topic, (before[0], before[1]), now)


def headline(status: Status) -> str:
    """What a person wants to know first, in one line."""
    parts = [problem for problem in (status.kafka_problem, status.postgres_problem) if problem]
    for stage, records in ((status.rater, "events"), (status.sink, "records")):
        if stage is not None and stage.lag:
            parts.append(_behind(stage, records))
        elif stage is not None and not stage.group.members:
            parts.append(f"no {stage.stage} is running")
    if status.stopped:
        names = ", ".join(str(stop.partition) for stop in status.stopped)
        parts.insert(0, f"partition {names} stopped by a dead-letter limit")
    if status.relay is not None and status.relay.pending:
        versions = "version waits" if status.relay.pending == 1 else "versions wait"
        parts.append(f"{status.relay.pending:,} catalog {versions} for the relay")
    if status.caught_up:
        parts.insert(0, "all caught up")
    if status.missing is not None:
        parts += _missing_parts(status.missing)
    if status.unbilled_voids:
        documents = "document is" if status.unbilled_voids == 1 else "documents are"
        parts.append(f"{status.unbilled_voids:,} voided {documents} billed nowhere else (finance.unbilled_voids)")
    return "; ".join(parts)


def _missing_parts(missing: Missing) -> list[str]:
    parts = []
    if missing.gaps.missing:
        numbers = "sequence number is" if missing.gaps.missing == 1 else "sequence numbers are"
        sources = "1 source" if missing.gaps.sources == 1 else f"{missing.gaps.sources:,} sources"
        parts.append(f"{missing.gaps.missing:,} {numbers} missing from {sources}")
    if missing.silent:
        parts.append(
            "1 source fell silent" if len(missing.silent) == 1 else f"{len(missing.silent):,} sources fell silent"
        )
    return parts


def _behind(stage: StageLag, records: str) -> str:
    partitions = {one.partition for one in stage.partitions if one.lag}
    where = "1 partition" if len(partitions) == 1 else f"{len(partitions)} partitions"
    text = f"{stage.stage} is {stage.lag:,} {records} behind on {where}"
    if not stage.group.members:
        return f"{text}, and none is running"
    if stage.per_second is None:
        return text
    if stage.seconds_left is None:
        return f"{text}, and stands still"
    return f"{text}, ~{max(1, round(stage.seconds_left)):,} s at the present rate"


def as_json(status: Status) -> dict[str, Any]:
    """The status as data for JSON: field names are a promise."""
    return {
        "at": status.at,
        "headline": headline(status),
        "caught_up": status.caught_up,
        "kafka": {"reachable": status.kafka_problem is None, "problem": status.kafka_problem},
        "postgres": {"reachable": status.postgres_problem is None, "problem": status.postgres_problem},
        "rater": None if status.rater is None else _stage_json(status.rater),
        "sink": None if status.sink is None else _stage_json(status.sink),
        "stopped": None if status.stopped is None else [stop._asdict() for stop in status.stopped],
        "relay": None
        if status.relay is None
        else {"pending_versions": status.relay.pending, "oldest_at": status.relay.oldest_at},
        "dead_letters": None
        if status.refused is None
        else [
            {
                "reason": one.reason,
                "events": one.events,
                "discarded": one.discarded,
                "oldest_at": one.oldest_at,
                "oldest_age_seconds": _age(status.at, one.oldest_at),
            }
            for one in status.refused.dead_letters
        ],
        "parked": None
        if status.refused is None
        else [
            {
                "reason": one.reason,
                "events": one.events,
                "discarded": one.discarded,
                "replaying": one.replaying,
                "oldest_at": one.oldest_at,
                "oldest_age_seconds": _age(status.at, one.oldest_at),
                "next_due_at": one.next_due_at,
            }
            for one in status.refused.parked
        ],
        "quarantined": None
        if status.refused is None
        else [{"reason": reason, "rows": rows} for reason, rows in status.refused.quarantined.items()],
        "missing": None if status.missing is None else _missing_json(status.missing),
        "unbilled_voids": status.unbilled_voids,
    }


def _missing_json(missing: Missing) -> dict[str, Any]:
    return {
        "sequence_numbers": missing.gaps.missing,
        "runs": missing.gaps.runs,
        "sources": missing.gaps.sources,
        "gaps": [gap_json(gap) for gap in missing.gaps.explained],
        "short_hours": [asdict(hour) for hour in missing.short],
        "silent_sources": [asdict(silence) for silence in missing.silent],
    }


def gap_json(gap: Gap) -> dict[str, Any]:
    """An open hole as data for JSON."""
    return asdict(gap) | {"missing": gap.missing, "because": because(gap), "when": when(gap)}


def _stage_json(stage: StageLag) -> dict[str, Any]:
    return {
        "lag": stage.lag,
        "waiting": stage.waiting,
        "per_second": None if stage.per_second is None else round(stage.per_second, 1),
        "seconds_left": None if stage.seconds_left is None else round(stage.seconds_left, 1),
        "group": {
            "name": stage.group.name,
            "state": stage.group.state,
            "members": [member._asdict() for member in stage.group.members],
        },
        "partitions": [
            {
                "topic": one.topic,
                "partition": one.partition,
                "position": one.position,
                "end": one.end,
                "lag": one.lag,
                "waiting": one.waiting,
                "oldest_at": one.oldest_at,
                "member": one.member,
            }
            for one in stage.partitions
        ],
    }


def _age(now: datetime, then: datetime | None) -> float | None:
    return None if then is None else round((now - then).total_seconds(), 1)
