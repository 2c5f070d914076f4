"""A small deployment with real workers: a catalog, events as they arrive, raters and sinks as processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, TypeVar

from confluent_kafka import Producer
from psycopg import Connection

from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Item, to_document
from pipeline.core.meters import Meter
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.periods import BEGINNING, to_datetime
from pipeline.core.plans import Plan
from pipeline.infra.avro import CATALOG, EVENTS, load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, partition_of
from pipeline.operations.dead_letters import Origin

SCHEMAS = load_schemas()
T = TypeVar("T")

INPUT_PRICE, OUTPUT_PRICE = Decimal("0.000003"), Decimal("0.000015")


def account_items(account: str) -> list[tuple[str, Item]]:
    return [
        ("account", Account(account, 1, account, "UTC")),
        ("contract", Contract(f"{account}-main", 1, account, "llm", 0, None)),
    ]


def plan_items() -> list[tuple[str, Item]]:
    def meter(name: str) -> Meter:
        return Meter(name, 1, "llm.request", "sum", name, "token", (), False, 0)

    charges = (
        Charge(
            "input",
            "input_tokens",
            "graduated",
            tiers=(Tier(500_000 * QUANTITY_ONE, INPUT_PRICE), Tier(None, INPUT_PRICE / 2)),
        ),
        Charge("output", "output_tokens", "per_unit", unit_price=OUTPUT_PRICE),
    )
    return [
        ("meter", meter("input_tokens")),
        ("meter", meter("output_tokens")),
        ("plan", Plan("llm", 1, "LLM", "USD", 0, charges)),
    ]


class World:
    """What a test does to a deployment, and what it sees of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topics = Topics(settings.topic_prefix)
        self.connection: Connection[Any] = connect(settings.dsn, application="test", autocommit=True)
        self._producer = Producer({**settings.kafka, "enable.idempotence": True})
        self.publish(*plan_items(), *account_items("acct-1"), *account_items("acct-2"))

    def settings_with(self, **changes: Any) -> Settings:
        """The settings, changed; made anew, since a copy would keep the connection it has worked out."""
        return Settings(**{**self.settings.model_dump(exclude={"kafka"}), **changes})

    def publish(self, *items: tuple[str, Item], table: bool = True, topic: bool = True) -> None:
        """Into the table and onto the topic, as the relay would; only one of them on its way there."""
        for kind, item in items:
            document = json.dumps(to_document(item))
            if table:
                self._insert(kind, item.id, document)
            if not topic:
                continue
            entry = {
                "kind": kind,
                "id": item.id,
                "version": 1,
                "valid_from": to_datetime(BEGINNING),
                "document": document,
            }
            value = SCHEMAS.encode(CATALOG, entry | {"published_at": to_datetime(BEGINNING), "published_by": "test"})
            self._producer.produce(self.topics.catalog, value, f"{kind}/{item.id}/1")
        assert self._producer.flush(15) == 0

    def _insert(self, kind: str, id: str, document: str) -> None:
        self.connection.execute(
            "INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by) "
            "VALUES (%s, %s, 1, %s, %s, 'test')",
            [kind, id, to_datetime(BEGINNING), document],
        )

    def event(self, key: str, account: str = "acct-1", at_us: int | None = None, **properties: str) -> Origin:
        """Emit a usage event of now; where it arrived."""
        record = {
            "idempotency_key": key,
            "account": account,
            "event_type": "llm.request",
            "timestamp": time.time_ns() // 1000 if at_us is None else at_us,
            "subject": "user-7",
            "properties": {"input_tokens": "10", "output_tokens": "2"} | properties,
            "source": "api-1",
            "sequence": 0,
        }
        return self.raw(SCHEMAS.encode(EVENTS, record), account)

    def raw(self, value: bytes, account: str = "acct-1", topic: str | None = None) -> Origin:
        """Write any bytes, on the events topic unless told; where they arrived."""
        places: list[Origin] = []
        self._producer.produce(
            topic or self.topics.events,
            value,
            account,
            partition_of(account.encode(), self.settings.partitions),
            on_delivery=lambda error, m: places.append(Origin(m.topic(), m.partition(), m.offset())),
        )
        assert self._producer.flush(15) == 0
        return places[0]

    # -- what is there

    def row(self, origin: Origin) -> dict[str, Any]:
        cursor = self.connection.execute(
            "SELECT * FROM billing.unrated_event WHERE (origin_topic, origin_partition, origin_offset) = (%s, %s, %s)",
            origin,
        )
        found = cursor.fetchone()
        assert cursor.description is not None
        return {} if found is None else dict(zip((c.name for c in cursor.description), found, strict=True))

    def state(self, origin: Origin) -> str | None:
        row = self.row(origin)
        return row.get("state") if row.get("attempts") != 0 or row.get("state") != "parked" else "replaying"

    def billed(self, key: str) -> list[tuple[str, str, Decimal]]:
        """The rated rows of an event: account, charge, amount."""
        rows = self.connection.execute(
            "SELECT account, charge, amount FROM billing.rated_usage WHERE idempotency_key = %s ORDER BY charge", [key]
        )
        return rows.fetchall()

    def scalar(self, query: str, *arguments: object) -> Any:
        row = self.connection.execute(query, arguments).fetchone()
        assert row is not None
        return row[0]

    # -- workers

    @contextmanager
    def rater(self) -> Iterator["subprocess.Popen[bytes]"]:
        yield from self._worker("from pipeline.rating.app import run; run(Settings())")

    @contextmanager
    def sink(self) -> Iterator["subprocess.Popen[bytes]"]:
        yield from self._worker(
            "import signal, threading; from pipeline.billing.sink import run; stop = threading.Event(); "
            "signal.signal(signal.SIGTERM, lambda *_: stop.set()); run(Settings(), stop)"
        )

    def _worker(self, program: str) -> "Iterator[subprocess.Popen[bytes]]":
        argv = [sys.executable, "-c", f"from pipeline.infra.settings import Settings; {program}"]
        with subprocess.Popen(argv, env=self.environment()) as process:
            try:
                yield process
                assert process.poll() is None, "the worker ended by itself"
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()

    def environment(self) -> dict[str, str]:
        settings = self.settings
        return os.environ | {
            "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
            "TALLY_POSTGRES_DSN": settings.dsn,
            "TALLY_TOPIC_PREFIX": settings.topic_prefix,
            "TALLY_PARTITIONS": str(settings.partitions),
            "TALLY_DATA_DIR": str(settings.data_dir),
            "TALLY_ACTOR": "ops",
            "TALLY_LOG_LEVEL": "warning",
            "NO_COLOR": "1",
        }

    def close(self) -> None:
        self.connection.close()


def eventually(look: Callable[[], T], wanted: Callable[[T], bool] = bool, seconds: float = 30.0) -> T:
    """The first look that is as wanted. Fails with the last one when none is in time."""
    until = time.monotonic() + seconds
    while not wanted(seen := look()):
        assert time.monotonic() < until, f"still {seen!r} after {seconds:g} s"
        time.sleep(0.05)
    return seen
