"""Writes to the real topics as a rater does: in Kafka transactions, keyed by account."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from secrets import token_hex

from confluent_kafka import Producer

from pipeline.infra.avro import DEAD_LETTER, RATED, RECEIPTS, Record, load_schemas
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

SCHEMAS = load_schemas()


class Rater:
    """A transactional producer of rated rows, receipts and letters."""

    def __init__(self, settings: Settings) -> None:
        self.topics = Topics(settings.topic_prefix)
        self._producer = Producer(
            settings.kafka
            | {
                "transactional.id": f"{settings.topic_prefix}test-{token_hex(4)}",
                "linger.ms": 5,
                "queue.buffering.max.messages": 2_000_000,
            }
        )
        self._producer.init_transactions(30)

    @contextmanager
    def transaction(self, *, abort: bool = False) -> Iterator[None]:
        self._producer.begin_transaction()
        yield
        if abort:
            self._producer.flush(30)
            self._producer.abort_transaction(30)
        else:
            self._producer.commit_transaction(30)

    def begin(self) -> None:
        """Open a transaction and leave it open."""
        self._producer.begin_transaction()

    def flush(self) -> None:
        """Make what was sent stand in the log, committed or not."""
        assert self._producer.flush(30) == 0

    def raw(self, topic: str, value: bytes, *, partition: int = 0, key: bytes = b"") -> None:
        self._producer.produce(topic, value, key, partition)
        self._producer.poll(0)

    def rated(self, records: Iterable[Record], *, partition: int = 0) -> None:
        for record in records:
            key = record["event"]["account"].encode()
            self.raw(self.topics.rated, SCHEMAS.encode(RATED, record), partition=partition, key=key)

    def receipt(self, record: Record) -> None:
        self.raw(self.topics.receipts, SCHEMAS.encode(RECEIPTS, record), partition=record["partition"])

    def letter(self, record: Record, *, dead: bool, partition: int = 0) -> None:
        topic = self.topics.dead_letter if dead else self.topics.retry
        self.raw(topic, SCHEMAS.encode(DEAD_LETTER, record), partition=partition)
