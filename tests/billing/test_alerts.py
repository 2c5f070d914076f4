"""Balances and alerts on real services: usage through the sink, then what the worker says."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from psycopg.types.json import Jsonb

from pipeline.billing import alerts, credits
from pipeline.billing.balances import stale
from pipeline.billing.credits import Asked
from pipeline.core.charges import Charge
from pipeline.core.contracts import Account, Contract
from pipeline.core.credits import Grant, Owed, draw
from pipeline.core.documents import kind_of, to_document
from pipeline.core.money import QUANTITY_ONE, scaled
from pipeline.core.plans import Plan, Pool
from pipeline.infra.avro import ALERTS, load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from tests.billing.rater import Rater
from tests.billing.records import MAY, NOON, rated_record
from tests.billing.running import meter, query, running_sink, wait_until

DAY = 86_400_000_000
ONE = 10**12
PRICE = "0.5"


def charge(id: str, **rest: Any) -> Charge:
    return Charge(id, "tokens", "per_unit", Decimal(PRICE), **rest)


def open_for_business(settings: Settings, *charges: Charge, pools: tuple[Pool, ...] = ()) -> None:
    plan = Plan("basic", 1, "Basic", "USD", 0, charges, pools)
    items = [Account("acct", 1, "Account", "UTC"), Contract("contract-acct", 1, "acct", "basic", 0, None)]
    with connect(settings.dsn, application="test") as connection:
        for item in (*items, meter(), plan):
            connection.execute(
                """INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
                VALUES (%s, %s, 1, '1970-01-01Z', %s, 'test')""",
                [kind_of(item), item.id, Jsonb(to_document(item))],
            )


def give(settings: Settings, grant: Grant, unit: str = "USD") -> int:
    reason = {"prepaid": "purchase", "promotional": "campaign"}[grant.kind]
    with connect(settings.dsn, application="test") as connection:
        request = credits.request_grant(connection, Asked("acct", unit, grant), reason=reason, note="", actor="ada")
        credits.decide(connection, request, "approved", actor="grace")
        alerts.update_now(connection, "acct")
    return request


class Usage:
    """Uses of charges, rated and billed as a rater and the sink do it."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rater, self.total = settings, Rater(settings), 0
        self.running: dict[str, int] = {}

    def add(self, *uses: tuple[str, int, int]) -> None:
        """(charge, time, quantity), in order of arrival."""
        records = []
        for id, at_us, quantity in uses:
            before = self.running.get(id, 0)
            records.append(
                rated_record(
                    key=f"k{self.total}",
                    timestamp=at_us,
                    charge=id,
                    quantity=quantity,
                    before=before,
                    amount=str(Decimal(PRICE) * quantity),
                )
            )
            self.running[id] = before + quantity
            self.total += 1
        with self.rater.transaction():
            self.rater.rated(records)

    def billed(self) -> bool:
        return query(self.settings, "SELECT count(*) FROM billing.rated_usage") == [(self.total,)]


@contextmanager
def working(settings: Settings, **options: Any) -> Iterator[None]:
    """The worker in a thread; what it raises comes out at the end."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            alerts.run(settings, stop, **options)
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive(), "told to stop, the worker stops"
    assert failures == []


def on_topic(settings: Settings) -> list[dict[str, Any]]:
    """Every committed alert."""
    schemas, found = load_schemas(), []
    consumer = Consumer(settings.kafka | {"group.id": "reads-alerts", "isolation.level": "read_committed"})
    try:
        topic = Topics(settings.topic_prefix).alerts
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        while message := consumer.poll(3 if not found else 0.5):
            assert message.error() is None
            assert message.key() == b"acct"
            found.append(schemas.decode(message.value(), ALERTS))
        return found
    finally:
        consumer.close()


def balances(settings: Settings) -> dict[tuple[str, str], tuple[Decimal, ...]]:
    rows = query(settings, "SELECT reduces, unit, balance, overdrawn, uncovered FROM finance.credit_balances")
    return {(row[0], row[1]): row[2:] for row in rows}


def test_balances_follow_usage_and_each_threshold_comes_once(settings: Settings) -> None:
    """A pool, a charge's own units, a budget and credits: half, then all and more, in two runs of the worker."""
    open_for_business(
        settings,
        charge("input"),
        charge("output", included=40 * QUANTITY_ONE),
        pools=(Pool("tokens", "token", 100 * QUANTITY_ONE, ("input",)),),
    )
    grant = give(settings, Grant("", 100 * ONE, 0))
    with connect(settings.dsn, application="test") as connection:
        credits.set_budget(connection, "acct", "USD", Decimal(60), actor="ada", note="")
    usage = Usage(settings)
    with running_sink(settings) as sink:
        usage.add(("input", NOON, 55), ("output", NOON, 10))
        wait_until(usage.billed, "the usage", sink)
        with working(settings):
            wait_until(lambda: balances(settings) == {("total", "USD"): (Decimal("67.5"), 0, 0)}, "the balance")
            wait_until(lambda: len(on_topic(settings)) == 2, "two alerts")
            usage.add(("input", NOON + 1, 200))
            wait_until(lambda: len(on_topic(settings)) == 9, "the rest")
        with working(settings):  # finds nothing new to say
            time.sleep(1.5)
    said = [(one["kind"], one["subject"], one["threshold"]) for one in on_topic(settings)]
    assert sorted(said[:2]) == [("budget", "", 50), ("pool", "tokens", 50)]
    assert sorted(said[2:]) == [
        ("budget", "", 80),
        ("budget", "", 100),
        ("credits", "total", 50),
        ("credits", "total", 80),
        ("credits", "total", 100),
        ("pool", "tokens", 80),
        ("pool", "tokens", 100),
    ]
    assert balances(settings) == {("total", "USD"): (Decimal(0), 0, Decimal("32.5"))}
    first = next(one for one in on_topic(settings) if one["kind"] == "pool")
    assert (first["used"], first["allowed"], first["unit"], first["hard_stop"]) == (55, 100, "token", False)
    assert (first["period_start"].isoformat(), first["period_end"].isoformat()) == (
        "2026-05-01T00:00:00+00:00",
        "2026-06-01T00:00:00+00:00",
    )
    (row,) = query(settings, "SELECT grant_id, estimated, remaining FROM finance.credits")
    assert row == (grant, 100, 0)


class Killed(BaseException):
    """The worker is gone at this point."""


def test_an_alert_sent_and_not_marked_is_not_sent_again(settings: Settings) -> None:
    open_for_business(settings, charge("input", included=10 * QUANTITY_ONE))
    usage = Usage(settings)

    def die(step: str) -> None:
        if step == "committed":
            raise Killed

    with running_sink(settings) as sink:
        usage.add(("input", NOON, 6))
        wait_until(usage.billed, "the usage", sink)
        with pytest.raises(Killed):
            alerts.run(settings, threading.Event(), reached=die)
        assert query(settings, "SELECT count(*) FROM billing.alert_outbox WHERE relayed_at IS NULL") == [(1,)]
        with working(settings):
            usage.add(("input", NOON, 3))
            wait_until(lambda: len(on_topic(settings)) >= 2, "the second threshold")
    assert [one["threshold"] for one in on_topic(settings)] == [50, 80]
    assert query(settings, "SELECT count(*) FROM billing.alert_outbox WHERE relayed_at IS NULL") == [(0,)]


def test_an_account_that_takes_long_rests_so_that_others_are_looked_at() -> None:
    """The rows of one with a grant that begins amid ten million events take seconds to sum, after each batch anew."""
    turns = alerts.Turns()
    turns.took("light", 0.01, now=100.0)
    turns.took("heavy", 3.0, now=100.0)
    turns.took("heaviest", 60.0, now=100.0)
    assert turns.resting(100.0) == ["heavy", "heaviest"]
    assert turns.resting(160.5) == ["heaviest"]  # a twentieth of the time
    assert turns.resting(340.5) == []  # while its last usage is still among what is looked at


def test_an_estimate_is_what_events_draw_one_by_one(settings: Settings) -> None:
    """Grants that begin and end among the events, for discounts and for payments."""
    open_for_business(settings, charge("input"), charge("output"))
    chance = random.Random(7)
    grants = [
        Grant("", 20 * ONE, 0, MAY + 10 * DAY, "promotional", "net"),
        Grant("", 30 * ONE, MAY + 5 * DAY, MAY + 20 * DAY, "promotional", "net", priority=1),
        Grant("", 25 * ONE, MAY + 3 * DAY, MAY + 12 * DAY),
        Grant("", 200 * ONE, MAY + 8 * DAY),
    ]
    ids = [give(settings, grant) for grant in grants]
    usage = Usage(settings)
    uses = [
        (chance.choice(["input", "output"]), MAY + chance.randrange(30 * DAY), chance.randrange(20)) for _ in range(80)
    ]
    with running_sink(settings) as sink:
        usage.add(*uses)
        wait_until(usage.billed, "the usage", sink)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        assert stale(connection, within=None, limit=10) == ["acct"]
        assert stale(connection, within=None, limit=10, but=["acct"]) == []
        alerts.update_now(connection, "acct")
        assert stale(connection, within=None, limit=10) == []
    owed = [
        Owed(at, f"{n:03}", f"{n}", id, scaled(Decimal(PRICE) * amount, 12)) for n, (id, at, amount) in enumerate(uses)
    ]
    named = [replace(grant, id=str(id), granted_us=id) for id, grant in zip(ids, grants, strict=True)]
    net = draw((grant for grant in named if grant.reduces == "net"), owed)
    rest = [one._replace(amount=net.uncovered.get(one.line, 0)) for one in owed]
    total = draw((grant for grant in named if grant.reduces == "total"), rest)
    expected = {int(grant.id): grant.amount - {**net.left, **total.left}[grant.id] for grant in named}
    found = {id: scaled(drawn, 12) for id, drawn in query(settings, "SELECT grant_id, estimated FROM finance.credits")}
    # A discount is spread over its line's events between two moments, so a payment may meet it elsewhere: by grant of
    # payments the estimate may differ, what remains to be paid does not.
    assert {id: found[id] for id in ids[:2]} == {id: expected[id] for id in ids[:2]}
    assert all(0 < drawn <= grant.amount for drawn, grant in zip((found[id] for id in ids), grants, strict=True))
    paid = sum(found.values()) + scaled(balances(settings)["total", "USD"][2], 12)
    assert paid == sum(one.amount for one in owed)


def test_services_stop_when_credits_and_overdraft_are_used_up_and_it_was_agreed(settings: Settings) -> None:
    open_for_business(settings, charge("input"))
    give(settings, Grant("", 10 * ONE, 0))
    usage = Usage(settings)
    with running_sink(settings) as sink, connect(settings.dsn, application="test", autocommit=True) as connection:
        credits.set_overdraft(connection, "acct", "USD", Decimal(5), hard_stop=True, actor="ada", note="")
        usage.add(("input", NOON, 24))
        wait_until(usage.billed, "the usage", sink)
        alerts.update_now(connection, "acct")
        assert balances(settings) == {("total", "USD"): (-2, 2, 0)}
        usage.add(("input", NOON, 10))
        wait_until(usage.billed, "more usage", sink)
        alerts.update_now(connection, "acct")
    assert balances(settings) == {("total", "USD"): (-5, 5, 2)}
    raised = query(settings, "SELECT threshold, used, allowed, hard_stop FROM finance.alerts ORDER BY alert_id")
    assert raised == [(50, 12, 15, False), (80, 12, 15, False), (100, 15, 15, True)]


def test_unit_credits_are_drawn_after_what_is_free(settings: Settings) -> None:
    open_for_business(
        settings,
        charge("input", included=5 * QUANTITY_ONE),
        charge("output"),
        pools=(Pool("tokens", "token", 10 * QUANTITY_ONE, ("output",)),),
    )
    grant = Grant("", 50 * QUANTITY_ONE, 0, None, "promotional", "units", charges=frozenset({"input", "output"}))
    give(settings, grant, "token")
    usage = Usage(settings)
    with running_sink(settings) as sink, connect(settings.dsn, application="test", autocommit=True) as connection:
        usage.add(("input", NOON, 20), ("output", NOON, 30))
        wait_until(usage.billed, "the usage", sink)
        alerts.update_now(connection, "acct")
    assert balances(settings) == {("units", "token"): (50 - 15 - 20, 0, 0)}
