"""Documents out of the database: the one place that knows how they are stored (migration 0010).

What changes later is not read: a document says what it said when it was made. Only a void one says that it is void.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.core.parties import Address, Branding, Policy
from pipeline.documents.changes import Priced, notices_of
from pipeline.documents.model import (
    Bank,
    Discount,
    Document,
    DocumentReference,
    Exchange,
    Line,
    LineReference,
    Notice,
    Part,
    Party,
    Reference,
    Span,
    Tax,
    Totals,
    Usage,
)

#: Documents read with one statement per table: few statements, and a chunk of long ones still fits into memory.
CHUNK = 200
_MICROSECOND = timedelta(microseconds=1)
_Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which documents: all that pass every filter that is given."""

    #: Numbers as printed, or ids of drafts and documents.
    names: tuple[str, ...] = ()
    #: Billing periods whose last instant is in this month, ``YYYY-MM``, by the payer's clock.
    month: str | None = None
    #: Who pays.
    account: str | None = None
    legal_entity: str | None = None
    #: Without numbers: whether drafts and void documents count too.
    every_state: bool = False


# Documents made before the payer's zone was kept have the seller's; so has `_zone`.
_TIME_ZONE = "coalesce(nullif(content #>> '{buyer,time_zone}', ''), content #>> '{seller,time_zone}', 'UTC')"
_FIND = f"""
SELECT id, number, legal_entity FROM billing.document
WHERE (%(names)s::text[] IS NULL OR number = ANY(%(names)s) OR (number IS NULL AND id::text = ANY(%(names)s)))
    AND (%(month)s::text IS NULL OR to_char((period_end - interval '1 microsecond')
        AT TIME ZONE {_TIME_ZONE}, 'YYYY-MM') = %(month)s)
    AND (%(account)s::text IS NULL OR account = %(account)s)
    AND (%(entity)s::text IS NULL OR legal_entity = %(entity)s)
    AND (%(every)s OR state = 'issued')
ORDER BY id
"""


def find(connection: "Connection[Any]", wanted: Wanted) -> list[int]:
    """Ids of the documents, in the order they were made.

    Raises LookupError for a name that is no document's, and for a number that two legal entities gave: one's file would
    take the place of the other's.
    """
    found = connection.execute(
        _FIND,
        {
            "names": list(wanted.names) or None,
            "month": wanted.month,
            "account": wanted.account,
            "entity": wanted.legal_entity,
            "every": wanted.every_state or bool(wanted.names),
        },
    ).fetchall()
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for id, number, entity in found:
        by_name[number or str(id)].append(entity)
    for name in wanted.names:
        if name not in by_name:
            raise LookupError(f"expected the number of a document, or the id of a draft, got {name!r}: there is none")
    for name, entities in by_name.items():
        if len(entities) > 1:
            raise LookupError(f"{name!r} is a number of {', '.join(sorted(entities))}: say which with --entity")
    return [id for id, _, _ in found]


_SELECT = """
SELECT document.*, document.kind::text, document.state::text, other.number AS other_number,
    other.kind::text AS other_kind, other.issue_date AS other_issue_date, asset.media_type AS logo_type,
    asset.content AS logo
FROM billing.document
LEFT JOIN billing.document AS other ON other.id = document.corrects_id
LEFT JOIN billing.asset ON asset.sha256 = document.content #>> '{seller,branding,logo}'
WHERE document.id = ANY(%s)
"""
_SELECT_LINES = """
SELECT line.*, adjusted.position AS adjusted_position, document.number AS adjusted_number, held.meter_version
FROM billing.document_line AS line
LEFT JOIN billing.invoice_line AS held ON held.id = line.line_id
LEFT JOIN billing.document_line AS adjusted ON adjusted.id = line.adjusts_id
LEFT JOIN billing.document ON document.id = adjusted.document_id
WHERE line.document_id = ANY(%s) ORDER BY line.document_id, line.position
"""
_SELECT_TAXES = "SELECT * FROM billing.document_tax WHERE document_id = ANY(%s) ORDER BY document_id, position"
_SELECT_DISCOUNTS = """
SELECT discount.*, line.position AS line_position
FROM billing.document_discount AS discount
LEFT JOIN billing.document_line AS line ON line.id = discount.document_line_id
WHERE discount.document_id = ANY(%s) ORDER BY discount.document_id, discount.position
"""


class NotReadable(ValueError):
    """What is stored of a document is not what this program writes."""

    def __init__(self, row: _Row, error: Exception) -> None:
        self.name = str(row["number"] or f"draft-{row['id']}")
        super().__init__(
            f"{self.name}: expected a document as this program writes it, got what it cannot read "
            f"({type(error).__name__}: {error}); a newer version may have made it"
        )


def read(connection: "Connection[Any]", ids: Sequence[int]) -> Iterator[Document]:
    """The documents with these ids, in their order, a chunk at a time.

    Raises LookupError for an id there is not, NotReadable.
    """
    for found in read_each(connection, ids):
        if isinstance(found, NotReadable):
            raise found
        yield found


def read_each(connection: "Connection[Any]", ids: Sequence[int]) -> Iterator[Document | NotReadable]:
    """As ``read``, but one that cannot be read is told in its place, and the others follow."""
    for start in range(0, len(ids), CHUNK):
        chunk = list(ids[start : start + CHUNK])
        rows = {row["id"]: row for row in _rows(connection, _SELECT, chunk)}
        lines, taxes, discounts = (
            _by_document(_rows(connection, statement, chunk))
            for statement in (_SELECT_LINES, _SELECT_TAXES, _SELECT_DISCOUNTS)
        )
        for id in chunk:
            if id not in rows:
                raise LookupError(f"expected the id of a document, got {id}: there is none")
        made = {id: _made(rows[id], lines[id], taxes[id], discounts[id]) for id in chunk}
        yield from _with_changes(connection, made, rows, lines)


# What a shape that is not expected makes Python raise: InvalidOperation is an ArithmeticError, a zone that is none a
# LookupError.
_MISSHAPEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _made(row: _Row, lines: Sequence[_Row], taxes: Sequence[_Row], discounts: Sequence[_Row]) -> Document | NotReadable:
    try:
        return _document(row, lines, taxes, discounts)
    except _MISSHAPEN as error:
        return NotReadable(row, error)


def _with_changes(
    connection: "Connection[Any]",
    made: Mapping[int, Document | NotReadable],
    rows: Mapping[int, _Row],
    lines: Mapping[int, Sequence[_Row]],
) -> list[Document | NotReadable]:
    """Documents with what changed since the ones before; where that cannot be told of one, the others one by one."""
    readable = {id: rows[id] for id, one in made.items() if isinstance(one, Document)}
    try:
        notices = _notices(connection, readable, lines)
    except _MISSHAPEN as error:
        if len(made) == 1:
            return [NotReadable(row, error) for row in readable.values()]
        return [found for id, one in made.items() for found in _with_changes(connection, {id: one}, rows, lines)]
    return [
        one if isinstance(one, NotReadable) else replace(one, notices=one.notices + notices.get(id, ()))
        for id, one in made.items()
    ]


def _rows(connection: "Connection[Any]", statement: str, ids: list[int]) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, [ids]).fetchall()


def _by_document(rows: list[dict[str, Any]]) -> defaultdict[int, list[dict[str, Any]]]:
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["document_id"]].append(row)
    return found


def _notices(
    connection: "Connection[Any]", rows: Mapping[int, _Row], lines: Mapping[int, Sequence[_Row]]
) -> dict[int, tuple[Notice, ...]]:
    """Of invoices whose content has none, what changed since the one before."""
    missing = [id for id, row in rows.items() if row["kind"] == "invoice" and "notices" not in row["content"]]
    return notices_of(
        connection,
        {id: [_priced(line) for line in lines[id] if line["kind"] in ("usage", "fee")] for id in missing},
        {id: _zone(rows[id]) for id in missing},
    )


def _priced(row: _Row) -> Priced:
    detail, keys = row["detail"], ("account", "contract", "charge", "plan", "price_version", "unit", "meter")
    return Priced(
        name=detail.get("name") or row["charge"],
        plan_name=detail.get("plan_name") or row["plan"],
        meter_version=row["meter_version"],
        segment_start=row["segment_start"],
        **{key: row[key] for key in keys},
    )


def _zone(row: _Row) -> ZoneInfo:
    """Whose days a document's periods are made of: the payer's, where it says so."""
    named = (row["content"].get(party, {}).get("time_zone") for party in ("buyer", "seller"))
    return ZoneInfo(next(filter(None, named), "UTC"))


def _document(row: _Row, lines: Sequence[_Row], taxes: Sequence[_Row], discounts: Sequence[_Row]) -> Document:
    content = row["content"]
    seller, buyer, policies = (content.get(key, {}) for key in ("seller", "buyer", "policies"))
    branding = seller.get("branding", {})
    zone = _zone(row)
    policy = Policy(**policies)
    return Document(
        id=row["id"],
        kind=row["kind"],
        state=row["state"],
        number=row["number"] or "",
        issue_date=row["issue_date"],
        tax_date=row["tax_date"],
        due_date=row["due_date"],
        span=_span(row, zone),
        currency=row["currency"],
        language=content.get("language") or "en",
        seller=_party(row["legal_entity"], seller),
        buyer=_party(row["account"], buyer),
        lines=tuple(_line(line, zone, credit=row["kind"] == "credit_note") for line in lines),
        taxes=tuple(
            Tax(one["tax"], one["treatment"], one["percent"], one["base_amount"], one["tax_amount"], one["note"])
            for one in taxes
        ),
        totals=Totals(
            *(
                row[f"{column}_amount"]
                for column in ("lines", "discounts", "net", "tax", "total", "credits", "balance", "payable")
            )
        ),
        time_zone=zone.key,
        bank=Bank(seller.get("iban") or "", seller.get("bic") or "", seller.get("bank") or ""),
        purchase_order=buyer.get("purchase_order") or "",
        buyer_reference=buyer.get("reference") or "",
        discounts=tuple(_discount(one, policy) for one in discounts),
        exchange=_exchange(row),
        corrects=_corrects(row),
        reason=row["reason_code"] or "",
        note=row["note"],
        terms=content.get("terms") or "",
        policy=policy,
        branding=Branding(**branding),
        logo=(row["logo_type"], bytes(row["logo"])) if row["logo"] else None,
        notices=tuple(map(_notice, content.get("notices", ()))),
        accounts=tuple(sorted(content.get("accounts", {}).items())),
        own_credits=_own_credits(row),
    )


def _own_credits(row: _Row) -> tuple[tuple[str, Decimal], ...]:
    """A credit note has its invoice's content, and gives back other amounts than that one drew."""
    paid = {} if row["kind"] == "credit_note" else row["content"].get("credits", {})
    return tuple((account, Decimal(amount)) for account, amount in sorted(paid.items()))


def _party(id: str, party: _Row) -> Party:
    address = party.get("address", {})
    return Party(
        id=id,
        name=party.get("name") or id,
        address=Address(
            lines=tuple(address.get("lines", ())),
            city=address.get("city") or "",
            country=address.get("country") or "",
            postal_code=address.get("postcode") or "",
            region=address.get("region") or "",
        ),
        **{key: party.get(key) or "" for key in ("vat_number", "registration", "email", "phone", "website")},
    )


def _span(row: _Row, zone: ZoneInfo) -> Span:
    """Stored half-open in UTC; written from the first to the last day by the payer's calendar."""
    start, end = row["period_start"], row["period_end"]
    first = start.astimezone(zone).date()
    return Span(first, max(first, (end - _MICROSECOND).astimezone(zone).date()))


def _line(row: _Row, zone: ZoneInfo, *, credit: bool) -> Line:
    detail = row["detail"]
    adjusted = row["adjusted_position"]
    return Line(
        id=row["id"],
        position=row["position"],
        kind=row["kind"],
        name=detail.get("name") or row["charge"],
        span=_span(row, zone),
        quantity=row["quantity"],
        unit=row["unit"],
        exact=row["exact_amount"],
        amount=row["amount"],
        discount=row["discount_amount"],
        net=row["net_amount"],
        tax=row["tax_amount"],
        total=row["total_amount"],
        taxes=tuple(
            Tax(
                one["tax"],
                one["treatment"],
                Decimal(one["percent"]),
                Decimal(one["base"]),
                Decimal(one["amount"]),
                one.get("note", ""),
            )
            for one in detail.get("taxes", ())
        ),
        account=row["account"],
        charge=row["charge"],
        description=detail.get("description") or "",
        contract=row["contract"],
        plan=row["plan"],
        plan_version=row["plan_version"],
        price_version=row["price_version"],
        meter=row["meter"],
        cell=tuple(detail.get("cell", {}).items()),
        share=_share(detail.get("share")),
        parts=tuple(_part(one, -1 if credit else 1) for one in detail.get("parts", ())),
        usage=_usage(detail),
        adjusts=LineReference(row["adjusted_number"], adjusted) if adjusted and row["adjusted_number"] else None,
        reversal=row["role"] == "reversal",
    )


def _part(part: _Row, sign: int) -> Part:
    return Part(
        kind=part["kind"],
        packages=part.get("packages"),
        events=part.get("events"),
        amount=Decimal(part["amount"]) * sign,
        **{key: Decimal(part[key]) for key in ("over", "up_to", "quantity", "unit_price", "flat")},
    )


#: Longest first: a share is told in the longest unit that both it and its whole are a number of.
_SHARE_UNITS = (("day", 86_400_000_000), ("hour", 3_600_000_000), ("second", 1_000_000), ("microsecond", 1))


def _share(share: _Row | None) -> tuple[int, int, str] | None:
    """Of a ``core.proration.Portion``: in microseconds where its whole is more than a year has days, else in days."""
    if share is None:
        return None
    part, whole = share["end"] - share["start"], share["whole"]
    if whole <= 366:
        return part, whole, "day"
    unit, length = next(one for one in _SHARE_UNITS if part % one[1] == 0 and whole % one[1] == 0)
    return part // length, whole // length, unit


def _usage(detail: _Row) -> Usage | None:
    if "events" not in detail:
        return None
    first, last = (detail.get(key) for key in ("first_event_at", "last_event_at"))
    return Usage(
        events=detail["events"],
        late_events=detail.get("late_events", 0),
        first_at=datetime.fromisoformat(first) if first else None,
        last_at=datetime.fromisoformat(last) if last else None,
        references=tuple(
            Reference(name, tuple(found["values"]), bool(found.get("more")))
            for name, found in sorted(detail.get("references", {}).items())
        ),
    )


def _discount(row: _Row, policy: Policy) -> Discount:
    on_whole = row["line_position"] is None
    after_tax = on_whole and bool(row["coupon"]) and policy.coupons == "after_tax"
    return Discount(row["name"] or row["coupon"], row["amount"], row["line_position"], after_tax)


def _exchange(row: _Row) -> Exchange | None:
    if row["fx_currency"] is None:
        return None
    return Exchange(
        row["fx_currency"],
        row["fx_rate"],
        row["fx_date"],
        row["fx_source"],
        row["fx_net_amount"],
        row["fx_tax_amount"],
        row["fx_total_amount"],
    )


def _corrects(row: _Row) -> DocumentReference | None:
    if row["other_number"] is None:
        return None
    return DocumentReference(row["other_number"], row["other_kind"], row["other_issue_date"])


def _notice(notice: _Row) -> Notice:
    kind, since = notice["kind"], notice.get("since")
    # Of a change of plan they are the plans' names; ``name`` says what is printed.
    before, after = (notice.get(key) if kind == "price_changed" else None for key in ("before", "after"))
    return Notice(
        kind=kind,
        name=notice.get("name", ""),
        since=date.fromisoformat(since[:10]) if since else None,
        before=None if before is None else Decimal(before),
        after=None if after is None else Decimal(after),
        unit=notice.get("unit", ""),
        text=notice.get("text", ""),
    )
