"""How refused events look: in tables and cards on a terminal, and as JSON."""

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.core.money import plain
from pipeline.core.periods import to_datetime
from pipeline.core.reasons import Reason
from pipeline.infra.avro import Record, Schemas
from pipeline.infra.topics import Topics
from pipeline.operations.ages import age, span
from pipeline.operations.at_risk import Money
from pipeline.operations.dead_letters import AtRisk, Decided, Origin, ReasonCount, UnratedEvent
from pipeline.operations.events import NotAnEvent, read_event

#: Bytes shown of a value that is no event.
_DUMPED_MAX = 512


def draw_list(
    counts: list[ReasonCount],
    totals: dict[str, AtRisk],
    events: list[UnratedEvent],
    money: dict[Origin, Money | None],
    now: datetime,
) -> RenderableType:
    table = table_of("reason", "events", "oldest", "at risk ≈", "decided", right=("events",))
    for one in counts:
        decided = [f"{one.discarded:,} discarded"] if one.discarded else []
        decided += [f"{one.replaying:,} being replayed"] if one.replaying else []
        table.add_row(
            Text(one.reason, "bold"),
            f"{one.events:,}",
            age(one.oldest_at, now),
            _at_risk_text(totals.get(one.reason), one.events),
            ", ".join(decided),
        )
    parts: list[RenderableType] = [table]
    for one in counts:
        mine = [event for event in events if event.reason == one.reason]
        if mine:
            parts.append(Text(one.reason, "bold"))
            parts += _cards(mine, money, now)
            parts.append(Text())
    total = sum(one.events for one in counts)
    if len(events) < total:
        parts.append(Text(f"the newest {len(events):,} of {total:,}; --limit shows more", "dim"))
    if events:
        parts.append(Text(f"tally dlq show {short(events[0].origin)} tells all about one", "dim"))
    return Group(*parts)


def _cards(events: list[UnratedEvent], money: dict[Origin, Money | None], now: datetime) -> Iterator[RenderableType]:
    """Two lines and more for each event: what it is, aligned, and below it why it was refused."""
    rows = [
        (
            short(event.origin),
            event.account or "–",
            event.event_type or "–",
            _clipped(event.idempotency_key or "–", 36),
            f"{event.event_time:%Y-%m-%d %H:%M:%S}" if event.event_time else "–",
        )
        for event in events
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for event, row in zip(events, rows, strict=True):
        origin, *rest = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield Text.assemble("  ", (origin, "cyan"), "  ", "  ".join(rest).rstrip(), no_wrap=True, overflow="ellipsis")
        facts = [f"{age(event.appended_at, now)} old"]
        facts += [times(event.attempts, "attempt")] if event.attempts else []
        if amount := money[event.origin]:
            facts.append(f"≈ {plain(amount.amount)} {amount.currency}")
        if decision := _decision_text(event, now):
            facts.append(decision)
        yield Padding(Text(event.message or ""), (0, 0, 0, 6))
        yield Padding(Text(" · ".join(facts), "dim"), (0, 0, 0, 6))


def _at_risk_text(total: AtRisk | None, events: int) -> str:
    if total is None or not total.priced:
        return "unknown"
    texts = [f"{plain(amount)} {currency}" for currency, amount in sorted(total.amounts.items())]
    if (left := events - total.priced) > 0:
        texts.append(f"{left:,} unknown")
    return ", ".join(texts)


def decoded_event(value: bytes | None, schemas: Schemas) -> tuple[Record | None, str | None]:
    """The event as it came, its time readable; or why it is none."""
    try:
        event = read_event(value, schemas)
    except NotAnEvent as error:
        return None, str(error)
    try:
        return event | {"timestamp": to_datetime(event["timestamp"])}, None
    except OverflowError:
        return event | {"timestamp": f"{event['timestamp']} microseconds since 1970"}, None


def draw_event(
    event: UnratedEvent,
    decoded: Record | None,
    problem: str | None,
    money: Money | None,
    decisions: list[Decided],
    now: datetime,
) -> RenderableType:
    style = {"dead_lettered": "red", "parked": "yellow"}.get(event.state, "green")
    state = "being replayed" if event.replaying else event.state.replace("_", "-")
    if not event.refused and event.reason:
        state += ", before that refused:"
    parts: list[RenderableType] = [
        Text.assemble(("● ", style), (str(event.origin), "bold"), "  ", (state, style), f"  {event.reason or ''}")
    ]
    if event.message:
        parts.append(Padding(Text(event.message), (0, 0, 0, 2)))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(event, money, now):
        if value:
            facts.add_row(name, value)
    parts += [Text(), Padding(facts, (0, 0, 0, 2)), Text()]
    if decoded is not None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in decoded.items():
            if name == "properties":
                continue
            grid.add_row(name, _shown(value))
        for name, value in sorted(decoded["properties"].items()):
            grid.add_row(f"  {name}", Text(value))
        parts += [Text("event", "bold"), Padding(grid, (0, 0, 0, 2))]
    else:
        parts += [
            Text("bytes", "bold"),
            Padding(Text(problem or "", "dim"), (0, 0, 0, 2)),
            *(Padding(Text(line, no_wrap=True), (0, 0, 0, 2)) for line in hex_dump(event.value or b"")),
        ]
    if decisions:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        for one in decisions:
            grid.add_row(
                f"{one.at:%Y-%m-%d %H:%M:%S}",
                Text(one.action.removeprefix("dlq."), "bold"),
                one.actor,
                Text(_detail(one.detail)),
            )
        parts += [Text(), Text("decided", "bold"), Padding(grid, (0, 0, 0, 2))]
    if hint := _next_step(event):
        parts += [Text(), Text(hint, "dim")]
    return Group(*parts)


def _detail(detail: dict[str, Any]) -> str:
    """The audit entry's why, and what was set and replayed."""
    texts = [str(detail.get("why", ""))]
    texts += [f"set {name}={value}" for name, value in detail.get("set", {}).items()]
    texts += [f"was {detail['reason']}"] if "reason" in detail else []
    return " · ".join(texts)


def _facts(event: UnratedEvent, money: Money | None, now: datetime) -> Iterator[tuple[str, str]]:
    yield "arrived", f"{_moment(event.appended_at)}  ({age(event.appended_at, now)} ago)"
    yield "refused by", f"stage {event.stage}" if event.stage else ""
    tried = [times(event.attempts, "attempt")] if event.attempts else []
    yield "tried", ", ".join([*tried, *([times(event.replays, "replay")] if event.replays else [])])
    if event.state == "parked" and not event.replaying and event.not_before is not None:
        wait = (event.not_before - now).total_seconds()
        yield "next attempt", f"{_moment(event.not_before)}  ({'in ' + span(wait) if wait > 0 else 'due'})"
    if event.refused:
        text = f"≈ {plain(money.amount)} {money.currency} (alone, with today's catalog)" if money else "unknown"
        yield "at risk", text
    yield "decision", _decision_text(event, now)
    if event.letter_topic and event.letter_offset is not None and event.letter_offset >= 0:
        yield "letter", f"{event.letter_topic}/{event.letter_partition}/{event.letter_offset}"


def _next_step(event: UnratedEvent) -> str:
    if event.waiting and not event.discarded:
        return (
            "it is tried again by itself, and as soon as the catalog has an answer; so that a close does not wait for "
            f'it: tally dlq discard {short(event.origin)} --why "…"'
        )
    if event.state != "dead_lettered":
        return ""
    if event.reason == Reason.CONFLICTING_DUPLICATE:
        return "its key was billed with other content: discard it, or have it sent again under a new key"
    if event.reason in (Reason.UNDECODABLE, Reason.UNKNOWN_SCHEMA, Reason.MESSAGE_TOO_LARGE):
        return "its bytes cannot be mended here: have the service send it right, then discard this one"
    return f'tally dlq replay {short(event.origin)} --why "…", with --set NAME=VALUE to mend it; or tally dlq discard'


def hex_dump(data: bytes) -> Iterator[str]:
    """Offset, 16 bytes in hex, and their ASCII, a line each; at most ``_DUMPED_MAX`` bytes."""
    for start in range(0, min(len(data), _DUMPED_MAX), 16):
        some = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in some)
        yield f"{start:06x}  {some[:8].hex(' '):<23}  {some[8:].hex(' '):<23}  {text}"
    if len(data) > _DUMPED_MAX:
        yield f"… {len(data) - _DUMPED_MAX:,} bytes more; --json has them all"
    if not data:
        yield "no value"


def table_of(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", header_style="dim")
    return table


def short(origin: Origin) -> str:
    """The shortest name that the commands take: the topic is said where it is not the events topic."""
    if origin.topic.endswith(Topics().events):
        return f"{origin.partition}/{origin.offset}"
    return str(origin)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _shown(value: object) -> str:
    return _moment(value) if isinstance(value, datetime) else str(value)


def _moment(at: datetime | None) -> str:
    return "–" if at is None else f"{at:%Y-%m-%d %H:%M:%S.%f}".rstrip("0").rstrip(".") + " UTC"


def _decision_text(event: UnratedEvent, now: datetime) -> str:
    if event.decision is None:
        return ""
    who = f"by {event.decided_by}, {age(event.decided_at, now)} ago: {event.decision_reason}"
    if event.unfinished:
        return f"replay decided {who}; not seen on the retry topic yet, replay it again to make sure"
    if event.replaying:
        return f"being replayed {who}"
    if event.discarded and event.waiting:
        return f"discarded {who}; tried on, and billed after all once it can be rated"
    return f"discarded {who}" if event.decision == "discard" else f"replayed {who}"


def reason_json(one: ReasonCount, total: AtRisk | None, now: datetime) -> dict[str, Any]:
    amounts = {} if total is None else total.amounts
    return {
        "reason": one.reason,
        "events": one.events,
        "discarded": one.discarded,
        "replaying": one.replaying,
        "oldest_at": one.oldest_at,
        "oldest_age_seconds": _age_json(one.oldest_at, now),
        "next_due_at": one.next_due_at,
        "at_risk": [{"amount": amounts[currency], "currency": currency} for currency in sorted(amounts)],
        "at_risk_events": 0 if total is None else total.priced,
    }


def event_json(event: UnratedEvent, money: Money | None, now: datetime) -> dict[str, Any]:
    return {
        "origin": str(event.origin),
        "topic": event.origin_topic,
        "partition": event.origin_partition,
        "offset": event.origin_offset,
        "state": event.state,
        "replaying": event.replaying,
        "reason": event.reason,
        "stage": event.stage,
        "message": event.message,
        "account": event.account,
        "event_type": event.event_type,
        "idempotency_key": event.idempotency_key,
        "event_time": event.event_time,
        "appended_at": event.appended_at,
        "age_seconds": _age_json(event.appended_at, now),
        "attempts": event.attempts,
        "replays": event.replays,
        "parked_at": event.parked_at,
        "not_before": event.not_before if event.state == "parked" and not event.replaying else None,
        "at_risk": money_json(money),
        "decision": event.decision,
        "decided_at": event.decided_at,
        "decided_by": event.decided_by,
        "decision_reason": event.decision_reason,
    }


def money_json(money: Money | None) -> dict[str, Decimal | str] | None:
    return None if money is None else {"amount": money.amount, "currency": money.currency}


def _age_json(at: datetime | None, now: datetime) -> float | None:
    return None if at is None else round((now - at).total_seconds(), 1)


def times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
