"""What a close pays documents with and carries forward: credits, balances, and how often coupons were used."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, time
from typing import Any, NamedTuple, Protocol
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing.credits import Held, held, lock_grants_of, roll_over
from pipeline.billing.documents import NewDocument
from pipeline.billing.lines import open_invoices
from pipeline.billing.reckoning import Reckoned, item_id
from pipeline.billing.statements import Difference, Due, Key
from pipeline.core.catalog import Catalog
from pipeline.core.credits import Grant, Owed, minor_step
from pipeline.core.invoice import Document
from pipeline.core.money import AMOUNT_DECIMALS, Micros, Minor, minor_decimal, scaled, to_minor
from pipeline.core.periods import Period, local_midnight, months_later, to_datetime, to_micros


class Wallet(NamedTuple):
    """What a payer has with one seller in one currency."""

    payer: str
    legal_entity: str
    currency: str


class Money:
    """What payers have left while their documents are reckoned, one after the other."""

    def __init__(self, balances: Mapping[Wallet, Minor], grants: Iterable[Held]) -> None:
        self._balances = dict(balances)
        self._grants: dict[str, tuple[Held, ...]] = {}
        for one in grants:
            self._grants[one.account] = (*self._grants.get(one.account, ()), one)

    def balance(self, wallet: Wallet) -> Minor:
        """Carried forward, in the customer's favour, in smallest units."""
        return self._balances.get(wallet, 0)

    def grants(self, wallet: Wallet, members: Iterable[str] = ()) -> tuple[Grant, ...]:
        """The payer's net and total credits in the currency, less what earlier documents of the chunk drew.

        With those of ``members``, whose lines are on his document: each one's pay for its own lines only.
        """
        return tuple(
            one.grant if account == wallet.payer else replace(one.grant, account=account)
            for account in dict.fromkeys((wallet.payer, *members))
            for one in self._grants.get(account, ())
            if one.grant.reduces != "units" and one.unit == wallet.currency
        )

    def take(self, wallet: Wallet, document: Document) -> None:
        """Go on with what a document leaves."""
        self._balances[wallet] = document.balance_after
        if not document.draws:
            return
        step = minor_step(wallet.currency)
        drawn: defaultdict[str, int] = defaultdict(int)
        for one in document.draws:
            drawn[one.grant] += one.amount * step
        for account, grants in self._grants.items():
            if any(one.grant.id in drawn for one in grants):
                self._grants[account] = tuple(
                    replace(one, grant=replace(one.grant, amount=one.grant.amount - drawn.get(one.grant.id, 0)))
                    for one in grants
                )


_SELECT_HAVING = """
SELECT account FROM billing.credit_grant WHERE account = ANY(%(payers)s)
UNION SELECT account FROM billing.balance_entry WHERE account = ANY(%(payers)s)
"""
_SELECT_BALANCES = """
SELECT account, legal_entity, currency, sum(amount) FROM billing.balance_entry WHERE account = ANY(%s)
GROUP BY account, legal_entity, currency
"""


def read_money(connection: "Connection[Any]", payers: Collection[str], *, lock: bool) -> Money:
    """What accounts have; with ``lock`` nobody else draws on it, bills them or voids until the transaction ends.

    Held even where there is nothing: of two months that are closed at once the second has to see what the first billed
    ahead, and no document is voided while another one takes its lines back.
    """
    if lock:
        lock_grants_of(connection, payers)
    having = [account for (account,) in connection.execute(_SELECT_HAVING, {"payers": sorted(payers)})]
    if not having:
        return Money({}, ())
    balances = {
        Wallet(account, legal_entity, currency): to_minor(amount, currency)
        for account, legal_entity, currency, amount in connection.execute(_SELECT_BALANCES, [having])
    }
    return Money(balances, held(connection, having))


# All usage up to its end that it may pay for is settled: what is left of it goes on. Whatever was used beyond it was
# billed, so nothing is taken off for that (``preserve_overage`` of grants of before it was refused).
_SELECT_ENDED = """
SELECT given.id, given.account, given.starts_at, given.expires_at FROM billing.grant_state AS given
WHERE given.account = ANY(%(payers)s) AND given.verdict = 'approved' AND given.voided_at IS NULL
    AND given.rollover_maximum IS NOT NULL AND given.expires_at <= %(now)s
    AND NOT EXISTS (SELECT FROM billing.credit_grant AS next WHERE next.rolled_from = given.id)
    AND NOT EXISTS (
        SELECT FROM unnest(%(payers)s::text[], %(members)s::text[]) AS billed (payer, member)
        JOIN billing.invoice ON invoice.account = billed.member
        WHERE billed.payer = given.account AND invoice.period_start < given.expires_at
            AND invoice.state IN ('open', 'draft', 'reviewed')
    )
ORDER BY given.account, given.id
"""


def roll_over_ended(
    connection: "Connection[Any]",
    catalog: Catalog,
    members: Mapping[str, Collection[str]],
    now: datetime,
    actor: str,
) -> None:
    """Carry on what is left of grants that ended and whose usage is billed, for as long again; twice is once.

    ``members``: of each payer the accounts on his documents. His grants pay for the usage of them all, a member's own
    for its own.
    """
    billed = {(payer, member) for payer, accounts in members.items() for member in accounts}
    billed |= {(member, member) for _, member in billed}
    payers, of = zip(*sorted(billed), strict=True)
    asked = {"payers": list(payers), "members": list(of), "now": now}
    ended = connection.execute(_SELECT_ENDED, asked).fetchall()
    if not ended:
        return
    lock_grants_of(connection, {account for _, account, *_ in ended})
    for grant, account, starts_at, expires_at in connection.execute(_SELECT_ENDED, asked).fetchall():
        start_us, end_us = to_micros(starts_at), to_micros(expires_at)
        until_us = _as_long_again(start_us, end_us, catalog.accounts[account].time_zone)
        roll_over(connection, grant, until_us=until_us, actor=actor)


def _as_long_again(start_us: Micros, end_us: Micros, time_zone: str) -> Micros:
    """As many calendar months where it was so many, from midnight by the account's clock; else as much time."""
    zone = ZoneInfo(time_zone)
    start, end = (to_datetime(at_us).astimezone(zone) for at_us in (start_us, end_us))
    months = (end.year - start.year) * 12 + end.month - start.month
    if months > 0 and start.day == end.day and start.time() == end.time() == time():
        day = months_later(end.date(), months)
        return local_midnight(day.year, day.month, day.day, zone)
    return end_us + (end_us - start_us)


_SELECT_COUPON_USES = (
    "SELECT coupon, count(DISTINCT period_start) FROM billing.coupon_use WHERE account = %s GROUP BY coupon"
)


def coupon_uses(connection: "Connection[Any]", payer: str) -> dict[str, int]:
    """In how many billing periods a payer used each coupon."""
    return dict(connection.execute(_SELECT_COUPON_USES, [payer]).fetchall())


# An hour's usage counts at its first event, and no hour reaches over a moment at which a grant begins or ends: so a
# payer with ten million events costs no more memory than one with a thousand.
_SELECT_USES = """
SELECT line_id, min(event_time), sum(amount) FROM billing.rated_usage WHERE line_id = ANY(%s)
GROUP BY line_id, date_bin('1 hour', event_time, 'epoch'), width_bucket(event_time, %s::timestamptz[])
ORDER BY line_id, min(event_time)
"""


def read_uses_of(
    connection: "Connection[Any]", left: Iterable[Difference], grants: Iterable[Grant]
) -> dict[Key, tuple[Owed, ...]]:
    """When what is due was used, so that each grant pays for usage of its time. What is not in rows: at the end."""
    found = {one.due.key: one.due for one in left if one.due is not None and one.due.line_ids}
    edges = sorted({edge for grant in grants for edge in (grant.start_us, grant.end_us) if edge is not None})
    lines = [line for due in found.values() for line in due.line_ids]
    rows: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for line, at, amount in connection.execute(_SELECT_USES, [lines, [to_datetime(edge) for edge in edges]]):
        rows[line].append((to_micros(at), scaled(amount, AMOUNT_DECIMALS)))
    return {key: _uses(due, rows) for key, due in found.items()}


def _uses(due: Due, rows: Mapping[int, Sequence[tuple[int, int]]]) -> tuple[Owed, ...]:
    parts = [(at_us, f"{line:020}", amount) for line in due.line_ids for at_us, amount in rows.get(line, ())]
    beside = due.exact_amount - sum(amount for _, _, amount in parts)
    if beside:
        parts.append((due.service.end_us - 1, "", beside))
    return tuple(
        Owed(at_us, f"{line}/{number:06}", "", due.key.charge, amount)
        for number, (at_us, line, amount) in enumerate(parts)
    )


class Settled(Protocol):
    """A document with what it draws, as ``settle`` takes it."""

    @property
    def payer(self) -> str: ...
    @property
    def reckoned(self) -> Reckoned: ...
    @property
    def document(self) -> NewDocument: ...
    @property
    def container(self) -> int | None: ...


_INSERT_BALANCES = """
INSERT INTO billing.balance_entry (legal_entity, account, currency, amount, document_id, kind, by, note)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
# Drawn for the container of the line, else for the document's.
_INSERT_DRAWS = """
INSERT INTO billing.credit_entry (grant_id, invoice_id, line_id, document_id, amount, booked_by, note)
SELECT %(grant)s, coalesce((SELECT invoice_id FROM billing.invoice_line WHERE id = %(line)s), %(container)s), %(line)s,
    %(document)s, %(amount)s, %(by)s, %(note)s
"""
_SELECT_BEYOND = """
SELECT id, trim_scale(amount), trim_scale(settled) FROM billing.grant_state
WHERE id = ANY(%s) AND settled NOT BETWEEN 0 AND amount LIMIT 1
"""
_SELECT_CONTAINER = """
SELECT id FROM billing.invoice WHERE account = %s AND currency = %s AND period_start = %s AND period_end = %s
ORDER BY supplement DESC LIMIT 1
"""


def settle(
    connection: "Connection[Any]",
    documents: Iterable[tuple[int, Settled]],
    made: Mapping[Key, int],
    *,
    actor: str,
    note: str,
) -> None:
    """Book what documents, by id, draw from credits and what goes to or from balances.

    For a transaction that holds the payers' money (``read_money``). ``made``: container lines made since the documents
    were reckoned. Raises ValueError for more than a grant has.
    """
    balances: list[tuple[Any, ...]] = []
    draws: list[dict[str, Any]] = []
    for id, one in documents:
        document, reckoned = one.document, one.reckoned
        if document.balance_amount:
            kind = "applied" if document.balance_amount > 0 else "carried"
            amount = minor_decimal(-document.balance_amount, document.currency)
            place = document.legal_entity, one.payer, document.currency
            balances.append((*place, amount, id, kind, actor, note))
        if not reckoned.document.draws:
            continue
        line_of = {line.id: row.line_id for line, row in zip(reckoned.document.lines, reckoned.lines, strict=True)}
        keys = {item_id(key): line for key, line in made.items()}
        container = one.container or _container(connection, one.payer, document.currency, document.period)
        draws += [
            {
                "grant": int(draw.grant),
                "line": None if draw.line is None else line_of[draw.line] or keys.get(draw.line),
                "container": container,
                "document": id,
                "amount": minor_decimal(draw.amount, document.currency),
                "by": actor,
                "note": note,
            }
            for draw in reckoned.document.draws
        ]
    with connection.cursor() as cursor:
        if balances:
            cursor.executemany(_INSERT_BALANCES, balances)
        if draws:
            cursor.executemany(_INSERT_DRAWS, draws)
    if draws:
        beyond = connection.execute(_SELECT_BEYOND, [[draw["grant"] for draw in draws]]).fetchone()
        if beyond is not None:
            grant, amount, settled = beyond
            raise ValueError(f"expected draws of 0 to {amount} in all from grant {grant}, got {settled}")


def _container(connection: "Connection[Any]", payer: str, currency: str, period: Period) -> int:
    """The container of a document without one, such as a year's fee in advance; made where there is none."""
    open_invoices(connection, [(payer, currency, period.start_us, period.end_us)])
    bounds = [payer, currency, to_datetime(period.start_us), to_datetime(period.end_us)]
    row = connection.execute(_SELECT_CONTAINER, bounds).fetchone()
    assert row is not None, "it was made before, if it was not there"
    return int(row[0])
