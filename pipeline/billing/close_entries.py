"""Close entries: what is booked on a line beside its rated rows, so that rows + entries = its closing price (law 3).

An entry is written once and never changed. The line's running quantity and amount take it in, in the same transaction,
under the lock the sink takes: a line always holds the sum of its rows and entries.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing.lines import Lines, PeriodsClosed, open_invoices
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
    #: Unit credits paid for a part of the quantity, or did before.
    CREDITED = "credited"
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
    #: The newest close entry on it; None where there is none.
    last_entry: int | None = None
    #: What close entries are of the amount: the rest is its rows'.
    booked: Amount = 0


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


def lock_period(
    connection: "Connection[Any]", account: str, period: Period, *, currencies: Collection[str] = ()
) -> None:
    """Hold the account's invoices of the period until the transaction ends: no row is added to them meanwhile.

    Of these currencies there is an invoice then: created first, like the sink's, so that neither waits for the other.
    """
    if currencies:
        open_invoices(connection, [(account, currency, period.start_us, period.end_us) for currency in currencies])
    connection.execute(_LOCK_INVOICES, [account, to_datetime(period.start_us), to_datetime(period.end_us)])


_SELECT_LINES = """
SELECT line.id, invoice.state::text AS invoice_state, invoice.currency, invoice.period_start, invoice.period_end,
    line.contract, line.plan, line.plan_version, line.price_version, line.meter, line.meter_version, line.charge,
    line.segment_start, line.cell, line.quantity, line.amount,
    line.price_class::text AS price_class,
    EXISTS (
        SELECT FROM billing.close_entry AS entry WHERE entry.line_id = line.id AND 'back_dated' = ANY(entry.reasons)
    ) AS back_dated,
    (SELECT max(entry.id) FROM billing.close_entry AS entry WHERE entry.line_id = line.id) AS last_entry,
    (SELECT coalesce(sum(entry.amount), 0) FROM billing.close_entry AS entry WHERE entry.line_id = line.id) AS booked
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = %s AND invoice.period_start = %s AND invoice.period_end = %s
ORDER BY line.id
"""


def read_lines(connection: "Connection[Any]", account: str, period: Period) -> list[StoredLine]:
    """The account's lines of the period, by id."""
    with connection.cursor(row_factory=dict_row) as cursor:
        bounds = [account, to_datetime(period.start_us), to_datetime(period.end_us)]
        return [_stored_line(row) for row in cursor.execute(_SELECT_LINES, bounds)]


def line_terms(row: Mapping[str, Any]) -> Terms:
    """The terms of a container's line, as its row and its container's have them."""
    return Terms(
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


def _stored_line(row: dict[str, Any]) -> StoredLine:
    quantity, amount = scaled(row["quantity"], QUANTITY_DECIMALS), scaled(row["amount"], AMOUNT_DECIMALS)
    state, back_dated, last_entry = row["invoice_state"], row["back_dated"], row["last_entry"]
    booked = scaled(row["booked"], AMOUNT_DECIMALS)
    return StoredLine(row["id"], line_terms(row), state, quantity, amount, back_dated, last_entry, booked)


def rebased(
    entries: Iterable[CloseEntry], held: Iterable[StoredLine], now: Sequence[StoredLine]
) -> list[CloseEntry] | None:
    """Entries worked out on the lines as they were ``held``, on the lines as they stand ``now``: each adds the same.

    As if they had been booked when they were worked out, and the rows that came since had come after them. None where
    something else was booked since, or an invoice closed: then they have to be worked out anew. Pure.
    """
    states = {line.id: (line.last_entry, line.invoice_state) for line in held}
    if any(states.get(line.id, (None, "open")) != (line.last_entry, line.invoice_state) for line in now):
        return None
    by_id = {line.id: line for line in now}
    made_since = {_identity(line.terms): line for line in now if line.id not in states}
    found = []
    for entry in entries:
        line = by_id[entry.line_id] if entry.line_id is not None else made_since.get(_identity(entry.terms))
        if line is None:
            found.append(entry)
            continue
        quantity, amount = line.quantity, line.amount
        moves = quantity, quantity + entry.quantity, amount, amount + entry.amount
        found.append(CloseEntry(line.id, entry.terms, entry.reasons, *moves))
    return found


def _identity(terms: Terms) -> tuple[object, ...]:
    """What names a line of its invoice: all of its terms but the class."""
    return tuple(getattr(terms, field.name) for field in fields(terms) if field.name != "price_class")


_INSERT = """
INSERT INTO billing.close_entry
    (line_id, reasons, quantity_before, quantity_after, amount_before, amount_after, booked_by, note)
SELECT line_id, string_to_array(reasons, ','), quantity_before, quantity_after, amount_before, amount_after, %s, %s
FROM unnest(%s::bigint[], %s::text[], %s::numeric[], %s::numeric[], %s::numeric[], %s::numeric[])
    AS entry (line_id, reasons, quantity_before, quantity_after, amount_before, amount_after)
"""
# By compare-and-set: of a period without an invoice there is nothing to lock while it is read.
_MOVE_LINES = """
UPDATE billing.invoice_line AS line
SET quantity = entry.quantity_after, amount = entry.amount_after, updated_at = now()
FROM unnest(%s::bigint[], %s::numeric[], %s::numeric[], %s::numeric[], %s::numeric[])
    AS entry (line_id, quantity_before, quantity_after, amount_before, amount_after)
WHERE line.id = entry.line_id AND line.quantity = entry.quantity_before AND line.amount = entry.amount_before
"""


def book(
    connection: "Connection[Any]", account: str, entries: Sequence[CloseEntry], *, actor: str, note: str
) -> list[int]:
    """``book_all`` for one account."""
    return book_all(connection, [(account, entry) for entry in entries], actor=actor, note=note)


def book_all(
    connection: "Connection[Any]", entries: Sequence[tuple[str, CloseEntry]], *, actor: str, note: str
) -> list[int]:
    """Write accounts' entries and move their lines, creating those that are missing; return the lines' ids, as entries.

    For a transaction that holds the periods (``lock_period``) and read the lines under that lock: the entries were
    worked out since, or before and ``rebased``. Raises PeriodClosed when the invoice of a new line is not open,
    LineMoved when a line is there already: then it must be rolled back.
    """
    if not entries:
        return []
    ids = _line_ids(connection, entries)
    quantities_before = [_quantity(entry.quantity_before) for _, entry in entries]
    quantities_after = [_quantity(entry.quantity_after) for _, entry in entries]
    amounts_before = [_amount(entry.amount_before) for _, entry in entries]
    amounts_after = [_amount(entry.amount_after) for _, entry in entries]
    moves = [ids, quantities_before, quantities_after, amounts_before, amounts_after]
    reasons = [",".join(cause.value for cause in entry.reasons) for _, entry in entries]
    connection.execute(_INSERT, [actor, note, ids, reasons, *moves[1:]])
    moved = connection.execute(_MOVE_LINES, moves).rowcount
    if moved != len(entries):
        raise LineMoved(f"expected {len(entries)} lines as they were read, got {moved}")
    return ids


def _line_ids(connection: "Connection[Any]", entries: Iterable[tuple[str, CloseEntry]]) -> list[int]:
    entries = list(entries)
    missing = {(account, entry.terms) for account, entry in entries if entry.line_id is None}
    try:
        made = Lines().lock(connection, missing) if missing else {}
    except PeriodsClosed as closed:
        account, terms = min(closed.keys, key=lambda key: key[0])
        raise PeriodClosed(f"expected the {terms.currency} invoice of {account} to be open, got a closed one") from None
    return [made[account, entry.terms].id if entry.line_id is None else entry.line_id for account, entry in entries]


def _quantity(quantity: Quantity) -> str:
    """As PostgreSQL reads it, digit by digit."""
    return f"{quantity}e-{QUANTITY_DECIMALS}"


def _amount(amount: Amount) -> str:
    return f"{amount}e-{AMOUNT_DECIMALS}"
