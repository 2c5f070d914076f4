"""Backfills: usage brought in later, under a name, committed or reverted as a whole.

Staged in PostgreSQL first, where it can be looked at while nothing is billed. Committed, its events go to
``usage.events`` under a source of its own, numbered as they were staged: so what arrived of them is counted like the
events of any source, a command that died goes on where it was, and an event sent twice is billed once. It waits while
raters are behind: live usage comes first. Reverted, what it billed is taken back, event by event, by corrections.

Once it is reverted, no command sends of it again, not even one that was cut off and comes back: a portion is one Kafka
transaction, committed while its command holds the backfill's row and has seen there that it is committing. A revert
first takes the row, then fences the transactional id of that backfill; what it finds on the topic then is all there is.
An open transaction holds up live usage on its partitions, so it is short, and ended by whoever comes next.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from confluent_kafka import KafkaException, Producer
from psycopg import Connection
from psycopg.errors import UniqueViolation
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from pipeline.core.catalog import Terms
from pipeline.core.periods import to_micros
from pipeline.core.reasons import Reason, Rejection
from pipeline.infra.avro import EVENTS, Schemas, load_schemas
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.operations.at_risk import read_catalog
from pipeline.operations.corrections import AGE_MAX, Pick, identity_of
from pipeline.operations.lag import KafkaLook, sink_positions
from pipeline.operations.peek import Place, peek, place_of

State: TypeAlias = Literal["staged", "committing", "committed", "reverting", "reverted", "discarded"]

#: Events sent between two looks at the lag of live usage.
PORTION = 1_000
#: Events that may wait for the raters before a backfill waits too: a second or two of one rater's work.
LAG_MAX = 10_000
#: Wait before the next look at a lag that is too long, seconds.
_LOOK_S = 0.5
#: Longest wait for one answer of the broker, seconds.
_ANSWER_S = 20.0
#: A transaction left open by a command that was killed is ended by the broker after this, plus up to 10 s.
_TRANSACTION_TIMEOUT_MS = 10_000
#: Offsets above a lag within which markers and aborted portions could make the difference: then records are counted.
_UNEVEN_MAX = 2 * PORTION
#: Events staged at a time.
_STAGE_ROWS = 5_000


class BackfillError(Exception):
    """A backfill that cannot do what was asked. Says what to do."""


@dataclass(frozen=True, slots=True)
class Backfill:
    """A row of ``billing.backfill``; ``sent``: events up to this number were confirmed by Kafka."""

    name: str
    source: str
    state: State
    events: int
    sent: int
    note: str
    staged_by: str
    staged_at: datetime
    updated_at: datetime


class Staged(NamedTuple):
    """One event to stage: its fields as ``UsageEvent`` has them, and where it stands in its file."""

    account: str
    idempotency_key: str
    event_type: str
    timestamp: datetime
    subject: str
    properties: dict[str, str]


class Finding(NamedTuple):
    """Something to know before a commit. ``blocks``: the commit is refused while there is such an event."""

    what: str
    events: int
    example: str
    blocks: bool


class Summary(NamedTuple):
    """Staged events of one account and type, and when they are from."""

    account: str
    event_type: str
    events: int
    first_at: datetime
    last_at: datetime


class Outcome(NamedTuple):
    """What became of the events that were sent. ``elsewhere``: not billed from here; repeats of what was billed."""

    billed: int
    voided: int
    parked: int
    dead_lettered: int
    elsewhere: int


def source_of(name: str) -> str:
    """The source a backfill's events carry."""
    return f"backfill-{name}/1"


# -- staging

_CREATE = "INSERT INTO billing.backfill (name, source, events, note, staged_by) VALUES (%s, %s, %s, %s, %s)"
_COUNT = "UPDATE billing.backfill SET events = %s WHERE name = %s"
_STAGE = """
COPY billing.backfill_event
    (backfill, number, identity, account, idempotency_key, event_type, event_time, subject, properties)
FROM STDIN
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def stage(connection: "Connection[Any]", name: str, events: Iterable[Staged], *, note: str, actor: str) -> Backfill:
    """Stage events under a new name, all or none, numbered from 1 as they come. ``connection`` is in autocommit.

    Raises BackfillError for a name that is taken or no name, for no event at all, and for a key that stands twice.
    """
    staged = 0
    try:
        with connection.transaction():
            connection.execute(_CREATE, [name, source_of(name), 1, note, actor])
            with connection.cursor() as cursor, cursor.copy(_STAGE) as copy:
                for staged, one in enumerate(events, 1):
                    identity = identity_of(one.account, one.idempotency_key)
                    fields = (one.account, one.idempotency_key, one.event_type, one.timestamp, one.subject)
                    copy.write_row((name, staged, identity, *fields, Jsonb(one.properties)))
            if staged == 0:
                raise BackfillError("expected events to stage, got none")
            connection.execute(_COUNT, [staged, name])
            connection.execute(_AUDIT, [actor, "backfill.stage", name, Jsonb({"events": staged, "note": note})])
    except UniqueViolation as error:
        if error.diag.table_name == "backfill":
            raise BackfillError(f"there is a backfill {name} already: take another name, or look at it") from error
        raise BackfillError(
            f"expected each account and key once, got one twice: {error.diag.message_detail}. Mend the file first"
        ) from error
    return get(connection, name)


# -- looking

_GET = "SELECT * FROM billing.backfill WHERE name = %s"
_ALL = "SELECT * FROM billing.backfill ORDER BY staged_at DESC LIMIT %s"
_SUMMARY = """
SELECT account, event_type, count(*), min(event_time), max(event_time) FROM billing.backfill_event
WHERE backfill = %s GROUP BY account, event_type ORDER BY 3 DESC, 1, 2 LIMIT %s
"""
# Each with the sentence it makes, and whether it stops a commit.
_FINDINGS = """
WITH staged AS (SELECT * FROM billing.backfill_event WHERE backfill = %(name)s), found AS (
    SELECT 1 AS rank, 'are of a closed period: settle them by an adjustment on the next invoice' AS what,
        true AS blocks, staged.account || '/' || staged.idempotency_key AS event
    FROM staged WHERE EXISTS (
        SELECT FROM billing.invoice WHERE invoice.account = staged.account AND invoice.state <> 'open'
            AND period_start <= staged.event_time AND period_end > staged.event_time
    )
    UNION ALL
    SELECT 2, 'are too old for the rater, which takes events of the last 35 days', true,
        account || '/' || idempotency_key
    FROM staged WHERE event_time < %(oldest)s
    UNION ALL
    SELECT 3, 'are still to come: check the time zone of the file', true, account || '/' || idempotency_key
    FROM staged WHERE event_time > %(newest)s
    UNION ALL
    SELECT 4, 'are billed already under the same key: they will be duplicates, or conflicts', false,
        staged.account || '/' || staged.idempotency_key
    FROM staged WHERE EXISTS (
        SELECT FROM billing.rated_usage AS usage
        WHERE usage.event_month = date_trunc('month', staged.event_time, 'UTC')::date
            AND usage.identity = staged.identity AND usage.source <> %(source)s
    )
)
SELECT what, count(*), min(event), blocks FROM found GROUP BY rank, what, blocks ORDER BY rank
"""
_OUTCOME = """
WITH sent AS (
    SELECT event.*, event.number <= backfill.sent AS confirmed, (
        SELECT usage.kind FROM billing.rated_usage AS usage
        WHERE usage.event_month = date_trunc('month', event.event_time, 'UTC')::date
            AND usage.identity = event.identity AND usage.source = backfill.source
        ORDER BY usage.entry DESC LIMIT 1
    ) AS billed
    FROM billing.backfill JOIN billing.backfill_event AS event ON event.backfill = backfill.name
    WHERE backfill.name = %s
), states AS (
    SELECT confirmed, billed, CASE WHEN billed IS NULL THEN (
        SELECT unrated.state FROM billing.unrated_event AS unrated
        WHERE unrated.idempotency_key = sent.idempotency_key AND unrated.account = sent.account
            AND unrated.state IN ('parked', 'dead_lettered')
        ORDER BY unrated.state LIMIT 1
    ) END AS unrated FROM sent
)
SELECT count(*) FILTER (WHERE billed <> 'void'), count(*) FILTER (WHERE billed = 'void'),
    count(*) FILTER (WHERE unrated = 'parked'), count(*) FILTER (WHERE unrated = 'dead_lettered'),
    count(*) FILTER (WHERE billed IS NULL AND unrated IS NULL AND confirmed)
FROM states
"""


def get(connection: "Connection[Any]", name: str) -> Backfill:
    """The backfill of this name. Raises BackfillError when there is none."""
    with connection.cursor(row_factory=class_row(Backfill)) as cursor:
        found = cursor.execute(_GET, [name]).fetchone()
    if found is None:
        raise BackfillError(f"expected the name of a backfill, got {name!r}: `tally backfill list` shows them")
    return found


def all_of(connection: "Connection[Any]", limit: int) -> list[Backfill]:
    """Backfills, the newest first."""
    with connection.cursor(row_factory=class_row(Backfill)) as cursor:
        return cursor.execute(_ALL, [limit]).fetchall()


def summary(connection: "Connection[Any]", name: str, limit: int) -> list[Summary]:
    """Staged events by account and type, most first."""
    return [Summary(*row) for row in connection.execute(_SUMMARY, [name, limit])]


def findings(connection: "Connection[Any]", backfill: Backfill) -> list[Finding]:
    """What is to be known of the staged events, as things stand now; what blocks a commit first."""
    now = datetime.now(UTC)
    parameters = {"name": backfill.name, "source": backfill.source, "oldest": now - AGE_MAX, "newest": now}
    found = [Finding(*row) for row in connection.execute(_FINDINGS, parameters)]
    return sorted([*found, *_without_terms(connection, backfill)], key=lambda one: not one.blocks)


_ACCOUNTS = "SELECT DISTINCT account FROM billing.backfill_event WHERE backfill = %s"
_TIMES = """
SELECT account, event_type, event_time, idempotency_key FROM billing.backfill_event
WHERE backfill = %s ORDER BY account, event_type, event_time
"""


def _without_terms(connection: "Connection[Any]", backfill: Backfill) -> Iterable[Finding]:
    """Events that nothing prices by today's catalog. One that would be parked blocks: no revert could take it back."""
    catalog = read_catalog(connection, {account for (account,) in connection.execute(_ACCOUNTS, [backfill.name])})
    found: dict[Reason, list[Any]] = {}
    spans: dict[tuple[str, str], Terms] = {}
    with connection.transaction(), connection.cursor("staged") as cursor:
        cursor.itersize = _STAGE_ROWS
        for account, event_type, event_time, key in cursor.execute(_TIMES, [backfill.name]):
            at_us = to_micros(event_time)
            known = spans.get((account, event_type))
            if known is not None and known.start_us <= at_us < known.end_us:
                continue
            terms = catalog.terms(account, event_type, at_us)
            if not isinstance(terms, Rejection):
                spans[account, event_type] = terms
                continue
            found.setdefault(terms.reason, [0, f"{account}/{key}: {terms.message}", terms.parks])[0] += 1
    for reason, (events, example, parks) in found.items():
        what = f"have no price ({reason.value.replace('_', ' ')}) and would "
        yield Finding(what + ("wait, parked: publish it first" if parks else "be refused"), events, example, parks)


def outcome(connection: "Connection[Any]", name: str) -> Outcome:
    """What became of the events that were sent, as far as PostgreSQL knows; those of a command that died too."""
    row = connection.execute(_OUTCOME, [name]).fetchone()
    assert row is not None
    return Outcome(*row)


# -- committing

_HOLD = "SELECT state FROM billing.backfill WHERE name = %s FOR UPDATE"
_MOVE = "UPDATE billing.backfill SET state = %s, updated_at = now() WHERE name = %s AND state = %s"
_PORTION = """
SELECT number, account, idempotency_key, event_type, event_time, subject, properties FROM billing.backfill_event
WHERE backfill = %s AND number > %s ORDER BY number LIMIT %s
"""
_SENT = "UPDATE billing.backfill SET sent = %s, updated_at = now() WHERE name = %s"


def commit(
    connection: "Connection[Any]",
    settings: Settings,
    schemas: Schemas,
    name: str,
    *,
    actor: str,
    rate: float | None = None,
    lag_max: int = LAG_MAX,
    on_sent: Callable[[int], None] = lambda events: None,
    on_lag: Callable[[int], None] = lambda events: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Backfill:
    """Send the staged events, those not confirmed yet, in their order. ``connection`` is in autocommit.

    At most ``rate`` events a second, and none while more than ``lag_max`` events wait for the raters: ``on_lag`` is
    then told how many. Raises BackfillError when an event cannot be billed any more, when another command is at work on
    it, or when Kafka does not confirm: the same call goes on where this one stopped.
    """
    with _alone(connection, name):
        backfill = get(connection, name)
        if backfill.state not in ("staged", "committing"):
            raise BackfillError(f"expected a staged backfill, got {name}, which is {backfill.state}")
        if blocking := [one for one in findings(connection, backfill) if one.blocks]:
            first = blocking[0]
            raise BackfillError(f"{first.events:,} events of {name} {first.what} (such as {first.example})")
        if backfill.state == "staged":
            _move(connection, backfill, "committing", actor)
            backfill = replace(backfill, state="committing")
        sender, look, sent = _Sender(settings, schemas, backfill), KafkaLook(settings), backfill.sent
        while rows := connection.execute(_PORTION, [name, sent, PORTION]).fetchall():
            while (waiting := _waiting(settings, look, sender.topic, lag_max)) > lag_max:
                on_lag(waiting)
                time.sleep(_LOOK_S)
            began = time.monotonic()
            _send(connection, sender, backfill, rows, on_step)
            sent = rows[-1][0]
            on_sent(len(rows))
            if rate is not None:
                time.sleep(max(0.0, len(rows) / rate - (time.monotonic() - began)))
        _move(connection, backfill, "committed", actor)
    return get(connection, name)


def _send(
    connection: "Connection[Any]",
    sender: "_Sender",
    backfill: Backfill,
    rows: Sequence[tuple[Any, ...]],
    on_step: Callable[[str], None],
) -> None:
    """Send a portion, while nobody can revert the backfill; raises BackfillError when somebody has."""
    with connection.transaction():
        held = connection.execute(_HOLD, [backfill.name]).fetchone()
        on_step("held")
        if held is None or held[0] != "committing":
            raise BackfillError(
                f"{backfill.name} is {held and held[0]} by now: another command took over, this one ends"
            )
        sender.send(rows, on_step)
        on_step("confirmed")
        connection.execute(_SENT, [rows[-1][0], backfill.name])


def _waiting(settings: Settings, look: KafkaLook, topic: str, lag_max: int) -> int:
    """Events the raters have not come to; some more may be said of many, since markers are offsets too."""
    ends, positions = look.ends(), look.rater_positions()
    behind = {place: positions.get(place, 0) for place in ends if place[0] == topic}
    offsets = sum(max(ends[place] - position, 0) for place, position in behind.items())
    if not lag_max < offsets <= lag_max + _UNEVEN_MAX:
        return offsets
    starts = {place: position for place, position in behind.items() if position < ends[place]}
    return sum(1 for message in peek(settings, starts) if (message.offset() or 0) < ends[place_of(message)])


class _Sender:
    """Sends portions of one backfill. Making it ends what an earlier one had open, and lets that send no more."""

    def __init__(self, settings: Settings, schemas: Schemas, backfill: Backfill) -> None:
        """Raises BackfillError when Kafka does not answer."""
        self.topic = Topics(settings.topic_prefix).events
        self._schemas, self._source = schemas, backfill.source
        self._producer = Producer(
            {
                **settings.kafka,
                "transactional.id": f"{settings.topic_prefix}backfill-{backfill.name}",
                "transaction.timeout.ms": _TRANSACTION_TIMEOUT_MS,
                "acks": "all",
                "compression.type": "lz4",
                "partitioner": "murmur2_random",
                "log_level": 0,  # errors are raised
            }
        )
        try:
            self._producer.init_transactions(_ANSWER_S)
        except KafkaException as error:
            raise BackfillError(f"Kafka does not answer: {error.args[0]}. The same command goes on here") from error

    def send(self, rows: Sequence[tuple[Any, ...]], on_step: Callable[[str], None]) -> None:
        """All of the events, or none. Raises BackfillError when Kafka does not confirm them."""
        names = ("sequence", "account", "idempotency_key", "event_type", "timestamp", "subject", "properties")
        events = [dict(zip(names, row, strict=True)) | {"source": self._source} for row in rows]
        encoded = [(self._schemas.encode(EVENTS, event), event["account"].encode()) for event in events]
        try:
            self._producer.begin_transaction()
            for value, key in encoded:
                self._producer.produce(self.topic, value, key)
            on_step("produced")
            self._producer.commit_transaction(_ANSWER_S)
        except KafkaException as error:
            self._abort()
            raise BackfillError(
                f"Kafka did not confirm {len(rows)} events: {error.args[0]}. The same command goes on here"
            ) from error
        except BaseException:
            self._abort()
            raise

    def _abort(self) -> None:
        """End the transaction now: until it times out, raters could read nothing behind it."""
        with suppress(KafkaException):  # fenced, or Kafka is away: it times out
            self._producer.abort_transaction(_ANSWER_S)


# -- reverting

_BILLED = """
SELECT DISTINCT usage.event_month, usage.identity, usage.account, usage.idempotency_key
FROM billing.backfill_event AS event
JOIN billing.rated_usage AS usage
    ON usage.event_month = date_trunc('month', event.event_time, 'UTC')::date AND usage.identity = event.identity
WHERE event.backfill = %(name)s AND usage.source = %(source)s AND usage.kind <> 'void' AND NOT EXISTS (
    SELECT FROM billing.rated_usage AS later
    WHERE later.event_month = usage.event_month AND later.identity = usage.identity AND later.entry > usage.entry
)
ORDER BY usage.event_month, usage.identity
"""


def begin_revert(
    connection: "Connection[Any]", settings: Settings, name: str, *, actor: str, wait_s: float
) -> list[Pick]:
    """The events of a backfill that are billed now, to be voided; ``connection`` is in autocommit. Sends no more of it.

    One that was only staged is discarded, and holds none. Waits up to ``wait_s`` until all that was sent is written.
    Raises BackfillError when it is not by then, or was reverted already.
    """
    with _alone(connection, name):
        backfill = get(connection, name)
        if backfill.state in ("discarded", "reverted"):
            raise BackfillError(f"{name} is {backfill.state} already")
        if backfill.state == "staged":
            _move(connection, backfill, "discarded", actor)
            return []
        if backfill.state != "reverting":
            _move(connection, backfill, "reverting", actor)
        _Sender(settings, load_schemas(settings.registry_url), backfill)  # fences a command that was cut off
    _await_written(connection, settings, backfill, wait_s)
    return [Pick(*row) for row in connection.execute(_BILLED, {"name": name, "source": backfill.source})]


def end_revert(connection: "Connection[Any]", name: str, *, actor: str) -> Backfill:
    """Reverted, once nothing of it is billed or may still be: while an event is parked it stays ``reverting``."""
    with _alone(connection, name):
        backfill, left = get(connection, name), outcome(connection, name)
        if backfill.state == "reverting" and left.billed == 0 and left.parked == 0:
            _move(connection, backfill, "reverted", actor)
    return get(connection, name)


def _await_written(connection: "Connection[Any]", settings: Settings, backfill: Backfill, wait_s: float) -> None:
    """Wait until every event that stands on its topic now has been rated, and every row of that is written.

    Not only those it knows to be sent: of a commit that died, a portion may stand there that nobody wrote down.
    """
    until = time.monotonic() + wait_s
    look, topic = KafkaLook(settings), Topics(settings.topic_prefix).events
    sent = {place: end for place, end in look.ends().items() if place[0] == topic}
    ends: dict[Place, int] | None = None
    while True:
        if ends is None and _has_read(settings, look.rater_positions(), sent):
            # Rows and letters are committed with a rater's position: they stand before where their topics end now.
            ends = {place: end for place, end in look.ends().items() if place[0] in look.sink_topics}
        if ends is not None and _has_read(settings, sink_positions(connection), ends):
            return
        if time.monotonic() >= until:
            raise BackfillError(
                f"not all events of {backfill.name} are rated and written yet (`tally status` shows the lag): "
                "it sends no more; revert it again when they are"
            )
        time.sleep(_LOOK_S)


def _has_read(settings: Settings, positions: Mapping[Place, int], ends: Mapping[Place, int]) -> bool:
    """Has who stands at these positions read all records before the ends? Behind the last one stand markers."""
    behind = {place: positions.get(place, 0) for place, end in ends.items() if positions.get(place, 0) < end}
    return all((message.offset() or 0) >= ends[place_of(message)] for message in peek(settings, behind, most=1))


# -- shared


def _move(connection: "Connection[Any]", backfill: Backfill, state: State, actor: str) -> None:
    with connection.transaction():
        if connection.execute(_MOVE, [state, backfill.name, backfill.state]).rowcount == 0:
            raise BackfillError(f"{backfill.name} is {backfill.state} no more: look at it again")
        detail = {"from": backfill.state, "to": state, "events": backfill.events}
        connection.execute(_AUDIT, [actor, f"backfill.{state}", backfill.name, Jsonb(detail)])


@contextmanager
def _alone(connection: "Connection[Any]", name: str) -> Iterator[None]:
    """Hold the lock that one command at a time can hold on a backfill. Raises BackfillError when it is taken."""
    lock = "hashtextextended('tally backfill ' || %s, 0)"
    if connection.execute(f"SELECT pg_try_advisory_lock({lock})", [name]).fetchone() != (True,):
        raise BackfillError(f"another command is at work on backfill {name}: wait for it to end")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute(f"SELECT pg_advisory_unlock({lock})", [name])
