"""What a consumer group has committed, asked so that no moving coordinator is taken for an answer, or for the end."""

import time
from collections.abc import Callable
from typing import TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

#: A partition or a group is just moving to another broker, which answers in a moment.
_MOVING = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    }
)
#: Wait before asking again, seconds.
_AGAIN_S = 0.1

T = TypeVar("T")


def answered(ask: Callable[[], T], within_s: float) -> T:
    """The broker's answer; asked again while a partition or group is moving. Raises what ``ask`` raises otherwise."""
    until = time.monotonic() + within_s
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].code() not in _MOVING or time.monotonic() > until:
                raise
            time.sleep(_AGAIN_S)


def committed(admin: AdminClient, group: str, within_s: float) -> list[TopicPartition]:
    """What the group has committed, transactions that are open left out; none for a group nobody knows.

    The group is described first: asked for the offsets, librdkafka crashes where a broker answers that it is not the
    group's coordinator (its issue 5040), and describing says the same as an error.
    """

    def ask() -> list[TopicPartition]:
        admin.describe_consumer_groups([group], request_timeout=within_s)[group].result(within_s)
        request = [ConsumerGroupTopicPartitions(group)]
        found = admin.list_consumer_group_offsets(request, request_timeout=within_s)[group].result(within_s)
        return found.topic_partitions or []

    return answered(ask, within_s)
