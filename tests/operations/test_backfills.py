"""Backfills against real raters and sinks: staged, looked at, committed over an interruption, reverted as a whole."""

import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from pipeline.core.corrections import ReasonCode
from pipeline.infra.avro import EVENTS
from pipeline.infra.postgres import connect
from pipeline.operations import backfills, corrections
from pipeline.operations.backfills import BackfillError, Outcome, Staged
from pipeline.operations.corrections import Decision
from pipeline.operations.events import Mend
from pipeline.operations.peek import peek
from tests.billing.running import query
from tests.operations.world import OUTPUT_PRICE, SCHEMAS, World, account_items, eventually

#: Killed when Kafka has confirmed the first portion, and nobody wrote that down.
_DIES = """
import os, signal
from pipeline.infra.avro import load_schemas
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations import backfills

backfills.PORTION = 3
settings = Settings()
connection = connect(settings.dsn, application="dies", autocommit=True)
on_step = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == "confirmed" else None
backfills.commit(connection, settings, load_schemas(), "june", actor="ada", on_step=on_step)
"""


def staged(key: str, account: str = "acct-1", hours_ago: float = 1, **properties: str) -> Staged:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=hours_ago)
    return Staged(account, key, "llm.request", at, "", {"input_tokens": "10", "output_tokens": "2"} | properties)


def stage(world: World, *events: Staged, name: str = "june") -> backfills.Backfill:
    return backfills.stage(world.connection, name, events, note="from the old logs", actor="ada")


def commit(world: World, name: str = "june", **options: float) -> backfills.Backfill:
    return backfills.commit(world.connection, world.settings, SCHEMAS, name, actor="ada", **options)  # type: ignore[arg-type]


def revert(world: World, name: str = "june") -> tuple[int, str]:
    """Events taken back, and the state after it."""
    picks = backfills.begin_revert(world.connection, world.settings, name, actor="ada", wait_s=20)
    decision = Decision("void", ReasonCode.BACKFILL, "wrong file", "ada", Mend(), name)
    decided = corrections.decide(world.connection, world.settings, SCHEMAS, picks, decision)
    assert decided.refused == []
    corrections.send(world.connection, world.settings)
    eventually(
        lambda: corrections.states(world.connection, decided.numbers),
        lambda states: states["applied"] == len(decided.numbers),
    )
    return len(decided.numbers), backfills.end_revert(world.connection, name, actor="ada").state


def test_staged_committed_over_a_crash_and_reverted_as_a_whole(world: World) -> None:
    with world.rater(), world.sink():
        live = world.event("live", at_us=(at := int(time.time()) * 1_000_000))
        same = Staged("acct-1", "live", "llm.request", datetime.fromtimestamp(at / 1e6, UTC), "user-7",
                      {"input_tokens": "10", "output_tokens": "2"})  # fmt: skip
        eventually(lambda: world.billed("live"))
        begun = stage(world, *(staged(f"k{n}") for n in range(5)), same, staged("who", "acct-9"))
        assert (begun.state, begun.events, begun.sent, begun.source) == ("staged", 7, 0, "backfill-june/1")
        found = {
            one.what.split(":")[0]: (one.events, one.example, one.blocks)
            for one in backfills.findings(world.connection, begun)
        }
        assert found == {
            "are billed already under the same key": (1, "acct-1/live", False),
            "have no price (unknown account) and would wait, parked": (
                1,
                "acct-9/who: expected an account of the catalog, got 'acct-9'",
                True,
            ),
        }
        assert [one[:3] for one in backfills.summary(world.connection, "june", 9)] == [
            ("acct-1", "llm.request", 6),
            ("acct-9", "llm.request", 1),
        ]

        with pytest.raises(BackfillError, match=r"1 events of june have no price .*: publish it first"):
            commit(world)
        world.publish(*account_items("acct-9"), topic=False)  # known here, and not to the raters yet
        died = subprocess.run([sys.executable, "-c", _DIES], env=world.environment(), timeout=60)
        assert died.returncode == -signal.SIGKILL
        eventually(lambda: world.scalar("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"), lambda n: n == 0)
        stopped = backfills.get(world.connection, "june")
        assert (stopped.state, stopped.sent) == ("committing", 0)
        done = commit(world)
        assert (done.state, done.sent) == ("committed", 7)
        with pytest.raises(BackfillError, match="is committed"):
            commit(world)
        # What went twice is billed once, and the live event stays the live one.
        expected = Outcome(billed=5, voided=0, parked=1, dead_lettered=0, elsewhere=1)
        eventually(lambda: backfills.outcome(world.connection, "june"), lambda now: now == expected)
        output = "SELECT events, quantity, amount FROM billing.invoice_line WHERE charge = 'output'"
        assert world.connection.execute(output).fetchall() == [(6, Decimal(12), 12 * OUTPUT_PRICE)]

        # An event of it is parked: as long as it may still be billed, the revert is not over.
        assert revert(world) == (5, "reverting")
        assert world.connection.execute(output).fetchall() == [(1, Decimal(2), 2 * OUTPUT_PRICE)]
        world.publish(*account_items("acct-9"), table=False)
        eventually(lambda: world.billed("who"))
        assert revert(world) == (1, "reverted")
        with pytest.raises(BackfillError, match="reverted already"):
            revert(world)
        assert sum(amount for *_, amount in world.billed("who")) == 0
        assert backfills.outcome(world.connection, "june") == Outcome(0, 6, 0, 0, 1)
    assert world.billed("live") and live.offset == 0
    assert world.scalar("SELECT count(*) FROM billing.quarantine") == 0
    assert world.scalar("SELECT count(*) FROM billing.sequence_gaps(interval '0')") == 0
    audit = "SELECT string_agg(action, ' ' ORDER BY id) FROM billing.audit WHERE target = 'june'"
    steps = ("stage", "committing", "committed", "reverting", "reverted")
    assert world.scalar(audit) == " ".join(f"backfill.{step}" for step in steps)


def test_a_commit_that_died_is_reverted_with_what_it_sent_and_never_wrote_down(world: World) -> None:
    stage(world, *(staged(f"k{n}") for n in range(5)))
    with world.sink():
        # The raters are behind when it dies: what it sent is rated after the revert began.
        died = subprocess.run([sys.executable, "-c", _DIES], env=world.environment(), timeout=60)
        assert died.returncode == -signal.SIGKILL
        assert backfills.get(world.connection, "june").sent == 0
        eventually(lambda: world.scalar("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"), lambda n: n == 0)
        with world.rater():
            assert revert(world) == (3, "reverted")
    assert backfills.outcome(world.connection, "june") == Outcome(0, 3, 0, 0, 0)
    assert world.scalar("SELECT sum(amount) FROM billing.invoice_line") == 0


@pytest.mark.parametrize("cut_off", ["held", "produced"])
def test_a_command_that_was_cut_off_sends_nothing_after_a_revert(world: World, cut_off: str) -> None:
    """Its connection to PostgreSQL is lost in the middle of a portion, it is reverted, and only then does it go on."""
    stage(world, *(staged(f"k{n}") for n in range(5)))
    with connect(world.settings.dsn, application="zombie", autocommit=True) as zombie:

        def on_step(step: str) -> None:
            if step == cut_off:
                query(world.settings, "SELECT pg_terminate_backend(%s, 10000)", zombie.info.backend_pid)
                assert revert(world) == (0, "reverted")

        with pytest.raises(BackfillError, match="Kafka did not confirm 5 events"):
            backfills.commit(zombie, world.settings, SCHEMAS, "june", actor="eve", on_step=on_step)
    assert on_topic(world) == []
    assert backfills.get(world.connection, "june").state == "reverted"


def test_a_command_that_finds_its_backfill_reverted_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfills, "PORTION", 2)
    stage(world, *(staged(f"k{n}") for n in range(5)))

    def on_sent(_: int) -> None:
        world.connection.execute("UPDATE billing.backfill SET state = 'reverting'")

    with pytest.raises(BackfillError, match="june is reverting by now"):
        backfills.commit(world.connection, world.settings, SCHEMAS, "june", actor="eve", on_sent=on_sent)
    assert on_topic(world) == ["k0", "k1"]
    assert backfills.get(world.connection, "june").sent == 2


def on_topic(world: World) -> list[str]:
    """Keys of the events that a rater can read."""
    starts = {(world.topics.events, partition): 0 for partition in range(world.settings.partitions)}
    return sorted(
        SCHEMAS.decode(message.value(), EVENTS)["idempotency_key"] for message in peek(world.settings, starts)
    )


def test_what_cannot_be_billed_any_more_stops_the_commit(world: World) -> None:
    world.connection.execute(
        "INSERT INTO billing.invoice (account, currency, period_start, period_end, state) "
        "VALUES ('acct-2', 'USD', now() - interval '3 days', now() - interval '1 day', 'issued')"
    )
    cases = {
        "old": (staged("a", hours_ago=36 * 24), "too old"),
        "ahead": (staged("a", hours_ago=-1), "still to come"),
        "closed": (staged("a", "acct-2", hours_ago=48), "closed period"),
    }
    for name, (event, why) in cases.items():
        found = backfills.findings(world.connection, stage(world, event, staged("b"), name=name))
        assert [(why in one.what, one.events, one.blocks) for one in found] == [(True, 1, True)]
        with pytest.raises(BackfillError, match=f"1 events of {name} .*{why}"):
            commit(world, name)
        assert backfills.get(world.connection, name).state == "staged"
        assert backfills.begin_revert(world.connection, world.settings, name, actor="ada", wait_s=0) == []
        assert backfills.get(world.connection, name).state == "discarded"


def test_names_and_keys_stand_once(world: World) -> None:
    stage(world, staged("a"))
    for events, why in (((staged("b"),), "there is a backfill june"), ((), "there is a backfill june")):
        with pytest.raises(BackfillError, match=why):
            stage(world, *events)
    with pytest.raises(BackfillError, match="each account and key once"):
        stage(world, staged("a"), staged("b"), staged("a"), name="twice")
    with pytest.raises(BackfillError, match="expected events"):
        stage(world, name="empty")
    assert [one.name for one in backfills.all_of(world.connection, 9)] == ["june"]
    with pytest.raises(BackfillError, match="'july'"):
        backfills.get(world.connection, "july")


def test_live_usage_comes_first(world: World) -> None:
    """Nothing is sent while more events wait for the raters than allowed."""
    for number in range(3):
        world.event(f"live-{number}")
    stage(world, staged("a"))
    told: list[int] = []

    class Enough(Exception): ...

    def on_lag(waiting: int) -> None:
        told.append(waiting)
        if len(told) == 2:
            raise Enough

    with pytest.raises(Enough):
        backfills.commit(world.connection, world.settings, SCHEMAS, "june", actor="ada", lag_max=2, on_lag=on_lag)
    assert told == [3, 3] and backfills.get(world.connection, "june").sent == 0
    assert commit(world, lag_max=3).sent == 1
    # The marker behind a portion is no event that waits.
    stage(world, staged("b"), name="july")
    assert commit(world, "july", lag_max=4).sent == 1
