"""Unit credits as documents draw them: what is there for a period, what it draws, and the entries that settle it.

Units pay for usage of the account they were granted to, whoever is billed for it. A period is priced with what is left
of its account's grants and with what it drew before, as if it had drawn nothing yet: late usage may draw what is still
there, and usage that was taken back gives its units back. So what other periods drew is never drawn again, and closing
twice books nothing the second time. What was carried on into a new grant is not left in the old one.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from psycopg import Connection

from pipeline.billing.credits import check_settled, held
from pipeline.billing.statements import AccountPeriod, Due, Held, Key, key_of
from pipeline.core.credits import Grant
from pipeline.core.money import Quantity, quantity_decimal


@dataclass(frozen=True, slots=True)
class UnitDraw:
    """What a period draws from a grant for one thing owed, less what it drew before (1e-9): to be booked. Never 0."""

    grant: int
    key: Key
    currency: str
    #: The container's line it is for; None where booking close entries makes it.
    line_id: int | None
    quantity: Quantity


_SELECT_HAVING = """
SELECT account, rolled_from::text FROM billing.credit_grant WHERE account = ANY(%s) AND reduces = 'units'
"""
_SELECT_DRAWN = """
SELECT entry.grant_id, entry.line_id, sum(entry.amount) * 1000000000
FROM billing.credit_entry AS entry JOIN billing.credit_grant AS given ON given.id = entry.grant_id
WHERE entry.invoice_id = ANY(%s) AND given.reduces = 'units'
GROUP BY entry.grant_id, entry.line_id
"""


class Units:
    """What is left of accounts' unit credits while their periods are reckoned, one after the other.

    For a transaction that holds the accounts' grants (``close_money.read_money``), or only looks. Nothing is written
    before ``book``.
    """

    def __init__(self, connection: "Connection[Any]", accounts: Collection[str] = ()) -> None:
        """``accounts``: those read at once; others are read when they are asked for."""
        self._connection = connection
        self._grants: dict[str, dict[str, Grant]] = {}
        self._drawn: dict[AccountPeriod, dict[tuple[int, Key], Quantity]] = {}
        self._read(accounts)

    def _read(self, accounts: Collection[str]) -> None:
        self._grants |= {account: {} for account in accounts}
        rows = self._connection.execute(_SELECT_HAVING, [sorted(accounts)]).fetchall()
        rolled = {rolled_from for _, rolled_from in rows}
        for one in held(self._connection, {account for account, _ in rows}) if rows else ():
            if one.grant.reduces == "units":
                left = 0 if one.grant.id in rolled else one.grant.amount
                self._grants[one.account][one.grant.id] = replace(one.grant, amount=left)

    def there_for(self, of: Held) -> tuple[Grant, ...]:
        """The grants that count in a period, each with what is left of it and what the period drew before."""
        if of.account not in self._grants:
            self._read([of.account])
        known = self._grants[of.account]
        if not known:
            return ()
        before: defaultdict[str, Quantity] = defaultdict(int)
        for (grant, _), quantity in self._drawn_before(of).items():
            before[str(grant)] += quantity
        found = (replace(grant, amount=grant.amount + before[grant.id]) for grant in known.values())
        return tuple(
            grant
            for grant in found
            if grant.amount > 0
            and grant.start_us < of.period.end_us
            and (grant.end_us is None or of.period.start_us < grant.end_us)
        )

    def draw(self, of: Held, owed: Iterable[Due]) -> list[UnitDraw]:
        """Go on with what a period leaves that was priced with what is ``there_for`` it; what is to be booked."""
        if not self._grants.get(of.account):
            return []
        lines: dict[Key, int] = {}
        currencies: dict[Key, str] = {}
        for line in of.lines:
            key = key_of(of.account, line.stored.terms)
            lines[key], currencies[key] = line.stored.id, line.stored.terms.currency
        wanted: defaultdict[tuple[int, Key], Quantity] = defaultdict(int)
        for due in owed:
            currencies[due.key] = due.currency
            for grant, quantity in due.units.items():
                wanted[int(grant), due.key] += quantity
        for place, quantity in self._drawn_before(of).items():
            wanted[place] -= quantity
        found = [
            UnitDraw(grant, key, currencies[key], lines.get(key), quantity)
            for (grant, key), quantity in sorted(wanted.items())
            if quantity
        ]
        for one in found:
            self._take(of.account, one)
        return found

    def _take(self, account: str, one: UnitDraw) -> None:
        grants = self._grants[account]
        if (grant := grants.get(str(one.grant))) is not None:
            grants[grant.id] = replace(grant, amount=grant.amount - one.quantity)

    def _drawn_before(self, of: Held) -> dict[tuple[int, Key], Quantity]:
        """What the period's containers have drawn, by grant and by what it was drawn for."""
        place = AccountPeriod(of.account, of.period)
        if place not in self._drawn:
            key_by_line = {line.stored.id: key_of(of.account, line.stored.terms) for line in of.lines}
            found: defaultdict[tuple[int, Key], Quantity] = defaultdict(int)
            for grant, line, quantity in self._connection.execute(
                _SELECT_DRAWN, [[container.id for container in of.containers]]
            ):
                found[grant, key_by_line[line]] += int(quantity)
            self._drawn[place] = dict(found)
        return self._drawn[place]


_INSERT = """
INSERT INTO billing.credit_entry (grant_id, invoice_id, line_id, amount, booked_by, note)
SELECT %s, invoice_id, id, %s, %s, %s FROM billing.invoice_line WHERE id = %s
"""


def book(
    connection: "Connection[Any]", draws: Iterable[UnitDraw], made: Mapping[Key, int], *, actor: str, note: str
) -> None:
    """Settle what periods draw, each on its container's line, in the transaction that books their close entries.

    ``made``: container lines that booking these made. Units are on no document, so that voiding or crediting one leaves
    them drawn (``pipeline.billing.given_back``). Raises ValueError for more than a grant has.
    """
    rows = [
        (one.grant, quantity_decimal(one.quantity), actor, note, made[one.key] if one.line_id is None else one.line_id)
        for one in draws
    ]
    if rows:
        with connection.cursor() as cursor:
            cursor.executemany(_INSERT, rows)
        check_settled(connection, {grant for grant, *_ in rows})
