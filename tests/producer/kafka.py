"""What the producer's tests need of a real broker: reading a topic back, and a line to it that can be cut."""

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics


@dataclass(frozen=True)
class Stored:
    """One record as Kafka holds it."""

    partition: int
    offset: int
    key: bytes
    value: bytes
    event: dict[str, Any]


def read_events(settings: Settings) -> list[Stored]:
    """Everything on the events topic now, by partition and offset."""
    topic = Topics(settings.topic_prefix).events
    schemas = load_schemas()
    stored = []
    consumer = Consumer({**settings.kafka, "group.id": "reads-back", "enable.auto.commit": False})
    with contextlib.closing(consumer):
        partitions = [TopicPartition(topic, partition, 0) for partition in range(settings.partitions)]
        left = sum(consumer.get_watermark_offsets(partition, timeout=10)[1] for partition in partitions)
        consumer.assign(partitions)
        while left:  # no transactions on this topic: offsets have no gaps
            for message in consumer.consume(min(left, 5000), timeout=10):
                assert message.error() is None, message.error()
                value = message.value()
                event = schemas.decode(value, EVENTS)
                stored.append(Stored(message.partition(), message.offset(), message.key(), value, event))
                left -= 1
    return sorted(stored, key=lambda record: (record.partition, record.offset))


def check_nothing_lost(stored: list[Stored], emitted: dict[str, int], source: str) -> None:
    """Every event is there under its number, numbers have no hole, and what was sent twice is the same to the byte."""
    by_number: dict[int, set[bytes]] = {}
    for record in stored:
        assert record.event["source"] == source
        by_number.setdefault(record.event["sequence"], set()).add(record.value)
    assert sorted(by_number) == list(range(1, len(by_number) + 1))
    assert all(len(values) == 1 for values in by_number.values())
    numbers = {record.event["idempotency_key"]: record.event["sequence"] for record in stored}
    assert {key: numbers.get(key) for key in emitted} == emitted
    # In order per account: first arrivals of each account count up.
    newest: dict[str, int] = {}
    seen: set[int] = set()
    for record in stored:
        sequence, account = record.event["sequence"], record.event["account"]
        if sequence not in seen:
            seen.add(sequence)
            assert newest.get(account, 0) < sequence
            newest[account] = sequence


class Line:
    """A TCP line to the broker that can be cut and restored.

    Kafka tells its clients the address to use, so the line puts its own port into the answers that name the broker's.
    """

    def __init__(self, settings: Settings) -> None:
        (broker,) = AdminClient(settings.kafka).list_topics(timeout=10).brokers.values()
        self._target = (broker.host, broker.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        host = broker.host.encode()
        self._theirs, self._ours = host + broker.port.to_bytes(4, "big"), host + self.port.to_bytes(4, "big")
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._changing = threading.Lock()
        self._is_cut = False
        self._closed = False
        self._start(self._accept)

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut(self) -> None:
        """Drop every connection, and every new one at once."""
        with self._changing:
            self._is_cut = True
            for end in self._sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        self._is_cut = False

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            if not select.select([self._listener], [], [], 0.1)[0]:
                continue
            client, _ = self._listener.accept()
            with self._changing:
                if self._is_cut:
                    client.close()
                    continue
                broker = socket.create_connection(self._target)
                self._sockets |= {client, broker}
            self._start(self._carry, client, broker, False)
            self._start(self._carry, broker, client, True)

    def _carry(self, start: socket.socket, end: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            for data in _frames(start) if answers else iter(lambda: start.recv(65536), b""):
                end.sendall(data.replace(self._theirs, self._ours) if answers else data)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        with self._changing:
            self._sockets.discard(start)
            start.close()


def _frames(start: socket.socket) -> Iterator[bytes]:
    """Kafka's answers, whole: four bytes of length, then as many."""
    with start.makefile("rb") as stream:
        while len(size := stream.read(4)) == 4:
            yield size + stream.read(int.from_bytes(size, "big"))
