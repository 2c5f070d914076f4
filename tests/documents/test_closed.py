"""From usage to the customer's file: what the close, an adjustment and a credit note write is laid out and is valid."""

import io
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

from lxml import etree
from pypdf import PdfReader

from pipeline.billing.credit_notes import credit
from pipeline.billing.document_lists import listed
from pipeline.billing.rerate import Month
from pipeline.core.discounts import Coupon
from pipeline.core.parties import CustomerCoupon
from pipeline.documents.einvoice import cii_xml
from pipeline.documents.exports import as_json
from pipeline.documents.model import Document, Notice, Span
from pipeline.documents.read import Wanted, find, read
from pipeline.documents.render import Maker
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.documents.schematron import broken_rules
from tests.scenarios.database import DatabaseWorld

PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call, dimensions: [model]}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - id: calls
        name: Calls
        meter: calls
        model: volume
        by: [model]
        tiers: [{up_to: 100, unit_price: 0.5}, {unit_price: 0.4}]
      - {id: fee, name: Base fee, model: flat, unit_price: 100}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"
TEN = Coupon("ten", 1, "Ten per cent", percent=Decimal(10))


def words(of: Document, maker: Maker) -> str:
    made, why = maker.pdf(of)
    assert why == ""
    xml = cii_xml(of)
    reader = PdfReader(io.BytesIO(made))
    assert reader.attachments["factur-x.xml"] == [xml]
    assert broken_rules(xml) == []
    return " ".join(" ".join(page.extract_text() for page in reader.pages).split())


def test_an_invoice_an_adjustment_and_a_credit_note(settings: Settings, tmp_path: Path) -> None:
    world, maker = DatabaseWorld(tmp_path, settings), Maker(None)
    world.publish(PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        acme = customer("acme", name="Acme AG", coupons=(CustomerCoupon("ten", date(2026, 10, 1)),))
        apply(connection, ENTITY, TAXES, TEN, acme)
        world.use(["2026-10-03T00:00:00Z acme/a call - n=98 model=large"], None)
        ids = close(connection, settings, Month(2026, 10))
        world.use(["2026-10-09T00:00:00Z acme/late call - n=3 model=large"], "2026-11-02T00:00:00Z")
        ids += close(connection, settings, Month(2026, 11))
        with connection.transaction():
            at = datetime(2026, 12, 3, tzinfo=UTC)
            credit(connection, ids[0], None, reason="billing_error", note="Sorry.", to="refund", actor="ada", now=at)
        ids += [id for (id,) in connection.execute("SELECT id FROM billing.document WHERE kind = 'credit_note'")]
        invoice, next_invoice, credit_note = read(connection, ids)
    first = words(invoice, maker)
    for text in ("Invoice 2026-000001", "Bill to Acme AG", "98", "€0.50", "Ten per cent −€14.90", "€160.92"):
        assert text in first
    second = words(next_invoice, maker)
    assert "Adjustments to earlier invoices" in second
    for text in ("Takes back line", "Corrects line"):
        assert f"{text} {position_of_calls(invoice)} of 2026-000001" in second
    credited = words(credit_note, maker)
    [calls] = [line for line in invoice.lines if line.charge == "calls"]
    # The calls were taken back with November's invoice: they are not given back once more.
    assert f"Amount credited €{invoice.totals.total - calls.total}" in credited
    assert "Corrects 2026-000001 of" in credited and "Sorry." in credited
    assert invoice.totals.total + credit_note.totals.total == calls.total


def position_of_calls(invoice: Document) -> int:
    [position] = [line.position for line in invoice.lines if line.charge == "calls"]
    return position


CHANGED = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: hours, event_type: call, aggregation: sum, value: hours, unit: hour}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, name: Calls, meter: calls, model: per_unit, unit_price: 0.5}
      - {id: hours, name: Hours, meter: hours, model: graduated, tiers: [{up_to: 10, unit_price: 2}, {unit_price: 1}]}
      - {id: fee, name: Base fee, model: flat, unit_price: 100}
"""


def test_the_next_invoice_tells_what_changed_since(settings: Settings, tmp_path: Path) -> None:
    world = DatabaseWorld(tmp_path, settings)
    world.publish(CHANGED, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    use = "2026-{}T00:00:00Z acme/{} call - n=98 hours=3"
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme", name="Acme AG"))
        world.use([use.format("10-03", "a")], None)
        ids = close(connection, settings, Month(2026, 10))
        raised = CHANGED.replace("unit_price: 0.5}", "unit_price: 0.6}").replace("{unit_price: 1}", "{unit_price: 1.5}")
        later = "currency: EUR\n    valid_from: 2026-11-01"
        world.publish(raised.replace("currency: EUR", later), "prices", "2026-10-20T00:00:00Z")
        world.use([use.format("11-03", "b"), use.format("11-20", "c")], None)
        ids += close(connection, settings, Month(2026, 11))
        first, second = read(connection, ids)
    assert first.notices == ()
    assert second.notices == (
        Notice("price_changed", "Calls", date(2026, 11, 1), Decimal("0.5"), Decimal("0.6"), "call"),
        Notice("price_changed", "Hours", date(2026, 11, 1)),
    )


TWO_PLANS = """
plans:
  - {id: api, name: API, currency: EUR, charges: [{id: fee, name: Base fee, model: flat, unit_price: 100}]}
  - {id: team, name: Team, currency: EUR, charges: [{id: fee, name: Base fee, model: flat, unit_price: 200}]}
"""
CHANGES_PLAN = """
accounts:
  - id: acme
    name: Acme
    time_zone: Europe/Vienna
    contracts: [{id: acme-1, plan: api, start: 2026-01-01, phases: [{start: 2026-10-16, plan: team}]}]
"""


def test_a_plan_that_changed_within_the_month_is_told(settings: Settings, tmp_path: Path) -> None:
    """By the notices that the close itself writes; the day is that of Vienna, where it begins at 22:00 UTC."""
    world = DatabaseWorld(tmp_path, settings)
    world.publish(TWO_PLANS, "prices", None)
    world.publish(CHANGES_PLAN, "accounts", None)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme", name="Acme AG"))
        [invoice] = read(connection, close(connection, settings, Month(2026, 10)))
        [(written,)] = connection.execute("SELECT content -> 'notices' FROM billing.document").fetchall()
    assert written == [
        {"kind": "plan_changed", "name": "Team", "before": "API", "after": "Team", "since": "2026-10-16"}
    ]
    assert invoice.notices == (Notice("plan_changed", "Team", date(2026, 10, 16)),)
    assert "New plan from October 16, 2026: Team" in words(invoice, Maker(None))
    assert [one["name"] for one in as_json(invoice)["notices"]] == ["Team"]


ZONES = """
accounts:
  - {id: york, name: York, time_zone: America/New_York, contracts: [{id: y-1, plan: api, start: 2026-01-01}]}
  - {id: wien, name: Wien, time_zone: Europe/Vienna, contracts: [{id: w-1, plan: api, start: 2026-01-01}]}
  - {id: world, name: World, contracts: [{id: u-1, plan: api, start: 2026-01-01}]}
"""
_PERIOD = """
//ram:ApplicableHeaderTradeSettlement/ram:BillingSpecifiedPeriod/*/udt:DateTimeString/text()
| //ram:SpecifiedLineTradeSettlement/ram:BillingSpecifiedPeriod/*/udt:DateTimeString/text()
"""
_NAMES = {
    "ram": "urn:un:unece:uncefact:data:standard:ReusableAggregateBusinessInformationEntity:100",
    "udt": "urn:un:unece:uncefact:data:standard:UnqualifiedDataType:100",
}


def test_periods_are_days_of_the_payers_zone(settings: Settings, tmp_path: Path) -> None:
    """October of New York, Vienna and UTC, sold from Berlin: there the first ends on 1 November, the last too."""
    world = DatabaseWorld(tmp_path, settings)
    world.publish(TWO_PLANS, "prices", None)
    world.publish(ZONES, "accounts", None)
    october = Span(date(2026, 10, 1), date(2026, 10, 31))
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        buyers = [customer(account) for account in ("york", "wien", "world")]
        apply(connection, replace(ENTITY, time_zone="Europe/Berlin"), TAXES, *buyers)
        ids = close(connection, settings, Month(2026, 10))
        with connection.transaction():
            at = datetime(2026, 11, 3, tzinfo=UTC)
            credit(connection, ids[0], None, reason="billing_error", note="", to="refund", actor="ada", now=at)
        ids += [id for (id,) in connection.execute("SELECT id FROM billing.document WHERE kind = 'credit_note'")]
        documents = list(read(connection, ids))
        assert find(connection, Wanted(month="2026-10")) == ids
        assert find(connection, Wanted(month="2026-11")) == find(connection, Wanted(month="2026-09")) == []
        assert {one.id for one in listed(connection, month="2026-10")} == set(ids)
        assert listed(connection, month="2026-11") == listed(connection, month="2026-09") == []
    zones = {one.buyer.id: one.time_zone for one in documents}
    assert zones == {"york": "America/New_York", "wien": "Europe/Vienna", "world": "UTC"}
    for one in documents:
        assert {one.span, *(line.span for line in one.lines)} == {october}
        days = etree.fromstring(cii_xml(one)).xpath(_PERIOD, namespaces=_NAMES)
        assert days == ["20261001", "20261031"] * 2  # BT-73 and BT-74, BT-134 and BT-135
        if not one.is_credit:
            assert "Oct 1 – 31, 2026" in words(one, Maker(None))
