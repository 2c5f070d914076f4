"""JSON and CSV hold the document exactly, and can be read by programs that are not careful."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal

from pipeline.documents.exports import COLUMNS, json_text, write_csv
from pipeline.documents.model import Document
from tests.documents import samples


def csv_text(documents: Iterable[Document]) -> str:
    text = io.StringIO()
    write_csv(documents, text)
    return text.getvalue()


def test_json_says_all_of_it_exactly() -> None:
    of = samples.domestic()
    data = json.loads(json_text(of), parse_float=lambda text: 1 / 0)  # no number is a float
    assert (data["version"], data["number"], data["currency"]) == (1, "2026-000017", "EUR")
    assert data["totals"] == {
        "lines": "2732.06", "discounts": "273.21", "net": "2458.85", "tax": "467.18", "total": "2926.03",
        "credits": "100.00", "balance": "0", "payable": "2826.03",
    }  # fmt: skip
    storage = data["lines"][3]
    assert (storage["exact"], storage["amount"], storage["quantity"]) == ("18.6860625", "18.69", "812.4375")
    assert storage["usage"]["first_at"] == "2026-10-01T00:03:11+00:00"
    assert data["lines"][2]["cell"] == {"model": "large", "region": "eu"}
    assert "logo" not in data


def test_csv_has_a_row_per_line_whose_columns_add_up() -> None:
    of, credit = samples.cross_border(), samples.french_credit_note()
    rows = list(csv.DictReader(io.StringIO(csv_text([of, credit]))))
    assert tuple(rows[0]) == COLUMNS
    for document in (of, credit):
        own = [row for row in rows if row["number"] == document.number]
        for column, total in (
            ("net", document.totals.net),
            ("tax", document.totals.tax),
            ("total", document.totals.total),
        ):
            assert sum(Decimal(row[column]) for row in own) == total
            assert {Decimal(row[f"document_{column}"]) for row in own} == {total}
    assert rows[2]["references"] == "project=atlas,borealis,cumulus,delta,…"
    assert (rows[2]["service_start"], rows[2]["quantity"]) == ("2026-10-01", "3600000")
    assert (rows[6]["corrects"], rows[6]["amount"]) == ("2026-000017", "-30.60")


def test_a_text_is_no_formula() -> None:
    of = samples.document([replace(samples.lines()[0], name='=HYPERLINK("http://x","y")', description="a,b")])
    [row] = csv.DictReader(io.StringIO(csv_text([of])))
    assert row["name"] == '\'=HYPERLINK("http://x","y")'
    assert Decimal(row["amount"]) == Decimal("249.00")


def test_lines_end_as_rfc_4180_wants() -> None:
    assert csv_text([samples.document(samples.lines()[:1])]).count("\r\n") == 2
