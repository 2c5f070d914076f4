"""What is measured on: a realistic catalog, usage from one seed, and processes with their costs."""

import io
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
import psutil
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from fastavro.types import Schema

from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Item, kind_of, to_document
from pipeline.core.meters import Meter
from pipeline.core.periods import to_datetime
from pipeline.core.plans import Plan
from pipeline.infra import processes
from pipeline.infra.avro import CATALOG, EVENTS, SchemaVersion, frame, load_schemas
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, ensure_topics
from pipeline.rating.changelog import SEEN_DAYS, expiry_day, pack_seen

#: (key, framed value) of a message on ``usage.events``.
Message = tuple[bytes, bytes]

ACCOUNTS = 1_000
_MODELS, _REGIONS = ("small", "medium", "large"), ("eu", "us", "ap")
TYPES = ("completion", "embedding")
#: Of ``events``: the rest are repeats, or cannot be rated.
RATED_SHARE = 0.979
_UNIT = 10**9
_DAY_US = 86_400_000_000
#: Identities in a record of the changelog of seen keys, as after a large batch.
_SEEN_BLOCK = 5_000


@contextmanager
def topics(settings: Settings, name: str, **options: Any) -> Iterator[Settings]:
    """Topics and a data directory of its own, gone at the end. The database is the run's."""
    here = settings.model_copy(
        update={"topic_prefix": f"{settings.topic_prefix}{name}-", "data_dir": settings.data_dir / name, **options}
    )
    ensure_topics(here)
    try:
        yield here
    finally:
        delete_topics(here)
        shutil.rmtree(here.data_dir, ignore_errors=True)


@contextmanager
def deployment(
    settings: Settings, name: str, items: Sequence[Item] | None = None, **options: Any
) -> Iterator[Settings]:
    """As ``topics``, with the catalog on them, or with another one."""
    with topics(settings, name, **options) as here:
        send_catalog(here, catalog() if items is None else items)
        yield here


def delete_topics(settings: Settings) -> None:
    """Every topic under the settings' prefix."""
    admin = AdminClient(settings.kafka)
    if names := [name for name in admin.list_topics(timeout=15).topics if name.startswith(settings.topic_prefix)]:
        for deleted in admin.delete_topics(names).values():
            deleted.result(30)


def folder(settings: Settings, name: str) -> Settings:
    """The same deployment for another worker, with a data directory of its own."""
    return settings.model_copy(update={"data_dir": settings.data_dir / name})


def catalog() -> list[Item]:
    """1,000 accounts on five plans of two graduated charges."""
    items: list[Item] = [
        Meter(f"m-{kind}", 1, kind, "sum", "tokens", "token", (), allow_negative=False, valid_from_us=0)
        for kind in TYPES
    ]
    for number in range(5):
        base = Decimal(2000 + 137 * number) / 10**9
        charges = tuple(
            Charge(
                id=f"c-{kind}",
                meter=f"m-{kind}",
                model="graduated",
                tiers=(
                    Tier(20_000 * _UNIT, base * factor),
                    Tier(150_000 * _UNIT, base * factor * 3 / 4),
                    Tier(None, base * factor / 2),
                ),
            )
            for kind, factor in zip(TYPES, (10, 1), strict=True)
        )
        items.append(Plan(f"plan-{number}", 1, f"Plan {number}", "USD", 0, charges))
    for number in range(ACCOUNTS):
        account = f"acct-{number:05d}"
        items.append(Account(account, 1, account, "UTC"))
        items.append(Contract(f"{account}-main", 1, account, f"plan-{number % 5}", 0, None))
    return items


def events(count: int, seed: int = 7, times_us: tuple[int, int] | None = None) -> list[Message]:
    """2 % repeats, 0.1 % that cannot be rated; times rise over 19 days up to yesterday, or over ``times_us``."""
    dice = random.Random(seed)
    now = time.time_ns() // 1000
    first, last = times_us or (now - 20 * _DAY_US, now - _DAY_US)
    made: list[Message] = []
    for number in range(count):
        luck = dice.random()
        if luck < 0.02 and made:
            made.append(made[dice.randrange(max(0, len(made) - 50_000), len(made))])
            continue
        account = f"nobody-{number % 97}" if luck > 0.9993 else f"acct-{dice.randrange(ACCOUNTS):05d}"
        quantity = dice.randrange(1, 2001)
        made.append(
            message(
                key=f"{dice.getrandbits(128):032x}",
                account=account,
                event_type=TYPES[dice.random() < 0.3],
                timestamp=first + number * (last - first) // count,
                sequence=number + 1,
                properties={
                    "tokens": "12x" if 0.9990 < luck <= 0.9993 else str(quantity),
                    "model": _MODELS[quantity % 3],
                    "region": _REGIONS[number % 3],
                },
            )
        )
    return made


def message(
    *, key: str, account: str, event_type: str, timestamp: int, sequence: int, properties: dict[str, str]
) -> Message:
    """A usage event as a producer sends it; ``timestamp`` in microseconds since 1970 UTC."""
    newest = load_schemas().newest(EVENTS)
    event = {
        "idempotency_key": key,
        "account": account,
        "event_type": event_type,
        "timestamp": timestamp,
        "subject": "",
        "properties": properties,
        "source": "bench/1",
        "sequence": sequence,
    }
    out = io.BytesIO()
    out.write(frame(newest.id))
    fastavro.schemaless_writer(out, _parsed(newest), event)
    return account.encode(), out.getvalue()


@cache
def _parsed(version: SchemaVersion) -> Schema:
    return version.parsed()


def send(settings: Settings, topic: str, messages: list[Message]) -> None:
    producer = Producer(
        {
            **settings.kafka,
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            "linger.ms": 20,
            "queue.buffering.max.messages": 2_000_000,
            "queue.buffering.max.kbytes": 2_000_000,
        }
    )
    failures: list[KafkaError] = []

    def report(error: KafkaError | None, _: object) -> None:
        if error is not None:
            failures.append(error)

    for key, value in messages:
        producer.produce(topic, value, key, on_delivery=report)
    if producer.flush(120) or failures:
        raise RuntimeError(f"not everything reached {topic}: {failures[:1]}")


def send_catalog(settings: Settings, items: Sequence[Item]) -> None:
    schemas = load_schemas()
    messages = []
    for item in items:
        kind = kind_of(item)
        known = kind != "price_list"  # to the schema's enum
        entry = {
            "kind": kind if known else "plan",
            "document_kind": "" if known else kind,
            "id": item.id,
            "version": 1,
            "valid_from": to_datetime(0),
            "document": json.dumps(to_document(item)),
            "published_at": to_datetime(0),
            "published_by": "bench",
        }
        messages.append((f"{kind}/{item.id}/1".encode(), schemas.encode(CATALOG, entry)))
    send(settings, Topics(settings.topic_prefix).catalog, messages)


def send_seen(settings: Settings, keys: int) -> None:
    """Put ``keys`` identities that no event has into the changelog, evenly over partitions and the days they expire."""
    dice = random.Random(11)
    producer = Producer({**settings.kafka, "linger.ms": 20, "queue.buffering.max.kbytes": 1_000_000})
    now_ms = time.time_ns() // 1_000_000
    last_day = expiry_day(now_ms, now_ms)
    share = keys // settings.partitions
    for done in range(0, share, _SEEN_BLOCK):
        day = last_day - SEEN_DAYS + 1 + SEEN_DAYS * done // share
        for partition in range(settings.partitions):
            entries = dice.randbytes(24 * min(_SEEN_BLOCK, share - done))
            for record in pack_seen({day: [entries]}):
                _produce(producer, Topics(settings.topic_prefix).seen, record, partition)
    if producer.flush(120):
        raise RuntimeError("the changelog was not written")
    # A rater that finds state without offsets refuses to start: say that it is at the beginning.
    group = Consumer({**settings.kafka, "group.id": f"{settings.topic_prefix}rater"})
    topic = Topics(settings.topic_prefix).events
    beginning = [TopicPartition(topic, number, 0) for number in range(settings.partitions)]
    group.commit(offsets=beginning, asynchronous=False)
    group.close()


def _produce(producer: Producer, topic: str, value: bytes, partition: int) -> None:
    while True:
        try:
            producer.produce(topic, value, None, partition)
            return
        except BufferError:
            producer.poll(0.1)


@dataclass(slots=True)
class Cost:
    """CPU and memory of a process, by its own account."""

    process: psutil.Process
    log: Path
    anonymous_bytes: int = 0

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def look(self) -> None:
        """Note the anonymous memory (RssAnon: what is really the process's own, mapped files left out).

        Raises RuntimeError with the end of its log when the process has ended.
        """
        if self.process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError(f"the worker ended early:\n{processes.tail(self.log)}")
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                self.anonymous_bytes = max(self.anonymous_bytes, int(line.split()[1]) * 1024)


@contextmanager
def worker(settings: Settings, code: str) -> Iterator[Cost]:
    """A Python process that runs ``code`` with the settings' world in its environment."""
    log = settings.data_dir / "worker.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **psutil.Process().environ(),
        "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
        "TALLY_POSTGRES_DSN": settings.dsn,
        "TALLY_TOPIC_PREFIX": settings.topic_prefix,
        "TALLY_PARTITIONS": str(settings.partitions),
        "TALLY_DATA_DIR": str(settings.data_dir),
    }
    with log.open("wb") as output:
        process = processes.spawn([sys.executable, "-c", code], output=output, env=environment)
    try:
        # The launcher becomes the worker by exec: one process, whose costs are all the worker's.
        cost = Cost(psutil.Process(process.pid), log)
        yield cost
        cost.look()
    finally:
        processes.end([process], grace=20)


RATER = (
    "from pipeline.infra import logs; from pipeline.infra.settings import Settings; "
    "from pipeline.rating.app import run; s = Settings(); logs.configure(s, worker='rater'); run(s)"
)
SINK = (
    "import signal, threading; from pipeline.infra import logs; from pipeline.infra.settings import Settings; "
    "from pipeline.billing.sink import run; s = Settings(); logs.configure(s, worker='sink'); "
    "stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set()); run(s, stop)"
)
