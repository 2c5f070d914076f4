"""Closed accounting on real services: a world that adds up, then each way in which it may not."""

from decimal import Decimal
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.billing import reconcile as reconcile_module
from pipeline.billing.reconcile import Check, Reconciliation, reconcile
from pipeline.core.charges import Charge, Tier
from pipeline.core.meters import Meter
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.plans import Plan
from pipeline.infra.avro import Record
from pipeline.infra.settings import Settings
from tests.billing.rater import Rater
from tests.billing.records import MAY, NOON, letter_record, rated_record, receipt_record, resolution, sequences
from tests.billing.running import meter, per_unit, publish, query, running_sink, tamper, wait_until


def arrive(settings: Settings, rater: Rater, *, partition: int, count: int) -> None:
    """Records on usage.events, as producers send them: in no transaction."""
    producer = Producer(settings.kafka)
    for _ in range(count):
        producer.produce(rater.topics.events, b"event", partition=partition)
    assert producer.flush(10) == 0


def a_world(settings: Settings, rater: Rater) -> None:
    """10 arrivals: 5 rated at once and 1 after parking, 2 duplicates, 1 parked, 1 dead; 12 rows."""
    prefix = settings.topic_prefix
    publish(settings, per_unit(input="0.1", output="0.1"), meter())
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
        "corrections in receipts = with their rows": (0, 0, "applied 0; on their way 0, refused 0"),
        "rated rows in receipts = in PostgreSQL": (12, 12, "billed 12 + quarantined 0"),
        "messages quarantined = none": (0, 0, "none"),
        "lines = with the sums of their rows and entries": (2, 2, "all"),
        "USD of rows and entries = of lines": (Decimal("1.2"), Decimal("1.2"), "exact, unrounded"),
        "counters = with the price of their quantity": (2, 2, "all"),
        "counters = under today's prices": (2, 2, "all"),
        "lines = by the versions valid at their events": (2, 2, "all"),
        "sequence numbers sent = arrived": (7, 7, "1 source without holes"),
        "events by control totals = arrived": (0, 0, "0 hours of producers, all there"),
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


def in_transactions(settings: Settings, *, told: int = 1) -> Settings:
    """A producer used transactions, one of them aborted: of four offsets on partition 3 one is a record.

    The receipt says that ``told`` are.
    """
    rater = Rater(settings)
    for abort in (True, False):
        with rater.transaction(abort=abort):
            rater.raw(rater.topics.events, b"event", partition=3)
    assert reconcile(settings).lag == 4
    more = {"next_offset": 4, "rated": 0, "duplicates": told, "rated_rows": 0}
    with rater.transaction():
        rater.receipt(receipt_record(settings.topic_prefix, partition=3, count=told, **more))
    with running_sink(settings) as thread:
        wait_until(lambda: reconcile(settings).lag == 0, "the sink", thread)
    return settings


def arrivals(settings: Settings) -> tuple[int, int, str]:
    (check,) = (check for check in reconcile(settings).checks if check.name == "events arrived = in a state")
    return int(check.left), int(check.right), check.detail


def test_transaction_markers_are_no_arrivals(world: Settings) -> None:
    result = reconcile(in_transactions(world))
    assert differing(result) == []
    assert arrivals(world) == (
        11,
        11,
        "rated 6 + duplicates 3 + parked 1 + dead-lettered 1; 4 offsets of transactions counted at the broker",
    )


def test_records_in_transactions_are_counted_at_the_broker(world: Settings) -> None:
    """A receipt that takes a record for a marker adds up in itself; the broker knows better."""
    left, right, detail = arrivals(in_transactions(world, told=0))
    assert (left, right) == (11, 10)
    assert "partition 3 offsets 0 to 3 hold 1 records, their receipt says 0" in detail


def test_what_is_not_counted_at_the_broker_is_said(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile_module, "COUNTED_MAX", 1)
    left, right, detail = arrivals(in_transactions(world))
    assert (left, right) == (11, 11)
    assert detail.endswith("; 1 records in transactions by receipts alone")


def test_records_deleted_before_they_were_rated(world: Settings) -> None:
    """The log is read to its end, so there is no lag: only where it begins tells of the loss."""
    rater = Rater(world)
    arrive(world, rater, partition=2, count=5)
    partition = TopicPartition(rater.topics.events, 2, 5)
    admin = AdminClient(world.kafka)
    admin.delete_records([partition])[partition].result(15)
    result = reconcile(world)
    assert result.lag == 0
    (check,) = differing(result)
    assert (check.difference, check.detail) == (5, "partition 2 offsets 0 to 4 were deleted before they were rated")


def test_a_log_shorter_than_what_was_rated(world: Settings) -> None:
    rater = Rater(world)
    extra = {"rated": 0, "duplicates": 3, "rated_rows": 0}
    with rater.transaction():
        rater.receipt(receipt_record(world.topic_prefix, partition=1, first=3, count=3, **extra))
    with running_sink(world) as thread:
        wait_until(lambda: reconcile(world).lag == 0, "the sink", thread)
    found = {check.name.replace(world.topic_prefix, ""): check for check in differing(reconcile(world))}
    assert {name: check.difference for name, check in found.items()} == {
        "events arrived = in a state": -3,
        "offsets of usage.events = with one receipt": 3,
    }
    assert "partition 1 ends at 3, but was rated up to 6" in found["offsets of usage.events = with one receipt"].detail


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
            "USD of rows and entries = of lines",
            Decimal("-0.000000000001"),
            "exact, unrounded",
            id="a line has a trillionth more",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET amount = amount + CASE charge WHEN 'input' THEN 1 ELSE -1 END",
            "lines = with the sums of their rows and entries",
            2,
            "line:1 holds 1.600000000000 for 6.000000000, its rows and entries 0.600000000000 for 6.000000000",
            id="two lines are off and their sum is not",
        ),
        pytest.param(
            "UPDATE billing.source_sequence SET bits = set_bit(set_bit(set_bit(bits, 2, 0), 3, 0), 5, 0)",
            "sequence numbers sent = arrived",
            3,
            "s misses 2-3 (",
            id="sequence numbers are missing",
        ),
        pytest.param(
            "UPDATE billing.source_sequence SET bits = set_bit(set_bit(set_bit(bits, 2, 0), 3, 0), 5, 0)",
            "sequence numbers sent = arrived",
            3,
            "s misses 5 (",
            id="further sequence numbers are missing",
        ),
        pytest.param(
            "UPDATE billing.source SET highest = 2007",
            "sequence numbers sent = arrived",
            2000,
            "s misses 8-2007",
            id="whole blocks are missing",
        ),
        pytest.param(
            "INSERT INTO billing.control_total VALUES "
            "('s', '2026-05-01T09:00Z', 1, 9, 7, 2, 0, 0, "
            '\'[{"first": 8, "last": 9, "reason": "too large"}]\', now())',
            "sequence numbers sent = arrived",
            2,
            "s misses 8-9 (emitted 2026-05-01 09:00Z to 2026-05-01 10:00Z, nothing since ",
            id="a producer emitted more",
        ),
        pytest.param(
            "INSERT INTO billing.control_total VALUES ('s', '2026-05-01T09:00Z', 1, 9, 9, 0, 0, 0, '[]', now())",
            "events by control totals = arrived",
            2,
            "s emitted 9 in the hour from 2026-05-01T09:00:00Z, 7 arrived",
            id="less than an hour's total arrived",
        ),
    ],
)
def test_every_difference_is_found_and_placed(
    world: Settings, break_it: str, name: str, difference: int | Decimal, detail: str
) -> None:
    tamper(world, break_it)
    result = reconcile(world)
    assert not result.reconciled
    found = {
        check.name.replace(world.topic_prefix, ""): (check.difference, check.detail.replace(world.topic_prefix, ""))
        for check in differing(result)
    }
    assert name in found, found
    assert found[name][0] == difference
    assert detail in found[name][1]


def write(settings: Settings, rows: list[Record]) -> None:
    """Rated rows through the sink, with a receipt that covers as many arrivals on partition 3."""
    rater = Rater(settings)
    (reached,) = query(
        settings,
        "SELECT coalesce(max(next_offset), 0) FROM billing.receipt WHERE topic = %s AND partition = 3",
        rater.topics.events,
    )[0]
    arrive(settings, rater, partition=3, count=len(rows))
    with rater.transaction():
        rater.rated(rows)
        rater.receipt(receipt_record(settings.topic_prefix, partition=3, first=reached, count=len(rows)))
    with running_sink(settings) as thread:
        wait_until(lambda: reconcile(settings).lag == 0, "the sink", thread)


def test_quarantined_rows_are_accounted_for_and_a_finding(world: Settings) -> None:
    write(world, [rated_record(key="k0", charge=charge, amount="0.1") for charge in ("input", "output")])
    result = reconcile(world)
    (check,) = differing(result)
    assert (check.name, check.difference) == ("messages quarantined = none", 2)
    assert check.detail.startswith(f"already_billed 2: {world.topic_prefix}usage.rated/0/")
    (rows,) = (check for check in result.checks if check.name.startswith("rated rows"))
    assert rows.detail == "billed 12 + quarantined 2"


def test_usage_after_the_close_adds_up_with_what_was_closed(world: Settings) -> None:
    """A counter's price is that of its lines in the closed invoice and in its supplement together."""
    query(world, "UPDATE billing.invoice SET state = 'issued' RETURNING id")
    write(world, [rated_record(key="late", amount="0.1")])
    assert query(world, "SELECT supplement, state::text FROM billing.invoice ORDER BY 1")[-1] == (1, "open")
    assert differing(reconcile(world)) == []
    tamper(world, "UPDATE billing.invoice_line SET amount = amount + 1 WHERE events = 1")
    assert any(check.name.startswith("counters = with the price") for check in differing(reconcile(world)))


def test_a_second_receipt_is_a_finding(world: Settings) -> None:
    rater = Rater(world)
    with rater.transaction():
        rater.receipt(receipt_record(world.topic_prefix, count=4, worker="another"))
    with running_sink(world) as thread:
        wait_until(lambda: reconcile(world).lag == 0, "the sink", thread)
    (check,) = differing(reconcile(world))
    assert check.detail.startswith("already_receipted 1: ")


# -- the price of a counter

TIERED = Charge(
    "input",
    "tokens",
    "graduated",
    tiers=(Tier(20 * QUANTITY_ONE, Decimal(1)), Tier(None, Decimal("0.5"))),
)


def tiered(*versions: Plan | Meter) -> tuple[Plan | Meter, ...]:
    """Units cost 1 each up to 20 and 0.5 beyond."""
    return (Plan("basic", 1, "Basic", "USD", 0, (TIERED,)), *versions)


def named(settings: Settings, name: str) -> tuple[Decimal, str]:
    (check,) = (check for check in reconcile(settings).checks if check.name == name)
    return check.difference, check.detail


PRICED = "counters = with the price of their quantity"
AS_PUBLISHED = "lines = by the versions valid at their events"


def test_a_counter_is_priced_over_all_its_lines(settings: Settings) -> None:
    """Two meter versions, two lines, one running quantity, whose tier the second line crosses."""
    publish(settings, *tiered(meter(), meter(2, valid_from=NOON)))
    old = {"timestamp": NOON - 1}
    new = {"meter_version": 2, "timestamp": NOON}
    rows = [rated_record(key="a", quantity=15, amount=15, **old)]
    rows += [rated_record(key="b", quantity=10, before=15, amount="7.5", **new)]
    rows += [rated_record(key="late", quantity=5, before=25, amount="2.5", **old)]
    write(settings, rows)
    assert differing(reconcile(settings)) == []
    assert named(settings, PRICED) == (0, "all")


def test_a_counter_that_a_repeat_moved_twice(settings: Settings) -> None:
    """The repeat is quarantined, but what came after it was priced in a tier that was not reached."""
    publish(settings, *tiered(meter()))
    write(
        settings,
        [
            rated_record(key="a", quantity=15, amount=15),
            rated_record(key="a", quantity=15, before=15, amount=10),
            rated_record(key="b", quantity=5, before=30, amount="2.5"),
        ],
    )
    assert named(settings, PRICED) == (
        1,
        "acct/contract-acct/input from 2026-05-01T00:00:00Z (line:1) holds 17.5 for 20, whose price is 20",
    )


@pytest.mark.parametrize(
    ("published", "problem"),
    [
        pytest.param([], "plan basic version 1 is not in the catalog", id="no plan"),
        pytest.param([per_unit(output="1")], "plan basic version 1 has no charge input", id="no charge"),
    ],
)
def test_a_counter_without_a_price(settings: Settings, published: list[Plan], problem: str) -> None:
    publish(settings, meter(), *published)
    write(settings, [rated_record(cell="region=eu")])
    difference, detail = named(settings, PRICED)
    assert difference == 1
    assert detail.startswith("acct/contract-acct/input/region=eu from ")
    assert detail.endswith(problem)


def test_many_places_are_counted_not_named(settings: Settings) -> None:
    publish(settings, per_unit(input="1"), meter(), meter(2, valid_from=NOON))
    write(settings, [rated_record(account=f"a{n}") for n in range(8)])
    difference, detail = named(settings, PRICED)
    assert (difference, detail.count("line:")) == (8, 5)
    assert detail.endswith(" and 3 more")
    difference, detail = named(settings, AS_PUBLISHED)
    assert (difference, detail.count("line:")) == (8, 5)
    assert detail.endswith(" and 3 more")


# -- the versions of a line


def test_a_price_published_while_no_relay_ran(settings: Settings) -> None:
    """The raters never heard of version 2 and went on with version 1."""
    publish(settings, per_unit(input="0.1"), per_unit(2, valid_from=NOON, input="0.2"), meter())
    rows = [rated_record(key=f"k{n}", timestamp=NOON - 2 + n, amount="0.1") for n in range(5)]
    write(settings, rows)
    (check,) = differing(reconcile(settings))
    assert (check.name, check.difference) == (AS_PUBLISHED, 1)
    assert check.detail == (
        "3 rows of line:1 from 2026-05-01T12:00:00Z by plan basic version 1, where version 2 is valid"
    )


@pytest.mark.parametrize(
    ("published", "row", "detail"),
    [
        pytest.param(
            [per_unit(input="1"), meter(), meter(2, valid_from=NOON)],
            {"meter_version": 1},
            "1 rows of line:1 from 2026-05-01T12:00:00Z by meter tokens version 1, where version 2 is valid",
            id="an older meter",
        ),
        pytest.param(
            [per_unit(input="1"), meter(), meter(2, valid_from=NOON + 1)],
            {"meter_version": 2},
            "1 rows of line:1 from 2026-05-01T12:00:00Z by meter tokens version 2, where version 1 is valid",
            id="a meter before its time",
        ),
        pytest.param(
            [
                per_unit(input="1"),
                per_unit(2, valid_from=MAY, input="1"),
                per_unit(3, valid_from=MAY, input="2"),
                meter(),
            ],
            {"plan_version": 2},
            "1 rows of line:1 from 2026-05-01T12:00:00Z by plan basic version 2, where version 3 is valid",
            id="a plan replaced before it began",
        ),
        pytest.param(
            [per_unit(input="1"), per_unit(2, valid_from=NOON, input="1"), meter()],
            {"plan_version": 2},
            "line:1 counts from 2026-05-01T00:00:00Z by plan basic version 2, where version 1 is valid",
            id="a segment that begins before its plan version",
        ),
        pytest.param(
            [per_unit(input="1")],
            {},
            "1 rows of line:1 from 2026-05-01T12:00:00Z by meter tokens version 1, where none is valid",
            id="a version that nobody published",
        ),
    ],
)
def test_a_line_by_another_version_than_the_valid_one(
    settings: Settings, published: list[Plan | Meter], row: dict[str, Any], detail: str
) -> None:
    publish(settings, *published)
    write(settings, [rated_record(amount=1, **row)])
    assert [(check.name, check.detail) for check in differing(reconcile(settings))] == [(AS_PUBLISHED, detail)]


def test_versions_follow_each_other_without_a_gap(settings: Settings) -> None:
    """The first and last instant of each version belong to it; a planned version does not count yet."""
    versions = [
        per_unit(input="1"),
        per_unit(2, valid_from=NOON, input="2"),
        per_unit(3, valid_from=NOON + 9, input="3"),
    ]
    publish(settings, *versions, meter())
    rows = [rated_record(key=f"k{n}", timestamp=NOON - 2 + n, before=n, amount=1) for n in range(2)]
    new = {"plan_version": 2, "price_version": "basic@2", "segment_start": NOON, "amount": 2}
    rows += [rated_record(key=f"n{n}", timestamp=NOON + n, before=n, **new) for n in range(9)]
    write(settings, rows)
    assert differing(reconcile(settings)) == []


# -- waiting


def test_grace_leaves_out_what_may_still_come(world: Settings) -> None:
    tamper(world, "UPDATE billing.source_sequence SET bits = set_bit(bits, 2, 0)")
    assert not reconcile(world).reconciled
    assert reconcile(world, grace_s=60).reconciled
    tamper(world, "UPDATE billing.source SET updated_at = now() - interval '2 minutes'")
    assert not reconcile(world, grace_s=60).reconciled


def test_waits_for_the_sink(settings: Settings) -> None:
    a_world(settings, Rater(settings))
    assert reconcile(settings).lag > 0
    with running_sink(settings):
        result = reconcile(settings, wait_s=30)
    assert (result.lag, differing(result)) == (0, [])
