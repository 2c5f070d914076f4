"""The rater: beside stock Faust, two workers beside one, and with 50M keys in its state beside 1M."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import psutil
from confluent_kafka import Consumer, KafkaException, TopicPartition

from pipeline.infra.kafka import passes
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from tests.bench import realistic, world
from tests.bench.figures import RUNS, Figure, Skipped, compared, median
from tests.bench.world import Cost

#: So many that what a worker has under way at its first commit, a batch of each partition, is at most 2 % of them.
EVENTS = 1_000_000
#: Events of five rows each.
CATALOG_EVENTS = 400_000
#: Stock Faust takes about 150 µs an event, and commits each second what it has done: fewer tell as much.
FAUST_EVENTS = 40_000
FEW_KEYS, MANY_KEYS = 1_000_000, 50_000_000
#: A run that takes longer than this has failed; restoring 50M keys at 100,000 a second fits in. Seconds.
PATIENCE_S = 600
#: The first part of a run, in which workers join and a JVM warms up: the steady rate is that of the rest.
WARM_UP = 0.4
#: CPUs that must be idle for two workers to run side by side; the waiting broker and database take a little.
_FREE_CPUS_MIN = 1.8


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one run, from the first commit seen to the last; CPU and memory are those of all its workers."""

    events_per_s: float
    steady_events_per_s: float
    cpu_us_per_event: float
    #: From the processes' start, theirs included.
    whole_cpu_us_per_event: float
    anonymous_mib: float


def rater(settings: Settings) -> Iterator[Figure]:
    """One worker with everything on and 1M keys in its state, and stock Faust on the same topic, in turn."""
    messages = world.events(EVENTS)
    ours: list[Speed] = []
    stock: list[Speed] = []
    for run in range(RUNS):
        with world.deployment(settings, f"rater{run}") as here:
            world.send_seen(here, FEW_KEYS)
            world.send(here, Topics(here.topic_prefix).events, messages)
            ours.append(rated(here, EVENTS))
            stock.append(_stock_faust(here))
    peer = "stock Faust, pass-through"
    yield compared("rater_events_per_s", "events/s", _rates(ours), peer, _rates(stock))
    yield compared("rater_cpu_us_per_event", "µs", _costs(ours), peer, _costs(stock))
    yield Figure("rater_rss_mib", median(speed.anonymous_mib for speed in ours), "MiB of RssAnon")


def catalog(settings: Settings) -> Iterator[Figure]:
    """Rated rows by a realistic catalog beside the plainest one, whose events make one row each, in turn."""
    plain_events, events = world.events(EVENTS), realistic.events(CATALOG_EVENTS)
    plain: list[Speed] = []
    real: list[Speed] = []
    for run in range(RUNS):
        with world.deployment(settings, f"plain{run}") as here:
            world.send(here, Topics(here.topic_prefix).events, plain_events)
            plain.append(rated(here, len(plain_events)))
        with world.deployment(settings, f"catalog{run}", realistic.catalog()) as here:
            world.send(here, Topics(here.topic_prefix).events, events)
            real.append(rated(here, len(events)))
    yield compared("catalog_events_per_s", "events/s", _rates(real), "plain catalog", _rates(plain))
    rows = [rate * realistic.CHARGES for rate in _rates(real)]
    plain_rows = [rate * world.RATED_SHARE for rate in _rates(plain)]
    yield compared("catalog_rows_per_s", "rated rows/s", rows, "plain catalog", plain_rows)
    cost = [speed.cpu_us_per_event / realistic.CHARGES for speed in real]
    plain_cost = [speed.cpu_us_per_event / world.RATED_SHARE for speed in plain]
    yield compared("catalog_cpu_us_per_row", "µs of CPU a row", cost, "plain catalog", plain_cost)


def scale(settings: Settings) -> Iterator[Figure]:
    """Two workers beside one, once both have joined. The broker and this program take their share of the same CPUs."""
    cpus = len(os.sched_getaffinity(0))
    free = cpus * (1 - psutil.cpu_percent(2.0) / 100)
    if free < _FREE_CPUS_MIN:
        raise Skipped(f"needs two free CPUs, and {free:.1f} of {cpus} are idle")
    messages = world.events(EVENTS)
    speeds: dict[int, list[Speed]] = {1: [], 2: []}
    for run in range(RUNS):
        for workers, found in speeds.items():
            with world.deployment(settings, f"scale{run}-{workers}") as here:
                world.send(here, Topics(here.topic_prefix).events, messages)
                found.append(rated(here, EVENTS, workers=workers))
    one, two = ([speed.steady_events_per_s for speed in found] for found in speeds.values())
    yield compared("scale_two_workers_events_per_s", f"events/s on {cpus} CPUs", two, "one worker", one)


def many_keys(settings: Settings) -> Iterator[Figure]:
    """One worker with 50M keys in its state beside one with 1M, in turn; the first run restores them."""
    speeds: dict[int, list[Speed]] = {FEW_KEYS: [], MANY_KEYS: []}
    with ExitStack() as deployments:
        here = {
            keys: deployments.enter_context(world.deployment(settings, f"keys{keys // 1_000_000}m")) for keys in speeds
        }
        for keys, one in here.items():
            world.send_seen(one, keys)
        for run in range(RUNS):
            messages = world.events(EVENTS, seed=run)
            for keys, one in here.items():
                world.send(one, Topics(one.topic_prefix).events, messages)
                speeds[keys].append(rated(one, EVENTS, since=run * EVENTS))
    few, many = speeds.values()
    yield compared("state_slowdown_50m", "µs of CPU an event, 50M keys", _costs(many), "1M keys", _costs(few))
    anonymous_mib = max(speed.anonymous_mib for speed in many)
    yield Figure("state_rater_rss_mib", anonymous_mib, "MiB of RssAnon of a rater, 50M keys")


def rated(settings: Settings, events: int, *, workers: int = 1, since: int = 0) -> Speed:
    """Start raters, and measure until they have committed ``events`` after the first ``since``."""
    with ExitStack() as running:
        # Named from 0 on every start: a worker finds the state it left.
        costs = [
            running.enter_context(world.worker(world.folder(settings, f"rater{number}"), world.RATER))
            for number in range(workers)
        ]
        return _speed(settings, f"{settings.topic_prefix}rater", costs, since, since + events)


def _stock_faust(settings: Settings) -> Speed:
    with TemporaryDirectory() as datadir:
        group, topic = f"{settings.topic_prefix}stock", Topics(settings.topic_prefix).events
        arguments = ", ".join(map(repr, (settings.kafka_bootstrap, topic, group, datadir)))
        code = f"from tests.bench.stock_faust import main; main({arguments})"
        with world.worker(world.folder(settings, "stock"), code) as cost:
            return _speed(settings, group, [cost], 0, FAUST_EVENTS)


def _speed(settings: Settings, group: str, costs: Sequence[Cost], since: int, until: int) -> Speed:
    """Watch a consumer group from its first commit after ``since`` events until ``until`` are committed."""
    topic = Topics(settings.topic_prefix).events
    partitions = [TopicPartition(topic, partition) for partition in range(settings.partitions)]
    # Reading uncommitted, it does not wait for the open transaction that moves the offsets: there always is one.
    consumer = Consumer({**settings.kafka, "group.id": group, "isolation.level": "read_uncommitted"})
    first: tuple[float, float, int] | None = None
    warm: tuple[float, int] | None = None
    deadline = time.monotonic() + PATIENCE_S
    try:
        while True:
            try:
                done = sum(max(0, tp.offset) for tp in consumer.committed(partitions, 10))
            except KafkaException as error:  # a group's first moments on a new broker
                if not passes(error.args[0]):
                    raise
                continue
            now, cpu = time.perf_counter(), sum(cost.cpu_seconds() for cost in costs)
            for cost in costs:
                cost.look()
            if first is None and done > since:
                first = (now, cpu, done)
            if warm is None and done >= since + WARM_UP * (until - since):
                warm = (now, done)
            if done >= until:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{group}: {done} of {until} events after {PATIENCE_S} s")
            time.sleep(0.02)
    finally:
        consumer.close()
    if first is None or warm is None or done == first[2] or done == warm[1]:
        raise RuntimeError(f"{group}: all {until - since} events came with one commit: too few to measure by")
    return Speed(
        events_per_s=(done - first[2]) / (now - first[0]),
        steady_events_per_s=(done - warm[1]) / (now - warm[0]),
        cpu_us_per_event=(cpu - first[1]) / (done - first[2]) * 1e6,
        whole_cpu_us_per_event=cpu / (done - since) * 1e6,
        anonymous_mib=sum(cost.anonymous_bytes for cost in costs) / 2**20,
    )


def _rates(speeds: Sequence[Speed]) -> list[float]:
    return [speed.events_per_s for speed in speeds]


def _costs(speeds: Sequence[Speed]) -> list[float]:
    return [speed.cpu_us_per_event for speed in speeds]
