"""Looking into topics without being anyone's consumer: what a reader at a given position would still get."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from pipeline.infra.kafka import passes
from pipeline.infra.settings import Settings

#: A topic and a partition of it.
Place: TypeAlias = tuple[str, int]


def place_of(message: Message) -> Place:
    return cast(str, message.topic()), cast(int, message.partition())


def peek(
    settings: Settings, starts: Mapping[Place, int], *, most: int | None = None, silence_s: float = 15.0
) -> Iterator[Message]:
    """Committed messages from each start to the log's end, at most ``most`` of each place.

    Transaction markers and aborted messages are offsets too, so only reading tells whether there is anything to read.
    A start that retention has taken moves to the first offset there is. Raises TimeoutError when the broker is silent
    for ``silence_s`` seconds (a transaction that stays open is an end, not silence), KafkaException when it refuses.
    """
    if not starts:
        return
    consumer = Consumer(
        {
            **settings.kafka,
            "group.id": f"{settings.topic_prefix}look",  # the client wants one; never joined
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 50,
            "queued.max.messages.kbytes": 8_192,
            "log_level": 0,  # errors come back through the messages
        }
    )
    left = set(starts)
    got: Counter[Place] = Counter()
    try:
        consumer.assign([TopicPartition(*place, offset) for place, offset in starts.items()])
        heard = time.monotonic()
        while left:
            said_something = False
            for message in consumer.consume(500, 0.1):
                place, error = place_of(message), message.error()
                if error is None:
                    if place in left:
                        yield message
                        got[place] += 1
                        if got[place] == most:
                            left.discard(place)
                            consumer.pause([TopicPartition(*place)])
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(place)
                elif passes(error):
                    continue
                else:
                    raise KafkaException(error)
                said_something = True
            if said_something:
                heard = time.monotonic()
            elif time.monotonic() - heard > silence_s:
                raise TimeoutError(f"Kafka said nothing for {silence_s:g} s about {len(left)} partitions")
    finally:
        consumer.close()
