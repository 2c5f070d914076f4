"""Which module has which command, and that only its own is imported."""

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest
import typer

import pipeline.cli
from pipeline.cli import MODULES, app
from pipeline.cli.output import EXIT_USAGE, CommandError


def test_the_table_names_what_each_module_registers() -> None:
    found: dict[str, tuple[str, ...]] = {}
    for module in pkgutil.iter_modules(pipeline.cli.__path__):
        if module.name != "__main__" and hasattr(imported := import_module(f"pipeline.cli.{module.name}"), "register"):
            registered = typer.Typer()
            imported.register(registered)
            found[module.name] = tuple(typer.main.get_group(registered).commands)
    assert found == MODULES


def test_a_command_imports_no_other_command() -> None:
    """A second of CPU for each call of any command otherwise."""
    program = (
        "import sys; from pipeline.cli import app; app(['gaps', '--help'], standalone_mode=False); "
        "print(*(name for name in sys.modules if name.startswith('pipeline.cli.')))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    imported = {name.removeprefix("pipeline.cli.") for name in said.splitlines()[-1].split()}
    assert imported & MODULES.keys() == {"gaps"}


@pytest.mark.parametrize(
    "command",
    [
        ["close", "october"],
        ["close", "2026-13", "--dry-run"],
        ["invoices", "list", "--month", "october"],
        ["invoices", "threshold", "--month", "10"],
        ["rerate", "--period", "october"],
    ],
)
def test_a_malformed_month_is_wrong_usage(command: list[str]) -> None:
    """Said before any service is asked."""
    with pytest.raises(CommandError, match="expected a month such as 2026-10, got") as refused:
        app(command, standalone_mode=False)
    assert refused.value.code == EXIT_USAGE
