"""The command ``tally``: data on stdout, progress and logs on stderr, ``--json`` everywhere.

Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 findings (a difference, an unmet check). One module per command
group; each registers itself on the root.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from pipeline.cli import (
    accounts,
    backfill,
    cases,
    credits,
    demo,
    dlq,
    explain,
    gaps,
    plans,
    produce,
    reconcile,
    rerate,
    services,
    status,
    usage,
    workers,
)
from pipeline.cli.output import run_reporting_errors


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tally {version('tally-billing')}")
        raise typer.Exit


app = typer.Typer(
    name="tally",
    help="Usage billing on Kafka: events in, invoice lines out, every line proved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Usage billing on Kafka: events in, invoice lines out, every line proved."""


for group in (
    demo,
    services,
    workers,
    produce,
    plans,
    accounts,
    status,
    dlq,
    gaps,
    explain,
    reconcile,
    rerate,
    usage,
    backfill,
    cases,
    credits,
):
    group.register(app)


def main() -> None:
    """Run the command line; expected errors end with one clear message, not a traceback."""
    run_reporting_errors(app)
