"""Which closed months are to be billed anew: those that usage came of, or was taken back from, since.

What came stands in open supplements of the month (``pipeline.billing.lines``). A month that was closed later is one of
them too, where a commitment was settled at its end that the usage counts toward.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing.commitments import commitments_until, promising
from pipeline.billing.rerate import Month
from pipeline.core.catalog import Catalog
from pipeline.core.commitments import last_end
from pipeline.core.periods import to_datetime, to_micros


class OpenContainer(NamedTuple):
    """An open container, which may be of a period that was closed before."""

    id: int
    account: str
    period_end: datetime


@dataclass(frozen=True, slots=True)
class Late:
    """A closed month to be billed anew. Who paid for it then, and for whom, may pay otherwise by now."""

    month: Month
    payer: str
    #: Those on the payer's invoice of the month, itself among them.
    accounts: tuple[str, ...]


_SELECT_CONCERNED = """
SELECT unnest(%(accounts)s::text[])
UNION SELECT unnest(members) FROM billing.close_task WHERE payer = ANY(%(accounts)s) AND cardinality(members) > 1
"""


def concerned(connection: "Connection[Any]", accounts: Collection[str]) -> list[str]:
    """The accounts, and those that were on an invoice of one of them: what comes late of that month is billed there."""
    return sorted(id for (id,) in connection.execute(_SELECT_CONCERNED, {"accounts": sorted(accounts)}))


_SELECT_OPEN = "SELECT id, account, period_end FROM billing.invoice WHERE account = ANY(%s) AND state = 'open'"
# In the order of ids, as the sink takes them: whoever holds several containers took them so.
_LOCK_OPEN = f"{_SELECT_OPEN} ORDER BY id FOR NO KEY UPDATE"


def read_open(connection: "Connection[Any]", accounts: Collection[str]) -> list[OpenContainer]:
    """The accounts' open containers."""
    return [OpenContainer(*row) for row in connection.execute(_SELECT_OPEN, [sorted(accounts)])]


def lock_open(connection: "Connection[Any]", accounts: Collection[str]) -> list[OpenContainer]:
    """Hold all open containers of the accounts until the transaction ends, and no others: these may be closed.

    The sink may make a further one any time, which has a higher id; its usage is for the next document. Call it before
    ``statements.hold``: a container of a month before may come behind the month's own, and two that take them in
    different orders wait for each other.
    """
    return [OpenContainer(*row) for row in connection.execute(_LOCK_OPEN, [sorted(accounts)])]


_SELECT_CLOSED = """
SELECT task.payer, run.month, task.members
FROM billing.close_task AS task JOIN billing.close_run AS run ON run.id = task.run_id
WHERE task.payer = ANY(%s) AND run.month = ANY(%s) AND task.outcome IN ('issued', 'nothing', 'no_contract')
ORDER BY task.outcome = 'no_contract', run.id
"""
_SELECT_WAITING = """
SELECT account, period_end FROM billing.document
WHERE account = ANY(%s) AND kind = 'invoice' AND state IN ('draft', 'reviewed')
"""


def late_months(
    connection: "Connection[Any]",
    catalog: Catalog,
    members: Mapping[str, Collection[str]],
    opened: Iterable[OpenContainer],
    *,
    before: Month | None = None,
) -> dict[str, list[Late]]:
    """Months that were closed and come out differently by now, by payer, the earliest first; those ``before`` a month.

    A month whose invoice waits for review or for its issue is not closed yet. ``members``: of each payer the accounts
    on its invoice now, itself among them; it is asked for what these were billed as payers then. ``opened``: of the
    ``concerned`` accounts. No statement where nothing is late.
    """
    late = {(one.account, month_of(catalog, one.account, one.period_end)) for one in opened}
    late |= settling(connection, catalog, late)
    if before is not None:
        late = {one for one in late if _order(one[1]) < _order(before)}
    return as_billed(connection, catalog, members, late)


def as_billed(
    connection: "Connection[Any]",
    catalog: Catalog,
    members: Mapping[str, Collection[str]],
    late: Collection[tuple[str, Month]],
) -> dict[str, list[Late]]:
    """Accounts' months as they were closed, by who pays for it now; without those that were not closed, or wait."""
    if not late:
        return {}
    pays_now = {account: payer for payer, accounts in members.items() for account in accounts}
    asked = sorted(pays_now), sorted({str(month) for _, month in late})
    waiting = {(payer, month_of(catalog, payer, end)) for payer, end in connection.execute(_SELECT_WAITING, [asked[0]])}
    paid_by: dict[tuple[str, Month], str] = {}
    for payer, named, accounts in connection.execute(_SELECT_CLOSED, asked):
        month = Month.parse(named)
        for account in accounts if (payer, month) not in waiting else ():
            paid_by.setdefault((account, month), payer)
    found: defaultdict[str, list[Late]] = defaultdict(list)
    for payer, month in sorted({(paid_by[one], one[1]) for one in late if one in paid_by}, key=_payer_order):
        accounts = tuple(sorted(account for (account, of), by in paid_by.items() if (by, of) == (payer, month)))
        found[pays_now[payer]].append(Late(month, payer, accounts))
    return {payer: sorted(months, key=lambda one: _order(one.month)) for payer, months in found.items()}


def settling(
    connection: "Connection[Any]", catalog: Catalog, late: Collection[tuple[str, Month]]
) -> set[tuple[str, Month]]:
    """Later months, at whose end a commitment is settled that what was used in these months counts toward."""
    promised = promising(connection, {account for account, _ in late})
    found = set()
    for account, month in late:
        zone = catalog.accounts[account].time_zone if account in promised else "UTC"
        commitments = [one for _, one in commitments_until(connection, catalog, account)] if account in promised else []
        for period in catalog.periods_ending(account, month.period_in(zone)):
            for one in commitments:
                end_us = period.end_us if one.end_us is None else min(period.end_us, one.end_us)
                if end_us <= max(period.start_us, one.start_us):
                    continue
                settled_us = last_end(one, zone, end_us - 1)
                if settled_us > period.end_us:
                    ends = (later.end_us for later in catalog.periods_at(account, settled_us - 1))
                    found |= {(account, month_of(catalog, account, to_datetime(end_us))) for end_us in ends}
    return found


def _payer_order(one: tuple[str, Month]) -> tuple[str, tuple[int, int]]:
    return one[0], _order(one[1])


def _order(month: Month) -> tuple[int, int]:
    return month.year, month.month


def month_of(catalog: Catalog, account: str, end: datetime) -> Month:
    """The month that a period's last instant lies in, by the account's clock."""
    known = catalog.accounts.get(account)
    zone = ZoneInfo(known.time_zone if known else "UTC")
    last = to_datetime(to_micros(end) - 1).astimezone(zone)
    return Month(last.year, last.month)
