"""`tally reconcile`: law 8, everything that arrived is accounted for, or where not."""

from decimal import Decimal
from typing import Annotated

import typer
from rich.table import Table

from pipeline.billing.reconcile import Check, Reconciliation
from pipeline.billing.reconcile import reconcile as run_checks
from pipeline.cli.context import DataDir, Grace, Json, grace_of, settings_for
from pipeline.cli.output import EXIT_FINDINGS, emit_json, err, out

#: Accounts named before the rest is only counted; --json has all.
_NAMED_MAX = 5


def register(app: typer.Typer) -> None:
    app.command()(reconcile)


def reconcile(
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait this long for workers to catch up.")] = 0,
    grace: Grace = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Prove that every event that arrived is in one state and every rated row in the money. Exit code 4 if not."""
    settings = settings_for(data_dir)
    result = run_checks(settings, wait_s=wait, grace_s=grace_of(grace, settings))
    if as_json:
        emit_json(as_data(result))
    else:
        show(result)
    if not result.reconciled:
        raise typer.Exit(EXIT_FINDINGS)


def as_data(result: Reconciliation) -> dict[str, object]:
    """The reconciliation as one JSON-ready object."""
    return {
        "reconciled": result.reconciled,
        "checks": [
            {
                "name": check.name,
                "left": check.left,
                "right": check.right,
                "difference": check.difference,
                "detail": check.detail,
            }
            for check in result.checks
        ],
        "lags": [{"topic": lag.topic, "stage": lag.stage, "offsets": lag.offsets} for lag in result.lags],
        "estimated": [
            {"account": one.account, "month": one.month, "lines": one.lines, "command": one.command}
            for one in result.estimated
        ],
    }


def show(result: Reconciliation) -> None:
    """A table for people on stdout; what it means, and what to do, on stderr."""
    table = Table()
    table.add_column("check")
    for column in ("left", "right", "difference"):
        table.add_column(column, justify="right")
    table.add_column("detail")
    for check in result.checks:
        table.add_row(*_row(check))
    out.print(table)
    behind = [f"{lag.stage} by {lag.offsets:,} on {lag.topic}" for lag in result.lags if lag.offsets]
    if behind:
        err.print(
            f"Workers are behind: {', '.join(behind)}. `tally reconcile --wait 60` waits for them.", highlight=False
        )
    for one in result.estimated[:_NAMED_MAX]:
        err.print(
            f"{one.account} was re-rated and has changed since: {one.lines:,} lines of {one.month} are estimates "
            f"until the close, or `{one.command}`.",
            highlight=False,
            markup=False,
        )
    if len(result.estimated) > _NAMED_MAX:
        err.print(f"So are lines of {len(result.estimated) - _NAMED_MAX:,} more accounts.", highlight=False)
    if result.reconciled:
        err.print("[green]Reconciled[/]: no difference.")
    else:
        err.print("[red]Not reconciled[/]" + (": differences may only be lag." if behind else "."))


def _row(check: Check) -> tuple[str, ...]:
    difference = _number(check.difference)
    style = "[red]" if check.difference else "[green]"
    return check.name, _number(check.left), _number(check.right), f"{style}{difference}", check.detail


def _number(value: Decimal) -> str:
    text = f"{value:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
