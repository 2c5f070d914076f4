"""A worker that does nothing while there is work must not stay: its supervisor starts another in its place.

In a thread and with clients of its own, so that it sees what the worker's may have ceased to see: a fetcher that died
when the broker restarted, a member that never joined its group again, an event loop that hangs.
"""

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Set
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing
from typing import Any, Generic, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from faust.types import TP

from pipeline.core.periods import to_micros
from pipeline.infra.avro import DEAD_LETTER, Schemas, WireError
from pipeline.infra.logs import get_logger

log = get_logger(__name__)

#: Looks in the time that a worker is given.
_LOOKS = 6
_ANSWER_S = 10.0
#: Parked records looked at for one that is due, and how long one may be due: they are written back at a pace, in
#: batches of up to 5,000 at 5 ms each, and events go first.
_PARKED_LOOKED_AT, _OVERDUE_MS = 500, 60_000

K = TypeVar("K", bound=Hashable)


class Stalled(Exception):
    """Work waits and nothing moves."""


class Stopwatch(Generic[K]):
    """For how long things have stayed as they are. Pure: times are arguments, seconds."""

    def __init__(self, step_max_s: float) -> None:
        """Of the time between two looks at most ``step_max_s`` counts: in the rest this process was not running."""
        self._step_max_s = step_max_s
        self._looked_s: float | None = None
        self._stood: dict[K, float] = {}

    def look(self, same: Set[K], now_s: float) -> Mapping[K, float]:
        """How long each of these has been seen at every look; what is not among them begins anew."""
        step = 0.0 if self._looked_s is None else min(now_s - self._looked_s, self._step_max_s)
        self._looked_s = now_s
        self._stood = {one: self._stood[one] + step if one in self._stood else 0.0 for one in same}
        return self._stood


class Watchdog(threading.Thread):
    """Looks until it is stopped, or has told once."""

    def __init__(
        self,
        kafka: Mapping[str, Any],
        schemas: Schemas,
        *,
        group: str,
        retry_topic: str,
        patience_s: float,
        places: Callable[[], Mapping[TP, int]],
        in_group: Callable[[], bool],
        on_stall: Callable[[BaseException], None],
    ) -> None:
        """Does nothing before ``start``.

        ``places``: the next offset of each partition that has no reason to stand still if records follow there.
        ``in_group``: is the worker a member of its group, and telling it so? ``on_stall`` has to end the worker.
        """
        super().__init__(name="watchdog", daemon=True)
        self._kafka = dict(kafka)
        self._schemas = schemas
        self._group = group
        self._retry_topic = retry_topic
        self._patience_s = patience_s
        self._places = places
        self._in_group = in_group
        self._on_stall = on_stall
        self._stopping = threading.Event()

    def stop(self) -> None:
        """The worker is ending: nothing it does now is a stall."""
        self._stopping.set()

    def run(self) -> None:
        try:
            consumer = Consumer(
                {
                    **self._kafka,
                    "group.id": f"{self._group}.watchdog",  # the client wants one; never joined
                    "enable.auto.commit": False,
                    "isolation.level": "read_committed",
                    "enable.partition.eof": True,
                    "auto.offset.reset": "error",
                    "fetch.wait.max.ms": 50,
                }
            )
            with closing(consumer):
                self._watch(consumer)
        except BaseException as error:  # noqa: BLE001  handed on: the worker must exit
            if not self._stopping.is_set():
                self._on_stall(error)

    def _watch(self, consumer: Consumer) -> None:
        every_s = self._patience_s / _LOOKS
        standing, absent = Stopwatch[tuple[TP, int]](2 * every_s), Stopwatch[str](2 * every_s)
        before: Set[tuple[TP, int]] = set()
        blind = False
        while not self._stopping.wait(every_s):
            places = self._places().items()
            gone = set() if self._in_group() else {"this worker"}
            try:
                # Whether records follow is asked only where it stood at the last look already.
                idle = {place for place in places & before if self._has_work(consumer, *place)}
                if gone:
                    consumer.list_topics(self._retry_topic, timeout=_ANSWER_S)  # raises: then it is the broker's fault
            except (KafkaException, FutureTimeout) as error:
                # The broker is away: nothing can move, so what stood until now begins anew.
                if not blind:
                    log.warning("watchdog_blind", error=str(error))
                blind, before, idle, gone = True, set(), set(), set()
            else:
                blind, before = False, set(places)
            now_s = time.monotonic()
            for (tp, offset), seconds in standing.look(idle, now_s).items():
                if seconds >= self._patience_s:
                    raise Stalled(
                        f"{tp.topic}/{tp.partition} has stood at offset {offset} for {seconds:.0f} s, with records to "
                        "work on and no reason to wait"
                    )
            for seconds in absent.look(gone, now_s).values():
                if seconds >= self._patience_s:
                    raise Stalled(f"group {self._group} has not known this worker for {seconds:.0f} s")

    def _has_work(self, consumer: Consumer, tp: TP, offset: int) -> bool:
        """Does a committed record follow that should be worked on by now? Markers are none, nor what is not due."""
        parked = tp.topic == self._retry_topic
        due_before_ms = time.time_ns() // 1_000_000 - _OVERDUE_MS
        deadline = time.monotonic() + _ANSWER_S
        wanted = _PARKED_LOOKED_AT if parked else 1
        consumer.assign([TopicPartition(tp.topic, tp.partition, offset)])
        try:
            while wanted > 0:
                for message in consumer.consume(wanted, 0.2):
                    error = message.error()
                    if error is not None:
                        if error.code() == KafkaError._PARTITION_EOF:
                            return False
                        raise KafkaException(error)
                    if not parked or self._due_ms(message.value()) <= due_before_ms:
                        return True
                    wanted -= 1
                if time.monotonic() > deadline:
                    raise FutureTimeout(f"{tp.topic}/{tp.partition} could not be read in {_ANSWER_S:.0f} s")
        finally:
            consumer.unassign()
        return False

    def _due_ms(self, letter: bytes | None) -> int:
        try:
            return to_micros(self._schemas.decode(letter, DEAD_LETTER)["not_before"]) // 1000
        except WireError:
            return 0
