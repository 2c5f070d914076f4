"""What a commitment added is billed as it should be, whatever comes of its months after they were billed."""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing import credits
from pipeline.billing.own_documents import reissue
from pipeline.billing.rerate import Month
from pipeline.billing.voids import void
from pipeline.core.commitments import Commitment, Window
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER, DECEMBER = (Month(2026, month) for month in (10, 11, 12))
NOW = datetime(2027, 1, 5, tzinfo=UTC)
#: By zone: a month without usage has no line of it, not even one of 0.
PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call, dimensions: [zone]}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - id: calls
        meter: calls
        by: [zone]
        model: volume
        tiers: [{up_to: 1000, unit_price: 1}, {unit_price: 0.5}]
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-10-01}]}]"


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    """Acme promised to spend 1,000 in October and November."""
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, customer("acme"))
        promise(made, 1000, "term", until=12)
        yield made


def promise(connection: "Connection[Any]", amount: int, window: Window, *, until: int | None = None) -> None:
    """From October on."""
    start = to_micros(datetime(2026, 10, 1, tzinfo=UTC))
    end = None if until is None else to_micros(datetime(2026, until, 1, tzinfo=UTC))
    promised = Commitment("", amount * 10**12, start, end, window=window)
    request = credits.request_commitment(connection, "acme", "EUR", promised, note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")


def used(world: DatabaseWorld, day: str, calls: int, arriving: str | None = None) -> None:
    world.use([f"{day}T00:00:00Z acme/{day}{calls} call - n={calls} zone=x"], arriving)


def billed(world: DatabaseWorld) -> dict[str, Decimal]:
    """By charge, on the documents that stand."""
    rows = query(
        world.settings,
        "SELECT charge, sum(line.net_amount) FROM billing.document_line AS line "
        "JOIN billing.document ON document.id = document_id WHERE state = 'issued' GROUP BY charge",
    )
    return dict(rows)


def again(connection: "Connection[Any]", id: int) -> None:
    void(connection, id, reason="wrong_details", note="", actor="ada", now=NOW)
    reissue(connection, id, note="", now=NOW, actor="ada")


@pytest.mark.parametrize(("october", "cost", "added"), [(300, 400, 600), (1000, 550, 450)])
def test_late_usage_before_a_month_that_billed_its_true_up_alone(
    world: DatabaseWorld, connection: "Connection[Any]", october: int, cost: int, added: int
) -> None:
    """Less is missing than was charged in November, or, as a volume turns cheaper, something that was not."""
    used(world, "2026-10-03", october)
    close(connection, world.settings, OCTOBER)
    close(connection, world.settings, NOVEMBER)
    used(world, "2026-10-04", 100, "2026-11-03T00:00:00Z")
    used(world, "2026-12-03", 7)
    close(connection, world.settings, DECEMBER)
    assert billed(world) == {"calls": cost + 7, "commitment 1": added}


def test_a_true_up_alone_is_issued_anew(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    used(world, "2026-10-03", 300)
    close(connection, world.settings, OCTOBER)
    (november,) = close(connection, world.settings, NOVEMBER)
    again(connection, november)
    assert billed(world) == {"calls": 300, "commitment 1": 700}


@pytest.mark.parametrize("late", [0, 100])
def test_a_month_issued_anew_after_the_true_up_it_counts_toward(
    world: DatabaseWorld, connection: "Connection[Any]", late: int
) -> None:
    """November's stays as long as October comes to the same."""
    used(world, "2026-10-03", 300)
    used(world, "2026-11-03", 200)
    (october,) = close(connection, world.settings, OCTOBER)
    close(connection, world.settings, NOVEMBER)
    if late:
        used(world, "2026-10-04", late, "2026-11-03T00:00:00Z")
    again(connection, october)
    assert billed(world) == {"calls": 500 + late, "commitment 1": 500 - late}
    kinds = "SELECT count(*) FROM billing.document_line WHERE charge = 'commitment 1'"
    assert query(world.settings, kinds) == [(3 if late else 1,)]


@pytest.mark.parametrize("first", ["october", "november"])
def test_both_months_void_and_issued_anew(world: DatabaseWorld, connection: "Connection[Any]", first: str) -> None:
    """In either order each bills its own."""
    used(world, "2026-10-03", 300)
    used(world, "2026-11-03", 200)
    months = [*close(connection, world.settings, OCTOBER), *close(connection, world.settings, NOVEMBER)]
    for id in months:
        void(connection, id, reason="wrong_details", note="", actor="ada", now=NOW)
    for id in months if first == "october" else reversed(months):
        reissue(connection, id, note="", now=NOW, actor="ada")
    assert billed(world) == {"calls": 500, "commitment 1": 500}
    totals = "SELECT net_amount FROM billing.document WHERE state = 'issued' ORDER BY tax_date"
    assert query(world.settings, totals) == [(300,), (700,)]


def test_adjustments_issued_anew_bring_the_true_up_with_them(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    used(world, "2026-10-03", 300)
    used(world, "2026-11-03", 200)
    close(connection, world.settings, OCTOBER)
    close(connection, world.settings, NOVEMBER)
    used(world, "2026-10-04", 100, "2026-11-03T00:00:00Z")
    used(world, "2026-12-03", 7)
    (december,) = close(connection, world.settings, DECEMBER)
    again(connection, december)
    assert billed(world) == {"calls": 607, "commitment 1": 400}


def test_the_last_invoice_settles_what_would_go_on(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Acme leaves after October: all of its promise is due, and of one by the year October's share, 31 of 365 days."""
    promise(connection, 12_000, "year")
    world.publish(ACCOUNTS.replace("start: 2026-10-01", "start: 2026-10-01, end: 2026-11-01"), "accounts", None)
    used(world, "2026-10-03", 300)
    close(connection, world.settings, OCTOBER)
    assert billed(world) == {"calls": 300, "commitment 1": 700, "commitment 2": Decimal("719.18")}
