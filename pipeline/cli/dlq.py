"""``tally dlq``: refused events, by reason; what they are, and what a person decides about them."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import psycopg
import typer
from confluent_kafka import KafkaException
from psycopg import Connection
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.dlq_view import (
    decoded_event,
    draw_event,
    draw_list,
    event_json,
    money_json,
    reason_json,
    short,
    table_of,
    times,
)
from pipeline.cli.output import EXIT_ERROR, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.money import plain
from pipeline.core.reasons import Reason
from pipeline.infra.avro import Schemas, load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.operations import dead_letters
from pipeline.operations.ages import span
from pipeline.operations.at_risk import estimator
from pipeline.operations.dead_letters import Origin, Pick, Selection, State, UnratedEvent
from pipeline.operations.events import Mend, NotAnEvent, mended, parse_mend, parse_time
from pipeline.operations.replay import Replayed, ReplayError, not_replayable, replay
from pipeline.operations.stops import NotStopped
from pipeline.operations.stops import resume as let_go_on

#: Origins named before the rest is only counted.
_NAMED_MAX = 20
#: Time between two looks for what became of a replay, seconds.
_OUTCOME_LOOK_S = 0.1

group = typer.Typer(help="Dead letters: events that could not be rated.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="dlq")


class ListedState(StrEnum):
    DEAD_LETTERED = "dead_lettered"
    PARKED = "parked"


Origins = Annotated[
    list[str] | None, typer.Argument(metavar="ORIGIN", help="usage.events/2/17, or 2/17: partition/offset.")
]
ByReason = Annotated[Reason | None, typer.Option("--reason", help="Only this reason.", metavar="REASON")]
ByAccount = Annotated[str | None, typer.Option("--account", help="Only this account.")]
Since = Annotated[str | None, typer.Option(metavar="TIME", help="Only what arrived then or later; UTC.")]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Only what arrived before; UTC.")]
All = Annotated[bool, typer.Option("--all", help="Every one that was not discarded.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many, oldest first.")]
Why = Annotated[str | None, typer.Option(help="The reason for the audit record.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


# -- list


@group.command("list")
def list_(
    reason: ByReason = None,
    account: ByAccount = None,
    state: Annotated[ListedState, typer.Option(help="Dead letters, or events parked until they can be rated.")] = (
        ListedState.DEAD_LETTERED
    ),
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=0, help="Most events shown, newest first.")] = 20,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """List refused events by reason, with the money at risk where it is known.

    What is at risk is an estimate: each event priced on its own, with the catalog as it is now.
    """
    selection = Selection(state.value, reason, account, _time(since, "--since"), _time(until, "--until"))
    settings = settings_for(data_dir)
    schemas = load_schemas(settings.registry_url)
    with _connected(settings) as connection:
        counts = dead_letters.reasons(connection, selection)
        estimate, totals = dead_letters.at_risk(connection, selection, schemas)
        events = dead_letters.newest(connection, selection, limit)
    money = {event.origin: estimate(event.value) for event in events}
    now = datetime.now(UTC)
    if json_:
        emit_json(
            {
                "state": state.value,
                "events": sum(one.events for one in counts),
                "estimated_events": sum(total.priced + total.unknown for total in totals.values()),
                "reasons": [reason_json(one, totals.get(one.reason), now) for one in counts],
                "rows": [event_json(event, money[event.origin], now) for event in events],
            }
        )
    elif not counts:
        err.print("no such events" if selection != Selection(state.value) else f"no {_WORDS[state]}")
    else:
        out.print(draw_list(counts, totals, events, money, now))


_WORDS = {ListedState.DEAD_LETTERED: "dead letters", ListedState.PARKED: "parked events"}


# -- show


@group.command()
def show(
    origin: Annotated[str, typer.Argument(help="usage.events/2/17, or 2/17: partition/offset.")],
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Show everything about one refused event: what it says, why it was refused, what was decided."""
    settings = settings_for(data_dir)
    schemas = load_schemas(settings.registry_url)
    place = _origin(origin, settings)
    with _connected(settings) as connection:
        event = dead_letters.find(connection, [place]).get(place)
        if event is None:
            fail(_unknown(place), EXIT_NOT_FOUND)
        decisions = dead_letters.history(connection, place)
        money = estimator(connection, [event.account] if event.account else [], schemas)(event.value)
    decoded, problem = decoded_event(event.value, schemas)
    now = datetime.now(UTC)
    if json_:
        emit_json(
            event_json(event, money, now)
            | {
                "letter": {
                    "topic": event.letter_topic,
                    "partition": event.letter_partition,
                    "offset": event.letter_offset,
                },
                "event": decoded,
                "event_problem": problem,
                "key": event.key,
                "value": event.value,
                "history": [one._asdict() for one in decisions],
            }
        )
    else:
        out.print(draw_event(event, decoded, problem, money, decisions, now))


# -- replay and discard


@group.command("replay")
def replay_(
    origins: Origins = None,
    reason: ByReason = None,
    account: ByAccount = None,
    since: Since = None,
    until: Until = None,
    everything: All = False,
    limit: Limit = None,
    why: Why = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Mend a copy first: a property, or account, event_type, timestamp, subject. Repeat. "
            "The idempotency key is kept.",
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long to see what becomes of them.")
    ] = 5.0,
    dry_run: DryRun = False,
    yes: Yes = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Have dead letters judged again, as they came or mended; each is billed at most once.

    The age of an event is still judged at its first arrival. Discarded ones are replayed only when named by origin.
    """
    chosen = _chosen(origins, reason, account, since, until, everything, limit, why, dry_run=dry_run)
    try:
        mend = parse_mend(set_ or [])
    except ValueError as error:
        fail(f"--set: {error}", EXIT_USAGE)
    settings = settings_for(data_dir)
    schemas = load_schemas(settings.registry_url)
    with _connected(settings) as connection:
        picks = chosen.picks(connection, settings, dead_letters.to_replay, "replay")
        if dry_run:
            _preview_replay(connection, picks, mend, schemas, Topics(settings.topic_prefix), as_json=json_)
            return
        _confirm(picks, "replay", yes=yes)
        with _progress("replaying", len(picks)) as advance:
            try:
                done = replay(connection, settings, schemas, picks, why=why or "", mend=mend, on_portion=advance)
            except ReplayError as error:
                fail(str(error))
        outcomes = _outcomes(connection, [*done.sent, *done.finished], wait)
    _report_replay(done, outcomes, as_json=json_)
    if done.refused or (done.moved_on and origins):
        raise typer.Exit(EXIT_ERROR)


@group.command()
def discard(
    origins: Origins = None,
    reason: ByReason = None,
    account: ByAccount = None,
    since: Since = None,
    until: Until = None,
    everything: All = False,
    limit: Limit = None,
    state: Annotated[
        ListedState, typer.Option(help="Without ORIGIN: dead letters, or events parked until they can be rated.")
    ] = ListedState.DEAD_LETTERED,
    why: Why = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Decide that nobody waits for refused events: a close passes over them.

    Dead letters will not be billed; they stay counted as dead-lettered, and a replay undoes it. Parked events stay
    parked and are tried on: should what they lack be published in time, such as their account, they are billed after
    all, as late usage. If not, they become dead letters that are discarded already.
    """
    chosen = _chosen(origins, reason, account, since, until, everything, limit, why, dry_run=dry_run, state=state.value)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        picks = chosen.picks(connection, settings, dead_letters.to_discard, "discard")
        if dry_run:
            _preview(picks, "would discard", as_json=json_)
            return
        _confirm(picks, "discard", yes=yes)
        discarded = dead_letters.discard(connection, picks, actor=settings.actor, why=why or "")
    done = set(discarded)
    moved_on = [pick.origin for pick in picks if pick.origin not in done]
    if json_:
        emit_json({"discarded": _names(discarded), "moved_on": _names(moved_on)})
    else:
        parked = sum(pick.waiting for pick in picks if pick.origin in done)
        if len(discarded) > parked or not discarded:
            err.print(f"discarded {_events(len(discarded) - parked)}; a replay undoes it")
        if parked:
            err.print(
                f"discarded {_events(parked)}, parked and tried on: a close passes over "
                f"{'it' if parked == 1 else 'them'}; what can be rated after all is billed, as late usage"
            )
        _say_moved_on(moved_on)
    if moved_on and origins:
        raise typer.Exit(EXIT_ERROR)


# -- limits


@group.command()
def resume(
    partition: Annotated[int, typer.Argument(min=0, help="The stopped partition, as `tally status` names it.")],
    to_end: Annotated[
        bool, typer.Option("--to-end", help="Let it refuse all that is there now; limits count only what comes later.")
    ] = False,
    why: Why = None,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Let a partition go on that stopped because it refused too much. The limits count anew from there.

    What it refused is in the dead letters: mend the cause first, and replay them when it is mended.
    """
    if not (why or "").strip():
        fail('say why, for the audit record: --why "…"', EXIT_USAGE)
    settings = settings_for(data_dir)
    with _connected(settings) as connection:
        try:
            until = let_go_on(connection, settings, partition, why=why or "", to_end=to_end)
        except NotStopped as error:
            fail(str(error))
        except (KafkaException, TimeoutError) as error:
            fail(f"Kafka does not answer, so the partition stays stopped: {error}")
    if json_:
        emit_json({"partition": partition, "no_limit_before": until})
    else:
        err.print(f"partition {partition} goes on; its dead letters count from offset {until:,}", highlight=False)


# -- what replay and discard share


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Which events a decision is about, as the command line said it: by origin or by selection."""

    origins: tuple[str, ...]
    selection: Selection
    limit: int | None

    def picks(
        self,
        connection: "Connection[Any]",
        settings: Settings,
        select: Callable[["Connection[Any]", Selection, int | None], list[Pick]],
        verb: str,
    ) -> list[Pick]:
        """The events. Fails with exit code 3 for an origin nobody knows, 1 for one the decision cannot be about."""
        if not self.origins:
            return select(connection, self.selection, self.limit)
        places = list(dict.fromkeys(_origin(text, settings) for text in self.origins))
        found = dead_letters.find(connection, places)
        if unknown := [_unknown(place) for place in places if place not in found]:
            fail("\n".join(unknown), EXIT_NOT_FOUND)
        now = datetime.now(UTC)
        if wrong := [text for place in places if (text := _not_for(verb, found[place], now))]:
            fail("\n".join(wrong))
        events = [found[place] for place in places]
        return [
            Pick(event.origin, event.replays, event.reason or "", event.unfinished, event.waiting) for event in events
        ]


def _chosen(
    origins: list[str] | None,
    reason: Reason | None,
    account: str | None,
    since: str | None,
    until: str | None,
    everything: bool,
    limit: int | None,
    why: str | None,
    *,
    dry_run: bool,
    state: State = "dead_lettered",
) -> _Chosen:
    """Check that the command line names events in one way, and why."""
    filters = any(one is not None for one in (reason, account, since, until))
    if bool(origins) + filters + everything != 1:
        fail("say which events in one way: by ORIGIN…, by --reason, --account, --since, --until, or --all", EXIT_USAGE)
    if not dry_run and not (why or "").strip():
        fail('say why, for the audit record: --why "…"', EXIT_USAGE)
    selection = Selection(state, reason, account, _time(since, "--since"), _time(until, "--until"))
    return _Chosen(tuple(origins or ()), selection, limit)


def _not_for(verb: str, event: UnratedEvent, now: datetime) -> str | None:
    """Why this event cannot be replayed or discarded; None when it can."""
    if event.unfinished and verb == "replay":
        return None
    if event.replaying:
        return f"{event.origin} is being replayed already: the rater has not judged it yet"
    if event.state == "parked" and verb != "discard":
        wait = (event.not_before - now).total_seconds() if event.not_before else 0
        when = f"next in {span(wait)}" if wait > 0 else "now"
        return (
            f"{event.origin} is parked ({event.reason}), no dead letter: it is tried again by itself, {when}, "
            "and as soon as the catalog has an answer"
        )
    if not event.refused:
        return f"{event.origin} is {event.state} already: there is nothing to {verb}"
    if event.discarded and verb == "discard":
        return f"{event.origin} was discarded already, by {event.decided_by}: {event.decision_reason}"
    return None


def _confirm(picks: Sequence[Pick], verb: str, *, yes: bool) -> None:
    """Ask before more than one event is touched; where nobody can answer, --yes must stand."""
    if yes or len(picks) < 2:
        return
    if not sys.stdin.isatty():
        fail(f"would {verb} {_events(len(picks))}: there is no terminal to ask on, so say --yes", EXIT_USAGE)
    err.print(_by_reason(picks))
    typer.confirm(f"{verb} {_events(len(picks))}?", abort=True, err=True)


def _preview(picks: Sequence[Pick], would: str, *, as_json: bool) -> None:
    if as_json:
        emit_json({"dry_run": True, "events": [{"origin": str(one.origin), "reason": one.reason} for one in picks]})
        return
    if not picks:
        err.print("no such events")
        return
    out.print(Text(f"{would} {_events(len(picks))}", "bold"))
    out.print(_by_reason(picks))
    names = [short(pick.origin) for pick in picks[:_NAMED_MAX]]
    more = f" and {len(picks) - _NAMED_MAX:,} more" if len(picks) > _NAMED_MAX else ""
    out.print(Text(f"{' '.join(names)}{more}", "dim"))


def _preview_replay(
    connection: "Connection[Any]", picks: Sequence[Pick], mend: Mend, schemas: Schemas, topics: Topics, *, as_json: bool
) -> None:
    """What a replay would send, and what it would cost alone, of the first events that would go."""
    found = dead_letters.find(connection, [pick.origin for pick in picks[:_NAMED_MAX]])
    shown: list[tuple[UnratedEvent, bytes | None, str | None]] = []
    for event in found.values():
        if problem := not_replayable(event, topics):
            shown.append((event, None, problem))
            continue
        try:
            shown.append((event, mended(event.value, mend, schemas) if mend else event.value, None))
        except NotAnEvent as error:
            shown.append((event, None, f"cannot be mended: {error}"))
    accounts = [one.account for one in found.values() if one.account]
    if isinstance(new := mend.fields.get("account"), str):
        accounts.append(new)
    estimate = estimator(connection, accounts, schemas)
    if as_json:
        emit_json(
            {
                "dry_run": True,
                "events": len(picks),
                "shown": [
                    {
                        "origin": str(event.origin),
                        "reason": event.reason,
                        "event": decoded_event(value, schemas)[0],
                        "problem": problem,
                        "at_risk": money_json(estimate(value)),
                    }
                    for event, value, problem in shown
                ],
            }
        )
        return
    if not picks:
        err.print("no such dead letters")
        return
    out.print(Text(f"would replay {_events(len(picks))}", "bold"))
    table = table_of("origin", "refused for", "account", "key", "alone ≈")
    for event, value, problem in shown:
        money = estimate(value)
        decoded = decoded_event(value, schemas)[0] or {}
        table.add_row(
            Text(short(event.origin), "cyan"),
            event.reason,
            decoded.get("account", "–"),
            decoded.get("idempotency_key", "–"),
            problem or (f"{plain(money.amount)} {money.currency}" if money else "unknown"),
        )
    out.print(table)
    if len(picks) > len(shown):
        out.print(Text(f"and {len(picks) - len(shown):,} more", "dim"))
    if mend:
        out.print(Text(f"each with {', '.join(f'{name}={value}' for name, value in mend.texts().items())}", "dim"))


def _outcomes(connection: "Connection[Any]", origins: list[Origin], wait: float) -> dict[Origin, UnratedEvent]:
    """The replayed events as they stand once all are judged, or the wait is over."""
    until = time.monotonic() + wait
    while True:
        found = dead_letters.find(connection, origins)
        if not any(event.replaying for event in found.values()) or time.monotonic() >= until:
            return found
        time.sleep(_OUTCOME_LOOK_S)


def _report_replay(done: Replayed, outcomes: dict[Origin, UnratedEvent], *, as_json: bool) -> None:
    if as_json:
        emit_json(
            {
                "replayed": _names(done.sent),
                "finished": _names(done.finished),
                "moved_on": _names(done.moved_on),
                "refused": [{"origin": str(origin), "problem": problem} for origin, problem in done.refused],
                "outcomes": [
                    {
                        "origin": str(origin),
                        "state": "replaying" if event.replaying else event.state,
                        "reason": None if event.state in ("rated", "duplicate") else event.reason,
                        "message": None if event.state in ("rated", "duplicate") else event.message,
                    }
                    for origin, event in outcomes.items()
                ],
            }
        )
        return
    said = [f"replayed {_events(len(done.sent))}"] if done.sent or not done.finished else []
    said += [f"finished {_events(len(done.finished))} decided before"] if done.finished else []
    err.print("; ".join(said), highlight=False)
    _say_moved_on(done.moved_on)
    for origin, problem in done.refused[:_NAMED_MAX]:
        err.print(Text(f"{short(origin)} {problem}"), style="red")
    states: dict[str, int] = {}
    for event in outcomes.values():
        state = "not judged yet" if event.replaying else event.state.replace("_", "-")
        if event.state in ("dead_lettered", "parked") and not event.replaying:
            state += f" ({event.reason})"
        states[state] = states.get(state, 0) + 1
    if states:
        out.print("now " + ", ".join(f"{count:,} {state}" for state, count in sorted(states.items())), highlight=False)


def _say_moved_on(origins: Sequence[Origin]) -> None:
    if origins:
        names = " ".join(short(origin) for origin in origins[:_NAMED_MAX])
        err.print(f"left alone, since they changed meanwhile: {names}{' …' if len(origins) > _NAMED_MAX else ''}")


# -- shared


@contextmanager
def _connected(settings: Settings) -> Iterator["Connection[Any]"]:
    with connect(settings.dsn, application="dlq", autocommit=True) as connection:
        try:
            yield connection
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            fail("PostgreSQL has no tables of Tally yet: run `tally up`, or `tally migrate` on your own server")


@contextmanager
def _progress(what: str, events: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where there is a terminal and something to wait for."""
    if not err.is_terminal or events < 2:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True) as display:
        task = display.add_task(what, total=events)
        yield lambda done: display.update(task, advance=done)


def _origin(text: str, settings: Settings) -> Origin:
    try:
        return dead_letters.parse_origin(text, Topics(settings.topic_prefix))
    except ValueError as error:
        fail(str(error), EXIT_USAGE)


def _time(text: str | None, option: str) -> datetime | None:
    try:
        return None if text is None else parse_time(text)
    except ValueError as error:
        fail(f"{option}: {error}", EXIT_USAGE)


def _unknown(origin: Origin) -> str:
    return f"{origin} was never refused: it was rated at first sight (`tally explain` shows it), or not read yet"


def _by_reason(picks: Sequence[Pick]) -> Table:
    table = table_of("reason", "events", right=("events",))
    for reason in sorted({pick.reason for pick in picks}):
        table.add_row(reason, f"{sum(pick.reason == reason for pick in picks):,}")
    return table


def _names(origins: Sequence[Origin]) -> list[str]:
    return [str(origin) for origin in origins]


def _events(count: int) -> str:
    return times(count, "event")
