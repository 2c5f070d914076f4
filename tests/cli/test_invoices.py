"""``tally invoices`` as a finance person types it, from an issued invoice to what follows."""

import time
from dataclasses import replace
from datetime import UTC, datetime
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
    explained = tally("explain", "2026-000001").stdout
    for text in (
        "invoice 2026-000001",
        "credit note 2026-000002 (issued): goodwill: outage",
        "partly paid, 44.00 EUR open",
        "VAT 20 % on 130.00: 26.00",
        "net 130.00 + tax 26.00 = total 156.00; total 156.00 - credits 0.00 - balance 0.00 = payable 156.00 EUR",
        "Each total equals the sum of its lines",
    ):
        assert text in explained
    calls = tally.json("explain", "2026-000001")["lines"][0]["line"]
    assert calls in explained
    assert "credit note 2026-000002" in tally("explain", calls).stdout
    linked = tally.json("invoices", "show", "2026-000001")["links"]
    assert [(link["relation"], link["number"]) for link in linked] == [("corrected by", "2026-000002")]
    voided = tally("invoices", "void", "2026-000002", "--reason", "wrong_amount").stdout
    assert voided == "2026-000002 is void: 12.00 EUR is not given back any more\n"
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
    shown = tally("invoices", "show", draft).stdout
    assert f"invoice {draft} (draft)" in shown and "API calls" in shown and "payable 156.00 EUR" in shown
    assert f"invoice document:{draft}" in tally("explain", f"document:{draft}").stdout
    assert "an issued document, got" in tally("invoices", "pay", draft, code=3).stderr
    assert "in state reviewed, got" in tally("invoices", "issue", str(draft), code=1).stderr
    (reviewed,) = tally.json("invoices", "review", str(draft), "--by", "grace")["reviewed"]
    frozen = tally.json("invoices", "show", reviewed)
    assert (frozen["state"], frozen["number"], Decimal(frozen["totals"]["total"])) == ("reviewed", None, 156)
    (number,) = tally.json("invoices", "issue", str(reviewed))["issued"]
    assert "payable 156.00 EUR" in tally("invoices", "show", number).stdout


def test_thresholds_are_billed_again_and_again(world: DatabaseWorld) -> None:
    """As a service: what is reached later is billed the next time, and SIGTERM ends it between two customers."""
    tally = Tally(world.settings)
    now = datetime.now(UTC)
    assert "expected --every 30s, 15m" in tally("invoices", "threshold", "--every", "soon", code=2).stderr
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme", threshold=10 * 10**12))
        billed = "SELECT count(*) FROM billing.document WHERE kind = 'progress' AND state = 'issued'"
        with tally.running("invoices", "threshold", "--every", "1s") as worker:
            time.sleep(2)  # rounds that find nothing
            assert connection.execute(billed).fetchone() == (0,)
            at = now.isoformat(timespec="seconds").replace("+00:00", "Z")
            world.use([f"{at} acme/now call - n=300"], None)
            until = time.monotonic() + 20
            while connection.execute(billed).fetchone() == (0,):
                assert time.monotonic() < until, "expected it to be billed"
                time.sleep(0.1)
        assert worker.returncode == 0


ZONES = """
accounts:
  - {id: york, name: York, time_zone: America/New_York, contracts: [{id: y-1, plan: api, start: 2026-01-01}]}
  - {id: wien, name: Wien, time_zone: Europe/Vienna, contracts: [{id: w-1, plan: api, start: 2026-01-01}]}
  - {id: world, name: World, contracts: [{id: u-1, plan: api, start: 2026-01-01}]}
"""


def test_months_and_days_are_shown_by_the_payers_clock(settings: Settings, tmp_path: Path) -> None:
    world, tally = DatabaseWorld(tmp_path, settings), Tally(settings)
    world.publish(PRICES, "prices", None)
    world.publish(ZONES, "accounts", None)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        buyers = [customer(account) for account in ("york", "wien", "world")]
        apply(connection, replace(ENTITY, time_zone="Europe/Berlin"), TAXES, *buyers)
        assert tally("close", "2026-10", "--dry-run").stdout.count("2026-10-01…31") == 3
        close(connection, settings, Month(2026, 10))
    rows = tally("invoices", "list", "--month", "2026-10").stdout.splitlines()[1:]
    assert len(rows) == 3 and all(" 2026-10 " in row for row in rows)
    for number in ("2026-000001", "2026-000002", "2026-000003"):
        assert "2026-10-01…31" in tally("invoices", "show", number).stdout


def test_what_is_settled_says_so(world: DatabaseWorld) -> None:
    tally = Tally(world.settings)
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme"))
        close(connection, world.settings, Month(2026, 10))
    tally("invoices", "pay", "2026-000001", "100")
    lost = tally("invoices", "write-off", "2026-000001", "--why", "insolvent").stdout
    assert lost == "56.00 EUR given up on 2026-000001: it is uncollectible, 0.00 open\n"
    for command in (["pay", "2026-000001"], ["write-off", "2026-000001", "--why", "again"]):
        refused = tally("invoices", *command, code=1).stderr
        assert "nothing is open on 2026-000001, which is uncollectible" in refused
    paid = tally("invoices", "pay", "2026-000001", "60", "--reference", "bank 2").stdout
    assert paid == "60.00 EUR booked on 2026-000001: paid, 0.00 open; 4.00 to the balance, for the next documents\n"
    rows = [line.split()[1:] for line in tally("invoices", "statement", "acme").stdout.splitlines()]
    assert rows[0] == ["with", "ours,", "EUR"]
    assert ["overpayment", "2026-000001", "bank", "2", "4.00", "4.00"] in rows
    back = tally("invoices", "take-back", "2026-000001", "--why", "bounced").stdout
    assert back == "60.00 EUR taken back on 2026-000001: partly paid, 56.00 open; 4.00 out of the balance again\n"
    assert "takes back" in tally("invoices", "show", "2026-000001").stdout
    assert "payment taken back 2026-000001" in " ".join(tally("invoices", "statement", "acme").stdout.split())


def test_a_fee_in_advance_is_explained_without_usage(world: DatabaseWorld) -> None:
    """Its period is to come: no line of usage is there to ask, so the document tells its price."""
    world.publish(PRICES.replace("model: flat", "in_advance: true, model: flat"), "prices", None)
    tally = Tally(world.settings)
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme"))
        close(connection, world.settings, Month(2026, 10))
    (fee,) = (line for line in tally.json("explain", "2026-000001")["lines"] if line["line"] is None)
    assert (fee["charge"], fee["lines"], fee["service_start"]) == ("fee", [], "2026-11-01T00:00:00+00:00")
    shown = tally("explain", "2026-000001").stdout
    assert "no usage: fee" in shown and f"price of line {fee['position']}" in shown
