"""Each lock on "once" (law 7) alone: the others are off, and it is enough.

(a) The rater's transaction, fenced by transactional id and by generation; (b) the sink's unique rows.
"""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg.sql import SQL, Identifier

from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.rating.commit import TRANSACTION_TIMEOUT_MS, BatchAborted, StateUnknown
from pipeline.rating.state import PartitionState
from tests.billing.rater import Rater as BillingRater
from tests.billing.records import rated_record
from tests.billing.running import query, running_sink, wait_until
from tests.conftest import fresh_settings
from tests.integration.conftest import Deploy
from tests.integration.deployment import Deployment
from tests.integration.members import committer, members, producer, some_batch


@pytest.fixture
def deployment(settings: Settings) -> Iterator[Deployment]:
    """Topics and a database."""
    made = Deployment(settings.model_copy(update={"session_timeout": 6, "batch_records": 50}))
    with contextlib.closing(made):
        yield made


def billed(settings: Settings) -> Counter[tuple[str, str]]:
    """Rows in PostgreSQL by identity and charge."""
    rows = query(settings, "SELECT identity::text, charge FROM billing.rated_usage")
    return Counter((identity, charge) for identity, charge in rows)


def assert_lines_are_sums_of_rows(settings: Settings) -> None:
    differences = query(
        settings,
        """SELECT line.id FROM billing.invoice_line AS line
        LEFT JOIN billing.rated_usage AS usage ON usage.line_id = line.id
        GROUP BY line.id HAVING (line.amount, line.quantity, line.events)
            IS DISTINCT FROM (sum(usage.amount), sum(usage.quantity), count(usage))""",
    )
    assert differences == []


# -- a transaction that nobody ends, at work beside all other tests here


@pytest.fixture(scope="module", autouse=True)
def held(
    services: Endpoints, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Future[float]"]:
    """Seconds that the transaction of a dead rater held up the sink."""
    folder = tmp_path_factory.mktemp("held")
    with ThreadPoolExecutor(1) as pool, fresh_settings(services, template_database, folder, partitions=1) as settings:
        future = pool.submit(_hold, settings)
        yield future
        wait([future])


def _hold(settings: Settings) -> float:
    with contextlib.closing(Deployment(settings)) as deployment, running_sink(settings) as sink:
        deployment.publish_all()
        deployment.send(20)
        deployment.rater(module="tests.integration.trapped", dies_in_transaction=True).wait()
        died = time.monotonic()
        other = BillingRater(settings)
        with other.transaction():
            other.rated([rated_record(account="behind the open transaction")])
        sink.wait(3)
        assert query(settings, "SELECT 1 FROM billing.rated_usage") == []
        wait_until(lambda: bool(query(settings, "SELECT 1 FROM billing.rated_usage")), "the row behind it", sink)
        took = time.monotonic() - died
        assert query(settings, "SELECT account FROM billing.rated_usage") == [("behind the open transaction",)]
        return took


# -- (a) alone: the table takes the same row again


def _drop_uniqueness(settings: Settings) -> None:
    """Of the rows' table, before it has partitions: those are made like it."""
    with connect(settings.dsn, application="test", role=None) as connection:
        [[name]] = connection.execute(
            "SELECT conname FROM pg_constraint WHERE conrelid = 'billing.rated_usage'::regclass AND contype = 'u'"
        ).fetchall()
        connection.execute(SQL("ALTER TABLE billing.rated_usage DROP CONSTRAINT {}").format(Identifier(name)))


def test_transactions_alone_give_once(deployment: Deployment) -> None:
    """Raters killed in the middle of a transaction and right behind it, the second time without its disk."""
    settings = deployment.settings
    _drop_uniqueness(settings)
    deployment.publish_all()
    deployment.send(800)
    with running_sink(settings) as sink:
        for step in ("offsets_sent", "committed"):
            deployment.rater(die_at=step, nth=6).wait()
            deployment.send(200)
        shutil.rmtree(settings.data_dir / "rater")
        deployment.rater()
        deployment.wait_done()
        deployment.check()
        rows = len(deployment.rows())
        wait_until(lambda: billed(settings).total() >= rows, f"{rows} rows", sink)
        sink.wait(1.0)
    assert set(billed(settings).values()) == {1}
    assert billed(settings).total() == rows
    assert_lines_are_sums_of_rows(settings)
    assert query(settings, "SELECT * FROM billing.quarantine") == []
    # Nothing else would have kept a row from standing there twice.
    query(settings, "INSERT INTO billing.rated_usage SELECT * FROM billing.rated_usage LIMIT 1 RETURNING identity")
    assert max(billed(settings).values()) == 2


# -- (b) alone: a rater commits twice


def test_unique_rows_alone_give_once(deployment: Deployment, tmp_path: Path) -> None:
    """The same batch from two producers that fence each other in nothing, each with a state of its own."""
    settings = deployment.settings
    batch, outcome = some_batch()
    with members(deployment) as group:
        membership = group.join()
        for name in ("first", "second"):
            once = producer(deployment, name)
            once.init_transactions(30)
            with contextlib.closing(PartitionState(tmp_path / name, {"cluster": "test"})) as state:
                committer(deployment, once).commit(batch, outcome, 0, membership, state)
    assert len(deployment.rows()) == 2 * len(outcome.rows) == 6
    assert len(deployment.receipts()) == 2
    with running_sink(settings) as sink:
        wait_until(lambda: len(query(settings, "SELECT 1 FROM billing.quarantine")) == 4, "the second copies", sink)
    assert sorted(billed(settings).values()) == [1, 1, 1]
    assert_lines_are_sums_of_rows(settings)
    # Reported, with their bytes: never silently dropped.
    quarantined = query(settings, "SELECT reason, value FROM billing.quarantine ORDER BY rated_topic, rated_offset")
    assert Counter(reason for reason, _ in quarantined) == {"already_billed": 3, "already_receipted": 1}
    values = [message.value() for message in deployment.read(deployment.topics.rated)]
    assert [value for reason, value in quarantined if reason == "already_billed"] == values[3:]
    assert query(settings, "SELECT count(*) FROM billing.receipt") == [(1,)]


# -- fencing: a zombie that wakes after its partition moved


@pytest.fixture
def state(tmp_path: Path) -> Iterator[PartitionState]:
    with contextlib.closing(PartitionState(tmp_path / "0", {"cluster": "test"})) as opened:
        yield opened


def test_a_worker_of_an_older_generation_cannot_commit(deploy: Deploy, state: PartitionState) -> None:
    """The broker itself refuses: what a worker sends with the offsets is the group's real generation."""
    deployment = deploy(partitions=1)
    batch, outcome = some_batch()
    mine = producer(deployment)
    mine.init_transactions(30)
    with members(deployment) as group:
        first = group.join()
        committer(deployment, mine).commit(batch, outcome, 0, first, state)
        assert deployment.positions(deployment.topics.events) == {0: 3}
        positions = state.positions
        second = group.join()
        assert second.generation > first.generation
        again = replace(batch, first_offset=3, next_offset=6)
        with pytest.raises(BatchAborted, match=r"(?i)generation"):
            committer(deployment, mine).commit(again, outcome, 0, first, state)
        assert deployment.positions(deployment.topics.events) == {0: 3}
        assert len(deployment.receipts()) == 1
        assert state.positions == positions
        # With the generation there is now, it may.
        committer(deployment, mine).commit(again, outcome, 0, second, state)
    assert deployment.positions(deployment.topics.events) == {0: 6}


@pytest.mark.parametrize("name", ["0", "another"], ids=["the same transactional id", "another transactional id"])
def test_a_new_producer_does_not_help_a_worker_of_an_older_generation(
    deploy: Deploy, state: PartitionState, name: str
) -> None:
    """Generation alone: the zombie's new producer is fenced by nobody, and with the same id even fences the heir's."""
    deployment = deploy(partitions=1)
    batch, outcome = some_batch()
    with members(deployment) as group:
        zombie, heir = group.join(), group.join()
        heirs = producer(deployment)
        heirs.init_transactions(30)
        woken = producer(deployment, name)
        woken.init_transactions(30)
        for _ in range(2):  # nor does trying again
            with pytest.raises(BatchAborted, match=r"(?i)generation"):
                committer(deployment, woken).commit(batch, outcome, 0, zombie, state)
        assert (state.positions, deployment.rows(), deployment.receipts()) == (None, [], [])
        assert deployment.positions(deployment.topics.events) == {0: 0}
        if name == "0":  # the heir learns it was fenced, leaves, and comes back with a new producer
            with pytest.raises(StateUnknown, match=r"(?i)fenced"):
                committer(deployment, heirs).commit(batch, outcome, 0, heir, state)
            heirs = producer(deployment)
            heirs.init_transactions(30)
        committer(deployment, heirs).commit(batch, outcome, 0, heir, state)
    assert len(deployment.rows()) == len(outcome.rows)
    assert deployment.positions(deployment.topics.events) == {0: 3}


FENCED_AT = ("before it begins", "rows_produced", "offsets_sent")


@pytest.mark.parametrize("step", FENCED_AT)
def test_an_older_producer_cannot_commit_whatever_its_generation(
    deploy: Deploy, state: PartitionState, step: str
) -> None:
    """Transactional id alone: the generation is the current one, as if the group had not yet noticed."""
    deployment = deploy(partitions=1)
    batch, outcome = some_batch()
    old, heirs = producer(deployment), producer(deployment)
    old.init_transactions(30)

    def take_over(at: str) -> None:
        if at == step:
            old.flush(30)  # what it wrote stands in the log, in its open transaction
            heirs.init_transactions(30)

    with members(deployment) as group:
        membership = group.join()
        take_over("before it begins")
        with pytest.raises(StateUnknown, match=r"(?i)fenced|fatal"):
            committer(deployment, old, take_over).commit(batch, outcome, 0, membership, state)
        assert (state.positions, deployment.rows(), deployment.receipts()) == (None, [], [])
        assert deployment.positions(deployment.topics.events) == {0: 0}
        committer(deployment, heirs).commit(batch, outcome, 0, membership, state)
    assert len(deployment.rows()) == len(outcome.rows)
    assert deployment.positions(deployment.topics.events) == {0: 3}


# -- at last


def test_a_dead_raters_transaction_holds_the_sink_no_longer_than_its_timeout(held: "Future[float]") -> None:
    """15 s, and up to 10 s more until the broker looks. An heir that takes the partition ends it at once."""
    took = held.result(90)
    print(f"{took:.1f} s from SIGKILL until the sink went on")
    assert took < TRANSACTION_TIMEOUT_MS / 1000 + 10 + 10
