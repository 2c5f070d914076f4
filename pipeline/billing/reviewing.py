"""Documents that somebody looks at before they are issued: a draft is reviewed, which freezes it, then it is issued.

A payer's drafts of a month are reviewed, and issued, together: they share its containers. A review reckons them once
more, by the prices of the run that made them, and refuses where they have moved since: what was looked at is what is
issued. From then on usage goes to supplements; credits and balance are settled; only number and dates are missing.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import queue
from pipeline.billing.close_chunk import reckon_payers
from pipeline.billing.close_known import read_known
from pipeline.billing.close_money import read_money
from pipeline.billing.close_payers import Payer
from pipeline.billing.close_writing import book_entries, move_containers, settle_money, write
from pipeline.billing.composing import exchanged, shown_currency
from pipeline.billing.documents import Converted, NewDocument, NotIssuable, ToIssue, issue, issue_date
from pipeline.billing.fx_rates import published
from pipeline.billing.invoicing_store import load
from pipeline.billing.late_months import concerned, lock_open
from pipeline.billing.numbers import Number
from pipeline.billing.prices import with_accounts
from pipeline.billing.queue import Run, Task
from pipeline.billing.reckoning import Basis
from pipeline.billing.rerate import Month
from pipeline.billing.statements import hold, make_containers
from pipeline.core.money import minor_decimal, to_minor
from pipeline.core.periods import to_datetime

#: An account's month ends up to a day beside that of UTC.
_DAY = timedelta(days=1)


class Moved(ValueError):
    """A draft is no longer what it was when it was made: usage, prices or credits have changed it."""


_SELECT_RUN = """
SELECT run_id, account FROM billing.document WHERE id = %s AND state = %s::billing.document_state AND run_id IS NOT NULL
"""
_SELECT_MEMBERS = "SELECT payer, members FROM billing.close_task WHERE run_id = %s AND payer = %s FOR UPDATE"


def _run_of(connection: "Connection[Any]", document: int, state: str) -> tuple[Run, Task]:
    """The run that made a document, and its payer's task, which is held: one person reviews or issues it at a time."""
    row = connection.execute(_SELECT_RUN, [document, state]).fetchone()
    if row is None:
        raise NotIssuable(f"expected a document of the close in state {state}, got {document}: `tally invoices list`")
    run, account = row
    task = connection.execute(_SELECT_MEMBERS, [run, account]).fetchone()
    assert task is not None, "the close made the document for it"
    return queue.read_run(connection, run), Task(task[0], tuple(task[1]))


_SELECT_DRAFTS = """
SELECT legal_entity, currency, kind::text, lines_amount, discounts_amount, net_amount, tax_amount, total_amount,
    credits_amount, balance_amount, payable_amount
FROM billing.document WHERE run_id = %s AND account = %s AND state = 'draft' ORDER BY id
"""
_REVIEWED = """
UPDATE billing.document SET state = 'reviewed', reviewed_at = %s, reviewed_by = %s WHERE id = ANY(%s)
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def review(connection: "Connection[Any]", document: int, *, now: datetime, actor: str) -> list[int]:
    """Review the draft of this id, and its payer's other drafts of the month, in one transaction; return their new ids.

    Raises NotIssuable for anything but a draft of the close, Moved where it would come out otherwise by now, ValueError
    where it could not be made any more.
    """
    with connection.transaction():
        run, task = _run_of(connection, document, "draft")
        known = read_known(connection, run)
        accounts = sorted(task.members)
        billed = concerned(connection, accounts)
        catalog = with_accounts(connection, known.prices, billed, until=run.catalog_seq)
        make_containers(connection, catalog, accounts, known.month)
        opened = lock_open(connection, billed)
        held = hold(connection, catalog, accounts, known.month, lock=True)
        money = read_money(connection, billed, lock=True)
        (payer,) = reckon_payers(connection, known, catalog, [task], held, opened, money, now=now, actor=actor)
        if payer.problem is not None:
            raise ValueError(payer.problem)
        before = connection.execute(_SELECT_DRAFTS, [run.id, task.payer]).fetchall()
        _check_same(before, payer)
        lines = book_entries(connection, [payer], run, actor)
        written = write(connection, [payer], lines, known.month)
        settle_money(connection, [payer], written, lines, run, actor)
        move_containers(connection, payer.containers, "reviewed")
        ids = [id for id, _ in written]
        connection.execute(_REVIEWED, [now, actor, ids])
        for id in ids:
            detail = Jsonb({"account": task.payer, "run": run.id, "draft": document})
            connection.execute(_AUDIT, [actor, "document.reviewed", f"document {id}", detail])
        return ids


def _check_same(before: Sequence[tuple[Any, ...]], payer: Payer) -> None:
    drafts = [
        (entity, currency, kind, *(to_minor(one, currency) for one in amounts))
        for entity, currency, kind, *amounts in before
    ]
    now = [_header(one.document) for one in payer.documents]
    if drafts != now:
        raise Moved(
            f"expected the drafts of {payer.task.payer} as they were made, {_sums(drafts)}, got {_sums(now)} by now: "
            "`tally close` makes them anew, then review those"
        )


def _sums(headers: Sequence[tuple[Any, ...]]) -> str:
    sums = [f"{minor_decimal(total, currency)} {currency}" for _, currency, _, _, _, _, _, total, *_ in headers]
    return ", ".join(sums) or "none"


def _header(document: NewDocument) -> tuple[Any, ...]:
    return (
        document.legal_entity,
        document.currency,
        document.kind,
        document.lines_amount,
        document.discounts_amount,
        document.net_amount,
        document.tax_amount,
        document.total_amount,
        document.credits_amount,
        document.balance_amount,
        document.payable_amount,
    )


_SELECT_REVIEWED = """
SELECT id, kind::text, legal_entity, currency, tax_date, net_amount, tax_amount FROM billing.document
WHERE run_id = %s AND account = %s AND state = 'reviewed' ORDER BY id
"""
# The month's, and supplements of months before that were reviewed with it, also of who has left the payer since. In the
# order of ids, as whoever holds several containers takes them.
_HOLD_REVIEWED = """
SELECT id FROM billing.invoice WHERE state = 'reviewed' AND period_end <= %(until)s
    AND (account = ANY(%(members)s) OR (account = ANY(%(concerned)s) AND supplement > 0))
ORDER BY id FOR NO KEY UPDATE
"""
_ISSUE_CONTAINERS = "UPDATE billing.invoice SET state = 'issued' WHERE id = ANY(%s)"
_ISSUED_TASK = "UPDATE billing.close_task SET outcome = 'issued' WHERE run_id = %s AND payer = %s"


def issue_reviewed(connection: "Connection[Any]", document: int, *, now: datetime, actor: str) -> list[Number]:
    """Issue the reviewed document of this id, and its payer's others of the month, in one transaction.

    The rate of exchange is that of the invoice day. Raises NotIssuable for one that is not reviewed, ``core.fx.NoRate``
    where no rate is known.
    """
    with connection.transaction():
        run, task = _run_of(connection, document, "reviewed")
        to_issue = [
            _to_issue(connection, run, task.payer, row, now)
            for row in connection.execute(_SELECT_REVIEWED, [run.id, task.payer]).fetchall()
        ]
        until = to_datetime(Month.parse(run.month).period_in("UTC").end_us) + _DAY
        asked = {"members": list(task.members), "concerned": concerned(connection, task.members), "until": until}
        reviewed = [id for (id,) in connection.execute(_HOLD_REVIEWED, asked)]
        connection.execute(_ISSUE_CONTAINERS, [reviewed])
        connection.execute(_ISSUED_TASK, [run.id, task.payer])
        numbers = issue(connection, to_issue, now=now, actor=actor)
        for one, number in zip(to_issue, numbers, strict=True):
            detail = Jsonb({"document": one.id, "run": run.id, "account": task.payer, "legal_entity": one.entity.id})
            connection.execute(_AUDIT, [actor, "document.issued", number.text, detail])
        return numbers


def _to_issue(connection: "Connection[Any]", run: Run, payer: str, row: tuple[Any, ...], now: datetime) -> ToIssue:
    id, kind, legal_entity, currency, tax_date, net, tax = row
    invoicing = load(connection, applied_until=run.invoicing_mark, on=tax_date, accounts=[payer])
    entity = invoicing.legal_entities[legal_entity]
    basis = Basis(entity, invoicing.customers[payer], invoicing.taxes, tax_date)
    quote = shown_currency(basis, currency)
    shown: Converted | None = None
    if quote is not None:
        day = issue_date(entity, now)
        rates = published(connection, day, {currency, quote})
        shown = exchanged(currency, quote, day, rates, to_minor(net, currency), to_minor(tax, currency))
    return ToIssue(id, kind, entity, shown)
