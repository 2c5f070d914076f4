"""Coupons after tax of documents from before 0015.after_issue: their lines do not say what of a coupon paid each.

It is shared out again over the document's own lines by what these came to, so that a coupon is given back, or goes on
paying, exactly once. Where it was for some charges only, shares may lie on others; their sum is right all the same.
"""

from collections import defaultdict
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from psycopg import Connection

from pipeline.core.apportion import apportion
from pipeline.core.discounts import LineDiscount
from pipeline.core.money import to_minor

# Each line goes back to the one that its coupons were taken with: an adjustment of that time took none along. Documents
# since then say it on at least one line.
_SELECT_FIRST = """
WITH RECURSIVE before AS (
    SELECT id AS last, id, document_id, kind, adjusts_id FROM billing.document_line WHERE id = ANY(%s)
    UNION ALL
    SELECT before.last, line.id, line.document_id, line.kind, line.adjusts_id
    FROM before JOIN billing.document_line AS line ON line.id = before.adjusts_id
    WHERE before.kind = 'adjustment' AND NOT EXISTS (
        SELECT FROM billing.document_line AS reversal
        WHERE reversal.document_id = before.document_id AND reversal.adjusts_id = line.id
            AND reversal.detail ? 'discounts'
    )
)
SELECT before.last, before.id, document.id, document.currency
FROM before JOIN billing.document ON document.id = before.document_id
WHERE before.kind <> 'adjustment' AND EXISTS (
    SELECT FROM billing.document_discount AS discount
    WHERE discount.document_id = document.id AND coupon <> '' AND document_line_id IS NULL AND NOT restates
) AND document.content #>> '{policies,coupons}' = 'after_tax' AND NOT EXISTS (
    SELECT FROM billing.document_line AS line WHERE line.document_id = document.id AND line.detail ? 'discounts'
)
"""
_SELECT_COUPONS = """
SELECT document_id, coupon, name, amount FROM billing.document_discount
WHERE document_id = ANY(%s) AND coupon <> '' AND document_line_id IS NULL AND NOT restates
ORDER BY document_id, position
"""
_SELECT_OWN = """
SELECT document_id, id, total_amount FROM billing.document_line
WHERE document_id = ANY(%s) AND role = 'new' AND kind <> 'adjustment' ORDER BY document_id, position
"""


def unnamed_shares(connection: "Connection[Any]", lines: Collection[int]) -> dict[int, tuple[LineDiscount, ...]]:
    """What coupons after tax paid of these document lines, by id, which say nothing of it; most have none."""
    first = connection.execute(_SELECT_FIRST, [sorted(lines)]).fetchall() if lines else []
    if not first:
        return {}
    currency_of = {document: currency for *_, document, currency in first}
    documents = [sorted(currency_of)]
    own: defaultdict[int, list[tuple[int, Decimal]]] = defaultdict(list)
    for document, line, total in connection.execute(_SELECT_OWN, documents):
        own[document].append((line, total))
    shares: defaultdict[int, list[LineDiscount]] = defaultdict(list)
    for document, coupon, name, amount in connection.execute(_SELECT_COUPONS, documents):
        currency = currency_of[document]
        weights = [to_minor(total, currency) for _, total in own[document]]
        parts = apportion(to_minor(amount, currency), weights)
        for (line, _), part in zip(own[document], parts, strict=True):
            if part:
                shares[line].append(LineDiscount(part, coupon, name=name, shared=True, after_tax=True))
    return {last: tuple(shares[line]) for last, line, *_ in first if line in shares}
