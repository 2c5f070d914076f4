"""Credit notes, payments and voids on an issued invoice: columns come back to 0, and what was issued stays as it is."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing import credits
from pipeline.billing.credit_notes import NotCreditable, Part, credit
from pipeline.billing.issued import NoDocument, find, read
from pipeline.billing.own_documents import bill_adjustments, payer_of
from pipeline.billing.payments import NotPayable, pay, write_off
from pipeline.billing.rerate import Month
from pipeline.billing.voids import NotVoidable, void
from pipeline.core.credits import GRANT_REASONS, Grant, GrantKind, Reduces
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, calls_of_october, close, customer
from tests.scenarios.database import DatabaseWorld

OCTOBER = Month(2026, 10)
NOW = datetime(2026, 11, 5, 12, tzinfo=UTC)
COLUMNS = [f"{name}_amount" for name in ("lines", "discounts", "net", "tax", "total", "credits", "balance", "payable")]


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    """Acme used 333 calls in October."""
    return calls_of_october(database, tmp_path)


@pytest.fixture
def connection(world: DatabaseWorld, database: Settings) -> Iterator["Connection[Any]"]:
    with connect(database.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, customer("acme"))
        yield made


@pytest.fixture
def id(connection: "Connection[Any]", database: Settings) -> int:
    """October's invoice: 33.30 for the calls and the fee of 100."""
    (issued,) = close(connection, database, OCTOBER)
    return issued


def sums(connection: "Connection[Any]") -> list[Decimal]:
    row = connection.execute(f"SELECT {', '.join(f'sum({name})' for name in COLUMNS)} FROM billing.document").fetchone()
    assert row is not None
    return list(row)


def give(connection: "Connection[Any]", id: int, *parts: Part, to: Any = "refund") -> Any:
    return credit(connection, id, parts or None, reason="billing_error", note="n", to=to, actor="ada", now=NOW)


def state(connection: "Connection[Any]", id: int) -> tuple[Any, ...]:
    row = connection.execute("SELECT state, open_amount FROM billing.document_payment WHERE document_id = %s", [id])
    return row.fetchone() or ()


def test_a_full_credit_note_makes_every_column_0(connection: "Connection[Any]", id: int) -> None:
    assert sums(connection)[2:5] == [Decimal("133.30"), Decimal("26.66"), Decimal("159.96")]
    note = give(connection, id)
    assert (note.number, note.corrects, note.total, note.taken_off, note.to_refund) == (
        "2026-000002",
        "2026-000001",
        Decimal("-159.96"),
        Decimal("159.96"),
        0,
    )
    assert sums(connection) == [0] * 8
    for columns in ("exact_amount", "amount", "net_amount", "tax_amount", "quantity"):
        assert connection.execute(f"SELECT sum({columns}) FROM billing.document_line GROUP BY charge").fetchall() == [
            (0,),
            (0,),
        ]
    assert connection.execute("SELECT sum(base_amount), sum(tax_amount) FROM billing.document_tax").fetchone() == (0, 0)
    assert (state(connection, id), state(connection, note.document)) == (("paid", 0), ("paid", 0))
    with pytest.raises(NotCreditable, match="which is credited in full"):
        give(connection, id)


def test_credits_bit_by_bit_add_up_to_all_of_it(connection: "Connection[Any]", id: int) -> None:
    """Cents are never lost between the parts: 333 calls in three odd parts, then the fee."""
    calls, fee = (line.position for line in read(connection, id).lines)
    totals = [give(connection, id, Part(calls, n * QUANTITY_ONE)).total for n in (1, 100, 7)]
    assert totals[0] == Decimal("-0.12")
    with pytest.raises(NotCreditable, match=r"up to 225 call, left of line 1 of 2026-000001, got 226"):
        give(connection, id, Part(calls, 226 * QUANTITY_ONE))
    with pytest.raises(NotCreditable, match=r"each line .* at most once"):
        give(connection, id, Part(fee), Part(fee))
    give(connection, id, Part(fee))
    with pytest.raises(NotCreditable, match="line 2 of 2026-000001, which is credited in full"):
        give(connection, id, Part(fee))
    give(connection, id)
    assert sums(connection) == [0] * 8


def test_documents_that_took_each_other_back_are_0_together_in_any_order(
    connection: "Connection[Any]", world: DatabaseWorld, id: int
) -> None:
    """October is billed, adjusted on November's invoice and once more; each is credited until nothing is left of it."""
    world.use(["2026-10-09T00:00:00Z acme/late call - n=11"], "2026-11-02T00:00:00Z")
    world.use(["2026-11-09T00:00:00Z acme/b call - n=50"], None)
    (november,) = close(connection, world.settings, Month(2026, 11))
    world.use(["2026-10-10T00:00:00Z acme/later call - n=7"], "2026-11-02T00:00:00Z")
    (adjustment,) = bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    documents = [id, november, adjustment.document]
    for order in permutations(documents):
        with connection.transaction(force_rollback=True):
            given = [give(connection, one) for one in until_nothing_is_left(connection, order)]
            assert all(one.total < 0 for one in given), order  # a credit note charges nothing
            of_lines = connection.execute(_SELECT_LINES).fetchall()
            assert of_lines == [(charge, *[0] * 6) for charge, *_ in of_lines], order
            assert sums(connection) == [0] * 8, order
            assert connection.execute("SELECT * FROM finance.document_checks").fetchall() == [], order


_SELECT_LINES = """
SELECT charge, sum(quantity), sum(amount), sum(discount_amount), sum(net_amount), sum(tax_amount), sum(total_amount)
FROM billing.document_line GROUP BY charge ORDER BY charge
"""


def until_nothing_is_left(connection: "Connection[Any]", documents: Sequence[int]) -> Iterator[int]:
    """The documents in turns, and again, each while crediting it is not refused."""
    left = True
    while left:
        left = False
        for one in documents:
            with suppress(NotCreditable), connection.transaction(force_rollback=True):
                give(connection, one)
                left = True
            if left:
                yield one
                break


def test_a_line_that_was_taken_back_is_not_credited_once_more(
    connection: "Connection[Any]", world: DatabaseWorld, id: int
) -> None:
    world.use(["2026-10-09T00:00:00Z acme/late call - n=11"], "2026-11-02T00:00:00Z")
    bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")
    calls = read(connection, id).lines[0].position
    with pytest.raises(NotCreditable, match=r"line 1 of 2026-000001, which 2026-000002 took back: credit that one"):
        give(connection, id, Part(calls))
    note = give(connection, id)
    assert (note.total, note.left_out) == (Decimal("-120.00"), ((calls, "2026-000002"),))
    with pytest.raises(NotCreditable, match=r"left to credit, got 2026-000001, of which 2026-000002 took back"):
        give(connection, id)
    adjustment = find(connection, "2026-000002")
    reversal, anew = (line.position for line in read(connection, adjustment).lines)
    with pytest.raises(NotCreditable, match=r"line 1 of 2026-000002, which takes back what an earlier document billed"):
        give(connection, adjustment, Part(reversal))
    # Of what stands in for it all is given back by itself: then the rest of the sum is below 0, and nothing is charged.
    assert give(connection, adjustment, Part(anew)).total == Decimal("-41.28")
    with pytest.raises(NotCreditable, match="2026-000002, which is credited in full"):
        give(connection, adjustment)
    assert sums(connection)[:5] == [0] * 5


def test_what_was_paid_is_refunded_or_goes_to_the_balance(connection: "Connection[Any]", id: int) -> None:
    paid = pay(connection, id, Decimal("159.00"), at=NOW, reference="bank 1", actor="ada")
    assert (paid.open, paid.state) == (Decimal("0.96"), "partly_paid")
    assert pay(connection, id, Decimal("159.00"), at=NOW, reference="bank 1", actor="ada").repeated
    fee = read(connection, id).lines[1].position
    note = give(connection, id, Part(fee), to="balance")
    assert (note.taken_off, note.to_balance, note.to_refund) == (Decimal("0.96"), Decimal("119.04"), 0)
    assert state(connection, note.document) == ("paid", 0)
    assert connection.execute("SELECT kind, amount FROM billing.balance_entry").fetchall() == [
        ("credit_note", Decimal("119.04"))
    ]
    rest = give(connection, id)
    assert (rest.taken_off, rest.to_refund) == (0, Decimal("39.96"))
    assert state(connection, rest.document) == ("unpaid", Decimal("-39.96"))
    refunded = pay(connection, rest.document, None, at=NOW, reference="bank 2", actor="ada")
    assert (refunded.booked, refunded.state) == (Decimal("39.96"), "paid")


def test_what_was_given_up_is_not_refunded(connection: "Connection[Any]", id: int) -> None:
    """Nobody paid it. Of the 33.30 that are credited with tax, 39.96, the 29.98 that were paid of them are refunded."""
    pay(connection, id, Decimal("149.98"), at=NOW, reference="", actor="ada")
    write_off(connection, id, at=NOW, why="insolvent", actor="ada")
    note = give(connection, id, Part(1))
    assert (note.taken_off, note.to_refund) == (Decimal("9.98"), Decimal("29.98"))
    assert state(connection, id) == ("paid", 0)


def test_a_void_unbills_and_keeps_number_and_rows(connection: "Connection[Any]", database: Settings) -> None:
    connection.execute(
        """INSERT INTO billing.balance_entry (legal_entity, account, currency, amount, kind, by)
        VALUES ('ours', 'acme', 'EUR', 5, 'carried', 'x')"""
    )
    (id,) = close(connection, database, OCTOBER)
    assert state(connection, id) == ("unpaid", Decimal("154.96"))
    before = read(connection, id)
    voided = void(connection, id, reason="wrong_details", note="old address", actor="ada", now=NOW)
    assert (voided.number, voided.to_balance) == ("2026-000001", 5)
    after = read(connection, id)
    assert (after.state, after.lines, after.totals) == ("void", before.lines, before.totals)
    assert state(connection, id) == ()
    for again in (
        lambda: void(connection, id, reason="duplicate", note="", actor="ada", now=NOW),
        lambda: give(connection, id),
        lambda: pay(connection, id, None, at=NOW, reference="", actor="ada"),
    ):
        with pytest.raises((NotVoidable, NotCreditable, NotPayable), match="2026-000001, which is void"):
            again()
    audited = connection.execute(
        "SELECT actor, detail ->> 'reason' FROM billing.audit WHERE action = 'document.void'"
    ).fetchall()
    assert audited == [("ada", "wrong_details")]


def test_what_a_document_is_built_on_is_not_voided(connection: "Connection[Any]", id: int) -> None:
    note = give(connection, id, Part(1))
    with pytest.raises(NotVoidable, match=r"2026-000002 credits it\. Void 2026-000002 first"):
        void(connection, id, reason="duplicate", note="", actor="ada", now=NOW)
    void(connection, note.document, reason="wrong_amount", note="", actor="ada", now=NOW)
    assert state(connection, id) == ("unpaid", Decimal("159.96"))
    pay(connection, id, None, at=NOW, reference="", actor="ada")
    with pytest.raises(NotVoidable, match="Issue a credit note instead"):
        void(connection, id, reason="duplicate", note="", actor="ada", now=NOW)


def grant(connection: "Connection[Any]", kind: GrantKind, reduces: Reduces, amount: int) -> None:
    start = to_micros(datetime(2026, 10, 1, tzinfo=UTC))
    asked = credits.Asked("acme", "EUR", Grant("", amount * 10**12, start, None, kind, reduces, 0, start))
    request = credits.request_grant(connection, asked, reason=min(GRANT_REASONS[kind]), note="", actor="ada")
    credits.decide(connection, request, "approved", actor="bob")


@pytest.mark.parametrize("how", ["credited in two parts", "voided"])
def test_credits_that_paid_can_be_drawn_again(connection: "Connection[Any]", database: Settings, how: str) -> None:
    """20 off before tax and 50 prepaid: 113.30 and 22.66 tax, of which 85.96 is to be paid. All of it comes back."""
    grant(connection, "promotional", "net", 20)
    grant(connection, "prepaid", "total", 50)
    (id,) = close(connection, database, OCTOBER)
    assert state(connection, id) == ("unpaid", Decimal("85.96"))
    settled = "SELECT reduces, settled FROM billing.grant_state ORDER BY 1"
    assert connection.execute(settled).fetchall() == [("net", 20), ("total", 50)]
    if how == "voided":
        assert void(connection, id, reason="duplicate", note="", actor="ada", now=NOW).to_credits == 70
    else:
        # The net credits paid for the calls: 13.30 of them are left to credit, and 20 % on these.
        half = give(connection, id, Part(1, 166 * QUANTITY_ONE + QUANTITY_ONE // 2))
        assert (half.total, half.taken_off) == (Decimal("-7.98"), Decimal("7.98"))
        assert connection.execute(settled).fetchall() == [("net", 10), ("total", 50)]
        rest = give(connection, id)  # what was to be paid is not; then the prepaid credits come back
        assert (rest.total, rest.taken_off, rest.to_refund) == (Decimal("-127.98"), Decimal("77.98"), 0)
        assert sums(connection) == [0] * 8
    assert connection.execute(settled).fetchall() == [("net", 0), ("total", 0)]


def test_documents_are_found_by_number_and_by_id(connection: "Connection[Any]", id: int) -> None:
    assert find(connection, "2026-000001") == find(connection, str(id)) == id
    with pytest.raises(NoDocument, match="got '2026-000009'"):
        find(connection, "2026-000009")
