"""Re-rating against PostgreSQL: what is booked, that it is booked once, and what is refused."""

import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipeline.billing import rerate as module
from pipeline.billing.close_entries import LineMoved, PeriodClosed, book, lock_period
from pipeline.billing.lines import open_invoices
from pipeline.billing.reconcile import Estimated, reconcile
from pipeline.billing.rerate import Month, Rerated, preview, rerate
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.running import query, tamper
from tests.operations.world import eventually
from tests.scenarios.database import DatabaseWorld

OCTOBER = Month(2026, 10)
PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: peak, event_type: call, aggregation: max, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: USD
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.1}
      - {id: peak, meter: peak, model: per_unit, unit_price: 1}
      - {id: fee, model: flat, unit_price: 9}
"""
ACCOUNTS = """
accounts:
  - {id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}
  - {id: umbrella, name: Umbrella, contracts: [{id: umbrella-1, plan: api, start: 2026-01-01}]}
"""


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    """Two accounts; acme has used 3 and 5, umbrella nothing: both owe the fee."""
    made = DatabaseWorld(tmp_path, settings)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    made.use(["2026-10-03T00:00:00Z acme/a call - n=5", "2026-10-04T00:00:00Z acme/b call - n=3"], None)
    return made


def booked(settings: Settings) -> list[tuple[str, str, list[str], Decimal, str, str]]:
    return query(
        settings,
        "SELECT account, charge, reasons, exact_amount, booked_by, note FROM finance.close_entries ORDER BY entry_id",
    )


def run(settings: Settings, **only: str) -> list[Rerated]:
    return list(rerate(settings.dsn, OCTOBER, actor="ada", note="month end", **only))


def test_books_what_lines_lack_once(world: DatabaseWorld) -> None:
    previewed = list(preview(world.settings.dsn, OCTOBER))
    assert booked(world.settings) == []
    found = run(world.settings)
    for before, after in zip(previewed, found, strict=True):
        assert [entry.amount for entry in before.entries] == [entry.amount for entry in after.entries]
    assert booked(world.settings) == [
        ("acme", "fee", ["fee"], 9, "ada", "month end"),
        ("umbrella", "fee", ["fee"], 9, "ada", "month end"),
    ]
    assert run(world.settings) == []
    assert len(booked(world.settings)) == 2
    lines = query(
        world.settings,
        "SELECT account, charge, exact_amount, quantity FROM finance.invoice_lines ORDER BY account, charge",
    )
    assert lines == [
        ("acme", "calls", Decimal("0.8"), 8),
        ("acme", "fee", 9, 1),
        ("acme", "peak", 5, 5),
        ("umbrella", "fee", 9, 1),
    ]


def test_only_one_account_or_charge(world: DatabaseWorld) -> None:
    assert run(world.settings, charge="calls") == []
    assert [one.account for one in run(world.settings, account="umbrella")] == ["umbrella"]
    assert [row[0] for row in booked(world.settings)] == ["umbrella"]
    with pytest.raises(LookupError, match="expected an account of the catalog, got 'nobody'"):
        run(world.settings, account="nobody")


def test_entries_are_never_changed(world: DatabaseWorld) -> None:
    run(world.settings)
    for statement in ("UPDATE billing.close_entry SET note = ''", "DELETE FROM billing.close_entry"):
        with pytest.raises(psycopg.errors.RaiseException, match="append only"):
            query(world.settings, statement)


def test_a_closed_period_is_a_problem_and_left_alone(world: DatabaseWorld) -> None:
    query(world.settings, "UPDATE billing.invoice SET state = 'issued' RETURNING 1")
    acme, umbrella = run(world.settings)
    assert acme.entries == ()
    assert acme.problem == (
        "1 lines differ, but the period is closed: what changes it now is an adjustment on the next invoice"
    )
    assert [entry.terms.charge for entry in umbrella.entries] == ["fee"]  # had no invoice yet
    assert [row[0] for row in booked(world.settings)] == ["umbrella"]


def test_an_invoice_without_lines_may_be_closed_too(world: DatabaseWorld) -> None:
    run(world.settings)
    tamper(world.settings, "DELETE FROM billing.rated_usage")
    query(
        world.settings,
        """INSERT INTO billing.invoice (account, currency, period_start, period_end, state)
        VALUES ('hooli', 'USD', '2026-10-01Z', '2026-11-01Z', 'issued') RETURNING 1""",
    )
    world.publish(ACCOUNTS.replace("umbrella", "hooli"), "accounts", None)
    with pytest.raises(PeriodClosed, match="expected the USD invoice of hooli to be open"):
        run(world.settings, account="hooli")


def test_usage_without_a_price_today_is_a_problem(world: DatabaseWorld) -> None:
    """Acme's contract is ended back-dated, between its two events."""
    world.publish(ACCOUNTS.replace("2026-01-01}]}", "2026-01-01, end: 2026-10-04}]}", 1), "accounts", None)
    acme, umbrella = run(world.settings)
    assert acme.entries == ()
    assert acme.problem is not None
    assert acme.problem.startswith("acme/b of 2026-10-04T00:00:00Z were billed and have no price by today's catalog")
    assert acme.problem.endswith("Publish what is missing, or void them")
    assert umbrella.entries


def test_no_row_comes_in_between(world: DatabaseWorld) -> None:
    """The sink waits for the invoice while it is re-rated: what is read under the lock is what is booked on."""
    catalog = world.catalog
    period = OCTOBER.period_in(catalog.accounts["acme"].time_zone)
    with connect(world.settings.dsn, application="test") as connection:
        lock_period(connection, "acme", period)
        late = threading.Thread(target=world.use, args=(["2026-10-05T00:00:00Z acme/c call - n=1"], None))
        late.start()
        late.join(0.5)
        assert late.is_alive()
        assert query(world.settings, "SELECT count(*) FROM billing.rated_usage") == [(4,)]
    late.join(10)
    assert query(world.settings, "SELECT count(*) FROM billing.rated_usage") == [(6,)]


def while_pricing(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Once, between reading an account's events and locking its invoices."""
    price, left = module.price_period, [happens]

    def priced(*arguments: Any) -> Any:
        closed = price(*arguments)
        if left:
            left.pop()()
        return closed

    monkeypatch.setattr(module, "price_period", priced)


def test_usage_goes_on_while_a_month_is_priced(world: DatabaseWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is locked then. What came meanwhile stays beside what is booked, as if it had come a moment later."""
    world.publish(DEARER, "prices", "2026-10-01T00:00:00Z")

    def uses() -> None:
        late = threading.Thread(target=world.use, args=(["2026-10-05T00:00:00Z acme/c call - n=1"], None))
        late.start()
        late.join(10)
        assert not late.is_alive(), "the sink waits for the invoice"

    while_pricing(monkeypatch, uses)
    run(world.settings, account="acme")
    lines = "SELECT charge, plan_version, quantity, exact_amount FROM finance.invoice_lines ORDER BY 1, 2"
    assert query(world.settings, lines) == [
        ("calls", 1, 0, 0),
        ("calls", 2, 9, Decimal("1.8")),  # 8 moved here, 1 rated here
        ("fee", 2, 1, 9),
        ("peak", 1, 0, 0),
        ("peak", 2, 5, 5),
    ]
    entry = "SELECT quantity_before, quantity_after FROM finance.close_entries WHERE charge = 'calls' ORDER BY entry_id"
    assert query(world.settings, entry) == [(1, 9), (8, 0)]
    assert found_by_reconcile(world.settings) == {}
    assert run(world.settings, account="acme") == []


def test_what_is_booked_meanwhile_is_not_booked_twice(world: DatabaseWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(DEARER, "prices", "2026-10-01T00:00:00Z")
    while_pricing(monkeypatch, lambda: [] if run(world.settings, account="acme") else None)
    assert run(world.settings, account="acme") == []
    assert len(booked(world.settings)) == 5


def test_a_period_closed_meanwhile_is_left_alone(world: DatabaseWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    close = "UPDATE billing.invoice SET state = 'issued' WHERE account = 'acme' RETURNING 1"
    while_pricing(monkeypatch, lambda: [] if query(world.settings, close) else None)
    [acme] = run(world.settings, account="acme")
    assert acme.problem is not None and "the period is closed" in acme.problem
    assert booked(world.settings) == []


def test_a_second_currency_deadlocks_with_no_sink(world: DatabaseWorld) -> None:
    """A sink has made the period's invoice in a second currency, and now wants the first; a re-rate wants both."""
    world.publish(PRICES.replace("id: api", "id: eur").replace("USD", "EUR"), "prices", None)
    both = "{id: acme-1, plan: api, start: 2026-01-01, end: 2026-10-04}, {id: acme-2, plan: eur, start: 2026-10-04}"
    world.publish(ACCOUNTS.replace("{id: acme-1, plan: api, start: 2026-01-01}", both), "accounts", None)
    period = OCTOBER.period_in("UTC")
    invoices = [("acme", currency, period.start_us, period.end_us) for currency in ("EUR", "USD")]
    failed: list[psycopg.Error] = []

    def rerates() -> None:
        try:
            run(world.settings, account="acme")
        except psycopg.Error as error:
            failed.append(error)

    with connect(world.settings.dsn, application="sink") as sink:
        open_invoices(sink, invoices)
        other = threading.Thread(target=rerates)
        other.start()
        waiting = """SELECT count(*) FROM pg_stat_activity
            WHERE application_name = 'tally-rerate' AND datname = current_database() AND wait_event_type = 'Lock'"""
        eventually(lambda: query(world.settings, waiting), lambda found: found == [(1,)])
        sink.execute("SELECT id FROM billing.invoice WHERE account = 'acme' ORDER BY id FOR NO KEY UPDATE")
    other.join(20)
    assert (other.is_alive(), failed) == (False, [])
    calls = "SELECT currency, sum(exact_amount) FROM finance.invoice_lines WHERE charge = 'calls' GROUP BY 1 ORDER BY 1"
    assert query(world.settings, calls) == [("EUR", Decimal("0.3")), ("USD", Decimal("0.5"))]


# -- and reconcile

DEARER = PRICES.replace("unit_price: 0.1", "unit_price: 0.2")
TODAY = "counters = under today's prices"


def found_by_reconcile(settings: Settings) -> dict[str, str]:
    """Checks of lines that show a difference, with what they say."""
    checks = [check for check in reconcile(settings).checks if check.difference]
    return {check.name: check.detail for check in checks if check.name.split(" = ")[0] not in _OF_RECEIPTS}


#: A story has rows and no receipts.
_OF_RECEIPTS = ("rated rows in receipts", "corrections in receipts")


def test_a_back_dated_price_is_found_until_it_is_booked(world: DatabaseWorld) -> None:
    run(world.settings)
    assert found_by_reconcile(world.settings) == {}
    world.publish(DEARER, "prices", "2026-10-04T00:00:00Z")
    found = found_by_reconcile(world.settings)
    assert found.keys() == {TODAY, "lines = by the versions valid at their events"}
    assert "holds 0.8 for 8, rated under api@1, which ends at 2026-10-04T00:00:00Z: `tally rerate`" in found[TODAY]
    run(world.settings)
    assert found_by_reconcile(world.settings) == {}
    world.use(["2026-10-06T00:00:00Z acme/c call - n=1"], None)  # a lower peak than the 3 moved here, which stays
    # Prices were moved between lines, where the rater cannot follow: an estimate until the close, and no difference.
    result = reconcile(world.settings)
    assert result.estimated == (Estimated("acme", "2026-10", 1),)
    assert result.estimated[0].command == "tally rerate --period 2026-10 --account acme"
    assert found_by_reconcile(world.settings) == {}
    run(world.settings)
    assert found_by_reconcile(world.settings) == {}
    assert reconcile(world.settings).estimated == ()


def test_what_is_voided_after_a_rerate_is_an_estimate_and_no_difference(world: DatabaseWorld) -> None:
    """Its old line goes below zero, its new one keeps it: together they are wrong by the change of the price."""
    world.publish(DEARER, "prices", "2026-10-01T00:00:00Z")
    run(world.settings)
    world.void("acme", "a")
    held = "SELECT plan_version, exact_amount FROM finance.invoice_lines WHERE charge = 'calls' ORDER BY 1"
    assert query(world.settings, held) == [(1, Decimal("-0.5")), (2, Decimal("1.6"))]
    assert found_by_reconcile(world.settings) == {}
    assert [(one.account, one.lines) for one in reconcile(world.settings).estimated] == [("acme", 4)]
    run(world.settings)
    assert query(world.settings, held) == [(1, 0), (2, Decimal("0.6"))]
    assert reconcile(world.settings).estimated == ()


def test_a_line_that_lacks_rows_in_a_re_rated_month_is_still_a_difference(world: DatabaseWorld) -> None:
    world.publish(DEARER, "prices", "2026-10-01T00:00:00Z")
    run(world.settings)
    query(world.settings, "UPDATE billing.invoice_line SET amount = amount + 1 WHERE charge = 'calls' RETURNING 1")
    assert "lines = with the sums of their rows and entries" in found_by_reconcile(world.settings)


def test_each_subjects_counter_has_its_own_price(world: DatabaseWorld) -> None:
    world.publish(
        PRICES.replace("meter: calls, model: per_unit, unit_price: 0.1", _PER_USER), "prices", "2026-10-10T00:00:00Z"
    )
    world.use([f"2026-10-1{n}T00:00:00Z acme/s{n} call {'ab'[n % 2]} n=8" for n in range(4)], None)
    run(world.settings)
    assert found_by_reconcile(world.settings) == {}
    tamper(world.settings, "UPDATE billing.rated_usage SET amount = amount + 1 WHERE idempotency_key = 's3'")
    query(
        world.settings, "UPDATE billing.invoice_line SET amount = amount + 1 WHERE price_version = 'api@2' RETURNING 1"
    )
    found = found_by_reconcile(world.settings)
    assert "whose price of a subject, 16, is 22" in found["counters = with the price of their quantity"]


_PER_USER = "meter: calls, per_subject: true, model: graduated, tiers: [{up_to: 10, unit_price: 1}, {unit_price: 2}]"


def test_a_line_that_came_in_between_is_not_booked_on_blindly(world: DatabaseWorld) -> None:
    """Umbrella has no invoice to hold. While its fee is about to be booked, another books it."""
    (found,) = preview(world.settings.dsn, OCTOBER, account="umbrella")
    run(world.settings, account="umbrella")
    with connect(world.settings.dsn, application="test") as connection:
        with pytest.raises(LineMoved):
            book(connection, "umbrella", found.entries, actor="bob", note="too late")
        connection.rollback()
    assert [row[4] for row in booked(world.settings)] == ["ada"]


@pytest.mark.parametrize("text", ["2026-13", "2026-1", "202610", "0000-01", "october"])
def test_a_month_is_a_year_and_a_month(text: str) -> None:
    with pytest.raises(ValueError, match="expected a month such as 2026-10"):
        Month.parse(text)


def test_a_month_is_the_accounts_own() -> None:
    assert Month.parse("2026-10") == OCTOBER
    hour_us = 3_600_000_000
    assert OCTOBER.period_in("Europe/Berlin").start_us == OCTOBER.period_in("UTC").start_us - 2 * hour_us
    assert OCTOBER.period_in("America/New_York").start_us == OCTOBER.period_in("UTC").start_us + 4 * hour_us
