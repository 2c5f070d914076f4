"""`tally invoices`: what became of documents, and all that happens to one after it was issued. Nothing edits one."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import psycopg
import typer
from psycopg import Connection
from rich.markup import escape
from rich.table import Table

from pipeline.billing import credit_notes, voids
from pipeline.billing.adjustments import Adjustment
from pipeline.billing.credit_notes import Credited, Part
from pipeline.billing.document_lists import Entry, Link, Listed, Settlement, links, listed, settlements
from pipeline.billing.document_lists import statement as statement_of
from pipeline.billing.issued import Stored, find, look_at
from pipeline.billing.own_documents import Made, bill_adjustments, payer_of, preview_adjustments
from pipeline.billing.own_documents import reissue as issue_anew
from pipeline.billing.payments import Settled
from pipeline.billing.payments import pay as book_payment
from pipeline.billing.payments import take_back as take_payment_back
from pipeline.billing.payments import write_off as give_up
from pipeline.billing.rerate import Month
from pipeline.billing.reviewing import issue_reviewed
from pipeline.billing.reviewing import review as review_drafts
from pipeline.billing.thresholds import Unbilled, bill_if_reached, with_threshold
from pipeline.cli import render
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.durations import duration
from pipeline.cli.months import month_named
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out, service_days
from pipeline.cli.workers import told_to_stop
from pipeline.core.money import QUANTITY_DECIMALS, Minor, minor_decimal, plain, quantity_decimal, scaled
from pipeline.core.periods import to_datetime
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

invoices = typer.Typer(
    help="Invoices and what follows from them: credit notes, voids, payments, adjustments, bills within a period.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Number = Annotated[str, typer.Argument(metavar="NUMBER", help="Number of an issued document, or its id.")]
NumberOrDraft = Annotated[str, typer.Argument(metavar="NUMBER", help="Number of a document, or its id: of a draft.")]
Entity = Annotated[str | None, typer.Option(help="Legal entity, where two gave the same number.")]
By = Annotated[str | None, typer.Option(help="Who does it (default: the user).")]
Why = Annotated[str, typer.Option(help="Why, in words; printed on the document, and kept in the audit trail.")]


def register(app: typer.Typer) -> None:
    app.add_typer(invoices, name="invoices")


# -- looking


@invoices.command(name="list")
def list_(
    account: Annotated[str | None, typer.Option(help="Only documents this account pays.")] = None,
    month: Annotated[
        str | None, typer.Option(metavar="YYYY-MM", help="Only of periods that end in this month.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="invoice, credit_note, adjustment or progress.")] = None,
    state: Annotated[str | None, typer.Option(help="draft, reviewed, issued or void.")] = None,
    unpaid: Annotated[bool, typer.Option("--unpaid", help="Only what has something open.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 100,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show documents, the newest first, with what is open on each."""
    of = None if month is None else month_named(month, "--month")
    with _connected(settings_for(data_dir)) as connection:
        found = listed(
            connection,
            account=account,
            kind=kind,
            state=state,
            unpaid=unpaid,
            month=None if of is None else str(of),
            limit=limit,
        )
    if as_json:
        emit_json([asdict(one) for one in found])
        return
    table = _table("number", "kind", "state", "account", "month", "due", money=("total", "open"))
    for one in found:
        table.add_row(*_row(one))
    out.print(table)


def _table(*columns: str, money: Sequence[str]) -> Table:
    """Text, then amounts to the right; where the terminal is narrow, names are what is broken into lines."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in columns:
        wraps = heading in ("kind", "account", "what")
        table.add_column(heading, no_wrap=not wraps, min_width=10 if wraps else None, overflow="fold")
    for heading in money:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(one: Listed) -> list[str]:
    last = (one.period_end - timedelta(microseconds=1)).astimezone(ZoneInfo(one.time_zone))
    return [
        one.number or f"draft {one.id}",
        one.kind.replace("_", " "),
        (one.payment or one.state).replace("_", " "),
        escape(one.account),
        f"{last:%Y-%m}",
        "" if one.due_date is None else one.due_date.isoformat(),
        f"{one.total:,} {one.currency}",
        "" if one.open is None else f"{one.open:,}",
    ]


@invoices.command()
def show(number: NumberOrDraft, entity: Entity = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show a document as a table: lines, taxes, totals, what settled it, and what is linked to it, both ways."""
    with _connected(settings_for(data_dir)) as connection:
        id = find(connection, number, legal_entity=entity, drafts=True)
        document, linked, settled = look_at(connection, id), links(connection, id), settlements(connection, id)
    if as_json:
        data = _document_data(document)
        emit_json(
            data | {"links": [one._asdict() for one in linked], "settlements": [one._asdict() for one in settled]}
        )
        return
    show_document(document, linked, settled)


def show_document(document: Stored, linked: Sequence[Link] = (), settled: Sequence[Settlement] = ()) -> None:
    """Print a document as a table, with what settled it and what is linked to it."""
    money = _Money(document.currency)
    named = document.id if document.number is None else f"{document.number} of {document.issue_date}"
    head = f"{document.kind.replace('_', ' ')} {named} ({document.state})"
    out.print(f"[bold]{escape(head)}[/]  {escape(document.account)}, tax date {document.tax_date}", highlight=False)
    discounted = any(line.row.discount for line in document.lines)
    amounts = ("amount", "discount", "net", "tax", "total") if discounted else ("net", "tax", "total")
    accounts = len({line.row.account for line in document.lines}) > 1
    whose = ("account",) if accounts else ()
    table = _table("", *whose, "what", "service", money=("quantity", *amounts))
    for line in document.lines:
        row = line.row
        name = str(row.detail.get("name") or row.charge) + (f" ({row.cell})" if row.cell else "")
        table.add_row(
            str(line.position),
            *([escape(row.account)] if accounts else []),
            escape(name),
            service_days(row.service, document.time_zone),
            f"{plain(quantity_decimal(row.quantity))} {escape(row.unit)}",
            *(money(getattr(row, name)) for name in amounts),
        )
    out.print(table)
    for tax in document.document.taxes:
        standard = f"{tax.tax.tax} {plain(tax.tax.percent)} %"
        label = standard if tax.tax.treatment == "standard" else tax.tax.treatment.replace("_", " ")
        note = f" ({tax.tax.note})" if tax.tax.note else ""
        out.print(escape(f"{label} on {money(tax.base)}: {money(tax.amount)}{note}"), highlight=False)
    totals = document.totals
    sums = f"net {money(totals.net)}, tax {money(totals.tax)}, total {money(totals.total)}"
    paid = f"credits {money(totals.credits)}, balance {money(totals.balance)}"
    out.print(f"{sums}; {paid}; payable {money(totals.payable)} {document.currency}", highlight=False)
    if document.fx is not None:
        currency, rate, day, source = document.fx
        out.print(escape(f"1 {document.currency} = {plain(rate)} {currency} ({source}, {day})"), highlight=False)
    for one in settled:
        again = f" takes back {one.takes_back}" if one.takes_back else ""
        what = f"{one.kind.replace('_', ' ')} {one.id}{again}: {one.amount:,}"
        out.print(escape(f"{one.at:%Y-%m-%d} {what} by {one.by} {one.reference}"), highlight=False)
    for link in linked:
        why = f" ({link.reason_code})" if link.reason_code else ""
        what = f"{link.relation} {link.kind.replace('_', ' ')} {link.number or link.document}{why}"
        out.print(escape(what), highlight=False)


class _Money:
    """Smallest units as whole ones, with the currency's decimals."""

    def __init__(self, currency: str) -> None:
        self._currency = currency

    def __call__(self, amount: Minor) -> str:
        return f"{minor_decimal(amount, self._currency):,}"


def _document_data(document: Stored) -> dict[str, Any]:
    currency = document.currency
    totals = {name: minor_decimal(amount, currency) for name, amount in document.totals._asdict().items()}
    return {
        "id": document.id,
        "kind": document.kind,
        "state": document.state,
        "number": document.number,
        "legal_entity": document.legal_entity,
        "account": document.account,
        "currency": currency,
        "period_start": to_datetime(document.period.start_us),
        "period_end": to_datetime(document.period.end_us),
        "time_zone": document.time_zone,
        "tax_date": document.tax_date,
        "issue_date": document.issue_date,
        "totals": totals,
        "lines": [
            {
                "position": line.position,
                "kind": line.row.kind,
                "role": line.row.role,
                "charge": line.row.charge,
                "cell": line.row.cell,
                "quantity": plain(quantity_decimal(line.row.quantity)),
                "unit": line.row.unit,
                **{
                    name: minor_decimal(getattr(line.row, name), currency)
                    for name in ("amount", "discount", "net", "tax", "total")
                },
            }
            for line in document.lines
        ],
    }


# -- before issue

Draft = Annotated[int, typer.Argument(metavar="ID", help="Id of a draft (`tally invoices list --state draft`).")]


@invoices.command()
def review(draft: Draft, by: By = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Put on record that a draft was looked at, with its payer's others of the month. From then on it is frozen.

    Refused where it would come out otherwise by now. Look at it first: `tally invoices show ID`, or `pdf ID`. What was
    reviewed stands under an id of its own, which `tally invoices issue` takes.
    """
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        ids = review_drafts(connection, draft, now=datetime.now(UTC), actor=by or settings.actor)
    if as_json:
        emit_json({"reviewed": ids})
        return
    for id in ids:
        out.print(f"document {id} is reviewed: `tally invoices issue {id}` issues it", highlight=False)


@invoices.command()
def issue(draft: Draft, by: By = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Number and issue a reviewed document, with its payer's others of the month."""
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        numbers = issue_reviewed(connection, draft, now=datetime.now(UTC), actor=by or settings.actor)
    if as_json:
        emit_json({"issued": [number.text for number in numbers]})
        return
    for number in numbers:
        out.print(f"issued as {number.text}", highlight=False)


# -- after issue


@invoices.command()
def credit(
    number: Number,
    reason: Annotated[str, typer.Option(help=f"One of {', '.join(credit_notes.REASONS)}.")],
    why: Why = "",
    line: Annotated[
        list[str] | None,
        typer.Option(metavar="POSITION[=QUANTITY]", help="Only this line, or so much of it; may be repeated."),
    ] = None,
    to_balance: Annotated[
        bool, typer.Option("--to-balance", help="What was paid goes to the next invoices, instead of back.")
    ] = False,
    entity: Entity = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Issue a credit note on an invoice: in full, by line or by quantity.

    It takes off what is open; what was paid before is to be paid out (`tally invoices pay` books that), or goes to the
    balance. It is money given back: usage that comes late is billed beside it, as an adjustment.
    """
    chosen = next((one for one in credit_notes.REASONS if one == reason), None)
    if chosen is None:
        fail(f"expected --reason {', '.join(credit_notes.REASONS)}, got {reason!r}", EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        made = credit_notes.credit(
            connection,
            find(connection, number, legal_entity=entity),
            None if not line else [_part(text) for text in line],
            reason=chosen,
            note=why,
            to="balance" if to_balance else "refund",
            actor=by or settings.actor,
            now=datetime.now(UTC),
        )
    _say(made, _credited(made), as_json=as_json)


def _part(text: str) -> Part:
    position, equals, quantity = text.partition("=")
    try:
        return Part(int(position), scaled(Decimal(quantity), QUANTITY_DECIMALS) if equals else None)
    except (ValueError, InvalidOperation):
        fail(f"--line: expected a position such as 2, or 2=40 for 40 units of it, got {text!r}", EXIT_USAGE)


def _credited(made: Credited) -> str:
    parts = [f"credit note {made.number} on {made.corrects}: {made.total:,} {made.currency}"]
    if made.taken_off:
        parts.append(f"{made.taken_off:,} taken off what was open")
    if made.to_balance:
        parts.append(f"{made.to_balance:,} to the balance")
    if made.to_refund:
        parts.append(f"{made.to_refund:,} to be paid out")
    given_back = -made.total - made.taken_off - made.to_balance - made.to_refund
    if given_back > 0:
        parts.append(f"{given_back:,} had been paid by credits or coupons")
    parts += [f"not credited: line {one.position}, which {one.taken_back_by} took back" for one in made.left_out]
    return "; ".join(parts)


@invoices.command()
def void(
    number: Number,
    reason: Annotated[str, typer.Option(help=f"One of {', '.join(voids.REASONS)}.")],
    why: Annotated[str, typer.Option(help="Why, in words; kept in the audit trail.")] = "",
    entity: Entity = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Withdraw an issued document. Its number stays used, and its rows as they are; `reissue` bills it anew."""
    chosen = next((one for one in voids.REASONS if one == reason), None)
    if chosen is None:
        fail(f"expected --reason {', '.join(voids.REASONS)}, got {reason!r}", EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        id = find(connection, number, legal_entity=entity)
        done = voids.void(connection, id, reason=chosen, note=why, actor=by or settings.actor, now=datetime.now(UTC))
    _say(done, _voided(done), as_json=as_json)


def _voided(done: voids.Voided) -> str:
    if done.total < 0:
        return f"{done.number} is void: {-done.total:,} {done.currency} is not given back any more"
    return f"{done.number} is void: {done.total:,} {done.currency} is unbilled again"


@invoices.command()
def reissue(
    number: Number,
    why: Why = "",
    entity: Entity = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Issue a voided invoice anew, by what is known now of customer, seller, prices and taxes.

    It goes to who paid then, for the accounts that were billed together then; what their later invoices billed stays.
    """
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        id = find(connection, number, legal_entity=entity)
        made = issue_anew(connection, id, note=why, actor=by or settings.actor, now=datetime.now(UTC))
    _say(made, _issued(made), as_json=as_json)


def _issued(made: Made) -> str:
    about = f", for {made.corrects}" if made.corrects else ""
    return (
        f"{made.kind.replace('_', ' ')} {made.number}{about}: {made.total:,} {made.currency}, payable {made.payable:,}"
    )


@invoices.command()
def pay(
    number: Number,
    amount: Annotated[str | None, typer.Argument(help="Such as 120.50 (default: all that is open).")] = None,
    reference: Annotated[str, typer.Option(help="The bank's, say: the same one is booked once.")] = "",
    entity: Entity = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Book a payment of an invoice or, of a credit note, the refund that was paid out.

    What is paid beyond what is open goes into the customer's balance, which pays for the next documents.
    """
    try:
        wanted = None if amount is None else Decimal(amount)
    except InvalidOperation:
        fail(f"expected an amount such as 120.50, got {amount!r}", EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        id = find(connection, number, legal_entity=entity)
        now = datetime.now(UTC)
        done = book_payment(connection, id, wanted, at=now, reference=reference, actor=by or settings.actor)
    before = " (it was booked before)" if done.repeated else ""
    _say(done, f"{_settled(done)}{before}", as_json=as_json)


@invoices.command(name="take-back")
def take_back(
    number: Number,
    why: Annotated[str, typer.Option(help="Why, in words; kept in the audit trail.")],
    payment: Annotated[
        int | None, typer.Option(help="Id of the payment (`tally invoices show`; default: the last one).")
    ] = None,
    entity: Entity = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Take back a payment or refund that was booked by mistake, or that bounced: what it paid is open again."""
    if not why.strip():
        fail("expected --why, a reason that is kept in the audit trail", EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        id = find(connection, number, legal_entity=entity)
        done = take_payment_back(connection, id, payment, at=datetime.now(UTC), why=why, actor=by or settings.actor)
    _say(done, _settled(done, "taken back"), as_json=as_json)


@invoices.command(name="write-off")
def write_off(
    number: Number,
    why: Annotated[str, typer.Option(help="Why it will not be paid; kept with it.")],
    entity: Entity = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Give up what is open on an invoice: it is uncollectible."""
    if not why.strip():
        fail("expected --why, a reason that is kept with the document", EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        id = find(connection, number, legal_entity=entity)
        done = give_up(connection, id, at=datetime.now(UTC), why=why, actor=by or settings.actor)
    lost = f"{done.booked:,} {done.currency} given up on {done.number}: it is {done.state}, {done.open:,} open"
    _say(done, lost, as_json=as_json)


def _settled(done: Settled, what: str = "booked") -> str:
    state = done.state.replace("_", " ")
    put = f"; {done.to_balance:,} to the balance, for the next documents" if done.to_balance > 0 else ""
    taken = f"; {-done.to_balance:,} out of the balance again" if done.to_balance < 0 else ""
    return f"{abs(done.booked):,} {done.currency} {what} on {done.number}: {state}, {done.open:,} open{put}{taken}"


@invoices.command()
def statement(
    account: Annotated[str, typer.Argument(help="Who pays.")], data_dir: DataDir = None, as_json: Json = False
) -> None:
    """Show a customer's statement: documents, what settled them, what is open, and the balance carried forward."""
    with _connected(settings_for(data_dir)) as connection:
        found = statement_of(connection, account)
    if as_json:
        emit_json([asdict(one) for one in found])
        return
    for place in dict.fromkeys((one.legal_entity, one.currency) for one in found):
        table = _table("day", "what", "number", "reference", money=("amount", "open", "to balance", "balance"))
        for one in found:
            if (one.legal_entity, one.currency) == place:
                names = (f"{one.at:%Y-%m-%d}", _entry_name(one), one.number or "", escape(one.reference))
                amounts = (one.amount, one.open_amount, one.balance, one.balance_amount)
                table.add_row(*names, *(f"{amount:,}" if amount else "" for amount in amounts))
        out.print(escape(f"{account} with {place[0]}, {place[1]}"), highlight=False)
        out.print(table)
    if not found:
        out.print(escape(f"no document was issued to {account}"), highlight=False)


def _entry_name(one: Entry) -> str:
    undone = one.amount > 0 if one.kind == "payment" else one.kind == "refund" and one.amount < 0
    return f"{one.kind.replace('_', ' ')}{' taken back' if undone else ''}"


# -- beside the close


@invoices.command()
def adjust(
    account: Annotated[str, typer.Argument(help="Account whose payer is billed.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what changed, change nothing.")] = False,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Bill what came after a month was closed at once, as an adjustment of its own, instead of on the next invoice.

    Exit code 4 with --dry-run where something is to be billed.
    """
    settings = settings_for(data_dir)
    now = datetime.now(UTC)
    with _connected(settings) as connection:
        payer = payer_of(connection, account, now)
        if dry_run:
            found = [one for one in preview_adjustments(connection, payer) if one.lines]
        else:
            made = bill_adjustments(connection, payer, now=now, actor=by or settings.actor)
    if dry_run:
        if as_json:
            emit_json([_adjustment_data(one) for one in found])
        else:
            _show_adjustments(found)
        raise typer.Exit(EXIT_FINDINGS if found else 0)
    if as_json:
        emit_json([asdict(one) for one in made])
        return
    for one in made:
        out.print(_issued(one), highlight=False)
    if not made:
        out.print("nothing came after its month was closed")


def _adjustment_data(one: Adjustment) -> dict[str, Any]:
    return {
        "payer": one.payer,
        "legal_entity": one.legal_entity,
        "month": str(one.month),
        "currency": one.currency,
        "original": one.original,
        "total": minor_decimal(one.total, one.currency),
        "lines": [
            {
                "role": row.role,
                "charge": row.charge,
                "cell": row.cell,
                "quantity": plain(quantity_decimal(row.quantity)),
                "net": minor_decimal(line.net, one.currency),
                "tax": minor_decimal(line.tax, one.currency),
                "total": minor_decimal(line.total, one.currency),
            }
            for line, row in one.lines
        ],
    }


def _show_adjustments(found: list[Adjustment]) -> None:
    if not found:
        out.print("nothing came after its month was closed")
        return
    table = _table("month", "charge", "", money=("quantity", "net", "tax", "total"))
    for one in found:
        money = _Money(one.currency)
        for line, row in one.lines:
            name = row.charge + (f" ({row.cell})" if row.cell else "")
            amounts = (money(line.net), money(line.tax), money(line.total))
            what = "taken back" if row.role == "reversal" else "anew"
            table.add_row(str(one.month), escape(name), what, plain(quantity_decimal(row.quantity)), *amounts)
        table.add_row(str(one.month), "", "", "", "", "", f"[bold]{money(one.total)} {one.currency}[/]")
    out.print(table)


@invoices.command()
def threshold(
    account: Annotated[list[str] | None, typer.Argument(help="Payers (default: all that have a threshold).")] = None,
    month: Annotated[str | None, typer.Option(metavar="YYYY-MM", help="Default: the month that is running.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show how far each is, bill nothing.")] = False,
    every: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Again and again, say every 15m, until SIGTERM or Ctrl-C.")
    ] = None,
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Bill usage within its period where a customer's threshold is reached. Run it as often as you like.

    Exit code 4 where a customer could not be billed; the others are. With --every that is said, and tried again the
    next time, as where PostgreSQL is away; with --json each time is one array.
    """
    pause = None if every is None else duration(every)
    if every is not None and not pause:
        fail(f"expected --every 30s, 15m, 2h or 1d, got {every!r}", EXIT_USAGE)
    named = month_named(month, "--month") if month else None
    settings = settings_for(data_dir)
    stop = told_to_stop() if pause else threading.Event()
    while True:
        try:
            problems = _bill_thresholds(settings, account or [], named, stop, by, dry_run=dry_run, as_json=as_json)
        except psycopg.OperationalError as error:
            if pause is None:
                raise
            problems = [str(error).strip()]
        for problem in problems:
            err.print(escape(problem), highlight=False)
        if pause is None:
            break
        if stop.wait(pause.total_seconds()):
            return
    if problems:
        raise typer.Exit(EXIT_FINDINGS)


def _bill_thresholds(
    settings: Settings,
    accounts: Sequence[str],
    month: Month | None,
    stop: threading.Event,
    by: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> list[str]:
    """Bill each customer in a transaction of his own, until told to stop, and show it; whom it could not, and why."""
    now = datetime.now(UTC)
    of, actor = month or Month(now.year, now.month), by or settings.actor
    found: list[Unbilled] = []
    problems: list[str] = []
    with _connected(settings) as connection:
        for one in accounts or with_threshold(connection, now):
            if stop.is_set():
                break
            payer = payer_of(connection, one, now)
            try:
                found += bill_if_reached(connection, payer, of, now=now, actor=actor, dry_run=dry_run)
            except ValueError as error:  # one customer's trouble is not that of the others
                problems.append(f"{one}: {error}")
    if as_json:
        emit_json([asdict(one) | {"month": str(one.month)} for one in found])
    else:
        _show_thresholds(found)
    sys.stdout.flush()
    return problems


def _show_thresholds(found: list[Unbilled]) -> None:
    table = _table("account", "month", money=("used", "billed", "threshold"))
    table.add_column("")
    for state in found:
        amounts = (plain(amount) for amount in (state.used, state.billed, state.threshold))
        table.add_row(escape(state.payer), str(state.month), *amounts, _issued(state.made) if state.made else "")
    out.print(table)


# -- the rest


def _say(done: Credited | Made | Settled | voids.Voided, text: str, *, as_json: bool) -> None:
    if as_json:
        emit_json(asdict(done))
    else:
        out.print(escape(text), highlight=False)


@contextmanager
def _connected(settings: Settings) -> Iterator["Connection[Any]"]:
    """A connection, each statement its own transaction. What does not exist ends with exit code 3."""
    with connect(settings.dsn, application="invoices", autocommit=True) as connection:
        try:
            yield connection
        except LookupError as error:
            fail(str(error), EXIT_NOT_FOUND)


render.commands(invoices)
