"""Backtesting prices: what they would make of a month's stored usage, account by account, on all cores.

An account is worked on in one of three ways, told in its result: ``unconcerned`` (nothing that prices it differs),
``totals`` (from sums of its lines, or of its rows by property, subject and time, where that is exact: see
``pipeline.core.backtests``) or ``events`` (each stored event is measured and priced anew). Reads only. Credits,
commitments and usage that was never rated are not part of it.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg import Connection

from pipeline.billing.members import read_earlier, read_uses
from pipeline.billing.prices import read_prices, with_accounts
from pipeline.billing.rerate import Month, periods_of
from pipeline.core.backtests import (
    Compared,
    PricedLine,
    Split,
    Total,
    compare,
    differing,
    everything,
    moving,
    price_totals,
    priced_lines,
    split_for,
    with_candidates,
)
from pipeline.core.catalog import Catalog
from pipeline.core.documents import Item
from pipeline.core.meters import Meter
from pipeline.core.money import QUANTITY_DECIMALS, scaled
from pipeline.core.periods import Period, to_datetime, to_micros
from pipeline.core.rerating import Use, carried_event_types, close_period, first_moment
from pipeline.infra.postgres import connect

Way: TypeAlias = Literal["unconcerned", "totals", "events"]

#: A worker's portion: few enough that progress shows, many enough that reading the catalog for them costs little.
_PORTION_ACCOUNTS, _PORTION_EVENTS = 100, 500_000
#: Below so many events one process is done before others have started.
_WORTH_PROCESSES = 200_000
#: Events of an account held for pricing them twice; about 1 KB each. More are read twice.
_HELD_EVENTS = 100_000


@dataclass(frozen=True, slots=True)
class Backtested:
    """An account's billing period, before and after. With a problem there are no prices: it says what is in the way."""

    account: str
    period: Period
    way: Way
    #: Rated rows of its lines.
    events: int
    prices: tuple[Compared, ...] = ()
    #: Stored events that one of the two catalogs has no price for, before and after.
    unpriced: tuple[int, int] = (0, 0)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Task:
    dsn: str
    month: Month
    items: tuple[Item, ...]
    #: Also price what the items do not move.
    whole: bool
    accounts: tuple[str, ...]


def backtest(
    dsn: str,
    month: Month,
    items: Sequence[Item],
    *,
    whole: bool = False,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Backtested]:
    """Price a month's usage by today's catalog and by these meters, plans and price lists as if they had always held.

    Accounts come in the order they are done, with the charges that may move; with ``whole`` every account with every
    charge. ``jobs`` is the number of processes, by default one per core. ``progress`` is told the rated rows done, of
    how many.

    Raises ValueError for other items, psycopg.OperationalError when the database does not answer.
    """
    with_candidates((), items)
    portions, events = _portions(dsn, month)
    tasks = [_Task(dsn, month, tuple(items), whole, accounts) for accounts in portions]
    done = 0
    progress(done, events)
    for found in _run(tasks, 1 if events < _WORTH_PROCESSES else jobs or os.cpu_count() or 1):
        for account in found:
            done += account.events
            yield account
        progress(done, events)


def _run(tasks: Sequence[_Task], jobs: int) -> Iterator[list[Backtested]]:
    if jobs == 1 or len(tasks) < 2:
        yield from map(_portion, tasks)
        return
    # Spawned, not forked: a copy of open connections and of threads' locks would be of no use to anyone.
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_portion, task) for task in tasks]):
            yield future.result()


# Every account of the catalog: one without usage may owe a fee. Events only steer: an account's own month ends up to a
# day beside that of UTC.
_SELECT_ACCOUNTS = """
SELECT account.id, coalesce(sum(line.events), 0)
FROM (SELECT DISTINCT id FROM billing.catalog_version WHERE kind = 'account') AS account
LEFT JOIN billing.invoice ON invoice.account = account.id AND invoice.period_end > %s AND invoice.period_end <= %s
LEFT JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
GROUP BY account.id ORDER BY account.id
"""


def _portions(dsn: str, month: Month) -> tuple[list[tuple[str, ...]], int]:
    """The accounts in portions of similar size, and the rated rows of all."""
    span = month.period_in("UTC")
    edges = [to_datetime(span.start_us) + _DAY, to_datetime(span.end_us) + _DAY]
    portions: list[list[str]] = [[]]
    total = portion = 0
    with connect(dsn, application="backtest") as connection:
        for account, events in connection.execute(_SELECT_ACCOUNTS, edges):
            if portions[-1] and (len(portions[-1]) >= _PORTION_ACCOUNTS or portion + events > _PORTION_EVENTS):
                portions.append([])
                portion = 0
            portions[-1].append(account)
            portion += int(events)
            total += int(events)
    return [tuple(accounts) for accounts in portions if accounts], total


_DAY = timedelta(days=1)


def _portion(task: _Task) -> list[Backtested]:
    with connect(task.dsn, application="backtest") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        prices = read_prices(connection)
        today = with_accounts(connection, Catalog.empty().extend(prices, 0), task.accounts)
        periods = [
            (account, period)
            for account in task.accounts
            for period in periods_of(connection, today, account, task.month)
        ]
        if not periods:
            return []
        first_us, last_us = min(period.start_us for _, period in periods), max(period.end_us for _, period in periods)
        items = differing(prices, task.items, first_us, last_us)
        candidate = with_accounts(connection, Catalog.empty().extend(with_candidates(prices, items), 0), task.accounts)
        changed = frozenset(item.id for item in items if isinstance(item, Meter))
        return [_period(connection, today, candidate, *one, task, changed) for one in periods]


def _period(
    connection: "Connection[Any]",
    today: Catalog,
    candidate: Catalog,
    account: str,
    period: Period,
    task: _Task,
    changed: frozenset[str],
) -> Backtested:
    totals, events = _read_totals(connection, account, period)
    charges = everything(today, candidate, account, period) if task.whole else moving(today, candidate, account, period)
    if not charges:
        return Backtested(account, period, "unconcerned", events)
    unpriced = [0, 0]
    sides: list[list[PricedLine]] = []
    ways: set[Way] = set()
    uses = _Uses(connection, account, period, events, (today, candidate))
    try:
        for n, catalog in enumerate((today, candidate)):
            lines, anew = None, changed if n else frozenset[str]()
            if totals is not None:
                price = partial(price_totals, today, catalog, account, period, charges=charges, changed=anew)
                lines = price(totals)
                if lines is None and (split := split_for(catalog, account, period, charges, anew)) is not None:
                    lines = price(_read_parts(connection, account, period, split))
            ways.add("events" if lines is None else "totals")
            if lines is None:
                lines, unpriced[n] = uses.price(catalog, charges)
            sides.append(lines)
    except ValueError as error:  # a charge that cannot be priced: this account's trouble, not that of the others
        return Backtested(account, period, "events", events, problem=str(error))
    way: Way = "events" if "events" in ways else "totals"
    return Backtested(account, period, way, events, tuple(compare(*sides)), (unpriced[0], unpriced[1]))


class _Uses:
    """An account's stored events of a period, read once where they fit into memory."""

    def __init__(
        self, connection: "Connection[Any]", account: str, period: Period, events: int, catalogs: Iterable[Catalog]
    ) -> None:
        """``catalogs`` are all that may price them."""
        self._connection, self._account, self._period, self._events = connection, account, period, events
        self._catalogs = tuple(catalogs)
        self._held: list[Use] | None = None

    def price(self, catalog: Catalog, charges: Collection[str]) -> tuple[list[PricedLine], int]:
        """These charges by the catalog, event by event; and how many events it has no price for."""
        where = self._account, self._period
        types = carried_event_types(catalog, *where)
        before_us = first_moment(catalog, *where)
        earlier: Iterable[Use] = ()
        if types:
            earlier = read_earlier(self._connection, self._account, before_us, types, self._names())
        closed = close_period(catalog, *where, self._read(), earlier)
        return priced_lines(closed, charges), len(closed.refused)

    def _read(self) -> Iterable[Use]:
        if self._held is not None:
            return self._held
        uses = read_uses(self._connection, self._account, self._period, self._names(), rows=self._events)
        if self._events > _HELD_EVENTS:
            return uses
        self._held = list(uses)
        return self._held

    def _names(self) -> frozenset[str]:
        within = self._account, self._period.start_us, self._period.end_us
        return frozenset[str]().union(*(one.properties_read(one.segments(*within)) for one in self._catalogs))


# A line that close entries gave or took quantity no longer holds the sum of its own events.
_SELECT_LINES = """
SELECT line.contract, line.price_version, line.segment_start, line.charge, line.meter, line.cell, line.quantity,
    line.first_event_at, line.last_event_at, line.events,
    EXISTS (SELECT FROM billing.close_entry AS entry WHERE entry.line_id = line.id AND entry.quantity <> 0)
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = %s AND invoice.period_start = %s AND invoice.period_end = %s AND line.events > 0
"""


def _read_totals(connection: "Connection[Any]", account: str, period: Period) -> tuple[list[Total] | None, int]:
    """What the account's lines hold, None where that is not the sum of their events; and their rated rows."""
    totals: list[Total] = []
    events, whole = 0, True
    bounds = [account, to_datetime(period.start_us), to_datetime(period.end_us)]
    for (
        contract,
        price_version,
        segment_start,
        charge,
        meter,
        cell,
        quantity,
        first,
        last,
        count,
        moved,
    ) in connection.execute(_SELECT_LINES, bounds):
        events += count
        whole = whole and not moved
        totals.append(
            Total(
                contract=contract,
                price_version=price_version,
                segment_start_us=to_micros(segment_start),
                charge=charge,
                meter=meter,
                cell=cell,
                quantity=scaled(quantity, QUANTITY_DECIMALS),
                first_event_us=to_micros(first),
                last_event_us=to_micros(last),
            )
        )
    return totals if whole else None, events


# Rows of kind void take others back, with the same properties, so that what they cancel adds up to nothing.
_SELECT_PARTS = """
SELECT line.contract, line.price_version, line.segment_start, line.charge, line.meter, line.cell,
    sum(usage.quantity), min(usage.event_time), max(usage.event_time),
    CASE WHEN %(subjects)s THEN usage.subject END AS subject,
    ARRAY[{texts}]::text[] AS texts,
    sum(CASE usage.kind WHEN 'void' THEN -1 ELSE 1 END) > 0
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
JOIN billing.rated_usage AS usage ON usage.line_id = line.id
WHERE invoice.account = %(account)s AND invoice.period_start = %(start)s AND invoice.period_end = %(end)s
GROUP BY line.id, 10, 11, width_bucket(usage.event_time, %(cuts)s::timestamptz[])
"""


def _read_parts(connection: "Connection[Any]", account: str, period: Period, split: Split) -> list[Total]:
    """What the account's rows add up to in these parts."""
    wanted = {
        "account": account,
        "start": to_datetime(period.start_us),
        "end": to_datetime(period.end_us),
        "subjects": split.subjects,
        "cuts": [to_datetime(cut) for cut in split.cuts],
        **{f"name_{n}": name for n, name in enumerate(split.properties)},
    }
    texts = ", ".join(f"coalesce(usage.properties ->> %(name_{n})s, '')" for n in range(len(split.properties)))
    return [
        Total(
            contract=contract,
            price_version=price_version,
            segment_start_us=to_micros(segment_start),
            charge=charge,
            meter=meter,
            cell=cell,
            quantity=scaled(quantity, QUANTITY_DECIMALS),
            first_event_us=to_micros(first),
            last_event_us=to_micros(last),
            subject=subject,
            properties=tuple(zip(split.properties, texts, strict=True)),
            alive=alive,
        )
        for (
            contract,
            price_version,
            segment_start,
            charge,
            meter,
            cell,
            quantity,
            first,
            last,
            subject,
            texts,
            alive,
        ) in connection.execute(_SELECT_PARTS.format(texts=texts), wanted)
    ]
