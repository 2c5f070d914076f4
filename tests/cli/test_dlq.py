"""``tally dlq`` as a user types it, on a deployment with real workers."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from pipeline.infra.settings import Settings
from pipeline.operations.dead_letters import Origin
from tests.operations.world import INPUT_PRICE, World, account_items, eventually

from .running import Tally


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


@pytest.fixture
def world(settings: Settings) -> Iterator[World]:
    with closing(World(settings)) as made, made.rater(), made.sink():
        yield made


def refused(world: World, *origins: Origin) -> None:
    for origin in origins:
        eventually(lambda origin=origin: world.row(origin))


def short(origin: Origin) -> str:
    return f"{origin.partition}/{origin.offset}"


def test_from_list_to_rated(world: World, tally: Tally) -> None:
    bad = world.event("bad", input_tokens="many")
    noise = world.raw(b"\xff" * 40)
    old = world.event("old", at_us=10**15)
    refused(world, bad, noise, old)

    listed = tally.json("dlq", "list")
    assert (listed["state"], listed["events"], listed["estimated_events"]) == ("dead_lettered", 3, 3)
    assert {one["reason"]: one["events"] for one in listed["reasons"]} == {
        "not_a_number": 1,
        "too_old": 1,
        "undecodable": 1,
    }
    by_origin = {row["origin"]: row for row in listed["rows"]}
    assert by_origin[str(old)]["at_risk"] == {"amount": "0.000060000000", "currency": "USD"}
    assert by_origin[str(bad)]["at_risk"] is None
    assert by_origin[str(bad)]["message"] == "expected a decimal number as input_tokens, got 'many'"
    assert by_origin[str(bad)]["decision"] is None
    shown = tally("dlq", "list", "--reason", "not_a_number").stdout
    assert short(bad) in shown and "got 'many'" in shown and short(noise) not in shown

    assert "ff ff ff ff ff ff ff ff  ff" in tally("dlq", "show", short(noise)).stdout
    assert tally.json("dlq", "show", str(noise))["value"] == "ff" * 40
    event = tally.json("dlq", "show", f"usage.events/{short(bad)}")
    assert event["event"]["properties"]["input_tokens"] == "many"
    assert event["history"] == [] and event["event_problem"] is None

    preview = tally.json("dlq", "replay", short(bad), "--set", "input_tokens=5", "--dry-run")
    assert preview["shown"][0]["at_risk"] == {"amount": "0.000045000000", "currency": "USD"}
    assert world.row(bad)["decision"] is None
    assert "would replay 1 event" in tally("dlq", "replay", short(bad), "--set", "input_tokens=5", "--dry-run").stdout

    done = tally.json("dlq", "replay", short(bad), "--set", "input_tokens=5", "--why", "typo", "--wait", 20)
    assert done["replayed"] == [str(bad)]
    assert done["outcomes"] == [{"origin": str(bad), "state": "rated", "reason": None, "message": None}]
    assert world.billed("bad")[0] == ("acct-1", "input", 5 * INPUT_PRICE)
    again = tally("dlq", "replay", short(bad), "--why", "twice", code=1)
    assert again.stderr == f"error: {bad} is rated already: there is nothing to replay\n"
    [decided] = tally.json("dlq", "show", short(bad))["history"]
    assert (decided["actor"], decided["action"], decided["detail"]["why"]) == ("ada", "dlq.replay", "typo")

    unchanged = tally("dlq", "replay", short(old), "--why", "hope", "--wait", 20)
    assert unchanged.stderr == "replayed 1 event\n"
    assert unchanged.stdout == "now 1 dead-lettered (too_old)\n"


def test_many_need_a_yes_and_discarded_ones_are_left_alone(world: World, tally: Tally) -> None:
    bad = [world.event(f"bad{n}", input_tokens="many") for n in range(3)]
    refused(world, *bad)

    asked = tally("dlq", "discard", "--all", "--why", "test keys", code=2)
    assert "would discard 3 events" in asked.stderr and "--yes" in asked.stderr
    assert world.scalar("SELECT count(*) FROM billing.unrated_event WHERE decision IS NOT NULL") == 0
    assert answered(world, "n") == 1
    assert world.scalar("SELECT count(*) FROM billing.unrated_event WHERE decision IS NOT NULL") == 0
    assert "would discard 1 event" in tally("dlq", "discard", "--all", "--limit", 1, "--dry-run").stdout
    one = tally.json("dlq", "discard", short(bad[0]), "--why", "test key")
    assert one == {"discarded": [str(bad[0])], "moved_on": []}
    assert "discarded already, by ada: test key" in tally("dlq", "discard", short(bad[0]), "--why", "x", code=1).stderr

    listed = tally.json("dlq", "list")
    assert [(one["events"], one["discarded"]) for one in listed["reasons"]] == [(3, 1)]
    assert "discarded by ada" in tally("dlq", "list").stdout
    sets = ("--set", "input_tokens=5", "--why", "mended", "--yes", "--wait", 20)
    rest = tally.json("dlq", "replay", "--reason", "not_a_number", *sets)
    assert sorted(rest["replayed"]) == sorted(map(str, bad[1:]))
    assert {one["state"] for one in rest["outcomes"]} == {"rated"}
    assert tally.json("dlq", "replay", short(bad[0]), *sets)["outcomes"][0]["state"] == "rated"
    assert tally("dlq", "list").stderr == "no dead letters\n"
    assert tally.json("dlq", "replay", "--all", "--why", "none left")["replayed"] == []

    more = [world.event(f"more{n}", input_tokens="many") for n in range(2)]
    refused(world, *more)
    assert answered(world, "y") == 0
    assert {world.row(origin)["decision"] for origin in more} == {"discard"}


def answered(world: World, answer: str) -> int:
    """Exit code of a discard of everything that was asked on a terminal whether it is sure."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        argv = [sys.executable, "-m", "pipeline.cli", "dlq", "discard", "--all", "--why", "test keys"]
        done = subprocess.run(
            argv, stdin=theirs, capture_output=True, text=True, env=world.environment(), timeout=60, check=False
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert "discard" in done.stderr and "not_a_number" in done.stderr
    return done.returncode


def test_parked_events_are_not_replayed(world: World, tally: Tally) -> None:
    stranger = world.event("who", "acct-9")
    eventually(lambda: world.row(stranger).get("attempts", 0), lambda attempts: attempts >= 4)
    said = tally("dlq", "replay", short(stranger), "--why", "now", code=1).stderr
    assert "is parked (unknown_account)" in said and "tried again by itself" in said
    assert tally.json("dlq", "list")["events"] == 0
    parked = tally.json("dlq", "list", "--state", "parked", "--account", "acct-9")
    assert [row["origin"] for row in parked["rows"]] == [str(stranger)]
    assert parked["rows"][0]["not_before"] is not None
    assert "next attempt" in tally("dlq", "show", short(stranger)).stdout

    status = tally.json("status")
    assert [(one["reason"], one["events"]) for one in status["parked"]] == [("unknown_account", 1)]
    assert "unknown_account" in tally("status").stdout


def test_a_parked_event_that_is_discarded_is_tried_on(world: World, tally: Tally) -> None:
    strangers = [world.event(f"who{n}", f"acct-{n}") for n in (8, 9)]
    for stranger in strangers:
        eventually(lambda stranger=stranger: world.row(stranger).get("attempts", 0))
    eighth, ninth = strangers
    assert tally.json("dlq", "discard", "--all", "--why", "no dead letters", "--yes")["discarded"] == []
    assert tally.json("dlq", "discard", short(eighth), "--why", "bogus")["discarded"] == [str(eighth)]
    assert "was discarded already, by ada: bogus" in tally("dlq", "discard", short(eighth), "--why", "x", code=1).stderr
    said = tally("dlq", "discard", "--state", "parked", "--all", "--why", "bogus").stderr
    assert "discarded 1 event, parked and tried on" in said
    assert tally.json("dlq", "discard", "--state", "parked", "--all", "--why", "none left")["discarded"] == []

    listed = tally.json("dlq", "list", "--state", "parked")
    assert [(one["events"], one["discarded"]) for one in listed["reasons"]] == [(2, 2)]
    assert {row["decision"] for row in listed["rows"]} == {"discard"}
    assert "tried on, and billed after all once it can be rated" in tally("dlq", "show", short(ninth)).stdout
    assert [one["discarded"] for one in tally.json("status")["parked"]] == [2]

    tried = world.row(ninth)["attempts"]
    world.publish(*account_items("acct-8"))
    eventually(lambda: world.state(eighth), lambda state: state == "rated")
    assert world.billed("who8")[0] == ("acct-8", "input", 10 * INPUT_PRICE)
    still = eventually(lambda: world.row(ninth), lambda row: row["attempts"] > tried)
    assert (still["state"], still["decision"]) == ("parked", "discard")
    assert [one["action"] for one in tally.json("dlq", "show", short(eighth))["history"]] == ["dlq.discard"]
    assert "is rated already" in tally("dlq", "discard", short(eighth), "--why", "x", code=1).stderr


def test_garbage_on_the_retry_topic_is_named_by_it(world: World, tally: Tally) -> None:
    garbage = world.raw(b"\xff" * 40, topic=world.topics.retry)
    refused(world, garbage)
    assert str(garbage) in tally("dlq", "list").stdout
    [shown] = tally.json("dlq", "replay", str(garbage), "--dry-run")["shown"]
    assert "is no usage event" in shown["problem"]
    assert "is no usage event" in tally("dlq", "replay", "--all", "--why", "try", code=1).stderr
    named = f"usage.retry/{short(garbage)}"
    assert tally.json("dlq", "discard", named, "--why", "garbage")["discarded"] == [str(garbage)]
    assert tally.json("dlq", "replay", "--all", "--why", "none left")["replayed"] == []


def test_wrong_usage(settings: Settings, tally: Tally) -> None:
    for arguments, said in (
        (("dlq", "show", "17"), "expected an origin such as"),
        (("dlq", "show", "usage.rated/0/1"), "expected an origin such as"),
        (("dlq", "replay", "--why", "x"), "say which events in one way"),
        (("dlq", "replay", "0/1", "--all", "--why", "x"), "say which events in one way"),
        (("dlq", "replay", "0/1"), "say why"),
        (("dlq", "discard", "--all", "--why", " "), "say why"),
        (("dlq", "replay", "0/1", "--why", "x", "--set", "idempotency_key=y"), "never changed"),
        (("dlq", "replay", "0/1", "--why", "x", "--set", "tokens"), "NAME=VALUE"),
        (("dlq", "list", "--since", "yesterday"), "--since: expected a date or time"),
        (("dlq", "list", "--reason", "bad_mood"), "bad_mood"),
        (("dlq", "list", "--state", "rated"), "rated"),
    ):
        assert said in tally(*arguments, code=2).stderr
    for command in (("show",), ("replay", "--why", "x"), ("discard", "--why", "x")):
        missing = tally("dlq", *command, "0/999", code=3)
        assert missing.stdout == "" and f"{settings.topic_prefix}usage.events/0/999 was never refused" in missing.stderr


def test_empty_list_is_one_object(tally: Tally) -> None:
    assert tally.json("dlq", "list") == {
        "state": "dead_lettered",
        "events": 0,
        "estimated_events": 0,
        "reasons": [],
        "rows": [],
    }
    done = tally("dlq", "list", "--since", "2026-01-01")
    assert done.stdout == "" and done.stderr == "no such events\n"
    assert json.loads(tally("dlq", "discard", "--all", "--dry-run", "--json").stdout) == {"dry_run": True, "events": []}
