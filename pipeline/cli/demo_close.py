"""The second half of `tally demo`: finance closes the month.

The gate refuses while usage of the month is undecided; each is decided on, as a person would; then invoices are issued
and written as PDF, and an event that comes too late becomes an adjustment.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from psycopg import Connection
from rich.table import Table

from pipeline.billing.close import NotClosable, close_month
from pipeline.billing.document_lists import Listed, listed
from pipeline.billing.gate import Estimator, Missing
from pipeline.billing.issued import Issued, read
from pipeline.billing.own_documents import Made, bill_adjustments, payer_of
from pipeline.billing.rerate import Month
from pipeline.catalog.files import read_account_files
from pipeline.catalog.invoicing_apply import apply
from pipeline.catalog.invoicing_files import read_invoicing_files
from pipeline.catalog.publish import publish
from pipeline.cli import invoices
from pipeline.cli.output import CommandError, err, out
from pipeline.core.reasons import Reason
from pipeline.documents.render import write_pdfs
from pipeline.infra.avro import load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings
from pipeline.operations import at_risk, dead_letters
from pipeline.operations.dead_letters import Selection
from pipeline.operations.events import parse_mend
from pipeline.operations.replay import replay
from pipeline.producer import Usage, UsageProducer

ACTOR = "demo"
#: What was meant by "many".
MENDED = "input_tokens=100"
#: The account whose invoice is shown, and that uses something too late.
SHOWN = "acct-03"
LATE_KEY = "code-late"
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Report:
    """What the close came to."""

    month: Month
    #: What the gate found before anything was decided.
    missing: tuple[Missing, ...]
    issued: list[Listed]
    #: The invoice of the account that is shown.
    shown: Issued
    pdfs: list[Path]
    adjustment: Issued
    adjustment_made: Made

    def as_json(self) -> dict[str, Any]:
        return {
            "month": str(self.month),
            "missing": [one.as_json() for one in self.missing],
            "invoices": [
                {"number": one.number, "account": one.account, "net": one.net, "tax": one.tax, "total": one.total}
                for one in self.issued
            ],
            "pdfs": [str(path) for path in self.pdfs],
            "adjustment": {
                "number": self.adjustment_made.number,
                "corrects": self.adjustment_made.corrects,
                "total": self.adjustment_made.total,
            },
        }

    def show(self) -> None:
        gate = Table(
            "missing", "what to do", title=f"The first try to close {self.month}: refused", title_justify="left"
        )
        for one in self.missing:
            gate.add_row(one.what, one.todo)
        out.print(gate)
        table = Table("number", "account", title=f"{self.month} closed", title_justify="left")
        for name in ("net", "tax", "total"):
            table.add_column(name, justify="right")
        for row in self.issued:
            amounts = (f"{amount:,}" for amount in (row.net, row.tax, row.total))
            table.add_row(row.number, row.account, *amounts)
        sums = (sum((getattr(row, name) for row in self.issued), Decimal(0)) for name in ("net", "tax", "total"))
        table.add_row("", "[bold]in all", *(f"[bold]{amount:,}" for amount in sums))
        out.print(table)
        invoices.show_document(self.shown)
        out.print(f"\nAn event of {SHOWN} that came after that becomes an adjustment:", highlight=False)
        invoices.show_document(self.adjustment)
        err.print(
            f"{len(self.pdfs)} PDFs, each with its e-invoice inside, are in {self.pdfs[0].parent}", highlight=False
        )


def close_and_adjust(settings: Settings, late: Usage, received: int, written: Callable[[int], None]) -> Report:
    """Close the month of what was sent; ``late`` is sent after that.

    ``received``: records on ``usage.events``. ``written`` waits until so many are accounted for in PostgreSQL.
    """
    month = Month(late.timestamp.year, late.timestamp.month)
    with connect(settings.dsn, application="demo", autocommit=True) as connection:
        apply(connection, read_invoicing_files([demo_dir() / "invoicing.yaml"]), actor=ACTOR, reason="demo")
        missing = _refused(settings, month)
        _say(f"closing {month} was refused: {len(missing)} things missing; deciding on them")
        _decide(settings, connection)
        _say(f"closing {month}")
        closed = close_month(settings, month, actor=ACTOR, estimator=_estimator(settings), wait_s=_PATIENCE_S)
        if closed.failed:
            raise CommandError(f"{closed.failed[0].payer} could not be closed: {closed.failed[0].problem}")
        issued = sorted(listed(connection, kind="invoice", state="issued"), key=lambda one: one.account)
        shown = read(connection, next(one.id for one in issued if one.account == SHOWN))
        _say("sending an event that comes too late")
        with UsageProducer.from_settings(settings, source="demo-gateway") as producer:
            producer.emit_usage(late)
            producer.flush(_PATIENCE_S)
        written(received + 1)
        made = _adjusted(connection)
        _say("writing PDFs")
        folder = settings.data_dir / "invoices"
        written_pdfs = list(write_pdfs(settings.dsn, [*(one.id for one in issued), made.document], folder))
        if problem := next((one.problem for one in written_pdfs if one.problem), None):
            raise CommandError(problem)
        paths = [one.path for one in written_pdfs if one.path is not None]
        return Report(month, missing, issued, shown, paths, read(connection, made.document), made)


def _estimator(settings: Settings) -> Estimator:
    return lambda connection, accounts: at_risk.estimator(connection, accounts, load_schemas(settings.registry_url))


def _refused(settings: Settings, month: Month) -> tuple[Missing, ...]:
    try:
        close_month(settings, month, actor=ACTOR, estimator=_estimator(settings), wait_s=_PATIENCE_S)
    except NotClosable as refused:
        return refused.missing
    raise CommandError(f"expected the gate to refuse {month} for what is undecided, and it was closed")


def _decide(settings: Settings, connection: "Connection[Any]") -> None:
    """Decide on what the gate named: enter the contract, mend what can be mended, discard what is no usage."""
    publish(settings.dsn, read_account_files([demo_dir() / "new-customer.yaml"]), actor=ACTOR, reason="entered late")
    late = read_invoicing_files([demo_dir() / "new-customer-invoicing.yaml"])
    apply(connection, late, actor=ACTOR, reason="entered late")
    schemas = load_schemas(settings.registry_url)
    unreadable = dead_letters.to_discard(connection, Selection("dead_lettered", Reason.UNDECODABLE))
    dead_letters.discard(connection, unreadable, actor=ACTOR, why="no usage event: a probe of the port")
    mend = dead_letters.to_replay(connection, Selection("dead_lettered", Reason.NOT_A_NUMBER))
    replay(connection, settings, schemas, mend, why="the service told how many", mend=parse_mend([MENDED]))
    _await(connection, _UNDECIDED, "what was decided is not in the money")


_UNDECIDED = """
SELECT count(*) = 0 FROM billing.unrated_event
WHERE state = 'parked' OR (state = 'dead_lettered' AND decision IS DISTINCT FROM 'discard')
"""


def _adjusted(connection: "Connection[Any]") -> Made:
    """Bill what came late. Nobody needs to: the account's next invoice would have it."""
    _await(
        connection, f"SELECT count(*) > 0 FROM billing.rated_usage WHERE idempotency_key = '{LATE_KEY}'", "the event"
    )
    now = datetime.now(UTC)
    (made,) = bill_adjustments(connection, payer_of(connection, SHOWN, now), now=now, actor=ACTOR)
    return made


def _await(connection: "Connection[Any]", query: str, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while connection.execute(query).fetchone() != (True,):
        if time.monotonic() > deadline:
            raise CommandError(f"{what} after {_PATIENCE_S:.0f} s")
        time.sleep(0.1)


def _say(text: str) -> None:
    err.print(text, highlight=False)
