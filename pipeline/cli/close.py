"""`tally close`: prove that a month's usage has arrived, then issue every payer's documents."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.billing.close import Closed, NotClosable, Readiness, WorkersEnded, close_month, preview, readiness
from pipeline.billing.close_payers import Payer, Prepared
from pipeline.billing.gate import Estimator, Missing
from pipeline.billing.queue import Progress as Tasks
from pipeline.billing.rerate import Month
from pipeline.billing.unbilled_voids import UnbilledVoid
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.months import month_named
from pipeline.cli.output import (
    EXIT_ERROR,
    EXIT_FINDINGS,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    emit_json,
    err,
    fail,
    out,
    service_days,
)
from pipeline.core.money import minor_decimal
from pipeline.core.periods import format_instant, to_micros
from pipeline.infra.avro import load_schemas
from pipeline.infra.logs import configure
from pipeline.infra.settings import Settings
from pipeline.operations import at_risk

#: Documents shown before the rest is only counted; --json has all.
_SHOWN_MAX = 50
#: Where a month begins first.
_FIRST_ZONE = "Pacific/Kiritimati"


def register(app: typer.Typer) -> None:
    app.command()(close)


def close(
    period: Annotated[str, typer.Argument(metavar="YYYY-MM", help="The month; of each account in its own time zone.")],
    account: Annotated[
        list[str] | None, typer.Option(help="Only the invoice that has this account on it; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be issued and what holds the close up; change nothing.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes (default: one for each core).")] = None,
    by: Annotated[str | None, typer.Option(help="Who closes (default: the user).")] = None,
    override: Annotated[bool, typer.Option("--override", help="Close although something is missing.")] = False,
    why: Annotated[str | None, typer.Option(help="The reason for --override, kept in the audit trail.")] = None,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for workers to read usage to its end.")
    ] = 10.0,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Close a month: first the completeness gate, then an invoice for every payer. Run again, it goes on or is done.

    Exit code 4 where the gate found something missing (nothing is changed then), where payers could not be closed, or
    where a month that is closed has a voided invoice that is billed nowhere else.
    """
    month = month_named(period)
    if month.period_in(_FIRST_ZONE).start_us > to_micros(datetime.now(UTC)):
        fail(f"expected a month that has begun, got {period}: there is nothing to close yet", EXIT_USAGE)
    if override and not (why or "").strip():
        fail("expected --why with --override, a reason that is kept in the audit trail", EXIT_USAGE)
    if why and not override:
        fail("expected --override with --why: a reason alone passes nothing over", EXIT_USAGE)
    settings = settings_for(data_dir)
    configure(settings, worker="close")
    actor = by or settings.actor
    accounts = sorted(set(account or ()))
    estimator = _estimator(settings)
    try:
        if dry_run:
            ready = readiness(settings, month, accounts=accounts, estimator=estimator, wait_s=wait)
            if not ready.is_closed:
                _dry_run(settings, month, accounts, actor, ready, why or "", as_json=as_json)
                return
            closed = Closed(None, False, Tasks(0, 0, 0, 0), {}, (), ready.voided, 0.0)
        else:
            with _progress() as tell:
                closed = close_month(
                    settings,
                    month,
                    accounts=accounts,
                    actor=actor,
                    why=why or "",
                    workers=workers,
                    estimator=estimator,
                    wait_s=wait,
                    tell=tell,
                )
    except LookupError as error:
        fail(str(error), EXIT_NOT_FOUND)
    except WorkersEnded as error:
        fail(str(error), EXIT_ERROR)
    except NotClosable as error:
        if as_json:
            emit_json({"period": period, "closed": False, "missing": [one.as_json() for one in error.missing]})
        else:
            _show_refusal(error.missing, period)
        raise typer.Exit(EXIT_FINDINGS) from None
    if as_json:
        emit_json(_closed_data(closed, period))
    else:
        _show_closed(closed, period)
        _show_voided(closed.voided)
    if closed.failed or (closed.run is None and any(one.month == month for one in closed.voided)):
        raise typer.Exit(EXIT_FINDINGS)


def _estimator(settings: Settings) -> Estimator:
    return lambda connection, accounts: at_risk.estimator(connection, accounts, load_schemas(settings.registry_url))


@contextmanager
def _progress() -> Iterator[Any]:
    columns = (
        TextColumn("closing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("payers"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as display:
        task = display.add_task("close", total=None, rate="", start=False)
        first: list[tuple[float, int]] = []

        def tell(tasks: Tasks) -> None:
            done = tasks.done + tasks.failed
            if not first:
                display.start_task(task)
                first.append((display.get_time(), done))
            seconds = display.get_time() - first[0][0]
            rate = f"{(done - first[0][1]) / seconds:,.0f}/s" if seconds > 1 else ""
            display.update(task, total=tasks.total, completed=done, rate=rate)

        yield tell


# What stands in the way ---------------------------------------------------------------------------------------------


def _show_missing(missing: Sequence[Missing]) -> None:
    table = Table("missing", "likely worth", "what to do")
    for one in missing:
        money = ", ".join(f"{amount:,f} {currency}" for currency, amount in one.likely_money)
        if one.unpriced:
            money += f"{' and ' if money else ''}{one.unpriced:,} without a price"
        table.add_row(escape(one.what), money, escape(one.todo))
    out.print(table)


def _show_refusal(missing: Sequence[Missing], period: str) -> None:
    _show_missing(missing)
    err.print(f"{period} is not closed: {_count(len(missing), 'thing')} missing. Nothing was changed.", highlight=False)
    if all(one.overridable for one in missing):
        err.print("To close all the same: --override --why REASON, which is kept.", highlight=False)


def _show_voided(voided: Sequence[UnbilledVoid]) -> None:
    """What no close bills, since its month was closed before it was withdrawn."""
    for one in voided[:_SHOWN_MAX]:
        what = f"{one.number} of {one.account}, {one.total:,f} {one.currency}, is void and billed nowhere else"
        err.print(f"{escape(what)}: {escape(one.todo)}", highlight=False)
    if len(voided) > _SHOWN_MAX:
        err.print(f"and {len(voided) - _SHOWN_MAX:,} more: finance.unbilled_voids has all", highlight=False)


# What came of it ----------------------------------------------------------------------------------------------------


def _show_closed(closed: Closed, period: str) -> None:
    if closed.run is None:
        err.print(f"{period} is closed already: nothing was changed. `tally invoices list --month {period}` shows it.")
        return
    run, tasks, by = closed.run, closed.progress, closed.outcomes
    went_on = ", which had been begun before," if closed.resumed else ""
    err.print(
        f"Run {run.id}{went_on} closed {period} at catalog version {run.catalog_seq:,}: "
        f"{_count(tasks.documents, 'document')} for {_count(tasks.done, 'payer')} in {closed.seconds:,.1f} s.",
        highlight=False,
    )
    words = {
        "drafted": "to be reviewed: `tally invoices list --state draft`, then `tally invoices review ID`",
        "reviewed": "reviewed, to be issued: `tally invoices list --state reviewed`, then `tally invoices issue ID`",
        "nothing": "owed nothing",
        "no_contract": "had no billing period that ends in this month",
        "closed": "closed before",
    }
    for outcome, text in words.items():
        if count := by.get(outcome):  # type: ignore[call-overload]
            err.print(f"{_count(count, 'payer')} {text}.", highlight=False)
    if tasks.documents:
        err.print(f"`tally invoices list --month {period}` shows the documents.", highlight=False)
    if tasks.failed:
        table = Table("payer", "could not be closed")
        for one in closed.failed:
            table.add_row(escape(one.payer), escape(one.problem or ""))
        out.print(table)
        err.print(
            f"{_count(tasks.failed, 'payer')} could not be closed; the same command tries them again.", highlight=False
        )


def _closed_data(closed: Closed, period: str) -> dict[str, Any]:
    run = closed.run
    return {
        "period": period,
        "closed": True,
        "changed": run is not None,
        "run": run.id if run else None,
        "resumed": closed.resumed,
        "catalog_version": run.catalog_seq if run else None,
        "documents": closed.progress.documents,
        "payers": closed.outcomes,
        "failed": [{"payer": one.payer, "problem": one.problem} for one in closed.failed],
        "voided": [one.as_json() for one in closed.voided],
        "seconds": round(closed.seconds, 3),
    }


# What would come of it ----------------------------------------------------------------------------------------------


def _dry_run(
    settings: Settings,
    month: Month,
    accounts: Sequence[str],
    actor: str,
    ready: Readiness,
    why: str,
    *,
    as_json: bool,
) -> None:
    """Show the documents, then what the gate says of closing; exit code 4 where the close itself would have it."""
    held_up = ready.is_held_up(why)
    rows: list[dict[str, Any]] = []
    totals: defaultdict[str, Decimal] = defaultdict(Decimal)
    problems = documents = 0
    table = Table("payer", "period", "lines")
    for column in ("net", "tax", "total", "payable"):
        table.add_column(column, justify="right")
    for payer in preview(settings, month, accounts=accounts, actor=actor, going_on=ready.going_on):
        if payer.problem is not None:
            problems += 1
            rows.append({"payer": payer.task.payer, "problem": payer.problem})
            err.print(f"[red]{escape(payer.task.payer)}[/]: {escape(payer.problem)}", highlight=False)
        for one in payer.documents:
            documents += 1
            totals[one.document.currency] += minor_decimal(one.document.total_amount, one.document.currency)
            if as_json:
                rows.append(_document_data(payer, one))
            elif documents <= _SHOWN_MAX:
                table.add_row(*_document_row(one))
    if as_json:
        emit_json(
            {
                "period": str(month),
                "closed": False,
                "missing": [one.as_json() for one in ready.missing],
                "passed_over": bool(ready.missing) and not held_up,
                "voided": [one.as_json() for one in ready.voided],
                "documents": rows,
            }
        )
    else:
        if documents:
            out.print(table)
        if documents > _SHOWN_MAX:
            err.print(f"and {documents - _SHOWN_MAX:,} more documents: --json shows all", highlight=False)
        sums = ", ".join(f"{amount:,f} {currency}" for currency, amount in sorted(totals.items())) or "nothing"
        err.print(f"Would issue {_count(documents, 'document')}, {sums} in sum. Nothing was changed.", highlight=False)
        _show_voided(ready.voided)
        if held_up:
            _show_refusal(ready.missing, str(month))
        elif ready.missing:
            _show_missing(ready.missing)
            err.print(f"The gate would pass over {_count(len(ready.missing), 'thing')} missing.", highlight=False)
        else:
            err.print("The gate would let it pass: nothing is missing.", highlight=False)
    if problems or held_up:
        raise typer.Exit(EXIT_FINDINGS)


def _document_row(one: Prepared) -> list[str]:
    document = one.document
    amounts = document.net_amount, document.tax_amount, document.total_amount, document.payable_amount
    money = [f"{minor_decimal(amount, document.currency):,f}" for amount in amounts]
    money[-1] += f" {document.currency}"
    days = service_days(document.period, one.basis.customer.billing_time_zone or "UTC")
    return [escape(one.payer), days, str(len(document.lines)), *money]


def _document_data(payer: Payer, one: Prepared) -> dict[str, Any]:
    document = one.document
    return {
        "payer": payer.task.payer,
        "kind": document.kind,
        "legal_entity": document.legal_entity,
        "currency": document.currency,
        "period_start": format_instant(document.period.start_us),
        "period_end": format_instant(document.period.end_us),
        "time_zone": one.basis.customer.billing_time_zone,
        "lines": len(document.lines),
        "lines_amount": str(minor_decimal(document.lines_amount, document.currency)),
        "discounts_amount": str(minor_decimal(document.discounts_amount, document.currency)),
        "net_amount": str(minor_decimal(document.net_amount, document.currency)),
        "tax_amount": str(minor_decimal(document.tax_amount, document.currency)),
        "total_amount": str(minor_decimal(document.total_amount, document.currency)),
        "credits_amount": str(minor_decimal(document.credits_amount, document.currency)),
        "balance_amount": str(minor_decimal(document.balance_amount, document.currency)),
        "payable_amount": str(minor_decimal(document.payable_amount, document.currency)),
        "waits_for_review": one.basis.entity.review,
    }


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
