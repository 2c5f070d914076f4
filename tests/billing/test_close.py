"""Closing a month against PostgreSQL: what is issued, once, and what is left alone."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing import close_chunk, credits, queue
from pipeline.billing.close import preview, work
from pipeline.billing.close_chunk import preview_tasks
from pipeline.billing.close_known import read_known
from pipeline.billing.close_writing import settle_money
from pipeline.billing.documents import NotIssuable
from pipeline.billing.fx_rates import load as load_rates
from pipeline.billing.invoicing_store import consolidating, mark
from pipeline.billing.queue import Run
from pipeline.billing.rerate import Month
from pipeline.billing.reviewing import Moved, issue_reviewed, review
from pipeline.billing.statements import read_booked
from pipeline.catalog.files import read_account_files
from pipeline.catalog.publish import Refused, publish
from pipeline.core.commitments import Commitment, Window
from pipeline.core.credits import GRANT_REASONS, Grant, GrantKind, Reduces, Rollover
from pipeline.core.discounts import Coupon
from pipeline.core.parties import CustomerCoupon
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, customer
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER = "2026-10", "2026-11"
PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: peak, event_type: call, aggregation: max, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.333}
      - {id: peak, meter: peak, model: per_unit, unit_price: 1}
      - {id: fee, model: flat, unit_price: 9}
  - id: ahead
    name: Ahead
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.5}
      - {id: seat, model: flat, unit_price: 30, in_advance: true}
"""
ACCOUNTS = """
accounts:
  - {id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}
  - {id: umbrella, name: Umbrella, contracts: [{id: umbrella-1, plan: api, start: 2026-01-01}]}
"""


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES)
        yield made


def begin(connection: "Connection[Any]", month: str = OCTOBER, *accounts: str) -> Run | None:
    until = mark(connection)
    parents = consolidating(connection, applied_until=until, on=date(2026, 12, 31))
    return queue.begin(connection, month, accounts, invoicing_mark=until, consolidating=parents, actor="ada")


def close(connection: "Connection[Any]", settings: Settings, month: str = OCTOBER, *accounts: str) -> Run:
    """As the command does, without its gate."""
    run = begin(connection, month, *accounts)
    assert run is not None, "expected something to close"
    now = datetime(2026, int(month[-2:]) + 1, 2, tzinfo=UTC)
    list(work(settings.dsn, run.id, "ada", clock=lambda: now))
    assert queue.finish(connection, run.id)
    return run


def documents(settings: Settings) -> list[tuple[Any, ...]]:
    return query(
        settings,
        "SELECT account, number, kind::text, lines_amount, discounts_amount, net_amount, tax_amount, total_amount, "
        "credits_amount, balance_amount, payable_amount FROM billing.document ORDER BY id",
    )


def lines(settings: Settings, number: str) -> list[tuple[Any, ...]]:
    return query(
        settings,
        "SELECT line.account, line.kind, line.role, line.charge, line.quantity, line.amount, line.net_amount "
        "FROM billing.document_line AS line JOIN billing.document ON document.id = line.document_id "
        "WHERE number = %s ORDER BY position",
        number,
    )


def use(world: DatabaseWorld, *uses: str) -> None:
    world.use(list(uses), None)


def test_issues_every_payers_document_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """20 calls at 0.333 are 6.66, the peak of 15 is 15, the fee 9; 20 % tax. Who used nothing owes the fee."""
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    use(world, "2026-10-03T00:00:00Z acme/a call - n=5", "2026-10-04T00:00:00Z acme/b call - n=15")
    run = close(connection, world.settings)
    net, tax, total = Decimal("30.66"), Decimal("6.13"), Decimal("36.79")
    issued = [
        ("acme", "2026-000001", "invoice", net, 0, net, tax, total, 0, 0, total),
        ("umbrella", "2026-000002", "invoice", 9, 0, 9, Decimal("1.8"), Decimal("10.8"), 0, 0, Decimal("10.8")),
    ]
    assert documents(world.settings) == issued
    assert lines(world.settings, "2026-000001") == [
        ("acme", "usage", "new", "calls", 20, Decimal("6.66"), Decimal("6.66")),
        ("acme", "usage", "new", "peak", 15, 15, 15),
        ("acme", "fee", "new", "fee", 1, 9, 9),
    ]
    # Lines are linked to the containers' lines, those that the close made too, and these hold what was billed.
    assert query(
        world.settings,
        "SELECT count(*) FROM billing.document_line AS line JOIN billing.invoice_line AS held "
        "ON (held.id, held.amount, held.quantity) = (line.line_id, line.exact_amount, line.quantity)",
    ) == [(4,)]
    assert query(world.settings, "SELECT DISTINCT state::text FROM billing.invoice") == [("issued",)]
    assert queue.outcomes(connection, run.id) == {"issued": 2}
    assert begin(connection) is None, "closed already: nothing to begin"
    assert begin(connection, OCTOBER, "acme") is None
    assert query(world.settings, "SELECT count(*) FROM billing.close_run") == [(1,)]
    assert documents(world.settings) == issued


def test_a_dry_run_shows_the_same_and_changes_nothing(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"))
    use(world, "2026-10-03T00:00:00Z acme/a call - n=5")
    tables = "close_run", "document", "close_entry", "audit", "number_range"
    before = [query(world.settings, f"SELECT count(*) FROM billing.{table}") for table in tables]
    acme, umbrella = preview(world.settings, Month.parse(OCTOBER), actor="ada")
    assert [query(world.settings, f"SELECT count(*) FROM billing.{table}") for table in tables] == before
    assert "expected umbrella as a customer" in (umbrella.problem or "")
    (shown,) = acme.documents
    close(connection, world.settings)
    ((_, _, _, amount, _, _, tax, *_),) = documents(world.settings)
    assert (shown.document.lines_amount, shown.document.tax_amount) == (amount * 100, tax * 100)


def test_who_cannot_be_closed_stands_in_nobodys_way(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"))
    run = close(connection, world.settings)
    (failed,) = queue.failed(connection, run.id, 9)
    assert failed.payer == "umbrella"
    assert "expected umbrella as a customer with name and address as of 2026-10-31, got none" in (failed.problem or "")
    assert query(world.settings, "SELECT account, state::text FROM billing.invoice ORDER BY account") == [
        ("acme", "issued"),
        ("umbrella", "open"),
    ]
    apply(connection, customer("umbrella"))
    close(connection, world.settings)
    assert [(account, number) for account, number, *_ in documents(world.settings)] == [
        ("acme", "2026-000001"),
        ("umbrella", "2026-000002"),
    ]


def test_a_payer_that_breaks_a_rule_of_the_program_stops_nobody_else(
    world: DatabaseWorld, connection: "Connection[Any]", monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))

    def of_acme_breaks(connection: Any, payers: Any, *rest: Any) -> Any:
        assert "acme" not in {payer.task.payer for payer in payers}
        return settle_money(connection, payers, *rest)

    monkeypatch.setattr(close_chunk, "settle_money", of_acme_breaks)
    run = close(connection, world.settings)
    assert [one.payer for one in queue.failed(connection, run.id, 9)] == ["acme"]
    assert [row[:2] for row in documents(world.settings)] == [("umbrella", "2026-000001")]


CHILDREN = """
accounts:
  - {id: group, name: Group, contracts: [{id: group-1, plan: api, start: 2026-01-01}]}
  - {id: north, name: North, parent: group, contracts: [{id: north-1, plan: api, start: 2026-01-01}]}
  - {id: south, name: South, parent: group, contracts: [{id: south-1, plan: api, start: 2026-01-01}]}
"""


def test_a_parent_gets_one_document_with_lines_of_each_child(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    world.publish(CHILDREN, "accounts", None)
    apply(connection, customer("group", consolidates=True))
    use(world, "2026-10-03T00:00:00Z north/a call - n=2", "2026-10-03T00:00:00Z south/a call - n=3")
    close(connection, world.settings)
    ((account, number, *_),) = documents(world.settings)
    assert account == "group"
    assert [(line[0], line[3], line[5]) for line in lines(world.settings, number)] == [
        ("group", "fee", 9),
        ("north", "calls", Decimal("0.67")),
        ("north", "peak", 2),
        ("north", "fee", 9),
        ("south", "calls", 1),
        ("south", "peak", 3),
        ("south", "fee", 9),
    ]
    assert query(world.settings, "SELECT count(*) FROM billing.invoice WHERE state = 'issued'") == [(3,)]
    assert begin(connection, OCTOBER, "north") is None, "a child is closed with its parent"


HOLDING = """
accounts:
  - {id: holding, name: Holding}
  - {id: leaf, name: Leaf, parent: holding, contracts: [{id: leaf-1, plan: api, start: 2026-01-01}]}
  - {id: west, name: West, time_zone: America/Los_Angeles, contracts: [{id: west-1, plan: api, start: 2026-01-01}]}
"""


def test_a_parents_period_is_that_of_its_own_children(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """A payer elsewhere, closed in the same transaction, ends later: that moves nobody else's tax date."""
    world.publish(HOLDING, "accounts", None)
    apply(connection, customer("holding", consolidates=True), customer("west"))
    use(world, "2026-10-03T00:00:00Z leaf/a call - n=2", "2026-10-03T00:00:00Z west/a call - n=3")
    close(connection, world.settings)
    taxed = query(world.settings, "SELECT account, tax_date, period_end FROM billing.document ORDER BY account")
    assert taxed == [
        ("holding", date(2026, 10, 31), datetime(2026, 11, 1, tzinfo=UTC)),
        ("west", date(2026, 10, 31), datetime(2026, 11, 1, 7, tzinfo=UTC)),
    ]


AHEAD = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: ahead, start: 2026-10-16}]}]"


def test_fees_in_advance_are_billed_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """From 16 October: 16 of 31 days of the first month, and November ahead; then December only."""
    world.publish(AHEAD, "accounts", None)
    apply(connection, customer("acme"))
    close(connection, world.settings)
    assert lines(world.settings, "2026-000001") == [
        ("acme", "fee", "new", "seat", 1, Decimal("15.48"), Decimal("15.48")),
        ("acme", "fee", "new", "seat", 1, 30, 30),
    ]
    use(world, "2026-11-03T00:00:00Z acme/a call - n=2")
    close(connection, world.settings, NOVEMBER)
    assert lines(world.settings, "2026-000002") == [
        ("acme", "usage", "new", "calls", 2, 1, 1),
        ("acme", "fee", "new", "seat", 1, 30, 30),
    ]
    # A run that finds the month closed by another one, as two at once do, bills and takes back nothing.
    (again,) = queue.planned(connection, "", ["acme"], consolidating=())
    with connection.transaction():
        run = Run(0, NOVEMBER, (), 0, mark(connection), datetime.now(UTC), "ada")
        (done,) = preview_tasks(connection, read_known(connection, run), [again], now=datetime.now(UTC), actor="ada")
    assert (done.closed, done.documents, done.problem) == (1, [], None)
    starts = query(world.settings, "SELECT period_start::date::text FROM billing.document_line WHERE charge = 'seat'")
    assert starts == [("2026-10-16",), ("2026-11-01",), ("2026-12-01",)]


def test_a_plan_that_changed_gives_the_unused_fee_back(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """November was paid ahead; the contract ends with the 15th: half of it is given back, and goes on as a balance."""
    world.publish(AHEAD, "accounts", None)
    apply(connection, customer("acme"))
    close(connection, world.settings)
    ended = AHEAD.replace("start: 2026-10-16", "start: 2026-10-16, end: 2026-11-16")
    world.publish(ended, "accounts", None)
    close(connection, world.settings, NOVEMBER)
    assert lines(world.settings, "2026-000002") == [
        ("acme", "fee", "reversal", "seat", -1, -30, -30),
        ("acme", "fee", "new", "seat", 1, 15, 15),
    ]
    assert documents(world.settings)[1][5:] == (-15, -3, -18, 0, -18, 0)
    assert query(world.settings, "SELECT account, amount, kind FROM billing.balance_entry") == [("acme", 18, "carried")]


def test_a_balance_is_applied_to_the_next_document(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    connection.execute(
        "INSERT INTO billing.balance_entry (legal_entity, account, currency, amount, kind, by) "
        "VALUES ('ours', 'acme', 'EUR', 12, 'carried', 'x'), ('other', 'umbrella', 'EUR', 12, 'carried', 'x')"
    )
    close(connection, world.settings)
    assert [row[-3:] for row in documents(world.settings)] == [
        (0, Decimal("10.8"), 0),
        (0, 0, Decimal("10.8")),
    ]
    assert query(world.settings, "SELECT amount FROM billing.balance_entry WHERE kind = 'applied'") == [
        (Decimal("-10.8"),)
    ]
    close(connection, world.settings, NOVEMBER)
    assert [row[-3:] for row in documents(world.settings)][2] == (0, Decimal("1.2"), Decimal("9.6"))


def promise(connection: "Connection[Any]", amount: int, window: Window, **fields: Any) -> None:
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    promised = Commitment("", amount * 10**12, to_micros(start), to_micros(end), window, **fields)
    request = credits.request_commitment(connection, "acme", "EUR", promised, note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")


def test_a_commitment_is_trued_up(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """100 a month was promised: 30.66 and 9 were spent, less 10 % on the calls by a line coupon (0.67)."""
    world.publish(ACCOUNTS, "accounts", None)
    ten = Coupon("ten", 1, "Ten off", level="line", percent=Decimal(10), charges=frozenset({"calls"}))
    given = (CustomerCoupon("ten", date(2026, 1, 1)),)
    apply(connection, ten, customer("acme", coupons=given), customer("umbrella"))
    promise(connection, 100, "month")
    use(world, "2026-10-03T00:00:00Z acme/a call - n=5", "2026-10-04T00:00:00Z acme/b call - n=15")
    close(connection, world.settings)
    assert lines(world.settings, "2026-000001")[0][5:] == (Decimal("6.66"), Decimal("5.99"))
    assert lines(world.settings, "2026-000001")[3][1:] == (
        "commitment",
        "new",
        "commitment 1",
        1,
        *[Decimal("70.01")] * 2,
    )
    assert documents(world.settings)[0][5] == 100
    close(connection, world.settings, NOVEMBER)
    assert lines(world.settings, "2026-000003")[1][5] == 91, "nothing used: all but the fee"


def test_a_yearly_commitment_is_settled_with_each_month(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """20 in all, and twice the price beyond: what it adds is billed anew, less what was billed before."""
    world.publish(ACCOUNTS.replace("2026-01-01", "2026-10-01"), "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    promise(connection, 20, "year", overage_factor=Decimal(2))
    use(world, "2026-10-03T00:00:00Z acme/a call - n=10", "2026-11-03T00:00:00Z acme/b call - n=3")
    close(connection, world.settings)  # 3.33 + 10 + 9 = 22.33: 2.33 beyond
    assert lines(world.settings, "2026-000001")[3][1:6] == ("commitment", "new", "commitment 1", 1, Decimal("2.33"))
    close(connection, world.settings, NOVEMBER)  # 1 + 3 + 9 = 13 more
    assert [line[1:6] for line in lines(world.settings, "2026-000003")][3:] == [
        ("commitment", "reversal", "commitment 1", -1, Decimal("-2.33")),
        ("commitment", "new", "commitment 1", 1, Decimal("15.33")),
    ]


TWO_SELLERS = """
accounts:
  - id: acme
    name: Acme
    contracts:
      - {id: acme-1, plan: api, start: 2026-01-01, legal_entity: ours}
      - {id: acme-2, plan: rent, start: 2026-01-01, legal_entity: theirs}
"""
RENT = """
plans:
  - {id: rent, name: Rent, currency: EUR, charges: [{id: rent, model: flat, unit_price: 40}]}
"""


def test_a_commitment_is_settled_on_the_document_of_who_sells_what_it_counts(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """100 for the calls of one seller: nothing is used, so all of it is added to his invoice, and nothing elsewhere."""
    world.publish(RENT, "prices", None)
    world.publish(TWO_SELLERS, "accounts", None)
    theirs = replace(ENTITY, id="theirs", vat_number=None)
    apply(connection, theirs, customer("acme"))
    promise(connection, 100, "month", charges=frozenset({"calls"}))
    close(connection, world.settings)
    assert query(
        world.settings,
        "SELECT legal_entity, line.charge, line.amount FROM billing.document_line AS line "
        "JOIN billing.document ON document.id = line.document_id ORDER BY line.id",
    ) == [("ours", "fee", 9), ("ours", "commitment 1", 100), ("theirs", "rent", 40)]


QUARTERLY = """
accounts:
  - id: acme
    name: Acme
    contracts:
      - {id: acme-1, plan: api, start: 2026-01-01}
      - {id: acme-2, plan: rent, start: 2026-01-01, cycle: {every: quarter}}
"""


@pytest.mark.parametrize(
    ("accounts", "said"),
    [
        (TWO_SELLERS, "expected one legal entity to sell what commitment 1 counts, got ours by acme-1 and theirs by"),
        (QUARTERLY, "expected one billing cycle for what commitment 1 counts at a time, got calendar months of acme-1"),
    ],
    ids=["two sellers", "cycles that overlap"],
)
def test_a_commitment_that_nobody_could_settle_is_refused(
    world: DatabaseWorld, connection: "Connection[Any]", accounts: str, said: str
) -> None:
    """When contracts are loaded, when it is asked for, and, where both went by, by the close: nothing is billed."""
    world.publish(RENT, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    promise(connection, 100, "month")
    path = world.settings.data_dir / "accounts.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(accounts)
    with pytest.raises(Refused, match=said):
        publish(world.settings.dsn, read_account_files([path]), actor="ada", back_dated=True)
    world.publish(accounts, "accounts", None)
    with pytest.raises(ValueError, match=said.replace("commitment 1", "a commitment")):
        promise(connection, 100, "month")
    apply(connection, replace(ENTITY, id="theirs", vat_number=None), customer("acme"), customer("umbrella"))
    run = close(connection, world.settings, OCTOBER, "acme")
    (failed,) = queue.failed(connection, run.id, 9)
    assert said in (failed.problem or "")
    assert documents(world.settings) == []


def test_what_was_not_used_at_all_is_trued_up(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """No fee, no usage, and a charge that has a line for each cell that is used only."""
    world.publish(BY_CELL, "prices", None)
    world.publish(ACCOUNTS.replace("api", "cells"), "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    promise(connection, 100, "month")
    close(connection, world.settings)
    assert [line[1:6] for line in lines(world.settings, "2026-000001")] == [
        ("commitment", "new", "commitment 1", 1, 100),
    ]


BY_CELL = """
meters:
  - {id: pages, event_type: page, aggregation: sum, value: n, unit: page, dimensions: [size]}
plans:
  - id: cells
    name: Cells
    currency: EUR
    charges: [{id: pages, meter: pages, model: per_unit, unit_price: 0.333, by: [size]}]
"""


def test_lines_booked_are_read_from_each_accounts_own_start(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """A yearly contract in a chunk does not have it read a year of everybody's lines."""
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    close(connection, world.settings)
    close(connection, world.settings, NOVEMBER)
    october, november = (to_micros(datetime(2026, month, 1, tzinfo=UTC)) for month in (10, 11))
    found = read_booked(connection, {"acme": october, "umbrella": november})
    assert [(one.key.account, one.service.start_us) for one in found] == [
        ("acme", october),
        ("acme", november),
        ("umbrella", november),
    ]


def give(connection: "Connection[Any]", reduces: Reduces, amount: int, account: str = "acme") -> None:
    start = to_micros(datetime(2026, 10, 4, tzinfo=UTC))
    kind: GrantKind = "promotional" if reduces == "net" else "prepaid"
    grant = Grant("", amount * 10**12, start, None, kind, reduces, 0, start)
    reason = sorted(GRANT_REASONS[kind])[0]
    request = credits.request_grant(
        connection, credits.Asked(account, "EUR", grant), reason=reason, note="", actor="ada"
    )
    credits.decide(connection, request, "approved", actor="bob")


def test_credits_pay_for_usage_of_their_time(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Valid from 4 October: 15 of 20 calls (5.00 of 6.66), the peak and the fee. Net credits come before tax."""
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    give(connection, "net", 4)
    give(connection, "total", 100)
    use(world, "2026-10-03T00:00:00Z acme/a call - n=5", "2026-10-04T00:00:00Z acme/b call - n=15")
    close(connection, world.settings)
    (_, _, _, amount, discount, net, tax, total, drawn, _, payable), _ = documents(world.settings)
    assert (amount, discount, net, tax, total) == (
        Decimal("30.66"),
        4,
        Decimal("26.66"),
        Decimal("5.33"),
        Decimal("31.99"),
    )
    assert total - drawn == payable > 0, "what was used before they counted is paid"
    entries = query(
        world.settings,
        "SELECT given.reduces, sum(entry.amount), count(DISTINCT document_id), bool_and(line_id IS NULL) "
        "FROM billing.credit_entry AS entry JOIN billing.credit_grant AS given ON given.id = grant_id GROUP BY 1",
    )
    assert sorted(entries) == [("net", 4, 1, False), ("total", drawn, 1, True)]


def test_what_is_left_of_a_grant_rolls_over(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """100 for October, of which the 9.00 of the fee with tax are used; 50 may go on, and pay for November's."""
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    start, end = (to_micros(datetime(2026, month, 1, tzinfo=UTC)) for month in (10, 11))
    grant = Grant("", 100 * 10**12, start, end, "prepaid", "total", 0, start)
    asked = credits.Asked("acme", "EUR", grant, Rollover(50 * 10**12))
    reason = sorted(GRANT_REASONS["prepaid"])[0]
    request = credits.request_grant(connection, asked, reason=reason, note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")
    close(connection, world.settings)
    close(connection, world.settings, NOVEMBER)
    paid = [(account, *rest[-3:]) for account, *rest in documents(world.settings) if account == "acme"]
    assert paid == [("acme", Decimal("10.8"), 0, 0)] * 2
    assert query(
        world.settings,
        "SELECT given.amount, starts_at::date::text, expires_at::date::text, sum(entry.amount) "
        "FROM billing.credit_grant AS given JOIN billing.credit_entry AS entry ON entry.grant_id = given.id "
        "GROUP BY given.id ORDER BY given.id",
    ) == [(100, "2026-10-01", "2026-11-01", Decimal("10.8")), (50, "2026-11-01", "2026-12-01", Decimal("10.8"))]


def test_a_document_is_shown_in_another_currency(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """At the last rate published on or before the invoice day, 2 November: a Friday's, of 30 October."""
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme", document_currency="USD"), customer("umbrella"))
    rates = [(date(2026, 10, 30), "USD", Decimal("1.1")), (date(2026, 11, 3), "USD", Decimal("1.9"))]
    load_rates(connection, "ECB", "EUR", rates, actor="x")
    close(connection, world.settings)
    assert query(
        world.settings,
        "SELECT fx_currency, fx_rate, fx_date, fx_source, fx_net_amount, fx_tax_amount, fx_total_amount "
        "FROM billing.document WHERE account = 'acme'",
    ) == [("USD", Decimal("1.1"), date(2026, 10, 30), "ECB", Decimal("9.9"), Decimal("1.98"), Decimal("11.88"))]


def test_late_usage_comes_with_the_next_document(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    use(world, "2026-10-03T00:00:00Z acme/a call - n=5")
    close(connection, world.settings)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=15"], "2026-11-03T00:00:00Z")
    close(connection, world.settings, NOVEMBER)
    assert [line[1:6] for line in lines(world.settings, "2026-000003")] == [
        ("fee", "new", "fee", 1, 9),
        ("adjustment", "reversal", "calls", -5, Decimal("-1.67")),
        ("adjustment", "new", "calls", 20, Decimal("6.66")),
        ("adjustment", "reversal", "peak", -5, -5),
        ("adjustment", "new", "peak", 15, 15),
    ]
    assert query(world.settings, "SELECT DISTINCT state::text FROM billing.invoice") == [("issued",)]


def test_what_is_reviewed_first_stays_a_draft(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """A draft has no number and is replaced by the next run; its container goes on taking usage."""
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, replace(ENTITY, review=True), customer("acme"), customer("umbrella"))
    run = close(connection, world.settings)
    assert queue.outcomes(connection, run.id) == {"drafted": 2}
    use(world, "2026-10-03T00:00:00Z acme/a call - n=5")
    close(connection, world.settings)
    drafts = "SELECT account, state::text, number, lines_amount FROM billing.document ORDER BY account"
    assert query(world.settings, drafts) == [
        ("acme", "draft", None, Decimal("15.67")),
        ("umbrella", "draft", None, 9),
    ]
    assert query(world.settings, "SELECT DISTINCT state::text FROM billing.invoice") == [("open",)]
    assert query(world.settings, "SELECT count(*) FROM billing.close_entry") == [(0,)]
    ((draft,), (other,)) = query(world.settings, "SELECT id FROM billing.document ORDER BY account")
    use(world, "2026-10-05T00:00:00Z acme/b call - n=1")
    now = datetime(2026, 11, 3, tzinfo=UTC)
    with pytest.raises(Moved, match=r"18.80 EUR, got 19.20 EUR by now: `tally close` makes them anew"):
        review(connection, draft, now=now, actor="bob")
    close(connection, world.settings)
    ((draft,), (other,)) = query(world.settings, "SELECT id FROM billing.document ORDER BY account")
    (reviewed,) = review(connection, draft, now=now, actor="bob")
    containers = "SELECT account, state::text FROM billing.invoice ORDER BY account"
    assert query(world.settings, containers) == [("acme", "reviewed"), ("umbrella", "open")]
    with pytest.raises(NotIssuable, match="in state reviewed"):
        issue_reviewed(connection, other, now=now, actor="eve")
    run = close(connection, world.settings)
    assert queue.outcomes(connection, run.id) == {"reviewed": 1, "drafted": 1}
    (number,) = issue_reviewed(connection, reviewed, now=now, actor="eve")
    assert query(world.settings, containers) == [("acme", "issued"), ("umbrella", "open")]
    assert query(
        world.settings,
        "SELECT number, lines_amount, reviewed_by, issued_by, issue_date::text FROM billing.document WHERE id = %s",
        reviewed,
    ) == [(number.text, 16, "bob", "eve", "2026-11-03")]
    run = close(connection, world.settings)
    assert queue.outcomes(connection, run.id) == {"drafted": 1}, "who is issued is done"


def test_a_changed_price_is_noticed(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.publish(ACCOUNTS, "accounts", None)
    apply(connection, customer("acme"), customer("umbrella"))
    close(connection, world.settings)
    dearer = PRICES.replace("unit_price: 0.333", "unit_price: 0.4")
    world.publish(dearer, "prices", "2026-11-01T00:00:00Z")
    close(connection, world.settings, NOVEMBER)
    notices = query(
        world.settings, "SELECT number, content -> 'notices' FROM billing.document WHERE account = 'acme' ORDER BY id"
    )
    assert notices == [
        ("2026-000001", None),
        (
            "2026-000003",
            [
                {
                    "kind": "price_changed",
                    "name": "calls",
                    "unit": "call",
                    "before": "0.333",
                    "after": "0.4",
                    "since": "2026-11-01",
                }
            ],
        ),
    ]
