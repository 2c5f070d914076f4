"""Issued documents, and drafts to look at, read from the database back into the types they were reckoned with.

Whatever comes after an issued document (a credit note, a void, an adjustment, a payment) begins here: found by its
number, held by its row, with every line as it was printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing import line_discounts, line_taxes
from pipeline.billing.documents import NewLine
from pipeline.core.discounts import LineDiscount
from pipeline.core.invoice import Document, Line, Totals, tax_totals
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, scaled, to_minor
from pipeline.core.parties import DocumentKind
from pipeline.core.periods import Period, to_micros
from pipeline.core.tax import LineTax


class NoDocument(LookupError):
    """No document has this number or id, or more than one legal entity gave the number."""


@dataclass(frozen=True, slots=True)
class IssuedLine:
    """A line of a document, as it was written, with its taxes and discounts."""

    id: int
    position: int
    row: NewLine
    taxes: tuple[LineTax, ...]
    discounts: tuple[LineDiscount, ...]

    @property
    def line(self) -> Line:
        """As it was reckoned."""
        row = self.row
        return Line(
            str(self.id),
            row.exact_amount,
            row.amount,
            row.discount,
            row.net,
            row.tax,
            row.total,
            self.taxes,
            row.charge,
            row.service.end_us - 1,
            row.account,
            self.discounts,
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """A document in any state, with its lines. Money in the currency's smallest unit; dates of the legal entity's
    calendar."""

    id: int
    kind: DocumentKind
    state: str
    #: None, as its issue date, until it is issued.
    number: str | None
    legal_entity: str
    #: Who pays.
    account: str
    currency: str
    period: Period
    tax_date: date
    issue_date: date | None
    corrects_id: int | None
    run_id: int | None
    content: Mapping[str, Any]
    totals: Totals
    #: Rate into ``fx_currency``, the day it was published for, and by whom; None: not shown in another currency.
    fx: tuple[str, Decimal, date, str] | None
    lines: tuple[IssuedLine, ...]

    @property
    def time_zone(self) -> str:
        """Whose days its periods are made of: the payer's; the seller's, of one made before the payer's was kept."""
        return (
            self.content.get("buyer", {}).get("time_zone") or self.content.get("seller", {}).get("time_zone") or "UTC"
        )

    @property
    def document(self) -> Document:
        """Its arithmetic. Without discounts and draws, which nothing that follows needs one by one."""
        lines = tuple(one.line for one in self.lines)
        return Document(self.currency, lines, tax_totals(lines), (), (), self.totals, 0)


@dataclass(frozen=True, slots=True)
class Issued(Stored):
    """A document that was issued, and may be void by now."""

    number: str
    issue_date: date


_FIND = """
SELECT id, legal_entity, number FROM billing.document
WHERE (number = %(text)s OR id = %(id)s) AND (%(drafts)s OR state IN ('issued', 'void'))
    AND (%(legal_entity)s::text IS NULL OR legal_entity = %(legal_entity)s)
ORDER BY (number = %(text)s) DESC, id
"""


def find(
    connection: "Connection[Any]", reference: str, *, legal_entity: str | None = None, drafts: bool = False
) -> int:
    """The id of an issued or void document, by its number or, where no document has that number, its id.

    ``drafts``: one that is not issued yet too, which has only an id. Raises NoDocument.
    """
    # An id has at most 18 digits; a longer number is none.
    id = int(reference) if reference.isascii() and reference.isdigit() and len(reference) <= 18 else None
    asked = {"text": reference, "id": id, "legal_entity": legal_entity, "drafts": drafts}
    found = connection.execute(_FIND, asked).fetchall()
    numbered = [row for row in found if row[2] == reference]
    if len(numbered) > 1:
        raise NoDocument(
            f"expected a number that one legal entity gave, {reference!r} is of "
            f"{', '.join(entity for _, entity, _ in numbered)}: name one with --entity, or give the document's id"
        )
    if not found:
        wanted = "a document's number or id" if drafts else "the number or id of an issued document"
        raise NoDocument(f"expected {wanted}, got {reference!r}: `tally invoices list`")
    return int(found[0][0])


# Whoever changes what follows from a document holds its row: one after the other.
_LOCK = "SELECT FROM billing.document WHERE id = %s FOR UPDATE"
_SELECT = "SELECT *, kind::text AS kind, state::text AS state FROM billing.document WHERE id = %s"
_SELECT_LINES = "SELECT * FROM billing.document_line WHERE document_id = %s ORDER BY position"


def read(connection: "Connection[Any]", id: int, *, lock: bool = False) -> Issued:
    """The issued or void document of this id; ``lock`` holds it until the transaction ends. Raises NoDocument."""
    if lock:
        connection.execute(_LOCK, [id])
    columns = _read(connection, id)
    if columns is None or columns["state"] not in ("issued", "void"):
        raise NoDocument(f"expected an issued document, got {id}: `tally invoices list`")
    return Issued(**columns)


def look_at(connection: "Connection[Any]", id: int) -> Stored:
    """The document of this id, whatever its state. Raises NoDocument."""
    columns = _read(connection, id)
    if columns is None:
        raise NoDocument(f"expected a document, got {id}: `tally invoices list`")
    return Stored(**columns)


def _read(connection: "Connection[Any]", id: int) -> dict[str, Any] | None:
    """Fields of ``Stored``."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(_SELECT, [id]).fetchone()
        if row is None:
            return None
        lines = cursor.execute(_SELECT_LINES, [id]).fetchall()
    currency = row["currency"]
    return {
        **{name: row[name] for name in _AS_STORED},
        "period": Period(to_micros(row["period_start"]), to_micros(row["period_end"])),
        "totals": Totals(*(to_minor(row[f"{name}_amount"], currency) for name in _TOTALS)),
        "fx": None
        if row["fx_currency"] is None
        else (row["fx_currency"], row["fx_rate"], row["fx_date"], row["fx_source"]),
        "lines": tuple(_line(line, currency) for line in lines),
    }


#: Fields of a document that are a column each.
_AS_STORED = (
    *("id", "kind", "state", "number", "legal_entity", "account", "currency"),
    *("tax_date", "issue_date", "corrects_id", "run_id", "content"),
)
#: Columns of a document in the order of ``Totals``, without ``_amount``.
_TOTALS = ("lines", "discounts", "net", "tax", "total", "credits", "balance", "payable")


def _line(row: Mapping[str, Any], currency: str) -> IssuedLine:
    taxes = line_taxes.from_json(row["detail"].get("taxes", ()), currency)
    columns = NewLine(
        kind=row["kind"],
        account=row["account"],
        charge=row["charge"],
        service=Period(to_micros(row["period_start"]), to_micros(row["period_end"])),
        segment_start_us=to_micros(row["segment_start"]),
        quantity=scaled(row["quantity"], QUANTITY_DECIMALS),
        exact_amount=scaled(row["exact_amount"], AMOUNT_DECIMALS),
        amount=to_minor(row["amount"], currency),
        discount=to_minor(row["discount_amount"], currency),
        net=to_minor(row["net_amount"], currency),
        tax=to_minor(row["tax_amount"], currency),
        total=to_minor(row["total_amount"], currency),
        tax_category=row["tax_category"],
        unit=row["unit"],
        contract=row["contract"],
        plan=row["plan"],
        plan_version=row["plan_version"],
        price_version=row["price_version"],
        meter=row["meter"],
        cell=row["cell"],
        line_id=row["line_id"],
        adjusts_id=row["adjusts_id"],
        role=row["role"],
        detail=row["detail"],
    )
    discounts = line_discounts.from_json(row["detail"], columns.discount, currency)
    return IssuedLine(row["id"], row["position"], columns, taxes, discounts)
