"""Documents as lists, and what is linked to one: the reading side of ``tally invoices``."""

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.rows import class_row


@dataclass(frozen=True, slots=True)
class Listed:
    """A document in a list; money in whole units of its currency. Dates are the legal entity's, times UTC."""

    id: int
    number: str | None
    kind: str
    state: str
    #: unpaid, partly_paid, paid or uncollectible; None unless it is issued.
    payment: str | None
    legal_entity: str
    account: str
    currency: str
    period_start: datetime
    period_end: datetime
    #: Whose days and months the period is made of: the payer's.
    time_zone: str
    issue_date: date | None
    due_date: date | None
    net: Decimal
    tax: Decimal
    total: Decimal
    payable: Decimal
    open: Decimal | None


# Documents made before the payer's zone was kept have the seller's.
_TIME_ZONE = "coalesce(nullif(content #>> '{buyer,time_zone}', ''), content #>> '{seller,time_zone}', 'UTC')"
_COLUMNS = f"""
document.id, number, kind::text, document.state::text, payment.state AS payment, legal_entity, account, currency,
period_start, period_end, {_TIME_ZONE} AS time_zone, issue_date, due_date,
net_amount AS net, tax_amount AS tax, total_amount AS total, document.payable_amount AS payable,
payment.open_amount AS open
"""
_LIST = f"""
SELECT {_COLUMNS}
FROM billing.document LEFT JOIN billing.document_payment AS payment ON payment.document_id = document.id
WHERE (%(account)s::text IS NULL OR account = %(account)s)
    AND (%(kind)s::text IS NULL OR kind::text = %(kind)s)
    AND (%(state)s::text IS NULL OR document.state::text = %(state)s)
    AND (%(unpaid)s = false OR payment.state IN ('unpaid', 'partly_paid') AND payment.open_amount <> 0)
    AND (%(month)s::text IS NULL
        OR to_char((period_end - interval '1 microsecond') AT TIME ZONE {_TIME_ZONE}, 'YYYY-MM') = %(month)s)
ORDER BY document.id DESC LIMIT %(limit)s
"""


def listed(
    connection: "Connection[Any]",
    *,
    account: str | None = None,
    kind: str | None = None,
    state: str | None = None,
    unpaid: bool = False,
    month: str | None = None,
    limit: int = 100,
) -> list[Listed]:
    """Documents, the newest first; ``month``: of periods whose last instant is in it (YYYY-MM) by the payer's clock."""
    asked = {
        "account": account,
        "kind": kind,
        "state": state,
        "unpaid": unpaid,
        "month": month,
        "limit": limit,
    }
    with connection.cursor(row_factory=class_row(Listed)) as cursor:
        return cursor.execute(_LIST, asked).fetchall()


class Link(NamedTuple):
    """Another document that this one is about, or that is about this one."""

    relation: str
    document: int
    number: str | None
    kind: str
    state: str
    reason_code: str | None
    note: str


# By the document as a whole, and by its lines.
_LINKS = """
SELECT 'corrects' AS relation, other.* FROM billing.document AS mine JOIN billing.document AS other
    ON other.id = mine.corrects_id WHERE mine.id = %(id)s
UNION ALL
SELECT 'corrected by', other.* FROM billing.document AS other WHERE other.corrects_id = %(id)s
UNION ALL
SELECT DISTINCT ON (other.id) 'adjusts lines of', other.* FROM billing.document_line AS mine
    JOIN billing.document_line AS theirs ON theirs.id = mine.adjusts_id
    JOIN billing.document AS other ON other.id = theirs.document_id
WHERE mine.document_id = %(id)s
UNION ALL
SELECT DISTINCT ON (other.id) 'lines adjusted by', other.* FROM billing.document_line AS mine
    JOIN billing.document_line AS theirs ON theirs.adjusts_id = mine.id
    JOIN billing.document AS other ON other.id = theirs.document_id
WHERE mine.document_id = %(id)s
"""
_SELECT_LINKS = f"""
SELECT relation, id, number, kind::text, state::text, reason_code, note FROM ({_LINKS}) AS link ORDER BY id, relation
"""


def links(connection: "Connection[Any]", id: int) -> list[Link]:
    """What is linked to a document, both ways, by id; what corrects a document is not named again for its lines."""
    found: dict[int, Link] = {}
    for row in connection.execute(_SELECT_LINKS, {"id": id}):
        link = Link(*row)
        if link.document not in found or link.relation.startswith("correct"):
            found[link.document] = link
    return list(found.values())


class Settlement(NamedTuple):
    """What settled a document, in whole units; above 0 takes off what is payable."""

    id: int
    kind: str
    amount: Decimal
    at: datetime
    by: str
    reference: str
    #: The settlement that it takes back.
    takes_back: int | None


_SELECT_SETTLEMENTS = """
SELECT id, kind, amount, at, by, reference, takes_back_id FROM billing.settlement WHERE document_id = %s ORDER BY id
"""


def settlements(connection: "Connection[Any]", id: int) -> list[Settlement]:
    """What settled a document, in the order it was booked."""
    return [Settlement(*row) for row in connection.execute(_SELECT_SETTLEMENTS, [id])]


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a customer's statement, as ``finance.statements`` has it; money in whole units, times UTC."""

    legal_entity: str
    account: str
    currency: str
    at: datetime
    kind: str
    number: str | None
    #: What is to be paid by it; below 0 what settled that.
    amount: Decimal
    #: Over all documents, after it.
    open_amount: Decimal
    #: Put into the balance carried forward; below 0 taken out.
    balance: Decimal
    balance_amount: Decimal
    reference: str
    by: str


_SELECT_STATEMENT = """
SELECT legal_entity, account, currency, at, kind, number, amount, open_amount, balance, balance_amount, reference, by
FROM finance.statements WHERE account = %s ORDER BY legal_entity, currency, position
"""


def statement(connection: "Connection[Any]", account: str) -> list[Entry]:
    """All that a payer was asked for and what settled it, by seller and currency, in order of time."""
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        return cursor.execute(_SELECT_STATEMENT, [account]).fetchall()
