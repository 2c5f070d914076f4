"""Why a document says what it says: its lines and the usage behind each, its totals, what settled and corrected it.

Everything is read from what was stored when the document was made. The other way, the documents that billed a line.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing.document_lists import links, settlements

# Header, as it is stored; the payment state is that of now.
_SELECT = """
SELECT document.id, kind::text AS document_kind, number, document.state::text, payment.state AS payment, legal_entity,
    content #>> '{seller,name}' AS seller, account, content #>> '{buyer,name}' AS buyer, currency, period_start,
    period_end, issue_date, tax_date, due_date, reason_code, note, run_id, created_at, created_by, reviewed_at,
    reviewed_by, issued_at, issued_by, voided_at, voided_by, void_reason_code, void_note, lines_amount,
    discounts_amount, net_amount, tax_amount, total_amount, credits_amount, balance_amount,
    document.payable_amount, payment.open_amount, fx_currency, fx_rate, fx_date, fx_source, fx_net_amount,
    fx_tax_amount, fx_total_amount
FROM billing.document LEFT JOIN billing.document_payment AS payment ON payment.document_id = document.id
WHERE document.id = %s
"""
_SELECT_LINES = """
SELECT document_line_id, line.position, kind, role, account, service_start, service_end, contract, plan, plan_version,
    price_version, charge, coalesce(name, charge) AS name, meter, cell, segment_start, quantity, unit, exact_amount,
    amount, rounding_difference, discount_amount, net_amount, tax_amount, total_amount, tax_category, events, line_id,
    adjusts_document_id, adjusts_number, adjusted.at AS adjusts_position,
    CASE WHEN role = 'new' THEN coalesce(line.detail -> 'parts', '[]') ELSE '[]' END AS parts,
    coalesce(line.detail -> 'taxes', '[]') AS taxes
FROM finance.document_lines AS line
LEFT JOIN LATERAL (
    SELECT position FROM billing.document_line WHERE document_line.id = line.adjusts_document_line_id
) AS adjusted (at) ON true
WHERE line.document_id = %s ORDER BY line.position
"""
_SELECT_TAXES = """
SELECT tax, treatment, percent, base_amount, tax_amount, note FROM billing.document_tax
WHERE document_id = %s ORDER BY position
"""
_SELECT_DISCOUNTS = """
SELECT discount.coupon, discount.name, discount.grant_id, line.position AS line_position, discount.amount
FROM billing.document_discount AS discount
LEFT JOIN billing.document_line AS line ON line.id = discount.document_line_id
WHERE discount.document_id = %s ORDER BY discount.position
"""
_SELECT_CREDITS = """
SELECT entry.grant_id, given.kind, given.reduces, given.unit, sum(entry.amount) AS amount
FROM billing.credit_entry AS entry JOIN billing.credit_grant AS given ON given.id = entry.grant_id
WHERE entry.document_id = %s GROUP BY entry.grant_id, given.kind, given.reduces, given.unit ORDER BY entry.grant_id
"""
_SELECT_NUMBERED = "SELECT id, legal_entity FROM billing.document WHERE number = %s ORDER BY id"


def numbered(connection: "Connection[Any]", number: str) -> list[tuple[int, str]]:
    """Id and legal entity of the documents with this number: each entity numbers for itself."""
    return [] if "\0" in number else connection.execute(_SELECT_NUMBERED, [number]).fetchall()


def document(connection: "Connection[Any]", id: int) -> dict[str, Any] | None:
    """A document in any state, with its lines; None when there is none with this id.

    Money in whole units of its currency, times UTC, dates the legal entity's. ``checks`` holds its sums against each
    other: the header's against its lines', net and tax against the total, the total against what is to be paid.
    """
    found = _rows(connection, _SELECT, id)
    if not found:
        return None
    lines = _rows(connection, _SELECT_LINES, id)
    collected: defaultdict[int, list[str]] = defaultdict(list)
    for row in _rows(connection, _SELECT_COLLECTED, id):
        collected[row["document_line_id"]].append(f"line:{row['line_id']}")
    header, taxes = found[0], _rows(connection, _SELECT_TAXES, id)
    return {
        "kind": "document",
        "document": f"document:{id}",
        **header,
        "lines": [_line(line, collected[line["document_line_id"]]) for line in lines],
        "discounts": _rows(connection, _SELECT_DISCOUNTS, id),
        "taxes": taxes,
        "credits": _rows(connection, _SELECT_CREDITS, id),
        "settlements": [one._asdict() for one in settlements(connection, id)],
        "links": [
            one._asdict() | {"document": f"document:{one.document}", "document_id": one.document}
            for one in links(connection, id)
        ],
        "checks": _checks(header, lines, taxes),
    }


def _line(line: dict[str, Any], collected: list[str]) -> dict[str, Any]:
    """``line`` is the usage line it was billed from; ``lines`` all of its counter: under each version of the meter,
    and of usage that came late."""
    id, number, position = (line.pop(f"adjusts_{name}") for name in ("document_id", "number", "position"))
    adjusts = {"document": f"document:{id}", "number": number, "position": position}
    told = f"line:{line.pop('line_id')}" if collected else None
    return {**line, "line": told, "lines": collected, "adjusts": adjusts if position is not None else None}


def _checks(header: dict[str, Any], lines: list[dict[str, Any]], taxes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = {
        "lines_amount": "amount",
        "discounts_amount": "discount_amount",
        "net_amount": "net_amount",
        "tax_amount": "tax_amount",
        "total_amount": "total_amount",
    }
    made_of = {name: ("sum of the lines", sum(line[column] for line in lines)) for name, column in columns.items()}
    sums = [
        *((name, *of) for name, of in made_of.items()),
        ("tax_amount", "sum of the taxes", sum(tax["tax_amount"] for tax in taxes)),
        ("total_amount", "net + tax", header["net_amount"] + header["tax_amount"]),
        (
            "payable_amount",
            "total - credits - balance",
            header["total_amount"] - header["credits_amount"] - header["balance_amount"],
        ),
    ]
    return [
        {"what": name, "equals": how, "expected": header[name], "found": sum_, "proved": header[name] == sum_}
        for name, how, sum_ in sums
    ]


# A line of a document tells of the last collected line of its counter; the others are those under earlier versions of
# its meter and of the supplements up to it, as finance.document_line_events has it.
_BILLED = """
billing.invoice_line AS line
JOIN billing.invoice ON invoice.id = line.invoice_id
JOIN billing.invoice AS period ON (period.account, period.currency, period.period_start, period.period_end)
    = (invoice.account, invoice.currency, invoice.period_start, invoice.period_end)
    AND period.supplement >= invoice.supplement
JOIN billing.invoice_line AS told ON told.invoice_id = period.id
    AND (told.contract, told.charge, told.segment_start, told.cell, told.plan, told.plan_version, told.price_version)
    = (line.contract, line.charge, line.segment_start, line.cell, line.plan, line.plan_version, line.price_version)
JOIN billing.document_line AS billed ON billed.line_id = told.id
"""
_SELECT_COLLECTED = f"""
SELECT billed.id AS document_line_id, line.id AS line_id
FROM {_BILLED} WHERE billed.document_id = %s ORDER BY billed.id, line.id
"""
_SELECT_BILLED = f"""
SELECT line.id AS line_id, 'document:' || document.id AS document, document.id AS document_id, document.number,
    document.kind::text AS document_kind, document.state::text AS document_state, document.currency, billed.position,
    billed.kind, billed.role, trim_scale(billed.quantity) AS quantity, billed.unit,
    trim_scale(billed.exact_amount) AS exact_amount, billed.amount, billed.discount_amount, billed.net_amount,
    billed.tax_amount, billed.total_amount
FROM {_BILLED} JOIN billing.document ON document.id = billed.document_id
WHERE line.id = ANY(%s) ORDER BY line.id, document.id, billed.position
"""


def billed_on(connection: "Connection[Any]", lines: Sequence[int]) -> list[dict[str, Any]]:
    """The lines of documents that collected lines are billed on, drafts and void ones included, the first made first.

    Money in whole units of ``currency``.
    """
    return _rows(connection, _SELECT_BILLED, list(lines))


def _rows(connection: "Connection[Any]", statement: str, parameter: int | list[int]) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, [parameter]).fetchall()
