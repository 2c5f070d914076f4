"""A deployment on the real broker, seen from outside: what goes in, the raters' processes, and what came out.

``check`` is the judge: it reads every topic as committed, knows from the messages alone what ought to have become of
each, and prices totals in exact fractions, without the product's accounting or pricing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import canonical_json, kind_of, to_document
from pipeline.core.meters import Meter
from pipeline.core.periods import BEGINNING, to_datetime
from pipeline.core.plans import Plan
from pipeline.infra.avro import CATALOG, DEAD_LETTER, RATED, RECEIPTS
from pipeline.infra.kafka import passes
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, partition_of
from tests.rating.world import (
    EVERY_METER,
    EVERY_MODEL,
    SCHEMAS,
    account,
    contract,
    cost,
    framed,
    plan,
    usage,
)

ROOT = Path(__file__).resolve().parents[2]
#: Longer than anything here takes on a slow machine: a test that waits this long has failed.
PATIENCE_S = 60.0

Item = Account | Contract | Meter | Plan


@dataclass
class Sent:
    """What was put on ``usage.events``, and what ought to become of it."""

    rated: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: account → (sum of tokens, events counted by the "calls" meter)
    totals: defaultdict[str, list[Fraction]] = field(default_factory=lambda: defaultdict(lambda: [Fraction(0)] * 2))
    duplicates: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    parked: int = 0
    messages: int = 0

    @property
    def expected(self) -> dict[str, int]:
        return {
            "rated": len(self.rated),
            "duplicate": self.duplicates,
            "parked": self.parked,
            "dead_lettered": self.dead.total(),
        }


class Deployment:
    """Topics under one prefix, the catalog on them, and raters."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topics = Topics(settings.topic_prefix)
        self.group = f"{settings.topic_prefix}rater"
        self.sent = Sent()
        self._producer = self.new_producer()
        self._raters: list[Rater] = []
        self._number = 0

    def new_producer(self, **options: Any) -> Producer:
        return Producer(self.settings.kafka | {"linger.ms": 5, "partitioner": "murmur2_random"} | options)

    # -- in

    def publish(self, *items: Item) -> None:
        """Put items on the catalog topic, in one transaction as the relay does."""
        producer = self.new_producer(**{"transactional.id": f"{self.settings.topic_prefix}catalog"})
        producer.init_transactions(30)
        producer.begin_transaction()
        for item in items:
            kind = kind_of(item)
            record = {
                "kind": kind,
                "id": item.id,
                "version": item.version,
                "valid_from": to_datetime(BEGINNING),
                "document": canonical_json(to_document(item)),
                "published_at": to_datetime(BEGINNING),
                "published_by": "test",
            }
            producer.produce(self.topics.catalog, SCHEMAS.encode(CATALOG, record), f"{kind}/{item.id}/{item.version}")
        producer.commit_transaction(30)

    def publish_all(self, accounts: int = 12) -> None:
        """Two meters, a plan with a charge of every model, and accounts acct-00 … with a contract each."""
        self.publish(*EVERY_METER, plan(*EVERY_MODEL))
        self.publish(*(item for name in self.accounts(accounts) for item in (account(name), contract(name))))

    @staticmethod
    def accounts(count: int = 12) -> list[str]:
        return [f"acct-{number:02d}" for number in range(count)]

    def send(self, count: int, *, accounts: Sequence[str] = (), **options: Any) -> None:
        """Send a mix: mostly good events, every 9th one again, every 20th unratable, every 50th of a stranger."""
        names = accounts or self.accounts()
        for _ in range(count):
            number, self._number = self._number, self._number + 1
            name = names[number % len(names)]
            tokens = f"{number % 37}.{number % 10}"
            event = usage(
                f"key-{number}",
                name,
                timestamp=time.time_ns() // 1000,
                properties={"tokens": tokens, "model": ("small", "large", "tiny")[number % 3]},
                sequence=number + 1,
            )
            if number % 20 == 13:
                event["properties"]["tokens"] = "many"
            if number % 50 == 7:
                event["account"] = f"nobody-{number % 5}"
            self.send_event(event)
            if number % 9 == 5:
                again = event | {"properties": dict(reversed(event["properties"].items())), "sequence": number + 10**6}
                self.send_event(again)
        self.flush()

    def send_event(self, event: dict[str, Any], producer: Producer | None = None) -> None:
        """Send one event and note what ought to become of it."""
        self.expect(event)
        self.send_raw(framed(event), event["account"].encode(), producer=producer)

    def expect(self, event: dict[str, Any]) -> None:
        identity = event["account"], event["idempotency_key"]
        self.sent.messages += 1
        if identity in self.sent.rated:
            self.sent.duplicates += 1
        elif event["account"].startswith("nobody"):
            self.sent.parked += 1
        elif event["properties"]["tokens"] == "many":
            self.sent.dead["not_a_number"] += 1
        else:
            self.sent.rated[identity] += 1
            totals = self.sent.totals[event["account"]]
            totals[0] += Fraction(event["properties"]["tokens"])
            totals[1] += event["properties"]["model"] in ("small", "large")

    def send_raw(
        self, value: bytes, key: bytes, partition: int | None = None, producer: Producer | None = None
    ) -> None:
        place = partition_of(key, self.settings.partitions) if partition is None else partition
        chosen = producer or self._producer
        while True:
            try:
                chosen.produce(self.topics.events, value, key, place)
                return
            except BufferError:
                chosen.poll(0.1)

    def park(self, event: dict[str, Any], offset: int, wait_s: float) -> None:
        """Put a letter on the retry topic as if this event had been parked for its unknown account."""
        now_ms = time.time_ns() // 1_000_000
        letter = {
            "origin_topic": self.topics.events,
            "origin_partition": partition_of(event["account"].encode(), self.settings.partitions),
            "origin_offset": offset,
            "origin_appended_at": now_ms,
            "stage": "enrich",
            "reason": "unknown_account",
            "message": "parked by a test",
            "attempts": 1,
            "replays": 0,
            "parked_at": now_ms,
            "not_before": now_ms + int(wait_s * 1000),
            "catalog_offset": 0,
            **dict.fromkeys(("account", "idempotency_key", "event_type", "event_time")),
            "key": event["account"].encode(),
            "value": framed(event),
        }
        self._producer.produce(self.topics.retry, SCHEMAS.encode(DEAD_LETTER, letter), None, letter["origin_partition"])
        self.flush()

    def flush(self) -> None:
        assert self._producer.flush(30) == 0

    # -- raters

    def rater(self, **hooks: Any) -> "Rater":
        """Start a rater process. ``data_dir`` may be given among the hooks."""
        rater = Rater(self, hooks)
        self._raters.append(rater)
        return rater

    def environment(self, data_dir: Path | None = None) -> dict[str, str]:
        """What a rater process of this deployment must find in its environment."""
        names = (
            "kafka_bootstrap",
            "topic_prefix",
            "partitions",
            "session_timeout",
            "progress_timeout",
            "batch_records",
            "dead_letter_run_max",
            "dead_letter_percent_max",
            "dead_letter_window",
            "metrics_port",
            "snapshot_dir",
            "snapshot_interval",
        )
        found = {name: getattr(self.settings, name) for name in names} | {
            "data_dir": data_dir or self.settings.data_dir
        }
        return {f"TALLY_{name.upper()}": str(value) for name, value in found.items() if value is not None}

    def close(self) -> None:
        for rater in self._raters:
            rater.kill()
        self._raters.clear()

    # -- out

    def read(self, topic: str) -> list[Message]:
        """Every committed record of a topic, partition by partition, in order."""
        return list(self._read(topic))

    def _read(self, topic: str) -> Iterator[Message]:
        consumer = Consumer(
            self.settings.kafka
            | {
                "group.id": "reader",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 20,
            }
        )
        try:
            found = consumer.list_topics(topic, 15).topics[topic].partitions
            open_partitions = set(found)
            consumer.assign([TopicPartition(topic, partition, 0) for partition in found])
            deadline = time.monotonic() + PATIENCE_S
            while open_partitions:
                assert time.monotonic() < deadline, f"{topic} could not be read to its end"
                for message in consumer.consume(5000, 0.2):
                    error = message.error()
                    if error is None:
                        yield message
                    else:
                        assert error.code() == KafkaError._PARTITION_EOF, error
                        open_partitions.discard(message.partition() or 0)
        finally:
            consumer.close()

    def decoded(self, topic: str, subject: str) -> list[dict[str, Any]]:
        return [SCHEMAS.decode(message.value(), subject) for message in self._read(topic)]

    def receipts(self) -> list[dict[str, Any]]:
        return self.decoded(self.topics.receipts, RECEIPTS)

    def rows(self) -> list[dict[str, Any]]:
        return self.decoded(self.topics.rated, RATED)

    def dead(self) -> list[dict[str, Any]]:
        return self.decoded(self.topics.dead_letter, DEAD_LETTER)

    def positions(self, topic: str) -> dict[int, int]:
        """Committed offset of the raters' group per partition, 0 where there is none."""
        with contextlib.closing(Consumer(self.settings.kafka | {"group.id": self.group})) as consumer:
            tps = [TopicPartition(topic, partition) for partition in range(self.settings.partitions)]
            while True:
                try:
                    return {tp.partition: max(0, tp.offset) for tp in consumer.committed(tps, 30)}
                except KafkaException as error:  # a broker that just started
                    if not passes(error.args[0]):
                        raise
                    time.sleep(0.1)

    def counts(self, receipts: Sequence[dict[str, Any]] | None = None) -> Counter[str]:
        """Arrivals by state now, from the receipts alone."""
        counts: Counter[str] = Counter()
        settled: dict[tuple[int, int], str] = {}
        for receipt in self.receipts() if receipts is None else receipts:
            if receipt["topic"] == self.topics.events:
                for state, name in (
                    ("rated", "rated"),
                    ("duplicate", "duplicates"),
                    ("parked", "parked"),
                    ("dead_lettered", "dead_lettered"),
                ):
                    counts[state] += receipt[name]
            for one in receipt["resolutions"]:
                settled[one["origin_partition"], one["origin_offset"]] = one["outcome"]
        for outcome in settled.values():
            counts["parked"] -= 1
            counts[outcome] += 1
        return counts

    def wait(self, condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Wait for a condition; fail when a rater dies meanwhile that was not told to."""
        deadline = time.monotonic() + patience_s
        while not condition():
            for rater in self._raters:
                rater.must_be_well(others=[other for other in self._raters if other is not rater])
            assert time.monotonic() < deadline, f"waited {patience_s:.0f} s in vain: {what}"
            time.sleep(0.1)

    def wait_done(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until everything sent to ``usage.events`` was committed by raters."""
        ends = self._ends()
        self.wait(lambda: self.is_done(ends), f"raters to reach {ends}", patience_s)

    def is_done(self, ends: dict[int, int] | None = None) -> bool:
        """Was everything on ``usage.events``, or up to these offsets, committed by raters?"""
        at = self.positions(self.topics.events)
        return all(at[partition] >= end for partition, end in (ends or self._ends()).items())

    def _ends(self) -> dict[int, int]:
        ends: dict[int, int] = {}
        for message in self._read(self.topics.events):
            ends[message.partition() or 0] = (message.offset() or 0) + 1
        return ends

    # -- the judge

    def check(self) -> None:
        """Everything that was sent is in exactly one state, and every amount is right."""
        arrivals = {(m.partition() or 0, m.offset() or 0): m for m in self._read(self.topics.events)}
        assert len(arrivals) == self.sent.messages
        rows, letters, receipts = self.rows(), self.dead(), self.receipts()

        # Receipts cover every offset, once.
        for topic in (self.topics.events, self.topics.retry):
            for partition in range(self.settings.partitions):
                runs = sorted(
                    (receipt["first_offset"], receipt["next_offset"])
                    for receipt in receipts
                    if (receipt["topic"], receipt["partition"]) == (topic, partition)
                )
                at = 0
                for first, following in runs:
                    assert first == at, f"{topic}/{partition}: receipts have a gap or overlap at {at}: {runs}"
                    at = following
                if topic == self.topics.events:
                    assert at > max((offset for place, offset in arrivals if place == partition), default=-1)

        # Every arrival is in one state, and the right one.
        rated = {(row["origin_partition"], row["origin_offset"]) for row in rows}
        dead = Counter((letter["origin_partition"], letter["origin_offset"]) for letter in letters)
        assert dead.total() == len(dead), "an event was dead-lettered twice"
        assert not rated & dead.keys()
        assert rated | dead.keys() <= arrivals.keys()
        counts = self.counts(receipts)
        assert {state: counts[state] for state in self.sent.expected} == self.sent.expected
        assert Counter(letter["reason"] for letter in letters) == self.sent.dead

        # Once each, for all charges.
        places = Counter((row["identity"], row["charge"]) for row in rows)
        assert places.total() == len(places), "an event was rated twice"
        assert Counter({(row["event"]["account"], row["event"]["idempotency_key"]) for row in rows}) == self.sent.rated

        # Running quantities chain, and rows add up to the price of the total.
        chains: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            chains[row["event"]["account"], row["charge"]].append(row)
        prices = {charge.id: charge for charge in EVERY_MODEL}
        for (name, charge), chain in chains.items():
            before = Fraction(0)
            for row in chain:
                assert Fraction(row["quantity_before"]) == before, f"{name} {charge}: the chain is broken at {row}"
                before = Fraction(row["quantity_after"])
            total = self.sent.totals[name][1 if charge == "unit" else 0]
            assert before == total, f"{name} {charge}"
            assert sum(Fraction(row["amount"]) for row in chain) == cost(prices[charge], total)
        assert {name for name, _ in chains} == self.sent.totals.keys()


class Rater:
    """A rater process."""

    def __init__(self, deployment: Deployment, hooks: dict[str, Any]) -> None:
        settings = deployment.settings
        data_dir = Path(hooks.pop("data_dir", settings.data_dir))
        self.log = settings.data_dir / f"rater-{len(deployment._raters)}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        module = hooks.pop("module", "tests.integration.rater")
        environment = deployment.environment(data_dir)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(hooks)],
                env=os.environ | environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self.pid = self.process.pid
        self._may_die = "die_at" in hooks

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, what: str) -> int:
        """How often the log has a word."""
        return self.text().count(what)

    def must_be_well(self, others: Sequence["Rater"] = ()) -> None:
        code = self.process.poll()
        if code is not None and not self._may_die:
            logs = "".join(f"\n--- rater {one.pid}\n{one.text()[-3000:]}" for one in (self, *others))
            raise AssertionError(f"rater {self.pid} ended with {code}:{logs}")

    def may_die(self) -> None:
        self._may_die = True

    def wait(self, timeout: float = PATIENCE_S) -> int:
        self._may_die = True
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the rater did not end in {timeout:.0f} s:\n{self.text()[-3000:]}") from None

    def stop(self) -> int:
        """SIGTERM, as an operator or an orchestrator does; returns the exit code."""
        self.process.terminate()
        return self.wait()

    def is_stopped(self) -> bool:
        """Has a SIGSTOP taken effect?"""
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.wait()
