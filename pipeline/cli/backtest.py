"""`tally plans backtest`: what a price change would have made of a month's usage, or of another system's bills."""

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.billing.backtest import Backtested
from pipeline.billing.backtest import backtest as run_backtest
from pipeline.billing.bills import BadBills, BillLine, compare_bills, read_bills
from pipeline.catalog.diff import charge_changes, percent_of, signed
from pipeline.catalog.files import read_price_files
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.months import month_named
from pipeline.cli.output import EXIT_FINDINGS, EXIT_USAGE, emit_json, err, fail, out
from pipeline.cli.publishing import show_findings
from pipeline.core.backtests import Compared
from pipeline.core.money import Amount, amount_decimal, plain, quantity_decimal

#: Rows of the table unless all are asked for.
_SHOWN_MAX = 20
_BAR_WIDTH = 16
_CSV_COLUMNS = (
    "account",
    "contract",
    "charge",
    "currency",
    "quantity_before",
    "quantity_after",
    "before",
    "after",
    "difference",
    "percent",
    "billed_before",
    "billed_after",
    "why",
)
_BILLS_CSV_COLUMNS = ("account", "charge", "here", "there", "difference", "verdict")


def backtest(
    files: Annotated[
        list[Path], typer.Argument(help="Price files; together they are one whole.", exists=True, dir_okay=False)
    ],
    period: Annotated[str, typer.Option(metavar="YYYY-MM", help="The month, in each account's billing time zone.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            exists=True,
            dir_okay=False,
            help="Compare with another system's bills: columns account, amount and, if it has them, charge.",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every row, not only the largest differences.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes (default: one per core).")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on stdout, every row.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Price a month's stored usage with these files as if they had always held: who pays more or less, and why.

    The month may be open or closed. Nothing is changed. Charges only: credits and commitments are not part of it.
    """
    if as_csv and as_json:
        fail("expected --csv or --json, got both", EXIT_USAGE)
    month = month_named(period, "--period")
    drafts = read_price_files(files)
    if drafts.findings:
        show_findings(drafts.findings, as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS)
    try:
        bills = None if against is None else read_bills(against)
    except BadBills as error:
        fail(str(error), EXIT_FINDINGS)
    items = [draft.item for draft in drafts.all()]
    with _progress() as step:
        accounts = sorted(
            run_backtest(settings_for(data_dir).dsn, month, items, whole=bills is not None, jobs=jobs, progress=step),
            key=lambda account: account.account,
        )
    if bills is not None:
        here: defaultdict[tuple[str, str], Amount] = defaultdict(int)
        for account in accounts:
            for one in account.prices:
                if one.after is not None:
                    here[account.account, one.charge] += one.after.billed
        _show_bills(compare_bills(here, bills), accounts, every=every, as_json=as_json, as_csv=as_csv)
        return
    rows = [Row(account.account, one) for account in accounts for one in account.prices if one.moved]
    if as_json:
        emit_json(_as_json(period, accounts, rows))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, _CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_data() for row in rows)
    else:
        _show(period, accounts, rows, every=every)


@dataclass(frozen=True, slots=True)
class Row:
    """A charge of an account's contract that moves."""

    account: str
    prices: Compared

    def why(self) -> str:
        """What makes it move, in words."""
        before, after = self.prices.before, self.prices.after
        if before is None:
            return "new charge"
        if after is None:
            return "the charge is gone"
        reasons = [change.words for change in charge_changes(before.charge, after.charge)]
        if before.quantity != after.quantity:
            reasons.append(f"measures {_quantity(before.quantity)} → {_quantity(after.quantity)}")
        if before.segments != after.segments:
            reasons.append(f"counts anew in {after.segments} parts of the month, not {before.segments}")
        return "; ".join(reasons) or "its share of a pool"

    def as_data(self) -> dict[str, str]:
        """Exact numbers as plain text."""
        one, before, after = self.prices, self.prices.before, self.prices.after
        percent = percent_of(before.amount, after.amount) if before and after else None
        return {
            "account": self.account,
            "contract": one.contract,
            "charge": one.charge,
            "currency": one.currency,
            "quantity_before": plain(quantity_decimal(before.quantity if before else 0)),
            "quantity_after": plain(quantity_decimal(after.quantity if after else 0)),
            "before": _plain(before.amount if before else 0),
            "after": _plain(after.amount if after else 0),
            "difference": _plain(one.moved),
            "percent": "" if percent is None else plain(percent),
            "billed_before": _plain(before.billed if before else 0),
            "billed_after": _plain(after.billed if after else 0),
            "why": self.why(),
        }


# The result ---------------------------------------------------------------------------------------------------------


def _sums(accounts: Sequence[Backtested]) -> dict[str, tuple[Amount, Amount]]:
    """By currency, what the charges that may move come to before and after."""
    sums: defaultdict[str, tuple[Amount, Amount]] = defaultdict(lambda: (0, 0))
    for account in accounts:
        for one in account.prices:
            before, after = sums[one.currency]
            amounts = [side.amount if side else 0 for side in (one.before, one.after)]
            sums[one.currency] = before + amounts[0], after + amounts[1]
    return dict(sorted(sums.items()))


def _as_json(period: str, accounts: Sequence[Backtested], rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "period": period,
        "accounts": len(accounts),
        "concerned": sum(account.way != "unconcerned" for account in accounts),
        "moved": len({row.account for row in rows}),
        "from_totals": sum(account.way == "totals" for account in accounts),
        "event_by_event": sum(account.way == "events" for account in accounts),
        "totals": [
            {
                "currency": currency,
                "before": _plain(before),
                "after": _plain(after),
                "difference": _plain(after - before),
                "percent": None if (percent := percent_of(before, after)) is None else plain(percent),
            }
            for currency, (before, after) in _sums(accounts).items()
        ],
        "charges": [row.as_data() for row in rows],
        **_troubles(accounts),
    }


def _troubles(accounts: Iterable[Backtested]) -> dict[str, Any]:
    return {
        "unpriced": [
            {"account": account.account, "before": account.unpriced[0], "after": account.unpriced[1]}
            for account in accounts
            if any(account.unpriced)
        ],
        "problems": [
            {"account": account.account, "problem": account.problem} for account in accounts if account.problem
        ],
    }


def _show(period: str, accounts: Sequence[Backtested], rows: Sequence[Row], *, every: bool) -> None:
    shown = sorted(rows, key=lambda row: -abs(row.prices.moved))
    shown = shown if every else shown[:_SHOWN_MAX]
    if shown:
        out.print(_table(period, shown))
    if len(shown) < len(rows):
        out.print(f"{len(rows) - len(shown):,} more rows with smaller differences: --all or --csv.")
    for currency, (before, after) in _sums(accounts).items():
        percent = percent_of(before, after)
        difference = _money(after - before, currency, sign=True)
        difference += "" if percent is None else f" ({signed(percent)} %)"
        out.print(f"{_money(before, currency)} → {_money(after, currency)}: {difference}", highlight=False)
    if not any(account.events or account.prices or account.problem for account in accounts):
        out.print(f"Nothing was used or owed in {period}.", highlight=False)
    ways = [account.way for account in accounts]
    concerned, moved = len(ways) - ways.count("unconcerned"), len({row.account for row in rows})
    out.print(
        f"{len(ways):,} accounts, {concerned:,} on prices that differ, {moved:,} that pay more or less. "
        f"Priced {ways.count('totals'):,} from running totals, {ways.count('events'):,} event by event.",
        highlight=False,
    )
    _warn(accounts)


def _table(period: str, rows: Sequence[Row]) -> Table:
    most: defaultdict[str, Amount] = defaultdict(int)
    for row in rows:
        most[row.prices.currency] = max(most[row.prices.currency], abs(row.prices.moved))
    table = Table("account", "charge", title=f"What moves in {period}, exact amounts", title_justify="left")
    for column in ("before", "after", "difference", "%"):
        table.add_column(column, justify="right")
    table.add_column("")
    table.add_column("why")
    for row in rows:
        one = row.prices
        before, after = (side.amount if side else 0 for side in (one.before, one.after))
        percent = percent_of(before, after)
        table.add_row(
            escape(row.account),
            escape(one.charge),
            _money(before, one.currency),
            _money(after, one.currency),
            _money(one.moved, one.currency, sign=True),
            "" if percent is None else signed(percent),
            _bar(one.moved, most[one.currency]),
            escape(row.why()),
        )
    return table


def _warn(accounts: Sequence[Backtested]) -> None:
    """What is missing from the numbers."""
    troubles = _troubles(accounts)
    for one in troubles["unpriced"][:_SHOWN_MAX]:
        err.print(
            f"WARNING: {one['account']}: {one['after']:,} events have no price with these files, {one['before']:,} "
            "have none today; they are not in the amounts.",
            highlight=False,
            soft_wrap=True,
        )
    for one in troubles["problems"][:_SHOWN_MAX]:
        err.print(f"WARNING: {one['account']} is not priced: {one['problem']}", highlight=False, soft_wrap=True)
    more = sum(max(len(found) - _SHOWN_MAX, 0) for found in troubles.values())
    if more:
        err.print(f"WARNING: {more:,} more accounts of that sort: --json has them.", highlight=False)


def _show_bills(
    lines: Sequence[BillLine], accounts: Sequence[Backtested], *, every: bool, as_json: bool, as_csv: bool
) -> None:
    """Each line on which the two sides disagree; exit code 4 when there is one, or an account could not be priced."""
    wrong = [line for line in lines if line.verdict != "equal"]
    rows = [
        {
            "account": line.account,
            "charge": line.charge,
            "here": "" if line.here is None else _plain(line.here),
            "there": "" if line.there is None else _plain(line.there),
            "difference": _plain(line.difference),
            "verdict": line.verdict,
        }
        for line in lines
    ]
    if as_json:
        emit_json({"lines": rows, "equal": len(lines) - len(wrong), "different": len(wrong), **_troubles(accounts)})
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, _BILLS_CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        shown = sorted(wrong, key=lambda line: -abs(line.difference))
        shown = shown if every else shown[:_SHOWN_MAX]
        table = Table("account", "charge", title="Where bills differ, rounded as billed", title_justify="left")
        for column in ("here", "there", "difference"):
            table.add_column(column, justify="right")
        table.add_column("")
        for line in shown:
            here, there = ("" if amount is None else _plain(amount) for amount in (line.here, line.there))
            table.add_row(escape(line.account), escape(line.charge), here, there, _plain(line.difference), line.verdict)
        if shown:
            out.print(table)
        if len(shown) < len(wrong):
            out.print(f"{len(wrong) - len(shown):,} more with smaller differences: --all or --csv.")
        out.print(f"{len(lines) - len(wrong):,} of {len(lines):,} lines are equal.", highlight=False)
        _warn(accounts)
    if wrong or any(account.problem for account in accounts):
        raise typer.Exit(EXIT_FINDINGS)


# Pieces -------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of rated rows on a terminal; nothing elsewhere."""
    if not err.is_terminal:
        yield lambda done, of: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as display:
        task = display.add_task("rated rows", total=None)
        yield lambda done, of: display.update(task, completed=done, total=of)


def _bar(moved: Amount, most: Amount) -> Text:
    """A bar as long as the difference is large, beside the largest of its currency."""
    eighths = -(-abs(moved) * _BAR_WIDTH * 8 // most)
    blocks = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return Text(blocks, style="red" if moved > 0 else "green")


def _money(amount: Amount, currency: str, *, sign: bool = False) -> str:
    number = Decimal(_plain(amount))
    return f"{number:+,f} {currency}" if sign else f"{number:,f} {currency}"


def _plain(amount: Amount) -> str:
    return plain(amount_decimal(amount))


def _quantity(quantity: int) -> str:
    return f"{Decimal(plain(quantity_decimal(quantity))):,f}"
