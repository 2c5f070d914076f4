"""Which sequence numbers of each source arrived, and what its producer says it sent: receipts and control totals into
PostgreSQL.

Arrived numbers are bit maps by block of 1,000. Blocks from the first on that are settled (every number arrived, or was
accepted as missing) are folded into one number of ``billing.source``, as soon as one is complete: what is stored and
looked at is what is open. Missing numbers are read from ``billing.sequence_gaps``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.receipts import Receipt
from pipeline.core.usage import SEQUENCE_BLOCK
from pipeline.infra.avro import Record


class ControlTotal(NamedTuple):
    """A ControlTotal as read; times as instants."""

    record: Record
    hour: datetime
    said_at: datetime


@dataclass(slots=True)
class _Arrival:
    """How far a source came, and between which commits."""

    highest: int = 0
    first_at: datetime | None = None
    last_at: datetime | None = None

    def add(self, highest: int, at: datetime) -> None:
        self.highest = max(self.highest, highest)
        self.first_at = at if self.first_at is None else min(self.first_at, at)
        self.last_at = at if self.last_at is None else max(self.last_at, at)


# Two sinks write the same sources: always in the order of their names. A source's row is the lock on all of it.
# Highest as it stood before becomes the mark, and the mark the older one, once the mark is a grace time behind: so one
# of the three tells what was there a grace time ago, also while numbers come without end.
_TOUCH_SOURCES = """
INSERT INTO billing.source AS stored (source, highest, first_at, last_at)
SELECT * FROM unnest(%(sources)s::text[], %(highest)s::bigint[], %(first)s::timestamptz[], %(last)s::timestamptz[])
    AS came (source, highest, first_at, last_at)
ORDER BY source
ON CONFLICT (source) DO UPDATE SET
    highest = greatest(stored.highest, EXCLUDED.highest),
    first_at = least(stored.first_at, EXCLUDED.first_at),
    last_at = greatest(stored.last_at, EXCLUDED.last_at),
    updated_at = CASE WHEN EXCLUDED.highest > 0 THEN now() ELSE stored.updated_at END,
    (mark, mark_at, older_mark, older_mark_at) = (
        SELECT CASE WHEN moves THEN stored.highest ELSE stored.mark END,
            CASE WHEN moves THEN stored.updated_at ELSE stored.mark_at END,
            CASE WHEN moves THEN stored.mark ELSE stored.older_mark END,
            CASE WHEN moves THEN stored.mark_at ELSE stored.older_mark_at END
        FROM (VALUES (stored.updated_at >= stored.mark_at + %(grace)s * interval '1 second')) AS one (moves)
    )
RETURNING source, settled_blocks
"""
_ADD_HOURS = """
INSERT INTO billing.source_hour (source, hour, began_at, highest)
SELECT came.source, came.hour, came.at, source.highest
FROM unnest(%s::text[], %s::timestamptz[], %s::timestamptz[]) AS came (source, hour, at)
JOIN billing.source USING (source)
ORDER BY came.source, came.hour
ON CONFLICT DO NOTHING RETURNING source
"""
_MERGE_BLOCKS = f"""
INSERT INTO billing.source_sequence AS stored (source, block, bits)
SELECT source, block, bits::bit({SEQUENCE_BLOCK}) FROM unnest(%s::text[], %s::bigint[], string_to_array(%s, ','))
    AS came (source, block, bits)
ORDER BY source, block
ON CONFLICT (source, block) DO UPDATE SET bits = stored.bits | EXCLUDED.bits, updated_at = now()
RETURNING source, bit_count(bits) >= CASE block WHEN 0 THEN {SEQUENCE_BLOCK - 1} ELSE {SEQUENCE_BLOCK} END
"""
_SETTLE = "SELECT billing.settle(source) FROM unnest(%s::text[]) AS source"
#: Kept as long as a record may wait on its topic.
_FORGET = """
WITH hours AS (
    DELETE FROM billing.source_hour WHERE source = ANY(%(sources)s) AND hour < now() - interval '37 days'
)
DELETE FROM billing.control_total AS total USING billing.source
WHERE total.source = ANY(%(sources)s) AND source.source = total.source
    AND total.hour < now() - interval '37 days' AND total.last_sequence < source.settled_blocks * 1000
"""
_SAY = """
INSERT INTO billing.control_total (
    source, hour, first_sequence, last_sequence, delivered, rejected, spooled, first_spooled, rejections, said_at
) VALUES (
    %(source)s, %(hour)s, %(first_sequence)s, %(last_sequence)s, %(delivered)s, %(rejected)s, %(spooled)s,
    %(first_spooled)s, %(rejections)s, %(said_at)s
)
ON CONFLICT (source, hour) DO UPDATE SET
    first_sequence = EXCLUDED.first_sequence, last_sequence = EXCLUDED.last_sequence, delivered = EXCLUDED.delivered,
    rejected = EXCLUDED.rejected, spooled = EXCLUDED.spooled, first_spooled = EXCLUDED.first_spooled,
    rejections = EXCLUDED.rejections, said_at = EXCLUDED.said_at, received_at = now()
"""
_CLOSE = """
UPDATE billing.source SET closed_at = said.closed_at FROM unnest(%s::text[], %s::timestamptz[])
    AS said (source, closed_at)
WHERE source.source = said.source AND source.closed_at IS DISTINCT FROM said.closed_at
"""


def write_sequences(
    connection: "Connection[Any]", receipts: Sequence[Receipt], totals: Sequence[ControlTotal], *, grace_s: float
) -> None:
    """OR the receipts' bit maps of arrived numbers into the stored ones, fold what is settled, and store what producers
    say of their hours.

    Receipts and totals come in the order of their logs: the last total of an hour counts. ``grace_s`` is the time after
    which a number that is not there counts as missing, seconds.
    """
    blocks: dict[tuple[str, int], int] = {}
    hours: dict[tuple[str, datetime], datetime] = {}  # and the first commit in it
    sources: dict[str, _Arrival] = {total.record["source"]: _Arrival() for total in totals}
    for receipt in receipts:
        at = receipt.committed_at
        hour = at.replace(minute=0, second=0, microsecond=0)
        for one in receipt.record["sequences"]:
            source, block, bits = one["source"], one["block"], int.from_bytes(one["bits"], "little")
            blocks[source, block] = blocks.get((source, block), 0) | bits
            highest = block * SEQUENCE_BLOCK + bits.bit_length() - 1
            sources.setdefault(source, _Arrival()).add(highest, at)
            hours[source, hour] = min(at, hours.get((source, hour), at))
    if sources:
        settled = _touch(connection, sources, grace_s)
        begun = _add_hours(connection, hours)
        _merge(connection, blocks, settled)
        _say(connection, totals)
        if begun:
            connection.execute(_FORGET, {"sources": sorted(begun)})


def _touch(connection: "Connection[Any]", sources: dict[str, _Arrival], grace_s: float) -> dict[str, int]:
    """Lock the sources and note how far they came; return their settled blocks."""
    moved = {
        "sources": list(sources),
        "highest": [arrival.highest for arrival in sources.values()],
        "first": [arrival.first_at for arrival in sources.values()],
        "last": [arrival.last_at for arrival in sources.values()],
        "grace": grace_s,
    }
    return dict(connection.execute(_TOUCH_SOURCES, moved).fetchall())


def _add_hours(connection: "Connection[Any]", hours: dict[tuple[str, datetime], datetime]) -> set[str]:
    """Note the hours in which something came; return the sources for which one is new."""
    if not hours:
        return set()
    columns: list[list[object]] = [[source for source, _ in hours], [hour for _, hour in hours], list(hours.values())]
    return {source for (source,) in connection.execute(_ADD_HOURS, columns)}


def _merge(connection: "Connection[Any]", blocks: dict[tuple[str, int], int], settled: dict[str, int]) -> None:
    # A repeat of a number that was folded away would begin its block anew.
    fresh = [(source, block) for source, block in blocks if block >= settled[source]]
    if fresh:
        columns: list[list[str] | list[int] | str] = [
            [source for source, _ in fresh],
            [block for _, block in fresh],
            ",".join(bit_text(blocks[place]) for place in fresh),  # an array would be searched for what to quote
        ]
        if complete := {source for source, full in connection.execute(_MERGE_BLOCKS, columns) if full}:
            connection.execute(_SETTLE, [sorted(complete)])


def _say(connection: "Connection[Any]", totals: Sequence[ControlTotal]) -> None:
    if not totals:
        return
    last = {(total.record["source"], total.hour): total for total in totals}
    with connection.cursor() as cursor:
        cursor.executemany(
            _SAY,
            [
                total.record
                | {"hour": total.hour, "said_at": total.said_at, "rejections": Jsonb(total.record["rejections"])}
                for total in last.values()
            ],
        )
    closed = {total.record["source"]: total.said_at if total.record["closed"] else None for total in totals}
    connection.execute(_CLOSE, [list(closed), list(closed.values())])


def bit_text(bits: int) -> str:
    """The bit map as PostgreSQL writes it: bit 0 first, 1,000 digits."""
    return f"{bits:0{SEQUENCE_BLOCK}b}"[::-1]
