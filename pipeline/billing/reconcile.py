"""Law 8, closed accounting: every event that arrived is in exactly one state, and every rated row is in the money.

Each check holds two numbers from different hands against each other:

- what arrived on ``usage.events`` and how far the logs reach is the broker's word (``pipeline.billing.broker``);
- what became of it are the rater's receipts and letters, as the sink wrote them;
- what was billed are the rows and lines in PostgreSQL;
- what it should cost and by which version are the published prices in PostgreSQL.

Arrivals are counted up to where the receipts reach. What stands beyond was not rated yet, and what was rated but not
written yet is not billed: that is lag and no difference.
"""

import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import psycopg
from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing.broker import Log, Run, count_records, logs
from pipeline.billing.intake import Place
from pipeline.billing.prices import LinePrice, NoPrice, Priced, Prices
from pipeline.billing.rerate import missing_entries
from pipeline.core.cells import cell_values
from pipeline.core.charges import compile_price
from pipeline.core.gaps import Cause, Gap, because, when
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, amount_decimal, plain, scaled
from pipeline.core.periods import Period, format_instant, to_datetime, to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

#: Places named in a detail before "and n more".
_NAMED_MAX = 5
#: Offsets of transactional producers that are read to count their records, the newest; some 10 seconds.
COUNTED_MAX = 1_000_000
#: Sums of amounts have more digits than the default context keeps.
_EXACT = Context(prec=200, traps=[Inexact, InvalidOperation])
#: Names of the checks that look at all times; the gate of a close looks at a month itself.
QUARANTINED = "messages quarantined = none"
SEQUENCES = "sequence numbers sent = arrived"
CONTROL_TOTALS = "events by control totals = arrived"
#: Time between two looks while waiting for lag to go, seconds.
_LOOK_EVERY_S = 0.5
#: Counters fetched from the server at a time.
_FETCH_COUNTERS = 5_000


@dataclass(frozen=True, slots=True)
class Check:
    """Two numbers that must be equal, counted independently; the detail says what they are made of, or where not."""

    name: str
    left: Decimal
    right: Decimal
    detail: str

    @property
    def difference(self) -> Decimal:
        return _EXACT.subtract(self.left, self.right)


@dataclass(frozen=True, slots=True)
class Lag:
    """Offsets of a topic that a stage has not come to; at most this many records, since markers take offsets too."""

    topic: str
    stage: str
    offsets: int


@dataclass(frozen=True, slots=True)
class Estimated:
    """A period that was re-rated and has moved on since: its lines are estimates until the close, or the next time.

    No difference: rows and entries are all on their lines. But prices were moved between lines, where the rater cannot
    follow: later usage is counted from where the rows stand, and a void takes an event from the line it was rated on.
    """

    account: str
    #: The month to re-rate, YYYY-MM.
    month: str
    #: Lines that do not stand at their closing price.
    lines: int

    @property
    def command(self) -> str:
        return f"tally rerate --period {self.month} --account {shlex.quote(self.account)}"


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """All checks, how far the stages are behind, and what waits for the close to price it."""

    checks: tuple[Check, ...]
    lags: tuple[Lag, ...]
    estimated: tuple[Estimated, ...] = ()

    @property
    def reconciled(self) -> bool:
        """No check shows a difference."""
        return all(check.difference == 0 for check in self.checks)

    @property
    def lag(self) -> int:
        """Offsets that stages have not come to, over all topics."""
        return sum(lag.offsets for lag in self.lags)


def reconcile(
    settings: Settings, *, wait_s: float = 0.0, grace_s: float = 0.0, unissued_until: datetime | None = None
) -> Reconciliation:
    """Check everything that must add up, as of now.

    ``unissued_until``: of money look only at billing periods that end by then, an aware time, and of which something
    is not issued yet: what a close may bill. Events, offsets and rows are counted over all times all the same; nobody
    looks for estimates.

    Waits up to ``wait_s`` for lag to go. Sequence numbers count as missing when a higher one had arrived, or their
    producer had said it emitted them, ``grace_s`` seconds ago; until then they may be on their way. Raises
    KafkaException or psycopg.OperationalError when the broker or the database does not answer.
    """
    until = time.monotonic() + wait_s
    while True:
        with connect(settings.dsn, application="reconcile") as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one moment for all statements
            connection.read_only = True
            found = _logs(settings, connection)
            lags = _lags(Topics(settings.topic_prefix), found)
            if not any(lag.offsets for lag in lags) or time.monotonic() >= until:
                if unissued_until is None:
                    checks = tuple(_checks(settings, connection, found, grace_s, _ALL))
                    return Reconciliation(checks, lags, tuple(_estimated(connection)))
                scope = _unissued(connection, unissued_until)
                return Reconciliation(tuple(_checks(settings, connection, found, grace_s, scope)), lags)
        time.sleep(_LOOK_EVERY_S)


class _Scope(NamedTuple):
    """Whose money is added up: lines, and rows and close entries among which theirs are, as SQL that follows FROM."""

    lines: str
    rows: str
    entries: str
    parameters: dict[str, Any]

    def fill(self, statement: str) -> str:
        return statement.format(lines=self.lines, rows=self.rows, entries=self.entries)


_ALL = _Scope("billing.invoice_line", "billing.rated_usage", "billing.close_entry", {})
# All containers of a period: a counter's lines may be in one that is issued and in the supplement of what came late.
_UNISSUED_CONTAINERS = """
SELECT container.id, container.period_start, container.period_end FROM billing.invoice AS container
JOIN (
    SELECT DISTINCT account, period_start, period_end FROM billing.invoice
    WHERE state IN ('open', 'draft', 'reviewed') AND period_end <= %(until)s
) AS unissued USING (account, period_start, period_end)
"""
# Usage of a period has its time within it, and rows are partitioned by the month of their time.
_MONTHS = f"""
SELECT DISTINCT month::date FROM (SELECT DISTINCT period_start, period_end FROM ({_UNISSUED_CONTAINERS}) AS container)
    AS period,
    generate_series(date_trunc('month', period_start), period_end - interval '1 microsecond', '1 month') AS month
"""


def _unissued(connection: "Connection[Any]", until: datetime) -> _Scope:
    months = [month for (month,) in connection.execute(_MONTHS, {"until": until})]
    lines = f"""(
        SELECT line.* FROM billing.invoice_line AS line
        JOIN ({_UNISSUED_CONTAINERS}) AS container ON container.id = line.invoice_id
    )"""
    return _Scope(
        lines,
        "(SELECT * FROM billing.rated_usage WHERE event_month = ANY(%(months)s))",
        f"(SELECT entry.* FROM billing.close_entry AS entry JOIN {lines} AS line ON line.id = entry.line_id)",
        {"until": until, "months": months},
    )


def _checks(
    settings: Settings, connection: "Connection[Any]", found: Mapping[Place, Log], grace_s: float, scope: _Scope
) -> Iterable[Check]:
    topics = Topics(settings.topic_prefix)
    yield _arrivals(settings, connection, found)
    events = _coverage(connection, topics.events, found)
    yield events
    yield _coverage(connection, topics.retry, found)
    yield _outcomes(connection)
    yield _resolved(connection, topics)
    yield _corrected(connection)
    yield _rows(connection, topics)
    yield _quarantined(connection)
    yield _lines(connection, scope)
    yield from _amounts(connection, scope)
    yield from _counters(connection, scope)
    yield _versions(connection, scope)
    yield _sequences(connection, grace_s, deleted=bool(events.difference))
    yield _control_totals(connection, grace_s)


# -- events

_REACHED = "SELECT partition, max(next_offset) FROM billing.receipt WHERE topic = %s GROUP BY partition"
_STATES = """
WITH events AS (SELECT state FROM billing.unrated_event WHERE origin_topic = %(topic)s)
SELECT coalesce(sum(rated), 0) + (SELECT count(*) FROM events WHERE state = 'rated'),
    coalesce(sum(duplicates), 0) + (SELECT count(*) FROM events WHERE state = 'duplicate'),
    (SELECT count(*) FROM events WHERE state = 'parked'),
    (SELECT count(*) FROM events WHERE state = 'dead_lettered')
FROM billing.receipt WHERE topic = %(topic)s
"""
# Receipts that tell of fewer records than offsets: a transactional producer was at work, or they are wrong.
_UNEVEN = """
SELECT partition, first_offset, next_offset, records FROM billing.receipt
WHERE topic = %s AND records <> next_offset - first_offset ORDER BY committed_at DESC, partition, first_offset DESC
"""


def _arrivals(settings: Settings, connection: "Connection[Any]", found: Mapping[Place, Log]) -> Check:
    """Records on usage.events up to where the receipts reach, against the states of events.

    The broker gives every record one offset, so offsets are records, but for what transactions leave behind: markers
    and aborted records. Where a receipt tells of such, the broker's records are read and counted, the newest
    ``COUNTED_MAX`` offsets of them; for older ones, and where retention has taken them, its word stands.
    """
    topic = Topics(settings.topic_prefix).events
    arrived = sum(
        min(reached, found.get((topic, partition), Log(0, 0)).end)
        for partition, reached in connection.execute(_REACHED, [topic])
    )
    told: dict[Run, int] = {}
    offsets, unchecked = 0, 0
    for partition, first, following, records in connection.execute(_UNEVEN, [topic]):
        log = found.get((topic, partition), Log(0, 0))
        if log.start <= first and following <= log.end and offsets + following - first <= COUNTED_MAX:
            told[Run(partition, first, following)] = records
            offsets += following - first
        else:
            unchecked += records
            arrived -= following - first - records
    places = []
    for run, counted in count_records(settings, topic, told).items():
        arrived -= run.following - run.first - counted
        if counted != told[run]:
            place = f"partition {run.partition} offsets {run.first} to {run.following - 1}"
            places.append(f"{place} hold {counted} records, their receipt says {told[run]}")
    rated, duplicates, parked, dead = _one(connection, _STATES, {"topic": topic})
    detail = [f"rated {rated:,} + duplicates {duplicates:,} + parked {parked:,} + dead-lettered {dead:,}"]
    if offsets:
        detail.append(f"{offsets:,} offsets of transactions counted at the broker")
    if unchecked:
        detail.append(f"{unchecked:,} records in transactions by receipts alone")
    if places:
        detail.append(_list(places, ""))
    total = rated + duplicates + parked + dead
    return Check("events arrived = in a state", Decimal(arrived), Decimal(total), "; ".join(detail))


# Sweep over each partition's receipts in order: how far they reach before a receipt, and whether it begins there.
_UNCOVERED = """
WITH swept AS (
    SELECT partition, first_offset, next_offset, coalesce(max(next_offset) OVER (
        PARTITION BY partition ORDER BY first_offset, next_offset ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ), 0) AS reached
    FROM billing.receipt WHERE topic = %s
)
SELECT partition, reached, first_offset, least(next_offset, reached) FROM swept
WHERE first_offset <> reached ORDER BY partition, first_offset
"""


def _coverage(connection: "Connection[Any]", topic: str, found: Mapping[Place, Log]) -> Check:
    """Each offset up to where receipts reach has one receipt, and that is where the broker's log has been read to.

    Past it the log holds records the rater has yet to read (lag), or nothing but markers. A log that begins later has
    lost records nobody rated; one that ends sooner is not the log that was rated.
    """
    reached: dict[int, int] = dict(connection.execute(_REACHED, [topic]).fetchall())
    offsets, wrong, places = sum(reached.values()), 0, []
    for partition, before, first, overlap_end in connection.execute(_UNCOVERED, [topic]):
        if first > before:
            wrong += first - before
            places.append(f"no receipt for partition {partition} offsets {before} to {first - 1}")
        else:
            wrong += overlap_end - first
            places.append(f"two receipts for partition {partition} offsets {first} to {overlap_end - 1}")
    partitions = reached.keys() | {partition for name, partition in found if name == topic}
    for partition in sorted(partitions):
        end, log = reached.get(partition, 0), found.get((topic, partition), Log(0, 0))
        if log.start > end:
            offsets += log.start - end
            wrong += log.start - end
            places.append(f"partition {partition} offsets {end} to {log.start - 1} were deleted before they were rated")
        if log.end < end:
            wrong += end - log.end
            places.append(
                f"partition {partition} ends at {log.end}, but was rated up to {end}: it was recreated or lost its tail"
            )
    return Check(
        f"offsets of {topic} = with one receipt", Decimal(offsets), Decimal(offsets - wrong), _list(places, "all")
    )


_OUTCOMES = """
SELECT topic, partition, first_offset, records, rated + duplicates + parked + dead_lettered + corrections
FROM billing.receipt WHERE records <> rated + duplicates + parked + dead_lettered + corrections ORDER BY 1, 2, 3
"""
_RECORDS = "SELECT coalesce(sum(records), 0) FROM billing.receipt"


def _outcomes(connection: "Connection[Any]") -> Check:
    (records,) = _one(connection, _RECORDS)
    wrong, places = 0, []
    for topic, partition, first, had, outcomes in connection.execute(_OUTCOMES):
        wrong += abs(had - outcomes)
        places.append(f"{topic} {partition} from {first}: {had} records, {outcomes} outcomes")
    return Check(
        "records in receipts = with one outcome", Decimal(records), Decimal(records - wrong), _list(places, "all")
    )


_RESOLVED = """
SELECT (SELECT coalesce(sum(rated), 0) FROM billing.receipt WHERE topic = %(retry)s),
    (SELECT count(*) FROM billing.unrated_event WHERE state = 'rated' AND origin_topic = %(events)s)
"""


def _resolved(connection: "Connection[Any]", topics: Topics) -> Check:
    receipts, events = _one(connection, _RESOLVED, {"retry": topics.retry, "events": topics.events})
    return Check(
        "rated on retry = events resolved", Decimal(receipts), Decimal(events), "once parked or replayed, now rated"
    )


_CORRECTIONS = """
SELECT (SELECT coalesce(sum(corrections), 0) FROM billing.receipt),
    count(*) FILTER (WHERE state IN ('applied', 'quarantined')), count(*) FILTER (WHERE state = 'applied'),
    count(*) FILTER (WHERE state IN ('unsent', 'sent')), count(*) FILTER (WHERE state = 'refused')
FROM billing.correction_state
"""


def _corrected(connection: "Connection[Any]") -> Check:
    """Corrections that raters applied, against those that persons decided and that have their rows."""
    receipts, there, applied, on_their_way, refused = _one(connection, _CORRECTIONS)
    detail = f"applied {applied:,}; on their way {on_their_way:,}, refused {refused:,}"
    return Check("corrections in receipts = with their rows", Decimal(receipts), Decimal(there), detail)


_ROWS = """
SELECT (SELECT coalesce(sum(rated_rows), 0) FROM billing.receipt), (SELECT count(*) FROM billing.rated_usage),
    (SELECT count(*) FROM billing.quarantine WHERE rated_topic = %s)
"""


def _rows(connection: "Connection[Any]", topics: Topics) -> Check:
    receipts, billed, quarantined = _one(connection, _ROWS, [topics.rated])
    return Check(
        "rated rows in receipts = in PostgreSQL",
        Decimal(receipts),
        Decimal(billed + quarantined),
        f"billed {billed:,} + quarantined {quarantined:,}",
    )


_QUARANTINED = "SELECT reason, count(*) FROM billing.quarantine GROUP BY reason ORDER BY reason"
_QUARANTINED_AT = f"""
SELECT rated_topic || '/' || rated_partition || '/' || rated_offset FROM billing.quarantine
ORDER BY id LIMIT {_NAMED_MAX}
"""


def _quarantined(connection: "Connection[Any]") -> Check:
    """What the sink put aside is kept and counted, but not billed: somebody must look, so none is what is right."""
    reasons = dict(connection.execute(_QUARANTINED).fetchall())
    count = sum(reasons.values())
    detail = "none"
    if count:
        places = [place for (place,) in connection.execute(_QUARANTINED_AT)]
        counts = ", ".join(f"{reason} {messages:,}" for reason, messages in reasons.items())
        detail = f"{counts}: {_list(places, '', ', ', count)}"
    return Check(QUARANTINED, Decimal(count), Decimal(0), detail)


# -- money

# What rows and close entries add up to. Rows move a counter's quantity by what lies between before and after: of a
# maximum that is not what its events measured.
_SUMS = """
SELECT line_id, sum(amount) AS amount, sum(quantity) AS quantity FROM (
    SELECT line_id, amount, quantity_after - quantity_before AS quantity FROM {rows} AS usage
    UNION ALL SELECT line_id, amount, quantity FROM {entries} AS entry
) AS part GROUP BY line_id
"""
_LINES = f"""
SELECT coalesce(line.id, sums.line_id), line.amount, line.quantity, sums.amount, sums.quantity
FROM {{lines}} AS line FULL JOIN ({_SUMS}) AS sums ON sums.line_id = line.id
WHERE CASE WHEN line.id IS NULL THEN NOT EXISTS (SELECT FROM billing.invoice_line WHERE id = sums.line_id)
    ELSE line.amount <> coalesce(sums.amount, 0) OR line.quantity <> coalesce(sums.quantity, 0) END
ORDER BY 1
"""


def _lines(connection: "Connection[Any]", scope: _Scope) -> Check:
    (lines,) = _one(connection, f"SELECT count(*) FROM {scope.lines} AS line", scope.parameters)
    statement = scope.fill(_LINES)
    places = [
        f"line:{line} holds {amount} for {quantity}, its rows and entries {rows_amount} for {rows_quantity}"
        for line, amount, quantity, rows_amount, rows_quantity in connection.execute(statement, scope.parameters)
    ]
    return Check(
        "lines = with the sums of their rows and entries",
        Decimal(lines),
        Decimal(lines - len(places)),
        _list(places, "all"),
    )


_AMOUNTS = f"""
SELECT invoice.currency, coalesce(sum(sums.amount), 0), sum(line.amount)
FROM billing.invoice JOIN {{lines}} AS line ON line.invoice_id = invoice.id
LEFT JOIN ({_SUMS}) AS sums ON sums.line_id = line.id
GROUP BY invoice.currency ORDER BY invoice.currency
"""


def _amounts(connection: "Connection[Any]", scope: _Scope) -> Iterable[Check]:
    statement = scope.fill(_AMOUNTS)
    for currency, rows, lines in connection.execute(statement, scope.parameters):
        yield Check(f"{currency} of rows and entries = of lines", rows, lines, "exact, unrounded")


# A counter's lines: one per version of its meter, as a rule one. What its rows alone add up to, so without the entries.
_COUNTERS = """
WITH booked AS (
    SELECT line_id, sum(quantity) AS quantity, sum(amount) AS amount FROM {entries} AS entry GROUP BY line_id
)
SELECT invoice.account, line.contract, line.plan, line.plan_version, line.price_version, line.meter,
    max(line.meter_version) AS meter_version, line.charge, line.segment_start, line.cell,
    max(line.price_class)::text AS price_class,
    sum(line.quantity) - coalesce(sum(booked.quantity), 0) AS quantity,
    sum(line.amount) - coalesce(sum(booked.amount), 0) AS amount,
    max(line.last_event_at) AS last_event_at, array_agg(line.id ORDER BY line.id) AS lines
FROM {lines} AS line JOIN billing.invoice ON invoice.id = line.invoice_id
LEFT JOIN booked ON booked.line_id = line.id
WHERE line.first_event_at IS NOT NULL
    AND (invoice.account, invoice.period_start) NOT IN (SELECT account, period_start FROM billing.re_rated_period)
GROUP BY invoice.account, line.contract, line.plan, line.plan_version, line.price_version, line.meter, line.charge,
    line.segment_start, line.cell
ORDER BY min(line.id)
"""
_BY_SUBJECT = """
SELECT sum(quantity_after - quantity_before), sum(amount) FROM billing.rated_usage
WHERE line_id = ANY(%s) GROUP BY subject
"""


def _counters(connection: "Connection[Any]", scope: _Scope) -> Iterable[Check]:
    """Amounts are differences of running prices (law 3): over all rows of a counter they add up to price(quantity).

    That is so for class running, unless a segment cut short has changed the price in between; the others have their
    price at the close. Whatever its class, a counter is priced by what holds at its time today, unless its period has
    been re-rated since: see ``_estimated``.
    """
    prices = Prices(connection)
    priced, held = _Tally("counters = with the price of their quantity"), _Tally("counters = under today's prices")
    with connection.cursor("counters", row_factory=dict_row) as cursor:  # on the server: there may be millions
        cursor.itersize = _FETCH_COUNTERS
        cursor.execute(scope.fill(_COUNTERS), scope.parameters)
        while rows := cursor.fetchmany(_FETCH_COUNTERS):
            known = prices.catalog({row["account"] for row in rows}).accounts
            for row in rows:
                found: LinePrice | str
                try:
                    found = prices.find(Priced.of(row))
                except NoPrice as error:
                    found = str(error)
                held.count(row, _not_held(row, found) if row["account"] in known else None)
                if row["price_class"] == "running":
                    priced.count(row, _not_priced(connection, row, found))
    yield priced.check()
    yield held.check()


class _Tally:
    """Counters looked at, and those of them that something is wrong with."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._all = self._wrong = 0
        self._places: list[str] = []

    def count(self, row: Mapping[str, Any], problem: str | None) -> None:
        self._all += 1
        if problem is None:
            return
        self._wrong += 1
        if len(self._places) < _NAMED_MAX:
            counter = "/".join(
                (row["account"], row["contract"], row["charge"], *([row["cell"]] if row["cell"] else []))
            )
            on = ", ".join(f"line:{line}" for line in row["lines"])
            start = format_instant(to_micros(row["segment_start"]))
            self._places.append(
                f"{counter} from {start} ({on}) holds {plain(row['amount'])} for {plain(row['quantity'])}, {problem}"
            )

    def check(self) -> Check:
        detail = _list(self._places, "all", count=self._wrong)
        return Check(self._name, Decimal(self._all), Decimal(self._all - self._wrong), detail)


def _not_held(row: Mapping[str, Any], found: LinePrice | str) -> str | None:
    """What is wrong with the prices a counter was rated by, as of today's catalog."""
    if isinstance(found, str):
        return found
    if found.segment is None:
        return f"rated under {row['price_version']}, which does not hold there: `tally rerate`"
    if to_micros(row["last_event_at"]) >= found.segment.end_us:
        end = format_instant(found.segment.end_us)
        return f"rated under {row['price_version']}, which ends at {end}: `tally rerate`"
    return None


def _not_priced(connection: "Connection[Any]", row: Mapping[str, Any], found: LinePrice | str) -> str | None:
    """What is wrong with the sum of a counter's amounts."""
    if isinstance(found, str):
        return found
    charge, segment = found.charge, found.segment
    if segment is not None and segment.shortens(charge):
        return None
    sums = [(row["quantity"], row["amount"])]
    if charge.per_subject:
        sums = connection.execute(_BY_SUBJECT, [row["lines"]]).fetchall()
    price = compile_price(charge, cell_values(row["cell"], len(charge.by)) if charge.by else ())
    for quantity, amount in sums:
        cost = price(scaled(quantity, QUANTITY_DECIMALS))
        if cost is None:
            return "which lies beyond the charge's last tier"
        if cost != scaled(amount, AMOUNT_DECIMALS):
            of_one = f" of a subject, {plain(quantity)}," if charge.per_subject else ""
            return f"whose price{of_one} is {plain(amount_decimal(cost))}"
    return None


_RE_RATED = """
SELECT account, period_start, period_end FROM billing.re_rated_period WHERE state = 'open' ORDER BY 1, 2
"""


def _estimated(connection: "Connection[Any]") -> Iterable[Estimated]:
    """Open periods in which usage was moved between lines, and whose lines do not all stand at their closing prices."""
    prices = Prices(connection)
    for account, start, end in connection.execute(_RE_RATED).fetchall():
        catalog = prices.catalog([account])
        period = Period(to_micros(start), to_micros(end))
        if entries := missing_entries(connection, catalog, account, period):
            last = to_datetime(period.end_us - 1).astimezone(ZoneInfo(catalog.accounts[account].time_zone))
            yield Estimated(account, f"{last:%Y-%m}", len(entries))


# Of two versions valid from the same time the newer counts, as in pipeline.core.catalog. The running quantity of a
# charge starts anew with each plan version, so a line may not count from before its own.
_WRONG_VERSIONS = """
WITH counting AS (
    SELECT DISTINCT ON (kind, id, valid_from) kind, id, version, valid_from FROM billing.catalog_version
    WHERE kind IN ('plan', 'meter') ORDER BY kind, id, valid_from, version DESC
), valid AS (
    SELECT *, lead(valid_from) OVER (PARTITION BY kind, id ORDER BY valid_from) AS valid_until FROM counting
)
SELECT line.id, used.kind, used.id, used.version, valid.valid_from, valid.valid_until, used.counted_from
FROM {lines} AS line
CROSS JOIN LATERAL (VALUES
    ('plan'::billing.catalog_kind, line.plan, line.plan_version, line.segment_start),
    ('meter'::billing.catalog_kind, line.meter, line.meter_version, line.first_event_at)
) AS used (kind, id, version, counted_from)
LEFT JOIN valid ON (valid.kind, valid.id, valid.version) = (used.kind, used.id, used.version)
WHERE line.first_event_at IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM billing.invoice JOIN billing.re_rated_period USING (account, period_start, period_end)
        WHERE invoice.id = line.invoice_id
    ) AND (
    valid.version IS NULL OR least(line.first_event_at, used.counted_from) < valid.valid_from
    OR line.last_event_at >= valid.valid_until
)
ORDER BY line.id, used.kind
"""
_WRONG_ROWS = """
SELECT count(*), min(event_time) FROM billing.rated_usage
WHERE line_id = %(line)s AND (
    %(valid_from)s::timestamptz IS NULL OR event_time < %(valid_from)s OR event_time >= %(valid_until)s
)
"""
_VALID_AT = """
SELECT version FROM billing.catalog_version WHERE kind = %s AND id = %s AND valid_from <= %s
ORDER BY valid_from DESC, version DESC LIMIT 1
"""


def _versions(connection: "Connection[Any]", scope: _Scope) -> Check:
    """Each line's plan and meter version is the one valid, as published, at all its events' times (law 4).

    But for periods that were re-rated since: ``_estimated`` has these.
    """
    (lines,) = _one(connection, f"SELECT count(*) FROM {scope.lines} AS line", scope.parameters)
    wrong: set[int] = set()
    findings = 0
    places: list[str] = []
    statement = scope.fill(_WRONG_VERSIONS)
    for line, kind, name, version, valid_from, valid_until, counted_from in connection.execute(
        statement, scope.parameters
    ):
        wrong.add(line)
        findings += 1
        if findings > _NAMED_MAX:
            continue  # looked up only where it will be named
        bounds = {"line": line, "valid_from": valid_from, "valid_until": valid_until}
        rows, since = _one(connection, _WRONG_ROWS, bounds)
        at = counted_from if since is None else since
        valid = connection.execute(_VALID_AT, [kind, name, at]).fetchone()
        rather = f"version {valid[0]} is valid" if valid else "none is valid"
        what = f"{rows:,} rows of line:{line} from" if rows else f"line:{line} counts from"
        places.append(f"{what} {format_instant(to_micros(at))} by {kind} {name} version {version}, where {rather}")
    detail = _list(places, "all", count=findings)
    return Check("lines = by the versions valid at their events", Decimal(lines), Decimal(lines - len(wrong)), detail)


# -- sequence numbers

_DUE = "SELECT count(*), coalesce(sum(due), 0) FROM billing.due_sequences(%s * interval '1 second')"
_GAPS = f"""
WITH gaps AS MATERIALIZED (SELECT * FROM billing.sequence_gaps(%s * interval '1 second')), named AS (
    SELECT * FROM gaps ORDER BY source, first_missing LIMIT {_NAMED_MAX}
)
SELECT whole.runs, whole.missing, named.*, facts.*,
    billing.likely_cause(rejected_because, spooled, confirmed, newer_source) AS likely_cause
FROM (SELECT count(*) AS runs, sum(last_missing - first_missing + 1) AS missing FROM gaps) AS whole
CROSS JOIN named CROSS JOIN LATERAL billing.gap_facts(source, first_missing, last_missing) AS facts
ORDER BY source, first_missing
"""
_ACCEPTED = "SELECT coalesce(sum(last_sequence - first_sequence + 1), 0) FROM billing.accepted_gap"


def _sequences(connection: "Connection[Any]", grace_s: float, *, deleted: bool) -> Check:
    """The numbers that sources have used, by what arrived and by their producers' control totals, against those that
    arrived or were accepted as missing. ``deleted`` is whether offsets of usage.events are known to have passed
    unrated.
    """
    sources, due = _one(connection, _DUE, [grace_s])
    runs, missing, places = 0, 0, []
    with connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(_GAPS, [grace_s]):
            runs, missing = row.pop("runs"), row.pop("missing")
            gap = Gap(**row | {"likely_cause": Cause(row["likely_cause"])})
            if deleted and gap.likely_cause in (Cause.CONFIRMED, Cause.UNKNOWN):
                gap = replace(gap, likely_cause=Cause.DELETED)
            timing = f" ({at})" if (at := when(gap)) else ""
            places.append(f"{gap.source} misses {gap.numbers}{timing}: {because(gap)}")
    none = f"{sources:,} sources without holes" if sources != 1 else "1 source without holes"
    detail = _list(places, none, count=runs)
    (accepted,) = _one(connection, _ACCEPTED)
    if accepted:
        detail += f"; {accepted:,} accepted as missing"
    return Check(SEQUENCES, Decimal(due), Decimal(due - missing), detail)


_TOTALS = """
SELECT count(*), coalesce(sum(last_sequence - first_sequence + 1), 0) FROM billing.control_total
WHERE received_at <= now() - %s * interval '1 second'
"""
_SHORT = "SELECT * FROM billing.short_hours(%s * interval '1 second') ORDER BY hour, source"


def _control_totals(connection: "Connection[Any]", grace_s: float) -> Check:
    """What producers say they emitted, hour by hour, against what arrived of it or was accepted as missing."""
    hours, emitted = _one(connection, _TOTALS, [grace_s])
    short = connection.execute(_SHORT, [grace_s]).fetchall()
    places = [
        f"{source} emitted {sent:,} in the hour from {format_instant(to_micros(hour))}, {sent - missing:,} arrived"
        for source, hour, sent, missing in short
    ]
    left = sum(missing for *_, missing in short)
    none = f"{hours:,} hours of producers, all there" if hours != 1 else "1 hour of a producer, all there"
    return Check(CONTROL_TOTALS, Decimal(emitted), Decimal(emitted - left), _list(places, none))


def _one(connection: "Connection[Any]", statement: str, parameters: Any = None) -> tuple[Any, ...]:
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None, "an aggregate gives one row"
    return tuple(row)


def _list(places: list[str], none: str, separator: str = "; ", count: int | None = None) -> str:
    """The first places by name, and how many more there are of ``count`` in all, as many as given unless said."""
    if not places:
        return none
    more = (len(places) if count is None else count) - _NAMED_MAX
    return separator.join(places[:_NAMED_MAX]) + (f" and {more:,} more" if more > 0 else "")


# -- lag


def _logs(settings: Settings, connection: "Connection[Any]") -> dict[Place, Log]:
    """The logs, seen from where the rater is on arrivals, by receipts, and the sink on all it reads, by positions."""
    topics = Topics(settings.topic_prefix)
    written = connection.execute("SELECT topic, partition, next_offset FROM billing.sink_position")
    positions: dict[Place, int] = {(topic, partition): offset for topic, partition, offset in written}
    for partition, reached in connection.execute(_REACHED, [topics.events]):
        positions[topics.events, partition] = reached
    return logs(settings, (topics.events, *_read_by_sink(topics)), positions)


def _read_by_sink(topics: Topics) -> tuple[str, ...]:
    return topics.rated, topics.receipts, topics.retry, topics.dead_letter, topics.controls


def _lags(topics: Topics, found: Mapping[Place, Log]) -> tuple[Lag, ...]:
    """How far the rater is behind on arrivals and the sink on all it reads.

    What waits on the retry topic for its time is parked, a state of its own, and no lag of the rater.
    """
    left = dict.fromkeys((topics.events, *_read_by_sink(topics)), 0)
    for (topic, _), log in found.items():
        left[topic] += log.left
    return tuple(Lag(topic, "rater" if topic == topics.events else "sink", offsets) for topic, offsets in left.items())
