"""``tally usage``: billed usage taken back, set right, or added, while its period is open."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer
from psycopg import Connection
from psycopg.errors import UndefinedTable
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.dlq_view import table_of
from pipeline.cli.output import EXIT_ERROR, EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.corrections import ReasonCode
from pipeline.core.money import plain
from pipeline.infra.avro import load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations import corrections
from pipeline.operations.corrections import (
    ON_ITS_WAY,
    Action,
    CorrectionError,
    Decided,
    Decision,
    Pick,
    Selection,
)
from pipeline.operations.events import Mend, NotAnEvent, parse_mend, parse_time
from pipeline.operations.previews import Held, Preview, preview, unread
from pipeline.producer import InvalidUsage, SpoolError, UsageProducer

#: Source of events that a person adds, and name of their spool.
_SOURCE = "usage-add"
#: Events named before the rest is only counted.
_NAMED_MAX = 20
_LOOK_S = 0.1

group = typer.Typer(
    help="Corrections: take billed usage back, set it right, or add what was missing.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="usage")


Keys = Annotated[list[str] | None, typer.Argument(metavar="ACCOUNT/KEY", help="Events by account and idempotency key.")]
ByAccount = Annotated[str | None, typer.Option("--account", help="Only this account.")]
ByType = Annotated[str | None, typer.Option("--type", help="Only this event type.")]
Since = Annotated[
    str | None, typer.Option(metavar="TIME", help="Only use of then or later; UTC unless it says otherwise.")
]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Only use before then.")]
BySource = Annotated[str | None, typer.Option("--source", help="Only what this source sent, as its events carry it.")]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="NAME=VALUE", help="Only with this property. Repeat: all of them."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many, earliest first.")]
Reason = Annotated[ReasonCode | None, typer.Option("--reason", help="Why, as a code.")]
Why = Annotated[str, typer.Option(help="Why, in words.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Wait = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long to see what becomes of it.")]


# -- void and replace


@group.command()
def void(
    keys: Keys = None,
    account: ByAccount = None,
    event_type: ByType = None,
    since: Since = None,
    until: Until = None,
    source: BySource = None,
    where: Where = None,
    limit: Limit = None,
    reason: Reason = None,
    why: Why = "",
    wait: Wait = 10.0,
    dry_run: DryRun = False,
    yes: Yes = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Take billed events back. Their keys stay used up: sent again, they are duplicates.

    Only while the period is open. Each is taken back at what the price of its counter changes by.
    """
    chosen = _chosen(keys, account, event_type, since, until, source, where, limit)
    _correct("void", chosen, Mend(), reason, why, wait, data_dir, dry_run=dry_run, yes=yes, as_json=json_)


@group.command()
def replace(
    keys: Keys = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A property, or event_type or subject. Repeat."),
    ] = None,
    account: ByAccount = None,
    event_type: ByType = None,
    since: Since = None,
    until: Until = None,
    source: BySource = None,
    where: Where = None,
    limit: Limit = None,
    allow_unread: Annotated[
        bool, typer.Option("--allow-unread", help="Also set properties that nothing prices and the events lack.")
    ] = False,
    reason: Reason = None,
    why: Why = "",
    wait: Wait = 10.0,
    dry_run: DryRun = False,
    yes: Yes = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Bill events as if they had said something else: taken back and rated anew, in one step.

    Account, key and time stay: to change one, void the event and add usage under a new key. Refused, before anything is
    sent: a property that no meter or charge reads and an event does not have, and what has no price as it would be.
    """
    try:
        mend = parse_mend(set_ or [])
    except ValueError as error:
        fail(f"--set: {error}", EXIT_USAGE)
    if not mend:
        fail("say what is to change: --set NAME=VALUE", EXIT_USAGE)
    if fixed := mend.fields.keys() & {"account", "timestamp"}:
        fail(f"--set {sorted(fixed)[0]}: stays as it is; void the event, and add usage under a new key", EXIT_USAGE)
    chosen = _chosen(keys, account, event_type, since, until, source, where, limit)
    _correct(
        "replace",
        chosen,
        mend,
        reason,
        why,
        wait,
        data_dir,
        dry_run=dry_run,
        yes=yes,
        as_json=json_,
        allow_unread=allow_unread,
    )


def _correct(
    action: Action,
    chosen: "_Chosen",
    mend: Mend,
    reason: ReasonCode | None,
    why: str,
    wait: float,
    data_dir: Any,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    allow_unread: bool = False,
) -> None:
    if reason is None and not dry_run:
        fail(f"say why: --reason {'|'.join(ReasonCode)}", EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        picks = chosen.picks(connection)
        seen = preview(connection, picks, mend)
        if seen.unread and not allow_unread:
            said = "\n".join(f"--set {name}: {meant}" for name, meant in sorted(seen.unread.items()))
            fail(f"{said}\n{_UNREAD}; --allow-unread sets it all the same", EXIT_USAGE)
        if dry_run:
            _preview(action, picks, seen, mend, as_json=as_json)
            if seen.refused:
                raise typer.Exit(EXIT_FINDINGS)
            return
        assert reason is not None
        if seen.refused:
            fail(f"nothing is decided: of {_counted(len(picks), 'event')}, {_unpriced(seen.refused)}")
        if picks:
            _confirm(action, picks, seen.held, mend, yes=yes)
        decision = Decision(action, reason, why.strip(), settings.actor, mend)
        decided = carry_out(connection, settings, picks, decision)
        states = await_outcome(connection, decided.numbers, wait)
        estimated = corrections.re_rated(connection, decided.numbers)
    commands = [f"tally rerate --period {month} --account {shlex.quote(account)}" for account, month in estimated]
    _report(action, decided, states, commands, as_json=as_json)
    if decided.refused or states.keys() & {"refused", "quarantined"}:
        raise typer.Exit(EXIT_ERROR)


def carry_out(connection: "Connection[Any]", settings: Settings, picks: Sequence[Pick], decision: Decision) -> Decided:
    """Decide about the events and send what was decided, with a bar. Fails when Kafka does not take it."""
    schemas = load_schemas(settings.registry_url)
    try:
        with progress("deciding", len(picks)) as advance:
            decided = corrections.decide(connection, settings, schemas, picks, decision, on_portion=advance)
        with progress("sending", len(decided.numbers)) as advance:
            corrections.send(connection, settings, on_portion=advance)
    except NotAnEvent as error:
        fail(str(error))
    except CorrectionError as error:
        fail(str(error))
    return decided


def await_outcome(connection: "Connection[Any]", numbers: Sequence[int], wait: float) -> dict[str, int]:
    """How many corrections are in which state, once none is on its way or the wait is over."""
    until = time.monotonic() + wait
    while True:
        states = corrections.states(connection, numbers)
        if not any(states[state] for state in ON_ITS_WAY) or time.monotonic() >= until:
            return {str(state): count for state, count in states.items()}
        time.sleep(_LOOK_S)


# -- add


@group.command()
def add(
    account: Annotated[str, typer.Option(help="Account to bill.")],
    key: Annotated[str, typer.Option(help="Idempotency key: new in this account.")],
    event_type: Annotated[str, typer.Option("--type", help="Event type.")],
    at: Annotated[str, typer.Option("--at", metavar="TIME", help="When it was used; UTC unless it says otherwise.")],
    properties: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A property. Repeat.")
    ] = None,
    subject: Annotated[str, typer.Option(help="Who inside the account.")] = "",
    reason: Reason = None,
    why: Why = "",
    wait: Wait = 10.0,
    dry_run: DryRun = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Send usage that was never sent. It is an event like any other; who added it, and why, is in the audit record."""
    if reason is None and not dry_run:
        fail(f"say why: --reason {'|'.join(ReasonCode)}", EXIT_USAGE)
    when = _time(at, "--at")
    assert when is not None
    settings = settings_for(data_dir)
    event: dict[str, Any] = {
        "account": account,
        "idempotency_key": key,
        "event_type": event_type,
        "timestamp": when,
        "subject": subject,
        "properties": dict(_pair(text, "--set") for text in properties or []),
    }
    shown = event | {"timestamp": when.isoformat()}
    with _connected(settings) as connection:
        if problem := corrections.not_addable(connection, account, when):
            fail(f"{account}/{key} {problem}")
        if corrections.find(connection, [(account, key)]):
            fail(
                f"{account}/{key} is billed already, or was: new usage takes a new key; `tally explain {account}/{key}`"
            )
        if unknown := unread(connection, account, event_type, when, event["properties"]):
            err.print(Text(f"no meter or charge of {account} reads {', '.join(unknown)}", "yellow"))
        if dry_run:
            emit_json({"dry_run": True, "event": shown}) if json_ else out.print(f"would add {account}/{key}")
            return
        assert reason is not None
        corrections.record_addition(connection, shown, settings.actor, reason, why.strip())
        try:
            with UsageProducer.from_settings(settings, source=_SOURCE) as producer:
                producer.emit(**event)
                if producer.flush(30.0):
                    fail(f"{account}/{key} waits in the spool: Kafka does not answer. The same command sends it")
        except InvalidUsage as error:
            fail(str(error), EXIT_USAGE)
        except SpoolError as error:
            fail(f"{error}\nIs another `tally usage add` at work?")
        state = _await_billed(connection, account, key, wait)
    if json_:
        emit_json({"event": shown, "state": state})
    else:
        err.print(Text(f"added {account}/{key}: {_BECAME.get(state, state)}"), soft_wrap=True)
    if state == "refused":
        raise typer.Exit(EXIT_ERROR)


_BECAME = {
    "parked": "parked, since it has no account, contract or price yet: it is tried again (`tally dlq list` says why)",
    "refused": "refused: `tally dlq list` says why",
    "on_its_way": "on its way: `tally explain` tells what becomes of it",
}


def _await_billed(connection: "Connection[Any]", account: str, key: str, wait: float) -> str:
    until = time.monotonic() + wait
    while True:
        if corrections.find(connection, [(account, key)]):
            return "billed"
        if state := corrections.unrated_state(connection, account, key):
            return {"parked": "parked", "dead_lettered": "refused"}.get(state, state)
        if time.monotonic() >= until:
            return "on_its_way"
        time.sleep(_LOOK_S)


# -- list and resume


@group.command("list")
def list_(
    account: ByAccount = None,
    pending: Annotated[bool, typer.Option("--pending", help="Only those that are not applied.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most shown, newest first.")] = 20,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """List corrections: who decided them, why, and what became of them."""
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        found = corrections.listed(connection, account=account, pending=pending, limit=limit)
    if json_:
        emit_json([one._asdict() for one in found])
        return
    if not found:
        err.print("no corrections")
        return
    table = table_of("#", "what", "event", "why", "by", "state", "amount", right=("#", "amount"))
    for one in found:
        table.add_row(
            str(one.correction),
            one.action,
            Text(f"{one.account}/{one.idempotency_key}", "cyan"),
            ": ".join(text for text in (one.reason_code, one.note) if text),
            one.decided_by,
            one.state,
            "–" if one.exact_amount is None else plain(one.exact_amount),
        )
    out.print(table)


@group.command()
def resume(data_dir: DataDir = None, json_: Json = False) -> None:
    """Send corrections that were decided and not sent, because a command died or Kafka was away."""
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        try:
            sent = corrections.send(connection, settings)
        except CorrectionError as error:
            fail(str(error))
    if json_:
        emit_json({"sent": sent})
    else:
        err.print(f"sent {_counted(sent, 'correction')}" if sent else "no correction was left to send", highlight=False)


# -- which events


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Which events, as the command line said it: by key or by selection."""

    keys: tuple[str, ...]
    selection: Selection
    limit: int | None

    def picks(self, connection: "Connection[Any]") -> list[Pick]:
        """The events. Fails with exit code 3 for a key that was never billed."""
        if not self.keys:
            return corrections.select(connection, self.selection, self.limit)
        # Accounts and keys may hold slashes themselves.
        named = {text: [(text[:i], text[i + 1 :]) for i, c in enumerate(text) if c == "/"] for text in self.keys}
        found = corrections.find(connection, [one for splits in named.values() for one in splits])
        picks: dict[Pick, None] = {}
        for text, splits in named.items():
            mine = [found[one] for one in splits if one in found]
            if not mine:
                fail(
                    f"{text} is not billed: expected ACCOUNT/KEY of a billed event (`tally explain` tells)",
                    EXIT_NOT_FOUND,
                )
            picks |= dict.fromkeys(mine)
        return list(picks)


def _chosen(
    keys: list[str] | None,
    account: str | None,
    event_type: str | None,
    since: str | None,
    until: str | None,
    source: str | None,
    where: list[str] | None,
    limit: int | None,
) -> _Chosen:
    filters = any(one is not None for one in (account, event_type, since, until, source)) or bool(where)
    if bool(keys) == filters:
        fail(
            "say which events: by ACCOUNT/KEY…, or by --account, --type, --since, --until, --source and --where",
            EXIT_USAGE,
        )
    properties = dict(_pair(text, "--where") for text in where or [])
    selection = Selection(account, event_type, _time(since, "--since"), _time(until, "--until"), source, properties)
    return _Chosen(tuple(dict.fromkeys(keys or ())), selection, limit)


# -- what is shown


def _confirm(action: Action, picks: Sequence[Pick], held: Sequence[Held], mend: Mend, *, yes: bool) -> None:
    """Show what it is about, and ask."""
    if not yes and sys.stdin.isatty():
        err.print(_table(action, held))
        _say_mend(mend)
    confirmed(f"{action} {_counted(len(picks), 'event')}", yes=yes)


def _preview(action: Action, picks: Sequence[Pick], seen: Preview, mend: Mend, *, as_json: bool) -> None:
    if as_json:
        emit_json(
            {
                "dry_run": True,
                "action": action,
                "events": [{"account": one.account, "idempotency_key": one.idempotency_key} for one in picks],
                "billed": [one._asdict() for one in seen.held],
                "set": mend.texts(),
                "refused": [
                    {"account": pick.account, "idempotency_key": pick.idempotency_key, "problem": problem}
                    for pick, problem in seen.refused
                ],
            }
        )
        return
    if not picks:
        err.print("no such events are billed")
        return
    out.print(Text(f"would {action} {_counted(len(picks), 'event')}", "bold"))
    out.print(_table(action, seen.held))
    names = " ".join(str(pick) for pick in picks[:_NAMED_MAX])
    more = f" and {len(picks) - _NAMED_MAX:,} more" if len(picks) > _NAMED_MAX else ""
    out.print(Text(f"{names}{more}", "dim"))
    _say_mend(mend)
    if seen.refused:
        err.print(Text(_unpriced(seen.refused), "red"))


_UNREAD = "no meter or charge of these accounts reads it, and an event does not have it"


def _unpriced(refused: Sequence[tuple[Pick, str]]) -> str:
    """What stands in the way of replacements, with the first of them named."""
    named = "\n".join(f"{pick}: {problem}" for pick, problem in refused[:_NAMED_MAX])
    more = f"\nand {len(refused) - _NAMED_MAX:,} more" if len(refused) > _NAMED_MAX else ""
    return f"{len(refused):,} could not be billed as replaced:\n{named}{more}"


def _say_mend(mend: Mend) -> None:
    if mend:
        err.print(Text(f"each with {', '.join(f'{name}={value}' for name, value in mend.texts().items())}", "dim"))


def _table(action: Action, held: Sequence[Held]) -> Any:
    right = ("events", "quantity", "billed", f"a {action} changes")
    table = table_of("account", "charge", *right, right=right)
    for one in held:
        quantities = [one.quantity] if action == "void" else [one.quantity, one.new_quantity]
        quantity = " → ".join("" if each is None else plain(each) for each in quantities).strip(" →")
        change = "at the close" if one.change is None else f"{plain(one.change)} {one.currency}"
        table.add_row(
            one.account, one.charge, f"{one.events:,}", quantity, f"{plain(one.amount)} {one.currency}", change
        )
    return table


def _report(
    action: Action, decided: Decided, states: dict[str, int], commands: Sequence[str], *, as_json: bool
) -> None:
    if as_json:
        emit_json(
            {
                "action": action,
                "corrections": decided.numbers,
                "states": states,
                "refused": [
                    {"account": pick.account, "idempotency_key": pick.idempotency_key, "problem": problem}
                    for pick, problem in decided.refused
                ],
                "rerate": commands,
            }
        )
        return
    for pick, problem in decided.refused[:_NAMED_MAX]:
        err.print(Text(f"{pick} {problem}"), style="red")
    if len(decided.refused) > _NAMED_MAX:
        err.print(f"and {len(decided.refused) - _NAMED_MAX:,} more refused", style="red")
    said = ", ".join(f"{count:,} {_SAID.get(state, state)}" for state, count in sorted(states.items()))
    err.print(f"{action} of {_counted(len(decided.numbers), 'event')}{f': {said}' if said else ''}", highlight=False)
    for command in commands[:_NAMED_MAX]:
        said = f"that month was re-rated: its lines are estimates until the close, or `{command}`"
        err.print(Text(said, "yellow"), soft_wrap=True)
    if len(commands) > _NAMED_MAX:
        err.print(f"so are those of {len(commands) - _NAMED_MAX:,} more accounts", style="yellow")


_SAID = {
    "sent": "on the way (`tally usage list` shows what becomes of them)",
    "unsent": "decided and not sent: `tally usage resume`",
    "refused": "refused by the rater: `tally dlq list` says why",
    "quarantined": "too late: the period closed meanwhile",
}


# -- shared


@contextmanager
def _connected(settings: Settings) -> Iterator["Connection[Any]"]:
    with closing(connect(settings.dsn, application="usage", autocommit=True)) as connection:
        try:
            yield connection
        except UndefinedTable:
            fail("PostgreSQL lacks tables of Tally: run `tally up`, or `tally migrate` on your own server")


def confirmed(what: str, *, yes: bool) -> None:
    """Ask before something is done; where nobody can answer, --yes must stand."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail(f"would {what}: there is no terminal to ask on, so say --yes", EXIT_USAGE)
    typer.confirm(f"{what}?", abort=True, err=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where there is a terminal and something to wait for."""
    if not err.is_terminal or total < 2:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True) as display:
        task = display.add_task(what, total=total)
        yield lambda done: display.update(task, advance=done)


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        fail(f"{option}: expected NAME=VALUE, got {text!r}", EXIT_USAGE)
    return name, value


def _time(text: str | None, option: str) -> datetime | None:
    try:
        return None if text is None else parse_time(text)
    except ValueError as error:
        fail(f"{option}: {error}", EXIT_USAGE)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
