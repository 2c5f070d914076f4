"""The close's queue: which payers a run closes, who takes them, and what became of them.

A run is a command's work on a month; its tasks are its payers. Workers take tasks with SKIP LOCKED and mark them done
in the transaction that writes the documents: killed anywhere, a worker leaves a task done, with its documents, or
waiting, without. A run that has not finished goes on with the next command for the same month and accounts, by the same
prices.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

from psycopg import Connection, Rollback
from psycopg.types.json import Jsonb

#: What became of a payer. drafted: its documents wait for review; reviewed: they wait to be issued. nothing: closed
#: without a document; no_contract: it had none in the month. closed: another run was there before.
Outcome: TypeAlias = Literal["issued", "drafted", "reviewed", "nothing", "no_contract", "closed"]


@dataclass(frozen=True, slots=True)
class Run:
    """A close of a month. Times are aware, UTC."""

    id: int
    month: str
    #: Payers asked for; none: all.
    accounts: tuple[str, ...]
    #: Prices, accounts and contracts are those of billing.outbox up to this number.
    catalog_seq: int
    #: Legal entities, customers, taxes and coupons are those applied until then.
    invoicing_mark: datetime
    started_at: datetime
    started_by: str


@dataclass(frozen=True, slots=True)
class Task:
    """A payer, and the accounts whose lines are on its documents: itself, and the children it consolidates."""

    payer: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a task; with a problem it failed and nothing of it was written."""

    payer: str
    outcome: Outcome | None
    documents: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Tasks of a run by state."""

    waiting: int
    done: int
    failed: int
    documents: int

    @property
    def total(self) -> int:
        return self.waiting + self.done + self.failed


_RUN_COLUMNS = "id, month, accounts, catalog_seq, invoicing_mark, started_at, started_by"
_SELECT_GOING_ON = f"""
SELECT {_RUN_COLUMNS} FROM billing.close_run WHERE month = %s AND accounts = %s AND finished_at IS NULL
"""
_INSERT_RUN = f"""
INSERT INTO billing.close_run (month, accounts, catalog_seq, invoicing_mark, missing, started_by)
VALUES (%s, %s, (SELECT coalesce(max(seq), 0) FROM billing.outbox), %s, %s, %s) RETURNING {_RUN_COLUMNS}
"""
# Whose lines are on whose documents goes up from child to parent as long as parents consolidate; more than 16 levels
# are a circle. Left out are payers that a run of the month has closed, and those that had no contract in it, unless
# something was published since.
_PAYERS = """
WITH RECURSIVE newest AS (
    SELECT DISTINCT ON (version.id) version.id, version.document ->> 'parent' AS parent
    FROM billing.catalog_version AS version
    WHERE version.kind = 'account'
    ORDER BY version.id, version.version DESC
), paid AS (
    SELECT id, id AS payer, 0 AS depth FROM newest
    UNION ALL
    SELECT paid.id, newest.parent, depth + 1 FROM paid JOIN newest ON newest.id = paid.payer
    WHERE newest.parent = ANY(%(consolidating)s) AND depth < 16
), payer AS (
    SELECT DISTINCT ON (id) id, payer FROM paid ORDER BY id, depth DESC
)
SELECT payer.payer, array_agg(payer.id ORDER BY payer.id <> payer.payer, payer.id) AS members
FROM payer
WHERE (%(accounts)s::text[] = '{}' OR payer.payer IN (SELECT payer FROM payer WHERE id = ANY(%(accounts)s)))
    AND NOT EXISTS (
        SELECT FROM billing.close_task AS before JOIN billing.close_run AS run ON run.id = before.run_id
        WHERE before.payer = payer.payer AND run.month = %(month)s AND (
            before.outcome IN ('issued', 'nothing', 'closed')
            OR (before.outcome = 'no_contract' AND run.catalog_seq = (SELECT coalesce(max(seq), 0) FROM billing.outbox))
        )
    )
GROUP BY payer.payer
"""
_INSERT_TASKS = f"""
INSERT INTO billing.close_task (run_id, payer, members)
SELECT %(run)s, payer, members FROM ({_PAYERS}) AS planned
"""
_INSERT_OVERRIDE = "INSERT INTO billing.close_override (run_id, missing, why, by) VALUES (%s, %s, %s, %s)"
_INSERT_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def going_on(connection: "Connection[Any]", month: str, accounts: Sequence[str]) -> Run | None:
    """The run for a month and these accounts (none: all) that has not finished."""
    row = connection.execute(_SELECT_GOING_ON, [month, sorted(accounts)]).fetchone()
    return _run(row) if row else None


def begin(
    connection: "Connection[Any]",
    month: str,
    accounts: Sequence[str],
    *,
    invoicing_mark: datetime,
    consolidating: Iterable[str],
    missing: Sequence[dict[str, Any]] = (),
    why: str = "",
    actor: str,
) -> Run | None:
    """Begin a run, or go on with the one that has not finished; None, and nothing is written, where all is closed.

    ``accounts``: those asked for, none for all. ``consolidating``: parents whose documents take in their children's
    lines. ``missing``: what the gate found, as JSON, and ``why`` it is passed over: both are kept.
    """
    wanted = sorted(accounts)
    with connection.transaction() as transaction:
        # One plan at a time: a second command finds the first one's run.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('tally.close', 0))")
        run = going_on(connection, month, wanted)
        if run is None:
            row = connection.execute(
                _INSERT_RUN, [month, wanted, invoicing_mark, Jsonb(list(missing)), actor]
            ).fetchone()
            assert row is not None, "an INSERT returns what it inserted"
            run = _run(row)
            if not _plan(connection, run, consolidating):
                raise Rollback(transaction)
        if missing:
            connection.execute(_INSERT_OVERRIDE, [run.id, Jsonb(list(missing)), why, actor])
            detail = Jsonb({"month": month, "why": why, "missing": list(missing)})
            connection.execute(_INSERT_AUDIT, [actor, "close.overridden", f"close run {run.id}", detail])
        return run
    return None


def _plan(connection: "Connection[Any]", run: Run, consolidating: Iterable[str]) -> int:
    """Queue a run's payers; how many."""
    asked = {"run": run.id, **_asked(run.month, run.accounts, consolidating)}
    return connection.execute(_INSERT_TASKS, asked).rowcount


def planned(
    connection: "Connection[Any]", month: str, accounts: Sequence[str], *, consolidating: Iterable[str]
) -> list[Task]:
    """The payers that a run would be begun for now; by name. Changes nothing."""
    asked = _asked(month, accounts, consolidating)
    rows = connection.execute(f"{_PAYERS} ORDER BY payer.payer", asked)
    return [Task(payer, tuple(members)) for payer, members in rows]


def planned_chunks(
    connection: "Connection[Any]", month: str, accounts: Sequence[str], *, consolidating: Iterable[str], at_once: int
) -> Iterator[list[Task]]:
    """As ``planned``, so many payers at a time, in one transaction: there may be millions."""
    with connection.transaction(), connection.cursor("planned") as cursor:  # on the server
        cursor.execute(f"{_PAYERS} ORDER BY payer.payer", _asked(month, accounts, consolidating))
        while rows := cursor.fetchmany(at_once):
            yield [Task(payer, tuple(members)) for payer, members in rows]


def is_closed(
    connection: "Connection[Any]", month: str, accounts: Sequence[str], *, consolidating: Iterable[str]
) -> bool:
    """Whether no payer is left that a run would be begun for."""
    found = connection.execute(f"SELECT EXISTS ({_PAYERS})", _asked(month, accounts, consolidating)).fetchone()
    return found == (False,)


def _asked(month: str, accounts: Sequence[str], consolidating: Iterable[str]) -> dict[str, Any]:
    return {"month": month, "accounts": sorted(accounts), "consolidating": sorted(consolidating)}


def _run(row: Sequence[Any]) -> Run:
    id, month, accounts, *rest = row
    return Run(id, month, tuple(accounts), *rest)


_SELECT_RUN = f"SELECT {_RUN_COLUMNS} FROM billing.close_run WHERE id = %s"


def read_run(connection: "Connection[Any]", id: int) -> Run:
    """A run by its number. Raises LookupError."""
    row = connection.execute(_SELECT_RUN, [id]).fetchone()
    if row is None:
        raise LookupError(f"expected a run of the close, got {id}")
    return _run(row)


_CLAIM = """
SELECT payer, members FROM billing.close_task WHERE run_id = %s AND state = 'waiting'
ORDER BY payer LIMIT %s FOR UPDATE SKIP LOCKED
"""
_CLAIM_ONE = """
SELECT payer, members FROM billing.close_task WHERE run_id = %s AND state = 'waiting' AND payer = %s
FOR UPDATE SKIP LOCKED
"""


def claim(connection: "Connection[Any]", run: int, limit: int) -> list[Task]:
    """Take tasks that nobody else has, for the transaction: its rollback, or its end by any crash, gives them back."""
    return [Task(payer, tuple(members)) for payer, members in connection.execute(_CLAIM, [run, limit])]


def claim_one(connection: "Connection[Any]", run: int, payer: str) -> list[Task]:
    """Take one payer's task; none where another worker has it, or it is done."""
    return [Task(payer, tuple(members)) for payer, members in connection.execute(_CLAIM_ONE, [run, payer])]


_MARK = """
UPDATE billing.close_task AS task SET state = CASE WHEN done.problem IS NULL THEN 'done' ELSE 'failed' END,
    outcome = done.outcome, documents = done.documents, problem = done.problem, finished_at = now()
FROM unnest(%s::text[], %s::text[], %s::integer[], %s::text[]) AS done (payer, outcome, documents, problem)
WHERE task.run_id = %s AND task.payer = done.payer AND task.state = 'waiting'
"""


def mark(connection: "Connection[Any]", run: int, tasks: Sequence[Done]) -> None:
    """Tasks that were taken in this transaction are done, or have failed."""
    columns: list[list[Any]] = [
        [task.payer for task in tasks],
        [task.outcome for task in tasks],
        [task.documents for task in tasks],
        [task.problem for task in tasks],
    ]
    connection.execute(_MARK, [*columns, run])


_SELECT_PROGRESS = """
SELECT count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state = 'done'),
    count(*) FILTER (WHERE state = 'failed'), coalesce(sum(documents), 0)
FROM billing.close_task WHERE run_id = %s
"""
_SELECT_OUTCOMES = """
SELECT outcome, count(*), sum(documents) FROM billing.close_task WHERE run_id = %s AND state = 'done' GROUP BY outcome
"""
_SELECT_FAILED = """
SELECT payer, problem FROM billing.close_task WHERE run_id = %s AND state = 'failed' ORDER BY payer LIMIT %s
"""
_FINISH = """
UPDATE billing.close_run SET finished_at = now() WHERE id = %(run)s AND finished_at IS NULL
    AND NOT EXISTS (SELECT FROM billing.close_task WHERE run_id = %(run)s AND state = 'waiting')
"""


def progress(connection: "Connection[Any]", run: int) -> Progress:
    """A run's tasks by state, and the documents made."""
    row = connection.execute(_SELECT_PROGRESS, [run]).fetchone()
    assert row is not None, "an aggregate has one row"
    return Progress(*row)


def outcomes(connection: "Connection[Any]", run: int) -> dict[Outcome, int]:
    """How many payers of a run came to which outcome."""
    return {outcome: count for outcome, count, _ in connection.execute(_SELECT_OUTCOMES, [run])}


def failed(connection: "Connection[Any]", run: int, limit: int) -> list[Done]:
    """Payers that failed, and why; by name."""
    rows = connection.execute(_SELECT_FAILED, [run, limit])
    return [Done(payer, None, problem=problem) for payer, problem in rows]


def finish(connection: "Connection[Any]", run: int) -> bool:
    """End a run that has no task waiting; False where it has, or somebody ended it before."""
    return connection.execute(_FINISH, {"run": run}).rowcount == 1
