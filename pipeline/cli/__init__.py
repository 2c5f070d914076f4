"""The command ``tally``: data on stdout, progress and logs on stderr, ``--json`` everywhere.

Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 findings (a difference, an unmet check). One module per command
group; each registers itself on the root.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli.output import run_reporting_errors


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tally {version('tally-billing')}")
        raise typer.Exit


#: Modules, the commands that each registers, in the order of `tally --help`.
MODULES = {
    "demo": ("demo",),
    "services": ("up", "down", "doctor", "topics", "migrate"),
    "workers": ("rater", "sink", "relay", "alerts"),
    "produce": ("produce",),
    "plans": ("plans",),
    "accounts": ("accounts",),
    "invoicing": ("invoicing", "fx"),
    "status": ("status",),
    "dlq": ("dlq",),
    "gaps": ("gaps",),
    "explain": ("explain",),
    "reconcile": ("reconcile",),
    "rerate": ("rerate",),
    "close": ("close",),
    "invoices": ("invoices",),
    "usage": ("usage",),
    "backfill": ("backfill",),
    "cases": ("cases",),
    "credits": ("credits", "commitments"),
}
_MODULE_OF = {command: module for module, commands in MODULES.items() for command in commands}


class _Commands(Mapping[str, Any]):
    """Commands by name, each module imported when one of its commands is asked for: all of them take a second of CPU,
    the one that is meant a third of it."""

    def __getitem__(self, name: str) -> Any:
        registered = typer.Typer(rich_markup_mode="rich")
        import_module(f"pipeline.cli.{_MODULE_OF[name]}").register(registered)
        return typer.main.get_group(registered).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULE_OF)

    def __len__(self) -> int:
        return len(_MODULE_OF)


class _Root(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": _Commands()})


app = typer.Typer(
    name="tally",
    cls=_Root,
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


def main() -> None:
    """Run the command line; expected errors end with one clear message, not a traceback."""
    run_reporting_errors(app)
