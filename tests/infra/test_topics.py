from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from pipeline.infra.settings import Settings
from pipeline.infra.topics import TopicMismatch, Topics, check_topics, differences, ensure_topics
from tests.operations.world import eventually

DAY_MS = 86_400_000


def test_a_second_time_creates_nothing(settings: Settings) -> None:
    assert ensure_topics(settings) == []
    check_topics(settings)


def test_other_partition_count_is_refused_with_both_numbers(settings: Settings) -> None:
    other = settings.model_copy(update={"partitions": settings.partitions + 1})
    with pytest.raises(TopicMismatch, match=r"found 4 partitions, expected 5: set TALLY_PARTITIONS=4, or migr") as said:
        ensure_topics(other)
    (mismatch,) = said.value.mismatches
    assert mismatch.topics == Topics(settings.topic_prefix).partitioned


@pytest.fixture
def bare(settings: Settings) -> Iterator[Settings]:
    """A prefix without topics, under the test's own, which removes them."""
    yield settings.model_copy(update={"topic_prefix": f"{settings.topic_prefix}bare-"})


def test_missing_topics_are_named(bare: Settings) -> None:
    with pytest.raises(TopicMismatch, match=r"bare-usage\.events, .*bare-billing\.catalog: .* run `tally up`") as said:
        check_topics(bare)
    assert len(said.value.mismatches) == 1


def test_a_topic_made_by_hand_is_refused_with_every_difference(bare: Settings) -> None:
    admin, topics = AdminClient(bare.kafka), Topics(bare.topic_prefix)
    for future in admin.create_topics(
        [NewTopic(topics.events, bare.partitions, 1), NewTopic(topics.catalog, 2, 1, config={"max.message.bytes": "9"})]
    ).values():
        future.result(15)
    with pytest.raises(TopicMismatch) as said:
        ensure_topics(bare)
    catalog_partitions, events, catalog = said.value.mismatches
    assert (catalog_partitions.topics, catalog_partitions.found) == ((topics.catalog,), "2 partitions")
    assert "TALLY_PARTITIONS" not in catalog_partitions.fix
    assert events.topics == (topics.events,)
    assert "message.timestamp.type=CreateTime" in events.found
    assert f"retention.ms={37 * DAY_MS} or more" in events.expected
    assert events.fix.endswith(
        f"--alter --topic {topics.events} --add-config retention.ms={37 * DAY_MS},message.timestamp.type=LogAppendTime"
    )
    assert catalog.found == "max.message.bytes=9, cleanup.policy=delete"
    assert catalog.expected == "max.message.bytes=2097152 or more, cleanup.policy=compact"
    assert str(said.value).splitlines() == list(map(str, said.value.mismatches))


#: What loses data without a word: topic, setting, value.
LOSSES = [
    ("totals", "cleanup.policy", "delete"),
    ("totals", "cleanup.policy", "compact,delete"),
    ("catalog", "cleanup.policy", "delete"),
    ("events", "cleanup.policy", "compact"),
    ("seen", "retention.ms", str(7 * DAY_MS)),
    ("retry", "retention.ms", str(37 * DAY_MS)),
    ("rated", "retention.bytes", "1000000"),
    ("dead_letter", "max.message.bytes", "1048588"),
]


@pytest.mark.parametrize(("topic", "name", "value"), LOSSES, ids=[" ".join(loss) for loss in LOSSES])
def test_a_setting_that_loses_data_is_refused(settings: Settings, topic: str, name: str, value: str) -> None:
    altered = getattr(Topics(settings.topic_prefix), topic)
    alter(settings, altered, name, value)
    with pytest.raises(TopicMismatch) as said:
        check_topics(settings)
    (mismatch,) = said.value.mismatches
    assert (mismatch.topics, mismatch.found) == ((altered,), f"{name}={value}")


def test_more_than_needed_is_fine(settings: Settings) -> None:
    topics = Topics(settings.topic_prefix)
    alter(settings, topics.events, "retention.ms", "-1")
    alter(settings, topics.rated, "retention.ms", str(400 * DAY_MS))
    alter(settings, topics.seen, "max.message.bytes", "8388608")
    check_topics(settings)


def test_three_replicas_must_have_two_in_sync() -> None:
    topics = Topics()
    assert "min.insync.replicas" not in topics.config(topics.rated, 2)
    wanted = topics.config(topics.rated, 3)
    assert wanted["min.insync.replicas"] == "2"
    assert differences(topics.rated, wanted, wanted | {"min.insync.replicas": "3"}) == []
    (mismatch,) = differences(topics.rated, wanted, wanted | {"min.insync.replicas": "1"})
    assert (mismatch.found, mismatch.expected) == ("min.insync.replicas=1", "min.insync.replicas=2 or more")


def alter(settings: Settings, topic: str, name: str, value: str) -> None:
    """Change a topic's setting; done when the broker shows it, a moment after the controller has it."""
    admin = AdminClient(settings.kafka)
    change = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[change])
    admin.incremental_alter_configs([resource])[resource].result(15)
    eventually(
        lambda: admin.describe_configs([resource])[resource].result(15)[name].value, lambda shown: shown == value
    )
