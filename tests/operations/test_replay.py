"""Replays against real raters and sinks: judged again, billed at most once, whatever dies when."""

import signal
import subprocess
import sys
import time
from decimal import Decimal
from typing import Any

import pytest
from confluent_kafka import Producer

from pipeline.infra.avro import DEAD_LETTER
from pipeline.infra.postgres import connect
from pipeline.infra.topics import partition_of
from pipeline.operations import dead_letters
from pipeline.operations.dead_letters import Origin, Pick, Selection
from pipeline.operations.events import parse_mend
from pipeline.operations.peek import peek
from pipeline.operations.replay import Replayed, ReplayError, replay
from tests.operations.world import INPUT_PRICE, OUTPUT_PRICE, SCHEMAS, World, account_items, eventually

#: Killed at a step: how a process leaves when the machine goes away.
_DIES = """
import os, signal, sys, time
from pipeline.infra.avro import load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations import dead_letters
from pipeline.operations.events import parse_mend
from pipeline.operations.replay import replay

def on_step(step):
    if step == sys.argv[1]:
        time.sleep(0.3)  # what was produced has left the client
        os.kill(os.getpid(), signal.SIGKILL)

settings = Settings()
connection = connect(settings.dsn, application="dies", autocommit=True)
picks = dead_letters.to_replay(connection, dead_letters.Selection())
replay(connection, settings, load_schemas(), picks, why="try", mend=parse_mend(["input_tokens=5"]), on_step=on_step)
"""


def pick(world: World, origin: Origin) -> Pick:
    event = dead_letters.find(world.connection, [origin])[origin]
    return Pick(origin, event.replays, event.reason or "", event.unfinished)


def replayed(world: World, *origins: Origin, sets: tuple[str, ...] = (), **options: Any) -> Replayed:
    picks = [pick(world, origin) for origin in origins]
    mend = parse_mend(list(sets))
    return replay(world.connection, world.settings, SCHEMAS, picks, why="test", mend=mend, **options)


def is_dead(world: World, *origins: Origin, replays: int = 0) -> None:
    for origin in origins:
        eventually(
            lambda origin=origin: world.row(origin),
            lambda row: row.get("state") == "dead_lettered" and row["replays"] == replays,
        )


def letters_on_retry(world: World) -> int:
    places = {(world.topics.retry, partition): 0 for partition in range(world.settings.partitions)}
    return sum(1 for _ in peek(world.settings, places))


AMOUNTS = [("acct-1", "input", 5 * INPUT_PRICE), ("acct-1", "output", 2 * OUTPUT_PRICE)]


def test_a_mended_event_is_billed_once_however_often_it_is_replayed(world: World) -> None:
    origin = world.event("bad", input_tokens="many")
    original = None
    with world.rater(), world.sink():
        is_dead(world, origin)
        original = world.row(origin)["value"]

        assert replayed(world, origin).sent == [origin]  # as it came: refused for the same reason
        is_dead(world, origin, replays=1)
        assert world.row(origin)["reason"] == "not_a_number"

        stale = pick(world, origin)
        assert replayed(world, origin, sets=("input_tokens=5",)).sent == [origin]
        # A second command that chose the event before: nothing happens.
        again = replay(world.connection, world.settings, SCHEMAS, [stale], why="test", mend=parse_mend(["x=1"]))
        assert (again.sent, again.moved_on) == ([], [origin])
        eventually(lambda: world.state(origin), lambda state: state == "rated")
        assert world.billed("bad") == AMOUNTS

        # The letter once more, as if two commands had sent it: a duplicate, not a second bill.
        places = {(world.topics.retry, origin.partition): 0}
        letter = next(
            message.value()
            for message in peek(world.settings, places)
            if SCHEMAS.decode(message.value(), DEAD_LETTER)["replays"] == 2
        )
        producer = Producer(world.settings.kafka)
        producer.produce(world.topics.retry, letter, b"acct-1", origin.partition)
        assert producer.flush(15) == 0
        duplicates = "SELECT coalesce(sum(duplicates), 0) FROM billing.receipt WHERE topic = %s"
        eventually(lambda: world.scalar(duplicates, world.topics.retry), lambda count: count == 1)
        assert world.billed("bad") == AMOUNTS
        assert world.state(origin) == "rated"
    assert world.scalar("SELECT count(*) FROM billing.quarantine") == 0
    assert world.scalar("SELECT events FROM billing.invoice_line WHERE charge = 'input'") == 1
    first, second = dead_letters.history(world.connection, origin)
    assert first.detail == {"why": "test", "reason": "not_a_number", "replays": 1}
    assert second.detail["set"] == {"input_tokens": "5"}
    assert bytes.fromhex(second.detail["original_value"]) == original


def test_age_account_and_bytes_of_replayed_events(world: World) -> None:
    old = world.event("old", at_us=10**15)
    stray = world.event("stray", "nobody", at_us=10**15)
    noise = world.raw(b"\xff" * 40)
    with world.rater(), world.sink():
        is_dead(world, old, stray, noise)

        done = replayed(world, noise, sets=("input_tokens=5",))
        assert done.sent == [] and done.refused[0][0] == noise
        assert "cannot be mended" in done.refused[0][1]
        assert world.row(noise)["replays"] == 0

        # Under another account a repeat of the same event would be billed too: only where the first cannot be.
        done = replayed(world, old, sets=("account=acct-2",))
        assert done.sent == [] and "acct-1 is known" in done.refused[0][1]

        # A replay makes no event younger; only another time does. The other account has another partition.
        now = f"timestamp={time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
        assert partition_of(b"acct-2", world.settings.partitions) != stray.partition
        replayed(world, old, noise)
        replayed(world, stray, sets=(now, "input_tokens=7", "account=acct-2"))
        is_dead(world, old, noise, replays=1)
        assert world.row(old)["reason"] == "too_old"
        assert world.row(noise)["reason"] == "undecodable"
        assert world.row(noise)["value"] == b"\xff" * 40
        assert world.row(noise)["letter_partition"] == noise.partition
        eventually(lambda: world.state(stray), lambda state: state == "rated")
        assert world.billed("stray")[0] == ("acct-2", "input", 7 * INPUT_PRICE)

        replayed(world, old, sets=(now,))
        eventually(lambda: world.state(old), lambda state: state == "rated")
        assert len(world.billed("old")) == 2


def test_discard_and_undo(world: World) -> None:
    origin = world.event("bad", input_tokens="many")
    with world.rater(), world.sink():
        is_dead(world, origin)
        chosen = dead_letters.to_discard(world.connection, Selection(reason="not_a_number"))
        assert dead_letters.discard(world.connection, chosen, actor="ada", why="a test key") == [origin]
        assert dead_letters.discard(world.connection, chosen, actor="ada", why="again") == []
        row = world.row(origin)
        assert (row["state"], row["decision"], row["decided_by"]) == ("dead_lettered", "discard", "ada")
        [counted] = dead_letters.reasons(world.connection, Selection())
        assert (counted.events, counted.discarded) == (1, 1)
        assert dead_letters.to_replay(world.connection, Selection()) == []
        assert dead_letters.to_discard(world.connection, Selection()) == []

        replayed(world, origin, sets=("input_tokens=5",))
        eventually(lambda: world.state(origin), lambda state: state == "rated")
    assert world.billed("bad") == AMOUNTS
    assert [one.action for one in dead_letters.history(world.connection, origin)] == ["dlq.discard", "dlq.replay"]


@pytest.mark.parametrize("step", ["decided", "produced", "sent"])
def test_a_command_killed_at_any_step_is_finished_by_the_next(world: World, step: str) -> None:
    origin = world.event("bad", input_tokens="many")
    with world.rater():
        with world.sink():
            is_dead(world, origin)
        # Nobody reads the retry topic into the table: only the topic itself can tell what was sent.
        died = subprocess.run([sys.executable, "-c", _DIES, step], env=world.environment(), timeout=60)
        assert died.returncode == -signal.SIGKILL
        assert world.state(origin) == "replaying"
        assert pick(world, origin).unfinished
        eventually(_nobody_else_replays(world))
        with pytest.raises(ReplayError, match="finish it first"):
            replayed(world, origin, sets=("input_tokens=6",))

        assert dead_letters.to_replay(world.connection, Selection()) == [pick(world, origin)]
        assert replayed(world, origin).finished == [origin]
        assert replayed(world, origin).finished == [origin]
        assert letters_on_retry(world) == 1
        with world.sink():
            eventually(lambda: world.state(origin), lambda state: state == "rated")
    assert world.billed("bad") == AMOUNTS
    actions = [one.action for one in dead_letters.history(world.connection, origin)]
    assert actions == (["dlq.replay"] if step == "sent" else ["dlq.replay", "dlq.replay.finish"])


def _nobody_else_replays(world: World) -> Any:
    """PostgreSQL notices a killed client a moment later."""
    return lambda: world.scalar("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_a_replay_does_not_wait_behind_parked_events(world: World) -> None:
    stranger = world.event("who", "acct-9")
    bad = world.event("bad", input_tokens="many")
    assert stranger.partition == bad.partition
    with world.rater(), world.sink():
        # Four attempts on, the next one is eight seconds away.
        eventually(lambda: world.row(stranger), lambda row: row.get("attempts") == 4)
        replayed(world, bad, sets=("input_tokens=5",))
        eventually(lambda: world.state(bad), lambda state: state == "rated", seconds=6)
        assert world.state(stranger) == "parked"
        world.publish(*account_items("acct-9"))
        eventually(lambda: world.state(stranger), lambda state: state == "rated")


def test_one_replay_at_a_time(world: World) -> None:
    origin = world.event("bad", input_tokens="many")
    with world.rater(), world.sink():
        is_dead(world, origin)
        refused: list[str] = []

        def meanwhile(step: str) -> None:
            with (
                connect(world.settings.dsn, application="other", autocommit=True) as other,
                pytest.raises(ReplayError, match="another"),
            ):
                replay(other, world.settings, SCHEMAS, [], why="test")
            refused.append(step)

        replayed(world, origin, on_step=meanwhile)
    assert refused == ["decided", "produced", "sent"]


def test_money_at_risk_is_the_event_priced_alone(world: World) -> None:
    old = world.event("old", at_us=10**15, input_tokens="600000")
    world.event("bad", input_tokens="many")
    world.raw(b"\xff" * 40)
    stranger = world.event("who", "acct-9")
    with world.rater(), world.sink():
        is_dead(world, old)
        eventually(lambda: world.state(stranger), lambda state: state == "parked")
        eventually(lambda: world.scalar("SELECT count(*) FROM billing.unrated_event"), lambda count: count == 4)
    estimate, totals = dead_letters.at_risk(world.connection, Selection(), SCHEMAS)
    # 500,000 in the first tier and 100,000 in the second, and two units of output.
    expected = 500_000 * INPUT_PRICE + 100_000 * INPUT_PRICE / 2 + 2 * OUTPUT_PRICE
    assert totals["too_old"].amounts == {"USD": expected}
    assert (totals["not_a_number"].priced, totals["not_a_number"].unknown) == (0, 1)
    assert totals["undecodable"].unknown == 1
    assert estimate(world.row(stranger)["value"]) is None
    money = estimate(world.row(old)["value"])
    assert money is not None and money.amount == Decimal("1.65003") and money.currency == "USD"


def test_what_was_written_to_the_retry_topic_is_no_usage_event(world: World) -> None:
    garbage = world.raw(b"\xff" * 40, topic=world.topics.retry)
    bad = world.event("bad", input_tokens="many")
    with world.rater(), world.sink():
        is_dead(world, garbage, bad)
        done = replayed(world, garbage, bad)
        assert done.sent == [bad]
        assert done.refused == [
            (
                garbage,
                f"is no usage event: it arrived on {world.topics.retry}, not on {world.topics.events}: discard it",
            )
        ]
        assert (world.state(garbage), world.row(garbage)["replays"]) == ("dead_lettered", 0)
        chosen = dead_letters.to_discard(world.connection, Selection(reason="undecodable"))
        assert dead_letters.discard(world.connection, chosen, actor="ada", why="a test") == [garbage]
