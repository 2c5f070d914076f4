"""The figures. Each function measures one thing on services that are up, and returns what it found."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from tempfile import TemporaryDirectory

from confluent_kafka import Consumer, KafkaException, TopicPartition
from psycopg import Connection

from pipeline.infra.kafka import passes
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, ensure_topics
from pipeline.producer import UsageProducer
from tests.bench import world
from tests.bench.world import Cost

RUNS = 3
#: A stuck run ends here. Seconds.
PATIENCE = 120
RATER_EVENTS = 400_000
#: Stock Faust takes about 150 µs an event: a tenth of the events tells as much.
FAUST_EVENTS = 40_000
SEEN_KEYS = 1_000_000
PRODUCER_EVENTS = 200_000
END_TO_END_RATE, END_TO_END_SECONDS = 5_000, 20


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    #: ours / peer's, run by run, median
    ratio: float | None = None

    def as_json(self) -> dict[str, object]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Speed:
    events_per_s: float
    cpu_us_per_event: float
    anonymous_mib: float


def rater(settings: Settings) -> Iterator[Figure]:
    """The rater with everything on and 1M keys in its state, and stock Faust on the same topic, in turn."""
    messages = world.events(RATER_EVENTS)
    ours: list[Speed] = []
    stock: list[Speed] = []
    for run in range(RUNS):
        here = _world(settings, f"rater{run}-")
        world.send_seen(here, SEEN_KEYS)
        world.send(here, Topics(here.topic_prefix).events, messages)
        with world.worker(here, world.RATER) as cost:
            ours.append(_speed(here, f"{here.topic_prefix}rater", cost, RATER_EVENTS))
        with TemporaryDirectory() as datadir:
            group = f"{here.topic_prefix}stock"
            topic = Topics(here.topic_prefix).events
            arguments = ", ".join(map(repr, (here.kafka_bootstrap, topic, group, datadir)))
            code = f"from tests.bench.stock_faust import main; main({arguments})"
            with world.worker(here, code) as cost:
                stock.append(_speed(here, group, cost, FAUST_EVENTS))
    peer = "stock Faust, pass-through"
    yield _figure("rater_events_per_s", "events/s", ours, stock, peer, lambda speed: speed.events_per_s)
    yield _figure("rater_cpu_us_per_event", "µs", ours, stock, peer, lambda speed: speed.cpu_us_per_event)
    yield Figure("rater_rss_mib", _median(speed.anonymous_mib for speed in ours), "MiB of RssAnon")


def sink(settings: Settings) -> Iterator[Figure]:
    """The sink on what a rater made of the usage, from its first row to its last."""
    rates = []
    messages = world.events(RATER_EVENTS // 2)
    here = _world(settings, "sink-")
    world.send(here, Topics(here.topic_prefix).events, messages)
    with world.worker(here, world.RATER) as cost:
        _speed(here, f"{here.topic_prefix}rater", cost, len(messages))
    for _ in range(RUNS):
        with connect(here.dsn, application="bench", autocommit=True) as connection:
            connection.execute(_FORGET)
            with world.worker(here, world.SINK):
                rates.append(_rows_per_second(connection, here))
    yield Figure("sink_rows_per_s", _median(rates), "rows/s")


def producer(settings: Settings) -> Iterator[Figure]:
    """UsageProducer from the first emit to the last delivery, one thread."""
    rates = []
    for run in range(RUNS):
        here = _world(settings, f"producer{run}-")
        with UsageProducer.from_settings(here, source="bench") as usage:
            started = time.perf_counter()
            for number in range(PRODUCER_EVENTS):
                usage.emit(
                    account=f"acct-{number % world.ACCOUNTS:05d}",
                    event_type="completion",
                    idempotency_key=f"bench-{number:012d}",
                    timestamp=datetime.now(UTC),
                    properties={"tokens": number % 2000, "model": "small", "region": "eu"},
                )
            if usage.flush(120):
                raise RuntimeError(f"not delivered: {usage.stats.trouble}")
            rates.append(PRODUCER_EVENTS / (time.perf_counter() - started))
    yield Figure("producer_events_per_s", _median(rates), "events/s")


def end_to_end(settings: Settings) -> Iterator[Figure]:
    """From emit to visible in PostgreSQL, at a steady 5,000 events/s."""
    here = _world(settings, "latency-")
    topics = Topics(here.topic_prefix)
    with (
        world.worker(here, world.RATER),
        world.worker(replace_dir(here, "sink"), world.SINK),
        connect(here.dsn, application="bench", autocommit=True) as connection,
        UsageProducer.from_settings(here, source="bench") as usage,
    ):
        connection.execute(_FORGET)  # what another figure left would count as arrived
        total = END_TO_END_RATE * END_TO_END_SECONDS
        reached: dict[int, list[tuple[float, int]]] = {}
        # Both workers have to have joined their groups: what comes before that measures starting, not running.
        _emit(usage, "warm", END_TO_END_RATE)
        _poll_until(connection, topics.rated, reached, END_TO_END_RATE)
        started = time.time()
        for number in range(total):
            if number % 50 == 0:
                ahead = started + number / END_TO_END_RATE - time.time()
                if ahead > 0:
                    time.sleep(ahead)
                _poll(connection, topics.rated, reached)
            _emit_one(usage, f"run-{number:09d}", number)
        _poll_until(connection, topics.rated, reached, END_TO_END_RATE + total)
        rows = connection.execute(_ARRIVALS, [datetime.fromtimestamp(started, UTC)]).fetchall()
    latencies = sorted(_visible_at(reached[partition], offset) - at.timestamp() for partition, offset, at in rows)
    if len(latencies) != total:
        raise RuntimeError(f"expected {total} rows, got {len(latencies)}")
    yield Figure("end_to_end_p50_s", latencies[len(latencies) // 2], "s")
    yield Figure("end_to_end_p99_s", latencies[len(latencies) * 99 // 100], "s")


FIGURES: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "producer": producer,
    "rater": rater,
    "sink": sink,
    "end_to_end": end_to_end,
}


# -- measuring


def _world(settings: Settings, prefix: str) -> Settings:
    """Topics of its own under a prefix, with the catalog on them; the database is the run's."""
    here = settings.model_copy(update={"topic_prefix": prefix, "data_dir": settings.data_dir / prefix})
    ensure_topics(here)
    world.send_catalog(here)
    return here


def replace_dir(settings: Settings, name: str) -> Settings:
    return settings.model_copy(update={"data_dir": settings.data_dir / name})


def _speed(settings: Settings, group: str, cost: Cost, events: int) -> Speed:
    """Watch a consumer group from its first committed offset until ``events`` are committed."""
    topic = Topics(settings.topic_prefix).events
    partitions = [TopicPartition(topic, partition) for partition in range(settings.partitions)]
    # Reading uncommitted, it does not wait for the open transaction that moves the offsets: there always is one.
    consumer = Consumer({**settings.kafka, "group.id": group, "isolation.level": "read_uncommitted"})
    first: tuple[float, float, int] | None = None
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                done = sum(max(0, tp.offset) for tp in consumer.committed(partitions, 10))
            except KafkaException as error:  # a group's first moments on a new broker
                if not passes(error.args[0]):
                    raise
                continue
            now, cpu = time.perf_counter(), cost.cpu_seconds()
            cost.look()
            if first is None and done:
                first = (now, cpu, done)
            if first is not None and done >= events:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{group}: {done} of {events} events after {PATIENCE} s")
            time.sleep(0.02)
    finally:
        consumer.close()
    count = done - first[2]
    return Speed(count / (now - first[0]), (cpu - first[1]) / count * 1e6, cost.anonymous_bytes / 2**20)


def _rows_per_second(connection: "Connection[tuple[int]]", settings: Settings) -> float:
    topic = Topics(settings.topic_prefix).rated
    consumer = Consumer({**settings.kafka, "group.id": "bench"})
    ends = sum(
        consumer.get_watermark_offsets(TopicPartition(topic, partition), 10)[1]
        for partition in range(settings.partitions)
    )
    consumer.close()
    first: tuple[float, int] | None = None
    while True:
        row = connection.execute(_POSITION, [topic]).fetchone()
        done, now = int(row[0]) if row else 0, time.perf_counter()
        if first is None and done:
            first = (now, done)
        if first is not None and done >= ends - settings.partitions:  # each partition ends with a transaction marker
            return (done - first[1]) / (now - first[0])
        time.sleep(0.02)


def _emit_one(usage: UsageProducer, key: str, number: int) -> None:
    usage.emit(
        account=f"acct-{number % world.ACCOUNTS:05d}",
        event_type="completion",
        idempotency_key=key,
        timestamp=datetime.now(UTC),
        properties={"tokens": number % 2000 + 1, "model": "small", "region": "eu"},
    )


def _emit(usage: UsageProducer, name: str, count: int) -> None:
    for number in range(count):
        _emit_one(usage, f"{name}-{number:09d}", number)


def _poll(connection: "Connection[tuple[int, int]]", topic: str, reached: dict[int, list[tuple[float, int]]]) -> None:
    """Note how far the sink is, per partition, and when it was seen there."""
    for partition, offset in connection.execute(_POSITIONS, [topic]).fetchall():
        seen = reached.setdefault(partition, [])
        if not seen or seen[-1][1] != offset:
            seen.append((time.time(), offset))


def _poll_until(
    connection: "Connection[tuple[int]]", topic: str, reached: dict[int, list[tuple[float, int]]], rows: int
) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        _poll(connection, topic, reached)  # type: ignore[arg-type]
        row = connection.execute("SELECT count(*) FROM billing.rated_usage WHERE source LIKE 'bench/%'").fetchone()
        if row and row[0] >= rows:
            _poll(connection, topic, reached)  # type: ignore[arg-type]
            return
        time.sleep(0.01)
    raise RuntimeError(f"expected {rows} rows in 120 s")


def _visible_at(seen: list[tuple[float, int]], offset: int) -> float:
    return next(at for at, position in seen if position > offset)


def _figure(
    name: str, unit: str, ours: list[Speed], peers: list[Speed], peer: str, of: Callable[[Speed], float]
) -> Figure:
    ratio = _median(of(mine) / of(theirs) for mine, theirs in zip(ours, peers, strict=True))
    return Figure(name, _median(map(of, ours)), unit, peer, _median(map(of, peers)), ratio)


def _median(values: "Iterator[float] | map[float] | list[float]") -> float:
    return float(statistics.median(values))


_POSITION = "SELECT coalesce(sum(next_offset), 0) FROM billing.sink_position WHERE topic = %s"
_POSITIONS = "SELECT partition, next_offset FROM billing.sink_position WHERE topic = %s"
_ARRIVALS = "SELECT rated_partition, rated_offset, event_time FROM billing.rated_usage WHERE event_time >= %s"
_FORGET = """
TRUNCATE billing.rated_usage, billing.invoice_line, billing.invoice, billing.receipt, billing.unrated_event,
         billing.source_sequence, billing.sink_position, billing.quarantine
"""
