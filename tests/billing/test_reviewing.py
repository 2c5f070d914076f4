"""Documents that somebody looks at before they are issued: whoever else is at work on their containers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing.lines import open_invoices
from pipeline.billing.rerate import Month
from pipeline.billing.reviewing import issue_reviewed, review
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query
from tests.billing.test_billed_once import GROUP, PRICES, until_it_waits
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
NOW = datetime(2026, 12, 5, tzinfo=UTC)


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    made.publish(GROUP, "accounts", None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, replace(ENTITY, review=True), TAXES, customer("group", consolidates=True), customer("north"))
        yield made


def test_containers_are_taken_in_the_order_of_their_ids(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Who holds the first of two goes on to the second while another issues both: else each waits for the other."""
    october, november = (month.period_in("UTC") for month in (OCTOBER, NOVEMBER))
    for period in (november, october):  # so that the order of periods, an index's, is not that of ids
        open_invoices(connection, [("north", "EUR", period.start_us, period.end_us)])
    world.use(["2026-10-03T00:00:00Z north/a call - n=5", "2026-11-03T00:00:00Z north/b call - n=7"], None)
    for month in (OCTOBER, NOVEMBER):
        (draft,) = close(connection, world.settings, month)
        (reviewed,) = review(connection, draft, now=NOW, actor="eve")

    def issue() -> None:
        with connect(world.settings.dsn, application="issue", autocommit=True) as other:
            other.execute("SET enable_seqscan = off")
            other.execute("SET enable_bitmapscan = off")
            issue_reviewed(other, reviewed, now=NOW, actor="eve")

    with ThreadPoolExecutor(1) as threads:
        with connection.transaction():
            connection.execute("SELECT FROM billing.invoice WHERE id = 1 FOR NO KEY UPDATE")
            issuing = threads.submit(issue)
            until_it_waits(world, issuing)
            connection.execute("SET LOCAL lock_timeout = '300ms'")
            connection.execute("SELECT FROM billing.invoice WHERE id = 2 FOR NO KEY UPDATE")
        issuing.result()
    assert query(world.settings, "SELECT state::text FROM billing.invoice ORDER BY id") == [("issued",), ("issued",)]


def test_late_usage_of_who_has_left_is_settled(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.use(["2026-10-03T00:00:00Z north/a call - n=5"], None)
    (draft,) = close(connection, world.settings, OCTOBER)
    issue_reviewed(connection, *review(connection, draft, now=NOW, actor="eve"), now=NOW, actor="eve")
    apply(connection, customer("group"))
    world.use(["2026-10-04T00:00:00Z north/b call - n=7"], "2026-11-03T00:00:00Z")
    drafts = close(connection, world.settings, NOVEMBER)
    group = [
        id
        for id in drafts
        if query(world.settings, "SELECT account FROM billing.document WHERE id = %s", id) == [("group",)]
    ]
    issue_reviewed(connection, *review(connection, *group, now=NOW, actor="eve"), now=NOW, actor="eve")
    states = "SELECT state::text FROM billing.invoice WHERE account = 'north' AND supplement > 0"
    assert query(world.settings, states) == [("issued",)]
