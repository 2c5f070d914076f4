"""Balances within seconds of usage: what open invoices draw from an account's grants, pools and budgets so far.

A table that a worker keeps, not a view: credits are drawn in order of time, which no SQL sum can do. An account's
balance takes its few invoice lines, which the sink keeps summed; only where a grant begins or ends within a line's time
are its rows read, summed between such moments. So it costs the same however many events there are.

It is an estimate (law 3): amounts are before tax and as rated, between two beginnings or ends of grants all of a line
counts as used at its first event. The close draws event by event and settles with entries of its own.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import Connection

from pipeline.billing.credits import Held, as_decimal, budgets_of, held, lock_grants, overdrafts_of
from pipeline.core.catalog import Catalog, Segment
from pipeline.core.closing import Counter, close_pools
from pipeline.core.credits import Drawn, Grant, Owed, Reduces, draw, spread
from pipeline.core.members import Member
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, Micros, scaled
from pipeline.core.periods import Period, to_datetime, to_micros

#: What is watched: included units of a pool or a charge, a credit balance, a budget.
Kind: TypeAlias = Literal["pool", "credits", "budget"]


@dataclass(frozen=True, slots=True)
class Watched:
    """How much of something an account used, out of what it is allowed; exact, in whole units."""

    kind: Kind
    #: The pool or charge; of credits what they reduce; of a budget "".
    subject: str
    unit: str
    used: Decimal
    allowed: Decimal
    period_start_us: Micros
    period_end_us: Micros | None
    #: Whether the account's services stop when all is used.
    hard_stop: bool = False


class _Line(NamedTuple):
    """A line of an invoice that is not settled yet."""

    id: int
    currency: str
    period_start: datetime
    period_end: datetime
    contract: str
    segment_start: datetime
    charge: str
    cell: str
    quantity: int  #: 1e-9
    amount: int  #: 1e-12
    first_at: datetime
    last_at: datetime
    updated_at: datetime


#: Today's segments by contract and start.
_Segments: TypeAlias = Mapping[tuple[str, Micros], Segment]

#: What makes the invoice a matter of estimates: issued ones have settled.
_UNSETTLED = "invoice.state IN ('open', 'draft', 'reviewed')"
_SELECT_LINES = f"""
SELECT line.id, currency, period_start, period_end, contract, segment_start, charge, cell, quantity, amount,
    coalesce(first_event_at, segment_start), coalesce(last_event_at, segment_start), updated_at
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE account = %s AND {_UNSETTLED}
ORDER BY line.id
"""
_SET_MARK = (
    "UPDATE billing.balance_mark SET usage_mark = %s, computed_at = now() WHERE account = %s RETURNING computed_at"
)
_SET_ESTIMATE = """
INSERT INTO billing.credit_estimate (grant_id, drawn) VALUES (%s, %s)
ON CONFLICT (grant_id) DO UPDATE SET drawn = excluded.drawn WHERE credit_estimate.drawn <> excluded.drawn
"""
_CLEAR_BALANCES = "DELETE FROM billing.credit_balance WHERE account = %s"
_SET_BALANCE = """
INSERT INTO billing.credit_balance (account, reduces, unit, overdrawn, uncovered) VALUES (%s, %s, %s, %s, %s)
"""


def refresh(connection: "Connection[Any]", catalog: Catalog, account: str) -> list[Watched]:
    """Compute an account's balances from its lines as they stand, in a transaction, and store them.

    ``catalog`` holds what prices the account. Returns all that has thresholds. Raises psycopg.Error.
    """
    with connection.transaction():
        lock_grants(connection, account)
        rows = connection.execute(_SELECT_LINES, [account]).fetchall()
        lines = [
            _Line._make((*row[:8], scaled(row[8], QUANTITY_DECIMALS), scaled(row[9], AMOUNT_DECIMALS), *row[10:]))
            for row in rows
        ]
        mark = sum(to_micros(line.updated_at) for line in lines)
        row = connection.execute(_SET_MARK, [Decimal(f"{mark}E-6"), account]).fetchone()
        assert row is not None, "the mark was made when it was locked"
        now_us = to_micros(row[0])
        segments = {
            (segment.contract.id, segment.start_us): segment
            for start, end in sorted({(line.period_start, line.period_end) for line in lines})
            for segment in catalog.segments_of(account, Period(to_micros(start), to_micros(end)))
        }
        watched = [*_pools(catalog, lines, segments), *_budgets(lines, budgets_of(connection, account))]
        grants = held(connection, [account])
        connection.execute(_CLEAR_BALANCES, [account])
        if grants:
            watched += _draw(connection, account, lines, segments, grants, now_us)
        return watched


def _scaled(quantity: Decimal, amount: Decimal) -> tuple[int, int]:
    return scaled(quantity, QUANTITY_DECIMALS), scaled(amount, AMOUNT_DECIMALS)


# -- credits


class _Wallet(NamedTuple):
    """Grants that reduce the same, in the same unit."""

    reduces: Reduces
    unit: str


def _draw(
    connection: "Connection[Any]",
    account: str,
    lines: Sequence[_Line],
    segments: _Segments,
    grants: Iterable[Held],
    now_us: Micros,
) -> Iterator[Watched]:
    """Draw what the lines owe from the grants, store it, and tell how much of each wallet is used."""
    wallets: defaultdict[_Wallet, list[Grant]] = defaultdict(list)
    for one in grants:
        wallets[_Wallet(one.grant.reduces, one.unit)].append(one.grant)
    owed = _owed(connection, lines, [one.grant for one in grants])
    overdrafts = overdrafts_of(connection, account)
    free = _free_units(lines, segments)
    billed: dict[str, list[Owed]] = {}  # by currency: what net credits leave over
    results: dict[_Wallet, Drawn] = {}
    for wallet in sorted(wallets, key=lambda wallet: (_ORDER[wallet.reduces], wallet.unit)):
        given, overdraft, stop = wallets[wallet], 0, False
        if wallet.reduces == "units":
            paid = frozenset().union(*(grant.charges for grant in given))
            results[wallet] = draw(given, (use for use in owed.quantities if use.charge in paid), free=free)
        else:
            uses = billed.get(wallet.unit, owed.amounts.get(wallet.unit, []))
            agreed = overdrafts.get(wallet.unit) if wallet.reduces == "total" else None
            if agreed is not None:
                overdraft, stop = agreed.amount, agreed.hard_stop
            results[wallet] = draw(given, uses, overdraft=overdraft)
            billed[wallet.unit] = _uncovered(uses, results[wallet])
        yield from _balance(wallet, given, results[wallet], overdraft, now_us, hard_stop=stop)
    for wallet, drawn in results.items():
        # What a discount leaves over, total credits may pay.
        last = results.get(_Wallet("total", wallet.unit), drawn) if wallet.reduces == "net" else drawn
        _store(connection, account, wallet, wallets[wallet], drawn, uncovered=sum(last.uncovered.values()))


#: In which order wallets are drawn (law 6).
_ORDER: dict[Reduces, int] = {"units": 0, "net": 1, "total": 2}


def _balance(
    wallet: _Wallet, grants: Iterable[Grant], drawn: Drawn, overdraft: int, now_us: Micros, *, hard_stop: bool
) -> Iterator[Watched]:
    """What the grants that are valid now hold, and how much of it is used. Ended ones only where services stop then."""
    grants = list(grants)
    valid = [grant for grant in grants if grant.valid_at(now_us)]
    begun = [grant.start_us for grant in valid or grants if grant.start_us <= now_us]
    if not begun or not (valid or hard_stop):
        return
    used = sum(grant.amount - drawn.left[grant.id] for grant in valid) + drawn.overdraft
    yield Watched(
        "credits",
        wallet.reduces,
        wallet.unit,
        as_decimal(used, wallet.reduces),
        as_decimal(sum(grant.amount for grant in valid) + overdraft, wallet.reduces),
        max(begun),
        None,
        hard_stop,
    )


def _store(
    connection: "Connection[Any]",
    account: str,
    wallet: _Wallet,
    grants: Iterable[Grant],
    drawn: Drawn,
    *,
    uncovered: int,
) -> None:
    estimates = [(int(grant.id), as_decimal(grant.amount - drawn.left[grant.id], wallet.reduces)) for grant in grants]
    with connection.cursor() as cursor:
        cursor.executemany(_SET_ESTIMATE, estimates)
    amounts = (as_decimal(amount, wallet.reduces) for amount in (drawn.overdraft, uncovered))
    connection.execute(_SET_BALANCE, [account, *wallet, *amounts])


def _uncovered(uses: Iterable[Owed], drawn: Drawn) -> list[Owed]:
    """What is left to pay of each line, over its uses."""
    by_line: defaultdict[str, list[Owed]] = defaultdict(list)
    for use in uses:
        by_line[use.line].append(use)
    return [part for line, parts in by_line.items() for part in spread(drawn.uncovered.get(line, 0), parts)]


class _Uses(NamedTuple):
    """The same uses as quantities and, by currency, as amounts."""

    quantities: list[Owed]
    amounts: dict[str, list[Owed]]


# What was booked beside the rows, by close entries, is not in their sum.
_SELECT_PARTS = """
SELECT line_id, min(event_time), sum(quantity_after - quantity_before), sum(amount)
FROM billing.rated_usage WHERE line_id = ANY(%s)
GROUP BY line_id, width_bucket(event_time, %s::timestamptz[])
ORDER BY line_id, min(event_time)
"""


def _owed(connection: "Connection[Any]", lines: Sequence[_Line], grants: Iterable[Grant]) -> _Uses:
    """What lines owe, cut where grants begin and end; what is not in their rows at their last event."""
    edges = sorted({edge for grant in grants for edge in (grant.start_us, grant.end_us) if edge is not None})
    moments = [to_datetime(edge) for edge in edges]
    parts = {line.id: [(line.first_at, line.quantity, line.amount)] for line in lines}
    cut = [line for line in lines if bisect_right(moments, line.first_at) < bisect_right(moments, line.last_at)]
    if cut:
        rows: defaultdict[int, list[tuple[datetime, int, int]]] = defaultdict(list)
        for line_id, at, quantity, amount in connection.execute(_SELECT_PARTS, [[line.id for line in cut], moments]):
            rows[line_id].append((at, *_scaled(quantity, amount)))
        for line in cut:
            of_rows = rows[line.id]
            quantity = line.quantity - sum(part[1] for part in of_rows)
            amount = line.amount - sum(part[2] for part in of_rows)
            parts[line.id] = [*of_rows, *([(line.last_at, quantity, amount)] if quantity or amount else [])]
    quantities: list[Owed] = []
    amounts: defaultdict[str, list[Owed]] = defaultdict(list)
    for line in lines:
        for number, (at, quantity, amount) in enumerate(parts[line.id]):
            use = Owed(to_micros(at), f"{line.id:020}/{number:06}", str(line.id), line.charge, 0)
            quantities.append(use._replace(amount=quantity))
            amounts[line.currency].append(use._replace(amount=amount))
    return _Uses(quantities, dict(amounts))


# -- included units and budgets


def _usage(lines: Iterable[_Line]) -> dict[Counter, list[Member]]:
    """Lines as counters of their segment, each with one event that is all of them."""
    return {
        Counter(line.charge, (line.cell,), str(line.id)): [
            Member(to_micros(line.first_at), str(line.id), line.quantity)
        ]
        for line in lines
    }


def _by_segment(lines: Iterable[_Line], segments: _Segments) -> Iterator[tuple[Segment, list[_Line]]]:
    """Lines of segments as they are today; those of others are about to be re-rated and have no included units."""
    found: defaultdict[tuple[str, Micros], list[_Line]] = defaultdict(list)
    for line in lines:
        found[line.contract, to_micros(line.segment_start)].append(line)
    return ((segments[key], some) for key, some in found.items() if key in segments)


def _free_units(lines: Sequence[_Line], segments: _Segments) -> dict[str, int]:
    """The units of each line that are free: its part of a pool and its charge's own."""
    free: defaultdict[str, int] = defaultdict(int)
    for segment, some in _by_segment(lines, segments):
        usage = _usage(some)
        for pool in segment.pools:
            for counter, units in close_pools(pool, usage).items():
                free[counter.subject] += units
        included = {charge.id: charge.included for charge in segment.charges}
        for line in some:
            free[str(line.id)] += included.get(line.charge, 0)
    return free


def _pools(catalog: Catalog, lines: Sequence[_Line], segments: _Segments) -> Iterator[Watched]:
    """Included units of pools and of charges, over all segments of a period together."""
    used: defaultdict[tuple[int, int, str], int] = defaultdict(int)  # by period and charge, 1e-9
    for line in lines:
        used[to_micros(line.period_start), to_micros(line.period_end), line.charge] += line.quantity
    allowed: defaultdict[tuple[int, int, str, str], int] = defaultdict(int)
    charges: dict[tuple[int, int, str], tuple[str, ...]] = {}
    for segment in segments.values():
        period = segment.period
        pooled = [(pool.id, pool.unit, pool.included, pool.charges) for pool in segment.pools]
        for charge in segment.charges:
            meter = None if charge.meter is None else catalog.meter(charge.meter, segment.end_us - 1)
            if charge.included and meter is not None:
                pooled.append((charge.id, meter.unit, charge.included, (charge.id,)))
        for id, unit, included, of in pooled:
            allowed[period.start_us, period.end_us, id, unit] += included
            charges[period.start_us, period.end_us, id] = of
    for (start_us, end_us, id, unit), included in allowed.items():
        quantity = sum(used[start_us, end_us, charge] for charge in charges[start_us, end_us, id])
        yield Watched("pool", id, unit, as_decimal(quantity, "units"), as_decimal(included, "units"), start_us, end_us)


def _budgets(lines: Sequence[_Line], budgets: dict[str, int]) -> Iterator[Watched]:
    spent: defaultdict[tuple[str, datetime, datetime], int] = defaultdict(int)
    for line in lines:
        spent[line.currency, line.period_start, line.period_end] += line.amount
    for (currency, start, end), amount in spent.items():
        if currency in budgets:
            used, budget = as_decimal(amount, "total"), as_decimal(budgets[currency], "total")
            yield Watched("budget", "", currency, used, budget, to_micros(start), to_micros(end))


# -- who needs it

# The sum of a line's times of update is another one after any update of any line, in whatever order these commit.
_SELECT_STALE = f"""
WITH moved AS (
    SELECT DISTINCT account FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    WHERE {_UNSETTLED} AND (%(all)s OR line.updated_at >= now() - %(within)s)
    UNION
    SELECT account FROM billing.balance_mark WHERE %(all)s AND usage_mark <> 0
)
SELECT moved.account FROM moved
LEFT JOIN billing.balance_mark AS mark USING (account)
LEFT JOIN LATERAL (
    SELECT sum(extract(epoch FROM line.updated_at)) AS usage_mark
    FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    WHERE invoice.account = moved.account AND {_UNSETTLED}
) AS usage ON true
WHERE coalesce(usage.usage_mark, 0) IS DISTINCT FROM mark.usage_mark AND NOT moved.account = ANY(%(but)s)
ORDER BY moved.account LIMIT %(limit)s
"""


def stale(connection: "Connection[Any]", *, within: timedelta | None, limit: int, but: Sequence[str] = ()) -> list[str]:
    """Accounts whose usage is not what their balances were computed from, by id, leaving out some.

    Only those with usage written ``within`` so long, which is cheap to ask often; None: all.
    """
    parameters = {"all": within is None, "within": within or timedelta(0), "limit": limit, "but": list(but)}
    return [account for (account,) in connection.execute(_SELECT_STALE, parameters)]
