"""How a batch becomes rows, invoice lines and positions: one transaction, in numbered steps.

A process may die after any step. Before step 7 nothing has happened; after it everything has, positions included, so
the next reader goes on behind the batch (law 7b).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from json import JSONEncoder
from typing import Any, TypeAlias
from uuid import UUID

from psycopg import Connection
from psycopg.errors import Error, UniqueViolation

from pipeline.billing.intake import Batch, Place, Poison, RatedMessage
from pipeline.billing.lines import Line, LineKey, Lines, PeriodsClosed, merge_references
from pipeline.billing.rated import Head
from pipeline.billing.receipts import Receipt, write_receipts
from pipeline.billing.sequences import write_sequences
from pipeline.billing.unrated import write_unrated
from pipeline.core.periods import to_datetime
from pipeline.infra.topics import Topics

plain_text: Callable[[Head], str | None] | None
try:
    from pipeline.billing.fastpath import text_of_event as plain_text
except ImportError:  # installed without a C compiler: slower, the same in all else
    plain_text = None


class Step(IntEnum):
    """Steps of ``commit``; each is reached when its work is done."""

    POSITIONS_MOVED = 1
    LINES_LOCKED = 2
    ROWS_INSERTED = 3
    LINES_MOVED = 4
    EVENTS_ACCOUNTED = 5
    REST_QUARANTINED = 6
    COMMITTED = 7
    OFFSETS_COMMITTED = 8  # by the sink: Kafka's copy of the positions, for lag tools


#: Told of every step; what a test hooks into.
Reached: TypeAlias = Callable[[Step], None]


#: A sequence number may be this late before it counts as missing, unless said otherwise, seconds.
SEQUENCE_GRACE_S = 900.0


class PositionTaken(Exception):
    """A stored position is not where this consumer left it: another sink reads the partition."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a commit did, for the metrics. Messages written before, read again, count as nothing."""

    billed: int
    quarantined: Counter[str]  # by reason


def prepare(connection: "Connection[Any]") -> None:
    """Make the connection ready for ``commit``: its staging table."""
    connection.execute("CREATE TEMPORARY TABLE staged (LIKE billing.rated_usage) ON COMMIT DELETE ROWS")


def commit(
    connection: "Connection[Any]",
    batch: Batch,
    lines: Lines,
    topics: Topics,
    reached: Reached,
    *,
    grace_s: float = SEQUENCE_GRACE_S,
) -> Written:
    """Write a batch, all of it or nothing. The connection is in autocommit and prepared; month partitions exist.

    1. Move every position by compare-and-set.
    2. Find or create lines; lock their invoices in id order. Rows of a closed period that no message has billed go to
       its next supplement.
    3. COPY these rows into the table. When one of them is there already, take that back; COPY them into a staging table
       and insert them from there ON CONFLICT DO NOTHING.
    4. Add what was inserted, and only that, to the lines.
    5. Write receipts, sequence numbers, control totals, letters and resolutions.
    6. Quarantine the rest with its bytes: already billed, undecodable, already receipted.
    7. Commit.

    Positions may have been set back by hand: a message that is written already changes nothing.

    Raises PositionTaken when another sink moved a position first, psycopg.Error when Postgres fails; either way
    nothing is written and ``lines`` is forgotten.
    """
    late: frozenset[LineKey] = frozenset()
    while True:
        try:
            return _commit(connection, batch, lines, topics, reached, grace_s, late)
        except PeriodsClosed as closed:  # rolled back, and found out before anything was created
            late |= closed.keys
        except (Error, PositionTaken):
            lines.forget()
            raise


def _commit(
    connection: "Connection[Any]",
    batch: Batch,
    lines: Lines,
    topics: Topics,
    reached: Reached,
    grace_s: float,
    late: frozenset[LineKey],
) -> Written:
    """One transaction. Raises PeriodsClosed for lines of periods that are closed and not among ``late``."""
    with connection.transaction():
        # Step 1.
        _move_positions(connection, batch.moves)
        reached(Step.POSITIONS_MOVED)
        # Step 2.
        rated, repeats = _without_billed(connection, batch.rated, late)
        keys = {(message.row.head.account, message.row.terms) for message in rated}
        line_of = lines.lock(connection, keys, late=late) if keys else {}
        rows = [(message, line_of[message.row.head.account, message.row.terms]) for message in rated]
        reached(Step.LINES_LOCKED)
        # Step 3.
        inserted, conflicts = _insert(connection, rows)
        reached(Step.ROWS_INSERTED)
        # Step 4.
        _add_to_lines(connection, inserted)
        reached(Step.LINES_MOVED)
        # Step 5.
        receipted = write_receipts(connection, batch.receipts)
        write_sequences(connection, batch.receipts, batch.controls, grace_s=grace_s)
        write_unrated(connection, batch.letters, batch.resolutions)
        reached(Step.EVENTS_ACCOUNTED)
        # Step 6.
        refused = [
            *(_refused_row("already_billed", message, topics) for message in (*repeats, *conflicts)),
            *(_refused("already_receipted", topics.receipts, receipt) for receipt in receipted),
            *(_refused("undecodable", poison.topic, poison) for poison in batch.poison),
        ]
        quarantined = _quarantine(connection, refused)
        reached(Step.REST_QUARANTINED)
        # Step 7.
    reached(Step.COMMITTED)
    return Written(len(inserted), quarantined)


# -- positions

_MOVE_POSITIONS = """
UPDATE billing.sink_position AS stored SET next_offset = moved.following
FROM unnest(%s::text[], %s::integer[], %s::bigint[], %s::bigint[]) AS moved (topic, partition, expected, following)
WHERE stored.topic = moved.topic AND stored.partition = moved.partition AND stored.next_offset = moved.expected
RETURNING stored.topic, stored.partition
"""


def _move_positions(connection: "Connection[Any]", moves: dict[Place, tuple[int, int]]) -> None:
    places = list(moves)
    columns: list[list[object]] = [
        [topic for topic, _ in places],
        [partition for _, partition in places],
        [expected for expected, _ in moves.values()],
        [following for _, following in moves.values()],
    ]
    moved = set(connection.execute(_MOVE_POSITIONS, columns).fetchall())
    if len(moved) < len(places):
        topic, partition = next(place for place in places if place not in moved)
        raise PositionTaken(f"{topic} {partition} is no longer at {moves[topic, partition][0]}: another sink reads it")


# -- rows

#: A row, and its line of an open invoice.
_OpenRow: TypeAlias = tuple[RatedMessage, Line]


_BILLED = """
SELECT message.rated_partition, message.rated_offset,
    (billed.rated_partition, billed.rated_offset) = (message.rated_partition, message.rated_offset)
FROM unnest(%s::date[], %s::uuid[], %s::text[], %s::text[], %s::integer[], %s::integer[], %s::bigint[])
    AS message (event_month, identity, charge, cell, entry, rated_partition, rated_offset)
JOIN billing.rated_usage AS billed USING (event_month, identity, charge, cell, entry)
"""


def _without_billed(
    connection: "Connection[Any]", rated: list[RatedMessage], late: frozenset[LineKey]
) -> tuple[list[RatedMessage], list[RatedMessage]]:
    """Rows without those of ``late`` that were billed while their period was open: no supplement is opened for them.

    Of these, return the ones that another message had billed; in neither list, what this very message had written.
    """
    of_closed = [message for message in rated if (message.row.head.account, message.row.terms) in late]
    if not of_closed:
        return rated, []
    rows = [message.row for message in of_closed]
    columns: list[list[object]] = [
        [to_datetime(row.head.timestamp_us).date().replace(day=1) for row in rows],
        [UUID(bytes=row.head.identity) for row in rows],
        [row.terms.charge for row in rows],
        [row.terms.cell for row in rows],
        [row.entry for row in rows],
        [message.partition for message in of_closed],
        [message.offset for message in of_closed],
    ]
    found = connection.execute(_BILLED, columns).fetchall()
    billed = {(partition, offset): same for partition, offset, same in found}
    return (
        [message for message in rated if (message.partition, message.offset) not in billed],
        [message for message in of_closed if billed.get((message.partition, message.offset)) is False],
    )


# In the order of the text that _text_of_event, _staged and the row's own part make.
_COLUMNS = (
    "event_month, identity, origin_offset, sequence, catalog_offset, event_time, appended_at, origin_partition, "
    "account, idempotency_key, event_type, subject, source, properties, "
    "line_id, charge, cell, "
    "rated_partition, rated_offset, entry, kind, late, quantity, quantity_before, quantity_after, amount"
)
_COPY = f"COPY billing.rated_usage ({_COLUMNS}) FROM STDIN"
_STAGE = f"COPY pg_temp.staged ({_COLUMNS}) FROM STDIN"
_INSERT_STAGED = f"""
INSERT INTO billing.rated_usage ({_COLUMNS}) SELECT {_COLUMNS} FROM pg_temp.staged
ON CONFLICT DO NOTHING RETURNING rated_partition, rated_offset
"""
# What was staged and is not there from this very message was there before it.
_CONFLICTS = """
SELECT staged.rated_partition, staged.rated_offset
FROM pg_temp.staged LEFT JOIN billing.rated_usage AS billed
    ON (billed.event_month, billed.identity, billed.charge, billed.cell, billed.entry)
        = (staged.event_month, staged.identity, staged.charge, staged.cell, staged.entry)
    AND (billed.rated_partition, billed.rated_offset) = (staged.rated_partition, staged.rated_offset)
WHERE billed.identity IS NULL
"""
#: Rows written to the server at a time: it parses one part while the next is made.
_COPY_ROWS = 1000


def _insert(connection: "Connection[Any]", rows: list[_OpenRow]) -> tuple[list[_OpenRow], list[RatedMessage]]:
    """Insert rows; return those that were inserted, and the messages whose row another one had billed.

    In neither list: what this very message had written before. Nearly always all of a batch are new, and one COPY says
    so; the unique key refuses it as a whole otherwise.
    """
    if not rows:
        return [], []
    try:
        with connection.transaction():
            _copy(connection, _COPY, rows)
    except UniqueViolation:
        _copy(connection, _STAGE, rows)
        inserted = set(connection.execute(_INSERT_STAGED, prepare=False).fetchall())
        conflicts = set(connection.execute(_CONFLICTS, prepare=False).fetchall())
        return (
            [pair for pair in rows if (pair[0].partition, pair[0].offset) in inserted],
            [message for message, _ in rows if (message.partition, message.offset) in conflicts],
        )
    return rows, []


def _copy(connection: "Connection[Any]", statement: str, rows: list[_OpenRow]) -> None:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for part in _as_text(rows):
            copy.write(part)


def _as_text(rows: list[_OpenRow]) -> Iterator[str]:
    """Rows in COPY's text format. An event's part is made once for its rows, which come one after another."""
    part: list[str] = []
    lines: dict[int, str] = {}
    last: Head | None = None
    event = ""
    for (partition, offset, row, _), line in rows:
        head, terms, entry, kind, quantity, before, after, amount, late = row
        if head is not last:
            last, event = head, (plain_text and plain_text(head)) or _text_of_event(head)
        if (line_text := lines.get(line.id)) is None:
            line_text = lines[line.id] = f"{line.id}\t{_escaped(terms.charge)}\t{_escaped(terms.cell)}"
        # 12e-9 is exact to PostgreSQL: a numeric is read digit by digit.
        part.append(
            f"{event}\t{line_text}\t{partition}\t{offset}\t{entry}\t{kind}\t{late}\t"
            f"{quantity}e-9\t{before}e-9\t{after}e-9\t{amount}e-12\n"
        )
        if len(part) == _COPY_ROWS:
            yield "".join(part)
            part.clear()
    yield "".join(part)


_to_json = JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _text_of_event(head: Head) -> str:
    at = to_datetime(head.timestamp_us).isoformat()
    appended_at = to_datetime(head.origin_appended_ms * 1000).isoformat()
    texts = (head.account, head.idempotency_key, head.event_type, head.subject, head.source, _to_json(head.properties))
    return (
        f"{at[:7]}-01\t{head.identity.hex()}\t{head.origin_offset}\t{head.sequence}\t{head.catalog_offset}\t"
        f"{at}\t{appended_at}\t{head.origin_partition}\t" + "\t".join(map(_escaped, texts))
    )


def _escaped(text: str) -> str:
    """Text as COPY reads it: backslash, tab and the line ends stand escaped."""
    if "\\" in text or not text.isprintable():
        return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return text


_ADD_TO_LINES = """
UPDATE billing.invoice_line AS line SET
    quantity = line.quantity + sums.quantity,
    amount = line.amount + sums.amount,
    events = line.events + sums.events,
    late_events = line.late_events + sums.late_events,
    first_event_at = least(line.first_event_at, sums.first_event_at),
    last_event_at = greatest(line.last_event_at, sums.last_event_at),
    updated_at = now()
FROM unnest(
    %s::bigint[], %s::numeric[], %s::numeric[], %s::bigint[], %s::bigint[], %s::timestamptz[], %s::timestamptz[]
) AS sums (line_id, quantity, amount, events, late_events, first_event_at, last_event_at)
WHERE line.id = sums.line_id
"""


#: What a row of a kind adds to the number of events on its line: one that was taken back no longer counts.
_EVENTS = {"usage": 1, "void": -1, "correction": 1}


def _add_to_lines(connection: "Connection[Any]", rows: list[_OpenRow]) -> None:
    """Add inserted rows to their lines: what they moved the quantity by, their amounts, how many events, and when."""
    if not rows:
        return
    # Per line: quantity in 1e-9, amount in 1e-12, events, late ones, first and last time in microseconds.
    sums: dict[int, list[int]] = {}
    for (_, _, row, _), line in rows:
        head, _, _, kind, _, before, after, amount, late = row
        quantity = after - before  # of a meter that is no sum, not what the event measured
        at_us = head.timestamp_us
        counts = _EVENTS[kind]
        if (of_line := sums.get(line.id)) is None:
            sums[line.id] = [quantity, amount, counts, late * counts, at_us, at_us]
            continue
        of_line[0] += quantity
        of_line[1] += amount
        of_line[2] += counts
        of_line[3] += late * counts
        if at_us < of_line[4]:
            of_line[4] = at_us
        elif at_us > of_line[5]:
            of_line[5] = at_us
    quantities, amounts, events, late_events, first_us, last_us = zip(*sums.values(), strict=True)
    columns: list[list[object]] = [
        list(sums),
        [f"{quantity}e-9" for quantity in quantities],  # exact to PostgreSQL, read digit by digit
        [f"{amount}e-12" for amount in amounts],
        list(events),
        list(late_events),
        [to_datetime(at_us) for at_us in first_us],
        [to_datetime(at_us) for at_us in last_us],
    ]
    # Planned anew each time: a plan kept from when the lines were few would scan them all.
    connection.execute(_ADD_TO_LINES, columns, prepare=False)
    merge_references(connection, ((line, message.row) for message, line in rows if line.references))


# -- quarantine

_QUARANTINE = """
INSERT INTO billing.quarantine (
    reason, rated_topic, rated_partition, rated_offset, account, identity, charge, value
)
SELECT * FROM unnest(
    %s::text[], %s::text[], %s::integer[], %s::bigint[], %s::text[], %s::uuid[], %s::text[], %s::bytea[]
)
ON CONFLICT DO NOTHING RETURNING reason
"""
_Refused: TypeAlias = tuple[str, str, int, int, str | None, UUID | None, str | None, bytes]


def _refused_row(reason: str, message: RatedMessage, topics: Topics) -> _Refused:
    head, terms = message.row.head, message.row.terms
    place = (reason, topics.rated, message.partition, message.offset)
    return (*place, head.account, UUID(bytes=head.identity), terms.charge, message.value)


def _refused(reason: str, topic: str, message: Poison | Receipt) -> _Refused:
    place = (reason, topic, message.partition, message.offset)
    return (*place, None, None, None, message.value)


def _quarantine(connection: "Connection[Any]", refused: list[_Refused]) -> Counter[str]:
    """Put messages aside, but for those that were before; return how many by reason."""
    if not refused:
        return Counter()
    columns = [list(column) for column in zip(*refused, strict=True)]
    return Counter(reason for (reason,) in connection.execute(_QUARANTINE, columns))
