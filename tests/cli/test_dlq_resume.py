"""`tally dlq resume` and what `tally status` says of a stopped partition. A real one stops in the integration tests."""

from contextlib import closing

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.core.limits import Refusals
from pipeline.infra.going_on import GoingOn
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

from .running import Tally

WHY = "1,200 dead letters in a row (limit 1,000)"


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


def stop(settings: Settings, partition: int, next_offset: int) -> None:
    """Nine records on the partition, and the raters' offset as the batch leaves it that breaks a limit."""
    topics = Topics(settings.topic_prefix)
    producer = Producer(settings.kafka)
    for _ in range(9):
        producer.produce(topics.events, b"\xff", partition=partition)
    assert producer.flush(15) == 0
    note = Refusals(run=1200, longest=1200).note(WHY)
    place = TopicPartition(topics.events, partition, next_offset, note)
    group = ConsumerGroupTopicPartitions(f"{topics.prefix}rater", [place])
    admin = AdminClient(settings.kafka)
    for answer in admin.alter_consumer_group_offsets([group]).values():
        answer.result(15)


def until(settings: Settings, partition: int) -> int:
    with closing(GoingOn(settings.kafka, Topics(settings.topic_prefix))) as going_on:
        return going_on.until(partition)


def test_status_says_what_stopped_and_resume_lets_it_go_on(settings: Settings, tally: Tally) -> None:
    stop(settings, 1, 5)
    seen = tally.json("status")
    assert seen["stopped"] == [{"partition": 1, "next_offset": 5, "why": WHY}]
    assert seen["headline"].startswith("partition 1 stopped by a dead-letter limit; rater is 4 events behind")
    assert not seen["caught_up"]
    shown = " ".join(tally("status").stdout.split())
    assert f"partition 1 stopped before offset 5: {WHY}" in shown
    assert "tally dlq resume 1" in shown

    assert "say why" in tally("dlq", "resume", 1, code=2).stderr
    assert "partition 0 is not stopped" in tally("dlq", "resume", 0, "--why", "x", code=1).stderr
    assert until(settings, 1) == 0
    done = tally.json("dlq", "resume", 1, "--why", "the producer is rolled back")
    assert done == {"partition": 1, "no_limit_before": 5}
    assert until(settings, 1) == 5
    assert tally.json("status")["stopped"] == []
    with connect(settings.dsn, application="test") as connection:
        audit = connection.execute("SELECT actor, action, target, detail FROM billing.audit").fetchall()
    detail = {"why": "the producer is rolled back", "stopped_by": WHY, "next_offset": 5, "no_limit_before": 5}
    assert audit == [("ada", "dlq.resume", f"{settings.topic_prefix}usage.events/1", detail)]


def test_resume_to_the_end_frees_what_is_there_now(settings: Settings, tally: Tally) -> None:
    stop(settings, 2, 5)
    assert "partition 2 goes on" in tally("dlq", "resume", 2, "--to-end", "--why", "known noise").stderr
    assert until(settings, 2) == 9
    assert "partition 2 is not stopped" in tally("dlq", "resume", 2, "--why", "again", code=1).stderr
