"""Refused events as they stand in PostgreSQL: finding them, and deciding to discard them.

``billing.unrated_event`` holds every event that was not rated at first sight, under the place where it arrived. The
sink keeps it in step with the letters on Kafka; a person's decisions are written here and by the module ``replay``.

A decision to discard says that nobody waits for the event: it is not missing when a month is closed. Of a dead letter
that is all, until a replay. A parked event the rater has on the retry topic, and tries on whatever is decided here:
if the catalog has an answer in time it is billed after all, late where its period is closed by then; if not it becomes
a dead letter, which is discarded already.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import Connection
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from pipeline.infra.avro import Schemas
from pipeline.infra.topics import Topics
from pipeline.operations.at_risk import Estimate, estimator

State: TypeAlias = Literal["rated", "duplicate", "parked", "dead_lettered"]

#: ``letter_partition`` and ``letter_offset`` of a replay that no sink has seen on the retry topic yet.
NOT_SEEN = -1


class Origin(NamedTuple):
    """Where an event first arrived; its name for good."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


def parse_origin(text: str, topics: Topics) -> Origin:
    """An origin as people write it: ``usage.events/2/17``, with or without the deployment's prefix, or ``2/17``.

    What somebody else wrote to the retry topic has its origin there: ``usage.retry/2/17``. Raises ValueError.
    """
    match text.split("/"):
        case [partition, offset] if _is_number(partition) and _is_number(offset):
            return Origin(topics.events, int(partition), int(offset))
        case [("usage.events" | topics.events), partition, offset] if _is_number(partition) and _is_number(offset):
            return Origin(topics.events, int(partition), int(offset))
        case [("usage.retry" | topics.retry), partition, offset] if _is_number(partition) and _is_number(offset):
            return Origin(topics.retry, int(partition), int(offset))
    raise ValueError(f"expected an origin such as {topics.events}/2/17 or 2/17 (partition/offset), got {text!r}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


@dataclass(frozen=True, slots=True)
class Selection:
    """Which refused events. None means any; times are arrival times, ``since`` inclusive, ``until`` exclusive."""

    state: State = "dead_lettered"
    reason: str | None = None
    account: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class UnratedEvent:
    """A row of ``billing.unrated_event``: an event not rated at first sight, and the state it is in now."""

    origin_topic: str
    origin_partition: int
    origin_offset: int
    state: State
    stage: str | None
    reason: str | None
    message: str | None
    attempts: int
    replays: int
    parked_at: datetime | None
    not_before: datetime | None
    account: str | None
    idempotency_key: str | None
    event_type: str | None
    event_time: datetime | None
    appended_at: datetime | None
    key: bytes | None
    value: bytes | None
    letter_topic: str | None
    letter_partition: int | None
    letter_offset: int | None
    updated_at: datetime
    decision: Literal["replay", "discard"] | None
    decided_at: datetime | None
    decided_by: str | None
    decision_reason: str | None

    @property
    def origin(self) -> Origin:
        return Origin(self.origin_topic, self.origin_partition, self.origin_offset)

    @property
    def refused(self) -> bool:
        """Not billed, as it stands now."""
        return self.state in ("parked", "dead_lettered")

    @property
    def waiting(self) -> bool:
        """Parked, and tried again by itself."""
        return self.state == "parked" and self.attempts > 0

    @property
    def replaying(self) -> bool:
        """Replayed, and no rater has judged it since."""
        return self.state == "parked" and self.attempts == 0

    @property
    def unfinished(self) -> bool:
        """Replayed, and not yet seen on the retry topic: on its way, or the command died before it sent it."""
        return self.replaying and self.letter_offset == NOT_SEEN

    @property
    def discarded(self) -> bool:
        """Not billed, and a person decided that nobody waits for it; a parked one is tried on all the same."""
        return self.refused and self.decision == "discard"


class ReasonCount(NamedTuple):
    """Refused events of one reason. ``next_due_at`` is when the first of the parked ones is tried again."""

    reason: str
    events: int
    discarded: int
    replaying: int
    oldest_at: datetime | None
    next_due_at: datetime | None


class Pick(NamedTuple):
    """An event chosen for a decision, as it was when it was chosen."""

    origin: Origin
    replays: int
    reason: str
    unfinished: bool
    #: Tried again by itself (``UnratedEvent.waiting``).
    waiting: bool = False


class Decided(NamedTuple):
    """One entry of the audit record about an event."""

    at: datetime
    actor: str
    action: str
    detail: dict[str, Any]


COLUMNS = ", ".join(UnratedEvent.__dataclass_fields__)

_SELECTED = """
    state = ANY(%(states)s::billing.event_state[])
    AND (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(account)s::text IS NULL OR account = %(account)s)
    AND (%(since)s::timestamptz IS NULL OR appended_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR appended_at < %(until)s)
"""
_REASONS = f"""
SELECT coalesce(reason, 'unknown'), count(*),
    count(*) FILTER (WHERE state IN ('parked', 'dead_lettered') AND decision = 'discard'),
    count(*) FILTER (WHERE state = 'parked' AND attempts = 0),
    min(appended_at), min(not_before) FILTER (WHERE state = 'parked' AND attempts > 0)
FROM billing.unrated_event WHERE {_SELECTED}
GROUP BY 1 ORDER BY 2 DESC, 1
"""
_NEWEST = f"""
SELECT {COLUMNS} FROM billing.unrated_event WHERE {_SELECTED}
ORDER BY appended_at DESC, origin_topic, origin_partition, origin_offset DESC LIMIT %(limit)s
"""
# Oldest first, as they came. A replay that was decided and never seen is still to be done.
_TO_REPLAY = f"""
SELECT origin_topic, origin_partition, origin_offset, replays, reason, state = 'parked' FROM billing.unrated_event
WHERE {_SELECTED} AND (
    state = 'dead_lettered' AND decision IS DISTINCT FROM 'discard'
    OR state = 'parked' AND attempts = 0 AND letter_offset = {NOT_SEEN}
)
ORDER BY appended_at, origin_topic, origin_partition, origin_offset LIMIT %(limit)s
"""
_TO_DISCARD = f"""
SELECT origin_topic, origin_partition, origin_offset, replays, reason, false, state = 'parked'
FROM billing.unrated_event
WHERE {_SELECTED} AND decision IS DISTINCT FROM 'discard'
    AND (state = 'dead_lettered' OR state = 'parked' AND attempts > 0)
ORDER BY appended_at, origin_topic, origin_partition, origin_offset LIMIT %(limit)s
"""
_FIND = f"""
SELECT {COLUMNS} FROM billing.unrated_event
JOIN unnest(%s::text[], %s::integer[], %s::bigint[]) AS wanted (origin_topic, origin_partition, origin_offset)
    USING (origin_topic, origin_partition, origin_offset)
ORDER BY origin_topic, origin_partition, origin_offset
"""


def _parameters(selection: Selection, *states: State, limit: int | None = None) -> dict[str, Any]:
    named = {name: getattr(selection, name) for name in ("reason", "account", "since", "until")}
    return named | {"states": list(states or [selection.state]), "limit": limit}


def reasons(connection: "Connection[Any]", selection: Selection) -> list[ReasonCount]:
    """Selected events by reason, most first."""
    return [ReasonCount(*row) for row in connection.execute(_REASONS, _parameters(selection))]


def newest(connection: "Connection[Any]", selection: Selection, limit: int) -> list[UnratedEvent]:
    """The selected events that arrived last, newest first."""
    with connection.cursor(row_factory=class_row(UnratedEvent)) as cursor:
        return cursor.execute(_NEWEST, _parameters(selection, limit=limit)).fetchall()


def find(connection: "Connection[Any]", origins: Sequence[Origin]) -> dict[Origin, UnratedEvent]:
    """The events that arrived there; one rated at first sight, or none at all, is missing."""
    columns = [list(column) for column in zip(*origins, strict=True)] or [[], [], []]
    with connection.cursor(row_factory=class_row(UnratedEvent)) as cursor:
        return {event.origin: event for event in cursor.execute(_FIND, columns)}


def to_replay(connection: "Connection[Any]", selection: Selection, limit: int | None = None) -> list[Pick]:
    """Dead letters that nobody discarded, and replays that were never sent, oldest first."""
    rows = connection.execute(_TO_REPLAY, _parameters(selection, "dead_lettered", "parked", limit=limit))
    return [Pick(Origin(*row[:3]), row[3], row[4], row[5]) for row in rows]


def to_discard(connection: "Connection[Any]", selection: Selection, limit: int | None = None) -> list[Pick]:
    """Selected dead letters or parked events, by ``selection.state``, that nobody discarded; oldest first.

    Without those that are being replayed: they are judged first.
    """
    rows = connection.execute(_TO_DISCARD, _parameters(selection, limit=limit))
    return [Pick(Origin(*row[:3]), *row[3:]) for row in rows]


_HISTORY = "SELECT at, actor, action, detail FROM billing.audit WHERE target = %s ORDER BY id"


def history(connection: "Connection[Any]", origin: Origin) -> list[Decided]:
    """What was decided about an event, oldest first."""
    return [Decided(*row) for row in connection.execute(_HISTORY, [str(origin)])]


# -- money at risk

#: Most events priced for the totals by reason, those that arrived last: about a second of work.
ESTIMATED_MAX = 10_000

_ACCOUNTS = f"""
SELECT account FROM (
    SELECT account FROM billing.unrated_event WHERE {_SELECTED} ORDER BY appended_at DESC LIMIT %(limit)s
) AS newest
WHERE account IS NOT NULL GROUP BY account
"""
_VALUES = f"""
SELECT coalesce(reason, 'unknown'), value FROM billing.unrated_event WHERE {_SELECTED}
ORDER BY appended_at DESC LIMIT %(limit)s
"""


@dataclass(slots=True)
class AtRisk:
    """Estimates of one reason's events added up: by currency, and how many could and could not be priced."""

    amounts: dict[str, Decimal]
    priced: int = 0
    unknown: int = 0


def at_risk(
    connection: "Connection[Any]", selection: Selection, schemas: Schemas
) -> tuple[Estimate, dict[str, AtRisk]]:
    """How to estimate one event, and the selected events' estimates by reason; ``ESTIMATED_MAX`` events at most.

    Raises ValueError for a catalog this program cannot read.
    """
    parameters = _parameters(selection, limit=ESTIMATED_MAX)
    accounts = [account for (account,) in connection.execute(_ACCOUNTS, parameters)]
    estimate = estimator(connection, accounts, schemas)
    totals: dict[str, AtRisk] = {}
    # From the server in portions: ten thousand events may be large.
    with connection.transaction(), connection.cursor("dead_letter_values") as cursor:
        for reason, value in cursor.execute(_VALUES, parameters):
            total = totals.setdefault(reason, AtRisk({}))
            money = estimate(value)
            if money is None:
                total.unknown += 1
            else:
                total.priced += 1
                total.amounts[money.currency] = total.amounts.get(money.currency, Decimal(0)) + money.amount
    return estimate, totals


# -- decisions

_LOCK = f"""
SELECT {COLUMNS} FROM billing.unrated_event
JOIN unnest(%s::text[], %s::integer[], %s::bigint[]) AS wanted (origin_topic, origin_partition, origin_offset)
    USING (origin_topic, origin_partition, origin_offset)
ORDER BY origin_topic, origin_partition, origin_offset
FOR UPDATE OF unrated_event
"""
_DISCARD = """
UPDATE billing.unrated_event
SET decision = 'discard', decided_at = now(), decided_by = %s, decision_reason = %s, updated_at = now()
WHERE (origin_topic, origin_partition, origin_offset) = (%s, %s, %s)
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def lock(connection: "Connection[Any]", picks: Iterable[Pick]) -> list[UnratedEvent]:
    """The picked events, locked until the transaction ends, without those that moved on since they were picked.

    In the sink's order, so that the two wait for each other instead of deadlocking.
    """
    wanted = {pick.origin: pick for pick in picks}
    columns = [list(column) for column in zip(*wanted, strict=True)] or [[], [], []]
    with connection.cursor(row_factory=class_row(UnratedEvent)) as cursor:
        found = cursor.execute(_LOCK, columns).fetchall()
    return [
        event
        for event in found
        if event.replays == wanted[event.origin].replays and _still(event, wanted[event.origin])
    ]


def _still(event: UnratedEvent, pick: Pick) -> bool:
    """Whether an event is in the state it was picked in."""
    if pick.unfinished:
        return event.unfinished
    return event.waiting if pick.waiting else event.state == "dead_lettered"


def audit(
    connection: "Connection[Any]", actor: str, action: str, details: Iterable[tuple[Origin, dict[str, Any]]]
) -> None:
    """Write one audit entry per event."""
    with connection.cursor() as cursor:
        cursor.executemany(_AUDIT, [(actor, action, str(origin), Jsonb(detail)) for origin, detail in details])


def discard(connection: "Connection[Any]", picks: Sequence[Pick], *, actor: str, why: str) -> list[Origin]:
    """Decide that nobody waits for refused events any more; return those that were discarded.

    All in one transaction. They stay dead-lettered or parked and are counted so (law 2). A dead letter is not billed
    unless a replay undoes the decision. A parked event is tried on: rated after all, it is billed, as late usage where
    its period is closed; tried for the last time, it is a discarded dead letter. An event that is not in the state it
    was picked in, or was discarded already, is left alone.
    """
    with connection.transaction():
        events = [event for event in lock(connection, picks) if not event.discarded]
        with connection.cursor() as cursor:
            cursor.executemany(_DISCARD, [(actor, why, *event.origin) for event in events])
        audit(
            connection,
            actor,
            "dlq.discard",
            ((event.origin, {"why": why, "reason": event.reason, "replays": event.replays}) for event in events),
        )
    return [event.origin for event in events]
