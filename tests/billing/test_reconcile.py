"""Closed accounting on real services: a world that adds up, then each way in which it may not."""

from decimal import Decimal

import pytest
from confluent_kafka import Producer

from pipeline.billing.reconcile import Check, Reconciliation, reconcile
from pipeline.infra.avro import Record
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.rater import Rater
from tests.billing.records import letter_record, rated_record, receipt_record, resolution, sequences
from tests.billing.running import running_sink, wait_until


def arrive(settings: Settings, rater: Rater, *, partition: int, count: int) -> None:
    """Records on usage.events, as producers send them: in no transaction."""
    producer = Producer(settings.kafka)
    for _ in range(count):
        producer.produce(rater.topics.events, b"event", partition=partition)
    assert producer.flush(10) == 0


def a_world(settings: Settings, rater: Rater) -> None:
    """10 arrivals: 5 rated at once and 1 after parking, 2 duplicates, 1 parked, 1 dead; 12 rows."""
    prefix = settings.topic_prefix
    arrive(settings, rater, partition=0, count=7)
    arrive(settings, rater, partition=1, count=3)

    def rows(keys: range) -> list[Record]:
        return [rated_record(key=f"k{n}", charge=charge, amount="0.1") for n in keys for charge in ("input", "output")]

    with rater.transaction():
        rater.rated(rows(range(3)))
        rater.receipt(
            receipt_record(
                prefix, count=4, rated=3, duplicates=1, rated_rows=6, sequences=[sequences("s", 0, 1, 2, 3, 4)]
            )
        )
    with rater.transaction():
        rater.rated(rows(range(3, 5)))
        rater.letter(letter_record(prefix, offset=6), dead=False)
        rater.receipt(
            receipt_record(
                prefix, first=4, count=3, rated=2, parked=1, rated_rows=4, sequences=[sequences("s", 0, 5, 6, 7)]
            )
        )
    with rater.transaction():
        rater.letter(letter_record(prefix, partition=1, offset=1, reason="not_a_number"), dead=True)
        rater.letter(letter_record(prefix, partition=1, offset=0), dead=False, partition=1)
        rater.receipt(
            receipt_record(prefix, partition=1, count=3, rated=0, duplicates=1, parked=1, dead_lettered=1, rated_rows=0)
        )
    with rater.transaction():  # the one parked on partition 1 is rated
        rater.rated(rows(range(5, 6)))
        rater.receipt(
            receipt_record(
                prefix,
                topic=rater.topics.retry,
                partition=1,
                count=1,
                rated_rows=2,
                resolutions=[resolution(1, 0, "rated")],
            )
        )


@pytest.fixture
def world(settings: Settings) -> Settings:
    rater = Rater(settings)
    a_world(settings, rater)
    with running_sink(settings) as thread:
        wait_until(lambda: reconcile(settings).lag == 0, "the sink to catch up", thread)
    return settings


def execute(settings: Settings, statement: str) -> None:
    with connect(settings.dsn, application="test") as connection:
        connection.execute(statement)


def differing(result: Reconciliation) -> list[Check]:
    return [check for check in result.checks if check.difference]


def test_a_world_that_adds_up(world: Settings) -> None:
    result = reconcile(world)
    assert differing(result) == []
    assert result.reconciled
    found = {
        check.name.replace(world.topic_prefix, ""): (check.left, check.right, check.detail) for check in result.checks
    }
    assert found == {
        "events arrived = in a state": (10, 10, "rated 6 + duplicates 2 + parked 1 + dead-lettered 1"),
        "offsets of usage.events = with one receipt": (10, 10, "all"),
        "offsets of usage.retry = with one receipt": (1, 1, "all"),
        "records in receipts = with one outcome": (11, 11, "all"),
        "rated on retry = events resolved": (1, 1, "once parked or replayed, now rated"),
        "rated rows in receipts = in PostgreSQL": (12, 12, "billed 12 + quarantined 0"),
        "lines = with the sums of their rows": (2, 2, "all"),
        "USD of rows = USD of lines": (Decimal("1.2"), Decimal("1.2"), "exact, unrounded"),
        "sequence numbers sent = arrived": (7, 7, "1 source without holes"),
    }


def test_nothing_at_all_adds_up(settings: Settings) -> None:
    result = reconcile(settings)
    assert result.reconciled
    assert result.lag == 0


def test_what_is_not_rated_or_written_yet_is_lag(world: Settings) -> None:
    rater = Rater(world)
    arrive(world, rater, partition=2, count=5)
    with rater.transaction():
        rater.rated([rated_record(key="later")], partition=3)
    result = reconcile(world, wait_s=0.2)
    assert result.reconciled
    lags = {(lag.stage, lag.topic.removeprefix(world.topic_prefix)): lag.offsets for lag in result.lags if lag.offsets}
    assert lags == {("rater", "usage.events"): 5, ("sink", "usage.rated"): 2}  # a record and its marker


def test_transaction_markers_are_no_arrivals(world: Settings) -> None:
    """A producer may use transactions: the receipt's run of offsets is longer than its records."""
    rater = Rater(world)
    with rater.transaction():
        rater.raw(rater.topics.events, b"event", partition=3)
    assert reconcile(world).lag == 2
    with rater.transaction():
        rater.receipt(
            receipt_record(world.topic_prefix, partition=3, count=1, next_offset=2, rated=0, duplicates=1, rated_rows=0)
        )
    with running_sink(world) as thread:
        wait_until(lambda: reconcile(world).lag == 0, "the sink", thread)
    assert differing(reconcile(world)) == []


@pytest.mark.parametrize(
    ("break_it", "name", "difference", "detail"),
    [
        pytest.param(
            "DELETE FROM billing.receipt WHERE first_offset = 0 AND partition = 0 AND topic LIKE '%usage.events'",
            "offsets of usage.events = with one receipt",
            4,
            "no receipt for partition 0 offsets 0 to 3",
            id="a receipt is missing",
        ),
        pytest.param(
            """INSERT INTO billing.receipt SELECT topic, partition, 2, 5, 4, 3, 3, 0, 0, 0, 3, NULL, 'r', 1, now()
            FROM billing.receipt WHERE first_offset = 4""",
            "offsets of usage.events = with one receipt",
            3,
            "two receipts for partition 0 offsets 2 to 3; two receipts for partition 0 offsets 4 to 4",
            id="receipts overlap",
        ),
        pytest.param(
            "DELETE FROM billing.unrated_event WHERE state = 'parked'",
            "events arrived = in a state",
            1,
            "rated 6 + duplicates 2 + parked 0 + dead-lettered 1",
            id="a parked event is forgotten",
        ),
        pytest.param(
            "UPDATE billing.unrated_event SET state = 'parked' WHERE state = 'rated'",
            "rated on retry = events resolved",
            1,
            "once parked or replayed, now rated",
            id="a resolution is forgotten",
        ),
        pytest.param(
            "UPDATE billing.receipt SET duplicates = 0 WHERE partition = 1 AND topic LIKE '%usage.events'",
            "records in receipts = with one outcome",
            1,
            "usage.events 1 from 0: 3 records, 2 outcomes",
            id="a record without outcome",
        ),
        pytest.param(
            "DELETE FROM billing.rated_usage WHERE idempotency_key = 'k2' AND charge = 'input'",
            "rated rows in receipts = in PostgreSQL",
            1,
            "billed 11 + quarantined 0",
            id="a rated row is missing",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET amount = amount + 0.000000000001 WHERE charge = 'input'",
            "USD of rows = USD of lines",
            Decimal("-0.000000000001"),
            "exact, unrounded",
            id="a line has a trillionth more",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET amount = amount + CASE charge WHEN 'input' THEN 1 ELSE -1 END",
            "lines = with the sums of their rows",
            2,
            "line:1 holds 1.600000000000 for 6.000000000, its rows 0.600000000000 for 6.000000000",
            id="two lines are off and their sum is not",
        ),
        pytest.param(
            "UPDATE billing.source_sequence SET bits = set_bit(set_bit(set_bit(bits, 2, 0), 3, 0), 5, 0)",
            "sequence numbers sent = arrived",
            3,
            "s misses 2 to 3, 5",
            id="sequence numbers are missing",
        ),
        pytest.param(
            "UPDATE billing.source_sequence SET block = 2",
            "sequence numbers sent = arrived",
            2000,
            "s misses 1 to 2000",
            id="whole blocks are missing",
        ),
    ],
)
def test_every_difference_is_found_and_placed(
    world: Settings, break_it: str, name: str, difference: int | Decimal, detail: str
) -> None:
    execute(world, break_it)
    result = reconcile(world)
    assert not result.reconciled
    found = {
        check.name.replace(world.topic_prefix, ""): (check.difference, check.detail.replace(world.topic_prefix, ""))
        for check in differing(result)
    }
    assert name in found, found
    assert found[name][0] == difference
    assert detail in found[name][1]


def test_quarantined_rows_are_accounted_for(world: Settings) -> None:
    rater = Rater(world)
    with rater.transaction():
        rater.rated([rated_record(key="k0", charge="input")])
        rater.raw(rater.topics.rated, b"\xff")
    with running_sink(world) as thread:
        wait_until(lambda: reconcile(world).lag == 0, "the sink", thread)
    (check,) = differing(reconcile(world))
    assert (check.difference, check.detail) == (-2, "billed 12 + quarantined 2")


def test_grace_leaves_out_what_may_still_come(world: Settings) -> None:
    execute(world, "UPDATE billing.source_sequence SET bits = set_bit(bits, 2, 0)")
    assert not reconcile(world).reconciled
    assert reconcile(world, grace_s=60).reconciled
    execute(world, "UPDATE billing.source_sequence SET updated_at = now() - interval '2 minutes'")
    assert not reconcile(world, grace_s=60).reconciled


def test_waits_for_the_sink(settings: Settings) -> None:
    a_world(settings, Rater(settings))
    assert reconcile(settings).lag > 0
    with running_sink(settings):
        result = reconcile(settings, wait_s=30)
    assert (result.lag, differing(result)) == (0, [])
