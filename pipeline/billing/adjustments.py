"""Adjustments: a month that was billed comes out differently, since usage of it came, or was taken back, later.

What came stands in open supplements of the month (``pipeline.billing.lines``). The whole month is priced anew over all
its containers, with the versions valid at each event's time, and goes through discounts and tax once more as its own
invoice did: its tax date, the rates and the coupons that counted then. What comes out, less what was booked for it, is
billed: of each line that changed, a reversal of what was billed and a new line that links to it.

These lines are finished: they go on the account's next invoice (``core.invoice.build(settled=...)``) beside its own,
and no tier, minimum, commitment or coupon of that one sees them. Where no invoice follows, they are a document of their
own.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing import line_taxes
from pipeline.billing.close_entries import CloseEntry
from pipeline.billing.commitments import commitment_dues, promising
from pipeline.billing.composing import line_columns
from pipeline.billing.credits import held
from pipeline.billing.documents import NewLine
from pipeline.billing.invoicing_store import Invoicing, load, mark
from pipeline.billing.reckoning import Basis, item_id, item_of, reckon
from pipeline.billing.rerate import Month, price_period
from pipeline.billing.rerate import differences as entries_of
from pipeline.billing.statements import (
    AccountPeriod,
    Booked,
    Container,
    Difference,
    Due,
    Key,
    dues,
    hold,
    read_booked,
)
from pipeline.billing.unit_credits import UnitDraw, Units
from pipeline.core.catalog import Catalog
from pipeline.core.credit_notes import reversal
from pipeline.core.credits import Grant, minor_step
from pipeline.core.discounts import Coupon, line_discounts, usable
from pipeline.core.invoice import Line
from pipeline.core.money import AMOUNT_DECIMALS, Micros, Minor, scaled
from pipeline.core.parties import Customer
from pipeline.core.periods import Period, format_instant, to_datetime, to_micros
from pipeline.core.rerating import ClosedPeriod


class NotAdjustable(ValueError):
    """A closed month cannot be billed anew as it stands: says what stands in the way, and what to do."""


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What a payer's closed month is billed differently, with one legal entity, in one currency."""

    payer: str
    legal_entity: str
    currency: str
    month: Month
    #: The month by the payer's clock.
    period: Period
    #: The month's own invoice; None where nothing was billed then.
    original: int | None
    tax_date: date
    #: Reversals and new lines, as ``reckoning.reckon(settled=...)`` takes them.
    lines: tuple[tuple[Line, NewLine], ...]
    #: What the month's open supplements lack to stand at the closing prices, with the account: book it. Containers hold
    #: what several sellers bill, so of a month's adjustments the first one in a currency has them, and its containers.
    entries: tuple[tuple[str, CloseEntry], ...]
    #: Open containers that are billed with it: set them to issued with the document.
    containers: tuple[int, ...]
    #: What the month draws from unit credits beyond what it drew before, or gives back: book it with the entries.
    units: tuple[UnitDraw, ...]
    #: Net credits that its own invoice drew and that the month does not need any more, by grant.
    unneeded_credits: dict[int, Minor]

    @property
    def total(self) -> Minor:
        """What it comes to, with tax; below 0 is the customer's."""
        return sum(line.total for line, _ in self.lines)


# -- which months


class OpenContainer(NamedTuple):
    """An open container, which may be of a period that was closed before."""

    id: int
    account: str
    period_end: datetime


@dataclass(frozen=True, slots=True)
class Late:
    """A closed month with open containers. Who paid for it then, and for whom, may pay otherwise by now."""

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
    """Months that were closed and have open containers, by payer, the earliest first; only those ``before`` a month.

    A month whose invoice waits for review or for its issue is not closed yet. ``members``: of each payer the accounts
    on its invoice now, itself among them; it is asked for what these were billed as payers then. ``opened``: of the
    ``concerned`` accounts. No statement where nothing is late.
    """
    late = {(one.account, month_of(catalog, one.account, one.period_end)) for one in opened}
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


# -- a month anew


def restate(
    connection: "Connection[Any]",
    catalog: Catalog,
    late: Late,
    opened: Iterable[OpenContainer],
    units: Units | None = None,
) -> list[Adjustment]:
    """What a closed month is billed differently, by legal entity and currency. Writes nothing.

    For a transaction that holds the accounts' open containers, ``opened`` (``lock_open``), and the payer's grants.
    Nothing to bill is an Adjustment without lines, whose entries and containers are settled all the same.

    The month has the unit credits it drew, and of those that count at its events' time what is left by now. ``units``
    goes on with what it leaves of them; None: nothing else is reckoned in the transaction.

    Raises NotAdjustable for usage that has no price, and for a legal entity or customer that is not known.
    """
    payer, month = late.payer, late.month
    closable = {one.id for one in opened}
    seen = look(connection, catalog, payer, late.accounts, month, units or Units(connection, late.accounts))
    originals = _originals(connection, payer, seen.period)
    found: list[Adjustment] = []
    for place in sorted(seen.owed.keys() | seen.standing.keys()):
        parts = seen.parts(place)
        for number, (part, owed, standing) in enumerate(parts, 1):
            is_first = all(one.currency != place.currency for one in found)
            original = next((one for one in originals.get(place, ()) if part in (None, one.period)), None)
            basis = _basis(connection, catalog, payer, place, month, original)
            if number == len(parts):
                # What a window that goes on adds is settled anew with every later invoice.
                promised = [due for due in committed(connection, catalog, seen, place, basis) if seen.is_over(due)]
                owed = [*owed, *promised]
                standing = [*standing, *seen.committed_before(place, promised)]
            lines, drawn = restated(owed, standing, basis, place.currency, original)
            found.append(
                Adjustment(
                    payer=payer,
                    legal_entity=place.legal_entity,
                    currency=place.currency,
                    month=month,
                    period=seen.period,
                    original=None if original is None else original.id,
                    tax_date=basis.tax_date,
                    lines=tuple(lines),
                    entries=seen.entries_in(place.currency) if is_first else (),
                    containers=seen.open_in(place.currency, closable) if is_first else (),
                    units=seen.units_in(place.currency) if is_first else (),
                    unneeded_credits=_unneeded(basis.grants, drawn, place.currency),
                )
            )
    return found


class Place(NamedTuple):
    """What a document is of: a payer has one per month."""

    legal_entity: str
    currency: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A payer's month as it stands: what is owed for it by today's catalog, and what was billed and still stands."""

    #: By the payer's clock.
    period: Period
    #: The accounts' billing periods that end in the month.
    periods: tuple[AccountPeriod, ...]
    #: What usage and fees come to; commitments are reckoned on it (``committed``).
    owed: Mapping[Place, Sequence[Due]]
    standing: Mapping[Place, Sequence[Booked]]
    #: The period that each due of these is owed for.
    period_of: Mapping[Key, Period]
    #: What open containers lack to stand at their closing prices.
    entries: tuple[tuple[str, CloseEntry], ...]
    containers: tuple[Container, ...]
    #: What the accounts draw from unit credits beyond what they drew before.
    units: tuple[UnitDraw, ...]

    def units_in(self, currency: str) -> tuple[UnitDraw, ...]:
        return tuple(one for one in self.units if one.currency == currency)

    def entries_in(self, currency: str) -> tuple[tuple[str, CloseEntry], ...]:
        return tuple(one for one in self.entries if one[1].terms.currency == currency)

    def standing_for(self, place: Place, owed: Iterable[Due]) -> list[Booked]:
        """What was billed and is owed, or is no longer: all but what commitments added that are not looked at."""
        used = [one for one in self.standing.get(place, ()) if one.key.kind != "commitment"]
        return [*used, *self.committed_before(place, owed)]

    def committed_before(self, place: Place, owed: Iterable[Due]) -> list[Booked]:
        """What was billed for the commitments among these."""
        keys = {due.key for due in owed}
        return [one for one in self.standing.get(place, ()) if one.key.kind == "commitment" and one.key in keys]

    def parts(self, place: Place) -> list[tuple[Period | None, list[Due], list[Booked]]]:
        """What is owed and stands, but for commitments, by the invoice that it is on, with the period of that one.

        An account that is billed alone has an invoice for each of its periods; any other payer one, here of None.
        """
        owed, standing = list(self.owed.get(place, ())), self.standing_for(place, ())
        periods = list(dict.fromkeys(of.period for of in self.periods))
        if len(periods) < 2 or len({of.account for of in self.periods}) > 1:
            return [(None, owed, standing)]
        of_contract = {key.contract: period for key, period in self.period_of.items()}

        def period_of(key: Key) -> Period:
            found = self.period_of.get(key) or of_contract.get(key.contract)
            return found or next(one for one in periods if one.start_us <= key.segment_start_us < one.end_us)

        return [
            (
                period,
                [due for due in owed if period_of(due.key) == period],
                [one for one in standing if period_of(one.key) == period],
            )
            for period in periods
        ]

    def is_over(self, due: Due) -> bool:
        """Whether its service period ended with the month."""
        ends = {of.account: of.period.end_us for of in self.periods}
        return due.service.end_us <= ends[due.key.account]

    def open_in(self, currency: str, closable: Collection[int]) -> tuple[int, ...]:
        """Of the open containers those that are held: usage may come to others while this is reckoned."""
        return tuple(
            one.id for one in self.containers if one.state == "open" and one.currency == currency and one.id in closable
        )


def look(
    connection: "Connection[Any]",
    catalog: Catalog,
    payer: str,
    accounts: Collection[str],
    month: Month,
    units: Units,
) -> Seen:
    """What a payer owes for a month and was billed for it, over all containers. Writes nothing. Raises as restate."""
    stands = hold(connection, catalog, accounts, month, lock=False)
    entities = load(connection, applied_until=mark(connection), on=date.max, accounts=())
    owed: defaultdict[Place, list[Due]] = defaultdict(list)
    period_of: dict[Key, Period] = {}
    lacking: list[tuple[str, CloseEntry]] = []
    drawn: list[UnitDraw] = []
    for of, one in stands.items():
        closed = _priced(connection, catalog, of, units.there_for(one))
        lacking += [(of.account, entry) for entry in entries_of(closed, [line.stored for line in one.lines])]
        of_account = dues(catalog, one, closed)
        drawn += units.draw(one, of_account)
        for due in of_account:
            owed[_place(payer, due, entities)].append(due)
            period_of[due.key] = of.period
    return Seen(
        period=month.period_in(catalog.accounts[payer].time_zone),
        periods=tuple(stands),
        owed=dict(owed),
        standing=_standing(connection, accounts, stands),
        period_of=period_of,
        entries=tuple(lacking),
        containers=tuple(container for one in stands.values() for container in one.containers),
        units=tuple(drawn),
    )


def committed(connection: "Connection[Any]", catalog: Catalog, seen: Seen, place: Place, basis: Basis) -> list[Due]:
    """What the accounts' spend commitments add to a month, 0 too. Raises NotAdjustable."""
    promised = promising(connection, {of.account for of in seen.periods})
    found: list[Due] = []
    for account, period in seen.periods:
        owed = [
            due
            for due in seen.owed.get(place, ())
            if due.key.account == account and period.start_us <= due.key.segment_start_us < period.end_us
        ]
        if account not in promised or not owed:
            continue
        of_item = {item_id(due.key): due.key for due in owed}
        off: defaultdict[Key, Minor] = defaultdict(int)
        items = [item_of(due, basis.customer) for due in owed]
        for discount in line_discounts(items, basis.coupons, place.currency):
            off[of_item[discount.line or ""]] += discount.amount
        zone = catalog.accounts[account].time_zone
        try:
            found += commitment_dues(
                connection,
                account,
                zone,
                period,
                owed,
                off,
                legal_entity=place.legal_entity,
                currency=place.currency,
            )
        except ValueError as error:
            raise NotAdjustable(f"{account}: {error}") from error
    return found


def _place(payer: str, due: Due, entities: Invoicing) -> Place:
    entity = entities.legal_entity(due.legal_entity)
    if entity is None:
        raise NotAdjustable(
            f"{payer} bills with legal entity {due.legal_entity!r}, which is not known: `tally invoicing apply`"
        )
    return Place(entity.id, due.currency)


@dataclass(frozen=True, slots=True)
class Original:
    """A month's own invoice, and until when its legal entity, customer, taxes and coupons had been applied."""

    id: int
    number: str
    period: Period
    issue_date: date
    tax_date: date
    applied_until: datetime


def restated(
    owed: Sequence[Due], standing: Iterable[Booked], basis: Basis, currency: str, original: Original | None
) -> tuple[list[tuple[Line, NewLine]], dict[str, Minor]]:
    """The lines that bring a billed month to what is owed for it, and what it draws of each net credit. Pure.

    The month is reckoned as a whole, since a discount on all of it, or a tax rounded over all of it, may move a line
    whose own usage did not change. A fee that an earlier invoice billed in advance is no part of that while it stands.
    """
    before: defaultdict[Key, list[Booked]] = defaultdict(list)
    for one in standing:
        before[one.key].append(one)
    own = [due for due in owed if not due.is_nothing and not _billed_ahead(before.get(due.key, ()), due, original)]
    whole = reckon([Difference((), due) for due in own], basis, currency=currency)
    moved: list[tuple[list[Booked], tuple[Line, NewLine] | None]] = []
    for due, line, row in zip(own, whole.document.lines, whole.lines, strict=True):
        lines = before.pop(due.key, [])
        if not (len(lines) == 1 and _is_same(lines[0], due, line)):
            moved.append((lines, (line, row)))
    kept = {due.key for due in owed if not due.is_nothing}
    moved += [(lines, None) for key, lines in before.items() if key not in kept]
    found: list[tuple[Line, NewLine]] = []
    for lines, new in moved:
        found += (_taken_back(one, currency) for one in lines)
        if new is not None:
            found.append(_billed_anew(*new, lines, original))
    drawn: defaultdict[str, Minor] = defaultdict(int)
    for draw in whole.document.draws:
        if draw.line is not None:
            drawn[draw.grant] += draw.amount
    return found, dict(drawn)


def _billed_ahead(lines: Sequence[Booked], due: Due, original: Original | None) -> bool:
    """Whether a fee stands as an earlier document billed it in advance."""
    if due.key.kind != "fee" or len(lines) != 1 or (original is not None and lines[0].document_id == original.id):
        return False
    return lines[0].kind == "fee" and (lines[0].quantity, lines[0].line.exact) == (due.quantity, due.exact_amount)


def _is_same(booked: Booked, due: Due, line: Line) -> bool:
    was = booked.line
    return (booked.quantity, was.exact, was.amount, was.discount, was.net, was.tax) == (
        due.quantity,
        line.exact,
        line.amount,
        line.discount,
        line.net,
        line.tax,
    )


def _taken_back(booked: Booked, currency: str) -> tuple[Line, NewLine]:
    line = reversal(booked.line, f"reversal of {booked.document_line_id}")
    key = booked.key
    row = NewLine(
        kind="adjustment",
        account=key.account,
        charge=key.charge,
        service=booked.service,
        segment_start_us=key.segment_start_us,
        quantity=-booked.quantity,
        **line_columns(line),
        tax_category=booked.tax_category,
        unit=booked.unit,
        contract=key.contract,
        plan=booked.plan,
        plan_version=booked.plan_version,
        price_version=key.price_version,
        meter=booked.meter,
        cell=key.cell,
        line_id=booked.line_id,
        adjusts_id=booked.document_line_id,
        role="reversal",
        detail={
            **booked.detail,
            "taxes": line_taxes.as_json(line.taxes, currency),
            "parts": [],
            "adjusts": {"kind": key.kind, "number": booked.number},
        },
    )
    return line, row


def _billed_anew(
    line: Line, row: NewLine, taken_back: Sequence[Booked], original: Original | None
) -> tuple[Line, NewLine]:
    kind = "commitment" if row.kind == "commitment" else "usage" if row.meter else "fee"
    number = taken_back[0].number if taken_back else original.number if original else ""
    anew = replace(
        row,
        kind="adjustment",
        adjusts_id=taken_back[0].document_line_id if taken_back else None,
        detail={**row.detail, "adjusts": {"kind": kind, "number": number}},
    )
    return replace(line, id=f"adjustment {line.id}"), anew


def _unneeded(grants: Iterable[Grant], drawn: Mapping[str, Minor], currency: str) -> dict[int, Minor]:
    step = minor_step(currency)
    left = {int(grant.id): grant.amount // step - drawn.get(grant.id, 0) for grant in grants}
    return {grant: amount for grant, amount in left.items() if amount > 0}


def _priced(
    connection: "Connection[Any]", catalog: Catalog, of: AccountPeriod, grants: Sequence[Grant]
) -> ClosedPeriod:
    """A period at its closing prices, from its events: late ones may have come under other prices than the first."""
    try:
        closed = price_period(connection, catalog, of.account, of.period, grants=grants)
    except ValueError as error:
        raise NotAdjustable(f"{of.account}: {error}") from error
    if closed.refused:
        use, rejection = closed.refused[0]
        raise NotAdjustable(
            f"{of.account}/{use.key} of {format_instant(use.at_us)} was billed and has no price by today's catalog: "
            f"{rejection.message}. Publish what is missing, or void it"
        )
    return closed


# -- what was billed, and how


def _standing(
    connection: "Connection[Any]", accounts: Collection[str], periods: Iterable[AccountPeriod]
) -> dict[Place, list[Booked]]:
    """What was billed for service in these periods and still stands, and for commitments of that time."""
    bounds: defaultdict[str, list[Period]] = defaultdict(list)
    for of in periods:
        bounds[of.account].append(of.period)
    since_us = min((period.start_us for of in bounds.values() for period in of), default=0)
    found: defaultdict[Place, list[Booked]] = defaultdict(list)
    for one in read_booked(connection, accounts, since_us):
        # A commitment's window may have begun before.
        if one.key.kind == "commitment" or any(
            period.start_us <= one.key.segment_start_us < period.end_us for period in bounds[one.key.account]
        ):
            found[Place(one.legal_entity, one.currency)].append(one)
    return found


_SELECT_ORIGINALS = """
SELECT document.legal_entity, document.currency, document.id, document.number, document.period_start,
    document.period_end, document.issue_date, document.tax_date, coalesce(run.invoicing_mark, document.issued_at)
FROM billing.document LEFT JOIN billing.close_run AS run ON run.id = document.run_id
WHERE document.account = %s AND document.kind = 'invoice' AND document.state = 'issued'
    AND document.period_end > %s AND document.period_end <= %s
ORDER BY document.id DESC
"""


def _originals(connection: "Connection[Any]", payer: str, month: Period) -> dict[Place, list[Original]]:
    """The payer's own invoices of the month, the last one first."""
    bounds = [payer, to_datetime(month.start_us), to_datetime(month.end_us)]
    found: defaultdict[Place, list[Original]] = defaultdict(list)
    for entity, currency, id, number, start, end, *rest in connection.execute(_SELECT_ORIGINALS, bounds):
        period = Period(to_micros(start), to_micros(end))
        found[Place(entity, currency)].append(Original(id, number, period, *rest))
    return found


def _basis(
    connection: "Connection[Any]",
    catalog: Catalog,
    payer: str,
    place: Place,
    month: Month,
    original: Original | None,
) -> Basis:
    """As the month's own invoice was reckoned; where there was none, as it would have been, by what is known now."""
    zone = catalog.accounts[payer].time_zone
    period = month.period_in(zone)
    tax_date = original.tax_date if original else _day(period.end_us - 1, zone)
    known = load(
        connection,
        applied_until=original.applied_until if original else mark(connection),
        on=tax_date,
        accounts=[payer],
    )
    entity, customer = known.legal_entity(place.legal_entity), known.customers.get(payer)
    if entity is None or customer is None:
        missing = f"legal entity {place.legal_entity!r}" if entity is None else f"customer {payer!r}"
        raise NotAdjustable(f"expected {missing} to be known on {tax_date}: `tally invoicing apply`")
    return Basis(
        entity,
        customer,
        known.taxes,
        tax_date,
        coupons=coupons_of(
            connection,
            payer,
            to_datetime(original.period.start_us if original else period.start_us),
            zone,
            known,
            customer,
            place.currency,
        ),
        grants=_net_grants(connection, payer, place.currency, original) if original else (),
    )


def _day(at_us: Micros, zone: str) -> date:
    return to_datetime(at_us).astimezone(ZoneInfo(zone)).date()


_SELECT_USES = """
SELECT coupon, count(DISTINCT period_start) FROM billing.coupon_use
WHERE account = %s AND period_start < %s GROUP BY coupon
"""


def coupons_of(
    connection: "Connection[Any]",
    payer: str,
    start: datetime,
    time_zone: str,
    known: Invoicing,
    customer: Customer,
    currency: str,
) -> list[Coupon]:
    """The coupons that counted for an invoice by its period's start: later uses do not take them away from it."""
    used = dict(connection.execute(_SELECT_USES, [payer, start]).fetchall())
    return usable(customer.coupons, known.coupons, used, start.astimezone(ZoneInfo(time_zone)).date(), currency)


# What a credit note gave back is a gift beside it: the month's own discount stays.
_SELECT_NET = """
SELECT entry.grant_id::text, sum(entry.amount) FROM billing.credit_entry AS entry
JOIN billing.credit_grant AS given ON given.id = entry.grant_id
WHERE entry.document_id = %s AND given.reduces = 'net' AND (entry.amount > 0 OR entry.note NOT LIKE 'credit note %%')
GROUP BY entry.grant_id HAVING sum(entry.amount) > 0
"""


def _net_grants(connection: "Connection[Any]", payer: str, currency: str, original: Original) -> list[Grant]:
    """Net credits that the month's own invoice drew: they go on paying for it, and for no more."""
    drawn = dict(connection.execute(_SELECT_NET, [original.id]).fetchall())
    if not drawn:
        return []
    grants = {one.grant.id: one.grant for one in held(connection, [payer])}
    return [replace(grants[id], amount=scaled(amount, AMOUNT_DECIMALS)) for id, amount in drawn.items() if id in grants]
