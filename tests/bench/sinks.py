"""The sink: into an empty month, and into one that holds 20M rows."""

import calendar
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from psycopg import Connection
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier, Literal
from pydantic import SecretStr

from pipeline.billing.months import next_month
from pipeline.infra.postgres import connect, migrate
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from tests.bench import world
from tests.bench.figures import RUNS, Figure, median
from tests.bench.raters import rated

EVENTS = 200_000
#: Into the month. PostgreSQL logs each page whole the first time it is touched after a checkpoint, every 30 minutes; a
#: sink is past that within a minute. So the first run does not count.
MONTH_ROWS, MONTH_EVENTS = 20_000_000, 600_000
#: Connections that fill the month side by side.
_FILLERS = 2
#: A run that takes longer than this has failed. Seconds.
_PATIENCE_S = 300


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one run, from the first rows seen to the last; CPU is the sink's own, without PostgreSQL's."""

    rows_per_s: float
    cpu_us_per_row: float


def sink(settings: Settings) -> Iterator[Figure]:
    """From its first row to its last, on what a rater made of the usage."""
    speeds = []
    with (
        world.deployment(settings, "sink") as here,
        connect(here.dsn, application="bench", autocommit=True, role=None) as connection,
    ):
        world.send(here, Topics(here.topic_prefix).events, world.events(EVENTS))
        rated(here, EVENTS)
        for _ in range(RUNS):
            forget(connection)
            speeds.append(sunk(here, connection))
    yield from _figures("sink", speeds, "")


def sink_20m(settings: Settings) -> Iterator[Figure]:
    """As ``sink``, all events in one month whose rows and unique index were there before; in a database of its own."""
    speeds = []
    last = datetime.now(UTC) - timedelta(days=5)
    beginning = last.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    first = max(beginning, last - timedelta(days=14))
    with own_database(settings, "bench_20m") as own, world.deployment(own, "sink20m") as here:
        _fill(here.dsn, beginning, MONTH_ROWS)
        with connect(here.dsn, application="bench", autocommit=True, role=None) as connection:
            connection.execute("CHECKPOINT")  # of what filling it left, not of what sinks do
            for run in range(1 + RUNS):
                times_us = int(first.timestamp() * 1e6), int(last.timestamp() * 1e6)
                world.send(here, Topics(here.topic_prefix).events, world.events(MONTH_EVENTS, run, times_us))
                rated(here, MONTH_EVENTS, since=run * MONTH_EVENTS)
                speeds.append(sunk(here, connection))
    yield from _figures("sink_20m", speeds[1:], f" into a month of {MONTH_ROWS / 1e6:.0f}M rows")


def forget(connection: "Connection[Any]") -> None:
    """Empty what sinks write, and what hangs on it, append only or not. No sink may run meanwhile."""
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")  # without the triggers that refuse it
        connection.execute(_FORGET)


def _figures(name: str, speeds: Sequence[Speed], where: str) -> Iterator[Figure]:
    yield Figure(f"{name}_rows_per_s", median(speed.rows_per_s for speed in speeds), f"rows/s{where}")
    yield Figure(f"{name}_cpu_us_per_row", median(speed.cpu_us_per_row for speed in speeds), f"µs{where}")


def sunk(settings: Settings, connection: "Connection[Any]") -> Speed:
    """Run a sink from where the last one stopped to the end of the rated usage."""
    topic = Topics(settings.topic_prefix).rated
    consumer = Consumer({**settings.kafka, "group.id": "bench"})
    # Each partition ends with a transaction's marker, which no position passes.
    end = sum(
        consumer.get_watermark_offsets(TopicPartition(topic, partition), 10)[1] - 1
        for partition in range(settings.partitions)
    )
    consumer.close()
    since = _position(connection, topic)
    first: tuple[float, float, int] | None = None
    deadline = time.monotonic() + _PATIENCE_S
    with world.worker(world.folder(settings, "sink"), world.SINK) as cost:
        while True:
            done, now, cpu = _position(connection, topic), time.perf_counter(), cost.cpu_seconds()
            if first is None and done > since:
                first = (now, cpu, done)
            if first is not None and done >= end:
                rows = done - first[2]
                return Speed(rows / (now - first[0]), (cpu - first[1]) / rows * 1e6)
            if time.monotonic() > deadline:
                raise RuntimeError(f"the sink is at {done} of {end} after {_PATIENCE_S} s")
            cost.look()
            time.sleep(0.02)


def _position(connection: "Connection[Any]", topic: str) -> int:
    (position,) = connection.execute(_POSITION, [topic]).fetchone() or (0,)
    return int(position)


@contextmanager
def own_database(settings: Settings, name: str) -> Iterator[Settings]:
    """Settings with a database of that name beside the run's, migrated; dropped at the end."""
    with connect(settings.dsn, application="bench", autocommit=True, role=None) as admin:
        admin.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        try:
            dsn = make_conninfo(settings.dsn, dbname=name)
            migrate(dsn)
            yield settings.model_copy(update={"postgres_dsn": SecretStr(dsn)})
        finally:
            admin.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


def _fill(dsn: str, beginning: datetime, rows: int) -> None:
    """Give a month its partition with ``rows`` rows, as sinks leave one, but in minutes: the index is built last."""
    month = beginning.date()
    name = f"rated_usage_{month:%Y_%m}"
    table = Identifier("billing", name)
    second = calendar.monthrange(month.year, month.month)[1] * 86_400 / rows
    with connect(dsn, application="bench", autocommit=True, role=None) as connection:
        connection.execute(SQL(_CREATE).format(table))

        def insert(part: int) -> None:
            with connect(dsn, application="bench", autocommit=True, role=None) as filler:
                statement = SQL(_INSERT).format(
                    table, *map(Literal, (month, second, part + 1, rows, _FILLERS, world.ACCOUNTS))
                )
                filler.execute(statement)

        with ThreadPoolExecutor(_FILLERS) as fillers:
            list(fillers.map(insert, range(_FILLERS)))
        connection.execute(SQL(_INDEX).format(table))
        attach = SQL("ALTER TABLE billing.rated_usage ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})")
        connection.execute(attach.format(table, Literal(month), Literal(next_month(month))))
        connection.execute(SQL("ANALYZE {}").format(table))


_POSITION = "SELECT coalesce(sum(next_offset), 0) FROM billing.sink_position WHERE topic = %s"
_FORGET = """
TRUNCATE billing.rated_usage, billing.invoice_line, billing.invoice, billing.receipt, billing.unrated_event,
         billing.source_sequence, billing.sink_position, billing.quarantine CASCADE
"""
# Vacuum of what was filled is none of the sink's costs, and would come in the middle.
_CREATE = """
CREATE TABLE {} (LIKE billing.rated_usage INCLUDING DEFAULTS INCLUDING CONSTRAINTS) WITH (autovacuum_enabled = off)
"""
_INSERT = """
INSERT INTO {0} (
    event_month, identity, line_id, origin_offset, rated_offset, sequence, catalog_offset, event_time, appended_at,
    origin_partition, rated_partition, entry, kind, late, charge, cell, account, idempotency_key, event_type, subject,
    source, quantity, quantity_before, quantity_after, amount, properties
)
SELECT {1}, gen_random_uuid(), n % 2000, n, n, n, 2000, {1}::timestamptz + n * {2} * interval '1 s', now(),
       n % 4, n % 4, 0, 'usage', false, 'c-completion', '', 'acct-' || lpad((n % {6})::text, 5, '0'),
       md5(n::text), 'completion', '',
       'fill', n % 2000, n, n + n % 2000, (n % 2000) * 0.000002, '{{"model": "small", "region": "eu", "tokens": "123"}}'
FROM generate_series({3}, {4}, {5}) AS n
"""
_INDEX = "ALTER TABLE {} ADD UNIQUE (event_month, identity, charge, cell, entry)"
