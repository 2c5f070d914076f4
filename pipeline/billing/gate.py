"""The completeness gate: what stands between a month and its close.

A close may begin when all usage of the month has arrived, was counted and is in the money, and when everybody who gets
an invoice can get one. ``check`` looks at each of these and lists what is missing, with the money it is likely to come
to. It decides nothing: the close refuses while something is missing, unless a person overrides it with a reason.

Usage belongs to the billing period of its account that holds its time, and the period to the month its last instant
lies in. Where the time cannot be read, or is what was refused (too old, in the future), an event is of each period that
its arrival lies in, or the latest event of the receipt it is counted in: it came among usage of that time.

What a person discarded does not count (`tally dlq discard`), parked events no less than dead letters: the close passes
over them. Parked ones are tried on; one that is rated after all is billed as late usage.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing import reconcile
from pipeline.billing.broker import Log, logs
from pipeline.billing.intake import Place
from pipeline.billing.invoiceable import obstacles
from pipeline.billing.prices import read_catalog
from pipeline.billing.rerate import Month
from pipeline.billing.unbilled_voids import unbilled_voids
from pipeline.core.gaps import Cause, Gap, because, when
from pipeline.core.periods import Period, format_instant, to_datetime, to_micros
from pipeline.core.reasons import Reason
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

Kind: TypeAlias = Literal[
    "period",  # the month is not over, or its grace time is not
    "unread",  # usage arrived that no rater has read, or that no sink has written
    "parked",
    "dead_letters",
    "quarantined",
    "sequence_gaps",
    "control_totals",
    "corrections",  # decided, and not in the money yet
    "backfills",  # staged or begun, and not finished
    "reconciliation",
    "prices",
    "legal_entities",
    "customers",
    "taxes",
    "rates",  # of exchange
    "voided",  # documents of the month that are billed nowhere since
]

#: How long after a period usage may arrive in time, unless a legal entity says otherwise.
GRACE = timedelta(hours=24)
#: Events that are priced one by one; a sum over more takes longer than anybody waits.
PRICED_MAX = 10_000
#: Places named in a text before "and n more".
_NAMED_MAX = 5
#: Accounts whose part of the catalog is read at a time.
_ACCOUNTS_AT_ONCE = 500
#: Time between two looks while waiting, seconds.
_LOOK_EVERY_S = 0.5
#: The longest billing period, and how far an account's month may lie beside that of UTC.
_LONGEST, _BESIDE = timedelta(days=367), timedelta(days=1)
#: Refused for their time, which may be wrong.
_REFUSED_TIMES = [Reason.TOO_OLD.value, Reason.IN_THE_FUTURE.value]

#: Amounts by ISO 4217 currency, in whole units.
Money: TypeAlias = tuple[tuple[str, Decimal], ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing that stands in the way: what it is, how much of it, what it may be worth, what to do about it."""

    kind: Kind
    #: For a person: what is missing, and where.
    what: str
    count: int
    #: What to do, commands as they are typed.
    todo: str
    #: An estimate; empty where nobody can tell.
    likely_money: Money = ()
    #: Of ``count``, those the estimate leaves out since they have no price.
    unpriced: int = 0
    #: Whether a person may decide to close without it.
    overridable: bool = True

    def as_json(self) -> dict[str, Any]:
        """As ``billing.close_run.missing`` and ``billing.close_override.missing`` keep it."""
        return {
            "kind": self.kind,
            "what": self.what,
            "count": self.count,
            "likely_money": {currency: format(amount, "f") for currency, amount in self.likely_money},
            "unpriced": self.unpriced,
            "todo": self.todo,
            "overridable": self.overridable,
        }


#: What an event, by its framed bytes, would cost alone, as an amount and its currency; None where nobody can tell.
Estimate: TypeAlias = Callable[[bytes | None], tuple[Decimal, str] | None]
#: Makes one for events of some accounts: ``pipeline.operations.at_risk.estimator`` with the schemas filled in.
Estimator: TypeAlias = Callable[["Connection[Any]", Iterable[str]], Estimate]


def check(
    connection: "Connection[Any]",
    settings: Settings,
    month: Month,
    *,
    now: datetime,
    grace: timedelta | None = None,
    payers: Collection[str] | None = None,
    estimator: Estimator | None = None,
    wait_s: float = 0.0,
) -> list[Missing]:
    """What stands between a month and its close; empty where nothing does. Changes nothing.

    ``connection`` is in autocommit: each look sees what is there by then. ``now`` is an aware time; the ends of the
    logs are those of the call, so that with ``now`` behind the month's end and ``grace`` (None: the longest of the
    legal entities) all that arrived in time lies before them. ``payers`` limits who must have what an invoice needs,
    and whose documents are looked at, to those who pay for these accounts, and nothing else: usage that is missing may
    be anybody's. ``wait_s``: how long to wait for raters and sinks to read to these ends, and for differences to go
    that come from reading on.

    Raises KafkaException or psycopg.OperationalError when the broker or the database does not answer, TopicMismatch
    where topics are missing, ValueError for a catalog this program cannot read.
    """
    until = time.monotonic() + wait_s
    end = _end_of(connection, month)
    cut = end + (_longest_grace(connection) if grace is None else grace)
    if now < end:
        return [_running(month, end)]
    found = list(_not_due(month, cut, now))
    average = _average(connection, month)
    found += _unread(connection, settings, average, until)
    found += _refused(connection, month, estimator)
    found += _quarantined(connection, month)
    found += _gaps(connection, settings, cut, average)
    found += _corrections(connection, month)
    found += _backfills(connection, month, average)
    found += _differences(settings, end, until)
    found += [
        Missing(one.kind, one.what, one.payers, one.todo, one.money)
        for one in obstacles(connection, month, now=now, accounts=sorted(payers or ()))
    ]
    found += _voided(connection, month, payers or ())
    return found


# Time ---------------------------------------------------------------------------------------------------------------

_TIME_ZONES = """
SELECT DISTINCT document ->> 'time_zone' FROM (
    SELECT DISTINCT ON (id) document FROM billing.catalog_version WHERE kind = 'account' ORDER BY id, version DESC
) AS newest
"""
_LONGEST_GRACE = """
SELECT max(coalesce((document ->> 'grace_hours')::integer, %s)) FROM (
    SELECT DISTINCT ON (id) document FROM billing.invoicing_version
    WHERE kind = 'legal_entity' ORDER BY id, version DESC
) AS newest
"""


def _end_of(connection: "Connection[Any]", month: Month) -> datetime:
    """When the month is over for every account: where its clocks are last."""
    zones = {zone for (zone,) in connection.execute(_TIME_ZONES)} or {"UTC"}
    return to_datetime(max(month.period_in(zone).end_us for zone in zones))


def _longest_grace(connection: "Connection[Any]") -> timedelta:
    hours = GRACE // timedelta(hours=1)
    (longest,) = connection.execute(_LONGEST_GRACE, [hours]).fetchone() or (None,)
    return timedelta(hours=hours if longest is None else longest)


def _running(month: Month, end: datetime) -> Missing:
    at = format_instant(to_micros(end))
    what = f"{month} is not over for every account before {at}"
    return Missing("period", what, 1, f"close it after {at}, and its grace time", overridable=False)


def _not_due(month: Month, cut: datetime, now: datetime) -> Iterable[Missing]:
    if now < cut:
        at = format_instant(to_micros(cut))
        yield Missing("period", f"usage of {month} may arrive in time until {at}", 1, f"close it after {at}")


class _Average(NamedTuple):
    """What an event of the month came to on average, by currency: what is lost without a trace is likely like it."""

    amounts: tuple[tuple[str, Decimal], ...]

    def of(self, events: int) -> Money:
        return tuple((currency, (amount * events).quantize(Decimal("0.01"))) for currency, amount in self.amounts)


# Lines count an event once per charge; receipts tell how many rows an event makes.
_AVERAGE = """
WITH rows_per_event AS (
    SELECT coalesce(nullif(sum(rated_rows), 0) / nullif(sum(rated), 0), 1) AS factor FROM billing.receipt
), billed AS (
    SELECT invoice.currency, sum(line.amount) AS amount, sum(line.events) AS events
    FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    WHERE period_end > %s AND period_end <= %s GROUP BY invoice.currency
)
SELECT currency, amount * factor / nullif(sum(events) OVER (), 0) FROM billed, rows_per_event
WHERE amount <> 0 ORDER BY currency
"""


def _average(connection: "Connection[Any]", month: Month) -> _Average:
    start, end = _around(month)
    rows = connection.execute(_AVERAGE, [start + _BESIDE, end])
    return _Average(tuple((currency, amount) for currency, amount in rows if amount is not None))


def _around(month: Month) -> tuple[datetime, datetime]:
    """The month in every time zone, and somewhat more."""
    utc = month.period_in("UTC")
    return to_datetime(utc.start_us) - _BESIDE, to_datetime(utc.end_us) + _BESIDE


# Arrived, and not counted yet -----------------------------------------------------------------------------------------

_RECEIPTS_REACH = "SELECT topic, partition, max(next_offset) FROM billing.receipt WHERE topic = %s GROUP BY 1, 2"
_SINK_REACHES = "SELECT topic, partition, next_offset FROM billing.sink_position"


def _unread(connection: "Connection[Any]", settings: Settings, average: _Average, until: float) -> Iterable[Missing]:
    """Whether raters, then sinks, have come to where the logs end now.

    In this order: a receipt that is written says that its rows are on the log, so the end the sink has to come to is
    taken once the receipts reach the ends of arrivals.
    """
    topics = Topics(settings.topic_prefix)
    stages: tuple[tuple[str, str, tuple[str, ...], str, list[str]], ...] = (
        ("rater", "no rater has read", (topics.events,), _RECEIPTS_REACH, [topics.events]),
        (
            "sink",
            "no sink has written",
            (topics.rated, topics.receipts, topics.retry, topics.dead_letter, topics.controls),
            _SINK_REACHES,
            [],
        ),
    )
    for stage, nobody, names, statement, parameters in stages:
        ends: dict[Place, int] | None = None
        while True:
            reached = {
                (topic, partition): offset for topic, partition, offset in connection.execute(statement, parameters)
            }
            found = logs(settings, names, reached)
            ends = {place: log.end for place, log in found.items()} if ends is None else ends
            left = _left(found, ends, reached)
            if not left or time.monotonic() >= until:
                break
            time.sleep(_LOOK_EVERY_S)
        if left:
            offsets = sum(left.values())
            places = [f"{topic} {partition}: {n:,}" for (topic, partition), n in sorted(left.items())]
            what = f"{offsets:,} offsets that {nobody} ({_named(places, ', ')})"
            todo = f"`tally status` says whether a {stage} runs and what holds it up; then close again"
            events = sum(n for (topic, _), n in left.items() if topic in (topics.events, topics.rated))
            yield Missing("unread", what, offsets, todo, average.of(events))


def _left(found: Mapping[Place, Log], ends: Mapping[Place, int], reached: Mapping[Place, int]) -> dict[Place, int]:
    """Offsets before the ends that a stage has not come to, where one of those behind its place holds a record."""
    return {
        place: ends[place] - reached.get(place, 0)
        for place, log in found.items()
        if log.left and ends.get(place, 0) > reached.get(place, 0)
    }


# Refused, and nobody has decided --------------------------------------------------------------------------------------

# What is looked at in the month's longest possible span; which of it is the month's, the accounts' periods say.
_UNDECIDED = "unrated.state IN ('parked', 'dead_lettered') AND unrated.decision IS DISTINCT FROM 'discard'"
_ACCOUNTS_REFUSED = f"""
SELECT DISTINCT account FROM billing.unrated_event AS unrated
WHERE account IS NOT NULL AND {_UNDECIDED}
    AND (event_time IS NULL OR reason = ANY(%(refused_times)s) OR event_time >= %(from)s AND event_time < %(until)s)
"""
_OF_THE_MONTH = f"""
WITH span AS (
    SELECT * FROM unnest(%(accounts)s::text[], %(starts)s::timestamptz[], %(ends)s::timestamptz[])
        AS span (account, starts, ends)
), found AS (
    SELECT unrated.* FROM billing.unrated_event AS unrated
    LEFT JOIN LATERAL (
        SELECT next_offset, latest_event_at FROM billing.receipt
        WHERE topic = unrated.origin_topic AND partition = unrated.origin_partition
            AND first_offset <= unrated.origin_offset
        ORDER BY first_offset DESC LIMIT 1
    ) AS receipt
        ON receipt.next_offset > unrated.origin_offset
        AND (unrated.event_time IS NULL OR unrated.reason = ANY(%(refused_times)s))
    WHERE {_UNDECIDED} AND EXISTS (
        SELECT FROM span WHERE span.account = coalesce(unrated.account, '') AND (
            unrated.event_time >= starts AND unrated.event_time < ends
            OR (unrated.event_time IS NULL OR unrated.reason = ANY(%(refused_times)s))
                AND unrated.appended_at >= starts AND unrated.appended_at < ends
            OR receipt.latest_event_at >= starts AND receipt.latest_event_at < ends
        )
    )
)
"""
_REFUSED = f"""{_OF_THE_MONTH}
SELECT state::text, coalesce(reason, 'unknown'), count(*) FROM found GROUP BY 1, 2 ORDER BY 1 DESC, 3 DESC, 2
"""
_REFUSED_EVENTS = f"""{_OF_THE_MONTH}
SELECT state::text, account, value FROM found
ORDER BY appended_at, origin_topic, origin_partition, origin_offset LIMIT %(limit)s
"""


def _refused(connection: "Connection[Any]", month: Month, estimator: Estimator | None) -> Iterable[Missing]:
    """Parked events and dead letters of the month that nobody has discarded, with what they would cost."""
    start, end = _around(month)
    bounds = {"from": start - _LONGEST, "until": end, "refused_times": _REFUSED_TIMES}
    accounts = [account for (account,) in connection.execute(_ACCOUNTS_REFUSED, bounds)]
    spans = [("", month.period_in("UTC")), *_spans(connection, month, accounts)]
    asked = {
        "accounts": [account for account, _ in spans],
        "starts": [to_datetime(span.start_us) for _, span in spans],
        "ends": [to_datetime(span.end_us) for _, span in spans],
        "refused_times": _REFUSED_TIMES,
        "limit": PRICED_MAX,
    }
    counts: dict[str, dict[str, int]] = {}
    for state, reason, count in connection.execute(_REFUSED, asked):
        counts.setdefault(state, {})[reason] = count
    if not counts:
        return
    sums, unpriced = _priced(connection, connection.execute(_REFUSED_EVENTS, asked).fetchall(), estimator)
    for state, kind, does in _STATES:
        if reasons := counts.get(state):
            events = sum(reasons.values())
            of = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            money = tuple(sorted(sums.get(state, {}).items()))
            not_looked_at = max(0, events - PRICED_MAX)
            yield Missing(
                kind,
                f"{_events(events)} {does}: {of}",
                events,
                _TODO[kind],
                money,
                unpriced.get(state, 0) + not_looked_at,
            )


_STATES: tuple[tuple[str, Literal["parked", "dead_letters"], str], ...] = (
    ("parked", "parked", "parked, tried again by themselves"),
    ("dead_lettered", "dead_letters", "dead-lettered, undecided"),
)
_TODO: dict[Kind, str] = {
    "parked": "`tally dlq list --state parked`: publish what they lack, or `tally dlq discard` with a reason, each one",
    "dead_letters": "`tally dlq list`: mend and `tally dlq replay`, or `tally dlq discard` with a reason, each of them",
}


def _priced(
    connection: "Connection[Any]", events: Sequence[tuple[str, str | None, bytes | None]], estimator: Estimator | None
) -> tuple[dict[str, dict[str, Decimal]], dict[str, int]]:
    """By state: the sums of what events would cost alone, and how many have no price."""
    sums: dict[str, dict[str, Decimal]] = {}
    unpriced: dict[str, int] = {}
    estimate = estimator(connection, {account for _, account, _ in events if account}) if estimator else None
    for state, _, value in events:
        found = estimate(value) if estimate else None
        if found is None:
            unpriced[state] = unpriced.get(state, 0) + 1
            continue
        amount, currency = found
        of_state = sums.setdefault(state, {})
        of_state[currency] = of_state.get(currency, Decimal(0)) + amount
    return sums, unpriced


def _spans(connection: "Connection[Any]", month: Month, accounts: Sequence[str]) -> list[tuple[str, Period]]:
    """The accounts' billing periods that end in the month; the month itself for one that had no contract in it."""
    spans: list[tuple[str, Period]] = []
    for first in range(0, len(accounts), _ACCOUNTS_AT_ONCE):
        some = accounts[first : first + _ACCOUNTS_AT_ONCE]
        catalog = read_catalog(connection, some)
        for account in some:
            known = catalog.accounts.get(account)
            whole = month.period_in(known.time_zone if known else "UTC")
            ending = catalog.periods_ending(account, whole)
            if not (catalog.periods_at(account, whole.start_us) or catalog.periods_at(account, whole.end_us - 1)):
                ending = ending or (whole,)
            spans += [(account, period) for period in ending]
    return spans


_QUARANTINED = """
SELECT reason, count(*) FROM billing.quarantine WHERE at >= %s GROUP BY reason ORDER BY 2 DESC, 1
"""


def _quarantined(connection: "Connection[Any]", month: Month) -> Iterable[Missing]:
    """What the sink put aside since the month began: before that nothing of it can have come."""
    reasons = connection.execute(_QUARANTINED, [_around(month)[0]]).fetchall()
    if reasons:
        count = sum(n for _, n in reasons)
        of = ", ".join(f"{n:,} {reason}" for reason, n in reasons)
        todo = "look at finance.quarantined_usage: what is usage of the month has to come again under another key"
        yield Missing("quarantined", f"{count:,} messages the sink put aside: {of}", count, todo)


# Never arrived --------------------------------------------------------------------------------------------------------

_GAPS = """
SELECT gap.source, gap.first_missing, gap.last_missing, facts.*,
    billing.likely_cause(rejected_because, spooled, confirmed, newer_source) AS likely_cause
FROM billing.sequence_gaps(%(grace)s * interval '1 second') AS gap
CROSS JOIN LATERAL billing.gap_facts(source, first_missing, last_missing) AS facts
WHERE coalesce(facts.passed_after < %(cut)s, true) AND coalesce(facts.emitted_from < %(cut)s, true)
ORDER BY gap.source, gap.first_missing
"""
_SHORT = """
SELECT source, hour, emitted, missing FROM billing.short_hours(%(grace)s * interval '1 second')
WHERE hour < %(cut)s ORDER BY hour, source
"""


def _gaps(connection: "Connection[Any]", settings: Settings, cut: datetime, average: _Average) -> Iterable[Missing]:
    """Numbers that sources used and that did not come, unless they were used after all usage of the month was due."""
    asked = {"grace": settings.sequence_grace, "cut": cut}
    missing, places = 0, []
    with connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(_GAPS, asked):
            gap = Gap(**row | {"likely_cause": Cause(row["likely_cause"])})
            missing += gap.missing
            timing = f" ({at})" if (at := when(gap)) else ""
            places.append(f"{gap.source} misses {gap.numbers}{timing}: {because(gap)}")
    if missing:
        what = f"{_events(missing)} that sources numbered and that never came: {_named(places)}"
        todo = "`tally gaps`: have them sent again, or `tally gaps accept` with a reason"
        yield Missing("sequence_gaps", what, missing, todo, average.of(missing))
    hours = connection.execute(_SHORT, asked).fetchall()
    if hours:
        short = sum(n for *_, n in hours)
        places = [
            f"{source} emitted {emitted:,} in the hour from {format_instant(to_micros(hour))}, {n:,} did not come"
            for source, hour, emitted, n in hours
        ]
        what = f"{_events(int(short))} by producers' control totals, of the same numbers: {_named(places)}"
        todo = "`tally gaps` shows them; what is accepted there, or comes, is missing here no more"
        yield Missing("control_totals", what, int(short), todo)


# On its way -----------------------------------------------------------------------------------------------------------

_CORRECTIONS = """
SELECT account, event_time, state FROM billing.correction_state
WHERE event_time >= %(from)s AND event_time < %(until)s AND state IN ('unsent', 'sent') ORDER BY number
"""
_BACKFILLS = """
SELECT backfill.name, backfill.state::text, (
    SELECT count(*) FROM billing.backfill_event AS event
    WHERE event.backfill = backfill.name AND event.event_time >= %(from)s AND event.event_time < %(until)s
)
FROM billing.backfill WHERE state IN ('staged', 'committing', 'reverting') ORDER BY staged_at, name
"""


def _corrections(connection: "Connection[Any]", month: Month) -> Iterable[Missing]:
    start, end = _around(month)
    rows = connection.execute(_CORRECTIONS, {"from": start - _LONGEST, "until": end}).fetchall()
    if not rows:
        return
    periods: defaultdict[str, list[Period]] = defaultdict(list)
    for account, period in _spans(connection, month, sorted({account for account, *_ in rows})):
        periods[account].append(period)
    states = [
        state
        for account, at, state in rows
        if any(period.start_us <= to_micros(at) < period.end_us for period in periods[account])
    ]
    if states:
        unsent = states.count("unsent")
        what = f"{len(states):,} corrections of billed usage on their way, {unsent:,} of them not sent"
        todo = "`tally usage list` shows them; `tally usage resume` sends what was not sent, raters do the rest"
        yield Missing("corrections", what, len(states), todo)


def _backfills(connection: "Connection[Any]", month: Month, average: _Average) -> Iterable[Missing]:
    start, end = _around(month)
    rows = connection.execute(_BACKFILLS, {"from": start + _BESIDE, "until": end - _BESIDE}).fetchall()
    for name, state, events in rows:
        if events:
            does = {"staged": "waits for a decision", "committing": "is half sent", "reverting": "is half taken back"}
            what = f"backfill {name} {does[state]}: {_events(events)} of the month"
            verb = "revert" if state == "reverting" else "commit"
            todo = f"`tally backfill {verb} {name}`"
            todo += f", or `tally backfill revert {name}`" if state == "staged" else " goes on where it stopped"
            yield Missing("backfills", what, events, todo, average.of(events))


# Adding up ------------------------------------------------------------------------------------------------------------

#: Looked at above, for the month alone.
_OF_ALL_TIMES = {reconcile.QUARANTINED, reconcile.SEQUENCES, reconcile.CONTROL_TOTALS}


def _differences(settings: Settings, end: datetime, until: float) -> Iterable[Missing]:
    """Law 8, of the money only what the close may bill: so it takes no longer with every year that was issued.

    What is issued was added up by the gate of its own month; `tally reconcile` adds up all of it. While usage goes on
    coming, a look may fall between two commits: then another one tells.
    """
    while True:
        result = reconcile.reconcile(settings, grace_s=settings.sequence_grace, unissued_until=end)
        wrong = [check for check in result.checks if check.difference and check.name not in _OF_ALL_TIMES]
        if not wrong or not result.lag or time.monotonic() >= until:
            break
        time.sleep(_LOOK_EVERY_S)
    for one in wrong:
        what = f"{one.name}: {one.left:,f} and {one.right:,f}, {one.detail}"
        yield Missing("reconciliation", what, int(abs(one.difference)) or 1, "`tally reconcile` shows all checks")


# Billed, and withdrawn ------------------------------------------------------------------------------------------------


def _voided(connection: "Connection[Any]", month: Month, payers: Collection[str]) -> Iterable[Missing]:
    """Voided documents of the month that are billed nowhere since; those of months before hold nothing up."""
    voids = [one for one in unbilled_voids(connection, until=month, accounts=payers) if one.month == month]
    if voids:
        sums: defaultdict[str, Decimal] = defaultdict(Decimal)
        for one in voids:
            sums[one.currency] += one.total
        places = [f"{one.number} of {one.account}" for one in voids]
        what = f"{len(voids):,} voided document{'s' * (len(voids) != 1)} billed nowhere else: {_named(places, ', ')}"
        todo = "`tally invoices reissue NUMBER` each of them"
        yield Missing("voided", what, len(voids), todo, tuple(sorted(sums.items())))


def _named(places: Sequence[str], separator: str = "; ") -> str:
    more = len(places) - _NAMED_MAX
    return separator.join(places[:_NAMED_MAX]) + (f" and {more:,} more" if more > 0 else "")


def _events(count: int) -> str:
    return f"{count:,} event{'s' * (count != 1)}"
