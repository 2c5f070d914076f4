"""``tally usage`` and ``tally backfill`` as a user types them, on a deployment with real workers."""

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app
from pipeline.cli.output import CommandError, out
from pipeline.infra.settings import Settings
from tests.operations.world import INPUT_PRICE, OUTPUT_PRICE, World

#: For what comes of it: workers that have just started, on a machine that may be busy.
PATIENT = ("--wait", "60")


class Tally:
    """The command in this process: its options, its output and its errors, without starting Python each time."""

    def __init__(self, settings: Settings, captured: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._captured = captured
        environment = {
            "TALLY_KAFKA_BOOTSTRAP": str(settings.kafka_bootstrap),
            "TALLY_POSTGRES_DSN": settings.dsn,
            "TALLY_TOPIC_PREFIX": settings.topic_prefix,
            "TALLY_DATA_DIR": str(settings.data_dir),
            "TALLY_ACTOR": "ada",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(out, "width", 200)

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """What it says on stdout."""
        self._captured.readouterr()
        assert (app([str(one) for one in arguments], standalone_mode=False) or 0) == code
        return self._captured.readouterr().out

    def json(self, *arguments: object, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code))

    def refuses(self, *arguments: object) -> tuple[int, str]:
        """Its exit code and its error."""
        with pytest.raises(CommandError) as refused:
            app([str(one) for one in arguments], standalone_mode=False)
        return refused.value.code, str(refused.value)


@pytest.fixture
def tally(settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tally:
    return Tally(settings, capsys, monkeypatch)


@pytest.fixture
def world(settings: Settings) -> Iterator[World]:
    with closing(World(settings)) as made, made.rater(), made.sink():
        yield made


def amounts(world: World) -> dict[str, Decimal]:
    return dict(world.connection.execute("SELECT charge, exact_amount FROM finance.invoice_lines").fetchall())


def test_from_added_to_voided(world: World, tally: Tally) -> None:
    now = datetime.now(UTC).replace(microsecond=0).isoformat()
    event = ("--account", "acct-1", "--key", "late/1", "--type", "llm.request", "--at", now)
    properties = ("--set", "input_tokens=10", "--set", "output_tokens=2")
    why = ("--reason", "missing_usage", "--why", "the gateway was down", *PATIENT)

    added = tally.json("usage", "add", *event, *properties, *why)
    assert (added["state"], added["event"]["properties"]) == ("billed", {"input_tokens": "10", "output_tokens": "2"})
    audit = "SELECT actor, target, detail FROM billing.audit WHERE action = 'usage.add'"
    [(actor, target, detail)] = world.connection.execute(audit).fetchall()
    assert (actor, target, detail["reason_code"]) == ("ada", "acct-1/late/1", "missing_usage")
    assert "is billed already" in tally.refuses("usage", "add", *event, *properties, *why)[1]

    preview = tally.json("usage", "void", "--account", "acct-1", "--where", "input_tokens=10", "--dry-run")
    assert preview["events"] == [{"account": "acct-1", "idempotency_key": "late/1"}]
    assert [(one["charge"], one["events"], one["quantity"]) for one in preview["billed"]] == [
        ("input", 1, "10.000000000"),
        ("output", 1, "2.000000000"),
    ]
    code, asked = tally.refuses("usage", "void", "acct-1/late/1", "--reason", "duplicate")
    assert code == 2 and "would void 1 event" in asked and "--yes" in asked

    why = ("--reason", "wrong_quantity", "--why", "counted twice", *PATIENT)
    code, unread = tally.refuses("usage", "replace", "acct-1/late/1", "--set", "input_tokns=4", *why, "--yes")
    assert code == 2 and "--set input_tokns: did you mean input_tokens?" in unread and "--allow-unread" in unread
    code, unpriced = tally.refuses("usage", "replace", "acct-1/late/1", "--set", "input_tokens=x", *why, "--yes")
    assert code == 1 and "acct-1/late/1: expected a decimal number as input_tokens, got 'x'" in unpriced
    preview = tally.json("usage", "replace", "acct-1/late/1", "--set", "input_tokens=4", "--dry-run")
    assert [(one["charge"], one["quantity"], one["new_quantity"], one["change"]) for one in preview["billed"]] == [
        ("input", "10.000000000", "4.000000000", "-0.000018000000"),
        ("output", "2.000000000", "2.000000000", "0.000000000000"),
    ]
    shown = tally("usage", "replace", "acct-1/late/1", "--set", "input_tokens=4", "--dry-run")
    assert "10 → 4" in shown and "-0.000018 USD" in shown
    replaced = tally.json("usage", "replace", "acct-1/late/1", "--set", "input_tokens=4", *why, "--yes")
    assert (replaced["states"], replaced["refused"]) == ({"applied": 1}, [])
    assert amounts(world) == {"input": 4 * INPUT_PRICE, "output": 2 * OUTPUT_PRICE}
    assert tally.json("usage", "void", "--account", "acct-1", *why, "--yes")["states"] == {"applied": 1}
    assert amounts(world) == {"input": 0, "output": 0}

    explained = tally.json("explain", "acct-1/late/1")
    first, second = explained["corrections"]
    assert (explained["state"], first["action"], second["action"]) == ("voided", "replace", "void")
    assert (first["decided_by"], first["reason_code"], first["note"]) == ("ada", "wrong_quantity", "counted twice")
    assert first["changed"] == {"input_tokens": {"from": "10", "to": "4"}}
    assert [(row["kind"], row["charge"], row["quantity"]) for row in first["rows"] if row["charge"] == "input"] == [
        ("void", "input", "-10"),
        ("correction", "input", "4"),
    ]
    assert sum(Decimal(row["amount"]) for one in explained["corrections"] for row in one["rows"]) < 0
    shown = tally("explain", "acct-1/late/1")
    assert "voided" in shown and "wrong quantity: counted twice" in shown and "10 → 4" in shown

    shown = tally("usage", "list")
    assert "acct-1/late/1" in shown and "wrong_quantity: counted twice" in shown and "applied" in shown
    [again] = tally.json("usage", "replace", "acct-1/late/1", "--set", "x=1", *why, "--yes", code=1)["refused"]
    assert "add the usage under a new key" in again["problem"]


def test_from_staged_to_reverted(world: World, tally: Tally, tmp_path: Path) -> None:
    at = datetime.now(UTC) - timedelta(hours=2)
    rows = [
        {
            "account": "acct-1",
            "event_type": "llm.request",
            "timestamp": (at + timedelta(minutes=number)).isoformat(),
            "idempotency_key": f"k{number}",
            "properties": {"input_tokens": 10, "output_tokens": "2"},
        }
        for number in range(3)
    ]
    file = tmp_path / "june.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, {"account": "acct-1"}, {}])))
    code, bad = tally.refuses("backfill", "stage", "june", file, "--why", "old logs")
    assert code == 1 and "nothing is staged, 2 rows" in bad and "line 4: " in bad and "line 5: " in bad
    file.write_text("\n".join(map(json.dumps, rows)))
    staged = tally.json("backfill", "stage", "june", file, "--why", "old logs")
    assert (staged["state"], staged["events"], staged["findings"]) == ("staged", 3, [])
    assert amounts(world) == {}

    assert tally.json("backfill", "commit", "june", "--rate", "100/s", "--yes")["state"] == "committed"
    reverted = tally.json("backfill", "revert", "june", "--why", "the wrong logs", "--yes", *PATIENT)
    assert (reverted["state"], reverted["corrections"], reverted["states"]) == ("reverted", 3, {"applied": 3})
    assert amounts(world) == {"input": 0, "output": 0}
    shown = tally("backfill", "show", "june")
    assert "june: reverted, 3 events, old logs" in shown and "voided 3" in shown


def test_what_the_command_line_refuses(tally: Tally) -> None:
    for arguments, code, said in (
        (("usage", "void", "--reason", "duplicate"), 2, "say which events"),
        (("usage", "void", "a/k", "--account", "a", "--reason", "duplicate"), 2, "say which events"),
        (("usage", "void", "a/k"), 2, "say why: --reason duplicate|"),
        (("usage", "void", "a/k", "--reason", "duplicate", "--yes"), 3, "a/k is not billed"),
        (("usage", "replace", "a/k", "--reason", "duplicate"), 2, "--set NAME=VALUE"),
        (("usage", "replace", "a/k", "--reason", "duplicate", "--set", "account=b"), 2, "under a new key"),
        (("backfill", "show", "june"), 3, "`tally backfill list`"),
    ):
        found, why = tally.refuses(*arguments)
        assert (found, said in why) == (code, True), why
