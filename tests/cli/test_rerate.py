"""``tally rerate`` as a user types it, and what ``tally explain`` says of it."""

from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.infra.settings import Settings
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

from .running import Tally

STORY_PRICES = """
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
  - {id: peak, event_type: call, aggregation: max, value: n, unit: call}
plans:
  - id: api
    name: API
    currency: USD
    pools: [{id: free, unit: call, included: 10, charges: [calls]}]
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.1}
      - {id: peak, meter: peak, model: per_unit, unit_price: 1}
      - {id: fee, model: flat, unit_price: 9}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"


@pytest.fixture
def tally(settings: Settings, tmp_path: Path) -> Tally:
    """Acme has used 8 and 5 of 10 free calls; the fee of 9 is not booked yet."""
    world = DatabaseWorld(tmp_path, settings)
    world.publish(STORY_PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    world.use(["2026-10-03T00:00:00Z acme/a call - n=8", "2026-10-04T00:00:00Z acme/b call - n=5"], None)
    return Tally(settings)


def test_preview_book_and_explain(tally: Tally, settings: Settings) -> None:
    preview = tally("rerate", "--period", "2026-10", "--dry-run")
    assert "fee" in preview.stdout and "+9 USD" in preview.stdout
    assert "In sum +9 USD on 1 account." in preview.stderr
    assert query(settings, "SELECT count(*) FROM billing.close_entry") == [(0,)]

    asked = tally("rerate", "--period", "2026-10", "--why", "month end", code=2)
    assert "would book 1 entries" in asked.stderr

    done = tally.json("rerate", "--period", "2026-10", "--why", "month end", "--yes")
    (account,) = done["accounts"]
    (entry,) = account["entries"]
    assert (done["booked"], account["account"], entry["charge"], entry["reasons"]) == (True, "acme", "fee", ["fee"])
    assert Decimal(entry["amount"]) == 9
    again = tally("rerate", "--period", "2026-10", "--why", "again", "--yes")
    assert "Nothing to book" in again.stderr

    month = tally.json("explain", "month:acme/2026-10")
    parts = {
        line["charge"]: [(part["text"], Decimal(part["amount"])) for part in line["parts"]] for line in month["lines"]
    }
    assert parts == {
        "calls": [("10 calls from the shared pool: free", 0), ("3 calls at 0.1 USD each", Decimal("0.3"))],
        "peak": [("8 calls at 1 USD each", 8)],
        "fee": [("9 USD", 9)],
    }
    (total,) = month["totals"]
    assert (Decimal(total["amount"]), Decimal(total["held"]), Decimal(total["to_book"])) == (
        Decimal("17.3"),
        Decimal("17.3"),
        0,
    )
    shown = tally("explain", "month:acme/2026-10").stdout
    assert (
        "10 call included" in shown
        and "calls from 2026-10-01: 13 calls in 2 events (line:1)" in shown
        and "In all 17.3 USD: as its lines hold." in shown
    )

    ((line,),) = query(settings, "SELECT id FROM billing.invoice_line WHERE charge = 'fee'")
    explained = tally("explain", f"line:{line}").stdout
    assert "0 of events + 9 booked beside them = 9" in explained
    assert "month end" in explained and "equals the stored amount" in explained


def test_an_event_of_class_period_says_so(tally: Tally) -> None:
    found = {row["charge"]: row for row in tally.json("explain", "acme/b")["rows"]}
    assert found["peak"]["arithmetic"]["how"] == "provisional"
    assert "the close prices all of it at once" in tally("explain", "acme/b").stdout


def test_what_cannot_be_done(tally: Tally) -> None:
    assert "expected --why" in tally("rerate", "--period", "2026-10", code=2).stderr
    assert "expected a month such as 2026-10" in tally("rerate", "--period", "now", "--dry-run", code=2).stderr
    missing = tally("rerate", "--period", "2026-10", "--account", "x", "--dry-run", code=3)
    assert "expected an account of the catalog, got 'x'" in missing.stderr
    tally("explain", "month:x/2026-10", code=3)


def test_a_charge_nobody_has_and_a_month_to_come_are_refused(tally: Tally) -> None:
    unknown = tally("rerate", "--period", "2026-10", "--charge", "cals", "--dry-run", code=3)
    assert "expected a charge of a published plan, got 'cals'" in unknown.stderr
    to_come = tally("rerate", "--period", "2999-01", "--dry-run", code=2)
    assert "expected a month that has begun, got 2999-01" in to_come.stderr


def test_a_preview_of_voids_does_not_add_up_maxima(tally: Tally) -> None:
    billed = tally.json("usage", "void", "--account", "acme", "--dry-run")["billed"]
    quantities = {one["charge"]: one["quantity"] and Decimal(one["quantity"]) for one in billed}
    assert quantities == {"calls": 13, "peak": None}
