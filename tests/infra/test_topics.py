from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.infra.settings import Settings
from pipeline.infra.topics import TopicMismatch, Topics, check_topics, ensure_topics


def test_a_second_time_creates_nothing(settings: Settings) -> None:
    assert ensure_topics(settings) == []
    check_topics(settings)


def test_other_partition_count_is_refused_with_both_numbers(settings: Settings) -> None:
    other = settings.model_copy(update={"partitions": settings.partitions + 1})
    with pytest.raises(TopicMismatch, match=r"has 4 partitions, expected 5: set TALLY_PARTITIONS=4, or migrate"):
        ensure_topics(other)


@pytest.fixture
def bare(settings: Settings) -> Iterator[Settings]:
    """A prefix without topics, under the test's own, which removes them."""
    yield settings.model_copy(update={"topic_prefix": f"{settings.topic_prefix}bare-"})


def test_missing_topic_is_named(bare: Settings) -> None:
    with pytest.raises(TopicMismatch, match=r"topic \S+bare-usage\.events does not exist: run `tally up`"):
        check_topics(bare)


def test_producers_timestamps_are_refused(bare: Settings) -> None:
    admin = AdminClient(bare.kafka)
    events = Topics(bare.topic_prefix).events
    admin.create_topics([NewTopic(events, bare.partitions, 1)])[events].result(15)
    with pytest.raises(TopicMismatch, match="stamps CreateTime, expected LogAppendTime"):
        ensure_topics(bare)
