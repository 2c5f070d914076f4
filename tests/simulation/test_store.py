"""The store in memory answers the sink as PostgreSQL does: the same batches, the same tables."""

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from pipeline.billing.commit import PositionTaken, commit, prepare
from pipeline.billing.intake import Batch, Intake, Place
from pipeline.billing.lines import Lines
from pipeline.billing.months import ensure_months
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.rating.batch import Source
from tests.rating.world import SCHEMAS, account, contract
from tests.simulation.kafka import Message
from tests.simulation.store import RECEIPT, Session
from tests.simulation.world import HOUR_MS, SINK_PLACES, TOPICS, World, simulated

Tables = dict[str, list[tuple[Any, ...]]]


def _history() -> list[Message]:
    """What raters wrote in a history with repeats, conflicts, parked and junk; then rows, receipts and junk doubled."""
    with simulated():
        world = World()
        try:
            for key, tokens, partition in ((0, "10", None), (0, "10", None), (0, "75", None), (1, "many", 1)):
                for name in ("a", "d", "b"):
                    world.send(name, key, tokens, partition)
            world.send_junk(0)
            _work(world)
            world.publish(account("b"), contract("b"))
            world.publish_prices()
            world.replay(0, 1)
            world.send("a", 3, "10")
            world.send("d", 3, "10")
            _work(world)
        finally:
            world.close()
    for topic in (TOPICS.rated, TOPICS.receipts):
        for partition in (0, 1):
            log = world.broker.logs[topic, partition]
            for entry in list(log.committed())[:3]:
                world.broker.append((topic, partition), entry.key, entry.value)
            world.broker.append((topic, partition), None, b"junk")
    logs = world.broker.logs
    messages = [Message(*place, entry.offset, entry) for place in SINK_PLACES for entry in logs[place].committed()]
    return sorted(messages, key=lambda message: message.timestamp()[1])


def _work(world: World) -> None:
    for _ in range(3):
        world.broker.pass_time(HOUR_MS)
        for worker in world.workers.values():
            worker.read_catalog()
            for number in worker.raters:
                for source in Source:
                    worker.fetch(number, source)
                worker.work(number)


def _batches(messages: list[Message], size: int) -> Iterator[Batch]:
    """The messages in batches, all of it, and then all of it again as after positions were set back by hand."""
    for _ in range(2):
        positions: dict[Place, int] = dict.fromkeys(SINK_PLACES, 0)
        intake = Intake(TOPICS, SCHEMAS)
        for start in range(0, len(messages), size):
            batch = intake.sort(messages[start : start + size], positions)
            positions |= {place: following for place, (_, following) in batch.moves.items()}
            yield batch


_BACK = "UPDATE billing.sink_position SET next_offset = 0"
_ISSUE = "UPDATE billing.invoice SET state = 'issued' WHERE account = 'd'"


def _in_postgres(settings: Settings, batches: list[Batch]) -> Tables:
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        ensure_months(connection, [date(2026, 3, 1)])
        prepare(connection)
        for place in SINK_PLACES:
            connection.execute("INSERT INTO billing.sink_position VALUES (%s, %s, 0)", place)
        lines = Lines()
        for number, batch in enumerate(batches):
            if number == len(batches) // 2:
                connection.execute(_BACK)
            if number == len(batches) // 4:
                connection.execute(_ISSUE)
            commit(connection, batch, lines, TOPICS, lambda step: None)
        with pytest.raises(PositionTaken):
            commit(connection, batches[0], lines, TOPICS, lambda step: None)
        found = {name: connection.execute(statement).fetchall() for name, statement in _TABLES.items()}
    return _sorted(found)


_RECEIPT = ("topic", "partition", "first_offset", "next_offset", "rated_rows", "committed_at")
_TABLES = {
    "position": "SELECT topic, partition, next_offset FROM billing.sink_position",
    "line": """SELECT account, supplement, charge, plan_version, price_class::text, quantity, amount, events
        FROM billing.invoice_line JOIN billing.invoice ON invoice.id = invoice_id""",
    "rated": """SELECT identity, charge, rated_partition, rated_offset, origin_partition, origin_offset, quantity,
        amount FROM billing.rated_usage""",
    "receipt": f"SELECT {', '.join(_RECEIPT)} FROM billing.receipt",
    "unrated": """SELECT origin_partition, origin_offset, state, letter_topic, letter_partition, letter_offset
        FROM billing.unrated_event""",
    "quarantine": "SELECT reason, rated_topic, rated_partition, rated_offset FROM billing.quarantine",
}


def _in_memory(batches: list[Batch]) -> Tables:
    with simulated():
        world = World()
        try:
            return _in_session(world, batches)
        finally:
            world.close()


def _in_session(world: World, batches: list[Batch]) -> Tables:
    tables = world.store.tables
    tables["position"] |= dict.fromkeys(SINK_PLACES, 0)
    session: Any = Session(world.store)
    lines = Lines()
    for number, batch in enumerate(batches):
        if number == len(batches) // 2:
            tables["position"] |= dict.fromkeys(SINK_PLACES, 0)
        if number == len(batches) // 4:
            for key, invoice in tables["invoice"].items():
                tables["invoice"][key] = invoice | {"state": "issued"} if key[0] == "d" else invoice
        commit(session, batch, lines, TOPICS, lambda step: None)
    with pytest.raises(PositionTaken):
        commit(session, batches[0], lines, TOPICS, lambda step: None)
    invoices = {invoice["id"]: (key[0], key[4]) for key, invoice in tables["invoice"].items()}
    found: Tables = {
        "position": [(*place, offset) for place, offset in tables["position"].items()],
        "line": [
            (
                *invoices[line["invoice_id"]],
                line["charge"],
                line["plan_version"],
                line["price_class"],
                _scaled(line["quantity"], 9),
                _scaled(line["amount"], 12),
                line["events"],
            )
            for line in tables["line"].values()
        ],
        "rated": [
            (
                *(row[name] for name in ("identity", "charge", "rated_partition", "rated_offset")),
                *(int(row[name]) for name in ("origin_partition", "origin_offset")),
                _scaled(row["quantity"], 9),
                _scaled(row["amount"], 12),
            )
            for row in tables["rated"].values()
        ],
        "receipt": [tuple(row[RECEIPT.index(name)] for name in _RECEIPT) for row in tables["receipt"].values()],
        "unrated": [
            (*key[1:], row["state"], row["letter_topic"], row["letter_partition"], row["letter_offset"])
            for key, row in tables["unrated"].items()
        ],
        "quarantine": [(row[0], *place) for place, row in tables["quarantine"].items()],
    }
    return _sorted(found)


def _scaled(value: int, decimals: int) -> Decimal:
    return Decimal(value).scaleb(-decimals)


def _sorted(tables: Tables) -> Tables:
    """Rows in one order; numbers without the zeros that a sum takes over from its parts."""
    return {
        name: sorted(
            (tuple(value.normalize() if isinstance(value, Decimal) else value for value in row) for row in rows),
            key=repr,
        )
        for name, rows in tables.items()
    }


@pytest.mark.parametrize("size", [3, 10])
def test_the_store_answers_as_postgres_does(settings: Settings, size: int) -> None:
    batches = list(_batches(_history(), size))
    real = _in_postgres(settings, batches)
    assert _in_memory(batches) == real
    assert {row[0] for row in real["quarantine"]} == {"already_billed", "already_receipted", "undecodable"}
    assert {row[:2] for row in real["line"]} == {("a", 0), ("b", 0), ("d", 0), ("d", 1)}
    assert {row[2] for row in real["unrated"]} == {"rated", "duplicate", "dead_lettered"}
