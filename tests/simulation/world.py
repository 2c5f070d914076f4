"""A deployment in one process: raters and sinks as tasks over a broker, a database and disks in memory.

What runs is the product: ``PartitionRater.run`` with taking a partition, merging fetched lists, retry and the whole
commit protocol, and ``sink.run`` with positions, intake and its commit. What is simulated is around it: the broker, the
client's producer and consumers, PostgreSQL, the disk, threads and the clock, and Faust, whose part (who owns what, what
was fetched) is here played by ``Worker``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from psycopg import OperationalError
from pydantic import SecretStr

from pipeline.billing import commit as billing_commit
from pipeline.billing import intake, sink
from pipeline.core.catalog import Catalog
from pipeline.core.charges import Charge
from pipeline.core.contracts import Account
from pipeline.core.limits import Limits
from pipeline.core.periods import to_datetime
from pipeline.core.plans import Plan
from pipeline.infra.avro import CORRECTIONS, DEAD_LETTER, RATED
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, partition_of
from pipeline.rating import commit, partition, take
from pipeline.rating.batch import Shape, Source
from pipeline.rating.commit import Membership, StateUnknown
from pipeline.rating.enrich import TermsView
from pipeline.rating.faust_batches import TP, Fetched
from pipeline.rating.partition import PartitionListener, PartitionRater, RaterConfig
from pipeline.rating.recent import each_identity
from pipeline.rating.state import Positions
from pipeline.rating.take import UsageLost
from tests.rating.world import (
    EVENT_FRAME,
    EVERY_MODEL,
    NOW_MS,
    SCHEMAS,
    SHAPE,
    Message,
    account,
    contract,
    correction,
    entries,
    framed,
    meter,
    usage,
)
from tests.simulation import kafka, store
from tests.simulation.kafka import Broker, Place
from tests.simulation.store import Session, Store
from tests.simulation.tasks import Task, pause

TOPICS = Topics("sim-")
PARTITIONS = 2
GROUP = "sim-rater"
#: Most records in a rater's batch: few, so that a history has many batches.
BATCH_RECORDS = 4
#: Accounts by the partition they belong on; those of the second pair are published later, or never.
ACCOUNTS = {"a": 0, "d": 1, "b": 0, "f": 1}
assert all(partition_of(name.encode(), PARTITIONS) == home for name, home in ACCOUNTS.items())
UNPUBLISHED = ("b", "f")
#: One whose amounts are differences of a running price, one whose amounts are the events' own.
CHARGES = (EVERY_MODEL[0], Charge("share", "tokens", "percentage", rate=Decimal("1.5"), fixed=Decimal("0.01")))

SECOND_MS, HOUR_MS, DAY_MS = 1000, 3_600_000, 86_400_000


def prices(version: int, valid_from_ms: int) -> Plan:
    """A version of the plan; each next one has the prices of its charges exchanged."""
    first, second = CHARGES
    if version % 2 == 0:
        first, second = replace(first, id=second.id), replace(second, id=first.id)
    return Plan("basic", version, "Basic", "USD", valid_from_ms * 1000, (first, second), prorate="none")


Item = Any


@lru_cache(maxsize=1000)
def _view(items: tuple[Item, ...]) -> TermsView:
    return TermsView(Catalog.empty().extend(entries(items), len(items)))


class Disk:
    """What a worker's disk holds of one partition: every state it was in, the last one counts."""

    def __init__(self) -> None:
        self.states: list[tuple[Positions | None, dict[bytes, bytes], dict[bytes, int]]] = [(None, {}, {})]


class DiskState:
    """``PartitionState`` over a simulated disk."""

    def __init__(self, path: Path, stamp: object, **snapshots: object) -> None:
        self._disk = current().disks.setdefault(str(path), Disk())

    @property
    def positions(self) -> Positions | None:
        return self._disk.states[-1][0]

    def known(self, identities: bytes) -> list[bytes | None]:
        seen = self._disk.states[-1][1]
        return [seen.get(identity) for identity in each_identity(identities)]

    def quantity(self, counter: bytes) -> int | None:
        return self._disk.states[-1][2].get(counter)

    def apply(self, seen: dict[int, list[bytes]], totals: dict[bytes, int], positions: Positions) -> None:
        pause("apply")
        _, before, quantities = self._disk.states[-1]
        packed = b"".join(block for blocks in seen.values() for block in blocks)
        now = before | {packed[at : at + 16]: packed[at + 16 : at + 24] for at in range(0, len(packed), 24)}
        self._disk.states.append((positions, now, quantities | totals))
        pause("applied")

    @property
    def seen_keys(self) -> int:
        return len(self._disk.states[-1][1])

    def forget_before(self, day: int) -> None:
        """No history is long enough."""

    def reset(self) -> None:
        self._disk.states.append((None, {}, {}))

    def close(self) -> None: ...


class Changed:
    """``threading.Condition`` of a partition: waiting is a pause."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def notify(self) -> None: ...

    def wait(self, timeout: float | None = None) -> None:
        pause("waits", waits=True)


_NOBODY: Any = SimpleNamespace(until=lambda partition: 0)


class Worker(PartitionListener):
    """A rater's process as far as it is not its partitions' own threads."""

    def __init__(self, world: "World", name: str) -> None:
        self.name = name
        self.alive = True
        self.failure: BaseException | None = None
        self.member = ""
        self.raters: dict[int, tuple[PartitionRater, Task]] = {}
        #: Where the fetch stands.
        self.fetched_to: dict[tuple[Source, int], int] = {}
        self._world = world
        self._catalog, self._catalog_read_ms = world.catalog, world.broker.now_ms
        self._config = RaterConfig(
            kafka={},
            group=GROUP,
            topics=TOPICS,
            schemas=SCHEMAS,
            shape=Shape(TOPICS.events, PARTITIONS, {EVENT_FRAME: SHAPE.frames[EVENT_FRAME]}, SCHEMAS),
            batch_records=BATCH_RECORDS,
            limits=Limits(run_max=0, percent_max=100, window=1),
            going_on=_NOBODY,
            state_dir=Path(name),
            stamp={},
            worker=name,
        )

    # -- what its partitions ask of the catalog's feed

    @property
    def view(self) -> TermsView:
        return _view(self._catalog)

    @property
    def age_s(self) -> float:
        return (self._world.broker.now_ms - self._catalog_read_ms) / 1000

    def read_catalog(self) -> None:
        self._catalog, self._catalog_read_ms = self._world.catalog, self._world.broker.now_ms

    # -- what its partitions tell it

    def full(self, partition: int, source: Source, is_full: bool) -> None: ...

    def seek(self, partition: int, source: Source, offset: int) -> None:
        self.fetched_to[source, partition] = offset

    def failed(self, partition: int, error: BaseException) -> None:
        self.failure = self.failure or error

    # -- what Faust does

    def assigned(self, member: str, generation: int, partitions: Iterable[int]) -> None:
        """End the partitions it had, as ``Rater._on_assigned`` does, and take those it has now."""
        for rater, _ in self.raters.values():
            rater.stop()
        for _, task in self.raters.values():
            self._run_to_end(task)
        self.raters.clear()
        self._leave_if_failed()
        if not self.alive:
            return
        self.member = member
        feed: Any = self
        for number in partitions:
            membership = Membership(GROUP, generation, member)
            rater = PartitionRater(number, membership, self._config, feed, self, on_step=pause)
            rater._changed = Changed()  # type: ignore[assignment]
            self.raters[number] = rater, Task(f"{self.name}/{number}", rater.run)
            for source, topic in SOURCES.items():
                # Faust's own idea of where to begin. The rater knows better.
                self.fetched_to[source, number] = self._world.broker.groups[GROUP].offset((topic, number))

    def _run_to_end(self, task: Task) -> None:
        for _ in range(50):
            task.run()
            if task.done:
                return
        raise AssertionError(f"{task.name} was told to stop and stands at: {task.at}")

    def fetch(self, number: int, source: Source, *, start: int | None = None, most: int = 100) -> None:
        """Offer what a fetch brings: from its position, or from anywhere, as lists that were on their way do."""
        log = self._world.broker.logs[SOURCES[source], number]
        end = log.stable_end
        at = self.fetched_to[source, number] if start is None else start
        if at >= end:
            return
        records, following = [], end
        for entry in log.committed(at, end):
            if len(records) == most:
                following = entry.offset
                break
            records.append(Message(SOURCES[source], number, entry.offset, entry.timestamp_ms, entry.key, entry.value))
        if start is None:
            self.fetched_to[source, number] = following
        if records:  # aiokafka hands out no empty lists
            self.raters[number][0].offer(source, Fetched(TP(SOURCES[source], number), at, following, records))

    def work(self, number: int, steps: int | None = None) -> None:
        task = self.raters[number][1]
        task.run() if steps is None else task.run(steps)
        self._leave_if_failed()

    def _leave_if_failed(self) -> None:
        """A worker may give up for what it was made to give up for; anything else is a defect."""
        if self.failure is not None:
            if not isinstance(self.failure, StateUnknown | UsageLost):
                raise self.failure
            self.kill()

    def kill(self) -> None:
        self.alive = False
        for _, task in self.raters.values():
            task.kill()
        self.raters.clear()


SOURCES = {Source.EVENTS: TOPICS.events, Source.RETRY: TOPICS.retry}


class Stop:
    """``threading.Event`` that stops a sink."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        pause("waits", waits=True)
        return self._set


class Sink:
    """A sink's process: ``sink.run``, all of it, and the thread that writes for it."""

    def __init__(self, world: "World", name: str) -> None:
        self.name = name
        self.stop = Stop()
        #: Generation of the sinks' group it has heard of.
        self.heard = 0
        self.assigned: set[Place] = set()
        stop: Any = self.stop
        self.task = Task(name, lambda: sink.run(_SETTINGS, stop, reached=lambda step: pause(step.name)))
        self.writer: Task | None = None

    @property
    def alive(self) -> bool:
        return not self.task.done

    def work(self, steps: int | None = None) -> None:
        """Each of its threads runs so many steps, or until there is nothing to do for either."""
        current().working = self
        self.task.run(steps)
        while self.writer is not None and not self.writer.done:
            self.writer.run(steps)
            if steps is not None or not self.writer.done:
                break
            self.task.run()
        if self.task.error is not None:
            raise self.task.error

    def kill(self) -> None:
        if self.writer is not None:
            self.writer.kill()
        self.task.kill()


class Writer:
    """The sink's ``ThreadPoolExecutor`` of one thread."""

    def __init__(self, threads: int, **options: object) -> None:
        assert threads == 1
        sink = current().working
        assert sink is not None
        self._sink = sink

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink.writer is not None:
            _await(self._sink.writer)

    def submit(self, body: Callable[..., Any], *arguments: Any) -> "Written":
        assert self._sink.writer is None or self._sink.writer.done, "one batch is written at a time"
        written = Written(f"{self._sink.name}/writer", lambda: body(*arguments))
        self._sink.writer = written.task
        return written


class Written:
    """The ``Future`` of what the writer does."""

    def __init__(self, name: str, body: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self.task = Task(name, lambda: self._result.append(body()))

    def result(self) -> Any:
        _await(self.task)
        if self.task.error is not None:
            raise self.task.error
        return self._result[0]


def _await(task: Task) -> None:
    while not task.done:
        pause("waits for the writer", waits=True)


def _await_all(futures: Iterable[Written]) -> None:
    for future in futures:
        _await(future.task)


class SinkConsumer(kafka.Consumer):
    """The sink's consumer: learns of rebalances when it polls, as librdkafka's does."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(current().broker, config["group.id"])
        assert config["isolation.level"] == "read_committed"
        sink = current().working
        assert sink is not None
        self._sink = sink
        self._callbacks: dict[str, Callable[..., None]] = {}
        sink.heard = 0  # a new member

    def subscribe(self, topics: list[str], **callbacks: Callable[..., None]) -> None:
        self._callbacks = callbacks

    def consume(self, most: int, timeout: float = -1) -> list[kafka.Message]:
        pause("consume")
        world, sink = current(), self._sink
        if sink.heard != world.sinks_generation:
            if self.positions:
                self._callbacks["on_lost"](self, _partitions(self.positions))
                self.assign([])
            sink.heard = world.sinks_generation
            self._callbacks["on_assign"](self, _partitions(sink.assigned))
        messages = [message for message in self._consume(most) if message.error() is None]
        if not messages:
            world.idle_s += timeout
            pause("nothing", waits=True)
        return messages

    def commit(self, offsets: list[Any], asynchronous: bool) -> None:
        """For lag tools only: nothing may hang on it."""

    def close(self) -> None:
        self._callbacks["on_revoke"](self, _partitions(self.positions))
        super().close()


def _partitions(places: Iterable[Place]) -> list[Any]:
    return [kafka.TopicPartition(*place) for place in sorted(places)]


SINK_PLACES = [
    (topic, number)
    for topic in (TOPICS.rated, TOPICS.receipts, TOPICS.retry, TOPICS.dead_letter)
    for number in range(PARTITIONS)
]
_SETTINGS = Settings(kafka_bootstrap="simulated", postgres_dsn=SecretStr("simulated"), topic_prefix=TOPICS.prefix)


class World:
    """Everything, and what was done to it."""

    def __init__(self) -> None:
        self.started_ms = NOW_MS
        self.broker = Broker(NOW_MS)
        self.store = Store()
        self.disks: dict[str, Disk] = {}
        self.catalog: tuple[Item, ...] = (
            meter(),
            prices(1, 0),
            *(item for name in ACCOUNTS if name not in UNPUBLISHED for item in (account(name), contract(name))),
        )
        self.workers = {name: Worker(self, name) for name in ("rater-0", "rater-1")}
        self.sinks = {name: Sink(self, name) for name in ("sink-0", "sink-1")}
        self.sinks_generation = 0
        self.working: Sink | None = None
        #: Seconds the sinks have waited for messages: their clock runs on with it.
        self.idle_s = 0.0
        self._numbers = count(1)
        self.arrived = 0
        #: What was sent to correct an event, by identity and entry number.
        self.corrections: dict[tuple[bytes, int], bytes] = {}
        #: Accounts that events named before they were published.
        self.late: set[str] = set()
        self.database_away = False
        #: Lines of closed invoices, by id, as they were then.
        self.closed_lines: dict[int, dict[str, Any]] = {}
        _current[:] = [self]
        self.share_partitions({"rater-0": [0], "rater-1": [1]})
        self.share_places({"sink-0": SINK_PLACES[::2], "sink-1": SINK_PLACES[1::2]})

    # -- from outside

    def send(self, name: str, key: int, tokens: str, partition: int | None = None) -> None:
        """An event arrives. The same arguments give an equal event: what makes it one more is only its transport."""
        self.arrived += 1
        if name not in {item.id for item in self.catalog if isinstance(item, Account)}:
            self.late.add(name)
        event = usage(
            f"k{key}",
            name,
            timestamp=(NOW_MS + key * 80 * SECOND_MS) * 1000,
            properties={"tokens": tokens},
            sequence=self.arrived,
        )
        place = (TOPICS.events, ACCOUNTS[name] if partition is None else partition)
        self.broker.append(place, name.encode(), framed(event))

    def send_junk(self, partition: int) -> None:
        self.broker.append((TOPICS.events, partition), b"a", b"\xff" * 9)

    def publish(self, *items: Item) -> None:
        self.catalog += items

    def publish_prices(self) -> None:
        version = sum(isinstance(item, Plan) for item in self.catalog) + 1
        self.publish(prices(version, self.broker.now_ms + 60 * SECOND_MS))

    def replay(self, partition: int, index: int) -> None:
        """Send a dead letter's event to the retry topic again, as ``tally dlq replay`` does."""
        letters = list(self.broker.logs[TOPICS.dead_letter, partition].committed())
        if letters:
            value = letters[index % len(letters)].value
            letter = SCHEMAS.decode(value, DEAD_LETTER)
            again = {"attempts": 0, "replays": letter["replays"] + 1, "not_before": _instant(0)}
            home = ACCOUNTS.get(letter["account"] or "", letter["origin_partition"])
            again["parked_at"] = _instant(self.broker.now_ms)
            self.broker.append((TOPICS.retry, home), None, SCHEMAS.encode(DEAD_LETTER, letter | again))

    def correct(self, partition: int, index: int, tokens: str | None) -> None:
        """Take a rated event back, or set it right, as ``tally usage`` does: sent again while it is on its way."""
        events: dict[bytes, list[dict[str, Any]]] = {}
        for entry in self.broker.logs[TOPICS.rated, partition].committed():
            row = SCHEMAS.decode(entry.value, RATED)
            rows = events.setdefault(row["identity"], [])
            if rows and rows[0]["entry"] < row["entry"]:
                rows.clear()
            rows.append(row)
        if not events:
            return
        rows = list(events.values())[index % len(events)]
        identity, entry = rows[0]["identity"], rows[0]["entry"] + 1
        sent = self.corrections.get((identity, entry))
        if sent is None:
            if rows[0]["kind"] == "void":
                return
            event = rows[0]["event"]
            new = None if tokens is None else event | {"properties": {"tokens": tokens}}
            sent = self.corrections[identity, entry] = SCHEMAS.encode(
                CORRECTIONS, correction(rows, new, entry=entry).to_record()
            )
        self.broker.append((TOPICS.retry, partition), rows[0]["event"]["account"].encode(), sent)

    def close_periods(self, name: str) -> None:
        """Issue the account's open invoices, as a close does; it would wait for a sink that holds one."""
        invoices, lines = (self.store.tables[table] for table in ("invoice", "line"))
        for key, invoice in list(invoices.items()):
            if key[0] == name and ("invoice", key) not in self.store.locks:
                invoices[key] = invoice | {"state": "issued"}
                self.closed_lines |= {
                    line["id"]: line for line in lines.values() if line["invoice_id"] == invoice["id"]
                }

    # -- processes

    def share_partitions(self, owners: dict[str, list[int]]) -> None:
        """A new generation of the raters' group. Workers left out have not heard of it, and are no members."""
        group = self.broker.groups[GROUP]
        group.generation += 1
        members = {name: f"{name}-{next(self._numbers)}" for name in owners}
        group.members = set(members.values())
        for name, partitions in owners.items():
            self.workers[name].assigned(members[name], group.generation, partitions)

    def share_places(self, owners: dict[str, list[Place]]) -> None:
        """A new generation of the sinks' group. Each hears of it when it polls next."""
        self.sinks_generation += 1
        for name, one in self.sinks.items():
            one.assigned = set(owners.get(name, ()))

    def start_worker(self, name: str) -> Worker:
        assert not self.workers[name].alive
        self.workers[name] = worker = Worker(self, name)
        return worker

    def start_sink(self, name: str) -> None:
        assert not self.sinks[name].alive
        self.sinks[name] = Sink(self, name)

    def crash_worker(self, name: str, disk: str) -> None:
        self.workers[name].kill()
        for path in [path for path in self.disks if Path(path).parent.name == name]:
            states = self.disks[path].states
            if disk == "lost":
                del self.disks[path]
            elif disk == "stale":  # the machine went down: what was not yet synced is gone
                del states[max(1, len(states) - 2) :]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
        for one in self.sinks.values():
            one.kill()
        _current.clear()


_current: list[World] = []


def current() -> World:
    return _current[0]


def _instant(at_ms: int) -> Any:
    return to_datetime(at_ms * 1000)


# -- in the place of what is outside


def _sleep(seconds: float) -> None:
    pause("sleeps", waits=True)


_clock = SimpleNamespace(
    time=lambda: current().broker.now_ms / 1000,
    time_ns=lambda: current().broker.now_ms * 1_000_000,
    monotonic=lambda: current().broker.now_ms / 1000,
    sleep=_sleep,
)
_sink_clock = SimpleNamespace(
    monotonic=lambda: current().broker.now_ms / 1000 + current().idle_s,
    sleep=_sleep,
)


class _Silent:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **values: None


def _connect(dsn: str, **options: object) -> Session:
    pause("connect")
    if current().database_away:
        raise OperationalError("the server is away")
    return Session(current().store)


_OUTSIDE: dict[Any, dict[str, Any]] = {
    partition: {
        "PartitionState": DiskState,
        "new_producer": lambda kafka_config, name: kafka.Producer(current().broker, name),
        "time": _clock,
        "log": _Silent(),
    },
    take: {
        "Consumer": lambda config: kafka.Consumer(current().broker, config["group.id"]),
        "time": _clock,
        "log": _Silent(),
    },
    commit: {"time": _clock, "log": _Silent()},
    billing_commit: {"write_sequences": store.write_sequences},
    intake: {"PlainReader": lru_cache(intake.PlainReader)},  # parses its schema once
    sink: {
        "Consumer": SinkConsumer,
        "ThreadPoolExecutor": Writer,
        "wait": _await_all,
        "connect": _connect,
        "ensure_months": lambda connection, months: None,
        "time": _sink_clock,
        "log": _Silent(),
        "BATCH_MESSAGES": 8,
        "_FETCH_MESSAGES": 3,
    },
}


@contextmanager
def simulated() -> Iterator[None]:
    """Put what is simulated in the place of what is outside."""
    with ExitStack() as stack:
        for module, names in _OUTSIDE.items():
            stack.enter_context(patch.multiple(module, **names))
        yield
