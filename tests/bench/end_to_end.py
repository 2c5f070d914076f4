"""The whole way: the producer alone, and from ``emit`` to visible in PostgreSQL, all of it in this run.

Latency is counted from the moment an event was due, so a producer that falls behind makes it longer, not invisible.
"""

import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from psycopg import Connection

from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.producer import UsageProducer
from tests.bench import world
from tests.bench.figures import RUNS, Figure, median
from tests.bench.sinks import forget

PRODUCER_EVENTS = 200_000
#: Emitted at once to find the peak, and beforehand: until both workers have joined it is starting that is measured.
PEAK_EVENTS, WARM_EVENTS = 300_000, 20_000
STEADY_RATE = 5_000
SECONDS = 20
WIDE_PARTITIONS = 16
#: Left out of the figure with that many: the peak before them warms up the others' workers and topics. Seconds.
WIDE_WARM_SECONDS = 10
#: A run that takes longer than this has failed. Seconds.
_PATIENCE_S = 180
#: Between two looks at how far the sink is: latencies are too long by up to this. Seconds.
_LOOK_EVERY_S = 0.01
#: Between two bursts of events that are due. Seconds.
_BURST_EVERY_S = 0.002


@dataclass(slots=True)
class Way:
    """A producer, a rater and a sink at work, and what was emitted so far."""

    settings: Settings
    producer: UsageProducer
    connection: "Connection[Any]"
    emitted: int = 0

    def emit(self, at: datetime) -> None:
        _emit(self.producer, self.emitted, at)
        self.emitted += 1

    def await_visible(self) -> None:
        """Wait until every event emitted so far is in PostgreSQL."""
        deadline = time.monotonic() + _PATIENCE_S
        while (visible := self._visible()) < self.emitted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{visible} of {self.emitted} rows after {_PATIENCE_S} s")
            time.sleep(0.05)

    def _visible(self) -> int:
        (rows,) = self.connection.execute(_VISIBLE).fetchone() or (0,)
        return int(rows)


@dataclass(slots=True)
class Reached:
    """How far the sink was seen to be on each partition, and when."""

    offsets: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    times: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def note(self, partition: int, offset: int, now: float) -> None:
        if not self.offsets[partition] or self.offsets[partition][-1] != offset:
            self.offsets[partition].append(offset)
            self.times[partition].append(now)

    def visible_at(self, partition: int, offset: int) -> float:
        """When a record was first seen to be passed, seconds since 1970."""
        return self.times[partition][bisect_right(self.offsets[partition], offset)]


def producer(settings: Settings) -> Iterator[Figure]:
    """UsageProducer from the first emit to the last delivery, one thread."""
    rates = []
    for run in range(RUNS):
        with (
            world.deployment(settings, f"producer{run}") as here,
            UsageProducer.from_settings(here, source="bench") as usage,
        ):
            started = time.perf_counter()
            for number in range(PRODUCER_EVENTS):
                _emit(usage, number, datetime.now(UTC))
            if usage.flush(120):
                raise RuntimeError(f"not delivered: {usage.stats.trouble}")
            rates.append(PRODUCER_EVENTS / (time.perf_counter() - started))
    yield Figure("producer_events_per_s", median(rates), "events/s")


def end_to_end(settings: Settings) -> Iterator[Figure]:
    """The peak rate first; then latencies at 5,000 events/s, at half the peak, and at that with sixteen partitions."""
    with _way(settings, "way") as way:
        peak = _peak(way)
        yield Figure("end_to_end_peak_events_per_s", peak, "events/s")
        half = peak / 2
        yield from _percentiles("end_to_end", _latencies(way, STEADY_RATE), f"at {STEADY_RATE:,} events/s")
        yield from _percentiles("end_to_end_half_peak", _latencies(way, half), f"at {half:,.0f} events/s")
    with _way(settings, "wide", partitions=WIDE_PARTITIONS) as way:
        _latencies(way, half, WIDE_WARM_SECONDS)
        latencies = _latencies(way, half)
        yield from _percentiles(f"end_to_end_{WIDE_PARTITIONS}_partitions", latencies, f"at {half:,.0f} events/s")


@contextmanager
def _way(settings: Settings, name: str, **options: Any) -> Iterator[Way]:
    with (
        world.deployment(settings, name, **options) as here,
        connect(here.dsn, application="bench", autocommit=True, role=None) as connection,
    ):
        forget(connection)  # what another figure left would count as arrived
        with (
            world.worker(world.folder(here, "rater"), world.RATER),
            world.worker(world.folder(here, "sink"), world.SINK),
            UsageProducer.from_settings(here, source="bench") as usage,
        ):
            way = Way(here, usage, connection)
            for _ in range(WARM_EVENTS):
                way.emit(datetime.now(UTC))
            way.await_visible()
            yield way


def _peak(way: Way) -> float:
    """Events a second from the first emit to the last row, with the producer as far ahead as it can be."""
    started = time.perf_counter()
    for _ in range(PEAK_EVENTS):
        way.emit(datetime.now(UTC))
    way.await_visible()
    return PEAK_EVENTS / (time.perf_counter() - started)


def _latencies(way: Way, rate: float, seconds: int = SECONDS) -> list[float]:
    """Seconds from due to visible of every event at a steady rate, shortest first."""
    total = int(rate * seconds)
    with _watched(way.settings) as reached:
        started, done = time.time(), 0
        while done < total:
            due = min(total, int((time.time() - started) * rate) + 1)
            for number in range(done, due):
                way.emit(datetime.fromtimestamp(started + number / rate, UTC))
            done = due
            time.sleep(_BURST_EVERY_S)
        way.await_visible()
    rows = way.connection.execute(_ARRIVALS, [datetime.fromtimestamp(started, UTC)]).fetchall()
    if len(rows) != total:
        raise RuntimeError(f"expected {total} rows, got {len(rows)}")
    return sorted(reached.visible_at(partition, offset) - due_at.timestamp() for partition, offset, due_at in rows)


@contextmanager
def _watched(settings: Settings) -> Iterator[Reached]:
    """Watch the sink's positions from a thread while in the block, with a last look at its end."""
    reached, stop, topic = Reached(), threading.Event(), Topics(settings.topic_prefix).rated

    def watch() -> None:
        with connect(settings.dsn, application="bench", autocommit=True, role=None) as connection:
            stopping = False
            while not stopping:
                stopping = stop.wait(_LOOK_EVERY_S)
                positions = connection.execute(_POSITIONS, [topic]).fetchall()
                now = time.time()
                for partition, offset in positions:
                    reached.note(partition, offset, now)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield reached
        finally:
            stop.set()
        watching.result()


def _percentiles(name: str, latencies: list[float], at: str) -> Iterator[Figure]:
    for percent in (50, 99):
        yield Figure(f"{name}_p{percent}_s", latencies[len(latencies) * percent // 100], f"s {at}")


def _emit(usage: UsageProducer, number: int, at: datetime) -> None:
    usage.emit(
        account=f"acct-{number % world.ACCOUNTS:05d}",
        event_type="completion",
        idempotency_key=f"bench-{number:012d}",
        timestamp=at,
        properties={"tokens": number % 2000 + 1, "model": "small", "region": "eu"},
    )


# Of the aggregates: counting the rows themselves would slow down what is measured.
_VISIBLE = "SELECT coalesce(sum(events), 0) FROM billing.invoice_line"
_POSITIONS = "SELECT partition, next_offset FROM billing.sink_position WHERE topic = %s"
_ARRIVALS = "SELECT rated_partition, rated_offset, event_time FROM billing.rated_usage WHERE event_time >= %s"
