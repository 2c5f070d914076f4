"""Requests, decisions, and what the close does with credits, on a real PostgreSQL."""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pipeline.billing import credits
from pipeline.billing.credits import AlreadyDecided, Asked, NotFound, NotVoidable, SamePerson
from pipeline.core.commitments import Commitment
from pipeline.core.credits import Grant, Rollover
from pipeline.core.periods import parse_instant
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

OCTOBER, NOVEMBER, FAR = (parse_instant(f"{day}T00:00:00Z") for day in ("2026-10-01", "2026-11-01", "2999-01-01"))
ONE = 10**12
GRANT = Grant("", 100 * ONE, OCTOBER, FAR)


@pytest.fixture
def database(settings: Settings) -> Iterator["Connection[Any]"]:
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        connection.execute(
            """INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
            VALUES ('account', 'acct', 1, '2020-01-01Z', '{"name": "A", "time_zone": "UTC"}', 'test')"""
        )
        yield connection


def asked(database: "Connection[Any]", grant: Grant = GRANT, unit: str = "USD", **rest: Any) -> int:
    said = {"reason": "purchase", "note": "order 17", "actor": "ada"} | rest
    rollover = said.pop("rollover", None)
    return credits.request_grant(database, Asked("acct", unit, grant, rollover), **said)


def approved(database: "Connection[Any]", *arguments: Any, **rest: Any) -> int:
    request = asked(database, *arguments, **rest)
    credits.decide(database, request, "approved", actor="grace")
    return request


def an_invoice(database: "Connection[Any]", state: str = "open") -> tuple[int, int]:
    row = database.execute(
        """WITH invoice AS (
            INSERT INTO billing.invoice (account, currency, period_start, period_end, state)
            VALUES ('acct', 'USD', '2026-10-01Z', '2026-11-01Z', %s) RETURNING id
        )
        INSERT INTO billing.invoice_line (invoice_id, contract, plan, plan_version, price_version, meter,
            meter_version, charge, segment_start, amount)
        SELECT id, 'c', 'p', 1, 'p@1', 'm', 1, 'api', '2026-10-01Z', 70 FROM invoice RETURNING invoice_id, id""",
        [state],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def state_of(database: "Connection[Any]", grant: int) -> tuple[Any, ...]:
    row = database.execute(
        "SELECT state, settled, remaining FROM finance.credits WHERE grant_id = %s", [grant]
    ).fetchone()
    assert row is not None
    return row


def test_credits_count_once_a_second_person_approves(database: "Connection[Any]") -> None:
    request = asked(database)
    assert credits.held(database, ["acct"]) == []
    assert [one.id for one in credits.open_requests(database)] == [request]
    with pytest.raises(SamePerson, match=f"expected another person than ada to approve {request}, got  ADA"):
        credits.decide(database, request, "approved", actor=" ADA")
    decided = credits.decide(database, request, "approved", actor="grace", note="as ordered")
    assert (decided.verdict, decided.decided_by) == ("approved", "grace")
    (held,) = credits.held(database, ["acct"])
    assert held.grant == replace(GRANT, id=str(request), granted_us=held.grant.granted_us)
    with pytest.raises(AlreadyDecided, match="approved by grace"):
        credits.decide(database, request, "rejected", actor="linus")
    audit = database.execute("SELECT actor, action FROM billing.audit ORDER BY id").fetchall()
    assert audit == [("ada", "credits.requested"), ("grace", "grant.approved")]


def test_the_database_refuses_a_person_s_own_approval(database: "Connection[Any]") -> None:
    request = asked(database)
    with pytest.raises(psycopg.errors.RaiseException, match="expected another person to approve it"):
        database.execute(
            "INSERT INTO billing.credit_decision (request_id, verdict, decided_by) VALUES (%s, 'approved', 'Ada ')",
            [request],
        )
    credits.decide(database, request, "rejected", actor="ada")  # to say no to one's own is no harm
    assert state_of(database, request)[0] == "rejected"


def test_what_was_decided_is_never_changed(database: "Connection[Any]") -> None:
    approved(database)
    database.execute("RESET ROLE")  # the owner is held as well
    tables = ("credit_request", "credit_grant", "credit_decision", "credit_entry", "commitment", "alert", "budget")
    for table in tables:
        for statement in (f"DELETE FROM billing.{table}", f"TRUNCATE billing.{table} CASCADE"):
            with pytest.raises(psycopg.errors.RaiseException, match="append only"):
                database.execute(statement)


REFUSED: list[tuple[Grant, str, dict[str, Any], str]] = [
    (replace(GRANT, amount=-ONE), "USD", {}, "expected credits above 0"),
    (replace(GRANT, amount=ONE // 1000), "USD", {}, "expected an amount of USD with at most 2 decimals, got 0.001"),
    (GRANT, "USDX", {}, "expected a currency code of ISO 4217"),
    (GRANT, "USD", {"reason": "whim"}, "expected a reason code of contract, migration, purchase, got 'whim'"),
    (GRANT, "USD", {"reason": "rollover"}, "expected a reason code of"),
    (replace(GRANT, kind="service"), "USD", {}, "expected a reason code of goodwill, outage, sla_breach"),
    (replace(GRANT, reduces="units"), "calls", {}, "expected the charges that unit credits pay for"),
    (replace(GRANT, end_us=None), "USD", {"rollover": Rollover(ONE)}, "expected an end of credits that roll over"),
    (
        GRANT,
        "USD",
        {"rollover": Rollover(ONE, preserve_overage=True)},
        "used beyond credits is billed, and would be paid",
    ),
]


def test_credits_that_cannot_be_given_are_refused(database: "Connection[Any]") -> None:
    for grant, unit, rest, says in REFUSED:
        with pytest.raises(ValueError, match=says):
            asked(database, grant, unit, **rest)
    assert credits.open_requests(database) == []


def test_an_unknown_account_is_told(database: "Connection[Any]") -> None:
    with pytest.raises(NotFound, match="expected an account of the catalog, got 'nobody'"):
        credits.request_grant(database, Asked("nobody", "USD", GRANT), reason="purchase", note="", actor="ada")


def test_a_void_ends_a_grant_when_it_is_approved(database: "Connection[Any]") -> None:
    grant = approved(database)
    void = credits.request_void(database, grant, reason="fraud", note="", actor="ada")
    assert state_of(database, grant)[0] == "valid"
    credits.decide(database, void, "approved", actor="grace")
    assert state_of(database, grant)[0] == "void"
    (held,) = credits.held(database, ["acct"])  # usage before it still draws
    assert held.grant.start_us == OCTOBER
    assert held.grant.end_us is not None and held.grant.end_us < FAR
    with pytest.raises(NotVoidable, match="void already"):
        credits.request_void(database, grant, reason="fraud", note="", actor="ada")
    with pytest.raises(NotVoidable, match="open: reject it"):
        credits.request_void(database, asked(database), reason="fraud", note="", actor="ada")
    with pytest.raises(NotFound, match="expected a grant or commitment, got 999"):
        credits.request_void(database, 999, reason="fraud", note="", actor="ada")


def test_a_close_books_what_differs_from_what_it_booked(database: "Connection[Any]") -> None:
    grant = approved(database)
    invoice, line = an_invoice(database)
    assert credits.settle(database, invoice, {(grant, line): Decimal(70)}, actor="close") == 1
    assert credits.settle(database, invoice, {(grant, line): Decimal(70)}, actor="close") == 0
    assert state_of(database, grant) == ("valid", Decimal(70), Decimal(30))
    assert credits.held(database, ["acct"])[0].grant.amount == 30 * ONE
    assert credits.held(database, ["acct"], settling=[invoice])[0].grant.amount == 100 * ONE
    assert credits.settle(database, invoice, {(grant, None): Decimal(50)}, actor="close", note="as paid") == 2
    entries = database.execute("SELECT line_id, amount FROM finance.credit_entries ORDER BY entry_id").fetchall()
    assert entries == [(line, 70), (None, 50), (line, -70)]
    says = f"expected draws of 0 to 100 in all from grant {grant}, got 101"
    with pytest.raises(ValueError, match=says), database.transaction():
        credits.settle(database, invoice, {(grant, None): Decimal(101)}, actor="close")
    assert state_of(database, grant) == ("valid", Decimal(50), Decimal(50))


def test_what_is_left_rolls_over_once(database: "Connection[Any]") -> None:
    grant = approved(database, replace(GRANT, end_us=NOVEMBER), rollover=Rollover(50 * ONE))
    invoice, line = an_invoice(database)
    credits.settle(database, invoice, {(grant, line): Decimal(10)}, actor="close")
    following = credits.roll_over(database, grant, until_us=FAR, actor="close")
    assert following is not None
    (row,) = database.execute(
        "SELECT state, amount, starts_at, reason_code, requested_by, decided_by, rolled_from FROM finance.credits "
        "WHERE grant_id = %s",
        [following],
    ).fetchall()
    assert row[:2] == ("valid", 50)
    assert row[2].isoformat() == "2026-11-01T00:00:00+00:00"
    assert row[3:] == ("rollover", "ada", "grace", grant)
    with pytest.raises(psycopg.errors.UniqueViolation):
        credits.roll_over(database, grant, until_us=FAR, actor="close")
    assert credits.roll_over(database, approved(database), until_us=FAR, actor="close") is None


def test_a_commitment_counts_once_approved_until_it_is_void(database: "Connection[Any]") -> None:
    commitment = Commitment(
        "", 1000 * ONE, OCTOBER, None, "year", overage_factor=Decimal("1.5"), charges=frozenset({"api"})
    )
    request = credits.request_commitment(database, "acct", "USD", commitment, note="contract 7", actor="ada")
    assert credits.commitments_of(database, "acct") == []
    credits.decide(database, request, "approved", actor="grace")
    assert credits.commitments_of(database, "acct") == [("USD", replace(commitment, id=str(request)))]
    void = credits.request_void(database, request, reason="granted_in_error", note="", actor="ada")
    credits.decide(database, void, "approved", actor="grace")
    ((_, ended),) = credits.commitments_of(database, "acct")
    assert ended.end_us is not None
    assert database.execute("SELECT state FROM finance.commitments").fetchall() == [("void",)]


def test_the_newest_overdraft_and_budget_count(database: "Connection[Any]") -> None:
    for amount in ("10", "25.50"):
        credits.set_overdraft(database, "acct", "USD", Decimal(amount), hard_stop=True, actor="ada", note="")
        credits.set_budget(database, "acct", "USD", Decimal(amount), actor="ada", note="")
    assert credits.overdrafts_of(database, "acct") == {"USD": credits.Overdraft(25_500_000_000_000, True)}
    assert credits.budgets_of(database, "acct") == {"USD": 25_500_000_000_000}
    credits.set_budget(database, "acct", "USD", None, actor="ada", note="")
    assert credits.budgets_of(database, "acct") == {}
    with pytest.raises(ValueError, match="expected an overdraft of 0 or more, got -1"):
        credits.set_overdraft(database, "acct", "USD", Decimal(-1), hard_stop=False, actor="ada", note="")
