"""The topics of a deployment: their names, how long they keep, and creating and checking them.

The partition count of the usage topics is fixed when they are created: seen keys and running quantities live with the
partition, so growing it is a migration, not a setting.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


#: Replicas from which an acknowledged record must stand on two: losing one broker then loses nothing.
_REPLICAS_FOR_TWO_IN_SYNC = 3


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How some topics differ from what Tally needs, in words; ``fix`` is the command, or what to do."""

    topics: tuple[str, ...]
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{', '.join(self.topics)}: found {self.found}, expected {self.expected}: {self.fix}"


class TopicMismatch(Exception):
    """Topics are missing, or have other settings than Tally needs. The message names all, and what to do."""

    def __init__(self, message: str, mismatches: Sequence[Mismatch] = ()) -> None:
        super().__init__(message)
        self.mismatches = tuple(mismatches)


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
    def controls(self) -> str:
        """What producers say they emitted: one partition, since it is a few records an hour and source."""
        return self.prefix + "usage.controls"

    @property
    def catalog(self) -> str:
        return self.prefix + "billing.catalog"

    @property
    def alerts(self) -> str:
        """Thresholds of usage that accounts reached: one partition, since each comes once per period."""
        return self.prefix + "billing.alerts"

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

    @property
    def single(self) -> tuple[str, ...]:
        """Topics of one partition."""
        return (self.controls, self.alerts, self.catalog)

    def config(self, topic: str, replicas: int = 1) -> dict[str, str]:
        """Settings the topic is created with, all of them named: a broker's own defaults may be anything."""
        keep = {
            self.events: 37,
            self.rated: 37,
            self.receipts: 37,
            self.controls: 37,
            self.alerts: 37,
            self.seen: 37,
            self.retry: 60,
            self.dead_letter: 90,
        }.get(topic)
        config = {"max.message.bytes": str(EVENT_BATCH_BYTES_MAX if topic == self.events else RECORD_BYTES_MAX)}
        if keep is None:
            config["cleanup.policy"] = "compact"
        else:
            # A limit by size would delete before its time.
            config |= {"cleanup.policy": "delete", "retention.ms": str(keep * _DAY_MS), "retention.bytes": "-1"}
        if topic == self.events:
            # Age is judged at the broker's clock, never a producer's or a worker's.
            config["message.timestamp.type"] = "LogAppendTime"
        if replicas >= _REPLICAS_FOR_TWO_IN_SYNC:
            config["min.insync.replicas"] = "2"
        return config


def ensure_topics(settings: Settings) -> list[str]:
    """Create the topics that are missing, check those that exist; return the names created.

    Raises TopicMismatch when existing topics are not as Tally needs them, KafkaException when the broker refuses.
    """
    topics = Topics(settings.topic_prefix)
    wanted = dict.fromkeys(topics.partitioned, settings.partitions) | dict.fromkeys(topics.single, 1)
    admin = AdminClient(settings.kafka)
    created = []
    futures = admin.create_topics(
        [
            NewTopic(name, count, settings.replication_factor, config=topics.config(name, settings.replication_factor))
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
    """Raise TopicMismatch, naming every difference, unless all topics exist as Tally needs them."""
    topics = Topics(settings.topic_prefix)
    names = [name for name in (*topics.partitioned, *topics.single) if name not in (ignore or ())]
    admin = AdminClient(settings.kafka)
    known = admin.list_topics(timeout=15).topics
    mismatches: list[Mismatch] = []
    if missing := [name for name in names if name not in known]:
        fix = "run `tally up`, or `tally topics` on your own Kafka"
        mismatches.append(Mismatch(tuple(missing), "none of that name", "the topic", fix))
    there = {name: known[name].partitions for name in names if name in known}
    mismatches += _other_partitions(topics, {name: len(found) for name, found in there.items()}, settings.partitions)
    if there:
        described = admin.describe_configs([ConfigResource(ResourceType.TOPIC, name) for name in there])
        for resource, future in described.items():
            replicas = min(len(partition.replicas) for partition in there[resource.name].values())
            found = {name: entry.value for name, entry in future.result(15).items()}
            mismatches += differences(resource.name, topics.config(resource.name, replicas), found)
    if mismatches:
        raise TopicMismatch("\n".join(map(str, mismatches)), mismatches)


def _other_partitions(topics: Topics, counts: Mapping[str, int], partitions: int) -> Iterator[Mismatch]:
    """Topics with another partition count than they need, those with the same count together."""
    for count in sorted(set(counts.values()) - {partitions}):
        if wrong := tuple(name for name in topics.partitioned if counts.get(name) == count):
            fix = f"set TALLY_PARTITIONS={count}, or migrate (drain, rebuild state by account, switch)"
            yield Mismatch(wrong, f"{count} partitions", str(partitions), fix)
    if (count := counts.get(topics.catalog, 1)) != 1:
        fix = "delete it, run `tally topics`, and restart the relay, which fills it again"
        yield Mismatch((topics.catalog,), f"{count} partitions", "1", fix)


def differences(topic: str, wanted: Mapping[str, str], found: Mapping[str, str | None]) -> list[Mismatch]:
    """How a topic's settings fall short of the wanted ones: none, or one Mismatch with all of them and its command."""
    wrong = {name: value for name, value in wanted.items() if not _suffices(name, found.get(name), value)}
    if not wrong:
        return []
    changes = ",".join(f"{name}={value}" for name, value in wrong.items())
    return [
        Mismatch(
            (topic,),
            ", ".join(f"{name}={found.get(name)}" for name in wrong),
            ", ".join(f"{name}={value}{' or more' if name in _AT_LEAST else ''}" for name, value in wrong.items()),
            f"kafka-configs.sh --bootstrap-server … --alter --topic {topic} --add-config {changes}",
        )
    ]


#: Settings that may be larger than wanted; the others are exactly so.
_AT_LEAST = frozenset({"retention.ms", "max.message.bytes", "min.insync.replicas"})


def _suffices(name: str, found: str | None, wanted: str) -> bool:
    if name not in _AT_LEAST or found is None:
        return found == wanted
    return int(found) >= int(wanted) or (name == "retention.ms" and found == "-1")


def partition_of(account: bytes, partitions: int) -> int:
    """Partition of an account: murmur2 as Java's default partitioner and librdkafka's ``murmur2_random`` have it."""
    return int(murmur2(account) & 0x7FFFFFFF) % partitions
