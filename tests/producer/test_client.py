"""UsageProducer against a real broker: on good days and bad ones."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka.partitioner import murmur2
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from pipeline.infra.avro import CONTROLS, EVENTS, load_schemas
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, ensure_topics
from pipeline.producer import (
    BufferFull,
    Delivery,
    InvalidUsage,
    ProducerClosed,
    SpoolInUse,
    Usage,
    UsageProducer,
)
from pipeline.producer.files import read_jsonl
from pipeline.producer.spool import Spool
from pipeline.producer.usage import BODY_BYTES_MAX
from tests.producer.kafka import Line, check_nothing_lost, read_events

AT = datetime(2025, 3, 1, 12, tzinfo=UTC)
NOWHERE = "127.0.0.1:1"


def emit(producer: UsageProducer, row: int, **changed: Any) -> int:
    return producer.emit(
        **{
            "account": f"acct-{row % 7}",
            "event_type": "llm.request",
            "properties": {"tokens": row},
            "timestamp": AT,
            "idempotency_key": f"k-{row}",
            **changed,
        }
    )


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_events_arrive_on_their_accounts_partition_with_all_they_said(settings: Settings) -> None:
    with UsageProducer.from_settings(settings, source="svc") as producer:
        number = producer.emit_usage(
            Usage("acct-1", "llm.request", AT, "k-1", {"tokens": 12, "model": "m-1"}, subject="user-9")
        )
        assert number == 1
        source = producer.source
        assert producer.flush(20) == 0
    (stored,) = read_events(settings)
    assert stored.key == b"acct-1"
    assert stored.partition == (murmur2(b"acct-1") & 0x7FFFFFFF) % settings.partitions
    assert stored.event == {
        "idempotency_key": "k-1",
        "account": "acct-1",
        "event_type": "llm.request",
        "timestamp": AT,
        "subject": "user-9",
        "properties": {"tokens": "12", "model": "m-1"},
        "source": source,
        "sequence": 1,
    }


def test_numbers_go_on_across_close_and_reopen_without_a_hole(settings: Settings) -> None:
    emitted = {}
    for run in range(3):
        with UsageProducer.from_settings(settings, source="svc") as producer:
            for row in range(run * 50, run * 50 + 50):
                emitted[f"k-{row}"] = emit(producer, row)
    assert list(emitted.values()) == list(range(1, 151))
    stored = read_events(settings)
    assert len(stored) == 150
    check_nothing_lost(stored, emitted, producer.source)


def test_a_refused_event_takes_no_number(settings: Settings) -> None:
    with UsageProducer.from_settings(settings, source="svc") as producer:
        assert emit(producer, 1) == 1
        with pytest.raises(InvalidUsage):
            emit(producer, 2, properties={"tokens": 0.5})
        assert emit(producer, 3) == 2


@pytest.mark.parametrize("line_is_cut", [False, True], ids=["broker there", "broker away"])
def test_killed_while_emitting_nothing_is_lost_and_no_number_is_used_twice(
    settings: Settings, tmp_path: Path, line_is_cut: bool
) -> None:
    spool = tmp_path / "spool"
    emitted: dict[str, int] = {}
    with Line(settings) as line:
        for run in range(3):
            command = [sys.executable, "-m", "tests.producer.emit_forever", line.bootstrap, settings.topic_prefix]
            with subprocess.Popen(
                [*command, str(spool), str(run * 1_000_000)], stdout=subprocess.PIPE, text=True
            ) as service:
                assert service.stdout is not None
                told = [service.stdout.readline() for _ in range(1000)]
                if line_is_cut:
                    line.cut()
                told += [service.stdout.readline() for _ in range(1000 + 337 * run)]
                service.send_signal(signal.SIGKILL)
                told += service.stdout.readlines()
            line.restore()
            emitted |= {key: int(number) for key, number in (text.split() for text in told if text.endswith("\n"))}
    with UsageProducer.from_settings(settings, source="svc", spool_dir=spool) as producer:
        assert producer.stats.recovered > 0 or not line_is_cut
        emitted["last"] = emit(producer, 1, idempotency_key="last")
        assert producer.flush(30) == 0
        source = producer.source
    stored = read_events(settings)
    check_nothing_lost_but_untold(stored, emitted, source)


def check_nothing_lost_but_untold(stored: list[Any], emitted: dict[str, int], source: str) -> None:
    """As ``check_nothing_lost``; of each killed run at most one event more, taken but not yet told."""
    check_nothing_lost(stored, emitted, source)
    untold = {record.event["idempotency_key"] for record in stored} - emitted.keys()
    assert len(untold) <= 3


def test_broker_away_emit_stays_quick_nothing_is_lost_and_it_says_so_once(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tally.producer")
    emitted = {}
    slowest = 0.0
    with (
        Line(settings) as line,
        UsageProducer(
            bootstrap=line.bootstrap, topic_prefix=settings.topic_prefix, source="svc", spool_dir=tmp_path / "spool"
        ) as producer,
    ):
        for row in range(30_000):
            if row == 5_000:
                assert producer.flush(20) == 0
            if row in (6_000, 20_000):
                line.cut()
            if row in (16_000, 29_000):
                wait_until(lambda: producer.stats.trouble is not None)
                assert producer.stats.spooled + producer.stats.in_flight > 0
                line.restore()
                if row == 16_000:
                    wait_until(lambda: producer.stats.trouble is None)
            started = time.monotonic()
            emitted[f"k-{row}"] = emit(producer, row)
            slowest = max(slowest, time.monotonic() - started)
        assert producer.flush(60) == 0
        stats = producer.stats
        source = producer.source
    assert (stats.emitted, stats.delivered, stats.failed, stats.spooled, stats.in_flight) == (30_000, 30_000, 0, 0, 0)
    assert slowest < 0.5
    check_nothing_lost(read_events(settings), emitted, source)
    messages = [record.message for record in caplog.records]
    assert sum("is not being delivered" in message for message in messages) == 2
    assert sum("is delivered again" in message for message in messages) == 2


def test_started_without_a_broker_events_wait_for_the_next_run(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool"
    away = UsageProducer(bootstrap=NOWHERE, topic_prefix=settings.topic_prefix, source="svc", spool_dir=spool)
    emitted = {f"k-{row}": emit(away, row) for row in range(500)}
    wait_until(lambda: away.stats.trouble is not None)
    assert away.close(timeout=0.2) == 500
    assert "500 events undelivered" in caplog.text
    delivered: list[Delivery] = []
    with UsageProducer.from_settings(settings, source="svc", spool_dir=spool, on_delivery=delivered.append) as back:
        assert back.stats.recovered == 500
        assert back.flush(20) == 0
        assert back.source == away.source
    check_nothing_lost(read_events(settings), emitted, away.source)
    assert sorted(d.sequence for d in delivered) == list(range(1, 501))


def test_back_pressure_is_bounded_and_delivery_makes_room(settings: Settings, tmp_path: Path) -> None:
    emitted = {}
    text = "x" * 100_000
    with Line(settings) as line:
        line.cut()
        producer = UsageProducer(
            bootstrap=line.bootstrap,
            topic_prefix=settings.topic_prefix,
            source="svc",
            spool_dir=tmp_path / "spool",
            spool_bytes_max=1024 * 1024,
            block_seconds=0.3,
        )
        with producer:
            with pytest.raises(BufferFull, match="is Kafka reachable"):
                for row in range(100):
                    started = time.monotonic()
                    emitted[f"k-{row}"] = emit(producer, row, properties={"text": text})
            assert 0.3 <= time.monotonic() - started < 2
            assert producer.stats.spool_bytes <= 1024 * 1024
            line.restore()
            assert producer.flush(30) == 0
            emitted["more"] = emit(producer, 1, idempotency_key="more", properties={"text": text})
            assert producer.flush(30) == 0
    check_nothing_lost(read_events(settings), emitted, producer.source)


def test_many_threads_share_one_producer(settings: Settings) -> None:
    emitted: dict[str, int] = {}

    def work(first: int) -> None:
        for row in range(first, first + 500):
            emitted[f"k-{row}"] = emit(producer, row)

    with UsageProducer.from_settings(settings, source="svc") as producer:
        threads = [threading.Thread(target=work, args=(n * 500,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert producer.flush(20) == 0
    assert sorted(emitted.values()) == list(range(1, 2001))
    check_nothing_lost(read_events(settings), emitted, producer.source)


def test_delivery_is_reported_per_event_and_per_producer(settings: Settings) -> None:
    all_of_them: list[Delivery] = []
    of_one: list[Delivery] = []
    with UsageProducer.from_settings(settings, source="svc", on_delivery=all_of_them.append) as producer:
        emit(producer, 1)
        emit(producer, 2, on_delivery=of_one.append)
        assert producer.flush(20) == 0
    by_key = {record.event["idempotency_key"]: record for record in read_events(settings)}
    second = by_key["k-2"]
    assert of_one == [Delivery("acct-2", "k-2", 2, second.partition, second.offset, None)]
    assert {delivery.idempotency_key for delivery in all_of_them} == {"k-1", "k-2"}


def test_a_callback_that_fails_or_misuses_the_producer_stops_nothing(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(delivery: Delivery) -> None:
        if delivery.sequence % 2:
            raise LookupError("the service's mistake")
        producer.flush()

    with UsageProducer.from_settings(settings, source="svc", on_delivery=fails) as producer:
        for row in range(10):
            emit(producer, row)
        assert producer.flush(20) == 0
        assert producer.stats.delivered == 10
    assert "the service's mistake" in caplog.text
    assert "on_delivery must not call them" in caplog.text


def _set_message_bytes_max(settings: Settings, size: int) -> None:
    change = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, Topics(settings.topic_prefix).events, incremental_configs=[change])
    admin = AdminClient(settings.kafka)
    admin.incremental_alter_configs([resource])[resource].result(15)
    # The broker follows a moment after it has confirmed the change: first what it says, then what it does.
    topic = ConfigResource(ResourceType.TOPIC, Topics(settings.topic_prefix).events)
    deadline = time.monotonic() + 15
    while admin.describe_configs([topic])[topic].result(15)["max.message.bytes"].value != str(size):
        assert time.monotonic() < deadline, f"expected the topic to take {size} bytes at most by now"
        time.sleep(0.1)
    time.sleep(1)


def test_an_event_kafka_refuses_for_good_is_kept_reported_and_takes_no_other_with_it(
    settings: Settings, tmp_path: Path
) -> None:
    _set_message_bytes_max(settings, 20_000)
    reports: list[Delivery] = []
    noise = os.urandom(20_000).hex()
    with UsageProducer.from_settings(
        settings, source="svc", spool_dir=tmp_path / "spool", on_delivery=reports.append
    ) as producer:
        for row in range(200):
            emit(producer, row, account="acct-1", properties={"text": noise if row == 77 else os.urandom(100).hex()})
        assert producer.flush(60) == 0
        stats = producer.stats
    assert (stats.delivered, stats.failed) == (199, 1)
    (refused,) = [report for report in reports if report.error is not None]
    assert (refused.idempotency_key, refused.sequence, refused.partition) == ("k-77", 78, None)
    assert {record.event["sequence"] for record in read_events(settings)} == set(range(1, 201)) - {78}
    (line,) = (tmp_path / "spool" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["rejected_because"] == refused.error
    # Mended, it is sent again from the file under its old key.
    _set_message_bytes_max(settings, 262_144)
    (again,) = read_jsonl(tmp_path / "spool" / "rejected.jsonl")
    assert isinstance(again, Usage)
    assert (again.account, again.idempotency_key, again.properties, again.timestamp) == (
        "acct-1",
        "k-77",
        {"text": noise},
        AT,
    )
    with UsageProducer.from_settings(settings, source="svc", spool_dir=tmp_path / "spool") as producer:
        assert producer.emit_usage(again) == 201
        assert producer.flush(20) == 0


def test_largest_event_fits_the_topic_even_when_nothing_can_be_compressed(settings: Settings) -> None:
    noise = os.urandom(BODY_BYTES_MAX // 2 - 60).hex()
    with UsageProducer.from_settings(settings, source="svc") as producer:
        emit(producer, 1, properties={"text": noise})
        with pytest.raises(InvalidUsage, match="at most"):
            emit(producer, 2, properties={"text": noise + "x" * 200})
        assert producer.flush(20) == 0
        assert producer.stats.delivered == 1


def test_a_topic_that_comes_late_is_waited_for(settings: Settings, tmp_path: Path) -> None:
    late = settings.model_copy(update={"topic_prefix": settings.topic_prefix + "late-"})
    producer = UsageProducer(
        bootstrap=str(settings.kafka_bootstrap),
        topic_prefix=late.topic_prefix,
        source="svc",
        spool_dir=tmp_path / "spool",
        kafka={"topic.metadata.propagation.max.ms": 500, "topic.metadata.refresh.fast.interval.ms": 100},
    )
    with producer:
        emitted = {f"k-{row}": emit(producer, row) for row in range(100)}
        wait_until(lambda: producer.stats.trouble is not None)
        ensure_topics(late)
        assert producer.flush(30) == 0
    check_nothing_lost(read_events(late), emitted, producer.source)


def test_a_fatal_client_error_replaces_the_client_and_loses_nothing(settings: Settings) -> None:
    emitted = {}
    with UsageProducer.from_settings(settings, source="svc") as producer:
        for row in range(20_000):
            emitted[f"k-{row}"] = emit(producer, row)
            if row == 10_000:
                fatal = KafkaError(KafkaError._FATAL, "as librdkafka reports it", fatal=True)
                producer._sender._on_client_error(fatal)
        assert producer.flush(30) == 0
        assert producer.stats.delivered == 20_000
    check_nothing_lost(read_events(settings), emitted, producer.source)


def test_a_spool_serves_one_producer(settings: Settings, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with UsageProducer.from_settings(settings, source="svc", spool_dir=spool):
        command = [sys.executable, "-m", "tests.producer.emit_forever"]
        other = subprocess.run(
            [*command, str(settings.kafka_bootstrap), settings.topic_prefix, str(spool), "0"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "SpoolInUse" in other.stderr
        assert f"in use by process {os.getpid()}" in other.stderr
        with pytest.raises(SpoolInUse):
            UsageProducer.from_settings(settings, source="svc", spool_dir=spool)
    UsageProducer.from_settings(settings, source="svc", spool_dir=spool).close()


def test_closed_is_closed(settings: Settings) -> None:
    producer = UsageProducer.from_settings(settings, source="svc")
    assert producer.close() == 0
    assert producer.close() == 0
    with pytest.raises(ProducerClosed, match="closed"):
        emit(producer, 1)


def test_a_child_of_fork_refuses_and_leaves_the_parents_producer_alone(settings: Settings) -> None:
    with UsageProducer.from_settings(settings, source="svc") as producer:
        emit(producer, 1)
        child = os.fork()
        if child == 0:
            try:
                emit(producer, 2)
            except ProducerClosed:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert emit(producer, 3) == 2
        assert producer.flush(20) == 0
    assert [record.event["idempotency_key"] for record in read_events(settings)].count("k-2") == 0


def test_a_program_that_ends_without_closing_still_delivers(settings: Settings, tmp_path: Path) -> None:
    program = f"""
from datetime import UTC, datetime
from pipeline.producer import UsageProducer
producer = UsageProducer(bootstrap={settings.kafka_bootstrap!r}, topic_prefix={settings.topic_prefix!r}, source="svc",
                         spool_dir={str(tmp_path / "spool")!r})
producer.emit(account="a", event_type="t", properties={{}}, timestamp=datetime.now(UTC), idempotency_key="k")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(read_events(settings)) == 1


def test_a_time_ahead_is_sent_and_warned_of_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with UsageProducer.from_settings(settings, source="svc") as producer:
        for row in range(3):
            emit(producer, row, timestamp=datetime.now(UTC) + timedelta(hours=2))
        assert producer.flush(20) == 0
    assert sum("ahead of this machine's clock" in record.message for record in caplog.records) == 1


def test_wrong_arguments_leave_the_spool_free(settings: Settings, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with pytest.raises(ValueError, match="without '/'"):
        UsageProducer.from_settings(settings, source="a/b", spool_dir=spool)
    with pytest.raises(ValueError, match="spool_bytes_max"):
        UsageProducer.from_settings(settings, source="svc", spool_dir=spool, spool_bytes_max=1)
    with pytest.raises(KafkaException):
        UsageProducer(
            bootstrap=NOWHERE,
            topic_prefix=settings.topic_prefix,
            source="svc",
            spool_dir=spool,
            kafka={"no.such.option": "1"},
        )
    UsageProducer.from_settings(settings, source="svc", spool_dir=spool).close()


def test_a_registrys_id_is_remembered_so_that_a_restart_needs_no_registry(settings: Settings, tmp_path: Path) -> None:
    registry = "http://127.0.0.1:1"
    spool = Spool(tmp_path / "spool", "svc", Topics(settings.topic_prefix).events)
    for subject in (EVENTS, CONTROLS):
        newest = load_schemas().newest(subject)
        known_as = f"{registry}#{hashlib.sha256(newest.text().encode()).hexdigest()[:16]}"
        spool.remember_schema(known_as, newest.id)
    spool.close()
    with UsageProducer(
        bootstrap=str(settings.kafka_bootstrap),
        topic_prefix=settings.topic_prefix,
        source="svc",
        spool_dir=tmp_path / "spool",
        registry_url=registry,
    ) as producer:
        emit(producer, 1)
        assert producer.flush(20) == 0
    assert len(read_events(settings)) == 1
