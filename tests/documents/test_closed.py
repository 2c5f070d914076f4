"""From usage to the customer's file: what the close, an adjustment and a credit note write is laid out and is valid."""

import io
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

from pypdf import PdfReader

from pipeline.billing.credit_notes import credit
from pipeline.billing.rerate import Month
from pipeline.core.discounts import Coupon
from pipeline.core.parties import CustomerCoupon
from pipeline.documents.einvoice import cii_xml
from pipeline.documents.model import Document, Notice
from pipeline.documents.read import read
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
    assert f"Amount credited €{invoice.totals.total}" in credited
    assert "Corrects 2026-000001 of" in credited and "Sorry." in credited
    assert invoice.totals.total + credit_note.totals.total == 0


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
