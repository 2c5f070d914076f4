"""One run: a deployment of its own under load and faults, then the proof that nothing was lost, doubled, mispriced."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr

from pipeline.catalog.files import Drafts, read_account_files, read_price_files
from pipeline.catalog.publish import Published, publish
from pipeline.catalog.relay import await_relayed
from pipeline.core.catalog import EARLY_US, NOTICE_S
from pipeline.infra.postgres import connect, migrate
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, ensure_topics
from pipeline.producer.client import UsageProducer
from tests.chaos import oracle, prices, schedule
from tests.chaos.fleet import Fleet
from tests.chaos.load import ACCOUNTS, Load, raw, zone_of
from tests.chaos.oracle import Arrival, Known, Place
from tests.chaos.prices import PriceList, Version
from tests.chaos.schedule import Fault
from tests.chaos.services import Services, orphans
from tests.chaos.watch import Watch

#: From publishing a price to its first event: law 4's 60 s, and the time an outage may hold the relay up.
_NOTICE = timedelta(seconds=NOTICE_S)
#: Messages that are no usage, per second.
_RAW_PER_SECOND = 3.0
_FLOOD_EVENTS = 1500
_STATUS_EVERY_S = 10.0
#: Time that everything is given to come to rest once all is up again, seconds.
_DRAIN_S = 240.0
_DIFFERENCES_SHOWN = 30


@dataclass(frozen=True, slots=True)
class Options:
    seed: int
    minutes: float
    events: int
    faults: int
    session_timeout: float = 6.0


@dataclass(slots=True)
class Summary:
    """What is printed at the end, as one JSON object."""

    seed: int
    minutes: float
    faults: dict[str, int] = field(default_factory=dict)
    events: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    rated_rows: int = 0
    lines: int = 0
    price_versions: int = 0
    #: Longest time a partition stood still while it had work, seconds: seen by the raters' commits, and by PostgreSQL.
    longest_recovery_s: dict[str, float] = field(default_factory=dict)
    drained_s: float = 0.0
    #: Workers that ended without having been killed, by kind and how: by design, to come back with restored state.
    exits: dict[str, int] = field(default_factory=dict)
    reconciled: bool = False
    differences: int = 0
    data_dir: str | None = None


def say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}\n")
    sys.stderr.flush()


def run(options: Options, data_dir: Path) -> tuple[Summary, list[str]]:
    """Run, and return the summary and every difference found."""
    with deployed(options, data_dir) as running:
        running.play()
        running.drain()
        summary, found = running.judge()
    found += [f"still there at the end: {process}" for process in orphans(data_dir)]
    summary.differences = len(found)
    return summary, found


@contextlib.contextmanager
def deployed(options: Options, data_dir: Path) -> Iterator["Run"]:
    """Services, workers and producers of a run, for the time of a block."""
    services = Services(data_dir)
    try:
        services.start()
        with Run(options, data_dir, services) as running:
            yield running
    finally:
        services.stop()


class Run:
    """A deployment under load; ``play``, ``drain`` and ``judge`` it, in this order."""

    def __init__(self, options: Options, data_dir: Path, services: Services) -> None:
        self._options, self._services = options, services
        self.settings = Settings(
            kafka_bootstrap=services.kafka_bootstrap,
            postgres_dsn=SecretStr(services.dsn),
            data_dir=data_dir,
            topic_prefix="chaos-",
            partitions=4,
            session_timeout=options.session_timeout,
            actor="chaos",
        )
        self._topics = Topics(self.settings.topic_prefix)
        self._seconds = options.minutes * 60
        # Within a short run no price published meanwhile would count.
        self._is_short = self._seconds < 2 * _NOTICE.total_seconds()
        without = frozenset({"publish prices"}) if self._is_short else frozenset()
        self._faults = schedule.draw(options.seed, self._seconds, options.faults, without)
        self._late = tuple(
            f"late-{number}" for number in range(sum(fault.kind == "publish accounts" for fault in self._faults))
        )
        self._done: Counter[str] = Counter()
        self._problems: list[str] = []
        self._versions: list[Version] = []
        self._later: dict[str, str] = {}
        self._floods = 0
        self._refused: dict[bytes | None, str] = {}
        self._publishing: list[threading.Thread] = []
        self._absent: list[str] = []
        self._lock = threading.Lock()

    # -- the beginning

    def __enter__(self) -> "Run":
        migrate(self.settings.dsn)
        ensure_topics(self.settings)
        self.fleet = Fleet(self.settings, say)
        with contextlib.ExitStack() as undo:
            undo.callback(self.fleet.stop)
            for name in (*schedule.RELAYS, *schedule.RATERS, *schedule.SINKS):
                self.fleet.add(name)
            self._publish_prices()
            self._publish_accounts({name: zone_of(name) for name in ACCOUNTS})
            # The second version counts from within the run, however short.
            self._publish_prices()
            if self._problems:
                raise AssertionError("; ".join(self._problems))
            self._load = self.fleet.load = self._new_load()
            for name in schedule.PRODUCERS:
                self.fleet.add(name)
            self._flood = undo.enter_context(UsageProducer.from_settings(self.settings, source="flood"))
            self._raw = Producer(self.settings.kafka | {"enable.idempotence": True, "message.timeout.ms": 0})
            self._watch = Watch(self.settings, self._topics.events, say)
            undo.callback(self._watch.stop)
            self._stopping = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for publishing in self._publishing:
            publishing.join(120)
        self._stopping.close()

    def _new_load(self) -> Load:
        producers = schedule.PRODUCERS
        return Load(
            seed=self._options.seed,
            began_us=time.time_ns() // 1000 + 1_000_000,
            per_second=self._options.events / len(producers) / self._seconds,
            sources=producers,
            count=self._options.events // len(producers),
            late_accounts=self._late,
            ahead_s=EARLY_US // 1_000_000,
        )

    # -- the middle

    def play(self) -> None:
        """Deal every fault when its time has come, and end it when its time is over."""
        began = self._load.began_us / 1e6 - time.time() + time.monotonic()
        coming, due = deque(self._faults), list[Fault]()
        ending: list[tuple[float, Fault]] = []
        raws, status = 0, 0.0
        say(f"seed {self._options.seed}: {self._options.events} events, {len(coming)} faults, {self._seconds:g} s")
        while (now := time.monotonic() - began) < self._seconds or due or ending:
            while coming and coming[0].at <= now:
                due.append(coming.popleft())
            for fault in list(due):
                if self._deal(fault):  # else whom it is meant for is just being started again
                    due.remove(fault)
                    self._done[fault.kind] += 1
                    say(f"{now:7.1f} s  {fault}")
                    if fault.seconds:
                        ending.append((now + fault.seconds, fault))
            for end, fault in list(ending):
                if end <= now:
                    ending.remove((end, fault))
                    self._end(fault)
            while raws < min(now, self._seconds) * _RAW_PER_SECOND:
                raws += 1
                self._send_raw(raws)
            self._raw.poll(0)
            if now >= status:
                status = now + _STATUS_EVERY_S
                say(f"{now:7.1f} s  {self._watch.status()}, faults {self._done.total()}")
            self._check()
            time.sleep(0.05)

    def _deal(self, fault: Fault) -> bool:
        """Do it. False: whom it is meant for is not there just now."""
        match fault.kind.split(" ", 1):
            case ["publish", "prices"]:
                self._in_background(self._publish_prices)
            case ["publish", "accounts"]:
                waiting = [name for name in self._pending_accounts() if name not in self._later]
                self._in_background(lambda: self._publish_accounts({name: zone_of(name) for name in waiting[:2]}))
            case ["flood", _]:
                self._floods += 1
                for number in range(1, _FLOOD_EVENTS + 1):
                    self._flood.emit_usage(self._load.flood(f"flood-{self._floods}", number))
            case ["add", _]:
                self.fleet.add(fault.target)
            case ["remove", _]:
                self.fleet.remove(fault.target)
            case ["wipe", _]:
                return self.fleet.wipe(fault.target)
            case ["kill", "broker" | "postgres"]:
                self._services.kill(fault.target)
            case ["kill", _]:
                return self.fleet.signal(fault.target, signal.SIGKILL)
            case ["pause" | "stall", "broker" | "postgres" | "kafka"]:
                self._services.signal(fault.target, signal.SIGSTOP)
            case ["pause", _]:
                return self.fleet.signal(fault.target, signal.SIGSTOP)
            case ["cut", "kafka"]:
                self._services.signal("network", signal.SIGUSR1 if fault.share < 0.5 else signal.SIGUSR2)
            case ["cut", "postgres"]:
                return self._cut_postgres(fault.share)
            case ["crash", _]:
                return self._services.crash_session(fault.share)
            case other:
                raise AssertionError(other)
        return True

    def _end(self, fault: Fault) -> None:
        if fault.kind in ("kill broker", "kill postgres"):
            self._services.launch(fault.target)
        elif fault.target in ("broker", "postgres", "network"):
            self._services.signal(fault.target, signal.SIGCONT)
        else:
            self.fleet.signal(fault.target, signal.SIGCONT)

    def _cut_postgres(self, share: float) -> bool:
        """End the workers' sessions, all or about half of them."""
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._services.dsn, connect_timeout=2) as c:
            c.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'tally-%%' "
                "AND (pid %% 2 = 0 OR %s)",
                [share < 0.5],
            )
            return True
        return False

    def _check(self) -> None:
        """Stop a run that proves nothing any more."""
        self.fleet.check()
        for problem in self._services.ended():
            raise AssertionError(problem)

    def _send_raw(self, number: int) -> None:
        message = raw(self._load, number, time.time_ns() // 1000, self.settings.partitions)
        if message.reason is not None:
            self._refused[message.value] = message.reason
        self._raw.produce(self._topics.events, message.value, message.key, message.partition)

    # -- publishing

    def _in_background(self, call: Callable[[], None]) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        self._publishing.append(thread)

    def _publish_prices(self) -> None:
        with self._lock:
            number = len(self._versions) + 1
            path = self.settings.data_dir / f"prices-{number}.json"
            prices.write_price_file(path, self._options.seed, number)
            first = number == 1
            published = self._publish(lambda: read_price_files([path]), None if first else _NOTICE)
            for one in published:
                if one.kind == "plan":
                    assert one.version == number, one
                    self._versions.append(
                        Version(number, one.valid_from_us, prices.charges(self._options.seed, number))
                    )
        left = min(one.valid_from_us for one in published if one.kind == "plan") / 1e6 - time.time()
        if not self._relayed(published, 60.0 if first else left - 5):
            self._problems.append(f"price version {number} did not reach the raters in time")

    def _publish_accounts(self, zones: dict[str, str]) -> None:
        if not zones:
            return
        with self._lock:
            path = self.settings.data_dir / f"accounts-{len(self._later)}.json"
            prices.write_account_file(path, zones)
            published = self._publish(lambda: read_account_files([path]), None)
            if not zones.keys() <= set(ACCOUNTS):
                self._later |= zones
        if not self._relayed(published, 90.0):
            self._problems.append(f"accounts {', '.join(zones)} did not reach the raters in 90 s")

    def _publish(self, drafts: Callable[[], Drafts], valid_from: timedelta | None) -> list[Published]:
        """Publish, again while PostgreSQL is away: what was committed unheard comes back as unchanged."""
        while True:
            try:
                return publish(self.settings.dsn, drafts(), actor="chaos", valid_from=valid_from)
            except psycopg.OperationalError:
                time.sleep(0.5)

    def _relayed(self, published: list[Published], within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(psycopg.OperationalError):
                if not await_relayed(self.settings.dsn, published, left).waiting:
                    return True
            time.sleep(0.5)
        return False

    def _pending_accounts(self) -> list[str]:
        return [*self._late, *(f"flood-{number + 1}" for number in range(self._floods))]

    # -- the end

    def drain(self) -> None:
        """All is up; wait until nothing is on its way any more."""
        say("the faults are over: waiting for everything to come to rest")
        for publishing in self._publishing:
            publishing.join(120)
        self._publish_accounts({name: zone_of(name) for name in self._pending_accounts() if name not in self._later})
        began = time.monotonic()
        waits: list[tuple[str, Callable[[], bool]]] = [
            *((f"{name} to deliver", lambda name=name: self.fleet.delivered(name)) for name in schedule.PRODUCERS),
            ("the flood to be delivered", lambda: self._flood.flush(0.1) == 0),
            ("messages that are no usage to be delivered", lambda: self._raw.flush(0.1) == 0),
            ("raters and sinks to reach the end", self._watch.done),
            ("parked usage of accounts known by now", self._nothing_waits),
            ("every worker to be in its group", self._all_at_work),
        ]
        while waits and time.monotonic() < began + _DRAIN_S:
            if waits[0][1]():
                waits.pop(0)
            else:
                self._check()
                time.sleep(0.3)
        if waits:
            who = f" ({', '.join(self._absent)})" if self._absent else ""
            self._problems.append(f"stuck: waited {_DRAIN_S:g} s for {waits[0][0]}{who}; {self._watch.status()}")
        self._drained_s = time.monotonic() - began
        say(f"at rest after {self._drained_s:.1f} s: {self._watch.status()}")

    def _nothing_waits(self) -> bool:
        accounts = [*ACCOUNTS, *self._later]
        with connect(self.settings.dsn, application="chaos", autocommit=True) as connection:
            row = connection.execute(
                "SELECT count(*) FROM billing.unrated_event WHERE state = 'parked' AND account = ANY(%s)", [accounts]
            ).fetchone()
        return row == (0,)

    def _all_at_work(self) -> bool:
        """Is every worker a member of its group, and nobody else?"""
        try:
            self._absent = self._not_at_work()
        except KafkaException as error:
            self._absent = [str(error)]
        return not self._absent

    def _not_at_work(self) -> list[str]:
        """Workers that are no member of their group, and members that are no worker. A client id ends with the pid."""
        admin = AdminClient(self.settings.kafka)
        found = []
        for kind in ("rater", "sink"):
            group = f"{self.settings.topic_prefix}{kind}"
            members = admin.describe_consumer_groups([group])[group].result(10).members
            there = Counter(member.client_id for member in members)
            for name in self.fleet.names:
                if name.startswith(kind):
                    client_id = f"tally-{kind}-{self.fleet.pid(name)}"
                    if there.pop(client_id, 0) != 1:
                        found.append(f"{name} as {client_id} is not in its group")
            found += [f"{client_id} is in the group and no {kind}" for client_id in there]
        return found

    def judge(self) -> tuple[Summary, list[str]]:
        options = self._options
        found = list(self._problems)
        reconciliation = self._reconcile()
        if not reconciliation["reconciled"]:
            found += [f"tally reconcile: {check}" for check in reconciliation["checks"] if float(check["difference"])]
        say("judging")
        known = Known(PriceList(self._versions), {name: zone_of(name) for name in ACCOUNTS}, self._later, self._refused)
        expected = oracle.expect(self._arrivals(), known)
        with connect(self.settings.dsn, application="chaos") as connection:
            found += oracle.differences(expected, known, self._load, connection, self._topics.events)
        summary = Summary(
            seed=options.seed,
            minutes=options.minutes,
            faults=dict(self._done),
            events=sum(expected.outcomes.values()),
            outcomes=dict(expected.outcomes),
            rated_rows=sum(events for _, events in expected.lines.values()),
            lines=len(expected.lines),
            price_versions=len(self._versions),
            longest_recovery_s=self._watch.longest(),
            drained_s=round(self._drained_s, 1),
            exits=dict(self.fleet.exits),
            reconciled=bool(reconciliation["reconciled"]),
        )
        return summary, found

    def _reconcile(self) -> dict[str, Any]:
        """``tally reconcile``, as ops would."""
        environment = os.environ | {
            "TALLY_KAFKA_BOOTSTRAP": self._services.kafka_bootstrap,
            "TALLY_POSTGRES_DSN": self._services.dsn,
            "TALLY_TOPIC_PREFIX": self.settings.topic_prefix,
        }
        argv = [sys.executable, "-m", "pipeline.cli", "reconcile", "--wait", "60", "--json"]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode not in (0, 4):
            return {"reconciled": False, "checks": [{"difference": 1, "detail": done.stderr[-2000:]}]}
        result: dict[str, Any] = json.loads(done.stdout)
        assert result["reconciled"] == (done.returncode == 0)
        return result

    def _arrivals(self) -> Iterator[Arrival]:
        """Everything on ``usage.events``, partition by partition, read by a plain consumer."""
        for partition in range(self.settings.partitions):
            with contextlib.closing(
                Consumer(self.settings.kafka | {"group.id": "oracle", "enable.partition.eof": True})
            ) as consumer:
                consumer.assign([TopicPartition(self._topics.events, partition, 0)])
                ended = False
                while not ended:
                    for message in consumer.consume(5000, 1.0):
                        if (error := message.error()) is not None:
                            assert error.code() == KafkaError._PARTITION_EOF, error
                            ended = True
                            continue
                        offset = message.offset()
                        assert offset is not None
                        yield Arrival(Place(partition, offset), message.timestamp()[1], message.value())


def show(differences: list[str], data_dir: Path) -> None:
    for difference in differences[:_DIFFERENCES_SHOWN]:
        say(f"DIFFERENCE {difference}")
    if len(differences) > _DIFFERENCES_SHOWN:
        say(f"and {len(differences) - _DIFFERENCES_SHOWN} more")
    (data_dir / "differences.txt").write_text("\n".join(differences) + "\n")
    say(f"all in {data_dir}/differences.txt, logs in {data_dir}/logs; services start again on it with")
    say(f"  tally up --no-workers --data-dir {data_dir}    (TALLY_TOPIC_PREFIX=chaos- for every command)")
