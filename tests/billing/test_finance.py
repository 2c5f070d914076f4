"""The finance views: complete, commented, exact, and all that the finance role can see."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pipeline.core import money
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

VIEWS = {
    "open_invoices",
    "invoice_lines",
    "rated_usage",
    "line_events",
    "unrated_usage",
    "quarantined_usage",
    "usage_gaps",
    "price_changes",
    "usage_corrections",
    "close_entries",
    "credits",
    "credit_balances",
    "credit_entries",
    "commitments",
    "alerts",
    "exchange_rates",
    "invoicing_changes",
    "invoices",
    "document_lines",
    "document_taxes",
    "document_discounts",
    "credit_notes",
    "adjustments",
    "document_line_events",
    "unbilled_usage",
    "unbilled_voids",
    "usage_vs_billed",
    "receivables",
    "settlements",
    "statements",
    "balances",
    "balance_entries",
    "numbers",
    "close_runs",
    "document_checks",
    "columns",
    "versions",
}


@pytest.fixture
def database(settings: Settings) -> Iterator["Connection[Any]"]:
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        yield connection


def test_every_view_and_column_has_a_comment(database: "Connection[Any]") -> None:
    rows = database.execute(
        """SELECT relname, attname, col_description(attrelid, attnum), obj_description(attrelid)
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'finance'::regnamespace AND relkind = 'v' AND attnum > 0"""
    ).fetchall()
    assert {view for view, *_ in rows} == VIEWS
    assert [(view, column) for view, column, comment, of_view in rows if not comment or not of_view] == []


def test_currencies_are_those_of_the_core(database: "Connection[Any]") -> None:
    stored = dict(database.execute("SELECT code, minor_units FROM billing.currency").fetchall())
    assert stored == money._MINOR_UNITS_OF


@pytest.mark.parametrize(
    ("currency", "amounts", "rounded"),
    [
        ("USD", ["0.005", "0.005"], ["0.01", "0.01"]),  # per line, then summed: 0.02, where the sum alone gives 0.01
        ("USD", ["-0.005", "0.004999999999"], ["-0.01", "0.00"]),
        ("JPY", ["0.5", "1.499999999999"], ["1", "1"]),
        ("KWD", ["0.0005"], ["0.001"]),
    ],
)
def test_rounds_half_up_per_line_and_shows_the_difference(
    database: "Connection[Any]", currency: str, amounts: list[str], rounded: list[str]
) -> None:
    insert_lines(database, currency, amounts)
    lines = database.execute(
        "SELECT exact_amount, rounded_amount, rounding_difference FROM finance.invoice_lines ORDER BY line_id"
    ).fetchall()
    assert [(line[0], line[1]) for line in lines] == list(
        zip(map(Decimal, amounts), map(Decimal, rounded), strict=True)
    )
    assert [money.round_to_minor(line[0], currency) for line in lines] == [line[1] for line in lines]
    assert all(exact + difference == billed for exact, billed, difference in lines)
    (invoice,) = database.execute("SELECT lines, exact_amount, rounded_amount FROM finance.open_invoices").fetchall()
    assert invoice == (len(amounts), sum(map(Decimal, amounts)), sum(map(Decimal, rounded)))


def test_the_finance_role_reads_the_views_and_nothing_else(database: "Connection[Any]") -> None:
    insert_lines(database, "USD", ["1"])
    database.execute("SET ROLE tally_finance")
    for view in VIEWS:
        database.execute(f"SELECT * FROM finance.{view}")
    assert database.execute("SELECT count(*) FROM finance.invoice_lines").fetchone() == (1,)
    tables = ["invoice", "invoice_line", "rated_usage", "unrated_event", "catalog_version", "quarantine"]
    forbidden = [f"SELECT * FROM billing.{table}" for table in tables]
    forbidden += ["INSERT INTO billing.currency VALUES ('AAA', 2)", "DELETE FROM finance.unrated_usage"]
    forbidden += ["UPDATE finance.quarantined_usage SET account = ''", "CREATE TABLE finance.mine (id int)"]
    for statement in forbidden:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            database.execute(statement)
    database.execute("RESET ROLE")
    database.execute("CREATE VIEW finance.of_a_later_migration AS SELECT 1 AS one")
    database.execute("SET ROLE tally_finance")
    assert database.execute("SELECT one FROM finance.of_a_later_migration").fetchone() == (1,)


def insert_lines(database: "Connection[Any]", currency: str, amounts: list[str]) -> None:
    found = database.execute(
        """INSERT INTO billing.invoice (account, currency, period_start, period_end)
        VALUES ('acct', %s, '2026-05-01Z', '2026-06-01Z') RETURNING id""",
        [currency],
    ).fetchone()
    assert found is not None
    for n, amount in enumerate(amounts):
        database.execute(
            """INSERT INTO billing.invoice_line (invoice_id, contract, plan, plan_version, price_version, meter,
                meter_version, charge, segment_start, amount)
            VALUES (%s, 'c', 'p', 1, 'p@1', 'm', 1, %s, '2026-05-01Z', %s)""",
            [found[0], f"charge {n}", amount],
        )
