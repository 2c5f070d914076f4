"""``tally status``: what is behind, how fast it moves, who works, what waits for a person, what may be missing."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from typing import Annotated

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_ERROR, emit_json, err, out
from pipeline.core.gaps import because, when
from pipeline.operations.ages import age, span
from pipeline.operations.dead_letters import ReasonCount
from pipeline.operations.lag import StageLag
from pipeline.operations.status import Missing, Status, Watcher, as_json, headline
from pipeline.operations.stops import Stop

#: Partitions named in the stages table before the rest is only counted.
_PARTITIONS_NAMED = 4
#: Silent sources named, the longest silent first.
_SILENT_NAMED = 20


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(
    watch: Annotated[
        float | None, typer.Option(min=0.5, metavar="SECONDS", help="Look again every so often, until Ctrl-C.")
    ] = None,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Show lag, rates, workers, what waits for a person, and what usage may be missing.

    Exit code 1 when Kafka or PostgreSQL does not answer.

    With --watch and --json, one object for every look.
    """
    with closing(Watcher(settings_for(data_dir))) as watcher:
        if watch is not None:
            try:
                _watch(watcher, watch, as_json_=json_)
            except KeyboardInterrupt:
                return
        with err.status("looking"):
            seen = watcher.look()
        if json_:
            emit_json(as_json(seen))
        else:
            out.print(draw(seen))
        if not seen.reachable:
            raise typer.Exit(EXIT_ERROR)


def _watch(watcher: Watcher, seconds: float, *, as_json_: bool) -> None:
    def looks() -> Iterator[Status]:
        while True:
            yield watcher.look()
            time.sleep(seconds)

    if out.is_terminal and not as_json_:
        with Live(console=out, auto_refresh=False) as live:
            for seen in looks():
                live.update(draw(seen), refresh=True)
    for seen in looks():
        if as_json_:
            emit_json(as_json(seen))
            sys.stdout.flush()
        else:
            out.print(draw(seen))


def draw(status: Status) -> RenderableType:
    """The whole status: the headline, the stages, the workers, and what was refused."""
    whole = status.missing is None or not (status.missing.gaps.runs or status.missing.silent)
    good = status.caught_up and status.reachable and whole
    line = Text.assemble(
        ("● ", "green" if good else "red" if not status.reachable else "yellow"),
        (headline(status) or "nothing is known", "bold"),
        (f"  {status.at:%Y-%m-%d %H:%M:%S} UTC", "dim"),
    )
    parts: list[RenderableType] = [line]
    stages = [stage for stage in (status.rater, status.sink) if stage is not None]
    if stages or status.relay is not None:
        parts.append(_stages(stages, status))
    for stop in status.stopped or ():
        parts.append(_stopped(stop))
    if any(stage.group.members for stage in stages):
        parts.append(_workers(stages))
    if status.refused is not None:
        parts.append(_refused(status))
    if status.missing is not None:
        parts += _missing(status, status.missing)
    return Group(*parts)


def _table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", header_style="dim")
    return table


def _stages(stages: list[StageLag], status: Status) -> Table:
    table = _table("stage", "topic", "behind", "where", "oldest", "rate", right=("behind", "rate"))
    for stage in stages:
        rate = "–" if stage.per_second is None else f"{stage.per_second:,.0f}/s"
        for topic in dict.fromkeys(one.topic for one in stage.partitions):
            places = [one for one in stage.partitions if one.topic == topic]
            behind = [(one.partition, one.lag) for one in places if one.lag]
            lag = sum(one.lag for one in places)
            oldest = min((one.oldest_at for one in places if one.oldest_at), default=None)
            table.add_row(
                Text(stage.stage, "bold"),
                topic,
                Text(f"{lag:,}", "yellow" if lag else "green"),
                _where(behind, sum(one.waiting for one in places)),
                age(oldest, status.at) if oldest else "",
                rate,
            )
            rate = ""
        table.add_section()
    if status.relay is not None:
        pending = status.relay.pending
        table.add_row(
            Text("relay", "bold"),
            "outbox of the catalog",
            Text(f"{pending:,}", "yellow" if pending else "green"),
            "",
            age(status.relay.oldest_at, status.at) if pending else "",
            "",
        )
    return table


def _where(behind: list[tuple[int, int]], waiting: int) -> str:
    """The partitions that are behind, furthest first, and the parked events before their time."""
    behind.sort(key=lambda one: -one[1])
    texts = [f"{partition}: {lag:,}" for partition, lag in behind[:_PARTITIONS_NAMED]]
    if len(behind) > _PARTITIONS_NAMED:
        texts.append(f"{len(behind) - _PARTITIONS_NAMED} more")
    if waiting:
        texts.append(f"{waiting:,} not due yet")
    return ", ".join(texts)


def _stopped(stop: Stop) -> Text:
    return Text.assemble(
        (f"partition {stop.partition} stopped", "bold red"),
        f" before offset {stop.next_offset:,}: {stop.why}. Look at `tally dlq list`, mend the cause, then go on with ",
        (f"tally dlq resume {stop.partition}", "bold"),
    )


def _workers(stages: list[StageLag]) -> Table:
    table = _table("worker", "host", "member", "partitions")
    for stage in stages:
        for member in stage.group.members:
            partitions = sorted({int(place.rpartition("/")[2]) for place in member.partitions})
            table.add_row(
                Text(stage.stage, "bold"), member.host, member.id, " ".join(map(str, partitions)) or "none yet"
            )
    return table


def _refused(status: Status) -> RenderableType:
    refused = status.refused
    assert refused is not None
    if not (refused.dead_letters or refused.parked or refused.quarantined):
        return Text("no dead letters, nothing parked, nothing quarantined", "dim")
    table = _table("refused", "reason", "count", "oldest", "what next", right=("count",))
    for one in refused.parked:
        table.add_row(
            Text("parked", "yellow"),
            one.reason,
            f"{one.events:,}",
            age(one.oldest_at, status.at),
            _next(one, status.at),
        )
    open_letters = 0
    for one in refused.dead_letters:
        undecided = one.events - one.discarded
        open_letters += undecided
        said = [f"{undecided:,} to decide"] if undecided else []
        said += [f"{one.discarded:,} discarded"] if one.discarded else []
        table.add_row(
            Text("dead-lettered", "red" if undecided else "dim"),
            one.reason,
            f"{one.events:,}",
            age(one.oldest_at, status.at),
            ", ".join(said),
        )
    for reason, rows in refused.quarantined.items():
        table.add_row(Text("quarantined", "red"), reason, f"{rows:,}", "", "see billing.quarantine")
    if not open_letters:
        return table
    return Group(table, Text("tally dlq list shows the dead letters", "dim"))


def _missing(status: Status, missing: Missing) -> Iterator[RenderableType]:
    """Holes with their likely cause, hours that fell short, sources that fell silent; nothing where there are none."""
    gaps = missing.gaps
    if gaps.runs:
        table = _table("missing from", "numbers", "count", "when", "likely cause", right=("count",))
        for gap in gaps.explained:
            table.add_row(Text(gap.source, "red"), gap.numbers, f"{gap.missing:,}", when(gap), because(gap))
        yield table
        more = gaps.runs - len(gaps.explained)
        also = f"{more:,} more; " if more else ""
        yield Text(f"{also}tally gaps list shows them, tally gaps accept settles what is explained", "dim")
    if missing.short:
        table = _table("producer", "hour", "emitted", "arrived", "missing", right=("emitted", "arrived", "missing"))
        for hour in missing.short:
            table.add_row(
                hour.source,
                f"{hour.hour:%Y-%m-%d %H:%M}Z",
                f"{hour.emitted:,}",
                f"{hour.emitted - hour.missing:,}",
                Text(f"{hour.missing:,}", "red"),
            )
        yield table
    if missing.silent:
        table = _table("silent", "last seen", "ago", "usually at most", right=("ago", "usually at most"))
        for one in missing.silent[:_SILENT_NAMED]:
            table.add_row(
                Text(one.source, "yellow"),
                f"{one.last_at:%Y-%m-%d %H:%M}Z",
                age(one.last_at, status.at),
                span(one.usual_seconds),
            )
        yield table
        if (more := len(missing.silent) - _SILENT_NAMED) > 0:
            yield Text(f"{more:,} more", "dim")


def _next(one: ReasonCount, now: datetime) -> str:
    said = [f"{one.discarded:,} discarded"] if one.discarded else []
    if one.next_due_at is not None:
        seconds = (one.next_due_at - now).total_seconds()
        said.append(f"tried again in {span(seconds)}" if seconds > 0 else "tried again now")
    if one.replaying:
        said.append(f"{one.replaying:,} being replayed")
    return ", ".join(said)
