"""Receipts into PostgreSQL: what each rater transaction covered. Their sequence numbers go another way,
``pipeline.billing.sequences``.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

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
    "corrections",
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
