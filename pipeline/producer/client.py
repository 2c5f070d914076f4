"""``UsageProducer``: what a product service holds.

``emit`` checks and encodes an event, gives it the source's next number and writes it to the journal: no network, no
waiting. The sender (``pipeline.producer.sender``) carries the journal to Kafka on its own thread.
"""

import atexit
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.infra.avro import CONTROLS, EVENTS, frame, load_schemas
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.producer.controls import Controls
from pipeline.producer.errors import ProducerClosed
from pipeline.producer.journal import Journal
from pipeline.producer.sender import OnDelivery, Sender
from pipeline.producer.spool import Spool
from pipeline.producer.usage import PropertyValue, Usage, encode, source_field

log = logging.getLogger("tally.producer")

SPOOL_BYTES = 1024 * 1024 * 1024
#: The rater refuses events further ahead of the broker's clock than this.
_AHEAD_SECONDS_MAX = 5 * 60
_AHEAD_WARNING_EVERY = 60.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot: emitted + recovered = delivered + failed + spooled + in_flight."""

    #: Events this producer took.
    emitted: int
    #: Undelivered events that an earlier run left in the spool.
    recovered: int
    #: Confirmed by Kafka (all in-sync replicas).
    delivered: int
    #: Refused for good by Kafka; kept in ``rejected.jsonl``.
    failed: int
    #: In the spool, not yet handed to Kafka's client.
    spooled: int
    #: Handed to Kafka's client, not yet confirmed.
    in_flight: int
    #: Disk space of the spool; grows and shrinks in steps of a segment.
    spool_bytes: int
    #: Why events are not being delivered; None while nothing is known to be wrong.
    trouble: str | None


class UsageProducer:
    """Sends usage events to ``usage.events``; an event is safe once ``emit`` has returned.

    ::

        with UsageProducer(bootstrap="kafka:9092", source="llm-gateway", spool_dir="/var/lib/gateway/usage") as usage:
            usage.emit(
                account="acct-7", event_type="llm.request", idempotency_key=request_id,
                timestamp=started_at, properties={"input_tokens": 812, "model": "m-1"},
            )

    ``spool_dir`` is this producer's alone, on a local disk that outlives the process. Events wait there while Kafka
    is away and survive a killed process: the next producer on the folder sends them, byte for byte. Only a machine that
    loses power can lose events: those not delivered yet, and while Kafka is away those of the last second.

    ``source`` names the service. Events carry ``source/epoch`` and are numbered within it from 1 without holes, across
    restarts; a new, copied or possibly damaged folder starts a new epoch, so no number is ever used twice.

    The spool takes ``spool_bytes_max`` bytes. When it is full ``emit`` waits up to ``block_seconds`` for room, the only
    thing it ever waits for, and then raises BufferFull.

    ``on_delivery`` is called once per event, those of an earlier run included, on a background thread: it must be
    quick, and must not call ``flush`` or ``close``. All methods may be called from any thread, but not from a signal
    handler. After ``os.fork`` the child's copy refuses to emit: create the producer in the child.

    ``kafka`` adds to or overrides the client's configuration (TLS, SASL). Raises SpoolError and its kinds, ValueError
    for a bad source or size, KafkaException for a bad configuration, and what the registry's client raises when a
    registry is asked for the first time and does not answer. Kafka being away raises nothing.
    """

    def __init__(
        self,
        *,
        bootstrap: str,
        source: str,
        spool_dir: Path | str,
        topic_prefix: str = "",
        registry_url: str | None = None,
        kafka: Mapping[str, str | int | bool] | None = None,
        spool_bytes_max: int = SPOOL_BYTES,
        block_seconds: float = 1.0,
        on_delivery: OnDelivery | None = None,
    ) -> None:
        if "/" in source:
            raise ValueError(f"expected a source without '/', which divides it from its epoch, got {source!r}")
        source_field(f"{source}/{'0' * 12}")
        topics = Topics(topic_prefix)
        self._block_seconds = block_seconds
        with ExitStack() as undo:
            self._spool = Spool(Path(spool_dir), source, topics.events)
            undo.callback(self._spool.abandon)
            self._frame = frame(_schema_id(self._spool, registry_url, EVENTS))
            control_frame = frame(_schema_id(self._spool, registry_url, CONTROLS))
            self._journal = Journal(self._spool.folder, self._spool.identity.epoch, spool_bytes_max)
            undo.callback(self._journal.abandon)
            epoch = self._spool.identity.epoch
            self._controls = Controls(
                self._spool.folder, source, epoch, self._journal.left, self._journal.next_sequence
            )
            self._sender = Sender(
                self._journal,
                self._controls,
                {**(kafka or {}), "bootstrap.servers": bootstrap},
                topic=topics.events,
                controls_topic=topics.controls,
                control_frame=control_frame,
                name=self.source,
                epoch=epoch,
                folder=self._spool.folder,
                on_delivery=on_delivery,
            )
            undo.pop_all()
        self._source_field = source_field(self.source)
        self._first_sequence = self._journal.next_sequence
        self._closed: str | None = None
        self._closing = threading.Lock()
        self._ahead_warning_at = 0.0
        _live.add(self)
        atexit.register(self.close)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        source: str,
        spool_dir: Path | str | None = None,
        spool_bytes_max: int = SPOOL_BYTES,
        block_seconds: float = 1.0,
        on_delivery: OnDelivery | None = None,
    ) -> Self:
        """A producer for a deployment; its spool is ``data_dir/spool/source`` unless given.

        Raises ValueError when the settings know no broker, and what the constructor raises.
        """
        return cls(
            bootstrap=settings.kafka["bootstrap.servers"],
            source=source,
            spool_dir=settings.data_dir / "spool" / source if spool_dir is None else spool_dir,
            topic_prefix=settings.topic_prefix,
            registry_url=settings.registry_url,
            kafka=settings.kafka,
            spool_bytes_max=spool_bytes_max,
            block_seconds=block_seconds,
            on_delivery=on_delivery,
        )

    def emit(
        self,
        *,
        account: str,
        event_type: str,
        properties: Mapping[str, PropertyValue],
        timestamp: datetime,
        idempotency_key: str,
        subject: str = "",
        on_delivery: OnDelivery | None = None,
    ) -> int:
        """Take one event for delivery and return its sequence number; never waits for Kafka.

        ``timestamp`` is when the use happened: aware, exact to the microsecond. ``properties`` are text, int or
        Decimal, sent as exact plain decimals; float and bool are refused. Emitting again with the same account,
        ``idempotency_key`` and content is safe: it is billed once. ``on_delivery`` is for this event, beside the
        producer's own; it does not outlive the process.

        Raises InvalidUsage (the event breaks the contract), BufferFull or ProducerClosed; then nothing was taken.
        """
        if self._closed is not None:
            raise ProducerClosed(self._closed)
        key, body, at = encode(account, event_type, properties, timestamp, idempotency_key, subject)
        now = time.time()
        self._warn_if_ahead(at, now)
        before = None if on_delivery is None else partial(self._sender.expect, on_delivery)
        if now >= self._controls.hour_ends:
            before = partial(self._begin_hour, now, before)
        sequence = self._journal.append(key, self._frame + body + self._source_field, self._block_seconds, before)
        if not self._sender.work.is_set():
            self._sender.work.set()
        return sequence

    def emit_usage(self, usage: Usage, *, on_delivery: OnDelivery | None = None) -> int:
        """``emit`` for an event held as one object."""
        return self.emit(
            account=usage.account,
            event_type=usage.event_type,
            properties=usage.properties,
            timestamp=usage.timestamp,
            idempotency_key=usage.idempotency_key,
            subject=usage.subject,
            on_delivery=on_delivery,
        )

    def flush(self, timeout: float | None = None) -> int:
        """Wait until every event is delivered or rejected, at most ``timeout`` seconds (None: without end).

        Returns the number of events still waiting, 0 when all are done. What other threads emit meanwhile counts. The
        control totals of what was emitted follow within a second or so; nobody waits for them.
        """
        if self._sender.is_current_thread:
            raise RuntimeError("flush and close wait for delivery reports, so on_delivery must not call them")
        if self._closed is not None:
            return self._waiting
        progress = self._sender.progress
        with progress:
            progress.wait_for(lambda: self._waiting == 0 or self._closed is not None, timeout)
        self._sender.ask_for_totals()
        return self._waiting

    def sync(self) -> None:
        """Bring every event emitted so far to the disk itself, so that it survives the machine losing power.

        Raises ProducerClosed, and OSError when the disk fails.
        """
        if self._closed is not None:
            raise ProducerClosed(self._closed)
        self._journal.sync()

    def close(self, timeout: float = 10.0) -> int:
        """Wait for delivery at most ``timeout`` seconds, take no more events, and let go of the spool.

        Returns the number of events left in the spool; the next producer on it sends them. Closing twice is harmless,
        and a program that ends without closing closes here.
        """
        with self._closing:
            if self._closed is not None:
                return 0
            until = time.monotonic() + timeout
            self.flush(timeout)
            self._closed = "the producer is closed"
            _live.discard(self)
            atexit.unregister(self.close)
            self._sender.close(until - time.monotonic())
            self._journal.close()
            self._spool.close()
        if remaining := self._waiting:
            log.warning(
                "%s: closed with %d events undelivered; they stay in %s, and the next producer there sends them",
                self.source,
                remaining,
                self._spool.folder,
            )
        return remaining

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def source(self) -> str:
        """``source/epoch``, as events carry it."""
        return self._spool.identity.source

    @property
    def next_sequence(self) -> int:
        """The number the next event gets."""
        return self._journal.next_sequence

    @property
    def stats(self) -> Stats:
        sender = self._sender
        # In this order, so that an event just moving counts as spooled, never twice.
        delivered, failed, in_flight = sender.delivered, sender.rejected, sender.in_flight
        emitted, recovered = self.next_sequence - self._first_sequence, self._journal.recovered
        return Stats(
            emitted=emitted,
            recovered=recovered,
            delivered=delivered,
            failed=failed,
            spooled=emitted + recovered - delivered - failed - in_flight,
            in_flight=in_flight,
            spool_bytes=self._journal.size,
            trouble=sender.trouble,
        )

    @property
    def _waiting(self) -> int:
        return self.next_sequence - self._first_sequence + self._journal.recovered - self._sender.done

    def _begin_hour(self, now: float, then: Callable[[int], None] | None, sequence: int) -> None:
        self._controls.begin_hour(now, sequence)
        if then is not None:
            then(sequence)

    def _warn_if_ahead(self, at: int, now: float) -> None:
        # Not refused: this machine's clock may be the wrong one. A dead letter can be mended, a refused event is lost.
        ahead = at * 1e-6 - now
        if ahead > _AHEAD_SECONDS_MAX and now >= self._ahead_warning_at:
            self._ahead_warning_at = now + _AHEAD_WARNING_EVERY
            log.warning(
                "%s: an event's timestamp is %.0f s ahead of this machine's clock; the rater refuses more than %d s "
                "(in_the_future). Is it local time marked as UTC?",
                self.source,
                ahead,
                _AHEAD_SECONDS_MAX,
            )

    def _after_fork_in_child(self) -> None:
        self._closed = "the producer was created before os.fork: create one, with its own spool_dir, in the child"
        self._closing = threading.Lock()
        atexit.unregister(self.close)
        self._journal.abandon()
        self._spool.abandon()
        _inherited.append(self)


def _schema_id(spool: Spool, registry_url: str | None, subject: str) -> int:
    """The id of a subject's schema; a registry is asked once per spool, since an id never changes."""
    if registry_url is None:
        return load_schemas().newest(subject).id
    text = load_schemas().newest(subject).text()
    known_as = f"{registry_url}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if known_as not in spool.identity.schema_ids:
        spool.remember_schema(known_as, load_schemas(registry_url).newest(subject).id)
    return spool.identity.schema_ids[known_as]


_live: weakref.WeakSet[UsageProducer] = weakref.WeakSet()
#: In a child of fork: never freed, since freeing Kafka's client waits for threads the child does not have.
_inherited: list[UsageProducer] = []


def _after_fork_in_child() -> None:
    for producer in tuple(_live):
        producer._after_fork_in_child()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
