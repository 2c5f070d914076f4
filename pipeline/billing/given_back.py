"""Credits that a document drew, given back when it is credited or voided: entries below 0 beside those that drew them.

Units (credits before pricing) stay drawn: they are on no document, and the usage that took them was used.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import Connection

from pipeline.core.credits import Reduces
from pipeline.core.money import Minor, minor_decimal, to_minor

#: Why: a credit note, or a void, gave it back, or the document's month needs less by now. Values are written into
#: tables: never rename one.
Kind: TypeAlias = Literal["credited", "voided", "restated"]


class _Drawn(NamedTuple):
    """What a draw still holds."""

    grant: int
    #: Whose the grant is.
    account: str
    reduces: Reduces
    invoice: int
    line: int | None
    amount: Minor


# The last draw first: what was drawn last is given back first.
_SELECT_DRAWN = """
SELECT entry.grant_id, given.account, given.reduces, entry.invoice_id, entry.line_id, sum(entry.amount)
FROM billing.credit_entry AS entry JOIN billing.credit_grant AS given ON given.id = entry.grant_id
WHERE entry.document_id = %s AND given.reduces <> 'units'
GROUP BY entry.grant_id, given.account, given.reduces, entry.invoice_id, entry.line_id
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
    credited: Mapping[str, Minor] | None = None,
) -> Minor:
    """Give back what a document drew: of each grant of net credits so much, of total credits so much in all.

    ``credited``: what of it is for lines of each account: its own total credits have that back first.
    For a transaction that holds its ``owners``' grants (``credits.lock_grants_of``). Returns what was given back, which
    is less than asked where coupons paid the total (policy after_tax) or the draws are not those of this document.
    """
    drawn = _read(connection, document, currency)
    back = [
        *_of_net([one for one in drawn if one.reduces == "net"], net),
        *_of_total([one for one in drawn if one.reduces == "total"], total, credited or {}),
    ]
    rows: list[tuple[Any, ...]] = [
        (one.grant, one.invoice, one.line, document, minor_decimal(-amount, currency), kind, actor, note)
        for one, amount in back
        if amount
    ]
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT, rows)
    return sum(amount for _, amount in back)


def _read(connection: "Connection[Any]", document: int, currency: str) -> list[_Drawn]:
    rows = connection.execute(_SELECT_DRAWN, [document]).fetchall()
    return [
        _Drawn(grant, account, reduces, invoice, line, to_minor(amount, currency))
        for grant, account, reduces, invoice, line, amount in rows
    ]


def _of_net(drawn: Sequence[_Drawn], wanted: Mapping[int, Minor]) -> list[tuple[_Drawn, Minor]]:
    left = dict(wanted)
    found = []
    for one in drawn:
        back = max(min(left.get(one.grant, 0), one.amount), 0)
        left[one.grant] = left.get(one.grant, 0) - back
        found.append((one, back))
    return found


def _of_total(drawn: Sequence[_Drawn], wanted: Minor, credited: Mapping[str, Minor]) -> list[tuple[_Drawn, Minor]]:
    own, left = dict(credited), max(wanted, 0)
    found = []
    for one in drawn:
        back = max(min(left, own.get(one.account, 0), one.amount), 0)
        own[one.account] = own.get(one.account, 0) - back
        left -= back
        found.append(back)
    for place, one in enumerate(drawn):
        more = min(left, one.amount - found[place])
        found[place] += more
        left -= more
    return list(zip(drawn, found, strict=True))


def give_back_all(connection: "Connection[Any]", document: int, currency: str, *, actor: str, note: str) -> Minor:
    """Give back all that a voided document drew and that was not given back before."""
    net: dict[int, Minor] = {}
    total = 0
    for one in _read(connection, document, currency):
        if one.reduces == "total":
            total += one.amount
        else:
            net[one.grant] = net.get(one.grant, 0) + one.amount
    return give_back(connection, document, currency, kind="voided", net=net, total=total, actor=actor, note=note)
