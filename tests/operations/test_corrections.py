"""Corrections against real raters and sinks: previewed, decided, applied once, whatever dies when."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from confluent_kafka import Producer

from pipeline.billing import rerate
from pipeline.billing.reconcile import reconcile
from pipeline.core.corrections import ReasonCode
from pipeline.operations import corrections
from pipeline.operations.corrections import Decided, Decision, Pick, Selection
from pipeline.operations.events import Mend, parse_mend
from pipeline.operations.peek import peek
from pipeline.operations.previews import preview
from tests.billing.running import tamper
from tests.operations.world import INPUT_PRICE, OUTPUT_PRICE, SCHEMAS, World, eventually

_DIES = """
import os, signal, sys
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations import corrections

def on_step(step):
    os.kill(os.getpid(), signal.SIGKILL)

settings = Settings()
corrections.send(connect(settings.dsn, application="dies", autocommit=True), settings, on_step=on_step)
"""


def decide(world: World, picks: Sequence[Pick], *sets: str, actor: str = "ada") -> Decided:
    mend = parse_mend(list(sets)) if sets else Mend()
    action: Any = "replace" if sets else "void"
    decision = Decision(action, ReasonCode.TEST_USAGE, "a trial", actor, mend)
    return corrections.decide(world.connection, world.settings, SCHEMAS, picks, decision)


def correct(world: World, picks: Sequence[Pick], *sets: str) -> list[int]:
    """Decide, send, and wait until it is applied."""
    decided = decide(world, picks, *sets)
    assert decided.refused == []
    assert corrections.send(world.connection, world.settings) == len(decided.numbers)
    settled(world, decided.numbers, "applied")
    return decided.numbers


def settled(world: World, numbers: Sequence[int], state: str) -> None:
    eventually(
        lambda: corrections.states(world.connection, numbers), lambda states: dict(states) == {state: len(numbers)}
    )


def pick(world: World, key: str, account: str = "acct-1") -> Pick:
    return corrections.find(world.connection, [(account, key)])[account, key]


def emitted(world: World, *keys: str, **properties: str) -> None:
    for key in keys:
        world.event(key, **properties)
    eventually(
        lambda: world.scalar("SELECT count(DISTINCT identity) FROM billing.rated_usage"), lambda n: n >= len(keys)
    )


def lines(world: World) -> dict[str, tuple[Decimal, Decimal, int]]:
    rows = world.connection.execute("SELECT charge, quantity, amount, events FROM billing.invoice_line").fetchall()
    return {charge: rest for charge, *rest in map(tuple, rows)}  # type: ignore[misc]


def entries(world: World, key: str) -> list[tuple[int, str, Decimal]]:
    return world.connection.execute(
        "SELECT entry, kind::text, quantity FROM billing.rated_usage "
        "WHERE idempotency_key = %s AND charge = 'input' ORDER BY entry",
        [key],
    ).fetchall()


def test_voided_replaced_and_voided_again(world: World) -> None:
    with world.rater(), world.sink():
        emitted(world, "a", "b", input_tokens="400000")
        chosen = corrections.select(world.connection, Selection(account="acct-1"))
        assert [one.idempotency_key for one in chosen] == ["a", "b"]
        billed = {one.charge: tuple(one)[3:] for one in preview(world.connection, chosen).held}
        both = 500_000 * INPUT_PRICE + 300_000 * INPUT_PRICE / 2
        assert billed["input"] == (2, 800_000, both, 0, -both)
        [alone] = [one for one in preview(world.connection, chosen[:1]).held if one.charge == "input"]
        assert (alone.amount, alone.change) == (400_000 * INPUT_PRICE, 400_000 * INPUT_PRICE - both)

        # b came to 100,000 at the first price and 300,000 at the second. Without a, all of it is at the first.
        correct(world, [pick(world, "a")])
        assert tuple(lines(world)["input"]) == (400_000, 400_000 * INPUT_PRICE, 1)
        assert tuple(lines(world)["output"]) == (2, 2 * OUTPUT_PRICE, 1)
        assert [one.idempotency_key for one in corrections.select(world.connection, Selection(account="acct-1"))] == [
            "b"
        ]
        [refused] = decide(world, [pick(world, "a")]).refused
        assert "was voided" in refused[1] and "under a new key" in refused[1]

        correct(world, [pick(world, "b")], "input_tokens=7")
        assert tuple(lines(world)["input"]) == (7, 7 * INPUT_PRICE, 1)
        [refused] = decide(world, [pick(world, "b")], "input_tokens=7").refused
        assert "says all of that already" in refused[1]
        correct(world, [pick(world, "b")], "input_tokens=9", "output_tokens=0")
        correct(world, [pick(world, "b")])
        assert {tuple(line) for line in lines(world).values()} == {(0, 0, 0)}

        # The key stays used up.
        world.event("b", input_tokens="400000", at_us=None)
        eventually(lambda: world.scalar("SELECT count(*) FROM billing.unrated_event"), lambda count: count == 1)
    assert entries(world, "b") == [
        (0, "usage", 400_000),
        (1, "void", -400_000),
        (2, "correction", 7),
        (3, "void", -7),
        (4, "correction", 9),
        (5, "void", -9),
    ]
    listed = corrections.listed(world.connection)
    assert [(one.action, one.idempotency_key, one.state) for one in listed] == [
        ("void", "b", "applied"),
        ("replace", "b", "applied"),
        ("replace", "b", "applied"),
        ("void", "a", "applied"),
    ]
    assert (listed[3].decided_by, listed[3].reason_code, listed[3].note) == ("ada", "test_usage", "a trial")
    assert listed[1].exact_amount == 2 * INPUT_PRICE - 2 * OUTPUT_PRICE
    assert world.scalar("SELECT count(*) FROM billing.quarantine") == 0
    assert [check for check in reconcile(world.settings).checks if check.difference] == []
    # Closing what was added and voided is closing without it: nothing is left to book.
    assert list(rerate.preview(world.settings.dsn, rerate.Month.parse(f"{datetime.now(UTC):%Y-%m}"))) == []
    receipts = "SELECT sum(corrections), sum(rated_rows), sum(records) FROM billing.receipt"
    assert world.connection.execute(receipts).fetchone() == (4, 4 + 2 + 4 + 4 + 2, 3 + 4)


def test_what_is_refused_by_the_command_by_the_rater_and_by_the_sink(world: World) -> None:
    with world.rater():
        with world.sink():
            emitted(world, "a", "b")
            # What cannot be rated changes nothing, is shown, and may be decided anew.
            numbers = decide(world, [pick(world, "b")], "input_tokens=many").numbers
            corrections.send(world.connection, world.settings)
            settled(world, numbers, "refused")
            letter = world.connection.execute("SELECT reason, idempotency_key FROM billing.unrated_event").fetchone()
            assert letter == ("not_a_number", "b")
            correct(world, [pick(world, "b")], "input_tokens=5")
            assert entries(world, "b") == [(0, "usage", 10), (3, "void", -10), (4, "correction", 5)]

            world.connection.execute("UPDATE billing.invoice SET state = 'reviewed'")
            [refused] = decide(world, [pick(world, "a")]).refused
            assert "closed period" in refused[1] and "adjustment" in refused[1]
            tamper(world.settings, "UPDATE billing.invoice SET state = 'open'")
        # Nobody writes the rows: they are on their way.
        first = decide(world, [pick(world, "a")])
        [refused] = decide(world, [pick(world, "a")], "input_tokens=1").refused
        assert f"correction {first.numbers[0]}" in refused[1]
        assert corrections.send(world.connection, world.settings) == 1
        assert len(decide(world, [pick(world, "a")]).refused) == 1

        # The period closes before the rows come: they stand in its supplement, and nothing billed is touched.
        world.connection.execute("UPDATE billing.invoice SET state = 'issued'")
        with world.sink():
            settled(world, first.numbers, "applied")
    found = world.connection.execute(
        """SELECT supplement, quantity::int, events FROM billing.invoice_line AS line
        JOIN billing.invoice ON invoice.id = invoice_id WHERE charge = 'output' ORDER BY 1"""
    ).fetchall()
    assert found == [(0, 4, 2), (1, -2, -1)]


def test_an_event_that_is_half_written_is_not_corrected_by_half(world: World) -> None:
    """All rows of an event or none: what the sink had yet to write would stay billed."""
    with world.rater(), world.sink():
        emitted(world, "a")
    partition = world.scalar("SELECT DISTINCT rated_partition FROM billing.rated_usage")
    assert decide(world, [pick(world, "a")]).refused == []  # the last in the log, and whole
    world.event("b")
    with world.rater(), world.sink():
        eventually(lambda: world.billed("b"), lambda rows: len(rows) == 2)
    # As a sink leaves it whose batch ended between the two rows of the event.
    cut = world.scalar("SELECT max(rated_offset) FROM billing.rated_usage")
    tamper(world.settings, "DELETE FROM billing.rated_usage WHERE rated_offset = %s", cut)
    world.connection.execute(
        "UPDATE billing.sink_position SET next_offset = %s WHERE (topic, partition) = (%s, %s)",
        [cut, world.topics.rated, partition],
    )
    [(_, why)] = decide(world, [pick(world, "b")]).refused
    assert "not all of its rows are there" in why
    with world.sink():
        eventually(lambda: world.billed("b"), lambda rows: len(rows) == 2)
    assert decide(world, [pick(world, "b")]).refused == []


def test_a_repeat_of_the_event_s_rows_does_not_settle_a_correction(world: World) -> None:
    """Were it taken for settled, a second one could be decided, and both would take the event back."""
    with world.rater(), world.sink():
        emitted(world, "a")
        numbers = decide(world, [pick(world, "a")]).numbers
        rows = "SELECT rated_partition, rated_offset FROM billing.rated_usage LIMIT 1"
        [(partition, offset)] = world.connection.execute(rows).fetchall()
        again = next(peek(world.settings, {(world.topics.rated, partition): offset}, most=1))
        producer = Producer(world.settings.kafka)
        producer.produce(world.topics.rated, again.value(), again.key(), partition)
        assert producer.flush(15) == 0
        eventually(lambda: world.scalar("SELECT count(*) FROM billing.quarantine"), lambda count: count == 1)
        assert dict(corrections.states(world.connection, numbers)) == {"unsent": 1}
        [(_, why)] = decide(world, [pick(world, "a")]).refused
        assert "on its way" in why
        corrections.send(world.connection, world.settings)
        settled(world, numbers, "applied")
    assert {tuple(line) for line in lines(world).values()} == {(0, 0, 0)}


def test_sent_twice_and_written_twice_it_is_applied_once(world: World) -> None:
    """Both locks of law 7: the rater knows a correction again, and PostgreSQL takes each row of it once."""
    with world.rater(), world.sink():
        emitted(world, "a", "b")
        numbers = decide(world, [pick(world, "a"), pick(world, "b")]).numbers
        died = subprocess.run([sys.executable, "-c", _DIES], env=world.environment(), timeout=60)
        assert died.returncode == -signal.SIGKILL
        settled(world, numbers, "applied")
        eventually(lambda: world.scalar("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"), lambda n: n == 0)
        # It was not told that they went: they go again.
        assert corrections.send(world.connection, world.settings) == 2
        assert corrections.send(world.connection, world.settings) == 0
        duplicates = "SELECT coalesce(sum(duplicates), 0) FROM billing.receipt WHERE topic = %s"
        eventually(lambda: world.scalar(duplicates, world.topics.retry), lambda count: count == 2)
        assert entries(world, "a") == [(0, "usage", 10), (1, "void", -10)]
        assert world.scalar("SELECT count(*) FROM billing.quarantine") == 0

        # A rater that had forgotten would write the rows again.
        rows = "SELECT rated_partition, rated_offset FROM billing.rated_usage WHERE kind = 'void' LIMIT 1"
        [(partition, offset)] = world.connection.execute(rows).fetchall()
        again = next(peek(world.settings, {(world.topics.rated, partition): offset}, most=1))
        producer = Producer(world.settings.kafka)
        producer.produce(world.topics.rated, again.value(), again.key(), partition)
        assert producer.flush(15) == 0
        eventually(lambda: world.scalar("SELECT count(*) FROM billing.quarantine"), lambda count: count == 1)
    assert world.scalar("SELECT reason FROM billing.quarantine") == "already_billed"
    assert {tuple(line) for line in lines(world).values()} == {(0, 0, 0)}
    assert dict(corrections.states(world.connection, numbers)) == {"applied": 2}
