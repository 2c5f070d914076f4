"""Carrying an outbox from PostgreSQL to a topic of one partition: what all workers of that kind have in common.

Of several workers of a name one is active, holding a lock in PostgreSQL; the others stand by. What it sends at a time
is one Kafka transaction, so readers see all of it or none. What each does on taking over, to know what was sent but
not marked, is its own.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from psycopg import Connection, OperationalError

from pipeline.infra.logs import get_logger
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import RECORD_BYTES_MAX

log = get_logger(__name__)

#: Told of each step of carrying: ``produced``, ``committed``, ``marked``. For tests that stop there.
Reached: TypeAlias = Callable[[str], None]

#: How often a standby looks whether the active one is gone; seconds.
_STANDBY_S = 0.5
#: Waits between attempts while Kafka or PostgreSQL is away, doubling; seconds.
_BACKOFF_FIRST_S, _BACKOFF_LONGEST_S = 0.25, 10.0
#: Longest wait for Kafka to answer; seconds. Told to stop, a worker ends within it.
_ANSWER_S = 5.0
#: Longest a transaction may take; seconds. An abandoned one holds up every reader of the topic until then.
_TRANSACTION_S = 15
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


def lock_of(name: str) -> str:
    """The advisory lock that the active worker of a name holds, as an SQL expression."""
    return f"hashtextextended('tally.{name}', 0)"


def run_active(
    settings: Settings,
    stop: threading.Event,
    *,
    name: str,
    topic: str,
    begin: Callable[["Connection[Any]"], Callable[[], None]],
) -> None:
    """Work until ``stop`` is set, whenever this is the active worker of its name.

    ``begin`` makes ready on a new connection, whose lock is held, and returns the work, which ends when ``stop`` is
    set. While Kafka or PostgreSQL does not answer, wait with back-off, say so once, and begin anew.

    Raises psycopg.Error for anything but an absent server (a table missing), KafkaException for a fatal refusal
    (credentials), and what ``begin`` and the work raise besides. These need a person.
    """
    backoff, away = _BACKOFF_FIRST_S, False
    while not stop.is_set():
        try:
            with connect(settings.dsn, application=name, autocommit=True) as connection:
                if _take_over(connection, name, stop):
                    work = begin(connection)
                    log.info("back" if away else "active", topic=topic)
                    backoff, away = _BACKOFF_FIRST_S, False
                    work()
        except (OperationalError, KafkaException) as error:
            if isinstance(error, KafkaException) and error.args[0].code() in _REFUSED:
                raise
            if not away:
                log.warning("away", problem=str(error).strip(), then="waits and comes back")
            away = True
            stop.wait(backoff)
            backoff = min(backoff * 2, _BACKOFF_LONGEST_S)


def _take_over(connection: "Connection[Any]", name: str, stop: threading.Event) -> bool:
    """Wait until this worker is the active one; False when told to stop before. The lock ends with the connection."""
    standing_by = False
    while not stop.is_set():
        if connection.execute(f"SELECT pg_try_advisory_lock({lock_of(name)})").fetchone() == (True,):
            return True
        if not standing_by:
            log.info("standing by", until=f"the active {name} is gone")
            standing_by = True
        stop.wait(_STANDBY_S)
    return False


class TopicWriter:
    """Writes to a topic of one partition, a transaction at a time, in the name of the active worker."""

    def __init__(self, settings: Settings, topic: str, *, name: str, messages_max: int) -> None:
        """``messages_max``: most messages of one transaction. Raises KafkaException."""
        self.topic = topic
        self._name = name
        self._kafka = {**settings.kafka, "log_level": 2}  # what is wrong comes as an exception, not on stderr
        self._producer = Producer(
            {
                **self._kafka,
                "transactional.id": f"{settings.topic_prefix}{name}",
                "transaction.timeout.ms": _TRANSACTION_S * 1000,
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "message.max.bytes": RECORD_BYTES_MAX,
                "queue.buffering.max.messages": 2 * messages_max,
            }
        )
        # Fences a worker that lost its lock without noticing, and ends a transaction it left open.
        self._producer.init_transactions(_ANSWER_S)

    def write(self, messages: Iterable[tuple[bytes, bytes]], reached: Reached) -> None:
        """Put messages (key, value) on the topic, all or none. Raises KafkaException."""
        self._producer.begin_transaction()
        for key, value in messages:
            self._producer.produce(self.topic, value, key)
        reached("produced")
        # A record the broker refuses fails the commit.
        self._producer.commit_transaction(_TRANSACTION_S)
        reached("committed")

    def read(self) -> Iterator[Message]:
        """Every committed message of the topic, read once to its end. Raises KafkaException."""
        consumer = Consumer(
            {
                **self._kafka,
                "group.id": f"{self.topic}-{self._name}",  # the client wants one; never joined
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 50,
            }
        )
        try:
            consumer.assign([TopicPartition(self.topic, 0, OFFSET_BEGINNING)])
            while True:
                message = consumer.poll(_ANSWER_S)
                if message is None:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{self.topic} does not answer"))
                if error := message.error():
                    if error.code() == KafkaError._PARTITION_EOF:
                        return
                    raise KafkaException(error)
                yield message
        finally:
            consumer.close()
