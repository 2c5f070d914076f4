"""Replaying dead letters: back on the retry topic, judged once more under the same identity, billed at most once.

A replay is three numbered steps for every portion of events, done by one command at a time:

1. *Decide*, in PostgreSQL: the row of each event becomes what its letter on the retry topic will be (parked, one more
   replay, no attempt yet, the bytes to be judged), unless it moved on since it was chosen; with an audit entry.
2. *Send*, in one Kafka transaction: the letters, made from these rows and nothing else.
3. *Seen*: the sink reads each letter and notes where it stands.

A command that dies before step 2 leaves replays that are decided and not sent. The next one that is asked for these
events finishes them: its ``init_transactions`` ends whatever the dead one had open, so the retry topic, read from the
sink's position on, shows for certain which letters are there; only those that are not are sent, with the same bytes.
Until an event is judged it cannot be replayed again, so no two different mends of one event can ever both be rated.
And should the rater see a letter twice, the second is a duplicate.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from confluent_kafka import KafkaException, Producer
from psycopg import Connection

from pipeline.core.periods import to_datetime, to_micros
from pipeline.infra.avro import DEAD_LETTER, Record, Schemas, WireError
from pipeline.infra.settings import Settings
from pipeline.infra.topics import RECORD_BYTES_MAX, Topics, partition_of
from pipeline.operations.dead_letters import NOT_SEEN, Origin, Pick, UnratedEvent, audit, lock
from pipeline.operations.events import Mend, NotAnEvent, mended, read_event
from pipeline.operations.peek import Place, peek

#: Events decided and sent at a time: a portion of huge ones (256 KiB) still fits in memory.
PORTION = 200
#: An open transaction holds up the raters' and the sink's reading; the broker aborts a dead command's after this.
_TRANSACTION_TIMEOUT_MS = 15_000
#: Longest wait for one answer of the broker, seconds.
_ANSWER_S = 20.0


class ReplayError(Exception):
    """A replay that did not happen, or not to its end. Says what to do."""


@dataclass(slots=True)
class Replayed:
    """What became of the events chosen."""

    sent: list[Origin] = field(default_factory=list)
    #: Decided by an earlier command that died: sent now, or found on the retry topic already.
    finished: list[Origin] = field(default_factory=list)
    #: No dead letter any more when their turn came.
    moved_on: list[Origin] = field(default_factory=list)
    #: Not replayed, and why: could not be mended, or no usage event.
    refused: list[tuple[Origin, str]] = field(default_factory=list)


def replay(
    connection: "Connection[Any]",
    settings: Settings,
    schemas: Schemas,
    picks: Sequence[Pick],
    *,
    why: str,
    mend: Mend | None = None,
    on_portion: Callable[[int], None] = lambda events: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Replayed:
    """Put the original bytes of dead letters, or a mended copy, on the retry topic. ``connection`` is in autocommit.

    Raises ReplayError when another replay is running, or when Kafka failed after the decision: the same call again
    finishes it. Raises KafkaException when Kafka does not answer before anything was decided.
    """
    topics = Topics(settings.topic_prefix)
    decision = Decision(settings.actor, why, mend or Mend())
    result = Replayed()
    with _alone(connection):
        sender = _Sender(settings, topics, schemas, on_step)
        if unfinished := [pick for pick in picks if pick.unfinished]:
            if decision.mend:
                raise ReplayError(
                    f"the replay of {unfinished[0].origin} was decided before and not sent: finish it first, by "
                    "replaying it without --set; if it is dead-lettered again, it can be mended"
                )
            _finish(connection, settings, schemas, sender, unfinished, decision, result)
            on_portion(len(unfinished))
        fresh = [pick for pick in picks if not pick.unfinished]
        for start in range(0, len(fresh), PORTION):
            portion = fresh[start : start + PORTION]
            # Step 1.
            decided = _decide(connection, portion, decision, topics, schemas, result)
            on_step("decided")
            # Step 2.
            sender.send(decided)
            on_step("sent")
            result.sent += (event.origin for event in decided)
            on_portion(len(portion))
    return result


def not_replayable(event: UnratedEvent, topics: Topics) -> str | None:
    """Why this can never be replayed, whatever its state; None when it may.

    Only what arrived on the events topic is usage. What somebody else wrote to the retry topic is refused by the rater
    like any event; a replay would give it a letter, and with that a place among the arrivals it never had.
    """
    if event.origin_topic == topics.events:
        return None
    return f"is no usage event: it arrived on {event.origin_topic}, not on {topics.events}: discard it"


# -- step 1


class Decision(NamedTuple):
    """Who replays, why, and what is mended on the way."""

    actor: str
    why: str
    mend: Mend


_DECIDE = """
UPDATE billing.unrated_event SET
    state = 'parked', attempts = 0, replays = %(replays)s, parked_at = %(parked_at)s, not_before = NULL,
    account = %(account)s, idempotency_key = %(idempotency_key)s, event_type = %(event_type)s,
    event_time = %(event_time)s, value = %(value)s,
    letter_topic = %(letter_topic)s, letter_partition = %(letter_partition)s, letter_offset = %(letter_offset)s,
    letter_dead = false, decision = 'replay', decided_at = %(decided_at)s, decided_by = %(decided_by)s,
    decision_reason = %(decision_reason)s, updated_at = now()
WHERE (origin_topic, origin_partition, origin_offset) = (%(origin_topic)s, %(origin_partition)s, %(origin_offset)s)
"""


def _decide(
    connection: "Connection[Any]",
    portion: Sequence[Pick],
    decision: Decision,
    topics: Topics,
    schemas: Schemas,
    result: Replayed,
) -> list[UnratedEvent]:
    """Step 1 for a portion: the events as their rows stand after it."""
    decided: list[UnratedEvent] = []
    details: list[tuple[Origin, dict[str, Any]]] = []
    with connection.transaction():
        events = lock(connection, portion)
        found = {event.origin for event in events}
        result.moved_on += (pick.origin for pick in portion if pick.origin not in found)
        known = _known_accounts(connection, events) if "account" in decision.mend.fields else set()
        for event in events:
            if problem := not_replayable(event, topics):
                result.refused.append((event.origin, problem))
                continue
            if event.account in known:
                result.refused.append((event.origin, f"{_OTHER_ACCOUNT}, and {event.account} is known"))
                continue
            try:
                after = _as_decided(event, decision, topics, schemas)
            except NotAnEvent as error:
                result.refused.append((event.origin, f"cannot be mended: {error}"))
                continue
            decided.append(after)
            detail: dict[str, Any] = {"why": decision.why, "reason": event.reason, "replays": after.replays}
            if decision.mend:
                # The row and the letter hold the mended bytes from now on.
                original = None if event.value is None else event.value.hex()
                detail |= {"set": decision.mend.texts(), "original_value": original}
            details.append((event.origin, detail))
        with connection.cursor() as cursor:
            cursor.executemany(_DECIDE, [asdict(event) for event in decided])
        audit(connection, decision.actor, "dlq.replay", details)
    return decided


#: Identity is (account, key), and the service may send the event again: under two accounts it would be billed twice.
_OTHER_ACCOUNT = "another account may be set only where nobody can be billed under the first"
_KNOWN = "SELECT id FROM billing.catalog_version WHERE kind = 'account' AND id = ANY(%s)"


def _known_accounts(connection: "Connection[Any]", events: Sequence[UnratedEvent]) -> set[str | None]:
    accounts = [event.account for event in events if event.account is not None]
    return {account for (account,) in connection.execute(_KNOWN, [accounts])}


def _as_decided(event: UnratedEvent, decision: Decision, topics: Topics, schemas: Schemas) -> UnratedEvent:
    """The event as its row stands once its replay is decided. Raises NotAnEvent when it cannot be mended."""
    now = datetime.now(UTC)
    after = replace(
        event,
        replays=event.replays + 1,
        parked_at=now,
        letter_topic=topics.retry,
        letter_partition=NOT_SEEN,
        letter_offset=NOT_SEEN,
        decided_at=now,
        decided_by=decision.actor,
        decision_reason=decision.why,
    )
    if not decision.mend:
        return after
    value = mended(event.value, decision.mend, schemas)
    named = read_event(value, schemas)
    return replace(
        after,
        value=value,
        account=_text(named["account"]),
        idempotency_key=_text(named["idempotency_key"]),
        event_type=_text(named["event_type"]),
        event_time=_time(named["timestamp"]),
    )


def _text(text: str) -> str:
    """For reading only, the bytes are kept: PostgreSQL's text holds no NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _time(at_us: int) -> datetime | None:
    """For reading only: None outside the calendar."""
    try:
        return to_datetime(at_us)
    except OverflowError:
        return None


# -- step 2


class _Sender:
    """Sends letters with the one transactional id of replays. Making it ends what a dead command had open."""

    def __init__(self, settings: Settings, topics: Topics, schemas: Schemas, on_step: Callable[[str], None]) -> None:
        self._on_step = on_step
        self._topic = topics.retry
        self._schemas = schemas
        self._producer = Producer(
            {
                **settings.kafka,
                "transactional.id": f"{settings.topic_prefix}dlq-replay",
                "transaction.timeout.ms": _TRANSACTION_TIMEOUT_MS,
                "acks": "all",
                "compression.type": "lz4",
                "message.max.bytes": RECORD_BYTES_MAX,
                "log_level": 0,  # errors are raised
            }
        )
        self._producer.init_transactions(_ANSWER_S)
        self._partitions = len(self._producer.list_topics(self._topic, _ANSWER_S).topics[self._topic].partitions)

    def send(self, events: Sequence[UnratedEvent]) -> None:
        """Step 2 for events that were decided: all or none. Raises ReplayError when Kafka did not take them."""
        if not events:
            return
        try:
            self._producer.begin_transaction()
            for event in events:
                partition, key, letter = self._letter(event)
                self._producer.produce(self._topic, letter, key, partition)
            self._on_step("produced")
            self._producer.commit_transaction(_ANSWER_S)
        except KafkaException as error:
            raise ReplayError(
                f"{len(events)} replays are decided, but Kafka did not confirm their letters: {error.args[0]}. "
                "Run the same command again: it finishes them, each at most once"
            ) from error

    def place(self, event: UnratedEvent) -> Place:
        """Where the event's letter goes."""
        return self._topic, self._letter(event)[0]

    def _letter(self, event: UnratedEvent) -> tuple[int, bytes | None, bytes]:
        """Partition, key and framed letter: made from the row alone, so that sending again sends the same."""
        try:
            named: Record | None = read_event(event.value, self._schemas)
        except NotAnEvent:
            named = None
        account = None if named is None else named["account"].encode()
        partition = event.origin_partition if account is None else partition_of(account, self._partitions)
        assert event.appended_at is not None and event.parked_at is not None  # every letter has them
        letter = {
            "origin_topic": event.origin_topic,
            "origin_partition": event.origin_partition,
            "origin_offset": event.origin_offset,
            # Age is judged at the first arrival: a replay makes no event younger.
            "origin_appended_at": to_micros(event.appended_at) // 1000,
            "stage": event.stage,
            "reason": event.reason,
            "message": event.message,
            "attempts": 0,
            "replays": event.replays,
            "parked_at": to_micros(event.parked_at) // 1000,
            "not_before": 0,
            "catalog_offset": 0,
            "account": named and named["account"],
            "idempotency_key": named and named["idempotency_key"],
            "event_type": named and named["event_type"],
            "event_time": named and named["timestamp"],
            "key": event.key,
            "value": event.value,
        }
        return partition, event.key if account is None else account, self._schemas.encode(DEAD_LETTER, letter)


# -- what a dead command left

_POSITIONS = "SELECT topic, partition, next_offset FROM billing.sink_position WHERE topic = %s"


def _finish(
    connection: "Connection[Any]",
    settings: Settings,
    schemas: Schemas,
    sender: _Sender,
    picks: Sequence[Pick],
    decision: Decision,
    result: Replayed,
) -> None:
    """Send the letters of replays that were decided before, as far as they are not on the retry topic."""
    topics = Topics(settings.topic_prefix)
    # Positions before rows: what the sink wrote between the two is then seen in the rows.
    positions = {
        (topic, partition): offset
        for topic, partition, offset in connection.execute(_POSITIONS, [topics.retry]).fetchall()
    }
    with connection.transaction():
        events = lock(connection, picks)
        found = {event.origin for event in events}
        result.moved_on += (pick.origin for pick in picks if pick.origin not in found)
        starts = {place: positions.get(place, 0) for place in map(sender.place, events)}
        there: set[tuple[str, int, int, int]] = set()
        for message in peek(settings, starts):
            try:
                letter = schemas.decode(message.value(), DEAD_LETTER)
            except WireError:
                continue  # not ours; the sink quarantines it
            there.add((letter["origin_topic"], letter["origin_partition"], letter["origin_offset"], letter["replays"]))
        missing = [event for event in events if (*event.origin, event.replays) not in there]
        sender.send(missing)
        audit(
            connection,
            decision.actor,
            "dlq.replay.finish",
            ((event.origin, {"why": decision.why, "replays": event.replays}) for event in missing),
        )
    result.finished += (event.origin for event in events)


@contextmanager
def _alone(connection: "Connection[Any]") -> Iterator[None]:
    """Hold the lock that one replay at a time can hold. Raises ReplayError when it is taken."""
    lock_id = "hashtextextended('tally dlq replay', 0)"
    if connection.execute(f"SELECT pg_try_advisory_lock({lock_id})").fetchone() != (True,):
        raise ReplayError("another `tally dlq replay` is running: wait for it to end")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute(f"SELECT pg_advisory_unlock({lock_id})")
