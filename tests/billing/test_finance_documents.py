"""What finance reads of documents: whether it adds up, and where it does not; columns that stay where they are."""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from psycopg import Connection

from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.conftest import fresh_settings

#: Views and their columns as finance knows them, one view a line.
KNOWN_COLUMNS = Path(__file__).parent / "data" / "finance_columns.txt"


@pytest.fixture(scope="module")
def shared(services: Endpoints, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with fresh_settings(services, template_database, tmp_path_factory.mktemp("finance")) as settings:
        yield settings


# An open period and a closed one of 10.006 and 20.00; its invoice, at 19 %, a credit note of the second line, and late
# usage of 1.00 in a supplement, which the next invoice has as an adjustment.
SETUP = """
INSERT INTO billing.invoice (account, currency, period_start, period_end, state, supplement) VALUES
    ('a', 'EUR', '2026-05-01Z', '2026-06-01Z', 'issued', 0), ('a', 'EUR', '2026-05-01Z', '2026-06-01Z', 'open', 1),
    ('a', 'EUR', '2026-06-01Z', '2026-07-01Z', 'open', 0);
INSERT INTO billing.invoice_line (invoice_id, contract, plan, plan_version, price_version, meter, meter_version, charge,
    segment_start, quantity, amount, events)
VALUES (1, 'c', 'p', 1, 'p@1', 'm', 1, 'x', '2026-05-01Z', 10, 10.006, 2),
    (1, 'c', 'p', 1, 'p@1', 'm', 1, 'y', '2026-05-01Z', 20, 20, 1),
    (2, 'c', 'p', 1, 'p@1', 'm', 1, 'x', '2026-05-01Z', 1, 1, 1),
    (3, 'c', 'p', 1, 'p@1', 'm', 1, 'x', '2026-06-01Z', 7, 7.5, 3);
CREATE TABLE billing.rated_usage_2026_05 PARTITION OF billing.rated_usage
    FOR VALUES FROM ('2026-05-01') TO ('2026-06-01');
INSERT INTO billing.rated_usage SELECT '2026-05-01', gen_random_uuid(), line, n, n, n, 1, '2026-05-10Z', '2026-05-10Z',
    0, 0, 0, 'usage', false, 'x', '', 'a', 'k' || n, 't', '', 's', 1, 0, 1, 5.003, '{}'
FROM (VALUES (1, 1), (2, 1), (3, 2), (4, 3)) AS row (n, line);
INSERT INTO billing.number_range VALUES ('e', 'R', 2026, 2), ('e', 'G', 2026, 1);
"""
DOCUMENT = """
INSERT INTO billing.document (kind, legal_entity, account, currency, period_start, period_end, tax_date, due_date,
    lines_amount, discounts_amount, net_amount, tax_amount, total_amount, credits_amount, balance_amount,
    payable_amount, corrects_id, created_by)
VALUES (%(kind)s, 'e', 'a', 'EUR', %(start)s::timestamptz, %(start)s::timestamptz + interval '1 month', '2026-05-31',
    current_date - 40,
    %(amount)s, 0, %(amount)s, %(tax)s, %(amount)s::numeric + %(tax)s, 0, 0, %(amount)s::numeric + %(tax)s,
    %(corrects)s, 'ada')
"""
LINE = """
INSERT INTO billing.document_line (document_id, position, kind, role, account, line_id, adjusts_id, period_start,
    period_end, charge, segment_start, quantity, exact_amount, amount, discount_amount, net_amount, tax_amount,
    total_amount, tax_category, detail)
VALUES (%s, %s, %s, 'new', 'a', %s, %s, '2026-05-01Z', '2026-06-01Z', %s, '2026-05-01Z', %s, %s, round(%s, 2), 0,
    round(%s, 2), %s, round(%s, 2) + %s, 'standard',
    jsonb_build_object('taxes', jsonb_build_array(jsonb_build_object('tax', 'VAT', 'treatment', 'standard',
        'percent', '19', 'amount', %s::numeric::text))))
"""
TAX = """
INSERT INTO billing.document_tax (document_id, position, tax, treatment, percent, base_amount, tax_amount)
VALUES (%s, 1, 'VAT', 'standard', 19, %s, %s)
"""
ISSUE = """
UPDATE billing.document SET state = 'issued', number = %s, number_series = %s, number_year = 2026, number_serial = %s,
    issue_date = current_date - 70, issued_at = now(), issued_by = 'ada' WHERE id = %s
"""


class Line(NamedTuple):
    kind: str
    line_id: int | None
    adjusts_id: int | None
    charge: str
    quantity: str
    exact: str
    tax: str


def write(
    database: "Connection[Any]", id: int, kind: str, number: tuple[str, str, int], lines: list[Line], **document: Any
) -> None:
    amount = sum((round(Decimal(line.exact), 2) for line in lines), Decimal(0))
    tax = sum((Decimal(line.tax) for line in lines), Decimal(0))
    asked = {"start": "2026-05-01Z", "corrects": None} | document
    database.execute(DOCUMENT, asked | {"kind": kind, "amount": amount, "tax": tax})
    for position, one in enumerate(lines, 1):
        exact, of_line = Decimal(one.exact), Decimal(one.tax)
        head = [id, position, one.kind, one.line_id, one.adjusts_id, one.charge, Decimal(one.quantity)]
        database.execute(LINE, [*head, exact, exact, exact, of_line, exact, of_line, of_line])
    database.execute(TAX, [id, amount, tax])
    database.execute(ISSUE, [*number, id])


@pytest.fixture
def database(shared: Settings) -> Iterator["Connection[Any]"]:
    """Of each test nothing stays."""
    with connect(shared.dsn, application="test", role=None) as connection, connection.transaction(force_rollback=True):
        for table in ("invoice", "invoice_line", "document", "document_line"):
            connection.execute(f"ALTER TABLE billing.{table} ALTER COLUMN id RESTART")
        connection.execute(SETUP)
        first = [Line("usage", 1, None, "x", "10", "10.006", "1.90"), Line("usage", 2, None, "y", "20", "20", "3.80")]
        write(connection, 1, "invoice", ("R1", "R", 1), first)
        credit = [Line("usage", 2, 2, "y", "-20", "-20", "-3.80")]
        write(connection, 2, "credit_note", ("G1", "G", 1), credit, corrects=1)
        late = [Line("adjustment", 3, 1, "x", "1", "1", "0.19")]
        write(connection, 3, "invoice", ("R2", "R", 2), late, start="2026-06-01Z")
        yield connection


def rows(database: "Connection[Any]", query: str) -> list[tuple[Any, ...]]:
    return database.execute(query).fetchall()


def test_what_adds_up_shows_no_row(database: "Connection[Any]") -> None:
    assert rows(database, "SELECT * FROM finance.document_checks") == []


BREAKS = {
    "a line more": (
        "UPDATE billing.document SET lines_amount = lines_amount + 1 WHERE id = 1",
        [("lines = amount of the lines", "R1", "31.01", "30.01")],
    ),
    "tax by rate": (
        "UPDATE billing.document_tax SET tax_amount = tax_amount + 0.01 WHERE document_id = 1",
        [("tax = tax by rate", "R1", "5.70", "5.71"), ("tax of the lines, VAT standard 19", "R1", "5.71", "5.70")],
    ),
    "a rate that no line has": (
        "UPDATE billing.document_tax SET percent = 7 WHERE document_id = 1",
        [
            ("tax of the lines, VAT standard 19", "R1", "0", "5.70"),
            ("tax of the lines, VAT standard 7", "R1", "5.70", "0"),
        ],
    ),
    "a line's tax": (
        "UPDATE billing.document_line SET tax_amount = tax_amount + 0.01 WHERE document_id = 1 AND position = 1",
        [
            ("tax = tax of the lines", "R1", "5.70", "5.71"),
            ("total = net and tax of the lines", "R1", "35.71", "35.72"),
        ],
    ),
    "a line's discount": (
        "UPDATE billing.document_line SET discount_amount = 1 WHERE document_id = 1 AND position = 1",
        [("discounts = discounts of the lines", "R1", "0", "1")],
    ),
    "the other currency": (
        "UPDATE billing.document SET fx_currency = 'USD', fx_rate = 1, fx_date = '2026-05-29', fx_source = 'ECB', "
        "fx_net_amount = 1, fx_tax_amount = 1, fx_total_amount = 3 WHERE id = 1",
        [("in the other currency: total = net and tax", "R1", "3", "2")],
    ),
    "an invoice to be paid to the customer": (
        "UPDATE billing.document SET payable_amount = -1, balance_amount = total_amount + 1 WHERE id = 1",
        [("nothing below 0 is to be paid, but of credit notes", "R1", "0", "-1")],
    ),
    "credited twice": (
        "UPDATE billing.document_line SET adjusts_id = 1 WHERE document_id = 2",
        [("credit notes take back no more of a line than there was", "R1", "0", "11.89")],
    ),
    "credited after an adjustment took it back": (
        "UPDATE billing.document_line SET adjusts_id = 2, role = 'reversal' WHERE document_id = 3; "
        "UPDATE billing.document_line SET document_id = 4 WHERE document_id = 2; "
        "UPDATE billing.document SET id = 4 WHERE id = 2; UPDATE billing.document_tax SET document_id = 4 "
        "WHERE document_id = 2",
        [("no credit note takes back what another document had taken back", "R1", "0", "23.80")],
    ),
    "a discount that no coupon gave": (
        "INSERT INTO billing.document_discount (document_id, position, coupon, amount) VALUES (1, 1, 'ten', 1)",
        [("discounts = discounts by coupon and grant", "R1", "0", "1")],
    ),
    "a number that is gone": (
        "DELETE FROM billing.document_tax WHERE document_id = 3; DELETE FROM billing.document_line "
        "WHERE document_id = 3; DELETE FROM billing.document WHERE id = 3",
        [("numbers without a hole", "e R 2026", "2", "1")],
    ),
    "a balance below 0": (
        "INSERT INTO billing.balance_entry (legal_entity, account, currency, amount, kind, by) "
        "VALUES ('e', 'a', 'EUR', -5, 'applied', 'ada')",
        [("balances in the customer's favour", "e a EUR", "0", "-5")],
    ),
}


@pytest.mark.parametrize(("break_it", "expected"), BREAKS.values(), ids=BREAKS)
def test_what_does_not_add_up(
    database: "Connection[Any]", break_it: str, expected: list[tuple[str, str, str, str]]
) -> None:
    database.execute("SET LOCAL session_replication_role = replica")  # past the triggers that would refuse it
    database.execute(break_it)  # type: ignore[arg-type]
    found = rows(database, "SELECT check_name, number, expected, found FROM finance.document_checks ORDER BY 1, 2")
    assert [(*row[:2], Decimal(row[2]), Decimal(row[3])) for row in found] == [
        (*row[:2], Decimal(row[2]), Decimal(row[3])) for row in expected
    ]


def test_drafts_and_void_documents_do_not_count(database: "Connection[Any]") -> None:
    database.execute(
        "UPDATE billing.document SET state = 'void', voided_at = now(), voided_by = 'ada', void_reason_code = 'r' "
        "WHERE id = 3"
    )
    assert rows(database, "SELECT * FROM finance.document_checks") == []
    assert rows(database, "SELECT series, last_serial, documents, void_documents, missing FROM finance.numbers") == [
        ("R", 2, 2, 1, 0),
        ("G", 1, 1, 0, 0),
    ]
    assert rows(
        database, "SELECT used_amount, billed_amount FROM finance.usage_vs_billed WHERE charge = 'x' LIMIT 1"
    ) == [(Decimal("11.006"), Decimal("10.006"))]


def test_what_is_billed_and_what_is_not(database: "Connection[Any]") -> None:
    query = "SELECT period_start::date::text, charge, closed, used_amount, billed_amount, difference, credited_amount "
    found = rows(database, query + "FROM finance.usage_vs_billed ORDER BY 1, 2")
    assert [(*row[:3], *map(str, row[3:])) for row in found] == [
        ("2026-05-01", "x", True, "11.006", "11.006", "0", "0"),
        ("2026-05-01", "y", True, "20", "20", "0", "-20"),
        ("2026-06-01", "x", False, "7.5", "0", "7.5", "0"),
    ]
    unbilled = rows(
        database, "SELECT period_start::date::text, supplement, unbilled_amount FROM finance.unbilled_usage"
    )
    assert sorted(unbilled) == [("2026-05-01", 1, Decimal(1)), ("2026-06-01", 0, Decimal("7.5"))]
    links = "SELECT number, original_number, charge, exact_amount FROM finance.adjustments"
    assert rows(database, links) == [("R2", "R1", "x", Decimal(1))]
    links = "SELECT number, invoice_number, total_amount FROM finance.credit_notes"
    assert rows(database, links) == [("G1", "R1", Decimal("-23.80"))]


def test_what_is_to_be_paid(database: "Connection[Any]") -> None:
    database.execute("INSERT INTO billing.settlement (document_id, kind, amount, by) VALUES (1, 'payment', 30, 'ada')")
    query = "SELECT number, open_amount, payment_state, days_overdue, age FROM finance.receivables ORDER BY number"
    assert rows(database, query) == [
        ("G1", Decimal("-23.80"), "unpaid", 40, "owed to the customer"),
        ("R1", Decimal("5.71"), "partly_paid", 40, "31-60"),
        ("R2", Decimal("1.19"), "unpaid", 40, "31-60"),
    ]
    database.execute(
        "INSERT INTO billing.settlement (document_id, kind, amount, by) VALUES (1, 'payment', 5.71, 'ada')"
    )
    assert [number for number, *_ in rows(database, query)] == ["G1", "R2"]
    assert rows(database, "SELECT number, payment_state FROM finance.invoices ORDER BY 1")[1] == ("R1", "paid")


def test_from_a_line_to_its_events(database: "Connection[Any]") -> None:
    query = "SELECT document_line_id, idempotency_key FROM finance.document_line_events ORDER BY 1, 2"
    found: dict[int, list[str]] = {}
    for line, key in rows(database, query):
        found.setdefault(line, []).append(key)
    # The invoice's lines; the credit note's; the adjustment's has what the period holds with its supplement.
    assert list(found.values()) == [["k1", "k2"], ["k3"], ["k3"], ["k1", "k2", "k4"]]
    assert rows(database, "SELECT idempotency_key FROM finance.line_events WHERE line_id = 3") == [("k4",)]


def test_a_line_s_events_are_looked_for_in_the_months_of_its_period_only(database: "Connection[Any]") -> None:
    for month in range(6, 12):
        database.execute(
            f"CREATE TABLE billing.rated_usage_2026_{month:02} PARTITION OF billing.rated_usage "
            f"FOR VALUES FROM ('2026-{month:02}-01') TO ('2026-{month + 1:02}-01')"  # type: ignore[arg-type]
        )
    plan = "\n".join(
        line for (line,) in rows(database, "EXPLAIN (ANALYZE) SELECT * FROM finance.line_events WHERE line_id = 1")
    )
    ran = {part for part in plan.splitlines() if "rated_usage_2026" in part and "never executed" not in part}
    assert {part.split("rated_usage_2026_")[1][:2] for part in ran} == {"05", "06"}


def test_columns_are_only_ever_added(database: "Connection[Any]") -> None:
    """What finance has built on a view keeps working: its columns stay, in their order and under their names.

    A view or column that is new is written into the file by hand.
    """
    now: dict[str, list[str]] = {}
    for view, column in rows(database, 'SELECT view, "column" FROM finance.columns'):
        now.setdefault(view, []).append(column)
    known = dict(line.split(": ") for line in KNOWN_COLUMNS.read_text().splitlines())
    for view, columns in known.items():
        assert now[view][: len(columns.split())] == columns.split(), view
    assert {view: " ".join(columns) for view, columns in now.items()} == known
