"""``tally backfill``: usage brought in later, under a name: staged, looked at, committed or reverted as a whole."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from psycopg import Connection
from psycopg.errors import CheckViolation
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.dlq_view import table_of
from pipeline.cli.output import EXIT_ERROR, EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.cli.produce import Format, format_of, mapping_of, rate_of
from pipeline.cli.usage import await_outcome, carry_out, confirmed
from pipeline.core.corrections import ReasonCode
from pipeline.infra.avro import load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations import backfills
from pipeline.operations.backfills import LAG_MAX, Backfill, BackfillError, Finding, Staged
from pipeline.operations.corrections import Decision
from pipeline.operations.events import Mend
from pipeline.producer import Usage
from pipeline.producer.files import BadRow, MappingError, read_csv, read_jsonl

#: Rows shown of bad ones in a file, and of accounts in a backfill.
_SHOWN_MAX = 20

group = typer.Typer(help="Backfills: usage brought in later, as a whole.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="backfill")


Name = Annotated[str, typer.Argument(help="The backfill.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


# -- stage and look


@group.command()
def stage(
    name: Annotated[str, typer.Argument(help="A new name: small letters, digits, '.', '_' and '-'.")],
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="CSV, or JSON lines (CloudEvents too).")],
    why: Annotated[str, typer.Option(help="What it is and where it comes from, for the record.")],
    mapping: Annotated[
        Path | None, typer.Option(help="YAML: which CSV columns hold what, as for `tally produce`.")
    ] = None,
    file_format: Annotated[Format | None, typer.Option("--format", help="Else by the file's name.")] = None,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Put a file's usage into PostgreSQL under a name, to be looked at. Nothing is billed. All of the file, or none."""
    settings = settings_for(data_dir)
    try:
        if (file_format or format_of(file)) is Format.CSV:
            rows = read_csv(file, mapping_of(mapping))
        else:
            rows = read_jsonl(file)
        bad: list[BadRow] = []
        events = [_staged(row) for row in rows if not _is_bad(row, bad)]
    except MappingError as error:
        fail(str(error), EXIT_USAGE)
    if bad:
        said = "\n".join(f"line {row.line}: {row.reason}" for row in bad[:_SHOWN_MAX])
        more = f"\nand {len(bad) - _SHOWN_MAX:,} more" if len(bad) > _SHOWN_MAX else ""
        fail(f"nothing is staged, {len(bad):,} rows of {file} are no usage:\n{said}{more}")
    with _connected(settings) as connection:
        try:
            staged = backfills.stage(connection, name, events, note=why, actor=settings.actor)
        except CheckViolation:
            fail(f"expected a name of small letters, digits, '.', '_' and '-', at most 63, got {name!r}", EXIT_USAGE)
        found = backfills.findings(connection, staged)
        _show(connection, staged, found, as_json=json_)


def _is_bad(row: Usage | BadRow, bad: list[BadRow]) -> bool:
    if isinstance(row, BadRow):
        bad.append(row)
        return True
    return False


def _staged(row: Usage | BadRow) -> Staged:
    assert isinstance(row, Usage)
    properties = {
        name: format(value, "f") if isinstance(value, Decimal) else str(value) for name, value in row.properties.items()
    }
    return Staged(row.account, row.idempotency_key, row.event_type, row.timestamp, row.subject, properties)


@group.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="Most shown, newest first.")] = 20,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """List backfills and how far they are."""
    with _connected(settings_for(data_dir)) as connection:
        found = backfills.all_of(connection, limit)
    if json_:
        emit_json([_json(one) for one in found])
        return
    if not found:
        err.print("no backfills")
        return
    table = table_of("name", "state", "events", "sent", "staged at", "by", "why", right=("events", "sent"))
    for one in found:
        at = f"{one.staged_at.astimezone(UTC):%Y-%m-%d %H:%M}"
        table.add_row(one.name, one.state, f"{one.events:,}", f"{one.sent:,}", at, one.staged_by, one.note)
    out.print(table)


@group.command()
def show(name: Name, data_dir: DataDir = None, json_: Json = False) -> None:
    """Show what is in a backfill, what is in its way (then exit code 4), and what became of it."""
    with _connected(settings_for(data_dir)) as connection:
        backfill = _get(connection, name)
        waits = backfill.state in ("staged", "committing")
        found = backfills.findings(connection, backfill) if waits else []
        _show(connection, backfill, found, as_json=json_)


def _show(connection: "Connection[Any]", backfill: Backfill, found: list[Finding], *, as_json: bool) -> None:
    summary = backfills.summary(connection, backfill.name, _SHOWN_MAX)
    outcome = backfills.outcome(connection, backfill.name) if backfill.sent else None
    if as_json:
        emit_json(
            _json(backfill)
            | {
                "summary": [one._asdict() for one in summary],
                "findings": [one._asdict() for one in found],
                "outcome": outcome and outcome._asdict(),
            }
        )
    else:
        out.print(Text(f"{backfill.name}: {backfill.state}, {backfill.events:,} events, {backfill.note}", "bold"))
        table = table_of("account", "event type", "events", "from", "to", right=("events",))
        for one in summary:
            first, last = (f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" for at in (one.first_at, one.last_at))
            table.add_row(one.account, one.event_type, f"{one.events:,}", first, last)
        out.print(table)
        for finding in found:
            said = f"{finding.events:,} {finding.what} (such as {finding.example})"
            out.print(Text(said, "red" if finding.blocks else "yellow"))
        if outcome is not None:
            out.print(
                f"sent {backfill.sent:,}: billed {outcome.billed:,}, voided {outcome.voided:,}, "
                f"parked {outcome.parked:,}, dead-lettered {outcome.dead_lettered:,}, "
                f"duplicates or on their way {outcome.elsewhere:,}",
                highlight=False,
            )
        elif backfill.state == "staged" and not any(one.blocks for one in found):
            err.print(f"`tally backfill commit {backfill.name}` bills it", highlight=False)
    if any(one.blocks for one in found):
        raise typer.Exit(EXIT_FINDINGS)


# -- commit and revert


@group.command()
def commit(
    name: Name,
    rate: Annotated[str | None, typer.Option(metavar="N/s", help="At most so many events a second.")] = None,
    max_lag: Annotated[
        int, typer.Option(min=0, help="Wait while more events than that wait for the raters: live usage comes first.")
    ] = LAG_MAX,
    yes: Yes = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Send a backfill's events to be billed. Stopped on the way, the same command goes on; so does a revert."""
    per_second = rate_of(rate)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        backfill = _get(connection, name)
        confirmed(f"commit {backfill.events - backfill.sent:,} events of {name}", yes=yes)
        try:
            with _bar(f"committing {name}", backfill.events, backfill.sent) as (sent, waits):
                done = backfills.commit(
                    connection,
                    settings,
                    load_schemas(settings.registry_url),
                    name,
                    actor=settings.actor,
                    rate=per_second,
                    lag_max=max_lag,
                    on_sent=sent,
                    on_lag=waits,
                )
        except BackfillError as error:
            fail(str(error))
    if json_:
        emit_json(_json(done))
    else:
        err.print(f"committed {name}: {done.events:,} events; `tally backfill show {name}` tells what became of them")


@group.command()
def revert(
    name: Name,
    why: Annotated[str, typer.Option(help="Why, for the record.")],
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for what is on its way.")] = 60.0,
    yes: Yes = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Take back all that a backfill billed; one that was only staged is discarded.

    Only while the periods are open. Its keys stay used up. While an event of it is parked it stays in state reverting:
    once that is settled, the same command takes it back too.
    """
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        backfill = _get(connection, name)
        confirmed(f"revert {name}, which is {backfill.state}", yes=yes)
        try:
            picks = backfills.begin_revert(connection, settings, name, actor=settings.actor, wait_s=wait)
            decision = Decision("void", ReasonCode.BACKFILL, why, settings.actor, Mend(), name)
            decided = carry_out(connection, settings, picks, decision)
            states = await_outcome(connection, decided.numbers, wait)
            done = backfills.end_revert(connection, name, actor=settings.actor)
        except BackfillError as error:
            fail(str(error))
    refused = [{"event": str(pick), "problem": problem} for pick, problem in decided.refused]
    if json_:
        emit_json(_json(done) | {"corrections": len(decided.numbers), "states": states, "refused": refused})
    else:
        for one in refused[:_SHOWN_MAX]:
            err.print(Text(f"{one['event']} {one['problem']}"), style="red")
        err.print(f"{name} is {done.state}; took back {len(decided.numbers):,} events", highlight=False)
        if done.state == "reverting":
            err.print(f"not all of it is settled: `tally backfill show {name}`, then revert it again", style="yellow")
    if done.state == "reverting":
        raise typer.Exit(EXIT_ERROR)


# -- shared


def _get(connection: "Connection[Any]", name: str) -> Backfill:
    try:
        return backfills.get(connection, name)
    except BackfillError as error:
        fail(str(error), EXIT_NOT_FOUND)


def _json(backfill: Backfill) -> dict[str, Any]:
    return {name: getattr(backfill, name) for name in Backfill.__dataclass_fields__}


@contextmanager
def _connected(settings: Settings) -> Iterator["Connection[Any]"]:
    with closing(connect(settings.dsn, application="backfill", autocommit=True)) as connection:
        try:
            yield connection
        except BackfillError as error:
            fail(str(error))


@contextmanager
def _bar(what: str, total: int, done: int) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar on stderr where there is a terminal: call the first with events sent, the second with a lag waited for."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as display:
        task = display.add_task(what, total=total, completed=done, note="")
        yield (
            lambda events: display.update(task, advance=events, note=""),
            lambda waiting: display.update(task, note=f"waits: {waiting:,} events wait for the raters"),
        )
