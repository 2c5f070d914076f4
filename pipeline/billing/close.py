"""Closing a month: the gate, then every payer's documents, by workers over a queue.

``close_month`` is idempotent and goes on after any crash: what is done is done with its documents, the rest waits in
the queue (``pipeline.billing.queue``). Prices, legal entities, customers and taxes are those of the moment the run
began, for all its payers and workers, however long it takes; what is published meanwhile counts for the next run.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import psycopg
from psycopg import Connection

from pipeline.billing import queue
from pipeline.billing.alerts import update_now
from pipeline.billing.close_chunk import Reached, Step, close_tasks, ignore, preview_tasks
from pipeline.billing.close_entries import LineMoved
from pipeline.billing.close_known import Known, read_known
from pipeline.billing.close_payers import Payer
from pipeline.billing.gate import Estimator, Missing, check
from pipeline.billing.invoicing_store import consolidating, mark
from pipeline.billing.months import next_month
from pipeline.billing.queue import Done, Outcome, Progress, Run, Task
from pipeline.billing.rerate import Month
from pipeline.billing.unbilled_voids import UnbilledVoid, unbilled_voids
from pipeline.infra.logs import configure, get_logger
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

log = get_logger(__name__)

#: Payers closed in one transaction: they share the cost of each statement and of the commit, and the sink waits for
#: their containers that long, 0.2 s. Measured, CPU of worker and backend each: 1 costs 12 ms, 25 1.6, 100 1.4, 400 1.4.
PAYERS_AT_ONCE = 100
#: Below so many payers one process is done before others have started.
_WORTH_PROCESSES = 400
#: How often progress is told, seconds.
_TELL_EVERY_S = 1.0
#: How long a worker waits for PostgreSQL to come back, and between its tries; seconds.
_AWAY_MAX_S, _AWAY_STEP_S = 120.0, 0.5
#: Failed payers that a result names.
_FAILED_MAX = 100

#: What one payer's trouble looks like where it was not foreseen: others are closed without it.
_TROUBLE = (
    ValueError,
    LookupError,
    ArithmeticError,
    AssertionError,
    LineMoved,
    psycopg.IntegrityError,
    psycopg.DataError,
    psycopg.errors.RaiseException,
)


class NotClosable(Exception):
    """The gate found something missing, and nobody decided to go on without it; nothing was changed."""

    def __init__(self, missing: Sequence[Missing]) -> None:
        super().__init__("; ".join(one.what for one in missing))
        self.missing = tuple(missing)


@dataclass(frozen=True, slots=True)
class Readiness:
    """How a month stands before a close of it: what the close decides by, and a dry run shows."""

    #: Nobody is left to close; then the gate was not asked.
    is_closed: bool
    #: What the gate found.
    missing: tuple[Missing, ...]
    #: Documents of the month, and of months before it, that are void and billed nowhere since.
    voided: tuple[UnbilledVoid, ...]
    #: The run that has not finished, to go on with.
    going_on: Run | None
    #: Legal entities, customers, taxes and coupons are those applied until then.
    invoicing_mark: datetime
    #: Parents whose documents take in their children's lines.
    consolidating: frozenset[str]

    def is_held_up(self, why: str) -> bool:
        """Whether the gate holds the close up, given the reason, if any, to close although something is missing."""
        return bool(self.missing) and not (why.strip() and all(one.overridable for one in self.missing))


class WorkersEnded(Exception):
    """Workers ended before the queue was empty; the next command goes on where they stopped."""


@dataclass(frozen=True, slots=True)
class Closed:
    """What a close came to. ``run`` is None where all was closed before: then nothing was changed."""

    run: Run | None
    #: Whether it went on with a run that had been begun before.
    resumed: bool
    progress: Progress
    outcomes: dict[Outcome, int]
    #: The first of those that failed, by name.
    failed: tuple[Done, ...]
    #: As ``Readiness.voided``.
    voided: tuple[UnbilledVoid, ...]
    seconds: float


def close_month(
    settings: Settings,
    month: Month,
    *,
    accounts: Sequence[str] = (),
    actor: str,
    why: str = "",
    workers: int | None = None,
    estimator: Estimator | None = None,
    wait_s: float = 0.0,
    tell: Callable[[Progress], None] = lambda _: None,
) -> Closed:
    """Close a month, or these accounts of it, after the gate; ``why``: the reason to, although something is missing.

    ``workers``: processes, by default one for each core. ``tell`` hears of progress about every second.

    Raises NotClosable; LookupError for an unknown account; WorkersEnded; psycopg.OperationalError when the database
    does not answer.
    """
    began = time.monotonic()

    def nothing_left() -> Closed:
        return Closed(None, False, Progress(0, 0, 0, 0), {}, (), ready.voided, time.monotonic() - began)

    with connect(settings.dsn, application="close", autocommit=True) as connection:
        ready = _look(connection, settings, month, accounts, estimator, wait_s)
        if ready.is_closed:
            return nothing_left()
        if ready.is_held_up(why):
            raise NotClosable(ready.missing)
        run = queue.begin(
            connection,
            str(month),
            accounts,
            invoicing_mark=ready.invoicing_mark,
            consolidating=ready.consolidating,
            missing=[one.as_json() for one in ready.missing],
            why=why,
            actor=actor,
        )
        if run is None:
            return nothing_left()
        waiting = queue.progress(connection, run.id).waiting
        count = 1 if waiting < _WORTH_PROCESSES else workers or os.cpu_count() or 1
        work_off(settings, connection, run, actor=actor, workers=count, tell=tell)
        queue.finish(connection, run.id)
        found = queue.progress(connection, run.id)
        tell(found)
        return Closed(
            run,
            ready.going_on is not None,
            found,
            queue.outcomes(connection, run.id),
            tuple(queue.failed(connection, run.id, _FAILED_MAX)),
            ready.voided,
            time.monotonic() - began,
        )


def readiness(
    settings: Settings,
    month: Month,
    *,
    accounts: Sequence[str] = (),
    estimator: Estimator | None = None,
    wait_s: float = 0.0,
) -> Readiness:
    """How a month, or these accounts of it, stand before a close: all it asks, the gate too. Changes nothing.

    Raises as ``close_month``.
    """
    with connect(settings.dsn, application="close", autocommit=True) as connection:
        return _look(connection, settings, month, accounts, estimator, wait_s)


def _look(
    connection: "Connection[Any]",
    settings: Settings,
    month: Month,
    accounts: Sequence[str],
    estimator: Estimator | None,
    wait_s: float,
) -> Readiness:
    check_accounts(connection, accounts)
    until = mark(connection)
    parents = frozenset(consolidating(connection, applied_until=until, on=_last_day(month)))
    going_on = queue.going_on(connection, str(month), accounts)
    is_closed = going_on is None and queue.is_closed(connection, str(month), accounts, consolidating=parents)
    missing = (
        []
        if is_closed
        else check(
            connection,
            settings,
            month,
            now=datetime.now(UTC),
            payers=accounts or None,
            estimator=estimator,
            wait_s=wait_s,
        )
    )
    voided = unbilled_voids(connection, until=month, accounts=accounts)
    return Readiness(is_closed, tuple(missing), tuple(voided), going_on, until, parents)


def preview(
    settings: Settings, month: Month, *, accounts: Sequence[str] = (), actor: str, going_on: Run | None = None
) -> Iterator[Payer]:
    """What a close would issue now, payer by payer, those that would fail too. Changes nothing, and asks no gate.

    ``going_on``: a run that has not finished; then by its prices. Raises as ``close_month``.
    """
    with connect(settings.dsn, application="close") as connection:
        check_accounts(connection, accounts)
        until = mark(connection)
        parents = consolidating(connection, applied_until=until, on=_last_day(month))
        connection.rollback()
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        known = read_known(connection, going_on or _not_begun(connection, month, until, actor))
        for some in queue.planned_chunks(
            connection, str(month), accounts, consolidating=parents, at_once=PAYERS_AT_ONCE
        ):
            yield from preview_tasks(connection, known, some, now=datetime.now(UTC), actor=actor)


def _not_begun(connection: "Connection[Any]", month: Month, until: datetime, actor: str) -> Run:
    """A run as it would be begun now; it has no number."""
    row = connection.execute("SELECT coalesce(max(seq), 0) FROM billing.outbox").fetchone()
    assert row is not None, "an aggregate has one row"
    return Run(0, str(month), (), row[0], until, until, actor)


def check_accounts(connection: "Connection[Any]", accounts: Sequence[str]) -> None:
    """Raise LookupError for an account that nobody published."""
    statement = "SELECT unnest(%s::text[]) EXCEPT SELECT id FROM billing.catalog_version WHERE kind = 'account'"
    unknown = sorted(id for (id,) in connection.execute(statement, [list(accounts)]))
    if unknown:
        raise LookupError(f"expected an account of the catalog, got {unknown[0]!r}: `tally accounts list` shows them")


def _last_day(month: Month) -> date:
    return next_month(date(month.year, month.month, 1)) - timedelta(days=1)


# Working off the queue ----------------------------------------------------------------------------------------------


def work_off(
    settings: Settings,
    connection: "Connection[Any]",
    run: Run,
    *,
    actor: str,
    workers: int,
    tell: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Work off a run's queue, here or in processes of their own, telling progress meanwhile.

    Raises WorkersEnded where processes ended before the queue was empty.
    """
    if workers == 1:
        told = time.monotonic()
        for _ in work(settings.dsn, run.id, actor):
            if time.monotonic() - told >= _TELL_EVERY_S:
                tell(queue.progress(connection, run.id))
                told = time.monotonic()
        return
    # Spawned, not forked: a copy of open connections and of threads' locks would be of no use to anyone.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(settings, number, run.id, actor), daemon=True)
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        _watch(processes, connection, run, tell)
    finally:
        for process in processes:
            process.terminate()  # an interrupted close: what is under way is rolled back
            process.join()


def _watch(
    processes: Sequence[SpawnProcess], connection: "Connection[Any]", run: Run, tell: Callable[[Progress], None]
) -> None:
    while any(process.is_alive() for process in processes):
        wait([process.sentinel for process in processes if process.is_alive()], _TELL_EVERY_S)
        tell(queue.progress(connection, run.id))
    waiting = queue.progress(connection, run.id).waiting
    if waiting:
        codes = ", ".join(str(process.exitcode) for process in processes)
        raise WorkersEnded(f"workers ended ({codes}) and {waiting:,} payers wait: the same command goes on with them")


def _worker(settings: Settings, number: int, run: int, actor: str) -> None:
    """A process's work: until the queue is empty, or the command that started it is gone."""
    configure(settings, worker=f"close-{number}")
    parent = multiprocessing.parent_process()
    for _ in work(settings.dsn, run, actor):
        if parent is not None and not parent.is_alive():
            return


def work(
    dsn: str,
    run: int,
    actor: str,
    *,
    reached: Reached = ignore,
    at_once: int = PAYERS_AT_ONCE,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Iterator[int]:
    """Take payers off a run's queue and close them until none waits; yields how many, chunk by chunk.

    While PostgreSQL is away it waits; what was under way is then either done or waits again, as the queue says. Raises
    psycopg.OperationalError when it stays away.
    """
    away_since: float | None = None
    while True:
        try:
            with connect(dsn, application="close", autocommit=True) as connection:
                known = read_known(connection, queue.read_run(connection, run))
                while closed := _close_some(connection, known, at_once, actor, reached, clock):
                    away_since = None
                    yield closed
                return
        except psycopg.OperationalError as error:
            # Not for the queue to know: a deadlock or a serialization failure is over at once, a restart in a while.
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > _AWAY_MAX_S:
                raise
            log.warning("PostgreSQL does not answer", error=str(error).strip(), run=run)
            time.sleep(_AWAY_STEP_S)


def _close_some(
    connection: "Connection[Any]",
    known: Known,
    limit: int,
    actor: str,
    reached: Reached,
    clock: Callable[[], datetime],
) -> int:
    """Close up to so many payers in one transaction; where that fails, each in one of its own."""
    tasks: list[Task] = []
    try:
        with connection.transaction():
            tasks = queue.claim(connection, known.run.id, limit)
            if not tasks:
                return 0
            reached(Step.TAKEN)
            close_tasks(connection, known, tasks, now=clock(), actor=actor, reached=reached)
        reached(Step.COMMITTED)
        _refresh(connection, [member for task in tasks for member in task.members])
    except _TROUBLE as error:
        log.warning("closing payers one by one", payers=len(tasks), error=str(error))
        for task in tasks:
            _close_one(connection, known, task, actor, reached, clock)
    return len(tasks)


_SELECT_HAVING_CREDITS = "SELECT DISTINCT account FROM billing.credit_grant WHERE account = ANY(%s) ORDER BY account"


def _refresh(connection: "Connection[Any]", accounts: Sequence[str]) -> None:
    """Let the balances of accounts with credits know what was settled; what is missed here, the alerts worker finds."""
    for (account,) in connection.execute(_SELECT_HAVING_CREDITS, [list(accounts)]).fetchall():
        update_now(connection, account)


def _close_one(
    connection: "Connection[Any]",
    known: Known,
    task: Task,
    actor: str,
    reached: Reached,
    clock: Callable[[], datetime],
) -> None:
    try:
        with connection.transaction():
            if taken := queue.claim_one(connection, known.run.id, task.payer):
                close_tasks(connection, known, taken, now=clock(), actor=actor, reached=reached)
    except _TROUBLE as error:
        with connection.transaction():
            if queue.claim_one(connection, known.run.id, task.payer):
                queue.mark(
                    connection, known.run.id, [Done(task.payer, None, problem=str(error).strip() or repr(error))]
                )
