"""`tally credits`, `tally commitments`: asked for by one person, decided by another; balances, overdrafts, budgets."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from decimal import Decimal, InvalidOperation
from itertools import pairwise, takewhile
from typing import Annotated, Any, Literal, get_args

import typer
from psycopg import Connection
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from pipeline.billing import alerts, credits
from pipeline.billing.credits import Asked, CreditError, NotFound, Request, decimals_of
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.commitments import Commitment, Window
from pipeline.core.credits import (
    GRANT_REASONS,
    PRIORITY_DEFAULT,
    REDUCES_BY_DEFAULT,
    VOID_REASONS,
    Grant,
    GrantKind,
    Reduces,
    Rollover,
)
from pipeline.core.money import AMOUNT_DECIMALS, Micros, plain, scaled
from pipeline.core.periods import format_instant, parse_instant, to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings


class _TakesAmounts(TyperCommand):
    """Says what is wrong with an amount below 0, which would otherwise be read as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, text in pairwise(["", *takewhile(lambda text: text != "--", args)]):
            if re.fullmatch(r"-[\d.]+", text) and not before.startswith("--"):
                ctx.fail(f"expected an amount of 0 or more, got {text}; `tally credits void` takes a grant back")
        return super().parse_args(ctx, args)


_credits = typer.Typer(
    help="Credits of accounts: prepaid, promotional, for service, corrections. One person asks, another approves.",
    no_args_is_help=True,
)
_commitments = typer.Typer(help="What accounts promised to spend.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(_credits, name="credits")
    app.add_typer(_commitments, name="commitments")


Account = Annotated[str, typer.Argument(help="Id of the account.")]
SomeAccount = Annotated[str | None, typer.Argument(metavar="[ACCOUNT]", help="Only this account.")]
Amount = Annotated[str, typer.Argument(help="How much, as an exact decimal.")]
Currency = Annotated[str, typer.Argument(help="ISO 4217 currency.")]
Note = Annotated[str, typer.Option(help="Why, in words; kept with it.")]
From = Annotated[
    str, typer.Option("--from", metavar="TIME", help="From which event time it counts: 2026-11-01T00:00Z.")
]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Until before which event time; default: no end.")]
Charges = Annotated[list[str] | None, typer.Option("--charge", help="Only for this charge. Repeat: for all of them.")]
RequestId = Annotated[int, typer.Argument(metavar="REQUEST", help="Number of the request.")]
By = Annotated[str | None, typer.Option(help="Who decides; default: TALLY_ACTOR.")]

_REASONS = "; ".join(f"{kind}: {', '.join(sorted(codes - {'rollover'}))}" for kind, codes in GRANT_REASONS.items())


# -- requests


@_credits.command(cls=_TakesAmounts)
def grant(
    account: Account,
    amount: Amount,
    unit: Annotated[str, typer.Argument(help="ISO 4217 currency or, of unit credits, the name of what is counted.")],
    reason: Annotated[str, typer.Option(help=f"Why, as a code. {_REASONS}.")],
    starts: From,
    kind: Annotated[str, typer.Option(help="prepaid, promotional, service or correction.")] = "prepaid",
    until: Until = None,
    reduces: Annotated[
        str | None,
        typer.Option(
            help="units: before pricing; net: a discount before tax (promotional); total: a payment (others)."
        ),
    ] = None,
    priority: Annotated[int, typer.Option(help="Lower numbers are drawn first.")] = PRIORITY_DEFAULT,
    charge: Charges = None,
    rollover: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="What is left at its end goes on, at most so much.")
    ] = None,
    rollover_minimum: Annotated[str, typer.Option(metavar="AMOUNT", help="And at least so much.")] = "0",
    note: Note = "",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Ask for credits. They count once another person approves them.

    They pay for usage by the time it happened, in the order priority, earliest end, given before paid, oldest.
    """
    settings = settings_for(data_dir)
    of_kind: GrantKind = _one_of(kind, get_args(GrantKind), "kind")
    reduced: Reduces = (
        REDUCES_BY_DEFAULT[of_kind] if reduces is None else _one_of(reduces, get_args(Reduces), "reduces")
    )
    decimals = decimals_of(reduced)
    asked = Asked(
        account,
        unit,
        Grant(
            "",
            _number(amount, decimals),
            _instant(starts),
            None if until is None else _instant(until),
            of_kind,
            reduced,
            priority,
            charges=frozenset(charge or ()),
        ),
        None if rollover is None else Rollover(_number(rollover, decimals), _number(rollover_minimum, decimals)),
    )
    with _deciding(settings) as connection:
        request = credits.request_grant(connection, asked, reason=reason, note=note, actor=settings.actor)
        made = credits.read_request(connection, request)
    _show_requested(made, f"{amount} {unit} for {account}", as_json=as_json)


@_credits.command()
def void(
    number: Annotated[int, typer.Argument(metavar="GRANT", help="Number of the grant, or of a commitment.")],
    reason: Annotated[str, typer.Option(help=f"Why, as a code: {', '.join(sorted(VOID_REASONS))}.")],
    note: Note = "",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Ask for a grant or a commitment to end. It does when another person approves: what is left of it is gone then.

    Usage before that moment still draws on it.
    """
    settings = settings_for(data_dir)
    with _deciding(settings) as connection:
        request = credits.request_void(connection, number, reason=reason, note=note, actor=settings.actor)
        made = credits.read_request(connection, request)
    _show_requested(made, f"an end of {number}, {_asked(made)} of {made.account}", as_json=as_json)


@_commitments.command("add", cls=_TakesAmounts)
def add_commitment(
    account: Account,
    amount: Amount,
    currency: Currency,
    starts: From,
    until: Until = None,
    per: Annotated[str, typer.Option(help="The window it is per: hour, day, month, year or term.")] = "month",
    overage_factor: Annotated[str, typer.Option(help="Price of usage beyond it, as a multiple of its own.")] = "1",
    true_up: Annotated[bool, typer.Option(help="Whether what is missing at a window's end is charged.")] = True,
    prorate: Annotated[bool, typer.Option(help="Whether a window it covers in part owes that part only.")] = True,
    charge: Charges = None,
    note: Note = "",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Ask for a spend commitment to be recorded. It counts once another person approves it."""
    settings = settings_for(data_dir)
    window: Window = _one_of(per, get_args(Window), "per")
    commitment = Commitment(
        "",
        _number(amount, AMOUNT_DECIMALS),
        _instant(starts),
        None if until is None else _instant(until),
        window,
        true_up,
        _decimal(overage_factor),
        frozenset(charge or ()),
        prorate,
    )
    with _deciding(settings) as connection:
        request = credits.request_commitment(connection, account, currency, commitment, note=note, actor=settings.actor)
        made = credits.read_request(connection, request)
    _show_requested(made, f"a commitment of {amount} {currency} per {per} of {account}", as_json=as_json)


@_credits.command()
def approve(
    request: RequestId, by: By = None, note: Note = "", data_dir: DataDir = None, as_json: Json = False
) -> None:
    """Say yes to a request as its second person: it counts at once. Who asked cannot.

    That the name is yours is recorded, not proved: Tally knows no passwords yet.
    """
    _decide(request, "approved", by, note, settings_for(data_dir), as_json=as_json)


@_credits.command()
def reject(request: RequestId, by: By = None, note: Note = "", data_dir: DataDir = None, as_json: Json = False) -> None:
    """Say no to a request; who asked may, too."""
    _decide(request, "rejected", by, note, settings_for(data_dir), as_json=as_json)


def _decide(
    request: int,
    verdict: Literal["approved", "rejected"],
    by: str | None,
    note: str,
    settings: Settings,
    *,
    as_json: bool,
) -> None:
    with _deciding(settings) as connection:
        decided = credits.decide(connection, request, verdict, actor=by or settings.actor, note=note)
        if verdict == "approved":
            alerts.update_now(connection, decided.account)
    if as_json:
        emit_json(_as_data(decided))
        return
    err.print(
        f"Request {request} is {verdict} by {decided.decided_by}: {_said(decided)}, account {decided.account}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


# -- what there is


@_credits.command("list")
def list_(
    account: SomeAccount = None,
    waiting: Annotated[bool, typer.Option("--open", help="Only requests that wait for a decision.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Grants with what was drawn from them; with --open the requests that wait for a second person."""
    with connect(settings_for(data_dir).dsn, application="credits") as connection:
        _check_known(connection, account)
        if waiting:
            _show_open(credits.open_requests(connection, account), as_json=as_json)
            return
        found = credits.listed(connection, "credits", account)
    columns = ["grant_id", "account", "state", "kind", "reduces", "remaining", "amount", "unit", "ends_at"]
    _show(found, columns, "No credits yet: `tally credits grant`.", as_json=as_json)


@_credits.command()
def balance(account: SomeAccount = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """What accounts have left in credits, open usage included: an estimate that the close settles.

    `tally alerts` keeps it within seconds of usage; with --json it says since when.
    """
    with connect(settings_for(data_dir).dsn, application="credits") as connection:
        _check_known(connection, account)
        found = credits.listed(connection, "balances", account)
    columns = ["account", "reduces", "balance", "granted", "unit", "overdrawn", "uncovered", "next_end_at"]
    _show(found, columns, "No credits that count.", as_json=as_json)


@_commitments.command("list")
def list_commitments(account: SomeAccount = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Commitments and who agreed to them."""
    with connect(settings_for(data_dir).dsn, application="credits") as connection:
        _check_known(connection, account)
        found = credits.listed(connection, "commitments", account)
    columns = ["commitment_id", "account", "state", "amount", "currency", "per", "true_up", "overage_factor"]
    columns += ["starts_at", "ends_at"]
    _show(found, columns, "No commitments yet: `tally commitments add`.", as_json=as_json)


# -- settings of an account


@_credits.command(cls=_TakesAmounts)
def overdraft(
    account: Account,
    amount: Amount,
    currency: Currency,
    hard_stop: Annotated[
        bool, typer.Option("--hard-stop", help="Services are told to stop once credits and overdraft are used up.")
    ] = False,
    note: Note = "",
    data_dir: DataDir = None,
) -> None:
    """How far an account may go below zero with credits that pay totals; 0 is not at all."""
    settings = settings_for(data_dir)
    with _deciding(settings) as connection:
        limit = _decimal(amount)
        credits.set_overdraft(
            connection, account, currency, limit, hard_stop=hard_stop, actor=settings.actor, note=note
        )
        alerts.update_now(connection, account)
    then = "its services stop then" if hard_stop else "what is used beyond is billed"
    err.print(f"{account} may overdraw {plain(limit)} {currency}; {then}.", highlight=False, markup=False)


@_credits.command(cls=_TakesAmounts)
def budget(
    account: Account,
    amount: Annotated[str, typer.Argument(help="What it means to spend per billing period; `none` ends it.")],
    currency: Currency,
    note: Note = "",
    data_dir: DataDir = None,
) -> None:
    """Watch an account's spending per billing period: alerts at 50, 80 and 100 %. It limits nothing."""
    settings = settings_for(data_dir)
    limit = None if amount == "none" else _decimal(amount)
    with _deciding(settings) as connection:
        credits.set_budget(connection, account, currency, limit, actor=settings.actor, note=note)
        alerts.update_now(connection, account)
    what = "has no budget" if limit is None else f"has a budget of {plain(limit)}"
    err.print(f"{account} {what} in {currency}.", highlight=False, markup=False)


# -- pieces


def _check_known(connection: "Connection[Any]", account: str | None) -> None:
    try:
        if account is not None:
            credits.check_account(connection, account)
    except NotFound as error:
        fail(str(error), EXIT_NOT_FOUND)


@contextmanager
def _deciding(settings: Settings) -> Iterator["Connection[Any]"]:
    """A connection whose transaction commits at the end; what cannot be ends the command: exit code 2, 3 or 4."""
    try:
        with connect(settings.dsn, application="credits") as connection:
            yield connection
    except NotFound as error:
        fail(str(error), EXIT_NOT_FOUND)
    except CreditError as error:
        fail(str(error), EXIT_FINDINGS)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)


def _one_of(text: str, names: Sequence[Any], option: str) -> Any:
    if text not in names:
        fail(f"expected --{option} to be one of {', '.join(names)}, got {text!r}", EXIT_USAGE)
    return text


def _decimal(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        fail(f"expected a number such as 12.50, got {text!r}", EXIT_USAGE)
    return value


def _number(text: str, decimals: int) -> int:
    try:
        return scaled(_decimal(text), decimals)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)


def _instant(text: str) -> Micros:
    try:
        return parse_instant(text)
    except ValueError:
        fail(f"expected a time with zone such as 2026-11-01T00:00:00Z, got {text!r}", EXIT_USAGE)


def _as_data(request: Request) -> dict[str, Any]:
    return {
        "request": request.id,
        "action": request.action,
        "account": request.account,
        "target": request.target,
        "amount": request.amount,
        "unit": request.unit,
        "kind": request.kind,
        "reason_code": request.reason_code,
        "note": request.note,
        "requested_by": request.requested_by,
        "requested_at": request.requested_at,
        "state": request.verdict,
        "decided_by": request.decided_by,
        "decided_at": request.decided_at,
    }


def _show_requested(request: Request, what: str, *, as_json: bool) -> None:
    if as_json:
        emit_json(_as_data(request))
        return
    err.print(
        f"Asked for {what}: request {request.id}. It counts once another person than {request.requested_by} approves "
        f"it: `tally credits approve {request.id} --by NAME`.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


_WHAT = {"grant": "grant", "commit": "commitment", "void": "end"}


def _asked(request: Request) -> str:
    """What a request is about: ``50 USD prepaid``, ``1000 USD per year``."""
    return f"{plain(request.amount)} {request.unit} {request.kind}"


def _said(request: Request) -> str:
    """``grant of 50 USD prepaid``; ``end of 1, 50 USD prepaid``."""
    ended = f" {request.target}," if request.target else ""
    return f"{_WHAT[request.action]} of{ended} {_asked(request)}"


def _show_open(requests: Sequence[Request], *, as_json: bool) -> None:
    if as_json:
        emit_json([_as_data(request) for request in requests])
        return
    table = Table("request", "what", "of", "account", "reason", "note", "asked by", "at")
    for one in requests:
        at = f"{one.requested_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        cells = (
            str(one.id),
            _WHAT[one.action] + (f" of {one.target}" if one.target else ""),
            _asked(one),
            one.account,
            one.reason_code,
            one.note,
        )
        table.add_row(*map(escape, (*cells, one.requested_by, at)))
    out.print(table)
    if not requests:
        err.print("Nothing waits for a decision.")


#: What people read over a column; the view's name otherwise.
_HEADS = {
    "grant_id": "grant",
    "commitment_id": "no.",
    "remaining": "left",
    "amount": "of",
    "granted": "of",
    "balance": "left",
    "unit": "",
    "currency": "",
    "reduces": "pays",
    "uncovered": "to bill",
    "true_up": "trued up",
    "overage_factor": "overage",
    "starts_at": "from",
    "ends_at": "until",
    "next_end_at": "next ends",
}


def _show(rows: Sequence[dict[str, Any]], columns: Sequence[str], nothing: str, *, as_json: bool) -> None:
    """Rows of a view: all columns as JSON, or some as a table."""
    if as_json:
        emit_json(list(rows))
        return
    table = Table()
    for column in columns:
        numeric = any(isinstance(row[column], Decimal) for row in rows)
        table.add_column(_HEADS.get(column, column), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_text(column, row[column]) for column in columns))
    out.print(table)
    if not rows:
        err.print(nothing)


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        return plain(value)
    if column.endswith("_at"):
        return format_instant(to_micros(value)).removesuffix("T00:00:00Z")  # nearly all begin and end with a day
    return escape(str(value))
