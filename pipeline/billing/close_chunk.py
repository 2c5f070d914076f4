"""Closing some payers in one transaction: from what their containers hold to issued documents.

Payers share a transaction, for speed: one commit, one statement for all their rows. It is as safe as one each. Whatever
fails takes back all of them, numbers too, and they are then closed one by one (``pipeline.billing.close``), so a payer
that cannot be closed stands in nobody's way; and what can be foreseen to fail (no price, no tax rate, no customer) is
found before anything of that payer is written.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import queue
from pipeline.billing.adjustments import (
    Adjustment,
    Late,
    OpenContainer,
    concerned,
    late_months,
    lock_open,
    read_open,
    restate,
)
from pipeline.billing.close_entries import CloseEntry, book_all
from pipeline.billing.close_money import Money, Wallet, coupon_uses, read_money, read_uses_of, roll_over_ended, settle
from pipeline.billing.commitments import commitment_dues, promising
from pipeline.billing.documents import (
    Converted,
    NewDocument,
    NewLine,
    ToIssue,
    delete_drafts,
    issue,
    issue_date,
    write_drafts,
)
from pipeline.billing.fx_rates import published as published_rates
from pipeline.billing.given_back import give_back
from pipeline.billing.invoicing_store import Invoicing, load
from pipeline.billing.notices import notices_of
from pipeline.billing.numbers import Number
from pipeline.billing.prices import read_prices, with_accounts
from pipeline.billing.queue import Done, Outcome, Run, Task
from pipeline.billing.reckoning import Basis, Reckoned, compose, item_id, item_of, reckon
from pipeline.billing.rerate import Month
from pipeline.billing.rerate import differences as entries_of
from pipeline.billing.statements import (
    AccountPeriod,
    Booked,
    Difference,
    Due,
    DueKind,
    Held,
    Key,
    PublishedMeter,
    differences,
    dues,
    fee_due,
    hold,
    key_of,
    make_containers,
    price,
    read_booked,
)
from pipeline.billing.unit_credits import UnitDraw, Units
from pipeline.billing.unit_credits import book as book_units
from pipeline.core import fx
from pipeline.core.catalog import Catalog
from pipeline.core.discounts import line_discounts, usable
from pipeline.core.fees import due_in_advance
from pipeline.core.invoice import Line
from pipeline.core.money import Minor, minor_units
from pipeline.core.periods import Period, to_datetime, to_micros


class Step(StrEnum):
    """Steps of a chunk's transaction, in order; tests end the process after each."""

    TAKEN = "taken"
    HELD = "held"
    RECKONED = "reckoned"
    ENTRIES_BOOKED = "entries_booked"
    DOCUMENTS_WRITTEN = "documents_written"
    MONEY_SETTLED = "money_settled"
    CONTAINERS_CLOSED = "containers_closed"
    TASKS_MARKED = "tasks_marked"
    NUMBERED = "numbered"
    COMMITTED = "committed"


#: Is told each step as it is done.
Reached: TypeAlias = Callable[[Step], None]


def ignore(_: Step) -> None:
    """Nobody is told."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a run is closed with, the same for all of its payers: read once, however many there are."""

    run: Run
    month: Month
    #: Meters, plans and price lists as they stood when the run began; accounts are added chunk by chunk.
    prices: Catalog
    meters: tuple[PublishedMeter, ...]


_SELECT_METERS = """
SELECT id, valid_from, published_at FROM billing.catalog_version WHERE kind = 'meter'
"""


def read_known(connection: "Connection[Any]", run: Run) -> Known:
    """What a run is closed with. Raises ValueError for a version this program cannot read."""
    prices = Catalog.empty().extend(read_prices(connection, until=run.catalog_seq), 0)
    meters = tuple(
        PublishedMeter(id, to_micros(valid_from), to_micros(published_at))
        for id, valid_from, published_at in connection.execute(_SELECT_METERS)
    )
    return Known(run, Month.parse(run.month), prices, meters)


class Group(NamedTuple):
    """What makes one document of a payer: one seller, one currency, one period."""

    legal_entity: str
    currency: str
    period: Period


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document that was reckoned, and what it is issued with."""

    payer: str
    basis: Basis
    reckoned: Reckoned
    document: NewDocument
    shown_as: Converted | None
    #: A container of it, for credits that pay the whole document.
    container: int | None


@dataclass(slots=True)
class Payer:
    """A payer on the way to its documents. With a problem nothing of it is written."""

    task: Task
    #: What the containers lack to stand at their closing prices, by account.
    entries: list[tuple[str, CloseEntry]] = field(default_factory=list)
    #: Open containers, to be closed with it.
    containers: list[int] = field(default_factory=list)
    #: Periods that were closed before, and that wait to be issued.
    closed: int = 0
    reviewed: int = 0
    documents: list[Prepared] = field(default_factory=list)
    #: Earlier invoices whose months need less of their net credits now, with these: by grant, in smallest units.
    unneeded: list[tuple[int, str, dict[int, Minor]]] = field(default_factory=list)
    #: What its accounts draw from unit credits.
    units: list[UnitDraw] = field(default_factory=list)
    problem: str | None = None

    @property
    def waits(self) -> bool:
        """Whether its documents wait for somebody to look at them: then nothing else of it is written."""
        return any(one.basis.entity.review for one in self.documents)


def close_tasks(
    connection: "Connection[Any]",
    known: Known,
    tasks: Sequence[Task],
    *,
    now: datetime,
    actor: str,
    reached: Reached = ignore,
) -> list[Done]:
    """Close payers that were taken in this transaction (``queue.claim``), all in it.

    1. Make the containers that are missing, then hold all, in the sink's order; then what pays: credits, balances.
    2. Price them, and reckon their documents. Nothing is written until here but empty containers.
    3. Book close entries.
    4. Write documents as drafts, with lines, taxes and discounts.
    5. Settle credits, and what is carried forward.
    6. Close the containers. Of a seller that wants to look at its documents first they stay open, and these drafts.
    7. Mark the tasks done.
    8. Number and issue the documents: last, since from here to the commit others wait for their numbers.

    ``now``: aware, the time of issue. Raises psycopg.Error; then nothing is written.
    """
    # Step 1.
    accounts = sorted({member for task in tasks for member in task.members})
    billed = concerned(connection, accounts)
    catalog = with_accounts(connection, known.prices, billed, until=known.run.catalog_seq)
    make_containers(connection, catalog, accounts, known.month)
    opened = lock_open(connection, billed)
    held = hold(connection, catalog, accounts, known.month, lock=True)
    roll_over_ended(connection, catalog, accounts, now, actor)
    money = read_money(connection, billed, lock=True)
    reached(Step.HELD)
    # Step 2.
    payers = reckon_payers(connection, known, catalog, tasks, held, opened, money, now=now, actor=actor)
    good = [payer for payer in payers if payer.problem is None]
    issuing = [payer for payer in good if not payer.waits]
    reached(Step.RECKONED)
    # Step 3.
    lines = book_entries(connection, issuing, known.run, actor)
    reached(Step.ENTRIES_BOOKED)
    # Step 4.
    waiting = {payer.task.payer for payer in good if payer.waits}
    written = write(connection, good, lines, known.month)
    to_issue = [(id, one) for id, one in written if one.payer not in waiting]
    reached(Step.DOCUMENTS_WRITTEN)
    # Step 5.
    settle_money(connection, issuing, to_issue, lines, known.run, actor)
    reached(Step.MONEY_SETTLED)
    # Step 6.
    move_containers(connection, [id for payer in issuing for id in payer.containers], "issued")
    reached(Step.CONTAINERS_CLOSED)
    # Step 7.
    done = [_done(payer) for payer in payers]
    queue.mark(connection, known.run.id, done)
    reached(Step.TASKS_MARKED)
    # Step 8.
    drafts = [ToIssue(id, one.document.kind, one.basis.entity, one.shown_as) for id, one in to_issue]
    numbers = issue(connection, drafts, now=now, actor=actor)
    _audit(connection, to_issue, numbers, known.run, actor)
    reached(Step.NUMBERED)
    return done


def preview_tasks(
    connection: "Connection[Any]", known: Known, tasks: Sequence[Task], *, now: datetime, actor: str
) -> list[Payer]:
    """What ``close_tasks`` would write for these payers now, without writing or holding anything."""
    accounts = sorted({member for task in tasks for member in task.members})
    billed = concerned(connection, accounts)
    catalog = with_accounts(connection, known.prices, billed, until=known.run.catalog_seq)
    opened = read_open(connection, billed)
    held = hold(connection, catalog, accounts, known.month, lock=False)
    money = read_money(connection, accounts, lock=False)
    return reckon_payers(connection, known, catalog, tasks, held, opened, money, now=now, actor=actor)


# Step 2: what documents there are to be -----------------------------------------------------------------------------


def reckon_payers(
    connection: "Connection[Any]",
    known: Known,
    catalog: Catalog,
    tasks: Sequence[Task],
    held: Mapping[AccountPeriod, Held],
    opened: Sequence[OpenContainer],
    money: Money,
    *,
    now: datetime,
    actor: str,
) -> list[Payer]:
    """Price payers and reckon their documents, in the order of the tasks; writes nothing.

    ``opened``: open containers of the accounts that are ``adjustments.concerned``; these may be closed.
    """
    periods: defaultdict[str, list[Held]] = defaultdict(list)
    for one in held.values():
        periods[one.account].append(one)
    members = [member for task in tasks for member in task.members]
    months = {member: _month_of(catalog, member, known.month) for member in members}
    starts = [one.period.start_us for one in held.values()] + [month.start_us for month in months.values()]
    booked: defaultdict[str, list[Booked]] = defaultdict(list)
    for line in read_booked(connection, members, min(starts)):
        booked[line.key.account].append(line)
    promised = promising(connection, members)
    drafts = [_Draft(Payer(task)) for task in tasks]
    late = late_months(connection, catalog, {task.payer: task.members for task in tasks}, opened, before=known.month)
    units = Units(connection, members)
    for draft in drafts:
        # Before the month itself: credits are drawn in order of time.
        for month in late.get(draft.payer.task.payer, ()):
            _adjust(connection, catalog, draft, month, opened, units)
        _bill_month(connection, known, catalog, draft, periods, booked, promised, units)
    setting = _Setting(connection, known, catalog, money, now, actor)
    setting.load(drafts)
    for draft in drafts:
        if draft.payer.problem is None:
            try:
                setting.prepare(draft)
            except ValueError as error:  # what a person has to settle: this payer's trouble, not that of the others
                draft.payer.problem = str(error)
    return [draft.payer for draft in drafts]


@dataclass(slots=True)
class _Draft:
    """A payer and what is left to bill of it, document by document."""

    payer: Payer
    groups: dict[Group, list[Difference]] = field(default_factory=dict)
    containers: dict[Group, int] = field(default_factory=dict)
    #: The payer's period; of one without any, the month.
    period: Period | None = None
    #: The periods that are closed, by account.
    periods: dict[str, tuple[Period, ...]] = field(default_factory=dict)
    #: Accounts that promised to spend, with what they owe, and what was booked for it before.
    promising: list[tuple["_Owed", list[Booked]]] = field(default_factory=list)
    #: What closed months are billed differently, for the last document with the same seller and currency.
    adjustments: list[Adjustment] = field(default_factory=list)


def _bill_month(
    connection: "Connection[Any]",
    known: Known,
    catalog: Catalog,
    draft: _Draft,
    periods: Mapping[str, Sequence[Held]],
    booked: Mapping[str, Sequence[Booked]],
    promised: Collection[str],
    units: Units,
) -> None:
    """Add what the month that is closed is billed."""
    task = draft.payer.task
    if draft.payer.problem is not None:
        return
    try:
        own = [
            _owed(connection, known, catalog, member, periods[member], draft.payer, units) for member in task.members
        ]
    except ValueError as error:
        draft.payer.problem = str(error)
        return
    whole = draft.period = _shared_period(task, periods, known, catalog)
    for member, owed in zip(task.members, own, strict=True):
        draft.periods[member] = owed.periods
        for due_period, left in _left(owed, booked[member]):
            one = left.due or left.taken_back[0]
            period = due_period if len(task.members) == 1 else whole
            group = Group(one.legal_entity, one.currency, period)
            draft.groups.setdefault(group, []).append(left)
            for container in owed.containers:
                draft.containers.setdefault(group, container)
        if member in promised:
            draft.promising.append((owed, [line for line in booked[member] if line.key.kind == "commitment"]))
            for period, due in owed.dues:  # it may owe for what it did not use
                if period in owed.periods:
                    shown = period if len(task.members) == 1 else whole
                    draft.groups.setdefault(Group(due.legal_entity, due.currency, shown), [])


def _adjust(
    connection: "Connection[Any]",
    catalog: Catalog,
    draft: _Draft,
    late: Late,
    opened: Sequence[OpenContainer],
    units: Units,
) -> None:
    """Add what a closed month is billed differently, since usage of it came late."""
    payer = draft.payer
    if payer.problem is not None:
        return
    try:
        found = restate(connection, catalog, late, opened, units)
    except ValueError as error:
        payer.problem = str(error)
        return
    for one in found:
        payer.entries += one.entries
        payer.containers += one.containers
        payer.units += one.units
        if one.lines:
            draft.adjustments.append(one)
        if one.unneeded_credits and one.original is not None:
            payer.unneeded.append((one.original, one.currency, one.unneeded_credits))


@dataclass(frozen=True, slots=True)
class _Owed:
    """What an account owes of the periods that are closed now, each due with its period."""

    account: str
    month: Period
    periods: tuple[Period, ...]
    contracts: frozenset[str]
    dues: tuple[tuple[Period, Due], ...]
    containers: tuple[int, ...]
    #: Whether all of it was closed before: then nothing is left to bill, or to take back.
    was_closed: bool


def _owed(
    connection: "Connection[Any]",
    known: Known,
    catalog: Catalog,
    account: str,
    periods: Sequence[Held],
    payer: Payer,
    units: Units,
) -> _Owed:
    found: list[tuple[Period, Due]] = []
    priced: list[Period] = []
    contracts: set[str] = set()
    containers: list[int] = []
    for one in periods:
        states = {container.state for container in one.containers}
        if "reviewed" in states:
            payer.reviewed += 1
            continue
        if states & {"issued", "void"}:  # what came since, in supplements, is for adjustments
            payer.closed += 1
            continue
        closed = price(connection, catalog, one, known.meters, units.there_for(one))
        payer.entries += [(account, entry) for entry in entries_of(closed, [line.stored for line in one.lines])]
        owed = dues(catalog, one, closed)
        payer.units += units.draw(one, owed)
        found += [(one.period, due) for due in owed]
        contracts.update(segment.contract.id for segment in closed.segments)
        containers += [container.id for container in one.containers]
        priced.append(one.period)
    payer.containers += containers
    month = _month_of(catalog, account, known.month)
    last = priced[-1] if priced else month
    was_closed = bool(periods) and not priced  # and its fees in advance were billed then
    if not was_closed:
        found += [(last, fee_due(account, fee)) for fee in due_in_advance(catalog, account, month.end_us)]
    return _Owed(account, month, tuple(priced), frozenset(contracts), tuple(found), tuple(containers), was_closed)


def _left(owed: _Owed, booked: Iterable[Booked]) -> list[tuple[Period, Difference]]:
    """What is left to bill of an account, each with the period it is billed in."""
    if owed.was_closed:
        return []
    period_of = {due.key: period for period, due in owed.dues}
    last = owed.periods[-1] if owed.periods else owed.month
    concerned = [line for line in booked if line.key in period_of or _is_over(owed, line)]
    found = []
    for one in differences((due for _, due in owed.dues), concerned):
        key = one.due.key if one.due else one.taken_back[0].key
        found.append((period_of.get(key, last), one))
    return found


def _is_over(owed: _Owed, booked: Booked) -> bool:
    """Whether a line was booked of which nothing is due any more: a fee in advance, or a bill within the period."""
    if booked.kind == "fee" and booked.line_id is None:
        return booked.service.end_us > owed.month.start_us
    if booked.kind == "progress":  # of a contract that another one stands in for, too
        return bool(owed.periods) and booked.service.end_us <= owed.month.end_us
    return booked.key.contract in owed.contracts and any(
        period.start_us <= booked.service.start_us and booked.service.end_us <= period.end_us for period in owed.periods
    )


def _month_of(catalog: Catalog, account: str, month: Month) -> Period:
    known = catalog.accounts.get(account)
    return month.period_in(known.time_zone if known else "UTC")


def _shared_period(task: Task, periods: Mapping[str, Sequence[Held]], known: Known, catalog: Catalog) -> Period:
    """The period of a consolidated document: the payer's own, else from its members' first start to last end."""
    own = periods[task.payer]
    if own:
        return own[-1].period
    every = [one.period for member in task.members for one in periods[member]]
    if not every:
        return _month_of(catalog, task.payer, known.month)
    return Period(min(period.start_us for period in every), max(period.end_us for period in every))


class _Setting:
    """What documents are made with, as of their tax dates: read once for all payers of a chunk."""

    def __init__(
        self,
        connection: "Connection[Any]",
        known: Known,
        catalog: Catalog,
        money: Money,
        now: datetime,
        actor: str,
    ) -> None:
        self._connection, self._known, self._catalog = connection, known, catalog
        self._money, self._now, self._actor = money, now, actor
        self._invoicing: dict[date, Invoicing] = {}
        self._rates: dict[tuple[date, frozenset[str]], list[fx.Rate]] = {}
        self._used: dict[str, dict[str, int]] = {}

    def load(self, drafts: Iterable[_Draft]) -> None:
        payers: defaultdict[date, set[str]] = defaultdict(set)
        for draft in drafts:
            name = draft.payer.task.payer
            periods = [group.period for group in draft.groups]
            if draft.adjustments and draft.period:
                periods.append(draft.period)
            for period in periods:
                payers[self._last_day(name, period)].add(name)
        for day, accounts in payers.items():
            self._invoicing[day] = load(
                self._connection, applied_until=self._known.run.invoicing_mark, on=day, accounts=accounts
            )

    def prepare(self, draft: _Draft) -> None:
        """Reckon a payer's documents, in the order of their groups. Raises ValueError, saying what to settle."""
        name = draft.payer.task.payer
        self._check_credits(draft)
        bases = self._by_seller(draft)
        settled: defaultdict[Group, list[tuple[Line, NewLine]]] = defaultdict(list)
        for one in draft.adjustments:
            settled[self._group_for(one, draft, bases)] += one.lines
        committed: set[tuple[str, Period]] = set()  # an account's commitment is settled once, whoever sells
        taken: defaultdict[str, set[int]] = defaultdict(set)  # periods that coupons were used in, by their start
        for group in sorted(bases, key=_order):
            left, basis = draft.groups.get(group, []), self._with_coupons_left(name, group, bases[group], taken)
            if (group.currency, group.period) not in committed:
                committed.add((group.currency, group.period))
                left = [*left, *self._commitments(draft, group, basis)]
            if not left and not settled[group]:
                continue
            wallet = Wallet(name, basis.entity.id, group.currency)
            basis = replace(basis, grants=self._money.grants(wallet), balance=self._money.balance(wallet))
            uses = read_uses_of(self._connection, left, basis.grants) if basis.grants else None
            reckoned = reckon(left, basis, currency=group.currency, uses=uses, settled=settled[group])
            self._money.take(wallet, reckoned.document)
            for discount in reckoned.document.discounts:
                taken[discount.coupon].add(group.period.start_us)
            document = compose(
                reckoned,
                basis,
                kind="invoice" if left else "adjustment",
                payer=name,
                period=group.period,
                actor=self._actor,
                run_id=self._known.run.id or None,
                content={**self._names(draft.payer.task), **self._notices(draft)},
            )
            shown_as = self._convert(basis, reckoned)
            container = draft.containers.get(group)
            draft.payer.documents.append(Prepared(name, basis, reckoned, document, shown_as, container))

    def _by_seller(self, draft: _Draft) -> dict[Group, Basis]:
        """Sort what is left to bill by its sellers, who are known now; what another one billed is for him to take back.

        A contract may name no seller where there is one only, and may have gone over from one to the other.
        """
        name = draft.payer.task.payer
        bases: dict[Group, Basis] = {}
        groups: defaultdict[Group, list[Difference]] = defaultdict(list)
        containers: dict[Group, int] = {}
        for group, left in draft.groups.items():
            basis = self._basis(name, group)
            own = group._replace(legal_entity=basis.entity.id)
            bases[own] = basis
            groups[own] += ()
            places = {own}
            for one in left:
                mine = tuple(line for line in one.taken_back if line.legal_entity == own.legal_entity)
                if mine or one.due:
                    groups[own].append(Difference(mine, one.due))
                for line in one.taken_back:
                    if line.legal_entity != own.legal_entity:
                        place = own._replace(legal_entity=line.legal_entity)
                        places.add(place)
                        groups[place].append(Difference((line,), None))
            if group in draft.containers:
                containers |= dict.fromkeys(places, draft.containers[group])
        draft.groups, draft.containers = dict(groups), containers
        return {group: bases.get(group) or self._basis(name, group) for group in groups}

    def _commitments(self, draft: _Draft, group: Group, basis: Basis) -> list[Difference]:
        """What the commitments of the payer's accounts add to a document."""
        found: list[Difference] = []
        for owed, booked in draft.promising:
            for period in owed.periods:
                if len(draft.payer.task.members) == 1 and period != group.period:
                    continue
                dues = [
                    due
                    for of, due in owed.dues
                    if of == period and due.service.end_us <= period.end_us and due.currency == group.currency
                ]
                if not dues:
                    continue
                items = {item_id(due.key): due for due in dues}
                off: defaultdict[Key, int] = defaultdict(int)
                for one in line_discounts(
                    [item_of(due, basis.customer) for due in dues], basis.coupons, group.currency
                ):
                    off[items[one.line or ""].key] += one.amount
                adding = commitment_dues(
                    self._connection,
                    owed.account,
                    self._catalog.accounts[owed.account].time_zone,
                    period,
                    dues,
                    off,
                    legal_entity=group.legal_entity,
                    currency=group.currency,
                )
                keys = {due.key for due in adding}
                found += differences(adding, [line for line in booked if line.key in keys])
        return found

    def _group_for(self, one: Adjustment, draft: _Draft, bases: dict[Group, Basis]) -> Group:
        """The last document with an adjustment's seller and currency; where there is none, one of its own."""
        same = [
            group
            for group, basis in bases.items()
            if (basis.entity.id, group.currency) == (one.legal_entity, one.currency)
        ]
        if same:
            return max(same, key=_order)
        assert draft.period is not None, "set before anything is owed"
        group = Group(one.legal_entity, one.currency, draft.period)
        bases[group] = self._basis(draft.payer.task.payer, group)
        return group

    def _check_credits(self, draft: _Draft) -> None:
        """Raise ValueError for credits that this close cannot settle: better no document than one that charges them."""
        for account in draft.periods:
            if account != draft.payer.task.payer and (held := self._money.in_money(account)):
                raise ValueError(
                    f"{account} has credits of its own (grant {', '.join(held)}) but is billed with "
                    f"{draft.payer.task.payer}, whose credits pay: void them and grant them to {draft.payer.task.payer}"
                )

    def _notices(self, draft: _Draft) -> dict[str, Any]:
        """What has changed for the accounts on a document since the one before."""
        found = [
            notice
            for account, periods in draft.periods.items()
            for notice in notices_of(self._catalog, account, periods)
        ]
        unique = [notice for number, notice in enumerate(found) if notice not in found[:number]]
        return {"notices": unique} if unique else {}

    def _names(self, task: Task) -> dict[str, Any]:
        """Of a consolidated document, the names of the accounts on it."""
        if len(task.members) == 1:
            return {}
        return {"accounts": {one: self._catalog.accounts[one].name for one in task.members}}

    def _basis(self, payer: str, group: Group) -> Basis:
        tax_date = self._last_day(payer, group.period)
        invoicing = self._invoicing[tax_date]
        entity = invoicing.legal_entity(group.legal_entity)
        if entity is None:
            named = repr(group.legal_entity) if group.legal_entity else "one, since the contract names none"
            known = ", ".join(sorted(invoicing.legal_entities)) or "none"
            raise ValueError(
                f"expected legal entity {named} as of {tax_date}, got {known}: `tally invoicing apply` says who sells"
            )
        customer = invoicing.customers.get(payer)
        if customer is None:
            raise ValueError(
                f"expected {payer} as a customer with name and address as of {tax_date}, got none: "
                "`tally invoicing apply` says who buys"
            )
        first_day = self._day(payer, group.period.start_us)
        if payer not in self._used:
            self._used[payer] = coupon_uses(self._connection, payer) if customer.coupons else {}
        coupons = usable(customer.coupons, invoicing.coupons, self._used[payer], first_day, group.currency)
        return Basis(entity, customer, invoicing.taxes, tax_date, coupons)

    def _with_coupons_left(self, payer: str, group: Group, basis: Basis, taken: Mapping[str, set[int]]) -> Basis:
        """Without coupons that are used up by the payer's other documents of now, of other periods."""

        def used(coupon: str) -> int:
            return self._used[payer].get(coupon, 0) + len(taken.get(coupon, set()) - {group.period.start_us})

        left = [one for one in basis.coupons if one.uses is None or used(one.id) < one.uses]
        return basis if len(left) == len(basis.coupons) else replace(basis, coupons=left)

    def _last_day(self, payer: str, period: Period) -> date:
        """A document's tax date: the last day of its period, by the payer's clock."""
        return self._day(payer, period.end_us - 1)

    def _day(self, payer: str, at_us: int) -> date:
        account = self._catalog.accounts.get(payer)
        return to_datetime(at_us).astimezone(ZoneInfo(account.time_zone if account else "UTC")).date()

    def _convert(self, basis: Basis, reckoned: Reckoned) -> Converted | None:
        quote = shown_currency(basis, reckoned.document.currency)
        if quote is None:
            return None
        day, totals = issue_date(basis.entity, self._now), reckoned.document.totals
        rates = self._rates_of(day, frozenset((reckoned.document.currency, quote)))
        return converted(reckoned.document.currency, quote, day, rates, totals.net, totals.tax)

    def _rates_of(self, day: date, currencies: frozenset[str]) -> list[fx.Rate]:
        asked = day, currencies
        if asked not in self._rates:
            until = self._known.run.invoicing_mark
            self._rates[asked] = published_rates(self._connection, day, currencies, loaded_until=until)
        return self._rates[asked]


def shown_currency(basis: Basis, currency: str) -> str | None:
    """The currency a document is shown in beside its own; None where it is its own."""
    quote = basis.customer.document_currency or basis.entity.reporting_currency
    return None if quote == currency else quote


def converted(base: str, quote: str, day: date, rates: Iterable[fx.Rate], net: Minor, tax: Minor) -> Converted:
    """What a document comes to in another currency, at the last rate on or before its issue date. Raises fx.NoRate."""
    rate = fx.rate_on(base, quote, day, rates)
    shown = fx.convert(rate, base, net=net, tax=tax)
    return Converted(quote, rate.rate, rate.day, rate.source, shown.net, shown.tax, shown.total)


def _order(group: Group) -> tuple[str, str, int, int]:
    return group.legal_entity, group.currency, group.period.end_us, group.period.start_us


# Steps 3 to 8: writing it -------------------------------------------------------------------------------------------


def book_entries(connection: "Connection[Any]", payers: Iterable[Payer], run: Run, actor: str) -> dict[Key, int]:
    """Book what the containers lack; return the lines that were made for it, of each key the last version's."""
    entries = [entry for payer in payers for entry in payer.entries]
    ids = book_all(connection, entries, actor=actor, note=f"close of {run.month}")
    return {
        key_of(account, entry.terms): id
        for id, (account, entry) in zip(ids, entries, strict=True)
        if entry.line_id is None
    }


def _with_lines(document: NewDocument, made: Mapping[Key, int]) -> NewDocument:
    """The document with its lines linked to the container's lines that were made when their entries were booked."""
    if not made:
        return document
    lines = (
        line if line.line_id is not None else replace(line, line_id=made.get(_key_of(line))) for line in document.lines
    )
    return replace(document, lines=tuple(lines))


def _key_of(line: NewLine) -> Key:
    kind: DueKind = "usage" if line.meter else "fee"
    place = line.account, line.contract, line.price_version, line.charge, line.cell, line.segment_start_us
    return Key(kind, *place)


_SELECT_DRAFTS = """
SELECT document.id FROM billing.document JOIN billing.close_run AS run ON run.id = document.run_id
WHERE document.account = ANY(%s) AND run.month = %s AND document.state = 'draft'
"""


def _take_back_drafts(connection: "Connection[Any]", payers: Iterable[Payer], month: Month) -> None:
    """Delete the drafts that an earlier run of the month made: these documents stand in for them."""
    names = [payer.task.payer for payer in payers]
    delete_drafts(connection, [id for (id,) in connection.execute(_SELECT_DRAFTS, [names, str(month)])])


def write(
    connection: "Connection[Any]", payers: Sequence[Payer], made: Mapping[Key, int], month: Month
) -> list[tuple[int, Prepared]]:
    """Write payers' documents as drafts, in the place of earlier drafts of the month; each with its id."""
    _take_back_drafts(connection, payers, month)
    prepared = [one for payer in payers for one in payer.documents]
    ids = write_drafts(connection, [_with_lines(one.document, made) for one in prepared])
    return list(zip(ids, prepared, strict=True))


def settle_money(
    connection: "Connection[Any]",
    payers: Iterable[Payer],
    documents: Sequence[tuple[int, Prepared]],
    made: Mapping[Key, int],
    run: Run,
    actor: str,
) -> None:
    """Book what documents draw and carry forward, and give back what earlier months need less of their credits now."""
    note = f"close of {run.month}"
    settle(connection, documents, made, actor=actor, note=note)
    for payer in payers:
        book_units(connection, payer.units, made, actor=actor, note=note)
        for original, currency, net in payer.unneeded:
            give_back(connection, original, currency, net=net, total=0, actor=actor, note=note)


_MOVE_CONTAINERS = """
UPDATE billing.invoice SET state = %s::billing.invoice_state WHERE id = ANY(%s) AND state IN ('open', 'draft')
"""


def move_containers(connection: "Connection[Any]", ids: Sequence[int], state: Literal["reviewed", "issued"]) -> None:
    """Close open containers, which are held: what comes now is for a supplement."""
    moved = connection.execute(_MOVE_CONTAINERS, [state, list(ids)]).rowcount
    if moved != len(ids):
        raise AssertionError(f"expected {len(ids)} open containers, which are held, got {moved}")


def _done(payer: Payer) -> Done:
    name, documents = payer.task.payer, len(payer.documents)
    if payer.problem is not None:
        return Done(name, None, problem=payer.problem)
    outcome: Outcome
    if documents:
        outcome = "drafted" if payer.waits else "issued"
    elif payer.reviewed:
        outcome = "reviewed"
    elif payer.containers:
        outcome = "nothing"
    else:
        outcome = "closed" if payer.closed else "no_contract"
    return Done(name, outcome, documents)


_INSERT_AUDIT = """
INSERT INTO billing.audit (actor, action, target, detail)
SELECT %s, 'document.issued', target, detail FROM unnest(%s::text[], %s::jsonb[]) AS issued (target, detail)
"""


def _audit(
    connection: "Connection[Any]",
    issued: Sequence[tuple[int, Prepared]],
    numbers: Sequence[Number],
    run: Run,
    actor: str,
) -> None:
    if not issued:
        return
    details = [
        Jsonb(
            {
                "document": id,
                "run": run.id,
                "account": one.payer,
                "legal_entity": one.basis.entity.id,
                "currency": one.document.currency,
                "total": whole(one.document.total_amount, one.document.currency),
            }
        )
        for id, one in issued
    ]
    connection.execute(_INSERT_AUDIT, [actor, [number.text for number in numbers], details])


def whole(amount: Minor, currency: str) -> str:
    """In whole units of the currency, as exact text with all its decimals."""
    return format(Decimal(f"{amount}E-{minor_units(currency)}"), "f")
