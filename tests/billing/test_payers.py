"""Parents that pay for children, and what each of them has: who is billed anew, whose credits go on."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing import credits
from pipeline.billing.credit_notes import Part, credit
from pipeline.billing.credits import lock_grants
from pipeline.billing.own_documents import reissue
from pipeline.billing.rerate import Month
from pipeline.billing.voids import void
from pipeline.core.credits import Grant, Rollover
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query, tamper
from tests.billing.test_billed_once import _WAITING as WAITING
from tests.billing.test_billed_once import GROUP, PRICES, documents
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
NOW = datetime(2026, 11, 5, tzinfo=UTC)


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    made.publish(GROUP, "accounts", None)
    made.use(["2026-10-03T00:00:00Z north/a call - n=5", "2026-11-03T00:00:00Z north/b call - n=7"], None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, customer("group", consolidates=True), customer("north"))
        yield made


def again(connection: "Connection[Any]", id: int) -> None:
    void(connection, id, reason="wrong_details", note="", actor="ada", now=NOW)
    reissue(connection, id, note="", now=NOW, actor="ada")


def test_who_has_come_to_a_group_since_is_billed_anew_himself(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    apply(connection, customer("group"))
    (october,) = close(connection, world.settings, OCTOBER)
    apply(connection, customer("group", consolidates=True))
    again(connection, october)
    assert documents(world) == [("ours", "north", "invoice", state, 5) for state in ("void", "issued")]


def test_who_has_come_to_a_group_since_is_not_on_its_invoice_anew(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """Of a month whose own invoice he got himself."""
    group = "accounts: [{id: group, name: Group, contracts: [{id: group-1, plan: peaks, start: 2026-01-01}]}]"
    world.publish(group, "accounts", None)
    world.use(["2026-10-03T00:00:00Z group/a peak - n=3"], None)
    apply(connection, customer("group"))
    for id in close(connection, world.settings, OCTOBER):
        void(connection, id, reason="wrong_details", note="", actor="ada", now=NOW)
    apply(connection, customer("group", consolidates=True))
    for (id,) in query(world.settings, "SELECT id FROM billing.document ORDER BY id"):
        reissue(connection, id, note="", now=NOW, actor="ada")
    assert documents(world)[2:] == [
        ("ours", "group", "invoice", "issued", 3),
        ("ours", "north", "invoice", "issued", 5),
    ]


def test_two_at_once_issue_it_anew_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """The second waits for what the customer has, and then finds what the first issued."""
    (october,) = close(connection, world.settings, OCTOBER)
    void(connection, october, reason="wrong_details", note="", actor="ada", now=NOW)

    def issue() -> None:
        with connect(world.settings.dsn, application="test", autocommit=True) as other:
            reissue(other, october, note="", now=NOW, actor="ada")

    with ThreadPoolExecutor(2) as threads:
        with connection.transaction():
            lock_grants(connection, "group")
            both = [threads.submit(issue) for _ in range(2)]
            until = time.monotonic() + 20
            while query(world.settings, WAITING) != [(2,)]:
                assert time.monotonic() < until, "expected both to wait"
                time.sleep(0.02)
        failed = [str(one.exception()) for one in both if one.exception()]
    assert failed == ["2026-000001 was issued anew before, as 2026-000002"]
    assert [row[3] for row in documents(world)] == ["void", "issued"]


@pytest.mark.parametrize("account", ["group", "north"])
def test_what_is_left_goes_on_once_all_it_pays_for_is_billed(
    world: DatabaseWorld, connection: "Connection[Any]", account: str
) -> None:
    """100 for October, and 6.00 of it used: 50 go on, and pay November's 8.40. A parent has no usage of its own."""
    start, end = (to_micros(datetime(2026, month, 1, tzinfo=UTC)) for month in (10, 11))
    asked = credits.Asked(account, "EUR", Grant("", 100 * 10**12, start, end), Rollover(50 * 10**12))
    request = credits.request_grant(connection, asked, reason="purchase", note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")
    for month in (OCTOBER, NOVEMBER):
        close(connection, world.settings, month)
    left = "SELECT amount, settled FROM finance.credits ORDER BY grant_id"
    assert query(world.settings, left) == [(100, 6), (50, Decimal("8.4"))]


def test_a_grant_of_before_rolls_over_whole(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Asked to take off what was used beyond it, which is billed: nothing is paid twice, and it does not wait."""
    start, end = (to_micros(datetime(2026, month, 1, tzinfo=UTC)) for month in (10, 11))
    asked = credits.Asked("north", "EUR", Grant("", 5 * 10**12, start, end), Rollover(5 * 10**12, 3 * 10**12))
    request = credits.request_grant(connection, asked, reason="purchase", note="", actor="ada")
    tamper(world.settings, "UPDATE billing.credit_grant SET preserve_overage = true")  # as it could be asked for once
    credits.decide(connection, request, "approved", actor="bob")
    for month in (OCTOBER, NOVEMBER):
        close(connection, world.settings, month)
    payable = query(world.settings, "SELECT total_amount::text, payable_amount::text FROM billing.document ORDER BY id")
    assert payable == [("6.00", "1.00"), ("8.40", "5.40")]


def test_what_is_credited_of_a_child_is_its_own_again(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """A parent and a child each paid for their lines; the parent's credits were drawn last."""
    group = "accounts: [{id: group, name: Group, contracts: [{id: group-1, plan: peaks, start: 2026-01-01}]}]"
    world.publish(group, "accounts", None)
    world.use(["2026-10-03T00:00:00Z group/a peak - n=30"], None)
    for account in ("group", "north"):
        asked = credits.Asked(account, "EUR", Grant("", 100 * 10**12, to_micros(datetime(2026, 1, 1, tzinfo=UTC))))
        request = credits.request_grant(connection, asked, reason="purchase", note="", actor="ada")
        credits.decide(connection, request, "approved", actor="bob")
    (october,) = close(connection, world.settings, OCTOBER)
    settled = "SELECT account, settled FROM finance.credits ORDER BY account"
    assert query(world.settings, settled) == [("group", 36), ("north", 6)]
    ((position,),) = query(world.settings, "SELECT position FROM billing.document_line WHERE account = 'north'")
    credit(connection, october, [Part(position)], reason="goodwill", note="", to="refund", actor="ada", now=NOW)
    assert query(world.settings, settled) == [("group", 36), ("north", 0)]
