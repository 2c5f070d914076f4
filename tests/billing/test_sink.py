"""The sink on real Kafka and PostgreSQL: each row once, whatever dies, repeats, arrives late or does not decode."""

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from pipeline.billing import sink
from pipeline.billing.commit import Step
from pipeline.billing.sink import LogTruncated
from pipeline.core.charges import Charge
from pipeline.core.plans import Plan
from pipeline.infra.avro import RATED, Record
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import ensure_topics
from tests.billing.detour import Detour
from tests.billing.rater import SCHEMAS, Rater
from tests.billing.records import (
    JUNE,
    MAY,
    NOON,
    letter_record,
    rated_record,
    receipt_record,
    resolution,
    sequences,
)
from tests.billing.running import SinkThread, count, publish, query, running_sink, start_dying_sink, wait_until

MINUTE = 60_000_000


@pytest.fixture
def rater(settings: Settings) -> Rater:
    return Rater(settings)


def usage(account: str, n: int, *, start: int = 0) -> Iterator[Record]:
    """Rows of n events, two charges each, with amounts that need all 12 decimals."""
    for i in range(start, start + n):
        for charge in ("input", "output"):
            yield rated_record(
                key=f"k{i}",
                account=account,
                charge=charge,
                timestamp=NOON + i * MINUTE,
                sequence=i + 1,
                quantity=i,
                amount=Decimal(i) * Decimal("0.000000000001"),
            )


def totals(settings: Settings) -> list[tuple[Any, ...]]:
    """Per line: account, charge, quantity, amount, events, first and last event."""
    return query(
        settings,
        """SELECT account, charge, quantity, amount, events, first_event_at, last_event_at
        FROM billing.invoice_line JOIN billing.invoice ON invoice.id = invoice_id ORDER BY 1, 2""",
    )


def quarantined(settings: Settings) -> Counter[str]:
    return Counter(reason for (reason,) in query(settings, "SELECT reason FROM billing.quarantine"))


def assert_lines_are_sums_of_rows(settings: Settings) -> None:
    differences = query(
        settings,
        """SELECT line.id, line.amount, line.quantity, sum(usage.amount), sum(usage.quantity), count(usage)
        FROM billing.invoice_line AS line LEFT JOIN billing.rated_usage AS usage ON usage.line_id = line.id
        GROUP BY line.id
        HAVING line.amount IS DISTINCT FROM sum(usage.amount) OR line.quantity IS DISTINCT FROM sum(usage.quantity)
            OR line.events <> count(usage)""",
    )
    assert differences == []


def write(settings: Settings, rater: Rater, make: Callable[[], None], rows: int) -> None:
    """Commit what ``make`` sends, then run a sink until that many rows stand in PostgreSQL."""
    with rater.transaction():
        make()
    with running_sink(settings) as thread:
        wait_until(lambda: count(settings, "billing.rated_usage") == rows, f"{rows} rows", thread)


# -- what a row becomes


def test_a_row_becomes_a_billed_row_an_invoice_and_a_line(settings: Settings, rater: Rater) -> None:
    nasty = 'tab\t, line\n, return\r, \\N, \\t, "quote", ü, \u2028, 😀, {"a":1}'
    record = rated_record(
        key=nasty,
        account="acct \\ 1",
        subject=nasty,
        source="api\\",
        sequence=7,
        properties={"n\tame": nasty, "": "", "input_tokens": "12"},
        quantity=Decimal("-12.000000001"),
        before=Decimal("99999999999999999999999999999.999999999"),
        amount="-0.000000000001",
        cell="region=eu\\west",
        origin_partition=3,
        origin_offset=17,
        late=True,
    )
    write(settings, rater, lambda: rater.rated([record], partition=2), 1)
    with connect(settings.dsn, application="test") as connection:
        cursor = connection.execute(
            """SELECT usage.*, line.contract, line.plan, line.plan_version, line.price_version, line.meter,
                line.meter_version, line.segment_start, invoice.currency, invoice.period_start, invoice.period_end,
                invoice.state, line.quantity AS line_quantity, line.amount AS line_amount, line.events, line.late_events
            FROM billing.rated_usage AS usage JOIN billing.invoice_line AS line ON line.id = line_id
            JOIN billing.invoice ON invoice.id = invoice_id"""
        )
        row = cursor.fetchone()
        assert row is not None and cursor.description is not None
        stored = dict(zip([column.name for column in cursor.description], row, strict=True))
    event = record["event"]
    expected = {
        "event_month": date(2026, 5, 1),
        "event_time": datetime(2026, 5, 1, 12, tzinfo=UTC),
        "appended_at": datetime(2026, 5, 1, 12, tzinfo=UTC),
        "origin_partition": 3,
        "origin_offset": 17,
        "rated_partition": 2,
        "rated_offset": 0,
        "catalog_offset": 4,
        "entry": 0,
        "kind": "usage",
        "late": True,
        "idempotency_key": nasty,
        **{name: event[name] for name in ("account", "event_type", "subject", "source", "sequence", "properties")},
        **{name: record[name] for name in ("charge", "cell", "contract", "plan", "plan_version", "price_version")},
        **{name: record[name] for name in ("meter", "meter_version", "currency", "amount")},
        **{name: record[name] for name in ("quantity", "quantity_before", "quantity_after")},
        "segment_start": datetime(2026, 5, 1, tzinfo=UTC),
        "period_start": datetime(2026, 5, 1, tzinfo=UTC),
        "period_end": datetime(2026, 6, 1, tzinfo=UTC),
        "state": "open",
        "line_quantity": record["quantity"],
        "line_amount": record["amount"],
        "events": 1,
        "late_events": 1,
    }
    assert {name: stored[name] for name in expected} == expected
    assert stored["identity"].bytes == record["identity"]


def test_lines_add_up_over_batches_and_months(settings: Settings, rater: Rater) -> None:
    june = [rated_record(key=f"j{i}", timestamp=JUNE + i, period_start=JUNE, period_end=JUNE + 1) for i in range(3)]
    write(settings, rater, lambda: rater.rated([*usage("acct", 50), *june]), 103)
    write(settings, rater, lambda: rater.rated(usage("acct", 50, start=50)), 203)
    may = [line for line in totals(settings) if line[5] < datetime(2026, 6, 1, tzinfo=UTC)]
    exact = sum(range(100)) * Decimal("0.000000000001")
    assert [(line[1], line[2], line[3], line[4]) for line in may] == [
        ("input", sum(range(100)), exact, 100),
        ("output", sum(range(100)), exact, 100),
    ]
    assert count(settings, "billing.invoice") == 2
    assert count(settings, "billing.rated_usage_2026_06") == 3
    assert_lines_are_sums_of_rows(settings)


def test_versions_that_differ_have_lines_of_their_own(settings: Settings, rater: Rater) -> None:
    """A meter may change inside a segment; each row's line must name the version that measured it."""
    rows = [rated_record(key=f"k{version}", meter_version=version) for version in (1, 2)]
    write(settings, rater, lambda: rater.rated(rows), 2)
    assert query(settings, "SELECT meter_version, events FROM billing.invoice_line ORDER BY 1") == [(1, 1), (2, 1)]


def test_a_lines_quantity_is_what_its_rows_moved_its_counter_by(settings: Settings, rater: Rater) -> None:
    """The maximum of what was measured for a meter that is a maximum, not the sum."""
    measured = [(10, 0, 10), (4, 10, 10), (12, 10, 12)]
    rows = [
        rated_record(key=f"k{quantity}", quantity=quantity, before=before, quantity_after=Decimal(after))
        for quantity, before, after in measured
    ]
    write(settings, rater, lambda: rater.rated(rows), 3)
    assert query(settings, "SELECT quantity, events FROM billing.invoice_line") == [(12, 3)]


def test_a_line_is_as_unsure_as_the_least_sure_of_its_rows(settings: Settings, rater: Rater) -> None:
    """A contract that ends early may turn what was running into an estimate, within a batch and after it."""
    shown = "SELECT charge, price_class, provisional FROM finance.invoice_lines ORDER BY charge"

    def row(charge: str, price_class: str, number: int) -> Record:
        return rated_record(charge=charge, price_class=price_class, key=f"k{number}", amount=1)

    first = [("a", "running"), ("b", "per_event"), ("b", "period"), ("b", "running"), ("c", "per_event")]
    write(settings, rater, lambda: rater.rated(row(*of, number) for number, of in enumerate(first)), 5)
    assert query(settings, shown) == [("a", "running", False), ("b", "period", True), ("c", "per_event", False)]
    assert query(settings, "SELECT exact_amount, provisional_amount FROM finance.open_invoices") == [(5, 3)]
    later = [("a", "period"), ("b", "running"), ("c", "running")]
    write(settings, rater, lambda: rater.rated(row(*of, number) for number, of in enumerate(later, 5)), 8)
    assert query(settings, shown) == [("a", "period", True), ("b", "period", True), ("c", "per_event", False)]
    provisional = "SELECT count(*) FILTER (WHERE provisional) FROM finance.rated_usage"
    assert query(settings, provisional) == [(6,)]


def test_reference_values_are_kept_with_a_mark_when_there_are_more(settings: Settings, rater: Rater) -> None:
    charge = Charge("input", "tokens", "per_unit", Decimal(1), references=("order", "file"))
    publish(settings, Plan("basic", 1, "Basic", "USD", 0, (charge,)))

    def rows(numbers: range) -> list[Record]:
        return [rated_record(key=f"k{n}", properties={"order": f"o{n % 25}", "file": "a.csv"}) for n in numbers]

    write(settings, rater, lambda: rater.rated(rows(range(15))), 15)
    some = {"values": [f"o{n}" for n in range(15)], "more": False}
    stored = "SELECT reference_values FROM billing.invoice_line"
    assert query(settings, stored) == [({"order": some, "file": {"values": ["a.csv"], "more": False}},)]
    # Rows billed before bring nothing: their values are not the line's.
    repeats = [rated_record(key="k1", properties={"order": "from a repeat"})]
    write(settings, rater, lambda: rater.rated(repeats + rows(range(15, 40))), 40)
    full = {"values": [f"o{n}" for n in range(20)], "more": True}
    assert query(settings, stored) == [({"order": full, "file": {"values": ["a.csv"], "more": False}},)]


# -- once


def test_a_sigkill_at_any_step_of_the_commit_changes_no_total(settings: Settings) -> None:
    """One deployment per step, all at once (a group waits out a dead member's session): same totals as undisturbed."""
    deployments = {
        step: settings.model_copy(
            update={"topic_prefix": f"{settings.topic_prefix}{step}-", "partitions": 1, "session_timeout": 6.0}
        )
        for step in Step
    }
    for step, deployment in deployments.items():
        ensure_topics(deployment)
        rater, prefix = Rater(deployment), deployment.topic_prefix
        with rater.transaction():
            rater.rated(usage(f"acct-{step}", 100))
            rater.rated(usage(f"acct-{step}", 1))
            rater.raw(rater.topics.rated, b"\xff")
            rater.receipt(
                receipt_record(prefix, count=102, rated=101, parked=1, sequences=[sequences(f"s{step}", 0, 1, 999)])
            )
            rater.letter(letter_record(prefix, offset=101), dead=False)
    dying = {step: start_dying_sink(deployment, step) for step, deployment in deployments.items()}
    for step, process in dying.items():
        assert process.wait(60) == -signal.SIGKILL, f"killed itself at {step.name}"
    written = {account for (account,) in query(settings, "SELECT DISTINCT account FROM billing.rated_usage")}
    assert written == {f"acct-{step}" for step in Step if step >= Step.COMMITTED}, "the commit is step 7, not before"

    with_rows = "SELECT count(*) FROM billing.sink_position WHERE topic LIKE '%%usage.rated' AND next_offset > 0"
    threads = [SinkThread(deployment) for deployment in deployments.values()]
    try:
        wait_until(lambda: query(settings, with_rows) == [(len(Step),)], "all deployments", *threads)
        wait_until(lambda: count(settings, "billing.unrated_event") == len(Step), "all letters", *threads)
        wait_until(lambda: count(settings, "billing.receipt") == len(Step), "all receipts", *threads)
    finally:
        for thread in threads:
            thread.stop()
    exact = sum(range(100)) * Decimal("0.000000000001")
    lines = {(account, charge): rest for account, charge, *rest in totals(settings)}
    assert len(lines) == 2 * len(Step)
    assert {tuple(rest[:3]) for rest in lines.values()} == {(Decimal(4950), exact, 100)}
    assert count(settings, "billing.rated_usage") == 200 * len(Step)
    assert quarantined(settings) == {"already_billed": 2 * len(Step), "undecodable": len(Step)}
    assert count(settings, "billing.source_sequence") == len(Step)
    assert_lines_are_sums_of_rows(settings)


def test_a_repeat_by_a_rater_is_quarantined_with_its_bytes(settings: Settings, rater: Rater) -> None:
    write(settings, rater, lambda: rater.rated(usage("acct", 10)), 20)
    before = totals(settings)
    again = list(usage("acct", 3, start=4))
    new = list(usage("acct", 1, start=10))
    write(settings, rater, lambda: rater.rated([*again, *new, *new]), 22)
    assert totals(settings) != before
    assert [line[4] for line in totals(settings)] == [11, 11]
    kept = query(settings, "SELECT reason, account, charge, value FROM billing.quarantine ORDER BY rated_offset")
    assert kept == [
        ("already_billed", "acct", record["charge"], SCHEMAS.encode(RATED, record)) for record in [*again, *new]
    ]
    assert_lines_are_sums_of_rows(settings)


@pytest.mark.parametrize("state", ["open", "issued"])
def test_positions_set_back_change_nothing(settings: Settings, rater: Rater, state: str) -> None:
    """Everything is read and decided again: rows billed from the same place are no repeats, quarantined ones stay."""

    def make() -> None:
        rater.rated([*usage("acct", 5), *usage("acct", 2)])
        rater.raw(rater.topics.rated, b"\xff")
        rater.receipt(receipt_record(settings.topic_prefix, count=5))
        rater.receipt(receipt_record(settings.topic_prefix, count=5, worker="rater-2"))
        rater.letter(letter_record(settings.topic_prefix), dead=False)

    def positions() -> list[tuple[Any, ...]]:
        statement = "SELECT * FROM billing.sink_position WHERE next_offset > 0 ORDER BY topic, partition"
        return query(settings, statement)

    def everything() -> list[list[tuple[Any, ...]]]:
        tables = ("rated_usage", "invoice_line", "receipt", "quarantine", "unrated_event", "source_sequence")
        return [query(settings, f"SELECT * FROM billing.{table} ORDER BY 1, 2, 3") for table in tables]

    def counted() -> list[float | None]:
        reasons = ("already_billed", "period_closed", "undecodable", "already_receipted")
        names = [("tally_sink_quarantined_rows_total", {"reason": reason}) for reason in reasons]
        return [REGISTRY.get_sample_value(*name) for name in (("tally_sink_billed_rows_total", {}), *names)]

    write(settings, rater, make, 10)
    with running_sink(settings) as thread:
        wait_until(lambda: len(positions()) == 3, "rows, receipts and letters", thread)
    query(settings, f"UPDATE billing.invoice SET state = '{state}' RETURNING id")
    before = positions(), everything(), counted()
    assert quarantined(settings) == {"already_billed": 4, "undecodable": 1, "already_receipted": 1}
    query(settings, "UPDATE billing.sink_position SET next_offset = 0 RETURNING 1")
    with running_sink(settings) as thread:
        wait_until(lambda: positions() == before[0], "the sink to come back", thread)
    assert (positions(), everything(), counted()) == before


def test_two_sinks_share_the_partitions_and_take_over(settings: Settings, rater: Rater) -> None:
    steps: list[Counter[Step]] = [Counter(), Counter()]

    def produce(start: int) -> None:
        for partition in range(4):
            with rater.transaction():
                rater.rated(usage(f"acct-{partition}", 50, start=start), partition=partition)

    produce(0)
    with running_sink(settings, lambda step: steps[0].update([step])) as first:
        wait_until(lambda: count(settings, "billing.rated_usage") == 400, "the first rows", first)
        with running_sink(settings, lambda step: steps[1].update([step])) as second:
            events = 50
            while steps[1][Step.COMMITTED] == 0:  # until the group has given it a share
                produce(events)
                events += 50
                assert events < 10_000, "the second sink got nothing to do"
            first.stop()
            produce(events)
            events += 50
            wait_until(lambda: count(settings, "billing.rated_usage") == 8 * events, "all rows", second)
    assert count(settings, "billing.quarantine") == 0
    assert {line[4] for line in totals(settings)} == {events}
    assert_lines_are_sums_of_rows(settings)


def test_a_position_moved_by_another_sink_drops_the_batch(settings: Settings, rater: Rater) -> None:
    """Compare-and-set fails for a sink that lost its partition unawares: it reads on from where the other one is."""
    with rater.transaction():
        rater.rated(usage("acct", 1))
    with running_sink(settings) as thread:
        wait_until(lambda: count(settings, "billing.rated_usage") == 2, "the first row", thread)
        (offset,) = query(settings, "SELECT next_offset FROM billing.sink_position WHERE next_offset > 0")[0]
        # The log goes on behind the commit marker; the other sink has written the next two rows already.
        with capture_logs() as logs:
            query(
                settings,
                """WITH other AS (UPDATE billing.sink_position SET next_offset = %s WHERE next_offset = %s)
                SELECT 1""",
                offset + 3,
                offset,
            )
            with rater.transaction():
                rater.rated(usage("acct", 2, start=1))
            wait_until(lambda: count(settings, "billing.rated_usage") == 4, "what the other left", thread)
        assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["position taken"]
    keys = query(settings, "SELECT DISTINCT idempotency_key FROM billing.rated_usage ORDER BY 1")
    assert keys == [("k0",), ("k2",)]
    assert_lines_are_sums_of_rows(settings)


def test_reads_only_what_was_committed(settings: Settings, rater: Rater) -> None:
    """Fails without isolation.level=read_committed."""
    with rater.transaction(abort=True):
        rater.rated(usage("aborted", 3))
    open_rater = Rater(settings)
    open_rater.begin()
    open_rater.rated(usage("open", 3), partition=1)
    open_rater.flush()
    write(settings, rater, lambda: rater.rated(usage("acct", 3), partition=2), 6)
    write(settings, rater, lambda: rater.rated(usage("acct", 3, start=3)), 12)
    assert {account for account, *_ in totals(settings)} == {"acct"}


# -- what does not fit


def by_supplement(settings: Settings) -> list[tuple[Any, ...]]:
    """Per line: account, supplement and its state, charge, events, quantity."""
    return query(
        settings,
        """SELECT account, supplement, state::text, charge, events, quantity::int
        FROM billing.invoice_line JOIN billing.invoice ON invoice.id = invoice_id ORDER BY 1, 2, 4""",
    )


def test_usage_of_a_closed_period_goes_to_its_next_supplement(settings: Settings, rater: Rater) -> None:
    """By a sink that had its lines, by a new one, and once more when the supplement is closed; repeats open none."""
    with running_sink(settings) as thread:

        def commit(*records: Record, rows: int) -> None:
            with rater.transaction():
                rater.rated(records)
            wait_until(lambda: count(settings, "billing.rated_usage") == rows, f"{rows} rows", thread)

        commit(*usage("acct", 5), *usage("other", 1), rows=12)
        query(settings, "UPDATE billing.invoice SET state = 'issued' WHERE account = 'acct' RETURNING id")
        new_charge = rated_record(account="acct", key="k5", charge="requests")
        commit(*usage("acct", 3, start=4), new_charge, *usage("other", 1, start=1), rows=19)  # k4 is repeated
    closed = [("acct", 0, "issued", charge, 5, 10) for charge in ("input", "output")]
    other = [("other", 0, "open", charge, 2, 1) for charge in ("input", "output")]
    first = [("acct", 1, "open", charge, 2, 11) for charge in ("input", "output")]
    assert by_supplement(settings) == [*closed, *first, ("acct", 1, "open", "requests", 1, 1), *other]
    query(settings, "UPDATE billing.invoice SET state = 'issued' WHERE account = 'acct' RETURNING id")
    write(settings, rater, lambda: rater.rated([*usage("acct", 7), *usage("acct", 1, start=7)]), 21)
    second = [("acct", 2, "open", charge, 1, 7) for charge in ("input", "output")]
    assert [line for line in by_supplement(settings) if line[1] == 2] == second
    assert quarantined(settings) == {"already_billed": 16}
    assert_lines_are_sums_of_rows(settings)


def test_repeats_of_a_closed_period_open_no_supplement(settings: Settings, rater: Rater) -> None:
    write(settings, rater, lambda: rater.rated(usage("acct", 5)), 10)
    query(settings, "UPDATE billing.invoice SET state = 'issued' RETURNING id")
    with rater.transaction():
        rater.rated(usage("acct", 5))
    with running_sink(settings) as thread:
        wait_until(lambda: count(settings, "billing.quarantine") == 10, "the repeats", thread)
    assert quarantined(settings) == {"already_billed": 10}
    assert count(settings, "billing.invoice") == 1


@pytest.mark.parametrize("closes", ["while the sink waits for it", "before the sink comes to it"])
def test_a_close_beside_the_sink_loses_nothing(settings: Settings, rater: Rater, closes: str) -> None:
    """A close holds what the sink is about to write to: the sink waits, then opens the supplement."""
    with running_sink(settings) as thread:
        with rater.transaction():
            rater.rated(usage("acct", 2))
        wait_until(lambda: count(settings, "billing.rated_usage") == 4, "the first rows", thread)
        with connect(settings.dsn, application="close") as close:
            close.execute("SELECT FROM billing.invoice ORDER BY id FOR NO KEY UPDATE")
            close.execute("UPDATE billing.invoice SET state = 'issued'")
            if closes.startswith("before"):
                close.commit()
            with rater.transaction():
                rater.rated(usage("acct", 2, start=2))
            if closes.startswith("while"):
                wait_until(lambda: waiting(settings), "the sink to wait for the close", thread)
                assert count(settings, "billing.rated_usage") == 4
        wait_until(lambda: count(settings, "billing.rated_usage") == 8, "the late rows", thread)
    assert [(line[1], line[4]) for line in by_supplement(settings)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert_lines_are_sums_of_rows(settings)


def waiting(settings: Settings) -> bool:
    statement = """SELECT 1 FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'tally-sink' AND wait_event_type = 'Lock'"""
    return bool(query(settings, statement))


@pytest.mark.parametrize("step", [Step.LINES_LOCKED, Step.LINES_MOVED, Step.COMMITTED])
def test_a_sink_that_dies_with_late_usage_bills_it_once(settings: Settings, rater: Rater, step: Step) -> None:
    write(settings, rater, lambda: rater.rated(usage("acct", 2)), 4)
    query(settings, "UPDATE billing.invoice SET state = 'issued' RETURNING id")
    with rater.transaction():
        rater.rated(usage("acct", 3, start=2))
    dying = start_dying_sink(settings, step)
    assert dying.wait(60) == -signal.SIGKILL
    with running_sink(settings) as thread:
        wait_until(lambda: count(settings, "billing.rated_usage") == 10, "the late rows", thread)
    assert [(line[1], line[4]) for line in by_supplement(settings)] == [(0, 2), (0, 2), (1, 3), (1, 3)]
    assert count(settings, "billing.invoice") == 2
    assert count(settings, "billing.quarantine") == 0
    assert_lines_are_sums_of_rows(settings)


def test_poison_on_any_topic_stops_nothing(settings: Settings, rater: Rater) -> None:
    topics = rater.topics

    def make() -> None:
        for topic in (topics.rated, topics.receipts, topics.retry, topics.dead_letter):
            rater.raw(topic, b"\xff" * 40)
            rater.raw(topic, b"")
        rater.rated([rated_record(key="nul\0")])
        rater.rated(usage("acct", 1))
        rater.letter(letter_record(rater.topics.prefix, message="nul\0", event_time=2**62), dead=True)

    with capture_logs() as logs:
        write(settings, rater, make, 2)
    assert quarantined(settings) == {"undecodable": 9}
    assert len([entry for entry in logs if entry["event"] == "undecodable"]) == 9
    assert query(settings, "SELECT message, event_time FROM billing.unrated_event") == [
        ("nul\N{REPLACEMENT CHARACTER}", None)
    ]


def test_a_log_that_lost_unread_records_stops_the_sink(settings: Settings, rater: Rater) -> None:
    write(settings, rater, lambda: rater.rated(usage("acct", 5)), 10)
    with rater.transaction():
        rater.rated(usage("acct", 5, start=5))
    partition = TopicPartition(rater.topics.rated, 0, 15)
    admin = AdminClient(settings.kafka)
    admin.delete_records([partition])[partition].result(15)
    with pytest.raises(LogTruncated, match=r"usage\.rated 0 holds offsets 15 to 22, .* written up to 10"):
        SinkThread(settings).join()
    assert count(settings, "billing.rated_usage") == 10


def test_a_defect_ends_the_sink_loudly(settings: Settings, rater: Rater) -> None:
    with connect(settings.dsn, application="test", role=None) as connection:
        connection.execute("ALTER TABLE billing.receipt RENAME TO lost")
    with rater.transaction():
        rater.receipt(receipt_record(count=1))
    with pytest.raises(psycopg.errors.UndefinedTable):
        SinkThread(settings).join()


def test_waits_for_postgres_and_says_so_once(settings: Settings, rater: Rater, services: Any) -> None:
    with rater.transaction():
        rater.rated(usage("acct", 5))
    with running_sink(settings) as thread, capture_logs() as logs:
        wait_until(lambda: count(settings, "billing.rated_usage") == 10, "the first rows", thread)
        database = psycopg.conninfo.conninfo_to_dict(settings.dsn)["dbname"]
        with psycopg.connect(services.postgres_dsn, autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])
            with rater.transaction():
                rater.rated(usage("acct", 5, start=5))
            wait_until(lambda: any(entry["event"] == "away" for entry in logs), "the sink to notice", thread)
            thread.wait(1.0)
            admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        wait_until(lambda: count(settings, "billing.rated_usage") == 20, "the rest", thread)
    said = [entry["event"] for entry in logs if entry["event"] in ("away", "back")]
    assert said == ["away", "back"]
    assert_lines_are_sums_of_rows(settings)


def test_a_transaction_rolled_back_for_another_is_written_again_and_named_so(settings: Settings, rater: Rater) -> None:
    """As in a deadlock: PostgreSQL is not away, it chose."""
    with connect(settings.dsn, application="test", role=None) as connection:
        connection.execute("CREATE SEQUENCE public.tries")  # a rollback does not take its numbers back
        connection.execute(
            """CREATE FUNCTION public.choose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF nextval('public.tries') = 1 THEN RAISE 'deadlock detected' USING ERRCODE = '40P01'; END IF;
                RETURN NEW;
            END $$"""
        )
        connection.execute(
            "CREATE TRIGGER choose BEFORE INSERT ON billing.receipt FOR EACH ROW EXECUTE FUNCTION public.choose()"
        )
        connection.execute("GRANT USAGE ON SEQUENCE public.tries TO tally_program")
    with rater.transaction():
        rater.receipt(receipt_record(count=1))
    with capture_logs() as logs, running_sink(settings) as thread:
        wait_until(lambda: count(settings, "billing.receipt") == 1, "the receipt", thread)
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [(entry["event"], entry["problem"].splitlines()[0]) for entry in warnings] == [
        ("rolled back", "deadlock detected")
    ]
    assert "back" not in [entry["event"] for entry in logs]


def test_waits_for_a_broker_that_is_not_there(settings: Settings) -> None:
    nowhere = Settings(kafka_bootstrap="127.0.0.1:1", postgres_dsn=settings.postgres_dsn)
    with capture_logs() as logs, running_sink(nowhere) as thread:
        wait_until(lambda: bool(logs), "the sink to notice", thread)
        thread.wait(1.0)
    assert [(entry["event"], entry.get("service")) for entry in logs] == [("away", "Kafka")]


# -- accounting


def test_a_consumer_that_stays_out_of_its_group_gives_way_to_a_new_one(
    settings: Settings, rater: Rater, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first consumer's way to the broker leads nowhere, until the sink says that it has made another."""
    monkeypatch.setattr(sink, "OUT_OF_GROUP_S", 1.0)
    monkeypatch.setattr(sink, "_MEMBERSHIP_EVERY_S", 0.2)
    with rater.transaction():
        rater.rated(usage("acct-1", 3))
    with Detour(str(settings.kafka_bootstrap)) as detour, capture_logs() as logs:
        through = settings.model_copy(update={"kafka_bootstrap": detour.address})
        with running_sink(through) as thread:
            wait_until(lambda: any(log["event"] == "out of group" for log in logs), "the sink to notice", thread)
            assert count(settings, "billing.rated_usage") == 0
            detour.open()
            wait_until(lambda: count(settings, "billing.rated_usage") == 6, "rows", thread)
    assert not [log for log in logs if log["event"] == "away"]  # the broker was never away


def test_what_is_out_of_the_group() -> None:
    now = 0.0
    membership = sink.Membership(lambda: now)

    def after(seconds: float, state: str, join_state: str) -> None:
        nonlocal now
        now += seconds
        membership.told(json.dumps({"cgrp": {"state": state, "join_state": join_state}}))
        membership.check()

    after(0, "init", "init")
    after(sink.OUT_OF_GROUP_S, "query-coord", "init")
    after(1, "up", "wait-join")  # for the other members
    after(2 * sink.OUT_OF_GROUP_S, "up", "wait-sync")
    after(2 * sink.OUT_OF_GROUP_S, "up", "steady")
    after(2, "up", "init")
    after(sink.OUT_OF_GROUP_S, "up", "wait-metadata")
    with pytest.raises(sink.OutOfGroup, match="for 21 s, in the states query-coord, init"):
        after(1, "query-coord", "init")


def test_receipts_sequences_and_resolutions(settings: Settings, rater: Rater) -> None:
    prefix, topics = settings.topic_prefix, rater.topics

    def make() -> None:
        rater.letter(letter_record(prefix, offset=2), dead=False)
        rater.letter(letter_record(prefix, offset=3, reason="not_a_number"), dead=True)
        rater.receipt(
            receipt_record(prefix, count=4, parked=1, dead_lettered=1, sequences=[sequences("s", 0, 1, 9, 999)])
        )
        rater.receipt(
            receipt_record(prefix, first=4, count=2, sequences=[sequences("s", 0, 2), sequences("s", 1, 1000)])
        )
        rater.receipt(
            receipt_record(prefix, topic=topics.retry, count=1, partition=3, resolutions=[resolution(0, 2, "rated")])
        )
        rater.receipt(receipt_record(prefix, first=4, count=3, worker="rater-2"))
        rater.rated(usage("acct", 1))

    write(settings, rater, make, 2)
    with running_sink(settings) as thread:
        wait_until(lambda: count(settings, "billing.receipt") == 3, "receipts", thread)
        wait_until(lambda: count(settings, "billing.unrated_event") == 2, "letters", thread)
    assert query(settings, "SELECT origin_offset, state, reason FROM billing.unrated_event ORDER BY 1") == [
        (2, "rated", "unknown_account"),
        (3, "dead_lettered", "not_a_number"),
    ]
    bits = dict(query(settings, "SELECT block, bits::text FROM billing.source_sequence"))
    assert [i for i, bit in enumerate(bits[0]) if bit == "1"] == [1, 2, 9, 999]
    assert [i for i, bit in enumerate(bits[1]) if bit == "1"] == [0]
    assert quarantined(settings) == {"already_receipted": 1}


def test_creates_partitions_ahead_and_for_any_month(settings: Settings, rater: Rater) -> None:
    old = rated_record(timestamp=MAY - 1, period_start=MAY - 1)
    write(settings, rater, lambda: rater.rated([old]), 1)
    names = {name for (name,) in query(settings, "SELECT inhrelid::regclass::text FROM pg_inherits")}
    now = datetime.now(UTC)
    assert {"billing.rated_usage_2026_04", f"billing.rated_usage_{now:%Y_%m}"} <= names


def test_commits_kafka_offsets_for_lag_tools(settings: Settings, rater: Rater) -> None:
    write(settings, rater, lambda: rater.rated(usage("acct", 5)), 10)
    group, admin = settings.topic_prefix + "sink", AdminClient(settings.kafka)

    def committed() -> int:
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])
        found = {(p.topic, p.partition): p.offset for p in asked[group].result(15).topic_partitions}
        return found.get((rater.topics.rated, 0), -1)

    wait_until(lambda: committed() == 10, "offsets")
