"""Kafka in memory: logs with transactions, transactional ids with epochs, consumer groups with generations.

Only what the rater and the sink use of it, with the same errors; every call is a place to stop before and after. The
rules that matter here were read off a real broker: ``tests/integration`` holds the same ones there.
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, TopicPartition

from pipeline.rating.commit import TRANSACTION_TIMEOUT_MS
from tests.simulation.tasks import pause

Place = tuple[str, int]


class Entry(NamedTuple):
    """A record in a log, or the marker that ends a transaction there."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    transaction: "Transaction | None"
    marker: bool = False


@dataclass(eq=False)
class Transaction:
    """What one producer writes between begin and commit."""

    transactional_id: str
    began_ms: int
    state: str = "open"
    places: set[Place] = field(default_factory=set)
    group: "Group | None" = None
    offsets: dict[Place, tuple[int, str]] = field(default_factory=dict)


@dataclass(eq=False)
class Log:
    """One partition. An offset is an index."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def end(self) -> int:
        return len(self.entries)

    @property
    def stable_end(self) -> int:
        """Where the first open transaction begins: a reader of committed records sees nothing behind it."""
        for entry in self.entries:
            if entry.transaction is not None and entry.transaction.state == "open":
                return entry.offset
        return self.end

    def committed(self, start: int = 0, end: int | None = None) -> Iterator[Entry]:
        """Committed records from an offset up to another."""
        for entry in self.entries[start:end]:
            if not entry.marker and (entry.transaction is None or entry.transaction.state == "committed"):
                yield entry


@dataclass(eq=False)
class Group:
    """A consumer group: its generation, its members, and what was committed in its name."""

    generation: int = 0
    members: set[str] = field(default_factory=set)
    #: Offset and metadata.
    offsets: dict[Place, tuple[int, str]] = field(default_factory=dict)
    #: What was committed first: a broker that was killed may answer with an offset long past, once.
    first: dict[Place, tuple[int, str]] = field(default_factory=dict)
    goes_back: set[Place] = field(default_factory=set)

    def offset(self, place: Place) -> int:
        return self.offsets.get(place, (0, ""))[0]


class Broker:
    """The cluster, and the clock all of it goes by."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.logs: defaultdict[Place, Log] = defaultdict(Log)
        self.epochs: dict[str, int] = {}
        self.open: dict[str, Transaction] = {}
        self.groups: defaultdict[str, Group] = defaultdict(Group)
        #: Transactions committed so far: whoever watches what is true looks again when it moves.
        self.commits = 0
        #: What the next call of a producer meets, see ``Producer``.
        self.fault: str | None = None

    def append(
        self, place: Place, key: bytes | None, value: bytes | None, transaction: Transaction | None = None
    ) -> int:
        log = self.logs[place]
        log.entries.append(Entry(log.end, self.now_ms, key, value, transaction))
        if transaction is not None:
            transaction.places.add(place)
        return log.end - 1

    def end_transaction(self, transactional_id: str, *, commit: bool) -> None:
        transaction = self.open.pop(transactional_id)
        transaction.state = "committed" if commit else "aborted"
        for place in sorted(transaction.places):
            log = self.logs[place]
            log.entries.append(Entry(log.end, self.now_ms, None, None, transaction, marker=True))
        if commit:
            self.commits += 1
            if transaction.group is not None:
                transaction.group.offsets |= transaction.offsets
                transaction.group.first = transaction.offsets | transaction.group.first

    def pass_time(self, milliseconds: int) -> None:
        """Move the clock. A transaction that stays open for too long is aborted, and its producer fenced."""
        self.now_ms += milliseconds
        for transactional_id, transaction in list(self.open.items()):
            if self.now_ms - transaction.began_ms > TRANSACTION_TIMEOUT_MS:
                self.end_transaction(transactional_id, commit=False)
                self.epochs[transactional_id] += 1


def failure(code: int, text: str, **options: bool) -> KafkaException:
    return KafkaException(KafkaError(code, text, **options))


_TIMEOUT = KafkaError._TIMED_OUT


class Producer:
    """A transactional producer. Faults: ``lost`` (no answer, nothing done), ``late`` (done, no answer), ``abort``."""

    def __init__(self, broker: Broker, transactional_id: str) -> None:
        self._broker = broker
        self._id = transactional_id
        self._epoch = -1
        self._begun = False
        self._refused: KafkaException | None = None
        self._delivered: list[tuple[Callable[[Any, Any], None], Message]] = []
        #: A commit or abort that was done, but not answered yet: asked again, it answers.
        self._ended: str | None = None

    def init_transactions(self, timeout: float = -1) -> None:
        pause("init_transactions")
        assert self._epoch < 0, "a producer is initialised once"
        if self._fault() == "lost":
            raise failure(_TIMEOUT, "init_transactions: no answer", retriable=True)
        broker = self._broker
        if self._id in broker.open:
            broker.end_transaction(self._id, commit=False)
        self._epoch = broker.epochs[self._id] = broker.epochs.get(self._id, -1) + 1
        pause("initialised")

    def begin_transaction(self) -> None:
        pause("begin_transaction")
        assert not self._begun, "a transaction is open already"
        self._begun, self._refused, self._ended = True, None, None
        self._delivered.clear()

    def produce(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        partition: int = -1,
        on_delivery: Callable[[Any, Any], None] | None = None,
    ) -> None:
        pause("produce")
        assert self._begun and partition >= 0
        if self._stale:
            return  # an answer of the broker that comes later, see _check
        offset = self._broker.append((topic, partition), key, value, self._transaction())
        if on_delivery is not None:
            self._delivered.append((on_delivery, Message(topic, partition, offset)))

    def poll(self, timeout: float = 0) -> int:
        raise AssertionError("a full queue is not simulated")

    def send_offsets_to_transaction(self, offsets: list[TopicPartition], metadata: bytes, timeout: float = -1) -> None:
        pause("send_offsets")
        fault = self._check("send_offsets")
        name, generation, member = _membership(metadata)
        group = self._broker.groups[name]
        if generation != group.generation:
            self._refuse(KafkaError.ILLEGAL_GENERATION, f"generation {generation}, not {group.generation}")
        if member not in group.members:
            self._refuse(KafkaError.UNKNOWN_MEMBER_ID, f"{member} is no member")
        transaction = self._transaction()
        transaction.group = group
        transaction.offsets |= {(one.topic, one.partition): (one.offset, one.metadata or "") for one in offsets}
        if fault == "late":
            raise failure(_TIMEOUT, "send_offsets: no answer", retriable=True)
        pause("offsets_sent")

    def commit_transaction(self, timeout: float = -1) -> None:
        self._end("commit", commit=True)

    def abort_transaction(self, timeout: float = -1) -> None:
        self._end("abort", commit=False)

    def _end(self, name: str, *, commit: bool) -> None:
        pause(name)
        if self._ended != name:
            if not commit:
                self._refused = None
            fault = self._check(name)
            if commit:
                for delivered, message in self._delivered:
                    delivered(None, message)
            self._delivered.clear()
            if self._id in self._broker.open:
                self._broker.end_transaction(self._id, commit=commit)
            self._ended = name
            if fault == "late":
                raise failure(_TIMEOUT, f"{name}: no answer", retriable=True)
        self._begun = False
        pause(f"{name}_answered")

    @property
    def _stale(self) -> bool:
        return self._broker.epochs[self._id] != self._epoch

    def _transaction(self) -> Transaction:
        opened = self._broker.open.get(self._id)
        if opened is None:
            opened = self._broker.open[self._id] = Transaction(self._id, self._broker.now_ms)
        return opened

    def _fault(self) -> str | None:
        fault, self._broker.fault = self._broker.fault, None
        return fault

    def _check(self, name: str) -> str | None:
        """Raise what the broker answers to a call; return the fault that is to come after it was done."""
        if self._stale:
            raise failure(KafkaError._FENCED, f"{name}: a newer producer of {self._id} is at work", fatal=True)
        if self._refused is not None:
            raise self._refused
        fault = self._fault()
        if fault == "lost":
            raise failure(_TIMEOUT, f"{name}: no answer", retriable=True)
        if fault == "abort" and name != "abort":
            self._refuse(KafkaError._MSG_TIMED_OUT, f"{name}: a record was not taken")
        return fault

    def _refuse(self, code: int, text: str) -> None:
        self._refused = failure(code, text, txn_requires_abort=True)
        raise self._refused


def _membership(metadata: bytes) -> tuple[str, int, str]:
    """Group, generation and member id, as librdkafka reads them from the bytes."""
    assert metadata.startswith(b"CGMDv2:")
    (generation,) = struct.unpack_from("<i", metadata, 7)
    group, member, rest = metadata[11:].split(b"\0", 2)
    assert rest == b"\x01"
    return group.decode(), generation, member.decode()


class Message:
    """What a consumer hands out, and what a delivery reports."""

    __slots__ = ("_entry", "_error", "_offset", "_partition", "_topic")

    def __init__(
        self, topic: str, partition: int, offset: int, entry: Entry | None = None, error: KafkaError | None = None
    ) -> None:
        self._topic, self._partition, self._offset, self._entry, self._error = topic, partition, offset, entry, error

    def topic(self) -> str:
        return self._topic

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def error(self) -> KafkaError | None:
        return self._error

    def key(self) -> bytes | None:
        return self._entry.key if self._entry else None

    def value(self) -> bytes | None:
        return self._entry.value if self._entry else None

    def timestamp(self) -> tuple[int, int]:
        assert self._entry is not None
        return 1, self._entry.timestamp_ms

    def __len__(self) -> int:
        return len(self.value() or b"")


class Consumer:
    """A consumer with assigned partitions that reads committed records."""

    def __init__(self, broker: Broker, group: str) -> None:
        self._broker = broker
        self._group = broker.groups[group]
        self.positions: dict[Place, int] = {}
        self._told: dict[Place, int] = {}

    def committed(self, partitions: list[TopicPartition], timeout: float = -1) -> list[TopicPartition]:
        pause("committed")
        found = []
        for one in partitions:
            place = (one.topic, one.partition)
            if any(t.group is self._group and place in t.offsets for t in self._broker.open.values()):
                raise failure(_TIMEOUT, "committed: a transaction is pending", retriable=True)
            offsets = self._group.first if place in self._group.goes_back else self._group.offsets
            self._group.goes_back.discard(place)
            found.append(TopicPartition(*place, *offsets.get(place, (OFFSET_INVALID, ""))))
        return found

    def get_watermark_offsets(
        self, partition: TopicPartition, timeout: float = -1, cached: bool = False
    ) -> tuple[int, int]:
        if not cached:
            pause("get_watermark_offsets")
        return 0, self._broker.logs[partition.topic, partition.partition].end

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        self.positions = {(one.topic, one.partition): one.offset for one in partitions}
        self._told.clear()

    def consume(self, most: int, timeout: float = -1) -> list[Message]:
        pause("consume")
        messages = self._consume(most)
        if not messages:
            pause("nothing to consume", waits=True)
        return messages

    def _consume(self, most: int) -> list[Message]:
        """Records, and once an end is reached an event that says where it is."""
        found: list[Message] = []
        for place, position in self.positions.items():
            log = self._broker.logs[place]
            end = log.stable_end
            for entry in log.committed(position, end):
                if len(found) == most:
                    return found
                found.append(Message(*place, entry.offset, entry))
                self.positions[place] = entry.offset + 1
            self.positions[place] = max(self.positions[place], end)
            if self._told.get(place) != end:
                self._told[place] = end
                found.append(Message(*place, end, error=KafkaError(KafkaError._PARTITION_EOF)))
        return found

    def close(self) -> None:
        self.positions.clear()
