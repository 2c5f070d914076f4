"""Up to where a person said that a stopped partition shall go on, whatever it refuses.

Kept as offsets of a consumer group that never has members: it works across machines with Kafka alone, which is all that
raters read; it outlives them; and one writer, the person's command, never meets the raters' own commits. A record of
the catalog would have to be understood by each of its readers, for a word that is over when the partition moves on; a
table would tie raters to PostgreSQL. Kafka forgets such offsets after ``offsets.retention.minutes``: a partition that
goes on commits its own offset, without the stop, long before.
"""

from collections.abc import Mapping
from typing import Any

from confluent_kafka import OFFSET_INVALID, Consumer, ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.infra.topics import Topics

_ANSWER_S = 10.0


class GoingOn:
    """Reads and writes that word. One connection, closed by ``close``."""

    def __init__(self, kafka: Mapping[str, Any], topics: Topics) -> None:
        self._kafka = dict(kafka)
        self._topic = topics.events
        self._group = f"{topics.prefix}rater.going-on"
        self._consumer = Consumer({**self._kafka, "group.id": self._group, "enable.auto.commit": False})

    def until(self, partition: int) -> int:
        """Dead letters of ``usage.events`` below this offset break no limit; 0 where nobody said so.

        Raises KafkaException when the broker does not answer.
        """
        (committed,) = self._consumer.committed([TopicPartition(self._topic, partition)], _ANSWER_S)
        if committed.error is not None:
            raise KafkaException(committed.error)
        return 0 if committed.offset == OFFSET_INVALID else committed.offset

    def say(self, partition: int, until: int) -> None:
        """Let a partition go on. Raises KafkaException when the broker refuses or does not answer."""
        place = TopicPartition(self._topic, partition, until)
        request = [ConsumerGroupTopicPartitions(self._group, [place])]
        admin = AdminClient(self._kafka)  # named: without a reference it would be gone before it has the answer
        answer = admin.alter_consumer_group_offsets(request, request_timeout=_ANSWER_S)
        (done,) = answer[self._group].result(_ANSWER_S).topic_partitions
        if done.error is not None:
            raise KafkaException(done.error)

    def close(self) -> None:
        self._consumer.close()
