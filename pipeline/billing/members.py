"""The usage behind an account's period, as a closing price takes it: each event once, in the order of its time.

Read from the rated rows: of an event's entries the last one says what it is now. A voided event is no usage; a
corrected one is what its correction says.
"""

from collections.abc import Collection, Iterator
from typing import Any

from psycopg import Connection

from pipeline.core.periods import Period, to_datetime, to_micros
from pipeline.core.rerating import Use

#: Events fetched from the server at a time, about 1 KB each.
_FETCH_EVENTS = 5_000

# Ordered by bytes, as the core orders text. One row of the last entry stands for all of them: they hold the same event.
_EVENTS = """
SELECT event_type, event_time, idempotency_key, subject, properties FROM (
    SELECT DISTINCT ON (usage.identity) usage.*
    FROM billing.invoice
    JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    JOIN billing.rated_usage AS usage ON usage.line_id = line.id
    WHERE {which}
    ORDER BY usage.identity, usage.entry DESC
) AS event
WHERE kind <> 'void' ORDER BY event_time, idempotency_key COLLATE "C"
"""
_USES = _EVENTS.format(
    which="invoice.account = %(account)s AND invoice.period_start = %(start)s AND invoice.period_end = %(end)s"
)
_EARLIER = _EVENTS.format(
    which="invoice.account = %(account)s AND invoice.period_end <= %(start)s AND usage.event_type = ANY(%(types)s)"
)


def read_uses(connection: "Connection[Any]", account: str, period: Period) -> Iterator[Use]:
    """The events on the account's invoices of the period that still count, by time and key.

    Streamed from the server within the connection's transaction: memory does not grow with the number of events.
    """
    bounds = {"start": to_datetime(period.start_us), "end": to_datetime(period.end_us)}
    return _read(connection, _USES, {"account": account, **bounds})


def read_earlier(
    connection: "Connection[Any]", account: str, period: Period, event_types: Collection[str]
) -> Iterator[Use]:
    """The account's events of these types from all periods before this one, likewise."""
    wanted = {"account": account, "start": to_datetime(period.start_us), "types": sorted(event_types)}
    return _read(connection, _EARLIER, wanted)


def _read(connection: "Connection[Any]", statement: str, parameters: dict[str, Any]) -> Iterator[Use]:
    with connection.cursor("uses") as cursor:
        cursor.itersize = _FETCH_EVENTS
        cursor.execute(statement, parameters)
        for event_type, event_time, key, subject, properties in cursor:
            encoded = {name.encode(): value.encode() for name, value in properties.items()}
            yield Use(event_type, to_micros(event_time), key, subject, encoded)
