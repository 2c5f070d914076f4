"""The relay: published versions on their way from the outbox to the topic ``billing.catalog``.

One publication is one Kafka transaction, so raters see all of it or none. Delivery is at least once: a version is
marked as relayed after its transaction is committed, and one sent twice is the same immutable version under the same
key. Of several relays one is active, holding a lock in PostgreSQL; the others stand by.
"""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.rows import class_row

from pipeline.catalog.publish import CHANNEL, Published
from pipeline.core.documents import canonical_json
from pipeline.infra import metrics
from pipeline.infra.avro import CATALOG, load_schemas
from pipeline.infra.logs import get_logger
from pipeline.infra.outbox import Reached, TopicWriter, lock_of, run_active
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

log = get_logger(__name__)

#: What the active relay's lock and transactions are named by.
_NAME = "relay"
#: How often a waiting relay looks whether to stop; seconds.
_WAIT_S = 0.5
#: Most versions in one transaction. A larger publication is seen in parts, in its order: accounts, contracts, meters,
#: plans; an event that meets a part only is parked, never priced wrongly.
_TRANSACTION_VERSIONS_MAX = 20_000


def run(settings: Settings, stop: threading.Event, *, reached: Reached = lambda _: None) -> None:
    """Relay until ``stop`` is set. While Kafka or PostgreSQL does not answer, wait with back-off and say so once.

    Raises psycopg.Error for anything but an absent server (a table missing), KafkaException for a fatal refusal
    (credentials), ValueError for a version that does not fit the topic's schema. These need a person.
    """
    metrics.serve(settings)

    def begin(connection: "Connection[Any]") -> Callable[[], None]:
        connection.execute(f"LISTEN {CHANNEL}")
        relay = _Relay(settings, connection, reached)
        relay.requeue_missing()
        return lambda: relay.follow(stop)

    run_active(settings, stop, name=_NAME, topic=Topics(settings.topic_prefix).catalog, begin=begin)


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
                free = connection.execute(f"SELECT pg_try_advisory_xact_lock_shared({lock_of(_NAME)})").fetchone()
                return Relayed(waiting, at, active=free == (False,))
            time.sleep(_LOOK_S)


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
        topic = Topics(settings.topic_prefix).catalog
        self._writer = TopicWriter(settings, topic, name=_NAME, messages_max=_TRANSACTION_VERSIONS_MAX)
        self._schemas = load_schemas(settings.registry_url)
        self._connection = connection
        self._reached = reached

    def requeue_missing(self) -> None:
        """Put back into the outbox what was relayed but is not on the topic: a new Kafka starts with none."""
        there = [(message.key() or b"").decode() for message in self._writer.read()]
        requeued = self._connection.execute(_REQUEUE, [there]).rowcount
        if requeued:
            log.warning("relays again", versions=requeued, because=f"they are not on {self._writer.topic}")

    def follow(self, stop: threading.Event) -> None:
        """Relay what waits, then each publication as it is notified, until told to stop."""
        while not stop.is_set():
            while self._relay_next() and not stop.is_set():
                pass
            for _ in self._connection.notifies(timeout=_WAIT_S, stop_after=1):
                pass

    def _relay_next(self) -> bool:
        """Carry what waits to the topic; False when nothing did.

        1. Write all of it in one transaction. 2. Mark it as relayed. A stop after 1 sends it again.
        """
        with self._connection.cursor(row_factory=class_row(_Waiting)) as cursor:
            waiting = cursor.execute(_SELECT_WAITING, [_TRANSACTION_VERSIONS_MAX]).fetchall()
        metrics.RELAY_PENDING.set(len(waiting))
        if not waiting:
            return False
        # Step 1.
        messages = [(version.key.encode(), self._schemas.encode(CATALOG, version.record())) for version in waiting]
        self._writer.write(messages, self._reached)
        # Step 2.
        self._connection.execute(_MARK, [[version.seq for version in waiting]])
        self._reached("marked")
        metrics.RELAY_PENDING.set(0)
        metrics.RELAY_PUBLISHED.inc(len(waiting))
        log.info("relayed", versions=len(waiting), first=waiting[0].key, last=waiting[-1].key)
        return True


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
