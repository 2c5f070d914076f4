"""Re-rating an open period: what each line should hold by today's catalog, and the entries that bring it there.

A period is priced anew as its close would (``pipeline.core.rerating``): from the stored events in order of time, by the
versions valid at each event's time, so that a back-dated price or contract corrects it, and a charge whose stream
amounts are provisional gets its true price early. Booked is the difference to what the line holds, rows and earlier
entries together: doing it twice books nothing the second time.

Unit credits are not drawn here: a period has those that its closed invoices drew. An open one has none, so its lines
stand at the price of all units until the close draws, and books the difference.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self, TypeAlias
from zoneinfo import ZoneInfo

import psycopg
from psycopg import Connection

from pipeline.billing.close_entries import (
    Cause,
    CloseEntry,
    StoredLine,
    book,
    lock_period,
    read_lines,
    rebased,
)
from pipeline.billing.credits import units_drawn
from pipeline.billing.members import read_earlier, read_uses
from pipeline.billing.prices import read_catalog
from pipeline.billing.rated import Terms
from pipeline.core.aggregation import is_additive
from pipeline.core.catalog import Catalog, Segment
from pipeline.core.credits import Grant
from pipeline.core.money import Amount, Quantity
from pipeline.core.periods import Period, format_instant, local_midnight, month_of, to_datetime, to_micros
from pipeline.core.rerating import ClosedLine, ClosedPeriod, carried_event_types, close_period, first_moment
from pipeline.infra.postgres import connect

#: Accounts whose part of the catalog is read at a time.
_ACCOUNTS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Month:
    """A calendar month. It has the billing periods whose last instant lies in it, in the account's own time zone."""

    year: int
    month: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for anything but YYYY-MM."""
        found = re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", text)
        if found is None or found[1] == "0000":
            raise ValueError(f"expected a month such as 2026-10, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.year:04}-{self.month:02}"

    def period_in(self, time_zone: str) -> Period:
        """The month itself in a time zone: the billing period of contracts by calendar months."""
        zone = ZoneInfo(time_zone)
        return month_of(local_midnight(self.year, self.month, 1, zone), time_zone)


@dataclass(frozen=True, slots=True)
class Rerated:
    """What re-rating an account's period found. With a problem there are no entries: it must be settled first."""

    account: str
    period: Period
    entries: tuple[CloseEntry, ...]
    problem: str | None = None


_SELECT_PERIODS = """
SELECT DISTINCT period_start, period_end FROM billing.invoice
WHERE account = %s AND period_end > %s AND period_end <= %s
"""


def periods_of(connection: "Connection[Any]", catalog: Catalog, account: str, month: Month) -> list[Period]:
    """The account's billing periods that end in the month: of its contracts, and of its invoices; by their end.

    An invoice may have a period that no contract has any more, since a back-dated one took over.
    """
    within = month.period_in(catalog.accounts[account].time_zone)
    rows = connection.execute(_SELECT_PERIODS, [account, to_datetime(within.start_us), to_datetime(within.end_us)])
    found = {Period(to_micros(start), to_micros(end)) for start, end in rows}
    return sorted(found.union(catalog.periods_ending(account, within)), key=lambda one: (one.end_us, one.start_us))


def preview(
    dsn: str,
    month: Month,
    *,
    account: str | None = None,
    charge: str | None = None,
    begun_by: datetime | None = None,
) -> Iterator[Rerated]:
    """What ``rerate`` would book: periods with a difference or a problem, by account. Changes nothing.

    Raises LookupError for an account or a charge nobody ever published, psycopg.OperationalError when the database does
    not answer.
    """
    with connect(dsn, application="rerate") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        for catalog, one in _accounts(connection, account, charge):
            for period in _begun(periods_of(connection, catalog, one, month), begun_by):
                found, _ = _rerate(connection, catalog, one, period, charge)
                if found.entries or found.problem:
                    yield found


def rerate(
    dsn: str,
    month: Month,
    *,
    account: str | None = None,
    charge: str | None = None,
    actor: str,
    note: str,
    begun_by: datetime | None = None,
) -> Iterator[Rerated]:
    """Book what lines lack: period by period, each booked in a transaction of its own.

    Yields periods with entries, which are booked then, or with a problem. Stopped in between, a second run goes on.
    ``begun_by``: pass over periods that begin later. Raises psycopg.OperationalError when the database does not answer.
    """
    with connect(dsn, application="rerate", autocommit=True) as connection:
        for catalog, one in _accounts(connection, account, charge):
            for period in _begun(periods_of(connection, catalog, one, month), begun_by):
                found = _book(connection, catalog, one, period, charge, actor, note)
                if found.entries or found.problem:
                    yield found


def _begun(periods: Iterable[Period], by: datetime | None) -> list[Period]:
    return [period for period in periods if by is None or period.start_us <= to_micros(by)]


def _book(
    connection: "Connection[Any]",
    catalog: Catalog,
    account: str,
    period: Period,
    charge: str | None,
    actor: str,
    note: str,
) -> Rerated:
    """Price, then book, the account's invoices locked for the booking alone: usage goes on while its events are read.

    1. Price the period and read its lines as of one moment.
    2. Lock its invoices. Did something else book on them since, or close them? Then begin anew.
    3. Book what the lines lacked at that moment; rows that came since stay beside it.
    """
    while True:
        # Step 1.
        with _one_moment(connection):
            found, held = _rerate(connection, catalog, account, period, charge)
        if not found.entries:
            return found
        with connection.transaction():
            # Step 2.
            lock_period(connection, account, period, currencies={entry.terms.currency for entry in found.entries})
            entries = rebased(found.entries, held, read_lines(connection, account, period))
            if entries is not None:
                # Step 3.
                book(connection, account, entries, actor=actor, note=note)
                return replace(found, entries=tuple(entries))


@contextmanager
def _one_moment(connection: "Connection[Any]") -> Iterator[None]:
    """A transaction whose statements all see the database as of its first one. Locks nothing."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    try:
        with connection.transaction():
            yield
    finally:
        connection.isolation_level = None


_SELECT_ACCOUNTS = """
SELECT DISTINCT id FROM billing.catalog_version
WHERE kind = 'account' AND (%(account)s::text IS NULL OR id = %(account)s) ORDER BY id
"""


_IS_CHARGE = """
SELECT 1 FROM billing.catalog_version
WHERE kind = 'plan' AND document -> 'charges' @> jsonb_build_array(jsonb_build_object('id', %(charge)s::text)) LIMIT 1
"""


def _accounts(connection: "Connection[Any]", account: str | None, charge: str | None) -> Iterator[tuple[Catalog, str]]:
    """The accounts asked for, with a catalog that prices them. Raises LookupError for what does not exist."""
    if charge is not None and not connection.execute(_IS_CHARGE, {"charge": charge}).fetchone():
        raise LookupError(f"expected a charge of a published plan, got {charge!r}: `tally plans show PLAN` names them")
    ids = [id for (id,) in connection.execute(_SELECT_ACCOUNTS, {"account": account})]
    if account is not None and not ids:
        raise LookupError(f"expected an account of the catalog, got {account!r}")
    for first in range(0, len(ids), _ACCOUNTS_AT_ONCE):
        some = ids[first : first + _ACCOUNTS_AT_ONCE]
        catalog = read_catalog(connection, some)
        yield from ((catalog, one) for one in some)


def _rerate(
    connection: "Connection[Any]",
    catalog: Catalog,
    account: str,
    period: Period,
    charge: str | None,
) -> tuple[Rerated, list[StoredLine]]:
    """What the period's lines lack, and how they stand. For a transaction that sees one moment."""
    stored = read_lines(connection, account, period)
    try:
        closed = price_period(connection, catalog, account, period)
    except ValueError as error:  # a charge that cannot be priced: this account's trouble, not that of the others
        return Rerated(account, period, (), str(error)), stored
    if closed.refused:
        return Rerated(account, period, (), _unpriced(closed)), stored
    entries = tuple(one for one in differences(closed, stored) if charge in (None, one.terms.charge))
    if entries and any(line.invoice_state != "open" for line in stored):
        return Rerated(account, period, (), f"{len(entries)} lines differ, but {_CLOSED}"), stored
    return Rerated(account, period, entries), stored


_CLOSED = "the period is closed: what changes it now is an adjustment on the next invoice"


def missing_entries(connection: "Connection[Any]", catalog: Catalog, account: str, period: Period) -> list[CloseEntry]:
    """What the account's lines of a period lack to stand at their closing prices. Raises ValueError as there."""
    return differences(price_period(connection, catalog, account, period), read_lines(connection, account, period))


def price_period(
    connection: "Connection[Any]",
    catalog: Catalog,
    account: str,
    period: Period,
    *,
    grants: Sequence[Grant] | None = None,
) -> ClosedPeriod:
    """An account's period at its closing prices, from its stored events. Raises ValueError as ``close_period``.

    ``grants``: unit credits to draw; None: what the period's invoices have drawn, and no more.
    """
    if grants is None:
        grants = units_drawn(connection, account, period)
    types = carried_event_types(catalog, account, period)
    names = catalog.properties_read(catalog.segments(account, period.start_us, period.end_us))
    since = first_moment(catalog, account, period)
    earlier = read_earlier(connection, account, since, types, names) if types else ()
    uses = read_uses(connection, account, period, names)
    return close_period(catalog, account, period, uses, earlier, grants=grants)


def _unpriced(closed: ClosedPeriod) -> str:
    use, rejection = closed.refused[0]
    more = f" and {len(closed.refused) - 1:,} more events" if len(closed.refused) > 1 else ""
    return (
        f"{closed.account}/{use.key} of {format_instant(use.at_us)}{more} were billed and have no price by today's "
        f"catalog: {rejection.message}. Publish what is missing, or void them"
    )


# -- from two states of a line to entries

#: What lines of one counter share; they differ by the version of its meter.
_Group: TypeAlias = tuple[str, str, int, str, str, str, int, str, str]


def differences(closed: ClosedPeriod, stored: Sequence[StoredLine]) -> list[CloseEntry]:
    """The entries that bring the stored lines to their closing prices, those of new lines included. Pure.

    Of a period whose usage partly stands in a closed invoice, the lines of that one are fixed: what the period lacks as
    a whole is booked on the open supplement's.
    """
    groups: defaultdict[_Group, list[StoredLine]] = defaultdict(list)
    for line in stored:
        groups[_group(line.terms)].append(line)
    entries: list[CloseEntry] = []
    for closed_line in closed.lines:
        entries += _to_closing(closed_line, groups.pop(_group(_terms(closed_line, 0)), []))
    holding = {_segment(segment) for segment in closed.segments}
    for left in groups.values():
        for lines in _by_version(left).values():
            # Its counter is no more: prices now begin elsewhere, or nothing is left of what it counted.
            terms = lines[-1].terms
            reason = Cause.VOIDED if _segment_of(terms) in holding else Cause.BACK_DATED
            quantity, amount = sum(line.quantity for line in lines), sum(line.amount for line in lines)
            entries += _entry(_open_one(lines), terms, [reason], -quantity, -amount)
    return entries


def is_line_of(stored: StoredLine, closed: ClosedLine) -> bool:
    """Whether a stored line is one of those that a closing price stands on."""
    return _group(stored.terms) == _group(_terms(closed, 0))


def _to_closing(closed: ClosedLine, stored: Sequence[StoredLine]) -> list[CloseEntry]:
    """Quantities version by version; the difference in money is the whole counter's and stands on its last line.

    Which of a counter's lines an event's money is on depends on the order of arrival. Only their sum is a price.
    """
    by_version = _by_version(stored)
    versions = sorted(by_version.keys() | closed.quantities.keys())
    missing = closed.amount - sum(line.amount for line in stored)
    entries: list[CloseEntry] = []
    for version in versions:
        lines = by_version.get(version, [])
        wanted = closed.quantities.get(version, 0)
        terms = lines[-1].terms if lines else _terms(closed, version)
        quantity = wanted - sum(line.quantity for line in lines)
        reasons = _reasons(closed, lines, quantity, sum(line.amount - line.booked for line in stored))
        entries += _entry(_open_one(lines), terms, reasons, quantity, missing if version == versions[-1] else 0)
    return entries


def _by_version(lines: Iterable[StoredLine]) -> dict[int, list[StoredLine]]:
    """Lines by the version of their meter; of each, those of closed invoices and at most one that is open."""
    found: dict[int, list[StoredLine]] = {}
    for line in sorted(lines, key=lambda line: (line.terms.meter_version, line.id)):
        found.setdefault(line.terms.meter_version, []).append(line)
    return found


def _open_one(lines: Sequence[StoredLine]) -> StoredLine | None:
    """The line that can be booked on; None: it has to be made."""
    return next((line for line in reversed(lines) if line.invoice_state == "open"), None)


def _reasons(closed: ClosedLine, lines: Sequence[StoredLine], missing: Quantity, rows: Amount) -> list[Cause]:
    """Why the lines of a version do not hold what they should; ``missing`` is what their quantity lacks.

    ``rows``: what the rows of all versions come to. A credit explains a difference to the price without it, no other.
    """
    if closed.meter is None:
        return [Cause.FEE]
    limited = [
        Cause.MINIMUM for closing in closed.closings.values() if any(part.kind == "minimum" for part in closing.parts)
    ]
    if not closed.events:
        return [*([Cause.PROVISIONAL] if closed.meter.carries_over else [Cause.NO_USAGE]), *limited]
    moved = not lines or (is_additive(closed.meter) and missing != 0)
    if moved or any(line.back_dated for line in lines):
        return [Cause.BACK_DATED, *limited]
    is_limited = closed.charge.minimum is not None or closed.charge.maximum is not None
    differ = closed.uncredited is not None and not is_limited and rows != closed.uncredited
    if closed.units:
        limited = [Cause.CREDITED, *limited]
    if closed.price_class == "period":
        return [Cause.PROVISIONAL, *limited]
    if closed.segment.shortens(closed.charge):
        return [Cause.PRORATED, *limited]
    return [*limited, Cause.ROWS_DIFFER] if differ or not limited else limited


def _entry(
    line: StoredLine | None, terms: Terms, reasons: list[Cause], quantity: Quantity, amount: Amount
) -> list[CloseEntry]:
    """The entry that adds so much to a line, which may have to be made; or none where nothing is to be added."""
    if quantity == 0 and amount == 0:
        return []
    held = (line.quantity, line.amount) if line else (0, 0)
    moves = held[0], held[0] + quantity, held[1], held[1] + amount
    return [CloseEntry(line.id if line else None, terms, tuple(reasons), *moves)]


def _terms(line: ClosedLine, meter_version: int) -> Terms:
    segment = line.segment
    return Terms(
        contract=segment.contract.id,
        plan=segment.plan.id,
        plan_version=segment.plan.version,
        meter=line.charge.meter or "",
        meter_version=meter_version,
        price_version=segment.price_version,
        charge=line.charge.id,
        period_start_us=segment.period.start_us,
        period_end_us=segment.period.end_us,
        segment_start_us=segment.start_us,
        cell=line.cell,
        currency=segment.plan.currency,
        price_class=line.price_class,
    )


def _group(terms: Terms) -> _Group:
    return (
        terms.contract,
        terms.plan,
        terms.plan_version,
        terms.price_version,
        terms.meter,
        terms.charge,
        terms.segment_start_us,
        terms.cell,
        terms.currency,
    )


def _segment(segment: Segment) -> tuple[str, str, int]:
    return segment.contract.id, segment.price_version, segment.start_us


def _segment_of(terms: Terms) -> tuple[str, str, int]:
    return terms.contract, terms.price_version, terms.segment_start_us
