"""What tests of invoices share: a legal entity, 20 % VAT, customers, and a month closed the product's own way."""

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import queue
from pipeline.billing.close import work
from pipeline.billing.invoicing_store import consolidating, mark
from pipeline.billing.rerate import Month
from pipeline.core.invoicing_documents import Item, TaxTable, id_of, kind_of, to_document
from pipeline.core.parties import Address, Customer, LegalEntity
from pipeline.core.tax import TaxRate
from pipeline.infra.settings import Settings
from tests.scenarios.database import DatabaseWorld

HERE = Address(("Hauptstr. 1",), "Berlin", "DE", "10115")
ENTITY = LegalEntity("ours", 1, "Ours GmbH", HERE, vat_number="DE123456788")
TAXES = TaxTable("DE/VAT", 1, (TaxRate("VAT", "DE", "standard", Decimal(20), date(2020, 1, 1)),))
CALLS_AND_FEE = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.1}
      - {id: fee, model: flat, unit_price: 100}
"""
ACME = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"

_APPLY = """
INSERT INTO billing.invoicing_version (kind, id, version, valid_from, document, applied_at, applied_by)
VALUES (%s, %s, (SELECT count(*) + 1 FROM billing.invoicing_version WHERE kind = %s AND id = %s), '2020-01-01', %s,
    '2026-01-01Z', 'x')
"""


def apply(connection: "Connection[Any]", *items: Item) -> None:
    for item in items:
        key = kind_of(item), id_of(item)
        connection.execute(_APPLY, [*key, *key, Jsonb(to_document(item))])


def customer(account: str, *, name: str = "", **fields: Any) -> Customer:
    return Customer(account, 1, name or account.title(), HERE, **fields)


def calls_of_october(database: Settings, folder: Path) -> DatabaseWorld:
    """Acme used 333 calls in October: 33.30, and the fee of 100."""
    world = DatabaseWorld(folder, database)
    world.publish(CALLS_AND_FEE, "prices", None)
    world.publish(ACME, "accounts", None)
    world.use(["2026-10-03T00:00:00Z acme/a call - n=333"], None)
    return world


def close(connection: "Connection[Any]", settings: Settings, month: Month, *accounts: str) -> list[int]:
    """Close a month as the command does, but for its gate, on the second day after it; the ids of what was issued."""
    until = mark(connection)
    last_day = date(month.year, month.month, 28)
    parents = consolidating(connection, applied_until=until, on=last_day)
    run = queue.begin(connection, str(month), accounts, invoicing_mark=until, consolidating=parents, actor="x")
    assert run is not None, "expected something to close"
    now = datetime(month.year + month.month // 12, month.month % 12 + 1, 2, tzinfo=UTC)
    list(work(settings.dsn, run.id, "x", clock=lambda: now))
    assert queue.finish(connection, run.id)
    assert queue.failed(connection, run.id, 10) == []
    issued = connection.execute("SELECT id FROM billing.document WHERE run_id = %s ORDER BY id", [run.id])
    return [id for (id,) in issued]
