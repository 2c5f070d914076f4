"""Closes that are killed, raced, or lose their database: no number lost or used twice, nothing half issued."""

import os
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import queue
from pipeline.billing.close import work
from pipeline.billing.close_chunk import Step
from pipeline.billing.invoicing_store import mark
from pipeline.billing.queue import Progress, Run
from pipeline.core.documents import to_document
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.bench.closes import MONTH, fill, prices
from tests.billing.running import query

#: Payers in a transaction here.
AT_ONCE = 3
NOW = datetime(2026, 11, 2, tzinfo=UTC)


@pytest.fixture
def connection(database: Settings) -> Iterator["Connection[Any]"]:
    with connect(database.dsn, application="test", autocommit=True, role=None) as made:
        yield made


def begin(connection: "Connection[Any]", *accounts: str) -> Run:
    run = queue.begin(connection, MONTH, accounts, invoicing_mark=mark(connection), consolidating=(), actor="ada")
    assert run is not None
    return run


def close(settings: Settings, run: Run, reached: Callable[[Step], None] = lambda _: None) -> None:
    list(work(settings.dsn, run.id, "ada", reached=reached, at_once=AT_ONCE, clock=lambda: NOW))


def forked(work: Callable[[], None]) -> int:
    """Run it in a process of its own, which ends with it; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on with the tests
        os._exit(1)


def killed_at(step: Step, chunk: int) -> Callable[[Step], None]:
    """SIGKILL for the process that reaches the step in its so-manieth chunk."""
    reached = {step: 0}

    def kill(now: Step) -> None:
        if now is step:
            reached[step] += 1
            if reached[step] == chunk:
                os.kill(os.getpid(), signal.SIGKILL)

    return kill


def is_whole(settings: Settings, invoices: int) -> None:
    """All that must hold, whatever happened: gapless numbers, one invoice each that adds up, containers closed."""
    numbers = query(settings, "SELECT number_serial FROM billing.document WHERE state = 'issued' ORDER BY 1")
    assert [number for (number,) in numbers] == list(range(1, invoices + 1))
    assert query(settings, "SELECT last FROM billing.number_range") == [(invoices,)]
    assert query(settings, "SELECT count(*), count(DISTINCT account) FROM billing.document") == [(invoices, invoices)]
    assert query(
        settings,
        "SELECT count(*) FROM (SELECT document.id FROM billing.document LEFT JOIN billing.document_line AS line "
        "ON line.document_id = document.id GROUP BY document.id "
        "HAVING count(line.id) <> 5 OR sum(line.total_amount) <> document.total_amount) AS wrong",
    ) == [(0,)]
    assert query(
        settings,
        "SELECT count(*) FROM billing.invoice JOIN billing.document USING (account) "
        "WHERE (invoice.state = 'issued') <> (document.state = 'issued')",
    ) == [(0,)]
    # The fee, which no event brings, was booked once.
    assert query(settings, "SELECT count(*), count(DISTINCT line_id) FROM billing.close_entry") == [
        (invoices, invoices)
    ]
    audited = "SELECT count(*), count(DISTINCT target) FROM billing.audit WHERE action = 'document.issued'"
    assert query(settings, audited) == [(invoices, invoices)]


def test_killed_at_every_step(database: Settings, connection: "Connection[Any]") -> None:
    """Each process closes one chunk and is killed in the next, at another step each; one more finishes."""
    accounts = (len(Step) + 2) * AT_ONCE
    fill(connection, "a", accounts)
    run = begin(connection)
    issued = 0
    for step in Step:
        child = forked(lambda step=step: close(database, run, killed_at(step, 2)))  # type: ignore[misc]
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"not killed at {step}"
        issued += 2 * AT_ONCE if step is Step.COMMITTED else AT_ONCE
        is_whole(database, issued)
    assert queue.progress(connection, run.id) == Progress(accounts - issued, issued, 0, issued)
    assert not queue.finish(connection, run.id), "payers still wait"
    again = begin(connection)
    assert again == run, "the next command goes on with the run"
    close(database, again)
    assert queue.finish(connection, run.id)
    is_whole(database, accounts)


def test_two_closes_at_once_issue_each_document_once(database: Settings, connection: "Connection[Any]") -> None:
    """Two processes on one run, and one more on a run over some of its accounts."""
    fill(connection, "a", 60)
    run, other = begin(connection), begin(connection, *(f"a{number:06}" for number in range(1, 61, 4)))
    assert other.id != run.id
    assert begin(connection) == run, "a second command joins the first one's run"
    children = [forked(lambda one=one: close(database, one)) for one in (run, run, other)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    is_whole(database, 60)
    first, second = queue.outcomes(connection, run.id), queue.outcomes(connection, other.id)
    assert first.get("issued", 0) + second.get("issued", 0) == 60
    assert first.get("closed", 0) + second.get("closed", 0) == 15


def test_loses_its_database_in_between(database: Settings, connection: "Connection[Any]") -> None:
    """PostgreSQL ends the connection, as a restart does, amid one chunk and at the commit of another."""
    fill(connection, "a", 12)
    run = begin(connection)
    lost: set[Step] = set()

    def lose(step: Step) -> None:
        if step in (Step.NUMBERED, Step.COMMITTED) and step not in lost:
            lost.add(step)
            statement = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
            connection.execute(f"{statement} AND datname = current_database()", ["tally-close"])

    close(database, run, lose)
    assert lost == {Step.NUMBERED, Step.COMMITTED}
    is_whole(database, 12)


def test_prices_are_those_of_the_runs_beginning(database: Settings, connection: "Connection[Any]") -> None:
    """A price published while a close is under way changes none of its invoices, also of workers that begin later."""
    fill(connection, "a", 2 * AT_ONCE)
    run = begin(connection)
    first = work(database.dsn, run.id, "ada", at_once=AT_ONCE, clock=lambda: NOW)
    assert next(first) == AT_ONCE
    first.close()
    plan = to_document(prices()[-1])
    plan["charges"][0]["unit_price"] = "1000"
    connection.execute(
        "INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by) "
        "VALUES ('plan', 'standard', 2, '2026-02-01', %s, 'x')",
        [Jsonb(plan)],
    )
    connection.execute("INSERT INTO billing.outbox (kind, id, version) VALUES ('plan', 'standard', 2)")
    close(database, run)
    is_whole(database, 2 * AT_ONCE)
    assert query(database, "SELECT DISTINCT total_amount FROM billing.document") == [(Decimal("92.52"),)]
    assert run.catalog_seq == 0
    assert query(database, "SELECT max(seq) > 0 FROM billing.outbox") == [(True,)]


def test_an_issued_document_is_immutable(database: Settings, connection: "Connection[Any]") -> None:
    fill(connection, "a", 1)
    close(database, begin(connection))
    for statement in (
        "UPDATE billing.document SET total_amount = 0, payable_amount = 0",
        "UPDATE billing.document SET number = 'x'",
        "UPDATE billing.document SET state = 'draft'",
        "DELETE FROM billing.document",
        "TRUNCATE billing.document CASCADE",
        "UPDATE billing.document_line SET amount = 0",
        "DELETE FROM billing.document_line",
        "INSERT INTO billing.document_tax SELECT document_id, 9, tax, treatment, 1, 1, 1 FROM billing.document_tax",
        "DELETE FROM billing.document_tax",
        "UPDATE billing.invoice SET state = 'open'",
        "UPDATE billing.number_range SET last = last - 1",
        "DELETE FROM billing.number_range",
        'INSERT INTO billing.document_line SELECT (jsonb_populate_record(line, \'{"id": 0, "position": 9}\')).* '
        "FROM billing.document_line AS line LIMIT 1",
    ):
        with pytest.raises(psycopg.errors.RaiseException):
            connection.execute(statement)
    connection.execute(
        "UPDATE billing.document SET state = 'void', voided_at = now(), voided_by = 'x', void_reason_code = 'mistake'"
    )
    with pytest.raises(psycopg.errors.RaiseException, match="nothing changes it"):
        connection.execute("UPDATE billing.document SET state = 'issued', voided_at = NULL")
    for role_may in query(
        database,
        "SELECT has_table_privilege('tally_finance', oid, 'INSERT, UPDATE, DELETE, TRUNCATE') FROM pg_class "
        "WHERE relnamespace = 'billing'::regnamespace AND relkind = 'r'",
    ):
        assert role_may == (False,)
