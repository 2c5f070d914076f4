"""Unit credits through closes, late usage, voids and reviews: units are drawn before pricing, and never twice."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing import credits, queue
from pipeline.billing.close import preview, work
from pipeline.billing.close_chunk import Step
from pipeline.billing.explain import explain
from pipeline.billing.invoicing_store import mark
from pipeline.billing.own_documents import bill_adjustments, payer_of, preview_adjustments, reissue
from pipeline.billing.rerate import Month
from pipeline.billing.reviewing import review
from pipeline.billing.thresholds import bill_if_reached
from pipeline.billing.voids import void
from pipeline.core.credits import Grant, Rollover
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER, DECEMBER = Month(2026, 10), Month(2026, 11), Month(2026, 12)
NOW = datetime(2026, 11, 5, tzinfo=UTC)
PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: peak, event_type: call, aggregation: max, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: graduated, tiers: [{up_to: 10, unit_price: 2}, {unit_price: 1}]}
  - id: pooled
    name: Pooled
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 1, included: 2}
    pools:
      - {id: shared, unit: call, included: 3, charges: [calls]}
  - id: peaks
    name: Peaks
    currency: EUR
    charges:
      - {id: peak, meter: peak, model: per_unit, unit_price: 1}
"""
ACCOUNTS = """
accounts:
  - {id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}
  - {id: child, name: Child, parent: acme, contracts: [{id: child-1, plan: api, start: 2026-01-01}]}
  - {id: pool, name: Pool, contracts: [{id: pool-1, plan: pooled, start: 2026-01-01}]}
  - {id: peaks, name: Peaks, contracts: [{id: peaks-1, plan: peaks, start: 2026-01-01}]}
"""


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, *(customer(account) for account in ("acme", "child", "pool", "peaks")))
        yield made


def give(
    connection: "Connection[Any]",
    units: int,
    account: str = "acme",
    *,
    start: str = "2026-10-04",
    end: str | None = None,
    charge: str = "calls",
    rollover: Rollover | None = None,
) -> int:
    first, last = (None if day is None else to_micros(datetime.fromisoformat(f"{day}T00:00Z")) for day in (start, end))
    grant = Grant("", units * QUANTITY_ONE, first or 0, last, "prepaid", "units", charges=frozenset({charge}))
    asked = credits.Asked(account, "call", grant, rollover)
    request = credits.request_grant(connection, asked, reason="purchase", note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")
    return request


def billed(settings: Settings) -> list[tuple[Any, ...]]:
    """Lines of what was issued, with the units that stand as parts paid for by credits."""
    return query(
        settings,
        "SELECT line.account, line.role, trim_scale(line.quantity), trim_scale(line.amount), "
        "(SELECT sum((part ->> 'quantity')::numeric) FROM jsonb_array_elements(line.detail -> 'parts') AS part "
        " WHERE part ->> 'kind' = 'credits') "
        "FROM billing.document_line AS line JOIN billing.document ON document.id = line.document_id "
        "WHERE document.state = 'issued' ORDER BY line.document_id, line.position",
    )


def drawn(settings: Settings) -> list[tuple[Any, ...]]:
    """What was drawn of each grant for each period, in the order of entries."""
    return query(
        settings,
        "SELECT entry.grant_id, invoice.account, to_char(period_start, 'YYYY-MM'), trim_scale(entry.amount) "
        "FROM billing.credit_entry AS entry JOIN billing.invoice_line AS line ON line.id = entry.line_id "
        "JOIN billing.invoice ON invoice.id = line.invoice_id AND invoice.id = entry.invoice_id ORDER BY entry.id",
    )


def check_lines(settings: Settings) -> None:
    """Law 8: rows and close entries are what each line holds, and documents add up."""
    assert query(settings, "SELECT * FROM finance.document_checks") == []
    assert (
        query(
            settings,
            "SELECT line.id FROM billing.invoice_line AS line WHERE (line.quantity, line.amount) NOT IN ("
            "  SELECT coalesce(sum(quantity), 0), coalesce(sum(amount), 0) FROM ("
            "    SELECT quantity_after - quantity_before AS quantity, amount FROM billing.rated_usage "
            "    WHERE line_id = line.id "
            "    UNION ALL SELECT quantity_after - quantity_before, amount_after - amount_before "
            "    FROM billing.close_entry WHERE line_id = line.id) AS parts)",
        )
        == []
    )


def test_units_pay_for_usage_of_their_time_before_it_is_priced(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """20 calls, of which 15 while 12 units count: 8 calls are priced, at 2.00 as the first tier says."""
    grant = give(connection, 12)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=15", "2026-10-03T00:00:00Z acme/a call - n=5"], None)
    shown = next(payer for payer in preview(world.settings, OCTOBER, actor="ada"))
    assert [one.document.lines_amount for one in shown.documents] == [1600]
    assert drawn(world.settings) == []
    close(connection, world.settings, OCTOBER)
    assert billed(world.settings) == [("acme", "new", 20, 16, 12)]
    assert drawn(world.settings) == [(grant, "acme", "2026-10", 12)]
    assert query(
        world.settings, "SELECT reasons, trim_scale(amount_before), trim_scale(amount_after) FROM billing.close_entry"
    ) == [(["credited"], 30, 16)]
    assert query(world.settings, "SELECT settled, remaining FROM finance.credits") == [(12, 0)]
    check_lines(world.settings)
    assert world.missing("acme", str(OCTOBER)) == [], "re-rating knows what was drawn"
    ((line,),) = query(world.settings, "SELECT id FROM billing.invoice_line")
    arithmetic = (explain(world.settings, f"line:{line}") or {})["arithmetic"]
    assert arithmetic["proved"]
    assert arithmetic["parts"][0]["text"] == "12 calls paid for by credits: free"
    until = mark(connection)
    assert queue.begin(connection, str(OCTOBER), (), invoicing_mark=until, consolidating=(), actor="x") is None


def test_re_rating_draws_nothing_and_the_close_does(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """A pool's 3 and the 2 included go before the 4 units: of 10 calls 1 is priced."""
    grant = give(connection, 4, "pool", start="2026-10-01")
    world.use(["2026-10-03T00:00:00Z pool/a call - n=10"], None)
    world.rerate("pool", str(OCTOBER))
    assert drawn(world.settings) == []
    close(connection, world.settings, OCTOBER)
    assert billed(world.settings) == [("pool", "new", 10, 1, 4)]
    assert drawn(world.settings) == [(grant, "pool", "2026-10", 4)]
    check_lines(world.settings)


def test_late_usage_draws_what_is_left(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """20 units: October draws 6, November 8; of the 10 calls that come late for October 6 are still paid for."""
    grant = give(connection, 20)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=6", "2026-11-05T00:00:00Z acme/b call - n=8"], None)
    close(connection, world.settings, OCTOBER)
    close(connection, world.settings, NOVEMBER)
    assert [row[1:] for row in billed(world.settings)] == [("new", 6, 0, 6), ("new", 8, 0, 8)]
    world.use(["2026-10-04T00:00:00Z acme/late call - n=10"], "2026-11-03T00:00:00Z")
    payer = payer_of(connection, "acme", NOW)
    (shown,) = preview_adjustments(connection, payer)
    assert [(one.quantity, one.grant) for one in shown.units] == [(6 * QUANTITY_ONE, grant)]
    assert shown.total == 960  # 4 calls at 2.00, and 20 %
    close(connection, world.settings, DECEMBER)
    assert [row[1:] for row in billed(world.settings)][2:] == [("reversal", -6, 0, None), ("new", 16, 8, 12)]
    assert drawn(world.settings) == [
        (grant, "acme", "2026-10", 6),
        (grant, "acme", "2026-11", 8),
        (grant, "acme", "2026-10", 6),
    ]
    check_lines(world.settings)
    assert preview_adjustments(connection, payer) == []
    assert world.missing("acme", str(OCTOBER)) == world.missing("acme", str(NOVEMBER)) == []


def test_late_usage_and_the_month_that_is_closed_share_what_is_left(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """Of 10 units October drew 4; in November's close what came late for October draws before November itself."""
    grant = give(connection, 10)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=4", "2026-11-05T00:00:00Z acme/b call - n=4"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-06T00:00:00Z acme/late call - n=5"], "2026-11-03T00:00:00Z")
    close(connection, world.settings, NOVEMBER)
    assert sorted(row[1:] for row in billed(world.settings)) == sorted(
        [("new", 4, 0, 4), ("new", 4, 6, 1), ("reversal", -4, 0, None), ("new", 9, 0, 9)]
    )
    assert sorted(drawn(world.settings)) == [
        (grant, "acme", "2026-10", 4),
        (grant, "acme", "2026-10", 5),
        (grant, "acme", "2026-11", 1),
    ]
    check_lines(world.settings)


def test_usage_that_is_taken_back_gives_its_units_back(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """All of October's, of which nothing is left; they pay for November's usage."""
    grant = give(connection, 10)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=8", "2026-11-05T00:00:00Z acme/b call - n=9"], None)
    close(connection, world.settings, OCTOBER)
    world.void("acme", "a")
    close(connection, world.settings, NOVEMBER)
    assert drawn(world.settings) == [
        (grant, "acme", "2026-10", 8),
        (grant, "acme", "2026-10", -8),
        (grant, "acme", "2026-11", 9),
    ]
    check_lines(world.settings)


def test_two_closes_at_once_draw_the_same_units_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """October draws 8 of 10 units; December, whose close begins before October's has booked them, waits and gets 2."""
    grant = give(connection, 10)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=8", "2026-12-05T00:00:00Z acme/b call - n=8"], None)
    october, december = (
        queue.begin(connection, str(month), ("acme",), invoicing_mark=mark(connection), consolidating=(), actor="x")
        for month in (OCTOBER, DECEMBER)
    )
    assert october and december
    reckoned, other_waits = Event(), Event()

    def pause(step: Step) -> None:
        if step == Step.RECKONED:
            reckoned.set()
            assert other_waits.wait(20), "expected the other close to wait"

    def run(id: int, reached: Callable[[Step], None]) -> None:
        list(work(world.settings.dsn, id, "x", reached=reached, clock=lambda: datetime(2027, 1, 2, tzinfo=UTC)))

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, october.id, pause)
        assert reckoned.wait(20)
        second = threads.submit(run, december.id, lambda _: None)
        until = time.monotonic() + 15
        while query(world.settings, waiting) != [(1,)] and time.monotonic() < until:
            time.sleep(0.02)
        assert not second.done(), "it did not wait"
        other_waits.set()
        first.result()
        second.result()
    assert drawn(world.settings) == [(grant, "acme", "2026-10", 8), (grant, "acme", "2026-12", 2)]
    assert [(row[3], row[4]) for row in billed(world.settings)] == [(0, 8), (12, 2)]
    check_lines(world.settings)


def test_a_child_draws_its_own_units(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """On its parent's invoice, whose own units are for its own usage."""
    apply(connection, customer("acme", consolidates=True))
    own, of_child = give(connection, 3, start="2026-10-01"), give(connection, 4, "child", start="2026-10-01")
    world.use(["2026-10-05T00:00:00Z acme/a call - n=5", "2026-10-05T00:00:00Z child/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    assert billed(world.settings) == [("acme", "new", 5, 4, 3), ("child", "new", 5, 2, 4)]
    assert drawn(world.settings) == [(own, "acme", "2026-10", 3), (of_child, "child", "2026-10", 4)]


def test_a_draft_draws_nothing_until_it_is_reviewed(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    apply(connection, replace(ENTITY, review=True))
    grant = give(connection, 10)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=8"], None)
    close(connection, world.settings, OCTOBER)
    assert drawn(world.settings) == []
    ((draft,),) = query(world.settings, "SELECT id FROM billing.document WHERE account = 'acme'")
    review(connection, draft, now=NOW, actor="bob")
    assert drawn(world.settings) == [(grant, "acme", "2026-10", 8)]


def test_an_invoice_issued_anew_keeps_its_units(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    grant = give(connection, 10)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=8"], None)
    (october,) = close(connection, world.settings, OCTOBER)
    void(connection, october, reason="wrong_details", note="", actor="ada", now=NOW)
    world.use(["2026-10-06T00:00:00Z acme/late call - n=8"], "2026-11-03T00:00:00Z")
    assert reissue(connection, october, note="", now=NOW, actor="ada").total == Decimal("14.4")  # 6 at 2.00
    assert drawn(world.settings) == [(grant, "acme", "2026-10", 8), (grant, "acme", "2026-10", 2)]
    assert billed(world.settings) == [("acme", "new", 16, 12, 10)]
    check_lines(world.settings)


def test_an_adjustment_on_its_own_draws_too(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    grant = give(connection, 10)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=8"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-06T00:00:00Z acme/late call - n=8"], "2026-11-03T00:00:00Z")
    (made,) = bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    assert made.total == Decimal("14.4")
    assert drawn(world.settings) == [(grant, "acme", "2026-10", 8), (grant, "acme", "2026-10", 2)]
    check_lines(world.settings)


def test_a_threshold_bills_what_units_will_not_pay_for(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    apply(connection, customer("acme", threshold=10**12))
    grant, payer = give(connection, 6), payer_of(connection, "acme", NOW)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=8"], None)
    now = datetime(2026, 10, 20, tzinfo=UTC)
    (found,) = bill_if_reached(connection, payer, OCTOBER, now=now, actor="ada")
    assert (found.used, found.made and found.made.total) == (4, Decimal("4.8"))
    assert drawn(world.settings) == []
    close(connection, world.settings, OCTOBER)
    assert drawn(world.settings) == [(grant, "acme", "2026-10", 6)]
    assert query(world.settings, "SELECT sum(net_amount) FROM billing.document") == [(4,)]


def test_what_rolled_over_is_not_drawn_by_late_usage(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Of October's 10 units 7 went on into November's: late usage of October finds none."""
    rollover = Rollover(10 * QUANTITY_ONE)
    first = give(connection, 10, start="2026-10-01", end="2026-11-01", rollover=rollover)
    world.use(["2026-10-05T00:00:00Z acme/a call - n=3"], None)
    close(connection, world.settings, OCTOBER)
    close(connection, world.settings, NOVEMBER)
    ((second, amount),) = query(
        world.settings, "SELECT id, trim_scale(amount) FROM billing.credit_grant WHERE rolled_from = %s", first
    )
    assert amount == 7
    world.use(["2026-10-06T00:00:00Z acme/late call - n=2"], "2026-11-03T00:00:00Z")
    (made,) = bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    assert made.total == Decimal("4.8")
    assert [row[:1] + row[3:] for row in drawn(world.settings)] == [(first, 3)]
    assert second != first


def test_units_of_a_charge_without_a_quantity_that_adds_up_are_refused(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    give(connection, 5, "peaks", charge="peak")
    world.use(["2026-10-05T00:00:00Z peaks/a call - n=8"], None)
    run = queue.begin(
        connection, str(OCTOBER), ("peaks",), invoicing_mark=mark(connection), consolidating=(), actor="x"
    )
    assert run is not None
    list(work(world.settings.dsn, run.id, "x", clock=lambda: NOW))
    (failed,) = queue.failed(connection, run.id, 9)
    assert "unit credits were granted for charge peak, which cannot draw units" in (failed.problem or "")
    assert billed(world.settings) == []
