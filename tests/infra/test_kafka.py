import pytest
from confluent_kafka import KafkaError

from pipeline.infra.kafka import passes


@pytest.mark.parametrize(
    "code", [KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError.NOT_LEADER_FOR_PARTITION]
)
def test_a_broker_that_is_away_or_busy_passes_though_the_client_does_not_say_so(code: int) -> None:
    error = KafkaError(code)
    assert not error.retriable()
    assert passes(error)


@pytest.mark.parametrize(
    "error",
    [
        KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED),
        KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART),
        KafkaError(KafkaError._TRANSPORT, "gone for good", fatal=True),
    ],
    ids=lambda error: error.name(),
)
def test_what_a_person_has_to_mend_does_not_pass(error: KafkaError) -> None:
    assert not passes(error)
