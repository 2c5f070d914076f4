"""`tally close` as a person runs it: refused, overridden, gone on with, and done."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from pipeline.billing.close import readiness
from pipeline.billing.own_documents import reissue
from pipeline.billing.rerate import Month
from pipeline.billing.voids import void
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
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
        preview = tally.json("close", month, "--dry-run", "--wait", "0", code=4)
        assert [(one["payer"], one.get("total_amount")) for one in preview["documents"]] == [
            ("acme", "12.00"),
            ("umbrella", None),
        ]
        assert (preview["missing"], preview["passed_over"]) == (missing["missing"], False)
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
        already = tally("close", month)
        assert f"{month} is closed already: nothing was changed" in already.stderr
        assert tally("close", month, "--dry-run").stderr.strip() == already.stderr.strip()
        assert query(settings, "SELECT count(*) FROM billing.close_run") == [(2,)]


def test_a_dry_run_says_what_the_run_itself_would_say(settings: Settings, tmp_path: Path) -> None:
    """Of a month that is still to come, that goes on, and of one in which nothing is missing."""
    world = DatabaseWorld(tmp_path, settings)
    world.publish(PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, *(customer(one, document_currency="USD") for one in ("acme", "umbrella")))
    tally = Tally(settings)
    assert "expected a month that has begun" in tally("close", months_ago(-2), "--dry-run", code=2).stderr
    run, dry = (tally("close", months_ago(0), *options, code=4) for options in ((), ("--dry-run",)))
    assert "is not over for every account before" in run.stdout
    assert dry.stdout.endswith(run.stdout) and dry.stderr.strip().endswith(run.stderr.strip())
    good = tally("close", months_ago(2), "--dry-run", "--wait", "0").stderr
    assert "Would issue 2 documents, 24.00 USD in sum. Nothing was changed." in good
    assert "The gate would let it pass: nothing is missing." in good
    assert query(settings, "SELECT count(*) FROM billing.close_run") == [(0,)]


def test_a_voided_invoice_is_pointed_out_until_it_is_issued_anew(settings: Settings, tmp_path: Path) -> None:
    world = DatabaseWorld(tmp_path, settings)
    world.publish(PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    tally, month, following = Tally(settings), Month.parse(months_ago(3)), months_ago(2)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, ENTITY, TAXES, *(customer(one, document_currency="USD") for one in ("acme", "umbrella")))
        id, _ = close(connection, settings, month)
        assert readiness(settings, month).voided == (), "it is closed, and all of it stands"
        ((number,),) = query(settings, "SELECT number FROM billing.document WHERE id = %s", id)
        now = datetime.now(UTC)
        void(connection, id, reason="wrong_details", note="", actor="ada", now=now)

        says = f"{number} of acme, 12.00 USD, is void and billed nowhere else: `tally invoices reissue {number}`"
        for options in (), ("--dry-run",):
            said = tally("close", month, *options, code=4).stderr
            assert f"{month} is closed already" in said and says in said
        assert readiness(settings, month, accounts=["umbrella"]).voided == (), "nothing of umbrella's"
        # A month after it is closed all the same, since all that is its own has arrived; it says so too.
        closed = tally("close", following, "--wait", "0").stderr
        assert says in closed and "2 documents for 2 payers" in closed
        # The month itself has somebody to close again, and now its gate asks.
        world.publish(ACCOUNTS.replace("umbrella", "initech").replace("acme", "acme2"), "accounts", None)
        found = {one.kind: one for one in readiness(settings, month).missing}["voided"]
        assert (found.count, dict(found.likely_money), found.overridable) == (1, {"USD": Decimal(12)}, True)
        assert f"{number} of acme" in found.what
        unbilled = "SELECT number, total_amount, reason FROM finance.unbilled_voids"
        assert query(settings, unbilled) == [(number, 12, "wrong_details")]
        assert "1 voided document is billed nowhere else" in tally("status").stdout
        reissue(connection, id, note="", now=now, actor="ada")
        assert query(settings, unbilled) == []
        assert "voided" not in {one.kind for one in readiness(settings, month).missing}
