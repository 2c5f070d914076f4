"""What groups have committed: asked again while something moves, and nothing else."""

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from pipeline.infra.settings import Settings
from pipeline.operations.groups import answered, committed


def test_a_moving_partition_is_asked_again() -> None:
    errors = [KafkaError.NOT_COORDINATOR, KafkaError.NOT_LEADER_FOR_PARTITION]

    def ask() -> str:
        if errors:
            raise KafkaException(KafkaError(errors.pop()))
        return "here"

    assert answered(ask, within_s=5) == "here"


@pytest.mark.parametrize(
    ("code", "within_s"), [(KafkaError.GROUP_AUTHORIZATION_FAILED, 5), (KafkaError.NOT_COORDINATOR, 0)]
)
def test_a_refusal_and_a_move_that_takes_too_long_are_errors(code: int, within_s: float) -> None:
    asked = []

    def ask() -> None:
        asked.append(1)
        raise KafkaException(KafkaError(code))

    with pytest.raises(KafkaException):
        answered(ask, within_s)
    assert len(asked) <= 2


def test_a_group_that_nobody_knows_has_committed_nothing(settings: Settings) -> None:
    assert committed(AdminClient(settings.kafka), f"{settings.topic_prefix}nobody", 15) == []
