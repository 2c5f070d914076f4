"""The usage behind an account's period, as a closing price takes it: each event once, in the order of its time.

Read from the rated rows: of an event's entries the last one says what it is now. A voided event is no usage; a
corrected one is what its correction says. Of the properties only those are read that a price looks at: an event may
have many, and taking them out of their JSON costs more than pricing it.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from psycopg import Connection

from pipeline.core.money import Micros
from pipeline.core.periods import Period, to_datetime
from pipeline.core.rerating import Use

#: Events fetched from the server at a time, about 300 bytes each. So many at most are asked for without a cursor.
_FETCH_EVENTS = 5_000

# Ordered by bytes, as the core orders text. One row of the last entry stands for all of them: they hold the same event.
_EVENTS = """
SELECT event_type, (extract(epoch FROM event_time) * 1000000)::bigint, idempotency_key, subject{properties} FROM (
    SELECT DISTINCT ON (usage.identity)
        usage.event_type, usage.event_time, usage.idempotency_key, usage.subject, usage.kind, usage.properties
    FROM billing.invoice
    JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    JOIN billing.rated_usage AS usage ON usage.line_id = line.id
    WHERE {which}
    ORDER BY usage.identity, usage.entry DESC
) AS event
WHERE kind <> 'void' ORDER BY event_time, idempotency_key COLLATE "C"
"""
_USES = "invoice.account = %(account)s AND invoice.period_start = %(start)s AND invoice.period_end = %(end)s"
_EARLIER = """invoice.account = %(account)s AND invoice.period_start < %(before)s
    AND usage.event_type = ANY(%(types)s) AND usage.event_time < %(before)s"""


def read_uses(
    connection: "Connection[Any]", account: str, period: Period, names: Collection[str], *, rows: int | None = None
) -> Iterator[Use]:
    """The events on the account's invoices of the period that still count, by time and key, with these properties.

    Streamed from the server within the connection's transaction: memory does not grow with the number of events.
    ``rows`` is how many rated rows there are, where that is known: few are asked for in a way that costs less.
    """
    bounds = {"start": to_datetime(period.start_us), "end": to_datetime(period.end_us)}
    return _read(connection, _USES, {"account": account, **bounds}, names, rows)


def read_earlier(
    connection: "Connection[Any]", account: str, before_us: Micros, event_types: Collection[str], names: Collection[str]
) -> Iterator[Use]:
    """The account's events of these types before an instant, whichever period they are of, likewise."""
    wanted = {"account": account, "before": to_datetime(before_us), "types": sorted(event_types)}
    return _read(connection, _EARLIER, wanted, names, None)


def _read(
    connection: "Connection[Any]", which: str, parameters: dict[str, Any], names: Collection[str], rows: int | None
) -> Iterator[Use]:
    ordered = sorted(names)
    columns = "".join(f", properties ->> %(name_{n})s" for n in range(len(ordered)))
    statement = _EVENTS.format(which=which, properties=columns)
    wanted = parameters | {f"name_{n}": name for n, name in enumerate(ordered)}
    keys = [name.encode() for name in ordered]
    if rows is not None and rows <= _FETCH_EVENTS:
        # The same statement for many accounts is planned once for all of them; one with a cursor, for each anew.
        with connection.cursor(binary=True) as cursor:
            yield from _made(cursor.execute(statement, wanted), keys)
    else:
        with connection.cursor("uses") as streamed:
            streamed.itersize = _FETCH_EVENTS
            yield from _made(streamed.execute(statement, wanted, binary=True), keys)


def _made(found: Iterable[tuple[Any, ...]], keys: Sequence[bytes]) -> Iterator[Use]:
    for event_type, at_us, key, subject, *texts in found:
        properties = {name: text.encode() for name, text in zip(keys, texts, strict=True) if text is not None}
        yield Use(event_type, at_us, key, subject, properties)
