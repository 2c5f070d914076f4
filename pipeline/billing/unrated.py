"""Events not rated at first sight: their letters (parked or dead) and what receipts say became of them.

Letters of one event come over two topics and several partitions, and its resolution over a third topic: they arrive in
any order. So what is kept may not depend on the order: *rated* beats *duplicate* beats any letter, and of letters the
one with more replays counts, then more attempts, then dead-lettered over parked, then the place it stands at.
"""

from collections.abc import Iterable
from datetime import datetime
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from psycopg import Connection

from pipeline.core.periods import to_datetime
from pipeline.infra.avro import Record


class Letter(NamedTuple):
    """A DeadLetter as read, and where it stood."""

    topic: str
    partition: int
    offset: int
    record: Record
    dead: bool


class Resolution(NamedTuple):
    """What became of a parked or replayed event, by where it first arrived."""

    origin_topic: str
    origin_partition: int
    origin_offset: int
    outcome: str


#: Topic, partition and offset an event first arrived at.
_Origin: TypeAlias = tuple[str, int, int]

_COLUMNS = (
    "stage, reason, message, attempts, replays, parked_at, not_before, account, idempotency_key, event_type, "
    "event_time, appended_at, key, value, letter_topic, letter_partition, letter_offset, letter_dead"
)
_NAMES = _COLUMNS.split(", ")
_RANK = ("replays", "attempts", "letter_dead", "letter_partition", "letter_offset")

_MERGE_LETTER = f"""
INSERT INTO billing.unrated_event AS stored (origin_topic, origin_partition, origin_offset, state, {_COLUMNS})
VALUES (%(origin_topic)s, %(origin_partition)s, %(origin_offset)s, %(state)s, {", ".join(f"%({n})s" for n in _NAMES)})
ON CONFLICT (origin_topic, origin_partition, origin_offset) DO UPDATE SET
    state = CASE WHEN stored.state IN ('rated', 'duplicate') THEN stored.state ELSE EXCLUDED.state END,
    {", ".join(f"{n} = EXCLUDED.{n}" for n in _NAMES)},
    updated_at = now()
WHERE stored.letter_topic IS NULL
    OR ({", ".join(f"EXCLUDED.{n}" for n in _RANK)}) > ({", ".join(f"stored.{n}" for n in _RANK)})
"""

_MERGE_RESOLUTION = """
INSERT INTO billing.unrated_event AS stored (origin_topic, origin_partition, origin_offset, state)
VALUES (%s, %s, %s, %s)
ON CONFLICT (origin_topic, origin_partition, origin_offset) DO UPDATE SET state = EXCLUDED.state, updated_at = now()
WHERE stored.state <> 'rated' AND stored.state <> EXCLUDED.state
"""


def write_unrated(connection: "Connection[Any]", letters: Iterable[Letter], resolutions: Iterable[Resolution]) -> None:
    """Merge letters and final outcomes into ``billing.unrated_event``; for other outcomes the letter says more.

    One pass over both, in order of origin: another sink may have news of the same events, and two that lock them in
    different orders would wait for each other for ever.
    """
    changes: list[tuple[_Origin, str, Any]] = []
    for row in map(_row, letters):
        changes.append(((row["origin_topic"], row["origin_partition"], row["origin_offset"]), _MERGE_LETTER, row))
    for one in resolutions:
        if one.outcome in ("rated", "duplicate"):
            changes.append((one[:3], _MERGE_RESOLUTION, one))
    if changes:
        changes.sort(key=itemgetter(0))
        with connection.pipeline(), connection.cursor() as cursor:  # without waiting for each answer
            for _, statement, parameters in changes:
                cursor.execute(statement, parameters)


def _row(letter: Letter) -> dict[str, Any]:
    record = letter.record
    return {
        "origin_topic": record["origin_topic"],
        "origin_partition": record["origin_partition"],
        "origin_offset": record["origin_offset"],
        "state": "dead_lettered" if letter.dead else "parked",
        "stage": record["stage"],
        "reason": record["reason"],
        "message": _text(record["message"]),
        "attempts": record["attempts"],
        "replays": record["replays"],
        "parked_at": _time(record["parked_at"] * 1000),
        "not_before": None if letter.dead else _time(record["not_before"] * 1000),
        "account": _text(record["account"]),
        "idempotency_key": _text(record["idempotency_key"]),
        "event_type": _text(record["event_type"]),
        "event_time": None if record["event_time"] is None else _time(record["event_time"]),
        "appended_at": _time(record["origin_appended_at"] * 1000),
        "key": record["key"],
        "value": record["value"],
        "letter_topic": letter.topic,
        "letter_partition": letter.partition,
        "letter_offset": letter.offset,
        "letter_dead": letter.dead,
    }


def _time(at_us: int) -> datetime | None:
    """The instant, or None outside the calendar: a wild event time is a reason to be here; the bytes are kept."""
    try:
        return to_datetime(at_us)
    except OverflowError:
        return None


def _text(text: str | None) -> str | None:
    """For reading only, the bytes are kept: PostgreSQL's text holds no NUL."""
    return None if text is None else text.replace("\0", "\N{REPLACEMENT CHARACTER}")
