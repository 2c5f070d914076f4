"""``tally gaps``: sequence numbers that did not arrive, what is known of them, and a person's word on them."""

import re
from contextlib import closing
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from pipeline.cli.context import DataDir, Grace, Json, grace_of, settings_for
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.gaps import Verdict, because, when
from pipeline.infra.postgres import connect
from pipeline.operations import gaps
from pipeline.operations.gaps import AcceptedGap, Gaps, NotMissing, Run
from pipeline.operations.status import gap_json

group = typer.Typer(help="Missing sequence numbers: usage that may not have arrived.", no_args_is_help=True)

_RUN = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="gaps")


@group.command("list")
def list_(
    source: Annotated[str | None, typer.Option(help="Only this source, as its events carry it: name/epoch.")] = None,
    accepted: Annotated[
        bool, typer.Option("--accepted", help="What persons accepted, instead of what is open.")
    ] = False,
    grace: Grace = None,
    limit: Annotated[int, typer.Option(min=1, help="Most gaps shown.")] = gaps.EXPLAINED_MAX,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List runs of sequence numbers that should have arrived and did not: when they were sent, and the likely cause.

    Exit code 4 when there are any.
    """
    settings = settings_for(data_dir)
    with closing(connect(settings.dsn, application="gaps", autocommit=True)) as connection:
        if accepted:
            decided = gaps.accepted_gaps(connection, source=source, limit=limit)
            _show_accepted(decided, as_json=as_json)
            return
        found = gaps.open_gaps(connection, grace_s=grace_of(grace, settings), source=source, limit=limit)
    if as_json:
        emit_json(
            {
                "sequence_numbers": found.missing,
                "runs": found.runs,
                "sources": found.sources,
                "gaps": [gap_json(gap) for gap in found.explained],
            }
        )
    elif found.runs:
        _show(found)
    else:
        err.print("no sequence numbers are missing")
    if found.runs:
        raise typer.Exit(EXIT_FINDINGS)


@group.command()
def accept(
    source: Annotated[str, typer.Argument(help="The source, as its events carry it: name/epoch.")],
    numbers: Annotated[
        list[str] | None, typer.Argument(metavar="NUMBERS", help="17, or 17-40, of those that are missing.")
    ] = None,
    verdict: Annotated[
        Verdict | None,
        typer.Option(
            "--as",
            help="lost: used, and cannot be billed; never_existed: no event had them; sent_again: under other numbers.",
        ),
    ] = None,
    why: Annotated[str | None, typer.Option(help="The reason for the audit record.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of this source that are missing now.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, change nothing.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Accept missing numbers for good: they are no hole from now on. Should such an event come after all, it is billed.

    The decision is recorded with who took it and cannot be changed. Exit code 4 when a number is not missing; then
    nothing is recorded.
    """
    if verdict is None or not (why or "").strip():
        fail("a decision for good: say --as lost, never_existed or sent_again, and --why", EXIT_USAGE)
    if everything == bool(numbers):
        fail("say which NUMBERS of the source, or --all", EXIT_USAGE)
    runs = None if everything else [_run(text) for text in numbers or []]
    settings = settings_for(data_dir)
    with closing(connect(settings.dsn, application="gaps", autocommit=True)) as connection:
        try:
            done = gaps.accept(
                connection,
                source,
                runs,
                verdict=verdict,
                reason=(why or "").strip(),
                actor=settings.actor,
                dry_run=dry_run,
            )
        except NotMissing as error:
            fail(str(error), EXIT_FINDINGS)
    if not done:
        fail(f"no sequence numbers of {source} are missing", EXIT_NOT_FOUND)
    accepted = sum(run.last - run.first + 1 for run in done)
    if as_json:
        emit_json(
            {
                "source": source,
                "verdict": verdict,
                "accepted": 0 if dry_run else accepted,
                "would_accept": accepted if dry_run else 0,
                "runs": [run._asdict() for run in done],
            }
        )
    else:
        would = "would be" if dry_run else "are"
        out.print(
            f"{accepted:,} numbers of {source} {would} accepted as {verdict.value}: {', '.join(map(str, done))}",
            highlight=False,
            markup=False,
        )


def _run(text: str) -> Run:
    match = _RUN.fullmatch(text)
    run = Run(int(match[1]), int(match[2] or match[1])) if match else None
    if run is not None and 1 <= run.first <= run.last:
        return run
    return fail(f"expected a number such as 17, or a run such as 17-40, got {text!r}", EXIT_USAGE)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column == "count" else "left", header_style="dim")
    return table


def _show(found: Gaps) -> None:
    table = _table("source", "numbers", "count", "when", "likely cause")
    for gap in found.explained:
        table.add_row(gap.source, gap.numbers, f"{gap.missing:,}", when(gap), because(gap))
    out.print(table)
    more = found.runs - len(found.explained)
    err.print(
        f"{found.missing:,} numbers of {found.sources:,} sources are missing"
        + (f"; {more:,} more runs: --limit shows them" if more else ""),
        highlight=False,
    )


def _show_accepted(decided: list[AcceptedGap], *, as_json: bool) -> None:
    if as_json:
        emit_json({"accepted": [one._asdict() for one in decided]})
        return
    if not decided:
        err.print("nothing was accepted")
        return
    table = _table("source", "numbers", "as", "by", "at", "why")
    for one in decided:
        numbers = str(Run(one.first, one.last))
        table.add_row(one.source, numbers, one.verdict.value, one.actor, f"{one.at:%Y-%m-%d %H:%M}Z", one.reason)
    out.print(table)
