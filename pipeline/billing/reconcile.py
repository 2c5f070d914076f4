"""Law 8, closed accounting: every event that arrived is in exactly one state, and every rated row is in the money.

Left sides come from the broker and from the rater's receipts, right sides from what stands in PostgreSQL. What has
arrived but was not rated yet, or was rated but not written yet, is lag and no difference.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any

import psycopg
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from psycopg import Connection

from pipeline.billing.intake import Place
from pipeline.billing.receipts import SEQUENCE_BLOCK
from pipeline.infra.kafka import passes
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import TopicMismatch, Topics

#: Places named in a detail before "and n more".
_NAMED_MAX = 5
#: Longest wait for one answer of the broker, seconds.
_BROKER_ANSWER_S = 15.0
#: Sums of amounts have more digits than the default context keeps.
_EXACT = Context(prec=200, traps=[Inexact, InvalidOperation])
#: Time between two looks while waiting for lag to go, seconds.
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Check:
    """Two numbers that must be equal, counted independently; the detail says what they are made of, or where not."""

    name: str
    left: Decimal
    right: Decimal
    detail: str

    @property
    def difference(self) -> Decimal:
        return _EXACT.subtract(self.left, self.right)


@dataclass(frozen=True, slots=True)
class Lag:
    """Offsets of a topic that a stage has not come to; at most this many records, since markers take offsets too."""

    topic: str
    stage: str
    offsets: int


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """All checks, and how far the stages are behind."""

    checks: tuple[Check, ...]
    lags: tuple[Lag, ...]

    @property
    def reconciled(self) -> bool:
        """No check shows a difference."""
        return all(check.difference == 0 for check in self.checks)

    @property
    def lag(self) -> int:
        """Offsets that stages have not come to, over all topics."""
        return sum(lag.offsets for lag in self.lags)


def reconcile(settings: Settings, *, wait_s: float = 0.0, grace_s: float = 0.0) -> Reconciliation:
    """Check everything that must add up, as of now.

    Waits up to ``wait_s`` for lag to go. Missing sequence numbers count only below the first block of a source that
    changed in the last ``grace_s``: they may still be on their way. Raises KafkaException or psycopg.OperationalError
    when the broker or the database does not answer.
    """
    until = time.monotonic() + wait_s
    while True:
        with connect(settings.dsn, application="reconcile") as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one moment for all statements
            connection.read_only = True
            lags = _lags(settings, connection)
            if not any(lag.offsets for lag in lags) or time.monotonic() >= until:
                return Reconciliation(tuple(_checks(connection, Topics(settings.topic_prefix), grace_s)), lags)
        time.sleep(_LOOK_EVERY_S)


def _checks(connection: "Connection[Any]", topics: Topics, grace_s: float) -> Iterable[Check]:
    yield _arrivals(connection, topics)
    yield _coverage(connection, topics.events)
    yield _coverage(connection, topics.retry)
    yield _outcomes(connection)
    yield _resolved(connection, topics)
    yield _rows(connection, topics)
    yield _lines(connection)
    yield from _amounts(connection)
    yield _sequences(connection, grace_s)


# -- checks

_ARRIVALS = """
WITH ends AS (
    SELECT max(next_offset) AS covered, sum(next_offset - first_offset - records) AS markers,
        sum(rated) AS rated, sum(duplicates) AS duplicates
    FROM billing.receipt WHERE topic = %(topic)s GROUP BY partition
), states AS (
    SELECT count(*) FILTER (WHERE state = 'rated') AS rated, count(*) FILTER (WHERE state = 'duplicate') AS duplicates,
        count(*) FILTER (WHERE state = 'parked') AS parked, count(*) FILTER (WHERE state = 'dead_lettered') AS dead
    FROM billing.unrated_event WHERE origin_topic = %(topic)s
)
SELECT coalesce(sum(covered - markers), 0), coalesce(sum(ends.rated), 0) + states.rated,
    coalesce(sum(ends.duplicates), 0) + states.duplicates, states.parked, states.dead
FROM states LEFT JOIN ends ON true GROUP BY states.rated, states.duplicates, states.parked, states.dead
"""


def _arrivals(connection: "Connection[Any]", topics: Topics) -> Check:
    arrived, rated, duplicates, parked, dead = _one(connection, _ARRIVALS, {"topic": topics.events})
    detail = f"rated {rated:,} + duplicates {duplicates:,} + parked {parked:,} + dead-lettered {dead:,}"
    return Check("events arrived = in a state", Decimal(arrived), Decimal(rated + duplicates + parked + dead), detail)


# Sweep over each partition's receipts in order: how far they reach before a receipt, and whether it begins there.
_GAPS = """
WITH swept AS (
    SELECT partition, first_offset, next_offset, coalesce(max(next_offset) OVER (
        PARTITION BY partition ORDER BY first_offset, next_offset ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ), 0) AS reached
    FROM billing.receipt WHERE topic = %s
)
SELECT partition, reached, first_offset, least(next_offset, reached) FROM swept
WHERE first_offset <> reached ORDER BY partition, first_offset
"""
_REACHED = """
SELECT coalesce(sum(reached), 0) FROM (
    SELECT max(next_offset) AS reached FROM billing.receipt WHERE topic = %s GROUP BY partition
) AS ends
"""


def _coverage(connection: "Connection[Any]", topic: str) -> Check:
    (reached,) = _one(connection, _REACHED, [topic])
    wrong, places = 0, []
    for partition, before, first, overlap_end in connection.execute(_GAPS, [topic]):
        if first > before:
            wrong += first - before
            places.append(f"no receipt for partition {partition} offsets {before} to {first - 1}")
        else:
            wrong += overlap_end - first
            places.append(f"two receipts for partition {partition} offsets {first} to {overlap_end - 1}")
    return Check(
        f"offsets of {topic} = with one receipt", Decimal(reached), Decimal(reached - wrong), _list(places, "all")
    )


_OUTCOMES = """
SELECT topic, partition, first_offset, records, rated + duplicates + parked + dead_lettered
FROM billing.receipt WHERE records <> rated + duplicates + parked + dead_lettered ORDER BY 1, 2, 3
"""
_RECORDS = "SELECT coalesce(sum(records), 0) FROM billing.receipt"


def _outcomes(connection: "Connection[Any]") -> Check:
    (records,) = _one(connection, _RECORDS)
    wrong, places = 0, []
    for topic, partition, first, had, outcomes in connection.execute(_OUTCOMES):
        wrong += abs(had - outcomes)
        places.append(f"{topic} {partition} from {first}: {had} records, {outcomes} outcomes")
    return Check(
        "records in receipts = with one outcome", Decimal(records), Decimal(records - wrong), _list(places, "all")
    )


_RESOLVED = """
SELECT (SELECT coalesce(sum(rated), 0) FROM billing.receipt WHERE topic = %(retry)s),
    (SELECT count(*) FROM billing.unrated_event WHERE state = 'rated' AND origin_topic = %(events)s)
"""


def _resolved(connection: "Connection[Any]", topics: Topics) -> Check:
    receipts, events = _one(connection, _RESOLVED, {"retry": topics.retry, "events": topics.events})
    return Check(
        "rated on retry = events resolved", Decimal(receipts), Decimal(events), "once parked or replayed, now rated"
    )


_ROWS = """
SELECT (SELECT coalesce(sum(rated_rows), 0) FROM billing.receipt), (SELECT count(*) FROM billing.rated_usage),
    (SELECT count(*) FROM billing.quarantine WHERE rated_topic = %s)
"""


def _rows(connection: "Connection[Any]", topics: Topics) -> Check:
    receipts, billed, quarantined = _one(connection, _ROWS, [topics.rated])
    return Check(
        "rated rows in receipts = in PostgreSQL",
        Decimal(receipts),
        Decimal(billed + quarantined),
        f"billed {billed:,} + quarantined {quarantined:,}",
    )


_SUMS = """
SELECT line_id, sum(amount) AS amount, sum(quantity) AS quantity FROM billing.rated_usage GROUP BY line_id
"""
_LINES = f"""
SELECT coalesce(line.id, sums.line_id), line.amount, line.quantity, sums.amount, sums.quantity
FROM billing.invoice_line AS line FULL JOIN ({_SUMS}) AS sums ON sums.line_id = line.id
WHERE coalesce(line.amount, 0) <> coalesce(sums.amount, 0) OR coalesce(line.quantity, 0) <> coalesce(sums.quantity, 0)
    OR line.id IS NULL
ORDER BY 1
"""


def _lines(connection: "Connection[Any]") -> Check:
    (lines,) = _one(connection, "SELECT count(*) FROM billing.invoice_line")
    places = [
        f"line:{line} holds {amount} for {quantity}, its rows {rows_amount} for {rows_quantity}"
        for line, amount, quantity, rows_amount, rows_quantity in connection.execute(_LINES)
    ]
    return Check(
        "lines = with the sums of their rows", Decimal(lines), Decimal(lines - len(places)), _list(places, "all")
    )


_AMOUNTS = f"""
SELECT invoice.currency, coalesce(sum(sums.amount), 0), sum(line.amount)
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
LEFT JOIN ({_SUMS}) AS sums ON sums.line_id = line.id
GROUP BY invoice.currency ORDER BY invoice.currency
"""


def _amounts(connection: "Connection[Any]") -> Iterable[Check]:
    for currency, rows, lines in connection.execute(_AMOUNTS):
        yield Check(f"{currency} of rows = {currency} of lines", rows, lines, "exact, unrounded")


# Per source: how many numbers from 1 up to the highest seen, and how many of these arrived; blocks from the first one
# that changed lately are left out.
_SEQUENCES = """
WITH young AS (
    SELECT source, min(block) AS block FROM billing.source_sequence
    WHERE updated_at > now() - %(grace)s * interval '1 second' GROUP BY source
), old AS (
    SELECT stored.* FROM billing.source_sequence AS stored LEFT JOIN young USING (source)
    WHERE young.block IS NULL OR stored.block < young.block
), highest AS (
    SELECT DISTINCT ON (source) source, block * %(size)s + length(rtrim(bits::text, '0')) - 1 AS number
    FROM old ORDER BY source, block DESC
)
SELECT source, highest.number, sum(bit_count(bits))::bigint FROM old JOIN highest USING (source)
GROUP BY source, highest.number
"""
_BLOCKS = """
SELECT block, bits::text FROM billing.source_sequence WHERE source = %s AND block <= %s ORDER BY block
"""


def _sequences(connection: "Connection[Any]", grace_s: float) -> Check:
    expected, arrived = 0, 0
    places: list[str] = []
    rows = connection.execute(_SEQUENCES, {"grace": grace_s, "size": SEQUENCE_BLOCK}).fetchall()
    for source, highest, numbers in rows:
        expected += highest
        arrived += numbers
        if numbers < highest:
            # Looked up only where it will be named.
            places.append(
                f"{source} misses {_missing(connection, source, highest)}" if len(places) < _NAMED_MAX else ""
            )
    detail = _list(places, f"{len(rows)} sources without holes" if len(rows) != 1 else "1 source without holes")
    return Check("sequence numbers sent = arrived", Decimal(expected), Decimal(arrived), detail)


def _missing(connection: "Connection[Any]", source: str, highest: int) -> str:
    """The first missing ranges of a source's numbers from 1 to the highest, as text."""
    ranges: list[tuple[int, int]] = []

    def miss(first: int, last: int) -> None:
        if first > last:
            return
        if ranges and ranges[-1][1] == first - 1:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))

    block = 0
    for stored, bits in connection.execute(_BLOCKS, [source, highest // SEQUENCE_BLOCK]):
        miss(max(block * SEQUENCE_BLOCK, 1), stored * SEQUENCE_BLOCK - 1)
        for i, bit in enumerate(bits):
            number = stored * SEQUENCE_BLOCK + i
            if bit == "0" and 1 <= number <= highest:
                miss(number, number)
        block = stored + 1
        if len(ranges) > _NAMED_MAX:
            break
    return _list([str(first) if first == last else f"{first} to {last}" for first, last in ranges], "nothing", ", ")


def _one(connection: "Connection[Any]", statement: str, parameters: Any = None) -> tuple[Any, ...]:
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None, "an aggregate gives one row"
    return tuple(row)


def _list(places: list[str], none: str, separator: str = "; ") -> str:
    if not places:
        return none
    more = f" and {len(places) - _NAMED_MAX:,} more" if len(places) > _NAMED_MAX else ""
    return separator.join(places[:_NAMED_MAX]) + more


# -- lag


def _lags(settings: Settings, connection: "Connection[Any]") -> tuple[Lag, ...]:
    """How far the rater is behind on arrivals, by receipts, and the sink on all it reads, by positions.

    What waits on the retry topic for its time is parked, a state of its own, and no lag of the rater.
    """
    topics = Topics(settings.topic_prefix)
    covered = (
        "SELECT topic, partition, max(next_offset) FROM billing.receipt WHERE topic = %s GROUP BY topic, partition"
    )
    written = "SELECT topic, partition, next_offset FROM billing.sink_position"
    positions: dict[Place, int] = {
        (topic, partition): offset
        for topic, partition, offset in (
            *connection.execute(covered, [topics.events]),
            *connection.execute(written),
        )
    }
    read = (topics.rated, topics.receipts, topics.retry, topics.dead_letter)
    left = dict.fromkeys((topics.events, *read), 0)
    for (topic, _), offsets in _offsets_left(settings, tuple(left), positions).items():
        left[topic] += offsets
    return tuple(Lag(topic, "sink" if topic in read else "rater", offsets) for topic, offsets in left.items())


def _offsets_left(settings: Settings, topics: tuple[str, ...], positions: dict[Place, int]) -> dict[Place, int]:
    """Offsets from the positions to the ends of the logs, where a committed record is left; markers are no lag."""
    ends = {place: end for place, end in _ends_once_known(settings, topics).items() if end > positions.get(place, 0)}
    if not ends:
        return {}
    consumer = Consumer(
        settings.kafka
        | {
            "group.id": settings.topic_prefix + "reconcile",  # required by the library, never joined
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",  # where retention has taken what was read
            "fetch.wait.max.ms": 10,  # most partitions hold nothing more: hear of it at once
        }
    )
    left: dict[Place, int] = {}
    until = time.monotonic() + _BROKER_ANSWER_S
    try:
        consumer.assign([TopicPartition(*place, positions.get(place, 0)) for place in ends])
        while len(left) < len(ends):
            message = consumer.poll(max(until - time.monotonic(), 0.0))
            if message is None:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer about {sorted(ends.keys() - left)}"))
            place = (str(message.topic()), int(message.partition() or 0))
            if (error := message.error()) is None:
                left.setdefault(place, ends[place] - positions.get(place, 0))
            elif error.code() == KafkaError._PARTITION_EOF:
                left.setdefault(place, 0)
            elif not passes(error):
                raise KafkaException(error)
    finally:
        consumer.close()
    return left


def _ends(settings: Settings, topics: tuple[str, ...]) -> dict[Place, int]:
    """Ends of all partitions of the topics, as a reader of committed records sees them."""
    admin = AdminClient(settings.kafka)
    known = admin.list_topics(timeout=_BROKER_ANSWER_S).topics
    if missing := [topic for topic in topics if topic not in known]:
        raise TopicMismatch(f"topics {', '.join(missing)} do not exist: run `tally up`")
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    asked = admin.list_offsets(
        {TopicPartition(topic, partition): latest for topic in topics for partition in known[topic].partitions},
        isolation_level=IsolationLevel.READ_COMMITTED,
    )
    return {(p.topic, p.partition): future.result(_BROKER_ANSWER_S).offset for p, future in asked.items()}


def _ends_once_known(settings: Settings, topics: tuple[str, ...]) -> dict[Place, int]:
    """``_ends``, asked again while a partition is between two leaders, as it is right after it was created."""
    until = time.monotonic() + _BROKER_ANSWER_S
    while True:
        try:
            return _ends(settings, topics)
        except KafkaException as error:
            if not passes(error.args[0]) or time.monotonic() >= until:
                raise
            time.sleep(_LOOK_EVERY_S)
