"""What Kafka's errors mean to those who wait."""

from confluent_kafka import KafkaError

#: The broker is away, restarting, or moving something: the same call may succeed in a moment. librdkafka marks errors
#: as retriable only for transactions, so consumers and admin calls need the list.
_PASSING = frozenset(
    {
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._DESTROY_BROKER,
        KafkaError._WAIT_COORD,
        KafkaError._WAIT_CACHE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.NOT_CONTROLLER,
        KafkaError.OFFSET_NOT_AVAILABLE,
    }
)


def passes(error: KafkaError) -> bool:
    """May the same call succeed in a moment, because only the broker is away or busy?"""
    return not error.fatal() and (error.retriable() or error.code() in _PASSING)
