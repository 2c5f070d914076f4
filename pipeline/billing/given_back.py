"""Credits that a document drew, given back when it is credited or voided: entries below 0 beside those that drew them.

Units (credits before pricing) stay drawn: they are on no document, and the usage that took them was used.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from psycopg import Connection

from pipeline.core.money import Minor, minor_decimal, to_minor

#: Why: a credit note, or a void, gave it back, or the document's month needs less by now. Values are written into
#: tables: never rename one.
Kind: TypeAlias = Literal["credited", "voided", "restated"]

# What each draw still holds, the last one first: what was drawn last is given back first.
_SELECT_DRAWN = """
SELECT entry.grant_id, given.reduces, entry.invoice_id, entry.line_id, sum(entry.amount)
FROM billing.credit_entry AS entry JOIN billing.credit_grant AS given ON given.id = entry.grant_id
WHERE entry.document_id = %s AND given.reduces <> 'units'
GROUP BY entry.grant_id, given.reduces, entry.invoice_id, entry.line_id
HAVING sum(entry.amount) > 0 ORDER BY max(entry.id) DESC
"""
_INSERT = """
INSERT INTO billing.credit_entry (grant_id, invoice_id, line_id, document_id, amount, kind, booked_by, note)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""


_SELECT_OWNERS = """
SELECT DISTINCT given.account FROM billing.credit_entry AS entry
JOIN billing.credit_grant AS given ON given.id = entry.grant_id WHERE entry.document_id = %s
"""


def owners(connection: "Connection[Any]", document: int) -> set[str]:
    """Whose credits a document drew: of a consolidated one the children have their own."""
    return {account for (account,) in connection.execute(_SELECT_OWNERS, [document])}


def give_back(
    connection: "Connection[Any]",
    document: int,
    currency: str,
    *,
    kind: Kind,
    net: Mapping[int, Minor],
    total: Minor,
    actor: str,
    note: str,
) -> Minor:
    """Give back what a document drew: of each grant of net credits so much, of total credits so much in all.

    For a transaction that holds its ``owners``' grants (``credits.lock_grants_of``). Returns what was given back, which
    is less than asked where coupons paid the total (policy after_tax) or the draws are not those of this document.
    """
    left = dict(net)
    rows: list[tuple[Any, ...]] = []
    given = 0
    for grant, reduces, invoice, line, amount in connection.execute(_SELECT_DRAWN, [document]).fetchall():
        wanted = total if reduces == "total" else left.get(grant, 0)
        back = min(wanted, to_minor(amount, currency))
        if back <= 0:
            continue
        given += back
        if reduces == "total":
            total -= back
        else:
            left[grant] = wanted - back
        rows.append((grant, invoice, line, document, minor_decimal(-back, currency), kind, actor, note))
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT, rows)
    return given


def give_back_all(connection: "Connection[Any]", document: int, currency: str, *, actor: str, note: str) -> Minor:
    """Give back all that a voided document drew and that was not given back before."""
    drawn = connection.execute(_SELECT_DRAWN, [document]).fetchall()
    net: dict[int, Minor] = {}
    total = 0
    for grant, reduces, _, _, amount in drawn:
        cents = to_minor(amount, currency)
        if reduces == "total":
            total += cents
        else:
            net[grant] = net.get(grant, 0) + cents
    return give_back(connection, document, currency, kind="voided", net=net, total=total, actor=actor, note=note)
