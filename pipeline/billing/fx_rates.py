"""Rates of exchange as they stand in PostgreSQL: loaded from files, never asked for live.

A rate that was loaded is never changed: a correction is a further revision, with a reason, and the last one counts.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.core.fx import Rate

#: Who publishes the rates that are taken unless another source is named.
ECB = "ECB"
#: Days before the day asked for that are read: banks have been closed for five in a row.
_DAYS_BACK = 14


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of the rates of a file: new, known already, or corrected; and the days they are of."""

    new: int
    unchanged: int
    corrected: int
    first_day: date
    last_day: date


@dataclass(frozen=True, slots=True)
class Differing:
    """A rate that was loaded before, and is another now."""

    currency: str
    day: date
    stored: Decimal
    given: Decimal


class RatesDiffer(Exception):
    """Rates that are loaded already with another value; nothing was written. A correction has to be asked for."""

    def __init__(self, differing: list[Differing]) -> None:
        one = differing[0]
        more = f" and {len(differing) - 1:,} more" * (len(differing) > 1)
        super().__init__(
            f"expected {one.stored} for {one.currency} on {one.day}, as loaded before, got {one.given}{more}"
        )
        self.differing = differing


_GIVEN = """
CREATE TEMPORARY TABLE given (day date NOT NULL, currency text NOT NULL, rate numeric NOT NULL)
"""
_COPY = "COPY given (day, currency, rate) FROM STDIN"
_STORED = """
SELECT given.*, newest.rate AS stored, coalesce(newest.revision, 0) AS revision FROM given
LEFT JOIN LATERAL (
    SELECT stored.rate, stored.revision FROM billing.fx_rate AS stored
    WHERE (stored.source, stored.base, stored.currency, stored.day) = (%(source)s, %(base)s, given.currency, given.day)
    ORDER BY stored.revision DESC LIMIT 1
) AS newest ON true
"""
_DIFFERING = f"SELECT currency, day, stored, rate FROM ({_STORED}) AS found WHERE rate <> stored ORDER BY day, currency"
_INSERT = f"""
INSERT INTO billing.fx_rate (source, base, currency, day, revision, rate, loaded_by, reason)
SELECT %(source)s, %(base)s, currency, day, revision + 1, rate, %(actor)s,
    CASE revision WHEN 0 THEN '' ELSE %(reason)s END
FROM ({_STORED}) AS found WHERE stored IS NULL OR rate <> stored
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, 'fx.load', %s, %s)"


def load(
    connection: "Connection[Any]",
    source: str,
    base: str,
    rates: Iterable[tuple[date, str, Decimal]],
    *,
    actor: str,
    reason: str = "",
    correct: bool = False,
) -> Loaded:
    """Store rates (day, currency, units of it for one of ``base``), all or none; what is there already changes nothing.

    ``correct`` with a ``reason`` adds a revision where the stored rate differs. Raises RatesDiffer without, and
    ValueError where there is no rate at all.
    """
    values = list(rates)
    if not values:
        raise ValueError("expected rates of exchange, got none")
    days = [day for day, _, _ in values]
    with connection.transaction():
        connection.execute(
            "SELECT billing.lock_invoicing()"
        )  # or two loads of one file would both take a revision for new
        connection.execute(_GIVEN)
        with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
            for value in values:
                copy.write_row(value)
        key = {"source": source, "base": base}
        differing = [Differing(*row) for row in connection.execute(_DIFFERING, key)]
        if differing and not correct:
            raise RatesDiffer(differing)
        written = connection.execute(_INSERT, key | {"actor": actor, "reason": reason}).rowcount
        loaded = Loaded(
            written - len(differing), len(values) - written, len(differing), first_day=min(days), last_day=max(days)
        )
        if written:
            detail = {"new": loaded.new, "corrected": loaded.corrected, "reason": reason}
            detail |= {"first_day": str(loaded.first_day), "last_day": str(loaded.last_day)}
            connection.execute(_AUDIT, [actor, f"{source}/{base}", Jsonb(detail)])
        connection.execute("DROP TABLE given")
    return loaded


_PUBLISHED = """
SELECT DISTINCT ON (base, currency, day) base, currency, rate, day, source FROM billing.fx_rate
WHERE source = %(source)s AND day BETWEEN %(day)s - %(back)s::integer AND %(day)s
    AND (%(currencies)s::text[] IS NULL OR currency = ANY(%(currencies)s) OR base = ANY(%(currencies)s))
    AND (%(until)s::timestamptz IS NULL OR loaded_at <= %(until)s)
ORDER BY base, currency, day, revision DESC
"""


def published(
    connection: "Connection[Any]",
    day: date,
    currencies: Collection[str] | None = None,
    *,
    source: str = ECB,
    loaded_until: datetime | None = None,
) -> list[Rate]:
    """The rates of these currencies, or of all, in the two weeks up to a day; as loaded until a time, or now.

    Made for ``core.fx.rate_on``, which picks the last one, or makes one of two.
    """
    asked = {
        "source": source,
        "day": day,
        "back": _DAYS_BACK,
        "currencies": None if currencies is None else sorted(currencies),
        "until": loaded_until,
    }
    return [Rate(*row) for row in connection.execute(_PUBLISHED, asked)]
