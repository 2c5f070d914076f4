"""A document as data: JSON with all it says, CSV with a row per line. Money is exact text, signed as stored."""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date, datetime
from decimal import Decimal
from typing import Any, TextIO

from pipeline.core.money import plain
from pipeline.documents.model import Document, Line

#: Of the JSON's shape: a field added keeps it, one changed or taken away moves it.
JSON_VERSION = 1
#: What a spreadsheet would take for a formula at the start of a text (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_json(document: Document) -> dict[str, Any]:
    """Everything the document says, by the names of ``documents.model``; without the logo's bytes."""
    data = asdict(document)
    del data["logo"], data["branding"]
    data["accounts"], data["own_credits"] = dict(document.accounts), dict(document.own_credits)
    for line, shown in zip(document.lines, data["lines"], strict=True):
        shown["cell"] = dict(line.cell)
    return {"version": JSON_VERSION, **data}


def json_text(document: Document) -> str:
    """``as_json`` as text: numbers as strings of exact decimals, days and instants by ISO 8601."""
    return json.dumps(as_json(document), default=_plain, ensure_ascii=False, indent=2) + "\n"


def _plain(value: object) -> str:
    match value:
        case Decimal():
            return format(value, "f")
        case datetime() | date():
            return value.isoformat()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


#: Columns of the CSV, in order. Further ones come at the end.
COLUMNS = (
    "number", "kind", "state", "issue_date", "tax_date", "due_date", "corrects", "legal_entity", "account", "currency",
    "position", "line_kind", "line_account", "contract", "plan", "charge", "name", "cell", "service_start",
    "service_end", "quantity", "unit", "exact_amount", "amount", "discount", "net", "tax", "total", "tax_rates",
    "references", "events", "adjusts", "document_net", "document_tax", "document_total", "document_payable",
)  # fmt: skip


def write_csv(documents: Iterable[Document], file: TextIO) -> None:
    """A row per line of each document, by RFC 4180, after one of names. Amounts have a point and no grouping."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for document in documents:
        header = _header(document)
        for line in document.lines:
            writer.writerow({name: _cell(value) for name, value in (header | _row(line)).items()})


def _header(document: Document) -> dict[str, object]:
    totals = document.totals
    return {
        "number": document.number,
        "kind": document.kind,
        "state": document.state,
        "issue_date": document.issue_date,
        "tax_date": document.tax_date,
        "due_date": document.due_date,
        "corrects": document.corrects.number if document.corrects else "",
        "legal_entity": document.seller.id,
        "account": document.buyer.id,
        "currency": document.currency,
        "document_net": totals.net,
        "document_tax": totals.tax,
        "document_total": totals.total,
        "document_payable": totals.payable,
    }


def _row(line: Line) -> dict[str, object]:
    references = line.usage.references if line.usage else ()
    return {
        "position": line.position,
        "line_kind": line.kind,
        "line_account": line.account,
        "contract": line.contract,
        "plan": line.plan,
        "charge": line.charge,
        "name": line.name,
        "cell": "; ".join(f"{name}={value}" for name, value in line.cell),
        "service_start": line.span.first,
        "service_end": line.span.last,
        "quantity": Decimal(plain(line.quantity)),
        "unit": line.unit,
        "exact_amount": Decimal(plain(line.exact)),
        "amount": line.amount,
        "discount": line.discount,
        "net": line.net,
        "tax": line.tax,
        "total": line.total,
        "tax_rates": "; ".join(f"{tax.name} {tax.treatment} {plain(tax.percent)}" for tax in line.taxes),
        "references": "; ".join(f"{one.name}={','.join(one.values)}{',…' if one.more else ''}" for one in references),
        "events": line.usage.events if line.usage else "",
        "adjusts": f"{line.adjusts.number}/{line.adjusts.position}" if line.adjusts else "",
    }


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case Decimal():
            return format(value, "f")
        case str() if value.startswith(_FORMULA):
            return f"'{value}"
        case _:
            return str(value)
