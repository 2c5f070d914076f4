"""Explanations of documents: from a number to the usage behind each line, and from the usage to the numbers."""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.billing.credit_notes import Part, credit
from pipeline.billing.explain import Ambiguous, explain
from pipeline.billing.own_documents import bill_adjustments, payer_of
from pipeline.billing.payments import pay
from pipeline.billing.rerate import Month
from pipeline.core.money import QUANTITY_ONE
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.scenarios.database import DatabaseWorld

PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: EUR
    charges:
      - {id: calls, name: API calls, meter: calls, model: per_unit, unit_price: 0.0333}
      - {id: fee, model: flat, unit_price: 100}
"""
ACCOUNTS = """accounts:
- {id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}
- {id: other, name: Other, contracts: [{id: other-1, plan: api, start: 2026-01-01, legal_entity: theirs}]}
"""
NOW = datetime(2026, 11, 3, tzinfo=UTC)
OCTOBER = Month(2026, 10)


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    """Acme used 300 calls in October: 9.99 and the fee of 100, and 20 % VAT."""
    made = DatabaseWorld(tmp_path, settings)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    made.use(["2026-10-03T00:00:00Z acme/a call - n=300"], None)
    return made


def told(world: DatabaseWorld, what: str) -> dict[str, Any]:
    found = explain(world.settings, what)
    assert found is not None
    return found


def test_from_a_number_to_usage_and_back(world: DatabaseWorld) -> None:
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme"))
        (id,) = close(connection, world.settings, OCTOBER, "acme")
        part = Part(1, 100 * QUANTITY_ONE)
        credit(connection, id, [part], reason="goodwill", note="outage", to="refund", actor="ada", now=NOW)
        pay(connection, id, Decimal(100), at=NOW, reference="bank 1", actor="ada")
        world.use(["2026-10-09T00:00:00Z acme/late call - n=51"], "2026-11-02T00:00:00Z")
        bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")

    invoice = told(world, "2026-000001")
    assert invoice == told(world, f"document:{id}")
    assert (invoice["kind"], invoice["document_kind"], invoice["state"], invoice["payment"]) == (
        "document",
        "invoice",
        "issued",
        "partly_paid",
    )
    assert (invoice["account"], invoice["buyer"], invoice["seller"]) == ("acme", "Acme", "Ours GmbH")
    assert [(one["relation"], one["number"], one["reason_code"]) for one in invoice["links"]] == [
        ("corrected by", "2026-000002", "goodwill"),
        ("corrected by", "2026-000003", "late_usage"),
    ]
    # 9.99 + 100, and 20 %; less 3.33 and its tax, less 100.
    assert (invoice["total_amount"], invoice["open_amount"]) == (Decimal("131.99"), Decimal("27.99"))
    assert [(one["tax"], one["base_amount"], one["tax_amount"]) for one in invoice["taxes"]] == [
        ("VAT", Decimal("109.99"), Decimal("22.00"))
    ]
    assert [(one["kind"], one["amount"]) for one in invoice["settlements"]] == [("credit_note", 4), ("payment", 100)]
    assert len(invoice["checks"]) == 8 and all(one["proved"] for one in invoice["checks"])

    calls, _ = invoice["lines"]
    assert (calls["charge"], calls["quantity"], calls["price_version"]) == ("calls", 300, "api@1")
    line = told(world, calls["line"])
    assert [one["event"] for one in line["first_events"]] == ["acme/a"]
    billed = [(one["number"], one["document_kind"], one["role"], one["quantity"]) for one in line["documents"]]
    assert billed == [
        ("2026-000001", "invoice", "new", 300),
        ("2026-000002", "credit_note", "reversal", -100),
        ("2026-000003", "adjustment", "reversal", -300),
        ("2026-000003", "adjustment", "new", 351),
    ]

    credited = told(world, "2026-000002")
    (taken,) = credited["lines"]
    assert [(one["relation"], one["number"]) for one in credited["links"]] == [("corrects", "2026-000001")]
    assert (taken["line"], taken["adjusts"]) == (
        calls["line"],
        {"document": f"document:{id}", "number": "2026-000001", "position": calls["position"]},
    )

    reversal, anew = told(world, "2026-000003")["lines"]
    assert reversal["lines"] == [calls["line"]]
    # What came late stands on a line of its own, and both were billed anew: 351 at 0.0333 are 11.6883, so 11.69.
    assert len(anew["lines"]) == 2 and calls["line"] in anew["lines"]
    assert (anew["exact_amount"], anew["amount"]) == (Decimal("11.6883"), Decimal("11.69"))
    assert anew["rounding_difference"] == Decimal("0.0017")
    (late,) = (one for one in anew["lines"] if one != calls["line"])
    assert [one["number"] for one in told(world, late)["documents"]] == ["2026-000003"]

    container = told(world, told(world, calls["line"])["invoice"])
    assert [one["number"] for one in container["documents"]] == ["2026-000001", "2026-000002", "2026-000003"]


def test_a_document_without_a_number_and_a_number_of_several_things(world: DatabaseWorld) -> None:
    assert explain(world.settings, "2026-000001") is None
    assert explain(world.settings, "document:1") is None
    (line,) = told(world, told(world, "acme/a")["rows"][0]["invoice"])["lines"]
    assert told(world, line["line"])["documents"] == []
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme"), customer("other"))
        (id,) = close(connection, world.settings, OCTOBER, "acme")
        world.use(["2026-11-01T00:00:00Z acme/2026-000001 call - n=1"], None)
        with pytest.raises(Ambiguous, match=rf"document:{id} \(of ours\), acme/2026-000001 \(an event\)"):
            explain(world.settings, "2026-000001")
        assert told(world, "acme/2026-000001")["kind"] == "event"
        assert told(world, f"document:{id}")["number"] == "2026-000001"
