"""The topics of a deployment: their names, how long they keep, and creating and checking them.

The partition count of the usage topics is fixed when they are created: seen keys and running quantities live with the
partition, so growing it is a migration, not a setting.
"""

import time
from dataclasses import dataclass
from functools import lru_cache

from aiokafka.partitioner import murmur2
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from pipeline.infra.settings import Settings

_DAY_MS = 24 * 60 * 60 * 1000
#: Largest usage event; the rater dead-letters a larger one with its bytes.
EVENT_BYTES_MAX = 256 * 1024
#: What the broker takes on the events topic at once. Its limit counts a producer's whole batch (librdkafka's: 1 MB), so
#: the limit of one event would make it refuse batches of good ones; and a larger event has to arrive to be reported.
EVENT_BATCH_BYTES_MAX = 1024 * 1024
#: Largest record of every other topic.
RECORD_BYTES_MAX = 2 * 1024 * 1024
#: How long a created topic may take to show, seconds; usually milliseconds.
_VISIBLE_WITHIN = 15.0


class TopicMismatch(Exception):
    """A topic exists with other settings than Tally needs. The message names both and what to do."""


@dataclass(frozen=True, slots=True)
class Topics:
    """Names of all topics under one prefix."""

    prefix: str = ""

    @property
    def events(self) -> str:
        return self.prefix + "usage.events"

    @property
    def rated(self) -> str:
        return self.prefix + "usage.rated"

    @property
    def receipts(self) -> str:
        return self.prefix + "usage.receipts"

    @property
    def retry(self) -> str:
        return self.prefix + "usage.retry"

    @property
    def dead_letter(self) -> str:
        return self.prefix + "usage.dead-letter"

    @property
    def catalog(self) -> str:
        return self.prefix + "billing.catalog"

    @property
    def seen(self) -> str:
        return self.prefix + "rater.seen"

    @property
    def totals(self) -> str:
        return self.prefix + "rater.totals"

    @property
    def partitioned(self) -> tuple[str, ...]:
        """Topics that share the usage topics' partitions."""
        return (self.events, self.rated, self.receipts, self.retry, self.dead_letter, self.seen, self.totals)

    def config(self, topic: str) -> dict[str, str]:
        """Settings the topic is created with."""
        keep = {
            self.events: 37,
            self.rated: 37,
            self.receipts: 37,
            self.seen: 37,
            self.retry: 60,
            self.dead_letter: 90,
        }.get(topic)
        config = {"max.message.bytes": str(EVENT_BATCH_BYTES_MAX if topic == self.events else RECORD_BYTES_MAX)}
        if keep is None:
            config["cleanup.policy"] = "compact"
        else:
            config["retention.ms"] = str(keep * _DAY_MS)
        if topic == self.events:
            # Age is judged at the broker's clock, never a producer's or a worker's.
            config["message.timestamp.type"] = "LogAppendTime"
        return config


def ensure_topics(settings: Settings) -> list[str]:
    """Create the topics that are missing, check those that exist; return the names created.

    Raises TopicMismatch when an existing topic has another partition count or timestamp type, KafkaException when the
    broker refuses.
    """
    topics = Topics(settings.topic_prefix)
    wanted = dict.fromkeys(topics.partitioned, settings.partitions) | {topics.catalog: 1}
    admin = AdminClient(settings.kafka)
    created = []
    futures = admin.create_topics(
        [
            NewTopic(name, count, settings.replication_factor, config=topics.config(name))
            for name, count in wanted.items()
        ]
    )
    for name, future in futures.items():
        try:
            future.result()
            created.append(name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    _await_visible(admin, set(wanted))
    check_topics(settings, ignore=set(created))
    return created


def _await_visible(admin: AdminClient, names: set[str]) -> None:
    """A topic exists for the controller first; a broker's answer shows it moments later."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while missing := names - admin.list_topics(timeout=15).topics.keys():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{', '.join(sorted(missing))} created, but not visible after {_VISIBLE_WITHIN:g} s")
        time.sleep(0.02)


def check_topics(settings: Settings, ignore: set[str] | None = None) -> None:
    """Raise TopicMismatch unless every topic exists as Tally needs it."""
    topics = Topics(settings.topic_prefix)
    admin = AdminClient(settings.kafka)
    known = admin.list_topics(timeout=15).topics
    for name in (*topics.partitioned, topics.catalog):
        if ignore and name in ignore:
            continue
        if name not in known:
            raise TopicMismatch(f"topic {name} does not exist: run `tally up`, or `tally topics` on your own Kafka")
        expected = 1 if name == topics.catalog else settings.partitions
        found = len(known[name].partitions)
        if found != expected:
            raise TopicMismatch(
                f"topic {name} has {found} partitions, expected {expected}: set TALLY_PARTITIONS={found}, "
                "or migrate (drain, rebuild state by account, switch)"
            )
    resource = ConfigResource(ResourceType.TOPIC, topics.events)
    config = admin.describe_configs([resource])[resource].result(15)
    if (kind := config["message.timestamp.type"].value) != "LogAppendTime":
        raise TopicMismatch(
            f"topic {topics.events} stamps {kind}, expected LogAppendTime: alter its message.timestamp.type"
        )


@lru_cache(maxsize=1 << 20)
def partition_of(account: bytes, partitions: int) -> int:
    """Partition of an account: murmur2 as Java's default partitioner and librdkafka's ``murmur2_random`` have it."""
    return int(murmur2(account) & 0x7FFFFFFF) % partitions
