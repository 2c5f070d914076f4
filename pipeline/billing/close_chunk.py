"""Closing some payers in one transaction: from what their containers hold to issued documents.

Payers share a transaction, for speed: one commit, one statement for all their rows. It is as safe as one each. Whatever
fails takes back all of them, numbers too, and they are then closed one by one (``pipeline.billing.close``), so a payer
that cannot be closed stands in nobody's way; and what can be foreseen to fail (no price, no tax rate, no customer) is
found before anything of that payer is written.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeAlias

from psycopg import Connection

from pipeline.billing import queue
from pipeline.billing.close_documents import prepare
from pipeline.billing.close_known import Known
from pipeline.billing.close_money import Money, read_money, roll_over_ended
from pipeline.billing.close_owed import Draft, adjust, bill_month
from pipeline.billing.close_payers import Payer
from pipeline.billing.close_setting import Setting
from pipeline.billing.close_writing import audit, book_entries, done_of, move_containers, settle_money, write
from pipeline.billing.commitments import promising
from pipeline.billing.documents import ToIssue, issue
from pipeline.billing.late_months import OpenContainer, concerned, late_months, lock_open, read_open
from pipeline.billing.prices import with_accounts
from pipeline.billing.queue import Done, Task
from pipeline.billing.statements import (
    AccountPeriod,
    Booked,
    Held,
    hold,
    make_containers,
    month_of,
    read_booked,
)
from pipeline.billing.unit_credits import Units
from pipeline.core.catalog import Catalog


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
    roll_over_ended(connection, catalog, {task.payer: task.members for task in tasks}, now, actor)
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
    done = [done_of(payer) for payer in payers]
    queue.mark(connection, known.run.id, done)
    reached(Step.TASKS_MARKED)
    # Step 8.
    drafts = [ToIssue(id, one.document.kind, one.basis.entity, one.shown_as) for id, one in to_issue]
    numbers = issue(connection, drafts, now=now, actor=actor)
    audit(connection, to_issue, numbers, known.run, actor)
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
    money = read_money(connection, billed, lock=False)
    return reckon_payers(connection, known, catalog, tasks, held, opened, money, now=now, actor=actor)


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
    months = {member: month_of(catalog, member, known.month) for member in members}
    since = {
        member: min([month.start_us, *(one.period.start_us for one in periods[member])])
        for member, month in months.items()
    }
    booked: defaultdict[str, list[Booked]] = defaultdict(list)
    for line in read_booked(connection, since):
        booked[line.key.account].append(line)
    promised = promising(connection, members)
    drafts = [Draft(Payer(task)) for task in tasks]
    late = late_months(connection, catalog, {task.payer: task.members for task in tasks}, opened, before=known.month)
    units = Units(connection, members)
    for draft in drafts:
        # Before the month itself: credits are drawn in order of time.
        for month in late.get(draft.payer.task.payer, ()):
            adjust(connection, catalog, draft, month, opened, units)
        bill_month(connection, known, catalog, draft, periods, booked, promised, units)
    setting = Setting(connection, known, catalog, money, now, actor)
    setting.read({draft.payer.task.payer: draft.shown_periods for draft in drafts})
    for draft in drafts:
        if draft.payer.problem is None:
            try:
                prepare(setting, draft)
            except ValueError as error:  # what a person has to settle: this payer's trouble, not that of the others
                draft.payer.problem = str(error)
    return [draft.payer for draft in drafts]
