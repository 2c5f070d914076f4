"""The command ``tally``: data on stdout, progress and logs on stderr, ``--json`` everywhere.

Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 findings (a difference, an unmet check). One module per command
group; each registers itself on the root.
"""

import typer

from pipeline.cli import accounts, demo, dlq, explain, plans, produce, reconcile, services, status, workers
from pipeline.cli.output import run_reporting_errors

app = typer.Typer(
    name="tally",
    help="Usage billing on Kafka: events in, invoice lines out, every line proved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for group in (demo, services, workers, produce, plans, accounts, status, dlq, explain, reconcile):
    group.register(app)


def main() -> None:
    """Run the command line; expected errors end with one clear message, not a traceback."""
    run_reporting_errors(app)
