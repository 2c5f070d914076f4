"""What is left to bill of payers, by seller, currency and period: what they owe, less what was booked. Writes nothing.

``Draft`` collects it, payer by payer; ``pipeline.billing.close_documents`` makes documents of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg import Connection

from pipeline.billing.adjustments import Adjustment, restate
from pipeline.billing.close_known import Known
from pipeline.billing.close_payers import Group, Payer
from pipeline.billing.commitments import check_promises
from pipeline.billing.late_months import Late, OpenContainer
from pipeline.billing.rerate import differences as entries_of
from pipeline.billing.statements import (
    Booked,
    Difference,
    Due,
    Held,
    differences,
    dues,
    fee_due,
    month_of,
    price,
    shared_period,
)
from pipeline.billing.unit_credits import Units
from pipeline.core.catalog import Catalog, Segment
from pipeline.core.fees import due_in_advance
from pipeline.core.periods import Period


@dataclass(frozen=True, slots=True)
class Owed:
    """What an account owes of the periods that are closed now, each due with its period."""

    account: str
    month: Period
    periods: tuple[Period, ...]
    #: What these are made of.
    segments: tuple[tuple[Period, Segment], ...]
    dues: tuple[tuple[Period, Due], ...]
    containers: tuple[int, ...]
    #: Whether all of it was closed before: then nothing is left to bill, or to take back.
    was_closed: bool


@dataclass(slots=True)
class Draft:
    """A payer and what is left to bill of it, document by document."""

    payer: Payer
    groups: dict[Group, list[Difference]] = field(default_factory=dict)
    containers: dict[Group, int] = field(default_factory=dict)
    #: The payer's period; of one without any, the month.
    period: Period | None = None
    #: The periods that are closed, by account.
    periods: dict[str, tuple[Period, ...]] = field(default_factory=dict)
    #: Accounts that promised to spend, with what they owe, and what was booked for it before.
    promising: list[tuple[Owed, list[Booked]]] = field(default_factory=list)
    #: Closed months that usage came late of, anew, the earliest first.
    restated: list[Adjustment] = field(default_factory=list)

    @property
    def adjustments(self) -> list[Adjustment]:
        """What closed months are billed differently, for the last document with the same seller and currency."""
        return [one for one in self.restated if one.lines]

    @property
    def shown_periods(self) -> list[Period]:
        """The periods that its documents may be of."""
        own = [self.period] if self.adjustments and self.period else []
        return [*(group.period for group in self.groups), *own]


def bill_month(
    connection: "Connection[Any]",
    known: Known,
    catalog: Catalog,
    draft: Draft,
    periods: Mapping[str, Sequence[Held]],
    booked: Mapping[str, Sequence[Booked]],
    promised: frozenset[str],
    units: Units,
) -> None:
    """Add what the month that is closed is billed."""
    task = draft.payer.task
    if draft.payer.problem is not None:
        return
    try:
        for member in promised.intersection(task.members):
            check_promises(connection, catalog, member, month_of(catalog, member, known.month))
        own = [
            _owed(connection, known, catalog, member, periods[member], draft.payer, units) for member in task.members
        ]
    except ValueError as error:
        draft.payer.problem = str(error)
        return
    ends = {member: [one.period for one in periods[member]] for member in task.members}
    whole = draft.period = shared_period(task, ends, month_of(catalog, task.payer, known.month))
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
            for period, segment in owed.segments:  # it may owe for what it did not use
                shown = period if len(task.members) == 1 else whole
                draft.groups.setdefault(Group(segment.contract.legal_entity, segment.plan.currency, shown), [])


def adjust(
    connection: "Connection[Any]",
    catalog: Catalog,
    draft: Draft,
    late: Late,
    opened: Sequence[OpenContainer],
    units: Units,
) -> None:
    """Add what a closed month is billed differently, since usage of it came late."""
    payer = draft.payer
    if payer.problem is not None:
        return
    try:
        found = restate(connection, catalog, late, opened, units, earlier=draft.restated)
    except ValueError as error:
        payer.problem = str(error)
        return
    draft.restated += found
    for one in found:
        payer.entries += one.entries
        payer.containers += one.containers
        payer.units += one.units
        if one.unneeded_credits and one.original is not None:
            payer.unneeded.append((one.original, one.currency, one.unneeded_credits))


def _owed(
    connection: "Connection[Any]",
    known: Known,
    catalog: Catalog,
    account: str,
    periods: Sequence[Held],
    payer: Payer,
    units: Units,
) -> Owed:
    found: list[tuple[Period, Due]] = []
    priced: list[Period] = []
    segments: list[tuple[Period, Segment]] = []
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
        segments += [(one.period, segment) for segment in closed.segments]
        containers += [container.id for container in one.containers]
        priced.append(one.period)
    payer.containers += containers
    month = month_of(catalog, account, known.month)
    last = priced[-1] if priced else month
    was_closed = bool(periods) and not priced  # and its fees in advance were billed then
    if not was_closed:
        found += [(last, fee_due(account, fee)) for fee in due_in_advance(catalog, account, month.end_us)]
    return Owed(account, month, tuple(priced), tuple(segments), tuple(found), tuple(containers), was_closed)


def _left(owed: Owed, booked: Iterable[Booked]) -> list[tuple[Period, Difference]]:
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


def _is_over(owed: Owed, booked: Booked) -> bool:
    """Whether a line was booked of which nothing is due any more: a fee in advance, or a bill within the period."""
    if booked.key.kind == "fee" and booked.kind != "progress" and booked.line_id is None:
        return booked.service.end_us > owed.month.start_us
    if booked.kind == "progress":  # of a contract that another one stands in for, too
        return bool(owed.periods) and booked.service.end_us <= owed.month.end_us
    contracts = {segment.contract.id for _, segment in owed.segments}
    return booked.key.contract in contracts and any(
        period.start_us <= booked.service.start_us and booked.service.end_us <= period.end_us for period in owed.periods
    )
