"""Month partitions of ``billing.rated_usage``, created on demand and ahead of need."""

from collections.abc import Collection
from datetime import date
from typing import Any

from psycopg import Connection

_ENSURE = "SELECT billing.ensure_month(month) FROM unnest(%s::date[]) AS month ORDER BY month"


def ensure_months(connection: "Connection[Any]", months: Collection[date]) -> None:
    """Create the partitions that are missing, in a transaction of their own, and commit it.

    ``months`` are first days of months.
    """
    with connection.transaction():
        connection.execute(_ENSURE, [sorted(months)])


def next_month(month: date) -> date:
    """First day of the month after."""
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)
