"""Alerts: the worker that keeps balances up to date and says once when a threshold is reached.

An alert and its place in the outbox are written in the transaction that finds the threshold reached, under a unique
key: once per account, subject, period and threshold. One publication is one Kafka transaction. Whoever takes over reads
the topic to its end first and marks what is there, so each alert is on ``billing.alerts`` once, also after a crash
between a commit and its mark. Of several workers one is active, holding a lock in PostgreSQL; the others stand by.
"""

import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.rows import class_row

from pipeline.billing.balances import Watched, refresh, stale
from pipeline.billing.prices import read_catalog
from pipeline.core.catalog import Catalog
from pipeline.core.periods import to_datetime
from pipeline.infra import metrics
from pipeline.infra.avro import ALERTS, load_schemas
from pipeline.infra.logs import get_logger
from pipeline.infra.outbox import Reached, TopicWriter, run_active
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

log = get_logger(__name__)

#: Per cent of what is allowed at which an alert is raised.
THRESHOLDS = (50, 80, 100)

#: How often usage is looked at; seconds. So old a balance may be, and what computing it takes.
_LOOK_S = 1.0
#: Usage is looked for among lines updated within this time: far longer than a transaction of the sink takes.
_WITHIN = timedelta(minutes=5)
#: The part of the time that one account may take: of one whose grants begin and end amid its usage the rows are read.
_SHARE = 1 / 20
#: Longest an account rests; seconds. Less than ``_WITHIN``, or the end of its usage would not be looked at.
_REST_MAX_S = 240.0
#: Accounts whose prices are read at a time.
_ACCOUNTS_AT_ONCE = 500
#: Alerts sent in one transaction.
_ALERTS_AT_ONCE = 5_000

# Raising ------------------------------------------------------------------------------------------------------------

_INSERT_ALERT = """
WITH raised AS (
    INSERT INTO billing.alert
        (account, kind, subject, unit, period_start, period_end, threshold, used, allowed, hard_stop)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (account, kind, subject, unit, period_start, threshold) DO NOTHING RETURNING number
)
INSERT INTO billing.alert_outbox (number) SELECT number FROM raised
"""


def update(connection: "Connection[Any]", catalog: Catalog, account: str) -> int:
    """Bring an account's balances up to date and raise what they reach, in one transaction. How many alerts it raised.

    ``catalog`` holds what prices the account. Raises psycopg.Error.
    """
    with connection.transaction():
        return _raise(connection, account, refresh(connection, catalog, account))


def update_now(connection: "Connection[Any]", account: str) -> int:
    """As ``update``, for what changed without usage: a grant, a budget, an overdraft."""
    return update(connection, read_catalog(connection, [account]), account)


def _raise(connection: "Connection[Any]", account: str, watched: Iterable[Watched]) -> int:
    rows = [
        (
            account,
            one.kind,
            one.subject,
            one.unit,
            to_datetime(one.period_start_us),
            None if one.period_end_us is None else to_datetime(one.period_end_us),
            threshold,
            one.used,
            one.allowed,
            one.hard_stop and threshold == max(THRESHOLDS),
        )
        for one in watched
        for threshold in THRESHOLDS
        if (one.allowed > 0 or one.hard_stop) and is_reached(one.used, one.allowed, threshold)
    ]
    if not rows:
        return 0
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT_ALERT, rows)
        return max(cursor.rowcount, 0)


def is_reached(used: Decimal, allowed: Decimal, threshold: int) -> bool:
    """Whether so many per cent of what is allowed are used. Where nothing is allowed, only the last of them."""
    if allowed <= 0:
        return threshold == max(THRESHOLDS)
    return used * 100 >= allowed * threshold


# The worker ---------------------------------------------------------------------------------------------------------


def run(settings: Settings, stop: threading.Event, *, reached: Reached = lambda _: None) -> None:
    """Keep balances and send alerts until ``stop`` is set. While Kafka or PostgreSQL is away, wait with back-off.

    Raises psycopg.Error for anything but an absent server (a table missing), KafkaException for a fatal refusal
    (credentials), ValueError for a published version this program cannot read. These need a person.
    """
    metrics.serve(settings)

    def begin(connection: "Connection[Any]") -> Callable[[], None]:
        sender = _Sender(settings, connection, reached)
        sender.mark_sent()
        return lambda: _follow(connection, sender, stop)

    run_active(settings, stop, name="alerts", topic=Topics(settings.topic_prefix).alerts, begin=begin)


def _follow(connection: "Connection[Any]", sender: "_Sender", stop: threading.Event) -> None:
    """All accounts once, since usage may have come while nobody looked; then those with new usage."""
    within: timedelta | None = None
    turns = Turns()
    while not stop.is_set():
        while not stop.is_set():
            resting = turns.resting(time.monotonic())
            accounts = stale(connection, within=within, limit=_ACCOUNTS_AT_ONCE, but=resting)
            if not accounts:
                break
            catalog = read_catalog(connection, accounts)
            for account in accounts:
                began = time.monotonic()
                update(connection, catalog, account)
                turns.took(account, time.monotonic() - began, time.monotonic())
        within = _WITHIN
        while not stop.is_set() and sender.send():
            pass
        stop.wait(_LOOK_S)


class Turns:
    """Which accounts rest, so that none takes more than its part of the time and keeps the others waiting. Pure."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def took(self, account: str, seconds: float, now: float) -> None:
        """An account was brought up to date, in so long; what takes less than a look does may come with each."""
        if seconds > _LOOK_S * _SHARE:
            self._until[account] = now + min(seconds / _SHARE, _REST_MAX_S)

    def resting(self, now: float) -> list[str]:
        self._until = {account: until for account, until in self._until.items() if until > now}
        return list(self._until)


class _Alert(NamedTuple):
    """An alert in the outbox: fields of the schema."""

    number: int
    account: str
    kind: str
    subject: str
    unit: str
    threshold: int
    used: Decimal
    allowed: Decimal
    hard_stop: bool
    period_start: datetime
    period_end: datetime | None
    raised_at: datetime


_SELECT_WAITING = """
SELECT number, account, kind, subject, unit, threshold, used, allowed, hard_stop, period_start, period_end, raised_at
FROM billing.alert_outbox JOIN billing.alert USING (number)
WHERE relayed_at IS NULL ORDER BY number LIMIT %s
"""
_SELECT_ANY_WAITING = "SELECT EXISTS (SELECT FROM billing.alert_outbox WHERE relayed_at IS NULL)"
_MARK = "UPDATE billing.alert_outbox SET relayed_at = now() WHERE number = ANY(%s) AND relayed_at IS NULL"


class _Sender:
    """What carries alerts from the outbox to the topic, for as long as both connections hold."""

    def __init__(self, settings: Settings, connection: "Connection[Any]", reached: Reached) -> None:
        self._writer = TopicWriter(
            settings, Topics(settings.topic_prefix).alerts, name="alerts", messages_max=_ALERTS_AT_ONCE
        )
        self._schemas = load_schemas(settings.registry_url)
        self._connection = connection
        self._reached = reached

    def mark_sent(self) -> None:
        """Mark what is on the topic and was not marked: its sender ended between the two."""
        if self._connection.execute(_SELECT_ANY_WAITING).fetchone() == (True,):
            there = [int(self._schemas.decode(message.value(), ALERTS)["number"]) for message in self._writer.read()]
            self._connection.execute(_MARK, [there])

    def send(self) -> bool:
        """Carry what waits to the topic; False when nothing did.

        1. Write all of it in one transaction. 2. Mark it as sent.
        """
        with self._connection.cursor(row_factory=class_row(_Alert)) as cursor:
            waiting = cursor.execute(_SELECT_WAITING, [_ALERTS_AT_ONCE]).fetchall()
        if not waiting:
            return False
        # Step 1.
        messages = [(alert.account.encode(), self._schemas.encode(ALERTS, alert._asdict())) for alert in waiting]
        self._writer.write(messages, self._reached)
        # Step 2.
        self._connection.execute(_MARK, [[alert.number for alert in waiting]])
        self._reached("marked")
        metrics.ALERTS_SENT.inc(len(waiting))
        log.info("sent", alerts=len(waiting), first=waiting[0].number, last=waiting[-1].number)
        return True
