"""Taking billed usage back, or setting it right, while its period is open: deciding it, and seeing it through.

A correction is decided in PostgreSQL, in one transaction: a row of ``billing.correction`` with the very bytes that go
to the rater, and its number in the outbox. Then the outbox is sent, and emptied as Kafka confirms. A command that dies
in between leaves the outbox to the next one; what was sent twice is applied once, since the rater and PostgreSQL both
know a correction by its event and entry number. The rows come back through the sink like all usage.

Nothing here touches a rated row. A period that is closed is refused: its invoice was, or is being, issued, and what
changes it is an adjustment on the next one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from psycopg import Connection
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from xxhash import xxh3_128_digest

from pipeline.core.corrections import Correction, HeldRow, ReasonCode
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, scaled
from pipeline.core.periods import to_micros
from pipeline.infra import wire
from pipeline.infra.avro import CORRECTIONS, EVENTS, RATED, Schemas, WireError
from pipeline.infra.settings import Settings
from pipeline.infra.topics import RECORD_BYTES_MAX, Topics
from pipeline.operations.events import Mend, mended
from pipeline.operations.peek import Place, peek, place_of

Action: TypeAlias = Literal["void", "replace"]
State: TypeAlias = Literal["unsent", "sent", "applied", "refused", "quarantined"]
#: States in which a correction is still on its way.
ON_ITS_WAY: tuple[State, ...] = ("unsent", "sent")

#: Events decided in one transaction: they hold their invoices' locks for some 100 ms.
PORTION = 200
#: Corrections read from the outbox and handed to Kafka at a time.
_SEND_PORTION = 1_000
#: Longest wait for Kafka to confirm a portion, seconds.
_CONFIRM_S = 30.0


class CorrectionError(Exception):
    """A correction that was not decided or not sent. Says what to do."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which billed events, voided ones left out. None means any; times are the events' own, ``until`` exclusive."""

    account: str | None = None
    event_type: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    source: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)


class Pick(NamedTuple):
    """A billed event chosen for a correction."""

    event_month: date
    identity: UUID
    account: str
    idempotency_key: str

    def __str__(self) -> str:
        return f"{self.account}/{self.idempotency_key}"


class Decision(NamedTuple):
    """What is decided about events, by whom, and why. ``mend`` is empty for a void."""

    action: Action
    reason_code: ReasonCode
    note: str
    actor: str
    mend: Mend
    backfill: str | None = None


@dataclass(slots=True)
class Decided:
    """What became of the events chosen."""

    numbers: list[int] = field(default_factory=list)
    refused: list[tuple[Pick, str]] = field(default_factory=list)


class Listed(NamedTuple):
    """A correction and what became of it. ``exact_amount`` is None until it is applied."""

    correction: int
    action: Action
    account: str
    idempotency_key: str
    event_time: datetime
    reason_code: str
    note: str
    decided_by: str
    decided_at: datetime
    backfill: str | None
    state: State
    exact_amount: Decimal | None


def identity_of(account: str, key: str) -> UUID:
    """The name of an event in PostgreSQL: 128-bit hash of account and idempotency key."""
    return UUID(bytes=xxh3_128_digest(wire.text(key) + wire.text(account)))


# -- adding

#: As the rater judges age: an event of more, counted to its arrival, is dead-lettered.
AGE_MAX, AHEAD_MAX = timedelta(days=35), timedelta(minutes=5)
_CLOSED = """
SELECT id, state::text FROM billing.invoice
WHERE account = %s AND period_start <= %s AND period_end > %s AND state <> 'open' ORDER BY id LIMIT 1
"""


def not_addable(connection: "Connection[Any]", account: str, at: datetime) -> str | None:
    """Why usage of this time can no longer, or not yet, be billed by sending it; None when it can."""
    now = datetime.now(UTC)
    if now - at > AGE_MAX:
        return (
            f"is of {at:%Y-%m-%d %H:%M} UTC, more than {AGE_MAX.days} days ago: settle it by an adjustment or a credit"
        )
    if at - now > AHEAD_MAX:
        return f"is of {at:%Y-%m-%d %H:%M} UTC, which is still to come: check its time zone"
    closed = connection.execute(_CLOSED, [account, at, at]).fetchone()
    if closed is not None:
        return closed_period(*closed)
    return None


def closed_period(invoice: int, state: str) -> str:
    """What to tell a person who wants to change a period that is closed."""
    return (
        f"lies in a closed period: invoice:{invoice} is {state}, and an issued invoice never changes. `tally invoices "
        "credit` gives money back; usage that is missing may still be sent (`tally produce`): it becomes an adjustment "
        "on the next invoice"
    )


_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def record_addition(
    connection: "Connection[Any]", event: Mapping[str, Any], actor: str, code: ReasonCode, note: str
) -> None:
    """Write down that a person adds usage, before it is sent: ``event`` is what will be."""
    target = f"{event['account']}/{event['idempotency_key']}"
    detail = {"reason_code": code.value, "note": note, "event": dict(event)}
    connection.execute(_AUDIT, [actor, "usage.add", target, Jsonb(detail)])


# -- choosing

_SELECT = """
SELECT usage.event_month, usage.identity, usage.account, usage.idempotency_key
FROM billing.invoice
JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
JOIN billing.rated_usage AS usage ON usage.line_id = line.id
WHERE (%(account)s::text IS NULL OR invoice.account = %(account)s)
    AND (%(event_type)s::text IS NULL OR usage.event_type = %(event_type)s)
    AND (%(since)s::timestamptz IS NULL OR usage.event_time >= %(since)s AND invoice.period_end > %(since)s)
    AND (%(until)s::timestamptz IS NULL OR usage.event_time < %(until)s AND invoice.period_start < %(until)s)
    AND (%(source)s::text IS NULL OR usage.source = %(source)s)
    AND usage.properties @> %(properties)s::jsonb
    AND usage.kind <> 'void' AND NOT EXISTS (
        SELECT FROM billing.rated_usage AS later
        WHERE later.event_month = usage.event_month AND later.identity = usage.identity AND later.entry > usage.entry
    )
GROUP BY usage.event_month, usage.identity, usage.account, usage.idempotency_key
ORDER BY min(usage.event_time), usage.identity
LIMIT %(limit)s
"""
_MONTHS = """
SELECT DISTINCT date_trunc('month', period, 'UTC')::date FROM billing.invoice,
    generate_series(period_start - interval '1 month', period_end, interval '1 month') AS period
"""
_FIND = """
SELECT DISTINCT event_month, identity, account, idempotency_key FROM billing.rated_usage
WHERE event_month = ANY(%s) AND identity = ANY(%s)
"""


def select(connection: "Connection[Any]", selection: Selection, limit: int | None = None) -> list[Pick]:
    """Billed events by what they say now, by time; those of closed periods too, for ``decide`` to refuse."""
    names = ("account", "event_type", "since", "until", "source")
    parameters = {name: getattr(selection, name) for name in names}
    parameters |= {"properties": Jsonb(dict(selection.properties)), "limit": limit}
    return [Pick(*row) for row in connection.execute(_SELECT, parameters)]


def find(connection: "Connection[Any]", keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Pick]:
    """Billed events by (account, idempotency key), voided ones too; one that was never billed is missing."""
    # With its month named, each probe is one step down the index that makes rows unique.
    months = [month for (month,) in connection.execute(_MONTHS)]
    rows = connection.execute(_FIND, [months, [identity_of(*key) for key in keys]])
    return {(pick.account, pick.idempotency_key): pick for pick in (Pick(*row) for row in rows)}


_UNRATED = "SELECT state::text FROM billing.unrated_event WHERE idempotency_key = %s AND account = %s"


def unrated_state(connection: "Connection[Any]", account: str, key: str) -> str | None:
    """State of an event that was not rated at first sight; None where none of this name was refused."""
    row = connection.execute(_UNRATED, [key, account]).fetchone()
    return None if row is None else str(row[0])


# -- what events hold

_HELD = """
SELECT usage.*, line.contract, line.plan, line.plan_version, line.meter, line.meter_version, line.price_version,
    line.segment_start, line.price_class::text AS price_class, line.invoice_id,
    invoice.period_start, invoice.period_end, invoice.currency, invoice.state::text AS invoice_state
FROM unnest(%s::date[], %s::uuid[]) AS wanted (event_month, identity)
JOIN billing.rated_usage AS usage USING (event_month, identity)
JOIN billing.invoice_line AS line ON line.id = usage.line_id
JOIN billing.invoice ON invoice.id = line.invoice_id
ORDER BY usage.identity, usage.entry, usage.charge, usage.cell
"""

#: A rated row with its line's and invoice's terms.
Row: TypeAlias = dict[str, Any]


def held_rows(connection: "Connection[Any]", picks: Sequence[Pick]) -> dict[UUID, list[Row]]:
    """The rows of each event's last entry: of a voided event those of kind void."""
    found: dict[UUID, list[Row]] = {}
    with connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(_HELD, [[p.event_month for p in picks], [p.identity for p in picks]]):
            rows = found.setdefault(row["identity"], [])
            if rows and rows[0]["entry"] < row["entry"]:
                rows.clear()
            rows.append(row)
    return found


# -- deciding

_INVOICES = """
SELECT DISTINCT line.invoice_id FROM unnest(%s::date[], %s::uuid[]) AS wanted (event_month, identity)
JOIN billing.rated_usage AS usage USING (event_month, identity)
JOIN billing.invoice_line AS line ON line.id = usage.line_id
"""
# The sink and the close lock invoices in this order too. Held until the decision stands: a close waits, then sees it.
_LOCK_INVOICES = "SELECT id FROM billing.invoice WHERE id = ANY(%s) ORDER BY id FOR SHARE"
# The rows of an event stand behind one another on usage.rated; the sink may have written some of them. Where it stands
# right behind the last one, only the log can say that no more of them follow.
_LAST_WRITTEN = """
SELECT usage.rated_partition, max(usage.rated_offset)
FROM unnest(%s::date[], %s::uuid[]) AS wanted (event_month, identity)
JOIN billing.rated_usage AS usage USING (event_month, identity) GROUP BY usage.rated_partition
"""
_POSITIONS = "SELECT partition, next_offset FROM billing.sink_position WHERE topic = %s"
# An event that two commands choose is decided by one after the other.
_LOCK_IDENTITIES = """
SELECT pg_advisory_xact_lock(hashtextextended('tally correction ' || identity, 0))
FROM unnest(%s::uuid[]) AS wanted (identity) ORDER BY identity
"""
_EARLIER = """
SELECT identity, max(entry + CASE action WHEN 'replace' THEN 1 ELSE 0 END),
    max(number) FILTER (WHERE state = ANY(%s))
FROM billing.correction_state WHERE identity = ANY(%s) GROUP BY identity
"""
_NUMBERS = "SELECT nextval('billing.correction_number') FROM generate_series(1, %s)"
_INSERT = """
INSERT INTO billing.correction (
    number, action, account, idempotency_key, identity, event_month, event_time, entry, reason_code, note, actor,
    decided_at, backfill, message
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_QUEUE = "INSERT INTO billing.correction_outbox SELECT unnest(%s::bigint[])"


def decide(
    connection: "Connection[Any]",
    settings: Settings,
    schemas: Schemas,
    picks: Sequence[Pick],
    decision: Decision,
    *,
    on_portion: Callable[[int], None] = lambda events: None,
) -> Decided:
    """Decide about events, a portion in each transaction; ``connection`` is in autocommit. Sends nothing.

    Refused, each with what to do: an event of a closed period, one that was voided, one that another correction is
    about, and a replacement that says what the event says.
    """
    result = Decided()
    topics = Topics(settings.topic_prefix)
    for start in range(0, len(picks), PORTION):
        portion = picks[start : start + PORTION]
        whole = _written_whole(connection, settings, portion, topics, schemas)
        with connection.transaction():
            _decide(connection, portion, decision, topics, schemas, result, whole)
        on_portion(len(portion))
    return result


def _decide(
    connection: "Connection[Any]",
    picks: Sequence[Pick],
    decision: Decision,
    topics: Topics,
    schemas: Schemas,
    result: Decided,
    whole: Mapping[int, int],
) -> None:
    months, identities = [pick.event_month for pick in picks], [pick.identity for pick in picks]
    connection.execute(_LOCK_IDENTITIES, [identities])
    invoices = [invoice for (invoice,) in connection.execute(_INVOICES, [months, identities])]
    connection.execute(_LOCK_INVOICES, [invoices])
    behind = dict(connection.execute(_POSITIONS, [topics.rated]).fetchall())  # before the rows: not too far
    rows_of = held_rows(connection, picks)
    earlier = {
        identity: (entry, waiting)
        for identity, entry, waiting in connection.execute(_EARLIER, [list(ON_ITS_WAY), identities])
    }
    numbers = [number for (number,) in connection.execute(_NUMBERS, [len(picks)])]
    now = datetime.now(UTC)
    decided: list[tuple[object, ...]] = []
    for pick, number in zip(picks, numbers, strict=True):
        last, waiting = earlier.get(pick.identity, (0, None))
        rows = rows_of.get(pick.identity, [])
        if problem := _problem(pick, rows, waiting, behind, whole):
            result.refused.append((pick, problem))
            continue
        event = _event(rows[0], schemas)
        replacement = mended(event, decision.mend, schemas) if decision.action == "replace" else None
        if replacement == event:
            result.refused.append((pick, "says all of that already: there is nothing to replace"))
            continue
        entry = max(rows[0]["entry"], last) + 1
        message = _message(number, entry, rows, event, replacement, decision, now, topics, schemas)
        decided.append(
            (
                number,
                decision.action,
                pick.account,
                pick.idempotency_key,
                pick.identity,
                pick.event_month,
                rows[0]["event_time"],
                entry,
                decision.reason_code.value,
                decision.note,
                decision.actor,
                now,
                decision.backfill,
                message,
            )
        )
        result.numbers.append(number)
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT, decided)
    connection.execute(_QUEUE, [[row[0] for row in decided]])


def _written_whole(
    connection: "Connection[Any]", settings: Settings, picks: Sequence[Pick], topics: Topics, schemas: Schemas
) -> dict[int, int]:
    """By rated partition, the offset of the last row written of an event, where all of that event's rows are there.

    A transaction's rows can be read all at once, so the log shows what the sink has yet to read of an event.
    """
    chosen = [[pick.event_month for pick in picks], [pick.identity for pick in picks]]
    behind = dict(connection.execute(_POSITIONS, [topics.rated]).fetchall())
    last = dict(connection.execute(_LAST_WRITTEN, chosen).fetchall())
    asked: dict[Place, int] = {
        (topics.rated, partition): offset + 1
        for partition, offset in last.items()
        if behind.get(partition, 0) <= offset + 1
    }
    try:
        following = {place_of(message): message.value() for message in peek(settings, asked, most=1)}
    except (KafkaException, TimeoutError) as error:
        raise CorrectionError(f"Kafka does not tell whether all rows of the events are written: {error}") from error
    identities = {pick.identity for pick in picks}
    return {
        partition: offset - 1
        for (topic, partition), offset in asked.items()
        if _identity(following.get((topic, partition)), schemas) not in identities
    }


def _identity(row: bytes | None, schemas: Schemas) -> UUID | None:
    """The event of a rated row; None where there is none."""
    try:
        return None if row is None else UUID(bytes=schemas.decode(row, RATED)["identity"])
    except WireError:
        return None


def _problem(
    pick: Pick, rows: Sequence[Row], waiting: int | None, behind: Mapping[int, int], whole: Mapping[int, int]
) -> str | None:
    """Why the event cannot be corrected now; None when it can."""
    if not rows:
        return "is not billed: nothing to correct"
    partition, last = max((row["rated_partition"], row["rated_offset"]) for row in rows)
    if behind.get(partition, 0) <= last + 1 and whole.get(partition) != last:
        return "is just being written, and not all of its rows are there: try again in a moment"
    if waiting is not None:
        return f"is being corrected by correction {waiting}, which is on its way: wait for it, or `tally usage resume`"
    if rows[0]["kind"] == "void":
        return "was voided, and its key stays used up: add the usage under a new key"
    closed = next((row for row in rows if row["invoice_state"] != "open"), None)
    if closed is not None:
        return closed_period(closed["invoice_id"], closed["invoice_state"])
    return None


def _event(row: Row, schemas: Schemas) -> bytes:
    """The framed usage event as PostgreSQL holds it: equal to the one received but for the order of its properties."""
    names = ("idempotency_key", "account", "event_type", "subject", "properties", "source", "sequence")
    return schemas.encode(EVENTS, {name: row[name] for name in names} | {"timestamp": row["event_time"]})


def _message(
    number: int,
    entry: int,
    rows: Sequence[Row],
    event: bytes,
    replacement: bytes | None,
    decision: Decision,
    now: datetime,
    topics: Topics,
    schemas: Schemas,
) -> bytes:
    first = rows[0]
    correction = Correction(
        number=number,
        entry=entry,
        reason_code=decision.reason_code.value,
        actor=decision.actor,
        decided_at_us=to_micros(now),
        catalog_offset=max(row["catalog_offset"] for row in rows),
        origin_topic=topics.events,
        origin_partition=first["origin_partition"],
        origin_offset=first["origin_offset"],
        origin_appended_ms=to_micros(first["appended_at"]) // 1000,
        event=event,
        rows=tuple(map(as_held, rows)),
        replacement=replacement,
    )
    return schemas.encode(CORRECTIONS, correction.to_record())


_SAME = (
    "contract",
    "plan",
    "plan_version",
    "meter",
    "meter_version",
    "price_version",
    "charge",
    "cell",
    "currency",
    "price_class",
    "late",
)


def as_held(row: Row) -> HeldRow:
    """What a correction says of a row that it takes back."""
    return HeldRow(
        **{name: row[name] for name in _SAME},
        period_start_us=to_micros(row["period_start"]),
        period_end_us=to_micros(row["period_end"]),
        segment_start_us=to_micros(row["segment_start"]),
        quantity=scaled(row["quantity"], QUANTITY_DECIMALS),
        amount=scaled(row["amount"], AMOUNT_DECIMALS),
    )


# -- sending

_UNSENT = """
SELECT number, account, message FROM billing.correction_outbox JOIN billing.correction USING (number)
ORDER BY number LIMIT %s
"""
_SENT = "DELETE FROM billing.correction_outbox WHERE number = ANY(%s)"


def send(
    connection: "Connection[Any]",
    settings: Settings,
    *,
    on_portion: Callable[[int], None] = lambda corrections: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> int:
    """Send what the outbox holds, of whoever decided it; return how many. ``connection`` is in autocommit.

    Raises CorrectionError when another command is sending, or when Kafka does not confirm: what is left is sent next
    time, and what went twice is applied once.
    """
    sent = 0
    with _alone(connection):
        producer = Producer(
            {
                **settings.kafka,
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "lz4",
                "partitioner": "murmur2_random",
                "message.max.bytes": RECORD_BYTES_MAX,
                "log_level": 0,  # errors are raised
            }
        )
        topic = Topics(settings.topic_prefix).retry
        while portion := connection.execute(_UNSENT, [_SEND_PORTION]).fetchall():
            confirmed = _produce(producer, topic, portion)
            on_step("confirmed")
            connection.execute(_SENT, [confirmed])
            on_portion(len(confirmed))
            sent += len(confirmed)
    return sent


def _produce(producer: Producer, topic: str, portion: Sequence[tuple[int, str, bytes]]) -> list[int]:
    """Numbers of the corrections Kafka confirmed: all of the portion."""
    confirmed: list[int] = []
    errors: list[KafkaError] = []

    def delivered(number: int) -> Callable[[KafkaError | None, Message], None]:
        def told(error: KafkaError | None, _: Message) -> None:
            if error is None:
                confirmed.append(number)
            else:
                errors.append(error)

        return told

    try:
        for number, account, message in portion:
            producer.produce(topic, message, account.encode(), on_delivery=delivered(number))
        producer.flush(_CONFIRM_S)
    except KafkaException as error:
        errors.append(error.args[0])
    if len(confirmed) < len(portion):
        why = str(errors[0]) if errors else f"no answer within {_CONFIRM_S:g} s"
        raise CorrectionError(
            f"{len(portion) - len(confirmed)} corrections are decided, but Kafka did not confirm them: {why}. "
            "They are kept: `tally usage resume` sends them, each applied at most once"
        )
    return confirmed


@contextmanager
def _alone(connection: "Connection[Any]") -> Iterator[None]:
    """Hold the lock that one sender at a time can hold. Raises CorrectionError when it is taken."""
    lock_id = "hashtextextended('tally corrections', 0)"
    if connection.execute(f"SELECT pg_try_advisory_lock({lock_id})").fetchone() != (True,):
        raise CorrectionError("another command is sending corrections, these too: wait for it to end")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute(f"SELECT pg_advisory_unlock({lock_id})")


# -- looking

_STATES = "SELECT state, count(*) FROM billing.correction_state WHERE number = ANY(%s) GROUP BY state"
_LIST = """
SELECT * FROM finance.usage_corrections
WHERE (%(account)s::text IS NULL OR account = %(account)s) AND (NOT %(pending)s OR state <> 'applied')
ORDER BY correction DESC LIMIT %(limit)s
"""


def states(connection: "Connection[Any]", numbers: Sequence[int]) -> Counter[State]:
    """How many of these corrections are in which state."""
    return Counter(dict(connection.execute(_STATES, [list(numbers)]).fetchall()))


# A period belongs to the month in which it ends, where its account is.
_RE_RATED = """
SELECT DISTINCT period.account,
    to_char((period.period_end - interval '1 microsecond') AT TIME ZONE zone.name, 'YYYY-MM')
FROM billing.correction
JOIN billing.re_rated_period AS period ON period.account = correction.account AND period.state = 'open'
    AND correction.event_time >= period.period_start AND correction.event_time < period.period_end
CROSS JOIN LATERAL (
    SELECT document ->> 'time_zone' AS name FROM billing.catalog_version
    WHERE kind = 'account' AND id = correction.account ORDER BY version DESC LIMIT 1
) AS zone
WHERE correction.number = ANY(%s) ORDER BY 1, 2
"""


def re_rated(connection: "Connection[Any]", numbers: Sequence[int]) -> list[tuple[str, str]]:
    """Accounts and months (YYYY-MM) that these corrections are of and that were re-rated: to be re-rated once more.

    Until then, or the close, lines that prices were moved between are off by what the corrections changed on them.
    """
    return [(account, month) for account, month in connection.execute(_RE_RATED, [list(numbers)])]


def listed(
    connection: "Connection[Any]", *, account: str | None = None, pending: bool = False, limit: int = 20
) -> list[Listed]:
    """The newest corrections first; ``pending``: only those that are not applied."""
    parameters = {"account": account, "pending": pending, "limit": limit}
    return [Listed(*row) for row in connection.execute(_LIST, parameters)]
