"""Control totals: exact by hour, across restarts, killed processes, refused events and damaged spools."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient
from hypothesis import given
from hypothesis import strategies as st

from pipeline.infra.avro import CONTROLS, load_schemas
from pipeline.infra.kafka import passes
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.producer import UsageProducer
from pipeline.producer.controls import HOUR, SAY_EVERY, Controls, Total
from pipeline.producer.journal import Left
from tests.producer.kafka import Line

from .test_client import emit, wait_until

NOON = 1_700_006_400 // HOUR * HOUR


def opened(folder: Path, *left: Left, following: int = 1, epoch: str = "e1") -> Controls:
    folder.mkdir(exist_ok=True)
    return Controls(folder, "svc", epoch, left, following)


def due(controls: Controls, following: int, *, asked: bool = True, closing: bool = False) -> list[Total]:
    return controls.due(following, lambda epoch: None, asked=asked, closing=closing)


def facts(totals: list[Total]) -> list[tuple[Any, ...]]:
    names = ("first_sequence", "last_sequence", "delivered", "rejected", "spooled")
    return [((total.record["hour"] // 1_000_000 - NOON) // HOUR, *(total.record[n] for n in names)) for total in totals]


# -- counting


def test_events_are_counted_to_the_hour_of_their_emission(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    assert facts(due(controls, 1)) == []
    controls.begin_hour(NOON + 1.5, 1)
    assert controls.hour_ends == NOON + HOUR
    controls.begin_hour(NOON + HOUR, 4)
    for sequence in (1, 2, 4):
        controls.settle("e1", sequence)
    assert facts(due(controls, 6)) == [(0, 1, 3, 2, 0, 1), (1, 4, 5, 1, 0, 1)]


def test_a_clock_that_goes_back_stays_in_its_hour(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON + HOUR, 1)
    controls.begin_hour(NOON, 5)
    assert facts(due(controls, 9)) == [(1, 1, 8, 0, 0, 8)]


def test_an_hour_in_which_nothing_was_emitted_is_not_said(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)  # killed, or the spool was full, before the event was there
    assert due(controls, 1) == []
    controls.begin_hour(NOON + HOUR, 1)
    assert facts(due(controls, 2)) == [(1, 1, 1, 0, 0, 1)]


def test_a_total_is_said_again_only_when_it_changed(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    (total,) = due(controls, 3)
    assert due(controls, 4) == []  # one is on its way
    controls.heard(total, taken=True)
    assert due(controls, 3) == []
    assert facts(due(controls, 4)) == [(0, 1, 3, 0, 0, 3)]


def test_unasked_it_is_said_when_the_hour_is_over_and_done_or_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ticks = float(NOON), 1000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    monkeypatch.setattr(time, "monotonic", lambda: ticks)
    controls = opened(tmp_path)
    controls.begin_hour(clock, 1)
    assert due(controls, 3, asked=False) == []
    ticks += SAY_EVERY
    (total,) = due(controls, 3, asked=False)
    controls.heard(total, taken=True)
    controls.settle("e1", 1)
    assert due(controls, 3, asked=False) == []
    clock += HOUR
    assert due(controls, 3, asked=False) == []  # one event still waits
    controls.settle("e1", 2)
    assert facts(due(controls, 3, asked=False)) == [(0, 1, 2, 2, 0, 0)]


def test_what_kafka_did_not_take_is_said_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: ticks)
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    (total,) = due(controls, 2)
    controls.heard(total, taken=False)
    assert due(controls, 2) == []
    ticks += 31
    assert len(due(controls, 2)) == 1


def test_rejections_are_named_with_their_reason(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    controls.reject("e1", 2, "too large")
    for sequence in (1, 2, 3):
        controls.settle("e1", sequence)
    (total,) = due(controls, 4)
    assert facts([total]) == [(0, 1, 3, 2, 1, 0)]
    assert total.record["rejections"] == [{"first": 2, "last": 2, "reason": "too large"}]


def test_closed_is_said_with_the_newest_hour_and_only_once_nothing_waits(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    controls.begin_hour(NOON + HOUR, 2)
    controls.settle("e1", 2)
    assert [total.record["closed"] for total in due(controls, 3, closing=True)] == [False, False]
    other = opened(tmp_path / "other")
    other.begin_hour(NOON, 1)
    other.begin_hour(NOON + HOUR, 2)
    for sequence in (1, 2):
        other.settle("e1", sequence)
    assert [total.record["closed"] for total in due(other, 3, closing=True)] == [False, True]


# -- across restarts


def test_boundaries_and_rejections_outlive_the_process(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    controls.reject("e1", 1, "too large")
    controls.begin_hour(NOON + HOUR, 4)
    controls.save()
    again = opened(tmp_path, Left("e1", 1, 6, 6, [(2, 2), (5, 5)]), following=6)
    assert facts(due(again, 6)) == [(0, 1, 3, 1, 1, 1), (1, 4, 5, 1, 0, 1)]
    again.begin_hour(NOON + HOUR + 5, 6)  # the same hour goes on
    assert facts(due(opened(tmp_path, Left("e1", 1, 7, 7, []), following=7), 7))[1] == (1, 4, 6, 3, 0, 0)


def test_an_earlier_epoch_is_said_to_its_end_and_forgotten(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    controls.save()
    after = opened(tmp_path, Left("e1", 1, 4, 4, [(3, 3)]), epoch="e2")
    after.begin_hour(NOON, 1)
    first = due(after, 2)
    assert [(total.source, total.record["spooled"], total.record["closed"]) for total in first] == [
        ("svc/e1", 1, False),
        ("svc/e2", 1, False),
    ]
    for total in first:
        after.heard(total, taken=True)
    after.settle("e1", 3)
    (last,) = due(after, 2)
    assert (last.source, last.record["delivered"], last.record["closed"]) == ("svc/e1", 3, True)
    after.heard(last, taken=True)
    after.save()
    assert json.loads((tmp_path / "controls.json").read_text()).keys() == {"e2"}


def test_numbers_a_damaged_spool_lost_are_rejections_named_once(tmp_path: Path) -> None:
    controls = opened(tmp_path)
    controls.begin_hour(NOON, 1)
    controls.save()
    for _ in range(2):  # the segment stays damaged
        controls = opened(tmp_path, Left("e1", 1, 3, 5, [(2, 2)]), following=5)
    (total,) = due(controls, 5)
    assert facts([total]) == [(0, 1, 4, 1, 2, 1)]
    assert total.record["rejections"] == [{"first": 3, "last": 4, "reason": "the spool was damaged"}]


def test_a_folder_without_totals_begins_with_what_waits(tmp_path: Path) -> None:
    controls = opened(tmp_path, Left("e1", 100, 200, 200, [(150, 199)]), following=200)
    (total,) = due(controls, 200)
    assert facts([total])[0][1:] == (150, 199, 0, 0, 50)


def test_a_file_that_cannot_be_read_is_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "controls.json").write_text('{"e1": {"hours": ')
    controls = opened(tmp_path)
    assert "begin anew" in caplog.text
    controls.begin_hour(NOON, 1)
    assert facts(due(controls, 2)) == [(0, 1, 1, 0, 0, 1)]


@given(
    hours=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    what=st.lists(st.sampled_from(["waits", "delivered", "rejected"]), max_size=200),
)
def test_hours_cover_every_number_once_and_each_adds_up(
    tmp_path_factory: pytest.TempPathFactory, hours: list[int], what: list[str]
) -> None:
    controls = opened(tmp_path_factory.mktemp("spool"))
    following = 1
    for hour, count in enumerate(hours):
        for n in range(count):
            if n == 0:
                controls.begin_hour(NOON + hour * HOUR, following)
            following += 1
    outcomes = dict(zip(range(1, following), what, strict=False))
    for sequence, outcome in outcomes.items():
        if outcome == "rejected":
            controls.reject("e1", sequence, "r")
        if outcome != "waits":
            controls.settle("e1", sequence)
    totals = [total.record for total in due(controls, following)]
    numbers = [n for one in totals for n in range(one["first_sequence"], one["last_sequence"] + 1)]
    assert numbers == list(range(1, following))
    for one in totals:
        members = [outcomes.get(n, "waits") for n in range(one["first_sequence"], one["last_sequence"] + 1)]
        counted = (one["delivered"], one["rejected"], one["spooled"])
        assert counted == tuple(members.count(outcome) for outcome in ("delivered", "rejected", "waits"))


# -- on a real broker


def read_totals(settings: Settings) -> list[dict[str, Any]]:
    """Everything on the controls topic now, in order."""
    place = TopicPartition(Topics(settings.topic_prefix).controls, 0, 0)
    consumer = Consumer({**settings.kafka, "group.id": "reads-back", "enable.partition.eof": True})
    schemas, found = load_schemas(), []
    try:
        consumer.assign([place])
        while (message := consumer.poll(10)) is not None:
            if (error := message.error()) is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    return found
                assert passes(error), error
            else:
                record = schemas.decode(message.value(), CONTROLS)
                assert message.key() == record["source"].encode()
                found.append(record)
        raise AssertionError("Kafka did not answer in time")
    finally:
        consumer.close()


@pytest.fixture
def line(settings: Settings) -> Iterator[Line]:
    with Line(settings) as made:
        yield made


def test_flush_and_close_say_how_many_were_emitted_and_delivered(settings: Settings) -> None:
    before = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with UsageProducer.from_settings(settings, source="svc") as producer:
        for row in range(30):
            emit(producer, row)
        assert producer.flush(20) == 0
        wait_until(lambda: read_totals(settings))
        assert not read_totals(settings)[-1]["closed"]
        emit(producer, 30)
    last = read_totals(settings)[-1]
    assert (last["source"], last["closed"]) == (producer.source, True)
    assert last["hour"] in (before, before + timedelta(hours=1))
    hours = {one["hour"]: one for one in read_totals(settings)}.values()
    assert sum(one["delivered"] for one in hours) == last["last_sequence"] == 31
    assert all(one["rejected"] == one["spooled"] == 0 for one in hours)


def test_a_producer_that_emitted_nothing_says_nothing(settings: Settings) -> None:
    with UsageProducer.from_settings(settings, source="svc") as producer:
        producer.flush(5)
    assert read_totals(settings) == []


def test_what_waits_while_the_broker_is_away_is_said_by_the_next_producer(
    settings: Settings, line: Line, tmp_path: Path
) -> None:
    def producer() -> UsageProducer:
        return UsageProducer(
            bootstrap=line.bootstrap, topic_prefix=settings.topic_prefix, source="svc", spool_dir=tmp_path / "spool"
        )

    line.cut()
    first = producer()
    for row in range(5):
        emit(first, row)
    started = time.monotonic()
    assert first.close(0.2) == 5
    assert time.monotonic() - started < 5
    line.restore()
    with producer() as second:
        second.flush(30)
    last = read_totals(settings)[-1]
    assert (last["source"], last["delivered"], last["spooled"], last["closed"]) == (first.source, 5, 0, True)


def test_without_the_topic_events_are_delivered_all_the_same(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    topic = Topics(settings.topic_prefix).controls
    admin = AdminClient(settings.kafka)
    admin.delete_topics([topic])[topic].result(15)
    wait_until(lambda: topic not in admin.list_topics(timeout=10).topics)
    kafka = {**settings.kafka, "topic.metadata.propagation.max.ms": 500}
    with UsageProducer(
        bootstrap=str(settings.kafka_bootstrap),
        topic_prefix=settings.topic_prefix,
        source="svc",
        spool_dir=settings.data_dir / "spool",
        kafka=kafka,
    ) as producer:
        emit(producer, 1)
        assert producer.flush(20) == 0
        wait_until(lambda: "does not take control totals" in caplog.text)
        assert producer.stats.trouble is None
        emit(producer, 2)
        assert producer.flush(20) == 0
    assert caplog.text.count("does not take control totals") == 1
