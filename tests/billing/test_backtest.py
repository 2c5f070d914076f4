"""Backtests of usage that real rater and sink code has put into a real PostgreSQL."""

from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.billing import backtest as module
from pipeline.billing.backtest import Backtested, backtest
from pipeline.billing.rerate import Month, price_period
from pipeline.catalog.files import read_price_files
from pipeline.core.backtests import compare, priced_lines, with_candidates
from pipeline.core.catalog import Catalog
from pipeline.core.documents import Item
from pipeline.core.money import amount_decimal, quantity_decimal
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.scenarios.database import DatabaseWorld

PRICES = """\
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: users, event_type: call, aggregation: unique, value: user, unit: user}
plans:
  - id: standard
    name: Standard
    currency: USD
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.10}
      - {id: fee, model: flat, unit_price: 5}
  - id: pro
    name: Pro
    currency: USD
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.08}
"""
ACCOUNTS = """\
accounts:
  - {id: acme, name: Acme, contracts: [{plan: standard, start: 2026-01-01}]}
  - {id: berlin, name: Berlin, time_zone: Europe/Berlin, contracts: [{plan: standard, start: 2026-01-01}]}
  - {id: idle, name: Idle, contracts: [{plan: standard, start: 2026-10-17}]}
  - {id: prof, name: Prof, contracts: [{plan: pro, start: 2026-01-01}]}
"""
EVENTS = """\
2026-10-01T00:00:00Z acme/a1 call u1 n=100 user=u1
2026-10-20T00:00:00Z acme/a2 call u2 n=50  user=u2
2026-10-21T00:00:00Z acme/a3 call u2 n=7   user=u2
2026-11-01T00:00:00Z acme/a4 call u2 n=900 user=u2
2026-10-31T23:30:00Z berlin/b1 call u1 n=30 user=u1
2026-09-30T22:30:00Z berlin/b2 call u1 n=20 user=u1
2026-10-05T00:00:00Z prof/p1 call u1 n=10 user=u1
"""
OCTOBER = Month(2026, 10)


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    world = DatabaseWorld(tmp_path, settings)
    world.publish(PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    world.use(EVENTS.splitlines(), None)
    return world


def items(folder: Path, *edits: tuple[str, str]) -> list[Item]:
    text = PRICES
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    file = folder / "candidate.yaml"
    file.write_text(text)
    drafts = read_price_files([file])
    assert not drafts.findings, drafts.findings
    return [draft.item for draft in drafts.all()]


def backtested(settings: Settings, candidate: list[Item], **options: bool) -> dict[str, Backtested]:
    return {one.account: one for one in backtest(settings.dsn, OCTOBER, candidate, **options)}


def moves(account: Backtested) -> list[tuple[str, str, str]]:
    return [
        (one.charge, *(f"{amount_decimal(side.amount).normalize():f}" if side else "-" for side in sides))
        for one in account.prices
        if (sides := (one.before, one.after)) and one.moved
    ]


def by_events(world: DatabaseWorld, account: str, candidate: list[Item], *charges: str) -> object:
    """What pricing each stored event gives these charges, whatever way a backtest takes."""
    later = Catalog.empty().extend(with_candidates(world.versions, candidate), 0)
    period = OCTOBER.period_in(world.catalog.accounts[account].time_zone)
    with connect(world.settings.dsn, application="test") as connection:
        return tuple(
            compare(
                *(
                    priced_lines(price_period(connection, catalog, account, period), charges)
                    for catalog in (world.catalog, later)
                )
            )
        )


def test_a_price_by_running_totals(world: DatabaseWorld, tmp_path: Path) -> None:
    candidate = items(tmp_path, ("unit_price: 0.10", "unit_price: 0.20"))
    found = backtested(world.settings, candidate)
    assert {name: one.way for name, one in found.items()} == {
        "acme": "totals",
        "berlin": "totals",
        "idle": "totals",
        "prof": "unconcerned",
    }
    assert moves(found["acme"]) == [("calls", "15.7", "31.4")]
    assert moves(found["berlin"]) == [("calls", "2", "4")], "the month of its own time zone"
    assert moves(found["idle"]) == moves(found["prof"]) == []
    for name in ("acme", "berlin", "idle"):
        assert found[name].prices == by_events(world, name, candidate, "calls")


def test_who_used_nothing_pays_a_fee_all_the_same(world: DatabaseWorld, tmp_path: Path) -> None:
    found = backtested(world.settings, items(tmp_path, ("unit_price: 5", "unit_price: 6.20")))
    assert moves(found["acme"]) == [("fee", "5", "6.2")]
    (fee,) = [one for one in found["idle"].prices if one.charge == "fee"]
    assert fee.before is not None and fee.after is not None
    assert amount_decimal(fee.after.billed - fee.before.billed) == Decimal("0.58"), "15 of 31 days of 1.20"


CALLS = "{id: calls, meter: calls, model: per_unit, unit_price: 0.10}"


@pytest.mark.parametrize(
    "charge",
    [
        "{id: calls, meter: calls, model: per_unit, unit_price: 0.20, by: [user]}",
        "{id: calls, meter: calls, model: graduated, per_subject: true, tiers: [{unit_price: 0.1, flat: 1}]}",
        "{id: calls, meter: calls, model: matrix, unit_price: 1, by: [user], "
        "cells: [{when: {user: u1}, unit_price: 0.5}]}",
    ],
)
def test_usage_split_otherwise_by_sums_of_its_parts(world: DatabaseWorld, tmp_path: Path, charge: str) -> None:
    """Also without what was voided: subject u1 has no other event, and owes no flat fee."""
    world.void("acme", "a1")
    candidate = items(tmp_path, ("unit: call}", "unit: call, dimensions: [user]}"), (CALLS, charge))
    world.publish((tmp_path / "candidate.yaml").read_text().replace(charge, CALLS), "prices", "2026-01-01T00:00:00Z")
    found = backtested(world.settings, candidate)["acme"]
    assert found.way == "totals"
    assert found.prices == by_events(world, "acme", candidate, "calls")


def test_a_price_that_was_back_dated(world: DatabaseWorld, tmp_path: Path) -> None:
    """A back-dated price list: the lines were rated by other prices than today's, so their sums are not trusted."""
    candidate = items(tmp_path, ("unit_price: 0.10", "unit_price: 0.20"))
    listed = (
        "price_lists:\n  - {id: acme, name: A, plan: standard, currency: USD, account: acme, valid_from: 2026-10-10, "
        "charges: [{id: calls, unit_price: 0.05}]}"
    )
    world.publish(PRICES + listed, "prices", None)
    found = backtested(world.settings, candidate)["acme"]
    assert found.way == "events"
    assert found.prices == by_events(world, "acme", candidate, "calls")


def test_event_by_event_where_sums_do_not_do(world: DatabaseWorld, tmp_path: Path) -> None:
    users = "      - {id: users, meter: users, model: per_unit, unit_price: 2}\n  - id: pro"
    candidate = items(tmp_path, ("  - id: pro", users))
    found = backtested(world.settings, candidate)
    assert (found["acme"].way, found["idle"].way) == ("events", "events")
    assert moves(found["acme"]) == [("users", "-", "4")]
    assert found["acme"].prices == by_events(world, "acme", candidate, "users")


def test_a_meter_that_measures_otherwise(world: DatabaseWorld, tmp_path: Path) -> None:
    candidate = items(tmp_path, ("aggregation: sum, value: n", "aggregation: count"))
    found = backtested(world.settings, candidate)
    assert {name: one.way for name, one in found.items()} == {
        "acme": "events",
        "berlin": "events",
        "idle": "totals",  # without usage there is nothing to measure
        "prof": "events",
    }
    (calls,) = [one for one in found["acme"].prices if one.charge == "calls"]
    assert calls.before is not None and calls.after is not None
    assert [quantity_decimal(side.quantity) for side in (calls.before, calls.after)] == [157, 3]


def test_what_was_voided_is_no_usage(world: DatabaseWorld, tmp_path: Path) -> None:
    world.void("acme", "a1")
    candidate = items(tmp_path, ("unit_price: 0.10", "unit_price: 0.20"))
    found = backtested(world.settings, candidate)["acme"]
    assert moves(found) == [("calls", "5.7", "11.4")]
    assert found.prices == by_events(world, "acme", candidate, "calls")


def test_lines_that_close_entries_moved_are_read_event_by_event(world: DatabaseWorld, tmp_path: Path) -> None:
    candidate = items(tmp_path, ("unit_price: 0.10", "unit_price: 0.20"))
    before = backtested(world.settings, candidate)["acme"]
    with connect(world.settings.dsn, application="test") as connection:
        connection.execute(
            "INSERT INTO billing.close_entry (line_id, reasons, quantity_before, quantity_after, amount_before, "
            "amount_after, booked_by) SELECT id, '{back_dated}', quantity, 0, amount, 0, 'test' "
            "FROM billing.invoice_line WHERE charge = 'calls'"
        )
        connection.execute("UPDATE billing.invoice_line SET quantity = 0, amount = 0 WHERE charge = 'calls'")
    after = backtested(world.settings, candidate)["acme"]
    assert (before.way, after.way) == ("totals", "events")
    assert before.prices == after.prices


def test_usage_without_a_price_and_prices_that_do_not_reach(world: DatabaseWorld, tmp_path: Path) -> None:
    other = "meters:\n  - {id: jobs, event_type: job, aggregation: count, unit: job}"
    calls = "{id: calls, meter: calls, model: per_unit, unit_price: 0.10}"
    gone = items(tmp_path, ("meters:", other), (calls, "{id: jobs, meter: jobs, model: per_unit, unit_price: 1}"))
    found = backtested(world.settings, gone)["acme"]
    assert found.unpriced == (0, 3) and moves(found) == [("calls", "15.7", "-")]

    tier = "{id: calls, meter: calls, model: graduated, beyond: park, tiers: [{up_to: 100, unit_price: 1}]}"
    found = backtested(world.settings, items(tmp_path, (calls, tier)))["acme"]
    assert found.prices == () and found.problem is not None and "calls" in found.problem


def test_all_accounts_in_processes_with_progress(
    world: DatabaseWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = items(tmp_path, ("unit_price: 0.10", "unit_price: 0.20"))
    alone = backtested(world.settings, candidate, whole=True)
    assert moves(alone["prof"]) == [] and len(alone["prof"].prices) == 1
    monkeypatch.setattr(module, "_PORTION_ACCOUNTS", 1)
    monkeypatch.setattr(module, "_WORTH_PROCESSES", 0)
    steps: list[tuple[int, int]] = []
    found = backtest(
        world.settings.dsn,
        OCTOBER,
        candidate,
        whole=True,
        jobs=2,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert {one.account: one for one in found} == alone
    assert steps[0][0] == 0 and steps == sorted(steps) and len(steps) == 5
    assert steps[-1][0] == 5, "rated rows of October, in each account's own zone"


def test_accounts_and_contracts_are_no_prices(world: DatabaseWorld) -> None:
    with pytest.raises(ValueError, match="expected meters, plans and price lists"):
        list(backtest(world.settings.dsn, OCTOBER, [world.catalog.accounts["acme"]]))
