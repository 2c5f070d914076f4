"""The traps of Faust, aiokafka and librdkafka that the rater is guarded against: each test fails without its guard."""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.rating.batch import Batch, Outcome, Source
from pipeline.rating.commit import BatchAborted, Committer, Membership, StateUnknown, new_producer
from pipeline.rating.state import PartitionState
from pipeline.rating.take import take
from tests.integration.conftest import Deploy
from tests.integration.deployment import Deployment
from tests.rating.world import SCHEMAS, batch, framed, message, run, usage


def event(key: str, tokens: str = "10") -> dict[str, object]:
    at = time.time_ns() // 1000
    return usage(key, "acct-00", timestamp=at, properties={"tokens": tokens, "model": "small"})


# -- what is read


def test_only_committed_records_are_rated(deploy: Deploy) -> None:
    """Aborted ones never, those of an open transaction once it is committed, and nothing behind them before."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    producer = deployment.new_producer(**{"transactional.id": f"{deployment.settings.topic_prefix}upstream"})
    producer.init_transactions(30)

    def put(key: str) -> None:
        one = event(key)
        deployment.expect(one)
        deployment.send_raw(framed(one), b"acct-00", producer=producer)

    for round_ in range(3):
        producer.begin_transaction()
        for number in range(5):
            deployment.send_raw(framed(event(f"aborted-{round_}-{number}")), b"acct-00", producer=producer)
        producer.flush(30)
        producer.abort_transaction(30)
        producer.begin_transaction()
        put(f"committed-{round_}")
        producer.commit_transaction(30)
    deployment.rater()
    deployment.wait_done()
    assert deployment.counts()["rated"] == 3

    producer.begin_transaction()
    put("open")
    producer.flush(30)
    deployment.send_event(event("behind"))
    deployment.flush()
    time.sleep(1.5)
    assert deployment.counts()["rated"] == 3
    producer.commit_transaction(30)
    deployment.wait(lambda: deployment.counts()["rated"] == 5, "the committed event and the one behind it")
    deployment.check()


def test_records_deleted_before_they_were_rated_stop_the_worker(deploy: Deploy) -> None:
    """At start: an unknown offset is no reason to begin at the earliest one there is."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(50)
    _delete(deployment, 20)
    rater = deployment.rater()
    rater.may_die()
    assert rater.wait(30) == 1
    assert "offsets 0 to 19 were deleted before they were rated" in rater.text()
    assert "Expected retention to outlast the raters' lag" in rater.text()
    assert deployment.receipts() == []


def test_records_deleted_under_a_running_worker_stop_it_too(deploy: Deploy) -> None:
    """aiokafka resets its position without a word; what comes then begins behind a hole."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(50)
    rater = deployment.rater()
    deployment.wait_done()
    rater.signal(signal.SIGSTOP)
    deployment.send(50)  # answers the fetch that is waiting at the broker: these it has, or some of them
    time.sleep(0.7)
    on_its_way = deployment.sent.messages
    deployment.send(50)
    _delete(deployment, on_its_way + 20)
    rater.may_die()
    rater.signal(signal.SIGCONT)
    deployment.send(50)
    assert rater.wait(30) == 1
    assert "were deleted before they were rated" in rater.text()
    rated_to = deployment.positions(deployment.topics.events)[0]
    assert rated_to <= on_its_way
    assert max(receipt["next_offset"] for receipt in deployment.receipts()) == rated_to
    assert max(row["origin_offset"] for row in deployment.rows()) < rated_to


def _delete(deployment: Deployment, before: int) -> None:
    tp = TopicPartition(deployment.topics.events, 0, before)
    admin = AdminClient(deployment.settings.kafka)
    admin.delete_records([tp])[tp].result(30)


# -- what Faust would commit


def test_faust_commits_nothing_by_itself(deploy: Deploy) -> None:
    """Batches are processed but never committed: Faust's own commits, on a timer and at the end, leave no offset."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(50)
    rater = deployment.rater(never_commit=True)
    deployment.wait(lambda: rater.says("processed") > 0, "the batch to be processed")
    time.sleep(3.5)  # Faust commits every 2.8 s
    assert rater.stop() == 0
    assert deployment.positions(deployment.topics.events) == {0: 0}


def test_an_exception_in_the_agent_loses_nothing(deploy: Deploy) -> None:
    """Faust acknowledges what an agent raised on and goes on behind it; the rater leaves, and starts where it was."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(100)
    rater = deployment.rater(agent_fails=1)
    rater.may_die()
    assert rater.wait(20) == 1
    assert "RaterFailed: ZeroDivisionError: a bug in the agent" in rater.text()
    deployment.rater()
    deployment.wait_done()
    deployment.check()


def test_a_list_that_was_fetched_and_dropped_is_fetched_again(deploy: Deploy) -> None:
    """Faust drops fetched records in several places; the next that come begin behind a hole, and the rater seeks."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(300)
    rater = deployment.rater(drop_list=1)
    deployment.wait(lambda: rater.says("a list is dropped") > 0, "the first list to be dropped")
    deployment.send(20)
    deployment.wait_done()
    assert rater.says("fetching_again") > 0
    deployment.check()


# -- who may commit


@contextlib.contextmanager
def members(deployment: Deployment) -> Iterator["Members"]:
    joined = Members(deployment)
    try:
        yield joined
    finally:
        joined.close()


class Members:
    """Members of the raters' group that do nothing else, on an event loop of their own."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._consumers: list[AIOKafkaConsumer] = []

    def join(self) -> Membership:
        """One more member; returns who it is in the generation that begins with it."""

        async def joining() -> Membership:
            consumer = AIOKafkaConsumer(
                self._deployment.topics.events,
                bootstrap_servers=self._deployment.settings.kafka_bootstrap,
                group_id=self._deployment.group,
                enable_auto_commit=False,
                session_timeout_ms=6000,
                heartbeat_interval_ms=500,
            )
            await consumer.start()
            self._consumers.append(consumer)
            while not consumer._coordinator.generation > 0 or consumer._coordinator.member_id == "":
                await asyncio.sleep(0.05)
            coordinator = consumer._coordinator
            return Membership(self._deployment.group, coordinator.generation, coordinator.member_id)

        return asyncio.run_coroutine_threadsafe(joining(), self._loop).result(30)

    def close(self) -> None:
        async def leaving() -> None:
            for consumer in self._consumers:
                await consumer.stop()

        asyncio.run_coroutine_threadsafe(leaving(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _producer(deployment: Deployment) -> Producer:
    return new_producer(deployment.settings.kafka, f"{deployment.group}-0")


def _committer(deployment: Deployment, producer: Producer) -> Committer:
    return Committer(producer, topics=deployment.topics, schemas=SCHEMAS, partition=0, partitions=1, worker="test:1")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[PartitionState]:
    opened = PartitionState(tmp_path / "0", {"cluster": "test"})
    yield opened
    opened.close()


def _some_batch() -> tuple[Batch, Outcome]:
    records = [message(usage(f"k{i}"), i) for i in range(3)]
    return replace(batch(records), partition=0), run(records)


def test_a_worker_of_an_older_generation_cannot_commit(deploy: Deploy, state: PartitionState) -> None:
    """The broker itself refuses: what a worker sends with the offsets is the group's real generation."""
    deployment = deploy(partitions=1)
    one, outcome = _some_batch()
    producer = _producer(deployment)
    producer.init_transactions(30)
    committer = _committer(deployment, producer)
    with members(deployment) as group:
        first = group.join()
        committer.commit(one, outcome, 0, first, state)
        assert deployment.positions(deployment.topics.events) == {0: 3}
        positions = state.positions
        second = group.join()
        assert second.generation > first.generation
        again = replace(one, first_offset=3, next_offset=6)
        with pytest.raises(BatchAborted, match=r"(?i)generation"):
            committer.commit(again, outcome, 0, first, state)
        assert deployment.positions(deployment.topics.events) == {0: 3}
        assert len(deployment.receipts()) == 1
        assert state.positions == positions
        # With the generation there is now, it may.
        committer.commit(again, outcome, 0, second, state)
    assert deployment.positions(deployment.topics.events) == {0: 6}


def test_a_fenced_producer_changes_nothing(deploy: Deploy, state: PartitionState) -> None:
    deployment = deploy(partitions=1)
    one, outcome = _some_batch()
    old = _producer(deployment)
    old.init_transactions(30)
    _producer(deployment).init_transactions(30)
    with members(deployment) as group:
        membership = group.join()
        with pytest.raises(StateUnknown, match=r"(?i)fenced"):
            _committer(deployment, old).commit(one, outcome, 0, membership, state)
    assert (state.positions, deployment.receipts()) == (None, [])
    assert deployment.positions(deployment.topics.events) == {0: 0}


# -- taking a partition


def _take(deployment: Deployment, state: PartitionState) -> int:
    taken = take(
        _producer(deployment),
        state,
        kafka=deployment.settings.kafka,
        group=deployment.group,
        topics=deployment.topics,
        partition=0,
        stopped=lambda: False,
    )
    return taken.next_offsets[Source.EVENTS]


def _send_offsets(deployment: Deployment, producer: Producer, membership: Membership) -> None:
    offsets = [TopicPartition(deployment.topics.events, 0, 2)]
    producer.send_offsets_to_transaction(offsets, membership.metadata(), 30)


def test_the_old_owners_open_transaction_ends_before_the_offset_is_read(deploy: Deploy, state: PartitionState) -> None:
    """Step 1 of taking aborts it; were the offset read first, the old owner could still move it afterwards."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(5)
    old = _producer(deployment)
    old.init_transactions(30)
    with members(deployment) as group:
        old.begin_transaction()
        old.produce(deployment.topics.seen, b"never seen", partition=0)
        _send_offsets(deployment, old, group.join())
        started = time.monotonic()
        assert _take(deployment, state) == 0
        assert time.monotonic() - started < 10  # aborted, not waited out
        with pytest.raises(KafkaException):
            old.commit_transaction(10)
    assert deployment.positions(deployment.topics.events) == {0: 0}
    assert state.positions is None


def test_an_offset_that_is_being_committed_is_waited_for(deploy: Deploy, state: PartitionState) -> None:
    """Stable offsets: while a transaction that moves them is pending, there is no answer but to wait."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(5)
    other = new_producer(deployment.settings.kafka, f"{deployment.group}-another")
    other.init_transactions(30)
    with members(deployment) as group, ThreadPoolExecutor(1) as pool:
        other.begin_transaction()
        _send_offsets(deployment, other, group.join())
        taking = pool.submit(_take, deployment, state)
        time.sleep(2)
        assert not taking.done()
        other.commit_transaction(30)
        assert taking.result(30) == 2
