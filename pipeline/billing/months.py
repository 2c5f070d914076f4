"""Month partitions of ``billing.rated_usage``, created on demand and ahead of need."""

from collections.abc import Collection
from datetime import date
from typing import Any

from psycopg import Connection
from psycopg.sql import SQL, Identifier, Literal

#: Key of the advisory lock under which partitions are created: two sinks that meet a new month take turns.
_LOCK = 0x7A11_0001


def ensure_months(connection: "Connection[Any]", months: Collection[date]) -> None:
    """Create the partitions that are missing, in a transaction of their own, and commit it.

    ``months`` are first days of months. A table is made beside the parent and then attached: that waits for no reader
    or writer of other months, where creating it as a partition would lock the parent against both.
    """
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        for month in sorted(months):
            name = f"rated_usage_{month:%Y_%m}"
            if connection.execute("SELECT to_regclass(%s)", [f"billing.{name}"]).fetchone() != (None,):
                continue
            table, following = Identifier("billing", name), next_month(month)
            connection.execute(SQL("CREATE TABLE {} (LIKE billing.rated_usage INCLUDING ALL)").format(table))
            connection.execute(
                SQL("ALTER TABLE billing.rated_usage ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
                    table, Literal(month), Literal(following)
                )
            )


def next_month(month: date) -> date:
    """First day of the month after."""
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)
