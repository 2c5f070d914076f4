"""One run: a rater and a sink of their own under damaged messages at full speed, and what became of each message."""

import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from pipeline.catalog.files import read_account_files, read_price_files
from pipeline.catalog.publish import publish
from pipeline.catalog.relay import await_relayed
from pipeline.core.reasons import Reason
from pipeline.infra.postgres import connect
from pipeline.infra.processes import tail
from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from tests.chaos import watch
from tests.chaos.watch import RATER, SINK
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.mutate import Mutator

#: Longest time that nothing at all may move while there is work, seconds: neither a rater's commit nor a row.
STALL_S = 30.0
#: Of a message a dead letter keeps at most so many bytes (README, "Limits"); the hash of all of it stands in its text.
VALUE_KEPT, KEY_KEPT = 1024 * 1024, 64 * 1024
#: Memory has levelled off when its median in the last quarter of the run is at most that of the quarter before, plus a
#: tenth and 8 MiB: what allocators keep back. Judged from so many messages on: before, batches and caches still grow.
_MEMORY_GROWTH, _MEMORY_SLACK_MIB, MEMORY_JUDGED_FROM = 1.1, 8, 500_000
_READY_S, _RETRIED_S, _STOP_S = 60.0, 300.0, 60.0
_STATUS_EVERY_S, _LOOK_S = 10.0, 0.5
_CHUNK = 2000


class Place(NamedTuple):
    """Where a message arrived on ``usage.events``."""

    partition: int
    offset: int


@dataclass(slots=True)
class Summary:
    """What is printed at the end, as one JSON object."""

    seed: int
    messages: int
    #: rated, duplicate, and dead letters and parked ones by reason.
    outcomes: dict[str, int] = field(default_factory=dict)
    #: By what was done to the messages.
    ways: dict[str, int] = field(default_factory=dict)
    #: RssAnon by worker in MiB: median of the third and of the last quarter of the run.
    rss_first_mib: dict[str, float] = field(default_factory=dict)
    rss_last_mib: dict[str, float] = field(default_factory=dict)
    #: Longest time without any progress while there was work, and longest that one partition waited for its turn.
    longest_stall_s: float = 0.0
    longest_wait_s: dict[str, float] = field(default_factory=dict)
    #: From the first message until rater and sink had reached the last one.
    seconds: float = 0.0
    reconciled: bool = False
    differences: int = 0
    data_dir: str | None = None


def say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}\n")
    sys.stderr.flush()


def run(settings: Settings, seed: int, messages: int) -> tuple[Summary, list[str]]:
    """Feed so many messages drawn from the seed to workers on these settings; the summary and every difference found.

    The topics and the database must be there, and empty.
    """
    with Run(settings, seed, messages) as running:
        running.feed()
        running.drain()
        return running.judge()


class _Watch(watch.Watch):
    """That of the chaos harness."""

    @property
    def at_rest(self) -> bool:
        """As far as seen, is nothing left to do?"""
        return all(self._at[stage] == self._ends for stage in (RATER, SINK))


class Run:
    """Workers under load; ``feed``, ``drain`` and ``judge`` it, in this order."""

    def __init__(self, settings: Settings, seed: int, messages: int) -> None:
        self.settings, self._seed, self._messages = settings, seed, messages
        self._topics = Topics(settings.topic_prefix)
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._problems: list[str] = []
        self._ways: Counter[str] = Counter()
        self._memory: defaultdict[str, list[float]] = defaultdict(list)
        self._looked_at = self._said_at = self._began = self._seconds = 0.0
        self._status, self._moved_at, self._stall_s = "", time.monotonic(), 0.0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as undo:
            undo.callback(self._kill)
            files = demo_dir()
            published = publish(
                self.settings.dsn, read_price_files([files / "prices.yaml"]), actor="fuzz", valid_from=None
            )
            published += publish(
                self.settings.dsn, read_account_files([files / "accounts.yaml"]), actor="fuzz", valid_from=None
            )
            for name in ("relay", "rater", "sink"):
                self._start(name)
            assert not await_relayed(self.settings.dsn, published, _READY_S).waiting, self._log("relay")
            self._end("relay")
            self._watch = _Watch(self.settings, self._topics.events, say)
            undo.callback(self._watch.stop)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    # -- workers

    def _start(self, name: str) -> None:
        settings = self.settings
        environment = {
            "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
            "TALLY_POSTGRES_DSN": settings.dsn,
            "TALLY_DATA_DIR": str(settings.data_dir),
            "TALLY_TOPIC_PREFIX": settings.topic_prefix,
            "TALLY_PARTITIONS": str(settings.partitions),
            # Nearly all of it is refused here: the limits, rightly, would stop every partition.
            "TALLY_DEAD_LETTER_RUN_MAX": "0",
            "TALLY_DEAD_LETTER_PERCENT_MAX": "100",
        }
        log = self._log_path(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            argv = (sys.executable, "-m", "pipeline.cli", name)
            self._workers[name] = subprocess.Popen(argv, env=os.environ | environment, stdout=output, stderr=output)

    def _log_path(self, name: str) -> Path:
        return self.settings.data_dir / "logs" / f"{name}.log"

    def _log(self, name: str) -> str:
        return tail(self._log_path(name), 15)

    def _end(self, name: str) -> None:
        """SIGTERM; what ends badly is a difference."""
        worker = self._workers.pop(name)
        worker.send_signal(signal.SIGTERM)
        try:
            code = worker.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            code = worker.wait()
        if code != 0:
            self._problems.append(f"{name} was told to stop and ended with {code}: {self._log(name)}")

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.wait()

    def _look(self) -> None:
        """Are both alive, how much memory do they take, and do they go on? Raises AssertionError where not."""
        now = time.monotonic()
        if now < self._looked_at + _LOOK_S:
            return
        self._looked_at = now
        for name, worker in self._workers.items():
            assert worker.poll() is None, f"{name} ended with {worker.returncode}: {self._log(name)}"
            self._memory[name].append(_rss_anon_mib(worker.pid))
        status = self._watch.status()
        if status != self._status or self._watch.at_rest:
            self._status, self._moved_at = status, now
        self._stall_s = max(self._stall_s, now - self._moved_at)
        assert self._stall_s <= STALL_S, f"nothing moved for {self._stall_s:.0f} s: {status}"
        if now >= self._said_at + _STATUS_EVERY_S:
            self._said_at = now
            memory = ", ".join(f"{name} {values[-1]:.0f} MiB" for name, values in self._memory.items())
            say(f"{now - self._began:6.0f} s  sent {sum(self._ways.values())}, {self._watch.status()}; {memory}")

    # -- the run

    def feed(self) -> None:
        """Put all messages on the topic, as fast as the broker takes them."""
        say(f"seed {self._seed}: {self._messages} messages")
        self._began = time.monotonic()
        # Idempotent: each message once, so that repeats are those that were meant.
        options = {
            "enable.idempotence": True,
            "compression.type": "lz4",
            "linger.ms": 20,
            "message.max.bytes": 8_000_000,
        }
        producer = Producer(self.settings.kafka | options)
        failed: list[str] = []

        def told(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                failed.append(str(error))

        mutator = Mutator(self._seed, time.time_ns() // 1000, self.settings.partitions)
        for number, sent in enumerate(mutator.messages(self._messages)):
            self._ways[sent.how] += 1
            while True:
                try:
                    producer.produce(
                        self._topics.events,
                        sent.value,
                        sent.key,
                        sent.partition,
                        headers=list(sent.headers),
                        on_delivery=told,
                    )
                    break
                except BufferError:
                    producer.poll(0.1)
                    self._look()
            if number % _CHUNK == 0:
                producer.poll(0)
                self._look()
        while producer.flush(0.5):
            self._look()
        assert not failed, f"{len(failed)} messages were refused by the broker: {failed[0]}"

    def drain(self) -> None:
        """Wait until all was rated and written, and the misplaced ones were judged where they belong."""
        while not self._watch.done():
            self._look()
        self._seconds = time.monotonic() - self._began
        say(f"{self._seconds:6.0f} s  the end is reached; {self._watch.status()}")
        self._wait(lambda: not self._misplaced(), "misplaced messages to be judged where they belong", _RETRIED_S)
        # From here on nothing is tried again: what is parked stays so.
        self._end("rater")

    def _wait(self, condition: Callable[[], bool], what: str, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {patience_s:g} s for {what}; {self._watch.status()}"
            self._look()
            time.sleep(_LOOK_S)

    def _misplaced(self) -> int:
        with connect(self.settings.dsn, application="fuzz", autocommit=True) as connection:
            row = connection.execute(
                "SELECT count(*) FROM billing.unrated_event WHERE state = 'parked' AND reason = 'wrong_partition'"
            ).fetchone()
        assert row is not None
        return int(row[0])

    # -- the judge

    def judge(self) -> tuple[Summary, list[str]]:
        found, outcomes = self._problems, Counter[str]()
        reconciliation = self._reconcile()
        if not reconciliation["reconciled"]:
            found += [f"tally reconcile: {check}" for check in reconciliation["checks"] if float(check["difference"])]
        self._end("sink")
        say("judging every message")
        arrived, measured = self._judge_messages(found, outcomes)
        if arrived != self._messages:
            found.append(f"{self._messages} messages were sent, {arrived} arrived")
        self._judge_sums(found, outcomes, measured)
        summary = Summary(
            seed=self._seed,
            messages=arrived,
            outcomes=dict(sorted(outcomes.items())),
            ways=dict(self._ways),
            longest_stall_s=round(self._stall_s, 1),
            longest_wait_s=self._watch.longest(),
            seconds=round(self._seconds, 1),
            reconciled=bool(reconciliation["reconciled"]),
        )
        self._judge_memory(found, summary)
        summary.differences = len(found)
        return summary, found

    def _reconcile(self) -> dict[str, Any]:
        """``tally reconcile``, as ops would. A damaged sequence number makes true holes: those are not asked for."""
        argv = [sys.executable, "-m", "pipeline.cli", "reconcile", "--wait", "300", "--grace", "86400", "--json"]
        environment = {
            "TALLY_KAFKA_BOOTSTRAP": self.settings.kafka_bootstrap or "",
            "TALLY_POSTGRES_DSN": self.settings.dsn,
            "TALLY_TOPIC_PREFIX": self.settings.topic_prefix,
        }
        done = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, timeout=900)
        if done.returncode not in (0, 4):
            return {"reconciled": False, "checks": [{"difference": 1, "detail": done.stderr[-2000:]}]}
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def _judge_messages(self, found: list[str], outcomes: Counter[str]) -> tuple[int, dict[str, Fraction]]:
        """Hold each message's state against its verdict; return how many there are, and the rated tokens by account."""
        arrived, tokens = 0, defaultdict[str, Fraction](Fraction)
        groups: defaultdict[tuple[str, str], list[tuple[Place, Verdict, str]]] = defaultdict(list)
        for partition in range(self.settings.partitions):
            states = self._states(partition)
            for message in self._arrivals(partition):
                arrived += 1
                value, key, (_, appended_ms) = message.value(), message.key(), message.timestamp()
                offset = message.offset()
                assert offset is not None
                place = Place(partition, offset)
                verdict = judge(value, key, partition, appended_ms, self.settings.partitions)
                state, reason, letter = states.get(place.offset, ("duplicate", "", None))
                outcomes[f"{state} {reason}".strip()] += 1
                if letter is not None and (problem := _letter_problem(letter, key, value, self._letter_topic(state))):
                    found.append(f"{place}: {problem}")
                if verdict.event is not None and not verdict.refused_at_sight:
                    groups[verdict.event.identity].append((place, verdict, f"{state} {reason}".strip()))
                elif state != "dead_lettered" or reason not in verdict.dead:
                    found.append(f"{place}: expected a dead letter for {_any(verdict.dead)}, is {state} {reason}")
        for group in groups.values():
            found += _group_problems(group)
            for _, verdict, state in group:
                if state == "rated" and verdict.event is not None:
                    tokens[verdict.event.account] += verdict.tokens
        return arrived, tokens

    def _letter_topic(self, state: str) -> str:
        return self._topics.dead_letter if state == "dead_lettered" else self._topics.retry

    def _states(self, partition: int) -> dict[int, tuple[str, str, tuple[Any, ...] | None]]:
        """State, reason and letter by offset, of all messages of a partition but those that were duplicates."""
        states: dict[int, tuple[str, str, tuple[Any, ...] | None]] = {}
        with connect(self.settings.dsn, application="fuzz") as connection:
            unrated = connection.execute(_UNRATED, [self._topics.events, partition])
            for offset, state, reason, *letter in unrated:
                kept = tuple(letter) if state in ("dead_lettered", "parked") else None
                states[offset] = state, (reason if kept else ""), kept
            for (offset,) in connection.execute(_RATED, [partition]):
                if offset in states and states[offset][0] != "rated":
                    states[offset] = "rated and also", " ".join(states[offset][:2]), None
                else:
                    states[offset] = "rated", "", None
        return states

    def _arrivals(self, partition: int) -> Iterator[Message]:
        config = {"group.id": "judge", "enable.partition.eof": True, "enable.auto.commit": False}
        with contextlib.closing(Consumer(self.settings.kafka | config)) as consumer:
            consumer.assign([TopicPartition(self._topics.events, partition, 0)])
            while True:
                for message in consumer.consume(5000, 1.0):
                    if (error := message.error()) is None:
                        yield message
                    elif error.code() == KafkaError._PARTITION_EOF:
                        return
                    else:
                        raise AssertionError(error)

    def _judge_sums(self, found: list[str], outcomes: Counter[str], tokens: dict[str, Fraction]) -> None:
        with connect(self.settings.dsn, application="fuzz") as connection:
            row = connection.execute(_DUPLICATES, [self._topics.events]).fetchone()
            assert row is not None
            if row[0] != outcomes["duplicate"]:
                found.append(f"{outcomes['duplicate']} messages left no trace, but {row[0]} were counted as duplicates")
            billed = {account: Fraction(quantity) for account, quantity in connection.execute(_TOKENS)}
        if billed != tokens:
            found.append(f"expected input tokens {dict(tokens)}, billed {billed}")

    def _judge_memory(self, found: list[str], summary: Summary) -> None:
        for name, values in self._memory.items():
            if name == "relay" or len(values) < 4:
                continue
            quarter = len(values) // 4
            first, last = statistics.median(values[-2 * quarter : -quarter]), statistics.median(values[-quarter:])
            summary.rss_first_mib[name], summary.rss_last_mib[name] = round(first, 1), round(last, 1)
            if self._messages >= MEMORY_JUDGED_FROM and last > first * _MEMORY_GROWTH + _MEMORY_SLACK_MIB:
                found.append(f"memory of the {name} grew from {first:.0f} to {last:.0f} MiB")


_UNRATED = """
SELECT origin_offset, state::text, reason, message, reason, key, value, letter_topic FROM billing.unrated_event
WHERE origin_topic = %s AND origin_partition = %s
"""
_RATED = "SELECT DISTINCT origin_offset FROM billing.rated_usage WHERE origin_partition = %s"
_DUPLICATES = """
SELECT sum(duplicates) + (SELECT count(*) FROM billing.unrated_event WHERE state = 'duplicate')
FROM billing.receipt WHERE topic = %s
"""
_TOKENS = """
SELECT invoice.account, sum(line.quantity) FROM billing.invoice_line AS line
JOIN billing.invoice ON invoice.id = line.invoice_id WHERE line.charge = 'input-tokens' GROUP BY invoice.account
"""


def _group_problems(group: list[tuple[Place, Verdict, str]]) -> Iterator[str]:
    """Messages of one account and key: which was rated depends on their order, what the others are on which it was."""
    rated = [(place, verdict) for place, verdict, state in group if state == "rated"]
    good = [place for place, verdict, _ in group if verdict.good]
    early = any(verdict.early for _, verdict, _ in group)
    if len(rated) > 1 or (good and not rated and not early) or (rated and not good):
        yield f"expected one of {good} to be rated, {[place for place, _ in rated]} are"
        return
    # Without a way round over another partition their order is the topic's.
    direct = not early and not any(verdict.misplaced for _, verdict, _ in group)
    if good and direct and rated[0][0] != min(good):
        yield f"expected {min(good)} to be rated, not {rated[0][0]}, which came later"
    payload = rated[0][1].event.payload if rated and rated[0][1].event else None
    for place, verdict, state in group:
        allowed = {f"dead_lettered {reason}" for reason in verdict.dead}
        if verdict.parked:
            allowed.add(f"parked {verdict.parked}")
        if verdict.good:
            allowed.add("rated")
        if verdict.early:
            allowed.add("parked ahead_of_prices")
        if rated and verdict.event is not None:
            same = verdict.event.payload == payload
            allowed.add("duplicate" if same else "dead_lettered conflicting_duplicate")
            if same and place != rated[0][0]:
                allowed.discard("rated")
        if state not in allowed:
            yield f"{place}: expected {_any(allowed)}, is {state}"


_REASONS = frozenset(reason.value for reason in Reason)


def _letter_problem(letter: tuple[Any, ...], key: bytes | None, value: bytes | None, topic: str) -> str | None:
    """What a letter lacks: a reason in words, its place, or what came, byte for byte."""
    message, reason, kept_key, kept_value, letter_topic = letter
    if not message or reason not in _REASONS:
        return f"its letter names no reason: {reason!r}, {message!r}"
    if letter_topic != topic:
        return f"its letter stands on {letter_topic}"
    for name, came, kept, most in (("key", key, kept_key, KEY_KEPT), ("value", value, kept_value, VALUE_KEPT)):
        if kept != (came if came is None else came[:most]):
            return f"its letter holds another {name}"
        if came is not None and len(came) > most and hashlib.sha256(came).hexdigest() not in message:
            return f"its letter holds only a part of the {name} and not the hash of the whole"
    return None


def _any(reasons: frozenset[str] | set[str]) -> str:
    return " or ".join(sorted(reasons)) or "nothing wrong"


def _rss_anon_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) / 1024
