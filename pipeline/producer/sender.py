"""Carries the journal to Kafka in order, on one background thread, marks what Kafka confirmed, and says so in control
totals (``pipeline.producer.controls``).

Whatever fails and may pass (Kafka away, a topic not there yet, a leader election, a missing permission) ends in the
same move: send no more, wait until everything in flight is reported, back off, and start over from the first event not
marked. Only a fault of the message itself is final: it goes to ``rejected.jsonl``.
"""

import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import fastavro
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from fastavro.types import Schema

from pipeline.infra.avro import CONTROLS, load_schemas
from pipeline.infra.topics import EVENT_BYTES_MAX
from pipeline.producer.controls import Controls, Total
from pipeline.producer.journal import DELIVERED, REJECTED, Entry, Journal, Segment
from pipeline.producer.rejected import idempotency_key, write_rejected

log = logging.getLogger("tally.producer")

#: Sending these messages again cannot help. Everything else passes, or operators mend it.
_MESSAGE_FAULTS = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
    }
)
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})
#: What says that nothing can be delivered now; other client errors are passing detail.
_AWAY = frozenset({KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION, KafkaError._SSL})

#: Events read from the journal at a time: a few milliseconds of work.
_READ_EVENTS = 500
#: Seconds the thread waits for delivery reports (new events wait as long), and with nothing to do.
_REPORT_WAIT, _IDLE_WAIT = 0.01, 0.5
#: Seconds before starting over; doubles up to the maximum, and begins anew after a delivery.
_BACK_OFF_MIN, _BACK_OFF_MAX = 0.5, 10.0
#: Seconds to wait for reports of what is in flight before starting over; then the client is replaced.
_IN_FLIGHT_WAIT = 60.0
#: While events are not being delivered the spool is synced this often, in seconds.
_SYNC_EVERY = 1.0
#: Seconds for reports of purged messages when a client is given up.
_PURGE_WAIT = 1.0
#: Seconds between two totals of one hour that callers of ``flush`` asked for.
_ASKED_EVERY = 1.0
#: Seconds ``close`` waits for Kafka to take the last totals; the next producer on the folder says those it did not.
_FAREWELL_WAIT = 2.0

CLIENT_CONFIG: dict[str, str | int | bool] = {
    "enable.idempotence": True,
    "acks": "all",
    "partitioner": "murmur2_random",  # Java's default; the rater checks it
    "compression.type": "lz4",
    # Events of sixteen partitions make small requests; waiting a little for more of them spares the broker a quarter.
    "linger.ms": 20,
    # The broker holds the whole batch against the topic's max.message.bytes, not each message.
    "batch.size": EVENT_BYTES_MAX * 3 // 4,
    "message.max.bytes": EVENT_BYTES_MAX,
    "message.timeout.ms": 0,  # the client never gives up; the journal bounds what waits
    "queue.buffering.max.messages": 20_000,
    "queue.buffering.max.kbytes": 32 * 1024,
    "reconnect.backoff.max.ms": 2000,
    "log_level": 2,  # lost connections come through error_cb instead of stderr
}


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of one event: stored by Kafka, or (``error`` set) refused for good and kept in ``rejected.jsonl``."""

    account: str
    idempotency_key: str
    sequence: int
    partition: int | None
    offset: int | None
    error: str | None = None


OnDelivery = Callable[[Delivery], None]


class Sender:
    """The background thread and Kafka's client. Counters are written by the thread and read by anyone."""

    def __init__(
        self,
        journal: Journal,
        controls: Controls,
        kafka: dict[str, str | int | bool],
        *,
        topic: str,
        controls_topic: str,
        control_frame: bytes,
        name: str,
        epoch: str,
        folder: Path,
        on_delivery: OnDelivery | None,
    ) -> None:
        self.delivered = 0
        self.rejected = 0
        self.in_flight = 0
        #: Why events are not being delivered; None while nothing is known.
        self.trouble: str | None = None
        #: By sequence number, for events of this run.
        self.callbacks: dict[int, OnDelivery] = {}
        #: Set when the journal has something new.
        self.work = threading.Event()
        #: Notified after every round of reports.
        self.progress = threading.Condition()

        self._journal, self._controls = journal, controls
        self._controls_topic, self._control_frame = controls_topic, control_frame
        self._kafka = {**CLIENT_CONFIG, **kafka, "error_cb": self._on_client_error}
        self._topic, self._name, self._epoch, self._folder = topic, name, epoch, folder
        self._on_delivery = on_delivery
        self._cursor = journal.start()
        #: Read from the journal, not yet taken by the client.
        self._unsent: deque[Entry] = deque()
        #: Members of a batch that was too large. Each is sent again alone, to find the one at fault.
        self._suspects: set[tuple[Segment, int]] = set()
        self._alone = False
        #: Set after a failure that may pass: when to stop waiting for what is in flight.
        self._start_over_by: float | None = None
        self._renew = False
        self._back_off = _BACK_OFF_MIN
        self._sync_at = 0.0
        #: A caller wants totals said; not before ``_ask_after``.
        self._asked = False
        self._ask_after = 0.0
        self._closing = False
        #: Closing, and Kafka has answered every total.
        self._said_all = False
        self._totals_refused = False
        self._stop = threading.Event()
        self._producer = Producer(self._kafka)
        self._thread = threading.Thread(target=self._run, name="tally-producer", daemon=True)
        self._thread.start()

    @property
    def done(self) -> int:
        return self.delivered + self.rejected

    @property
    def is_current_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def expect(self, on_delivery: OnDelivery, sequence: int) -> None:
        """Call ``on_delivery`` for the event of this run with this number."""
        self.callbacks[sequence] = on_delivery

    def ask_for_totals(self) -> None:
        """Say the control totals of what was emitted so far, soon."""
        self._asked = True
        self.work.set()

    def close(self, timeout: float) -> None:
        """Say the last totals, within ``timeout`` seconds and the time there is for it, stop the thread and drop the
        client. What is not marked stays in the journal.
        """
        self._closing = True
        self.work.set()
        with self.progress:
            self.progress.wait_for(
                lambda: self._said_all or self.trouble is not None, max(0.0, min(timeout, _FAREWELL_WAIT))
            )
        self._stop.set()
        self.work.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._round()
            except Exception:
                # A dead thread would stop delivery unseen; the journal still has everything.
                log.exception("the sender of %s failed and starts over", self._name)
                self._renew = True
        self._disconnect()
        self._controls.save()

    def _round(self) -> None:
        if self._renew:
            self._disconnect()
            self._wait_back_off()
            self._producer = Producer(self._kafka)
            self._rewind()
        self.work.clear()
        if self._start_over_by is None:
            self._send()
        elif self.in_flight == 0:
            self._wait_back_off()
            self._rewind()
        elif time.monotonic() > self._start_over_by:
            self._renew = True
        self._say_totals()
        if self._unsent or self.in_flight or (self._closing and self._controls.on_the_way):
            self._producer.poll(_REPORT_WAIT if self.trouble is None else _IDLE_WAIT)
        else:
            self._producer.poll(0)
            self.work.wait(_IDLE_WAIT)
        self._journal.retire(reading=self._cursor.segment)
        if self.trouble is not None and time.monotonic() >= self._sync_at:
            self._journal.sync()
            self._sync_at = time.monotonic() + _SYNC_EVERY
        self._controls.save()
        with self.progress:
            self.progress.notify_all()

    def _send(self) -> None:
        """Hand events to the client until the journal's end, a failure, or until it takes no more."""
        produce, topic, unsent = self._producer.produce, self._topic, self._unsent
        while self._start_over_by is None:
            if not unsent:
                unsent.extend(self._journal.read(self._cursor, _READ_EVENTS))
                if not unsent:
                    return
            while unsent:
                entry = unsent[0]
                suspect = bool(self._suspects) and (entry.segment, entry.at) in self._suspects
                if self.in_flight and (suspect or self._alone):
                    return
                try:
                    produce(topic, entry.value, entry.key, on_delivery=partial(self._report, entry))
                except BufferError:
                    return
                except KafkaException as error:
                    unsent.popleft()
                    self._refused(entry, error.args[0], alone=True)
                    break
                unsent.popleft()
                self.in_flight += 1
                self._alone = suspect
            self._producer.poll(0)

    # -- control totals

    def _say_totals(self) -> None:
        """Send the totals that are due, behind the events they count. They hold nothing up: Kafka's word on them only
        decides when they are said again.
        """
        if self.trouble is not None or self._start_over_by is not None:
            return
        now, closing = time.monotonic(), self._closing
        asked = closing or (self._asked and now >= self._ask_after)
        if asked:
            self._asked, self._ask_after = False, now + _ASKED_EVERY
        totals = self._controls.due(
            self._journal.next_sequence, self._journal.first_waiting, asked=asked, closing=closing
        )
        for total in totals:
            try:
                self._producer.produce(
                    self._controls_topic, self._encoded(total), total.source, on_delivery=partial(self._heard, total)
                )
            except (BufferError, KafkaException):
                self._controls.heard(total, taken=False)
        self._said_all = closing and not totals and not self._controls.on_the_way

    def _encoded(self, total: Total) -> bytes:
        out = io.BytesIO()
        out.write(self._control_frame)
        fastavro.schemaless_writer(out, _control_schema(), total.record, strict=True)
        return out.getvalue()

    def _heard(self, total: Total, error: KafkaError | None, _: Message) -> None:
        self._controls.heard(total, taken=error is None)
        if error is not None and error.code() not in _PURGED and not self._totals_refused:
            log.warning("%s: Kafka does not take control totals (%s); events are not held up", self._name, error.str())
        if error is None or error.code() not in _PURGED:
            self._totals_refused = error is not None

    # -- reports

    def _report(self, entry: Entry, error: KafkaError | None, message: Message) -> None:
        """One delivery report, called from ``poll``."""
        self.in_flight -= 1
        if error is not None:
            self._refused(entry, error, alone=(entry.segment, entry.at) in self._suspects)
            return
        self._journal.mark(entry.segment, entry.at, DELIVERED)
        self._controls.settle(entry.segment.epoch, entry.sequence)
        self.delivered += 1
        self._back_off = _BACK_OFF_MIN
        self._suspects.discard((entry.segment, entry.at))
        if self.trouble is not None:
            log.info("%s: usage is delivered again", self._name)
            self.trouble = None
        if self._on_delivery is not None or self.callbacks:
            self._tell(entry, message.partition(), message.offset(), None)

    def _refused(self, entry: Entry, error: KafkaError, *, alone: bool) -> None:
        code = error.code()
        if code in _MESSAGE_FAULTS and alone:
            self._reject(entry, error)
            return
        if code in _MESSAGE_FAULTS:
            self._suspects.add((entry.segment, entry.at))
        elif code not in _PURGED:
            self._note_trouble(error)
        self._renew = self._renew or error.fatal() or code == KafkaError._FATAL
        if self._start_over_by is None:
            self._start_over_by = time.monotonic() + _IN_FLIGHT_WAIT

    def _reject(self, entry: Entry, error: KafkaError) -> None:
        write_rejected(self._folder, entry.value, error.str())
        self._journal.mark(entry.segment, entry.at, REJECTED)
        self._controls.reject(entry.segment.epoch, entry.sequence, error.str())
        self._controls.settle(entry.segment.epoch, entry.sequence)
        self._suspects.discard((entry.segment, entry.at))
        self.rejected += 1
        log.error(
            "%s: Kafka refuses event %d for good (%s); it is kept in %s",
            self._name,
            entry.sequence,
            error.str(),
            self._folder / "rejected.jsonl",
        )
        self._tell(entry, None, None, error.str())

    def _tell(self, entry: Entry, partition: int | None, offset: int | None, error: str | None) -> None:
        own = self.callbacks.pop(entry.sequence, None) if entry.segment.epoch == self._epoch else None
        delivery = Delivery(entry.key.decode(), idempotency_key(entry.value), entry.sequence, partition, offset, error)
        for callback in (own, self._on_delivery):
            if callback is not None:
                try:
                    callback(delivery)
                except Exception:  # the service's mistake must not stop delivery
                    log.exception("on_delivery failed for event %d of %s", entry.sequence, self._name)

    def _on_client_error(self, error: KafkaError) -> None:
        log.debug("%s: %s", self._name, error)
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._renew = True
            self._note_trouble(error)
        elif error.code() in _AWAY and (self.in_flight or self._unsent):  # losing an idle connection is no trouble
            self._note_trouble(error)

    def _note_trouble(self, error: KafkaError) -> None:
        if self.trouble is None:
            self.trouble = error.str()
            log.warning("%s: usage is not being delivered (%s); it waits in %s", self._name, self.trouble, self._folder)

    def _wait_back_off(self) -> None:
        self._stop.wait(self._back_off)
        self._back_off = min(_BACK_OFF_MAX, self._back_off * 2)

    def _rewind(self) -> None:
        self._unsent.clear()
        self._cursor = self._journal.start()
        self._start_over_by = None

    def _disconnect(self) -> None:
        """Give the client up without waiting for Kafka; what it had in flight counts as not delivered."""
        self._producer.purge()
        deadline = time.monotonic() + _PURGE_WAIT
        while self.in_flight and time.monotonic() < deadline:
            self._producer.poll(0.05)
        self.in_flight = 0
        self._alone = False
        self._renew = False


@cache
def _control_schema() -> Schema:
    return load_schemas().newest(CONTROLS).parsed()
