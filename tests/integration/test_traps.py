"""The traps of Faust, aiokafka and librdkafka that the rater is guarded against: each test fails without its guard."""

import signal
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.rating.batch import Source
from pipeline.rating.commit import Membership
from pipeline.rating.state import PartitionState
from pipeline.rating.take import take
from tests.integration.conftest import Deploy
from tests.integration.deployment import ROOT, Deployment
from tests.integration.members import members, producer
from tests.rating.world import framed, usage


def event(key: str, tokens: str = "10") -> dict[str, object]:
    at = time.time_ns() // 1000
    return usage(key, "acct-00", timestamp=at, properties={"tokens": tokens, "model": "small"})


# -- what is read


def test_only_committed_records_are_rated(deploy: Deploy) -> None:
    """Aborted ones never, those of an open transaction once it is committed, and nothing behind them before."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    upstream = deployment.new_producer(**{"transactional.id": f"{deployment.settings.topic_prefix}upstream"})
    upstream.init_transactions(30)

    def put(key: str) -> None:
        one = event(key)
        deployment.expect(one)
        deployment.send_raw(framed(one), b"acct-00", producer=upstream)

    for round_ in range(3):
        upstream.begin_transaction()
        for number in range(5):
            deployment.send_raw(framed(event(f"aborted-{round_}-{number}")), b"acct-00", producer=upstream)
        upstream.flush(30)
        upstream.abort_transaction(30)
        upstream.begin_transaction()
        put(f"committed-{round_}")
        upstream.commit_transaction(30)
    deployment.rater()
    deployment.wait_done()
    assert deployment.counts()["rated"] == 3

    upstream.begin_transaction()
    put("open")
    upstream.flush(30)
    deployment.send_event(event("behind"))
    deployment.flush()
    time.sleep(1.5)
    assert deployment.counts()["rated"] == 3
    upstream.commit_transaction(30)
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


def test_lists_that_were_read_before_are_cut(deploy: Deploy) -> None:
    """Faust takes a list for new by its last offset; what stands before the rater's own position is no repeat."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    rater = deployment.rater(module="tests.integration.trapped", overlaps=True)
    for _ in range(3):
        deployment.send(50)
        deployment.wait_done()
    assert rater.says("overlaps") > 0
    deployment.check()


def test_what_was_fetched_while_its_partition_was_paused_is_not_dropped(deploy: Deploy) -> None:
    """Faust drops it without a word; whenever a partition has enough for a while, it is paused so."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    deployment.send(100)
    rater = deployment.rater(module="tests.integration.trapped", is_paused=True)
    deployment.wait_done()
    assert rater.says("is paused") > 0
    assert rater.says("fetching_again") == 0
    deployment.check()


# -- taking a partition


@pytest.fixture
def state(tmp_path: Path) -> Iterator[PartitionState]:
    opened = PartitionState(tmp_path / "0", {"cluster": "test"})
    yield opened
    opened.close()


def _take(deployment: Deployment, state: PartitionState) -> int:
    taken = take(
        producer(deployment),
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
    old = producer(deployment)
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
    other = producer(deployment, "another")
    other.init_transactions(30)
    with members(deployment) as group, ThreadPoolExecutor(1) as pool:
        other.begin_transaction()
        _send_offsets(deployment, other, group.join())
        taking = pool.submit(_take, deployment, state)
        time.sleep(2)
        assert not taking.done()
        other.commit_transaction(30)
        assert taking.result(30) == 2


# -- when a worker dies


def test_an_offset_that_went_back_is_not_believed(deploy: Deploy) -> None:
    """As a broker that was killed answered once: its offset of a while ago, for what was rated long since."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    first = deployment.rater()
    deployment.send(300)
    deployment.wait_done()
    first.stop()
    events, group = deployment.topics.events, f"{deployment.settings.topic_prefix}rater"
    back = ConsumerGroupTopicPartitions(group, [TopicPartition(events, 0, 100)])
    admin = AdminClient(deployment.settings.kafka)
    admin.alter_consumer_group_offsets([back])[group].result(30)
    assert deployment.positions(events)[0] == 100
    deployment.send(50)
    second = deployment.rater()
    deployment.wait_done()
    assert second.says("committed_offset_went_back") == 1
    deployment.check()
    assert deployment.counts()["duplicates"] == 0


def test_after_a_sigkill_the_other_worker_goes_on_within_seconds(deploy: Deploy) -> None:
    """Faust's session timeout is a minute: as long would nobody rate a dead worker's partitions."""
    deployment = deploy(partitions=2)
    deployment.publish_all()
    deployment.send(100)
    killed, heir = deployment.rater(), deployment.rater()
    deployment.wait(
        lambda: killed.says("partition_taken") > 0 and heir.says("partition_taken") > 0, "both to own a partition"
    )
    deployment.wait_done()
    killed.kill()
    died = time.monotonic()
    deployment.send(100)
    deployment.wait_done()
    took = time.monotonic() - died
    print(f"{took:.1f} s from SIGKILL until everything was rated")
    assert took < 30
    deployment.check()


# -- the libraries themselves


def test_what_the_rater_relies_on_the_inside_of_is_pinned() -> None:
    """Another version may have other traps: they are looked for before it comes in."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in ("faust-streaming", "mode-streaming", "aiokafka", "confluent-kafka"):
        assert f"{name}=={version(name)}" in wanted
