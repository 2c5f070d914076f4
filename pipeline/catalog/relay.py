"""The relay: published versions on their way from the outbox to the topic ``billing.catalog``.

One publication is one Kafka transaction, so raters see all of it or none. Delivery is at least once: a version is
marked as relayed after its transaction is committed, and one sent twice is the same immutable version under the same
key. Of several relays one is active, holding a lock in PostgreSQL; the others stand by.
"""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from psycopg import Connection, OperationalError
from psycopg.rows import class_row

from pipeline.catalog.publish import CHANNEL, Published
from pipeline.core.documents import canonical_json
from pipeline.infra import metrics
from pipeline.infra.avro import CATALOG, load_schemas
from pipeline.infra.logs import get_logger
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import RECORD_BYTES_MAX, Topics

log = get_logger(__name__)

#: Told of each step of carrying a publication: ``produced``, ``committed``, ``marked``. For tests that stop there.
Reached: TypeAlias = Callable[[str], None]

#: How often a waiting relay looks whether to stop, and a standby whether the active one is gone; seconds.
_WAIT_S = 0.5
#: Waits between attempts while Kafka or PostgreSQL is away, doubling; seconds.
_BACKOFF_FIRST_S, _BACKOFF_LONGEST_S = 0.25, 10.0
#: Longest wait for Kafka to answer; seconds. Told to stop, a relay ends within it.
_ANSWER_S = 5.0
#: Longest a transaction may take; seconds. An abandoned one holds up every reader of the catalog until then.
_TRANSACTION_S = 15
#: Most versions in one transaction. A larger publication is seen in parts, in its order: accounts, contracts, meters,
#: plans; an event that meets a part only is parked, never priced wrongly.
_TRANSACTION_VERSIONS_MAX = 20_000


def run(settings: Settings, stop: threading.Event, *, reached: Reached = lambda _: None) -> None:
    """Relay until ``stop`` is set. While Kafka or PostgreSQL does not answer, wait with back-off and say so once.

    Raises psycopg.Error for anything but an absent server (a table missing), KafkaException for a fatal refusal
    (credentials), ValueError for a version that does not fit the topic's schema. These need a person.
    """
    metrics.serve(settings)
    backoff, away = _BACKOFF_FIRST_S, False
    while not stop.is_set():
        try:
            with connect(settings.dsn, application="relay", autocommit=True) as connection:
                if _take_over(connection, stop):
                    relay = _Relay(settings, connection, reached)
                    relay.requeue_missing()
                    log.info("back" if away else "active", topic=relay.topic)
                    backoff, away = _BACKOFF_FIRST_S, False
                    relay.follow(stop)
        except (OperationalError, KafkaException) as error:
            if isinstance(error, KafkaException) and error.args[0].code() in _REFUSED:
                raise
            if not away:
                log.warning("away", problem=str(error).strip(), then="waits and comes back")
            away = True
            stop.wait(backoff)
            backoff = min(backoff * 2, _BACKOFF_LONGEST_S)


class Relayed(NamedTuple):
    """How far a publication is on its way to the raters."""

    #: Its versions that are not on the topic yet.
    waiting: int
    #: When the last of those that are there was relayed, UTC; None when none is.
    at: datetime | None
    #: Whether a relay is at work; always so when nothing waits.
    active: bool


_SELECT_RELAYED = """
SELECT count(*) FILTER (WHERE relayed_at IS NULL), max(relayed_at)
FROM billing.outbox
JOIN unnest(%s::billing.catalog_kind[], %s::text[], %s::integer[]) AS wanted (kind, id, version)
    USING (kind, id, version)
"""
#: How often a command that waits for the relay looks; seconds. A relay takes tens of milliseconds.
_LOOK_S = 0.1


def await_relayed(dsn: str, published: Sequence[Published], wait_s: float) -> Relayed:
    """Wait until the relay has carried these versions, at most so many seconds; how far it is then.

    Raises psycopg.Error when the database does not answer.
    """
    wanted = [[getattr(one, name) for one in published] for name in ("kind", "id", "version")]
    until = time.monotonic() + wait_s
    with connect(dsn, application="publish", autocommit=True) as connection:
        while True:
            row = connection.execute(_SELECT_RELAYED, wanted).fetchone()
            if row is None:
                raise AssertionError("an aggregate without groups has one row")
            waiting, at = row
            if not waiting:
                return Relayed(0, at, True)
            if time.monotonic() >= until:
                # The active relay holds the lock, which nobody else can then share.
                free = connection.execute(f"SELECT pg_try_advisory_xact_lock_shared({_LOCK})").fetchone()
                return Relayed(waiting, at, active=free == (False,))
            time.sleep(_LOOK_S)


#: What waiting does not mend.
_REFUSED = frozenset(
    {
        KafkaError._AUTHENTICATION,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)


#: Held by the active relay.
_LOCK = "hashtextextended('tally.relay', 0)"


def _take_over(connection: "Connection[Any]", stop: threading.Event) -> bool:
    """Wait until this relay is the active one; False when told to stop before. The lock ends with the connection."""
    connection.execute(f"LISTEN {CHANNEL}")
    standing_by = False
    while not stop.is_set():
        row = connection.execute(f"SELECT pg_try_advisory_lock({_LOCK})").fetchone()
        if row == (True,):
            return True
        if not standing_by:
            log.info("standing by", until="the active relay is gone")
            standing_by = True
        stop.wait(_WAIT_S)
    return False


class _Waiting(NamedTuple):
    """A version in the outbox."""

    seq: int
    kind: str
    id: str
    version: int
    valid_from: datetime
    document: dict[str, Any]
    published_at: datetime
    published_by: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.id}/{self.version}"

    def record(self) -> dict[str, Any]:
        known = self.kind != "price_list"  # to the schema's enum, which cannot grow
        return {
            "kind": self.kind if known else "plan",
            "document_kind": "" if known else self.kind,
            "id": self.id,
            "version": self.version,
            "valid_from": self.valid_from,
            "document": canonical_json(self.document),
            "published_at": self.published_at,
            "published_by": self.published_by,
        }


class _Relay:
    """The active relay, for as long as both connections hold."""

    def __init__(self, settings: Settings, connection: "Connection[Any]", reached: Reached) -> None:
        topics = Topics(settings.topic_prefix)
        self.topic = topics.catalog
        self._kafka = {**settings.kafka, "log_level": 2}  # what is wrong comes as an exception, not on stderr
        self._schemas = load_schemas(settings.registry_url)
        self._connection = connection
        self._reached = reached
        self._producer = Producer(
            {
                **self._kafka,
                "transactional.id": f"{topics.prefix}relay",
                "transaction.timeout.ms": _TRANSACTION_S * 1000,
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "message.max.bytes": RECORD_BYTES_MAX,
                "queue.buffering.max.messages": 2 * _TRANSACTION_VERSIONS_MAX,
            }
        )
        # Fences a relay that lost its lock without noticing, and ends a transaction it left open.
        self._producer.init_transactions(_ANSWER_S)

    def requeue_missing(self) -> None:
        """Put back into the outbox what was relayed but is not on the topic: a new Kafka starts with none."""
        there = self._keys_on_topic()
        requeued = self._connection.execute(_REQUEUE, [there]).rowcount
        if requeued:
            log.warning("relays again", versions=requeued, because=f"they are not on {self.topic}")

    def follow(self, stop: threading.Event) -> None:
        """Relay what waits, then each publication as it is notified, until told to stop."""
        while not stop.is_set():
            while self._relay_next() and not stop.is_set():
                pass
            for _ in self._connection.notifies(timeout=_WAIT_S, stop_after=1):
                pass

    def _relay_next(self) -> bool:
        """Carry what waits to the topic; False when nothing did.

        1. Produce all of it in one transaction. 2. Commit. 3. Mark it as relayed. A stop after 2 sends it again.
        """
        with self._connection.cursor(row_factory=class_row(_Waiting)) as cursor:
            waiting = cursor.execute(_SELECT_WAITING, [_TRANSACTION_VERSIONS_MAX]).fetchall()
        metrics.RELAY_PENDING.set(len(waiting))
        if not waiting:
            return False
        # Step 1.
        self._producer.begin_transaction()
        for version in waiting:
            self._producer.produce(self.topic, self._schemas.encode(CATALOG, version.record()), version.key.encode())
        self._reached("produced")
        # Step 2. A record the broker refuses fails the commit.
        self._producer.commit_transaction(_TRANSACTION_S)
        self._reached("committed")
        # Step 3.
        self._connection.execute(_MARK, [[version.seq for version in waiting]])
        self._reached("marked")
        metrics.RELAY_PENDING.set(0)
        metrics.RELAY_PUBLISHED.inc(len(waiting))
        log.info("relayed", versions=len(waiting), first=waiting[0].key, last=waiting[-1].key)
        return True

    def _keys_on_topic(self) -> list[str]:
        """Keys of every committed record of the topic, read once to its end."""
        consumer = Consumer(
            {
                **self._kafka,
                "group.id": f"{self.topic}-relay",  # the client wants one; never joined
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 50,
            }
        )
        keys: list[str] = []
        try:
            consumer.assign([TopicPartition(self.topic, 0, OFFSET_BEGINNING)])
            while True:
                message = consumer.poll(_ANSWER_S)
                if message is None:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{self.topic} does not answer"))
                if error := message.error():
                    if error.code() == KafkaError._PARTITION_EOF:
                        return keys
                    raise KafkaException(error)
                keys.append((message.key() or b"").decode())
        finally:
            consumer.close()


_SELECT_WAITING = """
SELECT seq, kind, id, version, valid_from, document, published_at, published_by
FROM billing.outbox JOIN billing.catalog_version USING (kind, id, version)
WHERE relayed_at IS NULL ORDER BY seq LIMIT %s
"""
_MARK = "UPDATE billing.outbox SET relayed_at = now() WHERE seq = ANY(%s)"
_REQUEUE = """
UPDATE billing.outbox SET relayed_at = NULL
WHERE relayed_at IS NOT NULL
  AND NOT EXISTS (SELECT FROM unnest(%s::text[]) AS there (key) WHERE key = concat_ws('/', kind, id, version))
"""
