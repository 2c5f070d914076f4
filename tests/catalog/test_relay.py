"""The relay on a real Kafka and PostgreSQL: fast, whole, and nothing lost when it dies."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.catalog import relay
from pipeline.catalog.files import read_account_files, read_price_files
from pipeline.catalog.publish import publish
from pipeline.core.catalog import Terms
from pipeline.core.periods import parse_instant
from pipeline.infra.avro import CATALOG, load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.rating.catalog_feed import CatalogFeed

PRICES, ACCOUNTS = demo_dir() / "prices.yaml", demo_dir() / "accounts.yaml"


@contextlib.contextmanager
def relaying(settings: Settings) -> Iterator[None]:
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            relay.run(settings, stop)
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive(), "told to stop, the relay stops"
    assert failures == []


class Topic:
    """The catalog topic as a rater reads it."""

    def __init__(self, settings: Settings) -> None:
        self._topic = Topics(settings.topic_prefix).catalog
        self._schemas = load_schemas()
        self._consumer = Consumer(
            {
                **settings.kafka,
                "group.id": "test",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 50,
            }
        )
        self._consumer.assign([TopicPartition(self._topic, 0, OFFSET_BEGINNING)])
        self.keys: list[str] = []
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> "Topic":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def read(self, timeout_s: float) -> bool:
        """One more record, or False at the end of the topic or time."""
        message = self._consumer.poll(timeout_s)
        if message is None:
            return False
        if error := message.error():
            assert error.code() == KafkaError._PARTITION_EOF, error
            return False
        self.keys.append((message.key() or b"").decode())
        self.records.append(self._schemas.decode(message.value(), CATALOG))
        return True

    def read_until(self, key: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while key not in self.keys:
            assert time.monotonic() < deadline, f"{key} did not arrive in {timeout_s} s, only {self.keys}"
            self.read(0.1)


def all_there(settings: Settings) -> Topic:
    """The topic from its beginning to its end now."""
    with Topic(settings) as topic:
        while topic.read(10.0):
            pass
    return topic


def publish_demo(settings: Settings) -> None:
    publish(settings.dsn, read_price_files([PRICES]), actor="test")
    publish(settings.dsn, read_account_files([ACCOUNTS]), actor="test")


def cheaper(folder: Path) -> Path:
    file = folder / "cheaper.yaml"
    file.write_text(PRICES.read_text().replace("0.000015", "0.000014"))
    return file


def environment_of(settings: Settings) -> dict[str, str]:
    """What makes another process talk to the same services."""
    return {
        **os.environ,
        "TALLY_KAFKA_BOOTSTRAP": str(settings.kafka_bootstrap),
        "TALLY_POSTGRES_DSN": settings.dsn,
        "TALLY_TOPIC_PREFIX": settings.topic_prefix,
    }


def waiting(settings: Settings) -> int:
    with connect(settings.dsn, application="test") as connection:
        row = connection.execute("SELECT count(*) FROM billing.outbox WHERE relayed_at IS NULL").fetchone()
    assert row is not None
    return int(row[0])


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.05)


def test_a_publication_reaches_the_topic_in_under_two_seconds(settings: Settings, tmp_path: Path) -> None:
    publish_demo(settings)
    with relaying(settings), Topic(settings) as topic:
        topic.read_until("contract/acct-11-main/1")
        begun = time.monotonic()
        publish(settings.dsn, read_price_files([cheaper(tmp_path)]), actor="test")
        topic.read_until("plan/llm-standard/2")
        took = time.monotonic() - begun
        eventually(lambda: waiting(settings) == 0)
    assert took < 2
    keys = all_there(settings).keys
    assert len(keys) == len(set(keys)) == 2 + 1 + 12 + 12 + 1


PRICE_LIST = """\
price_lists:
  - {id: own, name: Own, plan: llm-standard, currency: USD, account: acct-03, valid_from: 2026-03-01,
     charges: [{id: output-tokens, unit_price: 0.00001}]}
"""


def test_what_the_topic_holds_is_the_catalog(settings: Settings, tmp_path: Path) -> None:
    """As a rater reads it."""
    publish_demo(settings)
    (tmp_path / "own.yaml").write_text(PRICE_LIST)
    publish(settings.dsn, read_price_files([PRICES, tmp_path / "own.yaml"]), actor="test", back_dated=True)
    with relaying(settings):
        eventually(lambda: waiting(settings) == 0)
    failures: list[BaseException] = []
    feed = CatalogFeed(settings.kafka, Topics(settings.topic_prefix), load_schemas(), failures.append)
    feed.start()
    try:
        assert feed.wait_ready(20)
    finally:
        feed.stop()
        feed.join(20)
    assert failures == []
    terms = feed.view.catalog.terms("acct-03", "llm.request", parse_instant("2026-03-15T00:00:00Z"))
    assert isinstance(terms, Terms)
    assert [(charge.id, charge.unit_price) for charge, _ in terms.priced] == [
        ("input-tokens", None),
        ("output-tokens", Decimal("0.00001")),
    ]
    assert terms.segment.price_version == "llm-standard@1+own@1"
    assert all_there(settings).records[-1]["kind"] == "plan", "what older readers stop at, since it says what they lack"


KILLED = """
import os, signal, sys, threading
from pipeline.catalog import relay
from pipeline.infra.settings import Settings

def die(step):
    if step == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)

relay.run(Settings(), threading.Event(), reached=die)
"""


@pytest.mark.parametrize("step", ["produced", "committed", "marked"])
def test_killed_at_any_step_it_loses_nothing(settings: Settings, step: str) -> None:
    publish_demo(settings)
    argv = [sys.executable, "-c", KILLED, step]
    killed = subprocess.run(argv, env=environment_of(settings), timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert waiting(settings) == (0 if step == "marked" else 27)

    with relaying(settings):
        eventually(lambda: waiting(settings) == 0)
    topic = all_there(settings)
    assert len(set(topic.keys)) == 27
    # Committed but not marked: sent again, the same versions under the same keys.
    assert len(topic.keys) == (54 if step == "committed" else 27)
    by_key = dict(zip(topic.keys, topic.records, strict=True))
    assert all(by_key[key] == record for key, record in zip(topic.keys, topic.records, strict=True))


def test_a_second_relay_stands_by_and_takes_over(settings: Settings, tmp_path: Path) -> None:
    with contextlib.ExitStack() as second, Topic(settings) as topic:
        with relaying(settings):
            publish_demo(settings)
            topic.read_until("contract/acct-11-main/1")
            second.enter_context(relaying(settings))
            publish(settings.dsn, read_price_files([cheaper(tmp_path)]), actor="test")
            topic.read_until("plan/llm-standard/2")
        meters = tmp_path / "meters.yaml"
        meters.write_text("meters:\n  - {id: images, event_type: image, aggregation: count, unit: image}\n")
        publish(settings.dsn, read_price_files([meters]), actor="test")
        topic.read_until("meter/images/1")
    keys = all_there(settings).keys
    assert len(keys) == len(set(keys)) == 29


def test_a_new_kafka_gets_everything_again(settings: Settings) -> None:
    publish_demo(settings)
    with relaying(settings):
        eventually(lambda: waiting(settings) == 0)
    admin, name = AdminClient(settings.kafka), Topics(settings.topic_prefix).catalog
    admin.delete_topics([name])[name].result(15)
    eventually(lambda: name not in admin.list_topics(timeout=15).topics)
    config = Topics(settings.topic_prefix).config(name)
    admin.create_topics([NewTopic(name, 1, 1, config=config)])[name].result(15)
    with relaying(settings), Topic(settings) as topic:
        topic.read_until("contract/acct-11-main/1")
    assert len(topic.keys) == 27


def test_a_relay_outlives_its_database_connection(settings: Settings, tmp_path: Path) -> None:
    publish_demo(settings)
    with relaying(settings), Topic(settings) as topic:
        topic.read_until("contract/acct-11-main/1")
        with connect(settings.dsn, application="test", autocommit=True, role=None) as connection:
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'tally-relay'"
            ).fetchall()
        assert ended == [(True,)]
        publish(settings.dsn, read_price_files([cheaper(tmp_path)]), actor="test")
        topic.read_until("plan/llm-standard/2")


def test_a_relay_waits_for_kafka_and_says_so_once(settings: Settings) -> None:
    """Its own process, so that what it says is seen as a person sees it."""
    publish_demo(settings)
    environment = {**environment_of(settings), "TALLY_KAFKA_BOOTSTRAP": "127.0.0.1:1"}
    program = "from pipeline.infra import outbox; from pipeline.cli import main; outbox._ANSWER_S = 0.5; main()"
    argv = [sys.executable, "-c", program, "relay"]
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        kill = threading.Timer(60, process.kill)
        kill.start()
        try:
            said = next((line for line in process.stderr if "away" in line), "")
            time.sleep(3)  # two more attempts, of half a second each and a pause before
            assert process.poll() is None, "it waits"
        finally:
            process.send_signal(signal.SIGTERM)
            said += process.communicate(timeout=30)[1]
            kill.cancel()
    assert process.returncode == 0
    assert said.count("away") == 1, said
    assert "Traceback" not in said
    assert waiting(settings) == 27
