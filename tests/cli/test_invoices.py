"""``tally invoices`` as a finance person types it, from an issued invoice to what follows."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.billing.rerate import Month
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.scenarios.database import DatabaseWorld

from .running import Tally

PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, name: API calls, meter: calls, model: per_unit, unit_price: 0.1}
      - {id: fee, model: flat, unit_price: 100}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    """Acme used 300 calls in October: 30 and the fee of 100, and 20 % VAT."""
    made = DatabaseWorld(tmp_path, settings)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    made.use(["2026-10-03T00:00:00Z acme/a call - n=300"], None)
    return made


def test_from_an_issued_invoice_to_what_follows(world: DatabaseWorld) -> None:
    tally = Tally(world.settings)
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme"))
        close(connection, world.settings, Month(2026, 10))
    assert "2026-000001" in tally("invoices", "list", "--month", "2026-10", "--unpaid").stdout
    shown = tally("invoices", "show", "2026-000001").stdout
    assert "API calls" in shown and "VAT 20 % on 130.00: 26.00" in shown and "payable 156.00 EUR" in shown

    refused = tally("invoices", "credit", "2026-000001", "--reason", "because", code=2)
    assert "expected --reason billing_error, duplicate" in refused.stderr
    credited = tally("invoices", "credit", "2026-000001", "--reason", "goodwill", "--line", "1=100", "--why", "outage")
    assert credited.stdout == "credit note 2026-000002 on 2026-000001: -12.00 EUR; 12.00 taken off what was open\n"
    paid = tally.json("invoices", "pay", "2026-000001", "100", "--reference", "bank 1")
    assert (Decimal(paid["open"]), paid["state"]) == (44, "partly_paid")
    linked = tally.json("invoices", "show", "2026-000001")["links"]
    assert [(link["relation"], link["number"]) for link in linked] == [("corrected by", "2026-000002")]
    voided = tally("invoices", "void", "2026-000002", "--reason", "wrong_amount").stdout
    assert voided == "2026-000002 is void: -12.00 EUR is unbilled again\n"
    stays = tally("invoices", "void", "2026-000001", "--reason", "duplicate", code=1)
    assert "2026-000001 stays: 100" in stays.stderr
    assert "got '7-7'" in tally("invoices", "show", "7-7", code=3).stderr

    assert "nothing came" in tally("invoices", "adjust", "acme", "--dry-run").stdout
    world.use(["2026-10-09T00:00:00Z acme/late call - n=50"], "2026-11-02T00:00:00Z")
    (found,) = tally.json("invoices", "adjust", "acme", "--dry-run", code=4)
    assert [(line["role"], line["quantity"]) for line in found["lines"]] == [("reversal", "-300"), ("new", "350")]
    assert tally("invoices", "adjust", "acme").stdout == (
        "adjustment 2026-000003, for 2026-000001: 6.00 EUR, payable 6.00\n"
    )
    assert tally("invoices", "threshold", "--json").stdout == "[]\n"


def test_a_draft_is_reviewed_then_issued(world: DatabaseWorld) -> None:
    tally = Tally(world.settings)
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, replace(ENTITY, review=True), TAXES, customer("acme"))
        (draft,) = close(connection, world.settings, Month(2026, 10))
    (listed,) = tally.json("invoices", "list", "--state", "draft")
    assert (listed["id"], listed["number"], Decimal(listed["total"])) == (draft, None, 156)
    assert "in state reviewed, got" in tally("invoices", "issue", str(draft), code=1).stderr
    (reviewed,) = tally.json("invoices", "review", str(draft), "--by", "grace")["reviewed"]
    (number,) = tally.json("invoices", "issue", str(reviewed))["issued"]
    assert "payable 156.00 EUR" in tally("invoices", "show", number).stdout
