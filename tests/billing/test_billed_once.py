"""What is owed is billed once: whoever sells or pays by now, whatever waits for a person, whatever comes meanwhile."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pipeline.billing import own_documents, queue
from pipeline.billing.close import work
from pipeline.billing.close_chunk import Step
from pipeline.billing.invoicing_store import mark
from pipeline.billing.lines import open_invoices
from pipeline.billing.own_documents import bill_adjustments, payer_of, reissue
from pipeline.billing.queue import Run
from pipeline.billing.rerate import Month
from pipeline.billing.reviewing import issue_reviewed, review
from pipeline.billing.thresholds import bill_if_reached
from pipeline.billing.unbilled_voids import unbilled_voids
from pipeline.billing.voids import NotVoidable, void
from pipeline.core.discounts import Coupon
from pipeline.core.parties import CustomerCoupon
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
MIDDLE, NOW = datetime(2026, 10, 20, tzinfo=UTC), datetime(2026, 11, 5, tzinfo=UTC)
LATE = "2026-11-03T00:00:00Z"
PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: peaks, event_type: peak, aggregation: sum, value: n, unit: peak}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 1}
  - id: peaks
    name: Peaks
    currency: EUR
    charges:
      - {id: peaks, meter: peaks, model: per_unit, unit_price: 1}
  - id: ahead
    name: Ahead
    currency: EUR
    charges:
      - {id: seat, model: flat, unit_price: 30, in_advance: true}
"""
THEIRS = replace(ENTITY, id="theirs")


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, customer("acme"))
        yield made


def acme(world: DatabaseWorld, *contracts: str, **fields: str) -> None:
    """Publish Acme with these contracts."""
    others = "".join(f", {name}: {value}" for name, value in fields.items())
    of = ", ".join(f"{{id: c{number}, {contract}}}" for number, contract in enumerate(contracts, 1))
    world.publish(f"accounts: [{{id: acme, name: Acme{others}, contracts: [{of}]}}]", "accounts", None)


def net(world: DatabaseWorld, charge: str) -> Decimal:
    """What the documents that stand, drafts among them, bill of a charge."""
    ((found,),) = query(
        world.settings,
        "SELECT coalesce(sum(line.net_amount), 0) FROM billing.document_line AS line "
        "JOIN billing.document ON document.id = document_id WHERE document.state <> 'void' AND charge = %s",
        charge,
    )
    return Decimal(found)


def documents(world: DatabaseWorld) -> list[tuple[Any, ...]]:
    rows = "SELECT legal_entity, account, kind::text, state::text, net_amount FROM billing.document ORDER BY id"
    return query(world.settings, rows)


def adjust(connection: "Connection[Any]", account: str = "acme") -> None:
    bill_adjustments(connection, payer_of(connection, account, NOW), now=NOW, actor="ada")


# -- who sells


def test_late_usage_of_an_account_with_two_sellers(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Both bill what stands in one container: it is closed once."""
    mine, other = "plan: api, start: 2026-01-01, legal_entity: ours", "plan: ahead, start: 2026-01-01"
    acme(world, mine, f"{other}, legal_entity: theirs")
    apply(connection, THEIRS)
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=7"], LATE)
    close(connection, world.settings, NOVEMBER)
    assert net(world, "calls") == 12


def test_a_seller_that_no_contract_names_takes_a_fee_back(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """On the invoice of the contract that stands in: the only seller there is."""
    acme(world, "plan: ahead, start: 2026-10-01")
    close(connection, world.settings, OCTOBER)
    acme(world, "plan: ahead, start: 2026-10-01, end: 2026-11-01", "plan: api, start: 2026-11-01")
    world.use(["2026-11-04T00:00:00Z acme/b call - n=7"], None)
    close(connection, world.settings, NOVEMBER)
    assert documents(world)[1:] == [("ours", "acme", "invoice", "issued", 7 - 30)]


def test_each_seller_takes_back_what_it_billed(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """It owes the tax on it."""
    acme(world, "plan: api, start: 2026-01-01, legal_entity: ours")
    apply(connection, THEIRS, customer("acme", threshold=3 * 10**12))
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    bill_if_reached(connection, payer_of(connection, "acme", MIDDLE), OCTOBER, now=MIDDLE, actor="ada")
    acme(world, "plan: api, start: 2026-01-01, legal_entity: theirs")
    close(connection, world.settings, OCTOBER)
    assert documents(world) == [
        ("ours", "acme", "progress", "issued", 5),
        ("ours", "acme", "invoice", "issued", -5),
        ("theirs", "acme", "invoice", "issued", 5),
    ]


def test_what_was_billed_early_by_a_contract_that_is_no_more(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    acme(world, "plan: api, start: 2026-01-01")
    apply(connection, customer("acme", threshold=3 * 10**12))
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    bill_if_reached(connection, payer_of(connection, "acme", MIDDLE), OCTOBER, now=MIDDLE, actor="ada")
    acme(world, "plan: api, start: 2026-01-01, end: 2026-10-01", "plan: api, start: 2026-10-01")
    close(connection, world.settings, OCTOBER)
    assert (len(documents(world)), net(world, "calls")) == (2, 5)


# -- who pays

HALF = Coupon("half", 1, "Half", percent=Decimal(50))
GROUP = """
accounts:
  - {id: group, name: Group}
  - {id: north, name: North, parent: group, contracts: [{id: north-1, plan: api, start: 2026-01-01}]}
"""


def test_late_usage_of_who_pays_for_himself_by_now(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """October was on the parent's invoice, and so is what comes late of it."""
    world.publish(GROUP, "accounts", None)
    apply(connection, customer("group", consolidates=True), customer("north"))
    world.use(["2026-10-03T00:00:00Z north/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    apply(connection, customer("group"))
    world.use(["2026-10-04T00:00:00Z north/b call - n=7"], LATE)
    world.use(["2026-11-04T00:00:00Z north/c call - n=1"], None)
    close(connection, world.settings, NOVEMBER)
    assert documents(world)[1:] == [
        ("ours", "group", "adjustment", "issued", 7),
        ("ours", "north", "invoice", "issued", 1),
    ]


@pytest.mark.parametrize("at_once", [False, True])
def test_late_usage_of_who_is_paid_for_by_now(
    world: DatabaseWorld, connection: "Connection[Any]", at_once: bool
) -> None:
    """It is reckoned as October was, with the child's own coupon, and billed with the parent's."""
    world.publish(GROUP, "accounts", None)
    apply(connection, HALF, customer("group"))
    apply(connection, customer("north", coupons=(CustomerCoupon("half", date(2026, 1, 1)),)))
    world.use(["2026-10-03T00:00:00Z north/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    apply(connection, customer("group", consolidates=True))
    world.use(["2026-10-04T00:00:00Z north/b call - n=7"], LATE)
    if at_once:
        adjust(connection, "north")
    else:
        close(connection, world.settings, NOVEMBER)
    assert documents(world) == [
        ("ours", "north", "invoice", "issued", Decimal("2.50")),
        ("ours", "group", "adjustment", "issued", Decimal("3.50")),
    ]


# -- what is withdrawn and issued anew


@pytest.mark.parametrize("own", [True, False], ids=["an adjustment", "an invoice with adjustments"])
def test_adjustments_that_were_withdrawn_are_billed_anew(
    world: DatabaseWorld, connection: "Connection[Any]", own: bool
) -> None:
    """Of a period that begins in another month than it ends in."""
    acme(world, "plan: api, start: 2026-09-15, cycle: {every: month, anchor: start}")
    world.use(["2026-09-20T00:00:00Z acme/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-09-21T00:00:00Z acme/b call - n=7"], "2026-10-20T00:00:00Z")
    if own:
        adjust(connection)
    else:
        world.use(["2026-11-01T00:00:00Z acme/c call - n=1"], None)
        close(connection, world.settings, NOVEMBER)
    ((withdrawn,),) = query(world.settings, "SELECT max(id) FROM billing.document")
    void(connection, withdrawn, reason="wrong_details", note="", actor="ada", now=NOW)
    assert net(world, "calls") == 5
    reissue(connection, withdrawn, note="", now=NOW, actor="ada")
    assert net(world, "calls") == (12 if own else 13)
    adjust(connection)
    assert len(documents(world)) == 3


def test_a_reissue_leaves_the_other_seller_s_late_usage(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """It stands in the same container, which stays open for it."""
    ahead, api = "plan: ahead, start: 2026-10-01, legal_entity", "plan: api, start: 2026-10-01, legal_entity"
    acme(world, f"{ahead}: ours", f"{ahead}: theirs", f"{api}: theirs")
    apply(connection, THEIRS)
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    october, _ = close(connection, world.settings, OCTOBER)
    void(connection, october, reason="wrong_details", note="", actor="ada", now=NOW)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=7"], LATE)
    reissue(connection, october, note="", now=NOW, actor="ada")
    close(connection, world.settings, NOVEMBER)
    assert (net(world, "calls"), net(world, "seat")) == (12, 180)


# -- what waits for a person


def test_what_is_reviewed_is_billed(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """October waits to be issued, November's fee on it, when November is closed."""
    acme(world, "plan: ahead, start: 2026-10-01")
    apply(connection, replace(ENTITY, review=True))
    (october,) = review(connection, *close(connection, world.settings, OCTOBER), now=NOW, actor="bob")
    assert close(connection, world.settings, OCTOBER) == []
    (november,) = review(connection, *close(connection, world.settings, NOVEMBER), now=NOW, actor="bob")
    issue_reviewed(connection, october, now=NOW, actor="eve")
    issue_reviewed(connection, november, now=NOW, actor="eve")
    assert [row[-1] for row in documents(world)] == [60, 30]


def test_a_draft_of_adjustments_is_made_anew(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    acme(world, "plan: api, start: 2026-01-01, end: 2026-11-01")
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    apply(connection, replace(ENTITY, review=True))
    world.use(["2026-10-04T00:00:00Z acme/b call - n=7"], LATE)
    close(connection, world.settings, NOVEMBER)
    (reviewed,) = review(connection, *close(connection, world.settings, NOVEMBER), now=NOW, actor="bob")
    issue_reviewed(connection, reviewed, now=NOW, actor="eve")
    assert documents(world)[1:] == [("ours", "acme", "adjustment", "issued", 7)]


def test_no_row_comes_to_a_document_once_it_is_reviewed(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    acme(world, "plan: ahead, start: 2026-10-01")
    apply(connection, replace(ENTITY, review=True))
    (october,) = review(connection, *close(connection, world.settings, OCTOBER), now=NOW, actor="bob")
    add = "INSERT INTO billing.document_tax SELECT %s, %s, 'VAT', 'standard', 20, 1, 1, ''"
    with connect(world.settings.dsn, application="test", autocommit=True) as other:
        other.execute("SET lock_timeout = '300ms'")
        with pytest.raises(psycopg.errors.RaiseException, match="is reviewed: insert of document_tax"):
            connection.execute(add, [october, 98])
        with connection.transaction():
            issue_reviewed(connection, october, now=NOW, actor="eve")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute(add, [october, 99])


# -- what comes meanwhile

_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def until_it_waits(world: DatabaseWorld, doing: "Future[Any]") -> None:
    """Until somebody waits for a lock, or, of a lock that is missing, has what he wants."""
    until = time.monotonic() + 20
    while not doing.done() and query(world.settings, _WAITING) == [(0,)]:
        assert time.monotonic() < until, "expected it to wait for a lock"
        time.sleep(0.02)


def begin(connection: "Connection[Any]", month: Month) -> Run:
    run = queue.begin(connection, str(month), (), invoicing_mark=mark(connection), consolidating=(), actor="x")
    assert run is not None
    return run


def test_two_months_closed_at_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """The second sees what the first bills ahead."""
    acme(world, "plan: ahead, start: 2026-10-01")
    october, november = begin(connection, OCTOBER), begin(connection, NOVEMBER)
    closing: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as threads:

        def close_the_other(step: Step) -> None:
            if step is Step.RECKONED:
                closing.append(threads.submit(lambda: list(work(world.settings.dsn, november.id, "x"))))
                until_it_waits(world, closing[0])

        list(work(world.settings.dsn, october.id, "x", reached=close_the_other))
        closing[0].result()
    assert net(world, "seat") == 90


def test_a_document_is_not_voided_while_another_takes_its_lines_back(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    acme(world, "plan: api, start: 2026-01-01")
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    (october,) = close(connection, world.settings, OCTOBER)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=7"], LATE)
    november = begin(connection, NOVEMBER)
    voiding: list[Future[Any]] = []

    def withdraw() -> None:
        void(connection, october, reason="wrong_details", note="", actor="ada", now=NOW)

    with ThreadPoolExecutor(1) as threads:

        def void_meanwhile(step: Step) -> None:
            if step is Step.RECKONED:
                voiding.append(threads.submit(withdraw))
                until_it_waits(world, voiding[0])

        list(work(world.settings.dsn, november.id, "x", reached=void_meanwhile))
        with pytest.raises(NotVoidable, match="takes back what it billed"):
            voiding[0].result()
    assert net(world, "calls") == 12


def test_a_close_waits_for_the_sink_s_container_holding_nothing(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """The sink has made October's and goes on to November's: else each would wait for the other."""
    acme(world, "plan: api, start: 2026-01-01")
    periods = [month.period_in("UTC") for month in (OCTOBER, NOVEMBER)]
    keys = [("acme", "EUR", period.start_us, period.end_us) for period in periods]
    open_invoices(connection, keys[1:])
    run = begin(connection, OCTOBER)
    with ThreadPoolExecutor(1) as threads:
        with connection.transaction():
            open_invoices(connection, keys[:1])
            closing = threads.submit(lambda: list(work(world.settings.dsn, run.id, "x")))
            until_it_waits(world, closing)
            connection.execute("SET LOCAL lock_timeout = '300ms'")
            connection.execute("SELECT FROM billing.invoice ORDER BY id FOR NO KEY UPDATE")
        closing.result()
    assert query(world.settings, "SELECT state::text FROM billing.invoice ORDER BY id") == [("open",), ("issued",)]


def test_usage_that_comes_to_a_container_made_meanwhile(
    world: DatabaseWorld, connection: "Connection[Any]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that is not held stays open: what comes to it after it was reckoned is billed next."""
    acme(world, "plan: api, start: 2026-01-01")
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    late_months, money = own_documents.late_months, own_documents.reckon
    coming = [f"2026-10-04T00:00:00Z acme/{key} call - n={n}" for key, n in (("b", 7), ("c", 11))]

    def usage_comes(do: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **kwargs: Any) -> Any:
            world.use([coming.pop(0)], LATE)
            return do(*args, **kwargs)

        return done

    with monkeypatch.context() as patched:
        patched.setattr(own_documents, "late_months", usage_comes(late_months))
        patched.setattr(own_documents, "reckon", usage_comes(money))
        adjust(connection)
    world.use(coming, LATE)
    adjust(connection)
    assert net(world, "calls") == 23


# -- coupons that are used up

TEN_OFF = Coupon("ten", 1, "10 off", amount=10 * 10**12, currency="EUR", uses=1)


@pytest.mark.parametrize(
    ("contract", "fields"),
    [
        ("plan: api, start: 2026-01-01", {"time_zone": "Europe/Berlin"}),
        ("plan: api, start: 2026-09-15, cycle: {every: month, anchor: start}", {}),
    ],
    ids=["east of Greenwich", "a period that begins in the month before"],
)
def test_late_usage_keeps_the_coupon_of_its_month(
    world: DatabaseWorld, connection: "Connection[Any]", contract: str, fields: dict[str, str]
) -> None:
    acme(world, contract, **fields)
    apply(connection, TEN_OFF, customer("acme", coupons=(CustomerCoupon("ten", date(2026, 1, 1)),)))
    world.use(["2026-10-03T00:00:00Z acme/a call - n=50"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=7"], LATE)
    adjust(connection)
    assert net(world, "calls") == 47


def test_late_usage_keeps_the_coupon_of_each_period(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """One ended on 15 October, the other with the month: each had its own invoice, and 10 off it."""
    acme(world, "plan: api, start: 2026-09-15, cycle: {every: month, anchor: start}", "plan: peaks, start: 2026-10-01")
    always = replace(TEN_OFF, uses=None)
    apply(connection, always, customer("acme", coupons=(CustomerCoupon("ten", date(2026, 1, 1)),)))
    world.use(["2026-10-03T00:00:00Z acme/a call - n=50", "2026-10-03T00:00:00Z acme/b peak - n=50"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-04T00:00:00Z acme/c call - n=7"], LATE)
    adjust(connection)
    assert [row[-1] for row in documents(world)] == [40, 40, 7]
    assert (net(world, "calls"), net(world, "peaks")) == (47, 40)


def test_a_coupon_is_used_up_by_documents_of_one_close(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Of a period that ends on 15 October, and of October."""
    contract = "plan: ahead, start: 2026-09"
    acme(world, f"{contract}-15, cycle: {{every: month, anchor: start}}", f"{contract}-01")
    apply(connection, TEN_OFF, customer("acme", coupons=(CustomerCoupon("ten", date(2026, 1, 1)),)))
    close(connection, world.settings, OCTOBER)
    assert sorted(row[-1] for row in documents(world)) == [20, 90]


def test_a_coupon_on_two_documents_of_a_period_is_used_once(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    contract = "plan: ahead, start: 2026-10-01, legal_entity:"
    acme(world, f"{contract} ours", f"{contract} theirs")
    twice = replace(HALF, uses=2)
    apply(connection, THEIRS, twice, customer("acme", coupons=(CustomerCoupon("half", date(2026, 1, 1)),)))
    for month in (OCTOBER, NOVEMBER, Month(2026, 12)):
        close(connection, world.settings, month)
    assert [row[-1] for row in documents(world)] == [30, 30, 15, 15, 30, 30]


# -- what is void


@pytest.mark.parametrize("with_the_next_invoice", [True, False])
def test_a_voided_adjustment_is_pointed_out(
    world: DatabaseWorld, connection: "Connection[Any]", with_the_next_invoice: bool
) -> None:
    """Until it is issued anew: what it restated stands again, and bills less."""
    acme(world, "plan: api, start: 2026-01-01")
    world.use(["2026-10-03T00:00:00Z acme/a call - n=5"], None)
    close(connection, world.settings, OCTOBER)
    world.use(["2026-10-04T00:00:00Z acme/b call - n=7"], LATE)
    if with_the_next_invoice:
        (adjusting,) = close(connection, world.settings, NOVEMBER)
    else:
        adjust(connection)
        ((adjusting,),) = query(world.settings, "SELECT max(id) FROM billing.document")
    assert unbilled_voids(connection, until=NOVEMBER) == []
    void(connection, adjusting, reason="wrong_details", note="", actor="ada", now=NOW)
    assert [one.document for one in unbilled_voids(connection, until=NOVEMBER)] == [adjusting]
    reissue(connection, adjusting, note="", now=NOW, actor="ada")
    assert unbilled_voids(connection, until=NOVEMBER) == []
    assert net(world, "calls") == 12


def test_a_void_that_charges_again_what_was_taken_back_is_pointed_out(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """Acme left before the month whose fee it had paid in advance; the document that gave it back is withdrawn."""
    acme(world, "plan: ahead, start: 2026-10-01")
    close(connection, world.settings, OCTOBER)
    acme(world, "plan: ahead, start: 2026-10-01, end: 2026-11-01")
    (giving_back,) = close(connection, world.settings, NOVEMBER)
    assert net(world, "seat") == 30
    void(connection, giving_back, reason="wrong_details", note="", actor="ada", now=NOW)
    assert [one.document for one in unbilled_voids(connection, until=NOVEMBER)] == [giving_back]
    assert net(world, "seat") == 60
    reissue(connection, giving_back, note="", now=NOW, actor="ada")
    assert unbilled_voids(connection, until=NOVEMBER) == []
    assert net(world, "seat") == 30
