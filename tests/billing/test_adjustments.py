"""Usage that came after its month was billed: the month anew, less what was booked, through discounts and tax."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing import credits
from pipeline.billing.adjustments import Adjustment, restate
from pipeline.billing.document_lists import links
from pipeline.billing.late_months import late_months, lock_open
from pipeline.billing.own_documents import NotReissuable, bill_adjustments, payer_of, reissue
from pipeline.billing.prices import read_catalog
from pipeline.billing.rerate import Month
from pipeline.billing.thresholds import bill_if_reached
from pipeline.billing.voids import void
from pipeline.core.commitments import Commitment
from pipeline.core.discounts import Coupon
from pipeline.core.fx import NoRate
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.parties import CustomerCoupon
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
MIDDLE, NOW = datetime(2026, 10, 20, tzinfo=UTC), datetime(2026, 11, 5, tzinfo=UTC)
PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: peak, event_type: call, aggregation: max, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: volume, tiers: [{up_to: 100, unit_price: 0.5}, {unit_price: 0.4}], minimum: 20}
      - {id: peak, meter: peak, model: per_unit, unit_price: 0.1}
      - {id: fee, model: flat, unit_price: 100}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"
TEN_OFF = Coupon("ten", 1, "10 off", amount=10 * 10**12, currency="EUR", uses=1)


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, TEN_OFF, customer("acme", coupons=(CustomerCoupon("ten", date(2026, 10, 1)),)))
        yield made


def adjust(connection: "Connection[Any]", before: Month | None = NOVEMBER) -> list[Adjustment]:
    catalog = read_catalog(connection, ["acme"])
    with connection.transaction():
        opened = lock_open(connection, ["acme"])
        months = late_months(connection, catalog, {"acme": ["acme"]}, opened, before=before).get("acme", [])
        found: list[Adjustment] = []
        for month in months:
            found += restate(connection, catalog, month, opened, earlier=found)
        return found


def table(adjustment: Adjustment) -> list[tuple[Any, ...]]:
    return [
        (row.role, row.charge, row.quantity // QUANTITY_ONE, line.amount, line.discount, line.tax, line.total)
        for line, row in adjustment.lines
    ]


def test_late_usage_moves_the_whole_month(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """98 calls billed at 0.50; three more come, and all 101 cost 0.40. The coupon, used up since, still counts."""
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    (id,) = close(connection, world.settings, OCTOBER)
    assert adjust(connection) == []
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    (found,) = adjust(connection)
    assert (found.original, found.tax_date) == (id, date(2026, 10, 31))
    # Every line moves, since the 10.00 off is shared out among them: 3.08 of it were the calls', now it is 2.69.
    assert table(found)[:2] == [
        ("reversal", "calls", -98, -4900, -308, -918, -5510),
        ("new", "calls", 101, 4040, 269, 754, 4525),
    ]
    assert sums(found, "reversal") == (-15880, -1000, -2976, -17856)
    assert sums(found, "new") == (15020, 1000, 2804, 16824)
    assert found.entries == ()  # what the sink booked is the price


def sums(adjustment: Adjustment, role: str) -> tuple[int, ...]:
    lines = [line for line, row in adjustment.lines if row.role == role]
    return tuple(
        sum(column) for column in zip(*((one.amount, one.discount, one.tax, one.total) for one in lines), strict=True)
    )


def test_a_minimum_takes_late_usage_up(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    world.use(["2026-10-03T00:00:00Z acme/a call - n=10"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-09T00:00:00Z acme/late call - n=4"], "2026-11-02T00:00:00Z")
    (found,) = adjust(connection)
    assert [(row.role, row.charge, line.amount) for line, row in found.lines] == [
        ("reversal", "calls", -2000),
        ("new", "calls", 2000),
    ]
    assert found.total == 0
    ((_, entry),) = found.entries  # the rows of the late events are taken up by the minimum
    assert (entry.terms.charge, entry.amount) == ("calls", -2 * 10**12)
    closed = [line for line, *_ in connection.execute("SELECT line_id FROM billing.document_line")]
    assert entry.line_id not in closed


def test_the_next_invoice_bills_it_and_asks_no_more(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """November's own tiers and minimum see nothing of October's usage; closing again, and later, finds nothing."""
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    (october,) = close(connection, world.settings, OCTOBER)
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    world.use(["2026-11-09T00:00:00Z acme/b call - n=50"], None)
    before = connection.execute("SELECT * FROM billing.document_line ORDER BY id").fetchall()
    (november,) = close(connection, world.settings, NOVEMBER)
    assert (
        connection.execute(
            "SELECT * FROM billing.document_line WHERE document_id = %s ORDER BY id", [october]
        ).fetchall()
        == before
    )
    billed = connection.execute(
        """SELECT kind, role, charge, quantity::int, net_amount FROM billing.document_line
        WHERE document_id = %s AND charge = 'calls' ORDER BY position""",
        [november],
    ).fetchall()
    assert billed == [
        ("usage", "new", "calls", 50, Decimal("25.00")),
        ("adjustment", "reversal", "calls", -98, Decimal("-45.92")),
        ("adjustment", "new", "calls", 101, Decimal("37.71")),
    ]
    header = connection.execute(
        "SELECT net_amount, tax_amount FROM billing.document WHERE id = %s", [november]
    ).fetchone()
    assert header == (
        25 + 5 + 100 + Decimal("140.20") - Decimal("148.80"),
        Decimal("26.00") + Decimal("28.04") - Decimal("29.76"),
    )
    assert adjust(connection, before=None) == []
    states = connection.execute("SELECT DISTINCT state::text FROM billing.invoice").fetchall()
    assert states == [("issued",)]


def test_a_second_adjustment_takes_back_the_first(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """And without an invoice to come it is a document of its own, with the tax date of its month."""
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    close(connection, world.settings, OCTOBER)
    payer = payer_of(connection, "acme", NOW)
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    ten = (CustomerCoupon("ten", date(2026, 10, 1)),)
    apply(connection, customer("acme", coupons=ten, document_currency="GBP"))
    with pytest.raises(NoRate):  # found out at the last step: nothing is left of the others, and no number is used up
        bill_adjustments(connection, payer, now=NOW, actor="ada")
    assert [one.month for one in adjust(connection)] == [OCTOBER]
    apply(connection, customer("acme", coupons=ten))
    (first,) = bill_adjustments(connection, payer, now=NOW, actor="ada")
    assert (first.kind, first.number, first.corrects) == ("adjustment", "2026-000002", "2026-000001")
    assert (first.total, first.payable) == (Decimal("-10.32"), 0)
    assert bill_adjustments(connection, payer, now=NOW, actor="ada") == []
    world.use(["2026-10-10T00:00:00Z acme/later call - n=9"], "2026-11-03T00:00:00Z")
    (second,) = bill_adjustments(connection, payer, now=NOW, actor="ada")
    assert (second.total, second.payable) == (Decimal("4.32"), 0)  # 9 at 0.40 and 20 %: paid by the balance
    linked = connection.execute(
        """SELECT line.charge, theirs.document_id FROM billing.document_line AS line
        JOIN billing.document_line AS theirs ON theirs.id = line.adjusts_id
        WHERE line.document_id = %s AND line.role = 'reversal' ORDER BY 1""",
        [second.document],
    ).fetchall()
    assert {document for _, document in linked} == {first.document}
    assert sum_of(connection, "total_amount") == (Decimal(110) * Decimal("0.4") + Decimal("9.8") + 90) * Decimal("1.2")
    dates = connection.execute("SELECT DISTINCT tax_date FROM billing.document").fetchall()
    assert dates == [(date(2026, 10, 31),)]
    assert connection.execute("SELECT sum(amount) FROM billing.balance_entry").fetchone() == (6,)


def sum_of(connection: "Connection[Any]", column: str) -> Decimal:
    (found,) = connection.execute(f"SELECT sum({column}) FROM billing.document WHERE state = 'issued'").fetchone() or ()
    assert isinstance(found, Decimal)
    return found


def test_usage_taken_back_after_the_close_is_given_back(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """A correction that was on its way when the month was closed: nothing of the counter is left but its minimum."""
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    close(connection, world.settings, OCTOBER)
    world.void("acme", "a")
    (found,) = adjust(connection)
    new = {row.charge: line.amount for line, row in found.lines if row.role == "new"}
    assert new == {"calls": 2000, "fee": 10000}
    assert sums(found, "reversal") == (-15880, -1000, -2976, -17856)


def test_a_voided_invoice_is_issued_anew_with_what_came_since(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    (october,) = close(connection, world.settings, OCTOBER)
    with pytest.raises(NotReissuable, match="expected a void invoice, got invoice 2026-000001, which is issued"):
        reissue(connection, october, note="", now=NOW, actor="ada")
    void(connection, october, reason="wrong_details", note="moved", actor="ada", now=NOW)
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    apply(connection, customer("acme", name="Acme Ltd", coupons=(CustomerCoupon("ten", date(2026, 10, 1)),)))
    anew = reissue(connection, october, note="moved", now=NOW, actor="ada")
    assert (anew.kind, anew.number, anew.corrects, anew.total) == (
        "invoice",
        "2026-000002",
        "2026-000001",
        Decimal("168.24"),
    )
    (name,) = (
        connection.execute("SELECT content -> 'buyer' ->> 'name' FROM billing.document ORDER BY id DESC").fetchone()
        or ()
    )
    assert name == "Acme Ltd"
    assert [(link.relation, link.number) for link in links(connection, october)] == [("corrected by", "2026-000002")]
    assert adjust(connection, before=None) == []
    with pytest.raises(NotReissuable, match="issued anew before, as 2026-000002"):
        reissue(connection, october, note="", now=NOW, actor="ada")


def test_what_an_adjustment_billed_since_is_not_issued_anew(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """Late usage after the void: the adjustment bills the whole month, and of the invoice no line is left to bill."""
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    (october,) = close(connection, world.settings, OCTOBER)
    void(connection, october, reason="wrong_details", note="moved", actor="ada", now=NOW)
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    (made,) = bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    assert made.total == Decimal("168.24")
    with pytest.raises(NotReissuable, match="instead of 2026-000001, got nothing: it was billed since"):
        reissue(connection, october, note="", now=NOW, actor="ada")


def test_a_threshold_bills_within_the_period_and_the_invoice_takes_it_back(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    apply(connection, customer("acme", threshold=30 * 10**12))
    payer = payer_of(connection, "acme", MIDDLE)
    world.use(["2026-10-03T00:00:00Z acme/a call - n=50"], None)  # 25 and a peak of 5: reached
    for expected in ("2026-000001", None):
        (found,) = bill_if_reached(connection, payer, OCTOBER, now=MIDDLE, actor="ada")
        assert (found.made and found.made.number) == expected
    world.use(["2026-10-04T00:00:00Z acme/b call - n=100"], None)  # 150 at 0.40 and a peak of 10
    (found,) = bill_if_reached(connection, payer, OCTOBER, now=MIDDLE, actor="ada")
    assert found.made is not None
    assert (found.billed, found.used, found.made.total) == (30, 70, 48)  # 40 more, and 20 %
    close(connection, world.settings, OCTOBER)
    assert sum_of(connection, "net_amount") == 170
    kinds = connection.execute("SELECT kind::text, net_amount FROM billing.document ORDER BY id").fetchall()
    assert kinds == [("progress", 30), ("progress", 40), ("invoice", 100)]
    assert bill_if_reached(connection, payer, OCTOBER, now=NOW, actor="ada") == []


def test_late_usage_counts_toward_the_month_s_commitment(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """200 was promised: what the calls cost less now, the true-up costs more."""
    apply(connection, customer("acme"))
    promised = Commitment("", 200 * 10**12, to_micros(datetime(2026, 1, 1, tzinfo=UTC)))
    request = credits.request_commitment(connection, "acme", "EUR", promised, note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    close(connection, world.settings, OCTOBER)
    assert sum_of(connection, "net_amount") == 200
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    (found,) = adjust(connection)
    assert [(row.role, row.charge, line.amount) for line, row in found.lines] == [
        ("reversal", "calls", -4900),
        ("new", "calls", 4040),
        ("reversal", "commitment 1", -4120),
        ("new", "commitment 1", 4980),
    ]
    assert found.total == 0
    bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    world.use(["2026-10-09T00:00:00Z acme/later call - n=399"], "2026-11-02T00:00:00Z")
    (again,) = adjust(connection)  # 500 at 0.40 are more than was promised
    assert [(row.role, row.charge, line.amount) for line, row in again.lines] == [
        ("reversal", "calls", -4040),
        ("new", "calls", 20000),
        ("reversal", "peak", -980),
        ("new", "peak", 3990),
        ("reversal", "commitment 1", -4980),
    ]


def test_late_usage_counts_toward_a_commitment_that_was_trued_up_since(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """With what it costs in the end: also where entries that are not booked yet make that less than its rows."""
    thirds = Coupon("third", 1, "a third off", "line", percent=Decimal("33.3"), charges=frozenset({"peak"}))
    apply(connection, thirds, customer("acme", coupons=(CustomerCoupon("third", date(2026, 10, 1)),)))
    bounds = (to_micros(datetime(2026, month, 1, tzinfo=UTC)) for month in (10, 12))
    promised = Commitment("", 1000 * 10**12, *bounds, window="term")
    request = credits.request_commitment(connection, "acme", "EUR", promised, note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")
    world.use(["2026-10-31T00:00:00Z acme/a call - n=10"], None)
    close(connection, world.settings, OCTOBER)
    close(connection, world.settings, NOVEMBER)
    assert sum_of(connection, "net_amount") == 1000
    # The minimum of the calls takes four more up, and the peak stays.
    world.use(["2026-10-31T01:00:00Z acme/late call - n=4"], "2026-12-02T00:00:00Z")
    october, november = adjust(connection, None)
    assert (october.total, november.month, november.lines) == (0, NOVEMBER, ())
    world.use(["2026-10-31T02:00:00Z acme/later call - n=80"], "2026-12-02T00:00:00Z")
    october, november = adjust(connection, None)
    assert {row.charge for _, row in november.lines} == {"commitment 1"}
    more = sum(line.net for line, _ in october.lines)
    assert more == 2700 + 467  # 94 calls at 0.50 instead of 20.00, a peak of 80 instead of 10 less a third
    assert sum(line.net for line, _ in november.lines) == -more
    made = bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    assert [one.kind for one in made] == ["adjustment", "adjustment"]
    assert sum_of(connection, "net_amount") == 1000
    assert query(world.settings, "SELECT * FROM finance.document_checks") == []
    assert adjust(connection, None) == []


_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def test_two_at_once_bill_late_usage_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """And usage that comes while it is billed waits, and goes to the next supplement."""
    world.use(["2026-10-03T00:00:00Z acme/a call - n=98"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-09T00:00:00Z acme/late call - n=3"], "2026-11-02T00:00:00Z")
    payer = payer_of(connection, "acme", NOW)

    def bill() -> int:
        with connect(world.settings.dsn, application="test", autocommit=True) as another:
            return len(bill_adjustments(another, payer, now=NOW, actor="ada"))

    def use() -> None:
        world.use(["2026-10-10T00:00:00Z acme/later call - n=1"], "2026-11-03T00:00:00Z")

    with ThreadPoolExecutor(3) as threads, connection.transaction():
        lock_open(connection, ["acme"])
        billing, using = [threads.submit(bill) for _ in range(2)], threads.submit(use)
        until = time.monotonic() + 20
        while query(world.settings, _WAITING) != [(3,)]:
            assert time.monotonic() < until, "expected two bills and the sink to wait"
            time.sleep(0.02)
    using.result()
    made = sum(one.result() for one in billing)
    left = adjust(connection)
    # The usage was there before the bills, or comes after them: billed once, whichever.
    assert (made, len(left)) in {(1, 1), (2, 0), (1, 0)}
    assert sum_of(connection, "net_amount") + sum(line.net for one in left for line, _ in one.lines) / Decimal(100) == (
        Decimal("0.4") * 102 + Decimal("9.8") + 90
    )
