"""Receipts into PostgreSQL: what each rater transaction covered, and which sequence numbers arrived."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

from pipeline.core.usage import SEQUENCE_BLOCK
from pipeline.infra.avro import Record


class Receipt(NamedTuple):
    """A BatchReceipt as read, where it stood, and when it was committed there."""

    topic: str
    partition: int
    offset: int
    value: bytes
    record: Record
    committed_at: datetime


_KEY = ("topic", "partition", "first_offset")
_REST = (
    "next_offset",
    "catalog_offset",
    "records",
    "rated",
    "duplicates",
    "parked",
    "dead_lettered",
    "rated_rows",
    "latest_event_at",
    "worker",
    "generation",
    "committed_at",
)
_INSERT = f"""
INSERT INTO billing.receipt ({", ".join((*_KEY, *_REST))})
VALUES ({", ".join(f"%({name})s" for name in (*_KEY, *_REST))})
ON CONFLICT DO NOTHING RETURNING first_offset
"""
# The very message, read again after a position was set back: no second transaction of that worker and generation could
# begin at the same offset in the same millisecond.

_SAME = f"""
SELECT 1 FROM billing.receipt
WHERE {" AND ".join(f"{name} = %({name})s" for name in _KEY)}
    AND {" AND ".join(f"{name} IS NOT DISTINCT FROM %({name})s" for name in _REST)}
"""

# Sources spread over all partitions, so two sinks write the same blocks: always in key order.
_MERGE_SEQUENCES = """
INSERT INTO billing.source_sequence AS stored (source, block, bits) VALUES (%s, %s, %s::bit(1000))
ON CONFLICT (source, block) DO UPDATE SET bits = stored.bits | EXCLUDED.bits, updated_at = now()
"""


def write_receipts(connection: "Connection[Any]", receipts: Iterable[Receipt]) -> list[Receipt]:
    """Insert receipts; return those whose first offset another receipt had already covered, which are left out.

    A message that is written already, and read again because a position was set back, is no other receipt.
    """
    repeated = []
    with connection.cursor() as cursor:
        for receipt in receipts:
            values = receipt.record | {"committed_at": receipt.committed_at}
            if cursor.execute(_INSERT, values).fetchone() is None and cursor.execute(_SAME, values).fetchone() is None:
                repeated.append(receipt)
    return repeated


def write_sequences(connection: "Connection[Any]", receipts: Iterable[Receipt]) -> None:
    """OR the receipts' bit maps of arrived sequence numbers into the stored ones."""
    blocks: dict[tuple[str, int], int] = {}
    for receipt in receipts:
        for one in receipt.record["sequences"]:
            key = (one["source"], one["block"])
            blocks[key] = blocks.get(key, 0) | int.from_bytes(one["bits"], "little")
    if blocks:
        with connection.cursor() as cursor:
            cursor.executemany(_MERGE_SEQUENCES, [(*key, bit_text(blocks[key])) for key in sorted(blocks)])


def bit_text(bits: int) -> str:
    """The bit map as PostgreSQL writes it: bit 0 first, 1,000 digits."""
    return f"{bits:0{SEQUENCE_BLOCK}b}"[::-1]
