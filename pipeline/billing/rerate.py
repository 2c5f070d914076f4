"""Re-rating an open period: what each line should hold by today's catalog, and the entries that bring it there.

A period is priced anew as its close would (``pipeline.core.rerating``): from the stored events in order of time, by the
versions valid at each event's time, so that a back-dated price or contract corrects it, and a charge whose stream
amounts are provisional gets its true price early. Booked is the difference to what the line holds, rows and earlier
entries together: doing it twice books nothing the second time.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias
from zoneinfo import ZoneInfo

import psycopg
from psycopg import Connection

from pipeline.billing.close_entries import (
    Cause,
    CloseEntry,
    LineMoved,
    StoredLine,
    book,
    lock_period,
    read_lines,
)
from pipeline.billing.members import read_earlier, read_uses
from pipeline.billing.prices import read_catalog
from pipeline.billing.rated import Terms
from pipeline.core.aggregation import is_additive
from pipeline.core.catalog import Catalog, Segment
from pipeline.core.money import Quantity
from pipeline.core.periods import Period, format_instant, local_midnight, month_of
from pipeline.core.rerating import ClosedLine, ClosedPeriod, carried_event_types, close_period
from pipeline.infra.postgres import connect

#: Accounts whose part of the catalog is read at a time.
_ACCOUNTS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Month:
    """A calendar month; an account's billing period is that month in its own time zone."""

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
        zone = ZoneInfo(time_zone)
        return month_of(local_midnight(self.year, self.month, 1, zone), time_zone)


@dataclass(frozen=True, slots=True)
class Rerated:
    """What re-rating an account's period found. With a problem there are no entries: it must be settled first."""

    account: str
    period: Period
    entries: tuple[CloseEntry, ...]
    problem: str | None = None


def preview(dsn: str, month: Month, *, account: str | None = None, charge: str | None = None) -> Iterator[Rerated]:
    """What ``rerate`` would book: accounts with a difference or a problem, by id. Changes nothing.

    Raises LookupError for an account or a charge nobody ever published, psycopg.OperationalError when the database does
    not answer.
    """
    with connect(dsn, application="rerate") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        for catalog, one in _accounts(connection, account, charge):
            found = _rerate(connection, catalog, one, month, charge)
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
) -> Iterator[Rerated]:
    """Book what lines lack: account by account, each in a transaction of its own that holds its open invoices.

    Yields accounts with entries, which are booked then, or with a problem. Stopped in between, a second run goes on.
    Raises psycopg.OperationalError when the database does not answer.
    """
    with connect(dsn, application="rerate", autocommit=True) as connection:
        for catalog, one in _accounts(connection, account, charge):
            found = _book(connection, catalog, one, month, charge, actor, note)
            if found.entries or found.problem:
                yield found


def _book(
    connection: "Connection[Any]",
    catalog: Catalog,
    account: str,
    month: Month,
    charge: str | None,
    actor: str,
    note: str,
) -> Rerated:
    while True:
        try:
            with connection.transaction():
                found = _rerate(connection, catalog, account, month, charge, lock=True)
                if found.entries:
                    book(connection, account, found.entries, actor=actor, note=note)
                return found
        except LineMoved:  # its first usage has just come: now there is an invoice to hold
            continue


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
    month: Month,
    charge: str | None,
    *,
    lock: bool = False,
) -> Rerated:
    period = month.period_in(catalog.accounts[account].time_zone)
    if lock:
        lock_period(connection, account, period)
    stored = read_lines(connection, account, period)
    try:
        closed = price_period(connection, catalog, account, period)
    except ValueError as error:  # a charge that cannot be priced: this account's trouble, not that of the others
        return Rerated(account, period, (), str(error))
    if closed.refused:
        return Rerated(account, period, (), _unpriced(closed))
    entries = tuple(one for one in differences(closed, stored) if charge in (None, one.terms.charge))
    if entries and any(line.invoice_state != "open" for line in stored):
        return Rerated(account, period, (), f"{len(entries)} lines differ, but {_CLOSED}")
    return Rerated(account, period, entries)


_CLOSED = "the period is closed: what changes it now is an adjustment on the next invoice"


def missing_entries(connection: "Connection[Any]", catalog: Catalog, account: str, period: Period) -> list[CloseEntry]:
    """What the account's lines of a period lack to stand at their closing prices. Raises ValueError as there."""
    return differences(price_period(connection, catalog, account, period), read_lines(connection, account, period))


def price_period(connection: "Connection[Any]", catalog: Catalog, account: str, period: Period) -> ClosedPeriod:
    """An account's period at its closing prices, from its stored events. Raises ValueError as ``close_period``."""
    types = carried_event_types(catalog, account, period)
    earlier = read_earlier(connection, account, period, types) if types else ()
    return close_period(catalog, account, period, read_uses(connection, account, period), earlier)


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
    """The entries that bring the stored lines to their closing prices, those of new lines included. Pure."""
    groups: defaultdict[_Group, list[StoredLine]] = defaultdict(list)
    for line in stored:
        groups[_group(line.terms)].append(line)
    entries: list[CloseEntry] = []
    for closed_line in closed.lines:
        entries += _to_closing(closed_line, groups.pop(_group(_terms(closed_line, 0)), []))
    holding = {_segment(segment) for segment in closed.segments}
    for left in groups.values():
        for line in left:
            # Its counter is no more: prices now begin elsewhere, or nothing is left of what it counted.
            reason = Cause.VOIDED if _segment_of(line.terms) in holding else Cause.BACK_DATED
            entries += _entry(line.id, line.terms, [reason], (line.quantity, 0), (line.amount, 0))
    return entries


def is_line_of(stored: StoredLine, closed: ClosedLine) -> bool:
    """Whether a stored line is one of those that a closing price stands on."""
    return _group(stored.terms) == _group(_terms(closed, 0))


def _to_closing(closed: ClosedLine, stored: Iterable[StoredLine]) -> list[CloseEntry]:
    """Quantities version by version; the difference in money is the whole counter's and stands on its last line.

    Which of a counter's lines an event's money is on depends on the order of arrival. Only their sum is a price.
    """
    by_version = {line.terms.meter_version: line for line in stored}
    versions = sorted(by_version.keys() | closed.quantities.keys())
    missing = closed.amount - sum(line.amount for line in by_version.values())
    entries: list[CloseEntry] = []
    for version in versions:
        line = by_version.get(version)
        quantity, amount = (line.quantity, line.amount) if line else (0, 0)
        quantities = quantity, closed.quantities.get(version, 0)
        amounts = amount, amount + (missing if version == versions[-1] else 0)
        terms = line.terms if line else _terms(closed, version)
        reasons = _reasons(closed, line, quantities[1])
        entries += _entry(line.id if line else None, terms, reasons, quantities, amounts)
    return entries


def _reasons(closed: ClosedLine, line: StoredLine | None, quantity: Quantity) -> list[Cause]:
    """Why a line does not hold what it should, which is ``quantity`` and its part of the closing price."""
    if closed.meter is None:
        return [Cause.FEE]
    limited = [
        Cause.MINIMUM for closing in closed.closings.values() if any(part.kind == "minimum" for part in closing.parts)
    ]
    if not closed.events:
        return [*([Cause.PROVISIONAL] if closed.meter.carries_over else [Cause.NO_USAGE]), *limited]
    moved = line is None or (is_additive(closed.meter) and line.quantity != quantity)
    if moved or (line is not None and line.back_dated):
        return [Cause.BACK_DATED, *limited]
    if closed.price_class == "period":
        return [Cause.PROVISIONAL, *limited]
    if closed.segment.shortens(closed.charge):
        return [Cause.PRORATED, *limited]
    return limited or [Cause.ROWS_DIFFER]


def _entry(
    line_id: int | None, terms: Terms, reasons: list[Cause], quantities: tuple[int, int], amounts: tuple[int, int]
) -> list[CloseEntry]:
    """The entry, or none where nothing differs."""
    if quantities[0] == quantities[1] and amounts[0] == amounts[1]:
        return []
    return [CloseEntry(line_id, terms, tuple(reasons), *quantities, *amounts)]


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
