"""`tally close` as a person runs it: refused, overridden, gone on with, and done."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, customer
from tests.billing.running import query
from tests.cli.running import Tally
from tests.scenarios.database import DatabaseWorld

PRICES = """
plans:
  - {id: basic, name: Basic, currency: USD, charges: [{id: fee, model: flat, unit_price: 10}]}
"""
ACCOUNTS = """
accounts:
  - {id: acme, name: Acme, contracts: [{id: acme-1, plan: basic, start: 2020-01-01}]}
  - {id: umbrella, name: Umbrella, contracts: [{id: umbrella-1, plan: basic, start: 2020-01-01}]}
"""


def months_ago(count: int) -> str:
    """A month before the present one, or after it."""
    first = datetime.now(UTC).replace(day=15)
    return f"{first - timedelta(days=count * 365.25 / 12):%Y-%m}"


def test_a_month_is_closed(settings: Settings, tmp_path: Path) -> None:
    """Two accounts owe a fee; one of them is no customer yet."""
    world = DatabaseWorld(tmp_path, settings)
    world.publish(PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, customer("acme", document_currency="USD"))
        tally, month = Tally(settings), months_ago(2)

        assert "expected a month that has begun" in tally("close", months_ago(-2), code=2).stderr
        running = tally.json("close", months_ago(0), "--override", "--why", "in a hurry", code=4)
        assert [(one["kind"], one["overridable"]) for one in running["missing"]] == [("period", False)]
        assert "expected an account of the catalog" in tally("close", month, "--account", "nobody", code=3).stderr
        assert "expected --why" in tally("close", month, "--override", code=2).stderr

        missing = tally.json("close", month, "--wait", "0", code=4)
        assert [one["kind"] for one in missing["missing"]] == ["customers"]
        preview = tally.json("close", month, "--dry-run", code=4)
        assert [(one["payer"], one.get("total_amount")) for one in preview["documents"]] == [
            ("acme", "12.00"),
            ("umbrella", None),
        ]
        assert query(settings, "SELECT count(*) FROM billing.close_run") == [(0,)], "nothing was changed so far"

        closed = tally("close", month, "--override", "--why", "umbrella may wait", "--by", "bob", code=4)
        assert "1 document for 1 payer" in closed.stderr
        assert "umbrella" in closed.stdout and "expected umbrella as a customer" in closed.stdout
        overridden = "SELECT by, why, missing -> 0 ->> 'kind' FROM billing.close_override"
        assert query(settings, overridden) == [("bob", "umbrella may wait", "customers")]

        apply(connection, customer("umbrella", document_currency="USD"))
        data = tally.json("close", month)
        assert (data["documents"], data["payers"], data["failed"]) == (1, {"issued": 1}, [])
        numbers = query(settings, "SELECT account, number_serial FROM billing.document ORDER BY number_serial")
        assert numbers == [("acme", 1), ("umbrella", 2)]
        assert f"{month} is closed already: nothing was changed" in tally("close", month).stderr
        assert query(settings, "SELECT count(*) FROM billing.close_run") == [(2,)]
