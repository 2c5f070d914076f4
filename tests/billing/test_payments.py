"""Payments of an issued invoice: too little, too much, twice, after all, and taken back."""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing.credit_notes import credit
from pipeline.billing.payments import NotPayable, pay, take_back, write_off
from pipeline.billing.rerate import Month
from pipeline.billing.voids import void
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, calls_of_october, close, customer

NOW = datetime(2026, 11, 5, 12, tzinfo=UTC)


@pytest.fixture
def connection(database: Settings, tmp_path: Path) -> Iterator["Connection[Any]"]:
    """Acme used 333 calls in October."""
    calls_of_october(database, tmp_path)
    with connect(database.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, customer("acme"))
        yield made


@pytest.fixture
def id(connection: "Connection[Any]", database: Settings) -> int:
    """October's invoice: 33.30 for the calls and the fee of 100, with tax 159.96."""
    (issued,) = close(connection, database, Month(2026, 10))
    return issued


def state(connection: "Connection[Any]", id: int) -> tuple[Any, ...]:
    row = connection.execute("SELECT state, open_amount FROM billing.document_payment WHERE document_id = %s", [id])
    return row.fetchone() or ()


def test_what_is_left_can_be_given_up_and_is_paid_after_all(connection: "Connection[Any]", id: int) -> None:
    with pytest.raises(NotPayable, match=r"expected an amount above 0 on 2026-000001, got 0\.00 EUR"):
        pay(connection, id, Decimal(0), at=NOW, reference="", actor="ada")
    with pytest.raises(NotPayable, match="at most 2 decimals"):
        pay(connection, id, Decimal("0.001"), at=NOW, reference="", actor="ada")
    pay(connection, id, Decimal(100), at=NOW, reference="", actor="ada")
    assert write_off(connection, id, at=NOW, why="insolvent", actor="ada").state == "uncollectible"
    with pytest.raises(NotPayable, match="nothing is open on 2026-000001, which is uncollectible"):
        write_off(connection, id, at=NOW, why="insolvent", actor="ada")
    paid = pay(connection, id, Decimal(60), at=NOW, reference="", actor="ada")
    assert (paid.state, paid.open, paid.to_balance) == ("paid", 0, Decimal("0.04"))


def balance(connection: "Connection[Any]") -> list[tuple[Any, ...]]:
    return connection.execute("SELECT kind, amount, note FROM finance.balance_entries ORDER BY entry_id").fetchall()


def test_what_is_paid_too_much_pays_for_the_next_document(
    connection: "Connection[Any]", id: int, database: Settings
) -> None:
    """By mistake paid twice: the second payment is carried forward, and settles what comes next."""
    pay(connection, id, Decimal("159.96"), at=NOW, reference="bank 1", actor="ada")
    twice = pay(connection, id, Decimal("160.00"), at=NOW, reference="bank 2", actor="ada")
    assert (twice.booked, twice.open, twice.state, twice.to_balance) == (160, 0, "paid", 160)
    for amount in (Decimal("160.00"), None):
        assert pay(connection, id, amount, at=NOW, reference="bank 2", actor="ada").repeated
    with pytest.raises(NotPayable, match=r"expected 160\.00 EUR, as was booked .* 'bank 2' before, got 16\.00 EUR"):
        pay(connection, id, Decimal("16.00"), at=NOW, reference="bank 2", actor="ada")
    assert balance(connection) == [("overpayment", 160, "bank 2")]
    (november,) = close(connection, database, Month(2026, 11))
    assert state(connection, november) == ("paid", 0)
    entries = connection.execute("SELECT kind, number, amount, balance FROM finance.statements").fetchall()
    asked = Decimal("159.96")
    assert sorted(entries) == [
        ("applied", "2026-000002", 0, -120),
        ("balance", "2026-000001", 160, 0),
        ("invoice", "2026-000001", asked, 0),
        ("invoice", "2026-000002", 0, 0),
        ("overpayment", "2026-000001", 0, 160),
        ("payment", "2026-000001", -160, 0),
        ("payment", "2026-000001", -asked, 0),
    ]
    last = "SELECT open_amount, balance_amount FROM finance.statements ORDER BY position DESC LIMIT 1"
    assert connection.execute(last).fetchone() == (0, 40)
    with pytest.raises(NotPayable, match=r"put 160\.00 EUR into the balance, of which 120\.00 EUR is used: void"):
        take_back(connection, id, None, at=NOW, why="bounced", actor="ada")
    assert state(connection, id) == ("paid", 0)


def test_a_payment_is_taken_back(connection: "Connection[Any]", id: int) -> None:
    """First out of the balance that the document's payments went into, then it is open again; and once."""
    pay(connection, id, Decimal(100), at=NOW, reference="bank 1", actor="ada")
    pay(connection, id, Decimal(100), at=NOW, reference="bank 2", actor="ada")
    first, last = (row[0] for row in connection.execute("SELECT id FROM billing.settlement WHERE kind = 'payment'"))
    back = take_back(connection, id, first, at=NOW, why="other customer's", actor="ada")
    assert (back.booked, back.state, back.open) == (-100, "partly_paid", Decimal("59.96"))
    assert balance(connection) == [
        ("overpayment", Decimal("40.04"), "bank 2"),
        ("overpayment", Decimal("-40.04"), "bank 1"),
    ]
    with pytest.raises(NotPayable, match=f"expected a payment or refund of 2026-000001 that stands, got {first}, "):
        take_back(connection, id, first, at=NOW, why="", actor="ada")
    assert not pay(connection, id, Decimal("59.96"), at=NOW, reference="bank 1", actor="ada").repeated
    note = credit(connection, id, None, reason="billing_error", note="", to="refund", actor="ada", now=NOW)
    with pytest.raises(NotPayable, match="credit note 2026-000002 on what was paid: void it first"):
        take_back(connection, id, last, at=NOW, why="bounced", actor="ada")
    void(connection, note.document, reason="wrong_amount", note="", actor="ada", now=NOW)
    for _ in range(2):
        take_back(connection, id, None, at=NOW, why="bounced", actor="ada")
    assert state(connection, id) == ("unpaid", Decimal("159.96"))
    with pytest.raises(NotPayable, match="that stands, got none: `tally invoices show"):
        take_back(connection, id, None, at=NOW, why="bounced", actor="ada")
    void(connection, id, reason="duplicate", note="", actor="ada", now=NOW)
