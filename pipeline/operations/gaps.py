"""Usage that may be missing, as PostgreSQL tells: holes in sequence numbers, control totals, silent sources; and a
person's word on a hole.

The arithmetic stands beside the tables (``schemas/postgres/0003.gaps.sql``), since finance reads it as a view, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from pipeline.core.gaps import Cause, Gap, HourTotal, Silence, Verdict, numbers

#: Gaps that are explained in a look before the rest is only counted.
EXPLAINED_MAX = 20
#: A source is silent after this many times the silence that is usual for it.
SILENT_AFTER = 2
#: Hours with arrivals a source must have had before it is judged.
HISTORY_HOURS_MIN = 12
#: Hours with arrivals that its rhythm is made of, the newest.
_HISTORY_HOURS_MAX = 200
#: A source from which nothing came for longer is no longer warned of.
_FORGOTTEN_AFTER = timedelta(days=28)
#: Rhythms are known by the hour.
_RESOLUTION = timedelta(hours=1)


class Run(NamedTuple):
    """Sequence numbers from first to last, both inclusive."""

    first: int
    last: int

    def __str__(self) -> str:
        return numbers(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Open holes: how many runs of how many numbers in how many sources, the first of them explained."""

    runs: int
    missing: int
    sources: int
    explained: list[Gap]


class AcceptedGap(NamedTuple):
    """What a person decided about missing numbers."""

    source: str
    first: int
    last: int
    verdict: Verdict
    reason: str
    actor: str
    at: datetime


class NotMissing(Exception):
    """Numbers that are no open hole cannot be accepted as missing."""


_OPEN_GAPS = """
WITH gaps AS MATERIALIZED (
    SELECT * FROM billing.sequence_gaps(%(grace)s * interval '1 second')
    WHERE %(source)s::text IS NULL OR source = %(source)s
), explained AS (
    SELECT * FROM gaps ORDER BY source, first_missing LIMIT %(limit)s
)
SELECT whole.*, explained.*, facts.*,
    billing.likely_cause(rejected_because, spooled, confirmed, newer_source) AS likely_cause
FROM (
    SELECT count(*) AS runs, sum(last_missing - first_missing + 1) AS missing,
        count(DISTINCT source) AS sources FROM gaps
) AS whole
CROSS JOIN explained CROSS JOIN LATERAL billing.gap_facts(source, first_missing, last_missing) AS facts
ORDER BY source, first_missing
"""


def open_gaps(
    connection: "Connection[Any]", *, grace_s: float, source: str | None = None, limit: int = EXPLAINED_MAX
) -> Gaps:
    """Holes that are older than ``grace_s`` seconds, of all sources or of one."""
    runs, missing, sources, explained = 0, 0, 0, []
    with connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(_OPEN_GAPS, {"grace": grace_s, "source": source, "limit": limit}):
            runs, missing, sources = row.pop("runs"), int(row.pop("missing")), row.pop("sources")
            explained.append(Gap(**row | {"likely_cause": Cause(row["likely_cause"])}))
    return Gaps(runs, missing, sources, explained)


_ACCEPTED = """
SELECT source, first_sequence, last_sequence, verdict, reason, actor, at FROM billing.accepted_gap
WHERE %(source)s::text IS NULL OR source = %(source)s ORDER BY id DESC LIMIT %(limit)s
"""


def accepted_gaps(connection: "Connection[Any]", *, source: str | None, limit: int) -> list[AcceptedGap]:
    """What persons decided, the newest first."""
    rows = connection.execute(_ACCEPTED, {"source": source, "limit": limit})
    return [
        AcceptedGap(name, first, last, Verdict(verdict), *rest) for name, first, last, verdict, *rest in rows.fetchall()
    ]


_LOCK = "SELECT 1 FROM billing.source WHERE source = %s FOR UPDATE"
_MISSING_NOW = """
SELECT first_missing, last_missing FROM billing.sequence_gaps(interval '0') WHERE source = %s ORDER BY first_missing
"""
_ACCEPT = """
INSERT INTO billing.accepted_gap (source, first_sequence, last_sequence, verdict, reason, actor)
VALUES (%s, %s, %s, %s, %s, %s)
"""
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, 'accept gap', %s, %s)"


def accept(
    connection: "Connection[Any]",
    source: str,
    runs: Sequence[Run] | None,
    *,
    verdict: Verdict,
    reason: str,
    actor: str,
    dry_run: bool = False,
) -> list[Run]:
    """Record that numbers are missing for good: they are no hole from now on; should they come, they are billed.

    ``runs`` None means all that are missing now, the youngest included. One transaction: all or, when one of the
    numbers arrived or lies beyond what the source sent (NotMissing), nothing. Returns the runs accepted.
    """
    with connection.transaction():
        connection.execute(_LOCK, [source])
        missing = [Run(*row) for row in connection.execute(_MISSING_NOW, [source])]
        for run in runs or ():
            if not any(gap.first <= run.first <= run.last <= gap.last for gap in missing):
                near = [gap for gap in missing if gap.first <= run.last and run.first <= gap.last] or missing
                those = ", ".join(map(str, near[:EXPLAINED_MAX])) or "none"
                raise NotMissing(f"expected numbers of {source} that are missing ({those}), got {run}")
        accepted = missing if runs is None else list(runs)
        if dry_run:
            return accepted
        for run in accepted:
            connection.execute(_ACCEPT, [source, *run, verdict.value, reason, actor])
            detail = {"verdict": verdict.value, "reason": reason, "first": run.first, "last": run.last}
            connection.execute(_AUDIT, [actor, f"{source}#{run}", Jsonb(detail)])
        connection.execute("SELECT billing.settle(%s)", [source])
    return accepted


_SHORT = """
SELECT * FROM billing.short_hours(%s * interval '1 second') ORDER BY hour DESC, source LIMIT %s
"""


def short_hours(connection: "Connection[Any]", *, grace_s: float) -> list[HourTotal]:
    """Hours of which less arrived than their producer says it emitted, the newest first."""
    with connection.cursor(row_factory=class_row(HourTotal)) as cursor:
        return cursor.execute(_SHORT, [grace_s, EXPLAINED_MAX]).fetchall()


_LAST_ARRIVAL = "SELECT max(last_at) FROM billing.source"
_SILENT = """
WITH quiet AS (
    SELECT source, last_at FROM billing.source AS this
    WHERE closed_at IS NULL AND last_at <= %(now)s - %(after)s * %(resolution)s AND last_at > %(now)s - %(forgotten)s
        AND NOT EXISTS (
            SELECT FROM billing.source AS another
            WHERE another.name = this.name AND another.source <> this.source AND another.first_at > this.last_at
        )
), silences AS (
    SELECT source, hour - lag(hour) OVER (PARTITION BY source ORDER BY hour) AS silence
    FROM quiet CROSS JOIN LATERAL (
        SELECT hour FROM billing.source_hour AS came
        WHERE came.source = quiet.source ORDER BY hour DESC LIMIT %(history)s
    ) AS hours
), weighed AS (
    SELECT source, silence, count(*) OVER whole AS silences, sum(silence) OVER whole AS whole,
        sum(silence) OVER (PARTITION BY source ORDER BY silence ROWS UNBOUNDED PRECEDING) AS shorter
    FROM silences WHERE silence IS NOT NULL WINDOW whole AS (PARTITION BY source)
), usual AS (
    SELECT source, min(silence) AS silence FROM weighed
    WHERE silences >= %(least)s - 1 AND shorter >= whole * 0.9 GROUP BY source
)
SELECT quiet.source, last_at, extract(epoch FROM usual.silence)::bigint,
    extract(epoch FROM %(now)s - last_at)::bigint
FROM quiet JOIN usual USING (source)
WHERE %(now)s - last_at > %(after)s * usual.silence ORDER BY last_at
"""


def silent_sources(connection: "Connection[Any]", now: datetime, *, caught_up: bool) -> list[Silence]:
    """Sources that fell silent against their own history, longest silent first.

    The usual silence of a source is the one that nine tenths of its time lie in no longer than: of the silences between
    hours with arrivals (an hour at least), taken from the shortest up, the first with which 90 % of the time is
    covered. So a source of office hours has its weekend as its usual silence, one without pause an hour, and an outage
    that took less than a tenth of the time counts for nothing. Twice that is suspicious: for arrivals at random,
    silences that long come once in some 2,500. Judged by up to 200 hours with arrivals, not before 12, and not beyond
    28 days.

    Not silent are sources whose producer closed with everything delivered, and those whose service began anew under
    another epoch since. While workers are behind, time is the last arrival's: what they have not rated is not silence.
    """
    if not caught_up:
        row = connection.execute(_LAST_ARRIVAL).fetchone()
        now = (row and row[0]) or now
    asked = {
        "now": now,
        "after": SILENT_AFTER,
        "resolution": _RESOLUTION,
        "forgotten": _FORGOTTEN_AFTER,
        "history": _HISTORY_HOURS_MAX,
        "least": HISTORY_HOURS_MIN,
    }
    return [Silence(*row) for row in connection.execute(_SILENT, asked)]
