"""Close entries: what is booked on a line beside its rated rows, so that rows + entries = its closing price (law 3).

An entry is written once and never changed. The line's running quantity and amount take it in, in the same transaction,
under the lock the sink takes: a line always holds the sum of its rows and entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing.lines import Lines
from pipeline.billing.rated import Terms
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, Amount, Quantity, scaled
from pipeline.core.periods import Period, to_datetime, to_micros


class Cause(StrEnum):
    """Why a line differs from its closing price. Values are written into tables: never rename one."""

    #: A flat or recurring fee, which no event brings.
    FEE = "fee"
    #: No event came, and the charge owes something all the same: a first tier's flat fee, a minimum.
    NO_USAGE = "no_usage"
    #: The charge is of class period: its rows were provisional.
    PROVISIONAL = "provisional"
    #: The charge's minimum was not reached.
    MINIMUM = "minimum"
    #: The prices, contract or meter valid at the events' time, by today's catalog, are not those they were rated by.
    BACK_DATED = "back_dated"
    #: The segment became longer or shorter since its events were rated, and so its share of included units or tiers.
    PRORATED = "prorated"
    #: Nothing is left of what the line counted: its events were voided, or corrected to count elsewhere.
    VOIDED = "voided"
    #: Rows that do not add up to the price of what they count: one was repeated or lost. Never (law 7): look into it.
    ROWS_DIFFER = "rows_differ"


@dataclass(frozen=True, slots=True)
class StoredLine:
    """A line as it stands, rows and entries together; quantity in 1e-9 of its unit, amount in 1e-12."""

    id: int
    terms: Terms
    invoice_state: str
    quantity: Quantity
    amount: Amount
    #: Whether usage was moved here, or away, by an entry: the rater has counted on without it.
    back_dated: bool = False


@dataclass(frozen=True, slots=True)
class CloseEntry:
    """What to book on a line; ``line_id`` is None where the line does not exist yet. Scaled integers, exact."""

    line_id: int | None
    terms: Terms
    reasons: tuple[Cause, ...]
    quantity_before: Quantity
    quantity_after: Quantity
    amount_before: Amount
    amount_after: Amount

    @property
    def quantity(self) -> Quantity:
        return self.quantity_after - self.quantity_before

    @property
    def amount(self) -> Amount:
        return self.amount_after - self.amount_before


class PeriodClosed(ValueError):
    """An invoice of the period is not open: what changes it now is an adjustment on the next one."""


class LineMoved(Exception):
    """A line is no longer as it was read: the sink has just made it. Read again, and book what is missing then."""


# The close and the sink take the same locks in the same order.
_LOCK_INVOICES = """
SELECT id FROM billing.invoice
WHERE account = %s AND period_start = %s AND period_end = %s ORDER BY id FOR NO KEY UPDATE
"""


def lock_period(connection: "Connection[Any]", account: str, period: Period) -> None:
    """Hold the account's invoices of the period until the transaction ends: no row is added to them meanwhile."""
    connection.execute(_LOCK_INVOICES, [account, to_datetime(period.start_us), to_datetime(period.end_us)])


_SELECT_LINES = """
SELECT line.id, invoice.state::text AS invoice_state, invoice.currency, invoice.period_start, invoice.period_end,
    line.contract, line.plan, line.plan_version, line.price_version, line.meter, line.meter_version, line.charge,
    line.segment_start, line.cell, line.quantity, line.amount,
    line.price_class::text AS price_class,
    EXISTS (
        SELECT FROM billing.close_entry AS entry WHERE entry.line_id = line.id AND 'back_dated' = ANY(entry.reasons)
    ) AS back_dated
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = %s AND invoice.period_start = %s AND invoice.period_end = %s
ORDER BY line.id
"""


def read_lines(connection: "Connection[Any]", account: str, period: Period) -> list[StoredLine]:
    """The account's lines of the period, by id."""
    with connection.cursor(row_factory=dict_row) as cursor:
        bounds = [account, to_datetime(period.start_us), to_datetime(period.end_us)]
        return [_stored_line(row) for row in cursor.execute(_SELECT_LINES, bounds)]


def _stored_line(row: dict[str, Any]) -> StoredLine:
    terms = Terms(
        contract=row["contract"],
        plan=row["plan"],
        plan_version=row["plan_version"],
        meter=row["meter"],
        meter_version=row["meter_version"],
        price_version=row["price_version"],
        charge=row["charge"],
        period_start_us=to_micros(row["period_start"]),
        period_end_us=to_micros(row["period_end"]),
        segment_start_us=to_micros(row["segment_start"]),
        cell=row["cell"],
        currency=row["currency"],
        price_class=row["price_class"],
    )
    quantity, amount = scaled(row["quantity"], QUANTITY_DECIMALS), scaled(row["amount"], AMOUNT_DECIMALS)
    return StoredLine(row["id"], terms, row["invoice_state"], quantity, amount, row["back_dated"])


_INSERT = """
INSERT INTO billing.close_entry
    (line_id, reasons, quantity_before, quantity_after, amount_before, amount_after, booked_by, note)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
# By compare-and-set: of a period without an invoice there is nothing to lock while it is read.
_MOVE_LINE = """
UPDATE billing.invoice_line SET quantity = %s, amount = %s, updated_at = now()
WHERE id = %s AND quantity = %s AND amount = %s
"""


def book(
    connection: "Connection[Any]", account: str, entries: Sequence[CloseEntry], *, actor: str, note: str
) -> list[int]:
    """Write the entries and move their lines, creating those that are missing; return the lines' ids, as the entries.

    For a transaction that holds the period (``lock_period``) and read the lines under that lock. Raises PeriodClosed
    when the invoice of a new line is not open, LineMoved when a line is there already: then it must be rolled back.
    """
    ids = _line_ids(connection, account, entries)
    with connection.cursor() as cursor:
        cursor.executemany(
            _INSERT,
            [
                [
                    line_id,
                    [cause.value for cause in entry.reasons],
                    _quantity(entry.quantity_before),
                    _quantity(entry.quantity_after),
                    _amount(entry.amount_before),
                    _amount(entry.amount_after),
                    actor,
                    note,
                ]
                for line_id, entry in zip(ids, entries, strict=True)
            ],
        )
        cursor.executemany(
            _MOVE_LINE,
            [
                [
                    _quantity(entry.quantity_after),
                    _amount(entry.amount_after),
                    line_id,
                    _quantity(entry.quantity_before),
                    _amount(entry.amount_before),
                ]
                for line_id, entry in zip(ids, entries, strict=True)
            ],
        )
        if cursor.rowcount != len(entries):
            raise LineMoved(f"expected {len(entries)} lines of {account} as they were read, got {cursor.rowcount}")
    return ids


def _line_ids(connection: "Connection[Any]", account: str, entries: Iterable[CloseEntry]) -> list[int]:
    ids = []
    lines = Lines()
    for entry in entries:
        if entry.line_id is not None:
            ids.append(entry.line_id)
            continue
        key = (account, entry.terms)
        line = lines.lock(connection, [key]).get(key)
        if line is None:
            raise PeriodClosed(f"expected the {entry.terms.currency} invoice of {account} to be open, got a closed one")
        ids.append(line.id)
    return ids


def _quantity(quantity: Quantity) -> str:
    """As PostgreSQL reads it, digit by digit."""
    return f"{quantity}e-{QUANTITY_DECIMALS}"


def _amount(amount: Amount) -> str:
    return f"{amount}e-{AMOUNT_DECIMALS}"
