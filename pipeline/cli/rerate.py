"""`tally rerate`: price an open period anew, see what would change and why, then book it."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.billing.close_entries import CloseEntry
from pipeline.billing.rerate import Rerated, preview
from pipeline.billing.rerate import rerate as book
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.months import month_named
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.money import amount_decimal, plain, quantity_decimal
from pipeline.core.periods import format_instant, to_micros

#: Entries shown before the rest is only counted; --json has all.
_SHOWN_MAX = 50
#: Where a month begins first.
_FIRST_ZONE = "Pacific/Kiritimati"
#: A period belongs to the month it ends in, and may have begun so long before.
_LONGEST_PERIOD = timedelta(days=366)


def register(app: typer.Typer) -> None:
    app.command()(rerate)


def rerate(
    period: Annotated[str, typer.Option(metavar="YYYY-MM", help="The month that the periods end in.")],
    account: Annotated[str | None, typer.Option(help="Only this account.")] = None,
    charge: Annotated[str | None, typer.Option(help="Only lines of this charge.")] = None,
    why: Annotated[str | None, typer.Option(help="The reason, kept with the entries.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Bring an open month to its closing prices: back-dated prices and contracts, fees, charges priced at the close.

    What differs is booked as entries beside the rated rows, which stay as they are. Exit code 4 where an account has a
    problem that must be settled first; the others are booked.
    """
    month, now = month_named(period, "--period"), datetime.now(UTC)
    if month.period_in(_FIRST_ZONE).start_us > to_micros(now + _LONGEST_PERIOD):
        fail(f"expected a month that has begun, got {period}: what it will hold is not known yet", EXIT_USAGE)
    if not dry_run and not (why or "").strip():
        fail("expected --why, a reason that is kept with the entries; or --dry-run", EXIT_USAGE)
    settings = settings_for(data_dir)
    try:
        found = list(preview(settings.dsn, month, account=account, charge=charge, begun_by=now))
    except LookupError as error:
        fail(str(error), EXIT_NOT_FOUND)
    entries = sum(len(one.entries) for one in found)
    if not as_json:
        show(found)
    if entries and not dry_run:
        _confirm(entries, yes=yes)
        actor, note = settings.actor, why or ""
        found = list(book(settings.dsn, month, account=account, charge=charge, actor=actor, note=note, begun_by=now))
        booked = sum(len(one.entries) for one in found)
        err.print(f"Booked {booked:,} entries. `tally explain line:ID` shows them.", highlight=False)
    if as_json:
        emit_json({"period": period, "booked": not dry_run, "accounts": [as_data(one) for one in found]})
    if any(one.problem for one in found):
        raise typer.Exit(EXIT_FINDINGS)


def _confirm(entries: int, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        fail(f"would book {entries:,} entries: there is no terminal to ask on, so say --yes or --dry-run", EXIT_USAGE)
    typer.confirm(f"book {entries:,} entries?", abort=True, err=True)


def as_data(one: Rerated) -> dict[str, Any]:
    """What was found for an account, as JSON-ready data."""
    return {
        "account": one.account,
        "period_start": format_instant(one.period.start_us),
        "period_end": format_instant(one.period.end_us),
        "problem": one.problem,
        "entries": [_entry_data(entry) for entry in one.entries],
    }


def _entry_data(entry: CloseEntry) -> dict[str, Any]:
    terms = entry.terms
    return {
        "line": None if entry.line_id is None else f"line:{entry.line_id}",
        "charge": terms.charge,
        "cell": terms.cell,
        "contract": terms.contract,
        "price_version": terms.price_version,
        "segment_start": format_instant(terms.segment_start_us),
        "currency": terms.currency,
        "reasons": [reason.value for reason in entry.reasons],
        "quantity_before": quantity_decimal(entry.quantity_before),
        "quantity_after": quantity_decimal(entry.quantity_after),
        "amount_before": amount_decimal(entry.amount_before),
        "amount_after": amount_decimal(entry.amount_after),
        "amount": amount_decimal(entry.amount),
    }


def show(found: Sequence[Rerated]) -> None:
    """What would be booked, as a table; problems and the sum on stderr."""
    entries = [(one.account, entry) for one in found for entry in one.entries]
    if entries:
        out.print(_table(entries[:_SHOWN_MAX]))
    if len(entries) > _SHOWN_MAX:
        err.print(f"and {len(entries) - _SHOWN_MAX:,} more entries: --json shows all", highlight=False)
    for one in found:
        if one.problem:
            err.print(f"[red]{escape(one.account)}[/]: {escape(one.problem)}", highlight=False)
    sums: defaultdict[str, int] = defaultdict(int)
    for _, entry in entries:
        sums[entry.terms.currency] += entry.amount
    if not found:
        err.print("Nothing to book: every line stands at its closing price.")
    for currency, amount in sorted(sums.items()):
        accounts = len({account for account, entry in entries if entry.terms.currency == currency})
        err.print(
            f"In sum {_signed(amount_decimal(amount))} {currency} on {accounts:,} account{'s' * (accounts != 1)}.",
            highlight=False,
        )


def _table(entries: Iterable[tuple[str, CloseEntry]]) -> Table:
    table = Table()
    for column in ("account", "charge", "priced by", "from", "why"):
        table.add_column(column, overflow="fold")
    for column in ("quantity", "holds", "closing price", "to book"):
        table.add_column(column, justify="right")
    for account, entry in entries:
        terms = entry.terms
        before, after = (plain(quantity_decimal(q)) for q in (entry.quantity_before, entry.quantity_after))
        table.add_row(
            escape(account),
            escape(f"{terms.charge} [{terms.cell}]" if terms.cell else terms.charge),
            escape(terms.price_version),
            format_instant(terms.segment_start_us).removesuffix("T00:00:00Z"),  # nearly all begin with a day
            ", ".join(reason.value.replace("_", " ") for reason in entry.reasons),
            after if before == after else f"{before} → {after}",
            plain(amount_decimal(entry.amount_before)),
            plain(amount_decimal(entry.amount_after)),
            f"{_signed(amount_decimal(entry.amount))} {terms.currency}",
        )
    return table


def _signed(amount: Decimal) -> str:
    return ("+" if amount > 0 else "") + plain(amount)
