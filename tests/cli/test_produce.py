"""``tally produce`` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.infra.settings import Settings
from tests.producer.kafka import check_nothing_lost, read_events

OPTIONS = [
    "--account", "acct-{Customer}", "--type", "llm.request", "--key-template", "code-{row}",
    "--timestamp-column", "TIMESTAMP", "--property", "input_tokens=Tokens",
]  # fmt: skip
NOW = datetime.now(UTC)


def csv_file(path: Path, rows: int) -> Path:
    lines = ["TIMESTAMP,Customer,Tokens"]
    for row in range(rows):
        at = (NOW - timedelta(seconds=rows - row)).strftime("%Y-%m-%d %H:%M:%S.%f") + "0"
        lines.append(f"{at},{row % 7},{row}")
    path.write_text("\n".join(lines))
    return path


class Tally:
    """The command in a process of its own, with a deployment's settings in its environment."""

    def __init__(self, settings: Settings) -> None:
        self._environment = os.environ | {
            "TALLY_KAFKA_BOOTSTRAP": str(settings.kafka_bootstrap),
            "TALLY_POSTGRES_DSN": settings.dsn,
            "TALLY_TOPIC_PREFIX": settings.topic_prefix,
            "TALLY_DATA_DIR": str(settings.data_dir),
            "COLUMNS": "200",
        }

    def start(self, *arguments: str | Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "produce", *map(str, arguments)],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            stdout, stderr = process.communicate(timeout=90)
        return process.returncode, stdout, stderr

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        returned, stdout, stderr = self.run(*arguments, "--json")
        assert returned == code, stderr
        return json.loads(stdout)


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


def test_a_file_is_sent_once_and_says_so_the_second_time(tally: Tally, settings: Settings, tmp_path: Path) -> None:
    file = csv_file(tmp_path / "usage.csv", 300)
    code, stdout, stderr = tally.run(file, *OPTIONS)
    assert (code, stderr) == (0, "")
    assert "300" in stdout
    second = tally.json(file, *OPTIONS)
    assert second["already_sent"] is True
    assert second["emitted_now"] == 0
    stored = read_events(settings)
    assert len(stored) == 300
    check_nothing_lost(stored, {f"code-{row}": row + 1 for row in range(300)}, second["source"])
    event = next(record.event for record in stored if record.event["idempotency_key"] == "code-9")
    assert event["account"] == "acct-2"
    assert event["properties"] == {"input_tokens": "9"}
    assert event["timestamp"] == NOW - timedelta(seconds=291)
    again = tally.json(file, *OPTIONS, "--again")
    assert (again["emitted_now"], again["source"]) == (300, second["source"])
    assert len(read_events(settings)) == 600


def test_killed_again_and_again_every_row_is_emitted_exactly_once(
    tally: Tally, settings: Settings, tmp_path: Path
) -> None:
    file = csv_file(tmp_path / "usage.csv", 4000)
    for run in range(3):
        with tally.start(file, *OPTIONS, "--rate", "1000/s") as process:
            journal = settings.data_dir / "produce"
            deadline = time.monotonic() + 30
            while len(list(journal.glob("*/spool/*.journal"))) == 0 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.9 + 0.45 * run)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    result = tally.json(file, *OPTIONS)
    assert (result["rows"], result["emitted"]) == (4000, 4000)
    assert 0 < result["emitted_now"] < 4000
    stored = read_events(settings)
    check_nothing_lost(stored, {f"code-{row}": row + 1 for row in range(4000)}, result["source"])
    assert {record.event["sequence"] for record in stored} == set(range(1, 4001))


def test_ctrl_c_stops_cleanly_and_the_same_command_resumes(tally: Tally, settings: Settings, tmp_path: Path) -> None:
    file = csv_file(tmp_path / "usage.csv", 1500)
    with tally.start(file, *OPTIONS, "--rate", "500") as process:
        deadline = time.monotonic() + 30
        while not list((settings.data_dir / "produce").glob("*/checkpoint.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command resumes here" in stderr
    result = tally.json(file, *OPTIONS)
    assert result["emitted"] == 1500
    assert 0 < result["emitted_now"] < 1500
    assert len(read_events(settings)) == 1500


def test_bad_rows_are_told_counted_and_written_and_the_rest_is_sent(
    tally: Tally, settings: Settings, tmp_path: Path
) -> None:
    file = csv_file(tmp_path / "usage.csv", 50)
    with file.open("a") as out:
        out.write("\nyesterday,1,5\n2025-03-01,1\n")
    rejects = tmp_path / "rejects.jsonl"
    code, stdout, stderr = tally.run(file, *OPTIONS, "--rejects", rejects, "--json")
    assert code == 4
    assert json.loads(stdout)["bad_rows"] == 2
    assert "line 52: timestamp: expected ISO 8601, got 'yesterday'" in stderr
    assert "line 53: expected 3 cells, got 2" in stderr
    assert [json.loads(line)["line"] for line in rejects.read_text().splitlines()] == [52, 53]
    assert len(read_events(settings)) == 50


def test_dry_run_checks_and_sends_nothing(tally: Tally, settings: Settings, tmp_path: Path) -> None:
    file = csv_file(tmp_path / "usage.csv", 20)
    result = tally.json(file, *OPTIONS, "--dry-run")
    assert (result["rows"], result["bad_rows"], result["emitted"]) == (20, 0, 0)
    assert read_events(settings) == []


def test_a_mapping_file_and_options_that_add_to_it(tally: Tally, settings: Settings, tmp_path: Path) -> None:
    file = csv_file(tmp_path / "usage.csv", 1)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        'account: "acct-{Customer}"\nevent_type: llm.request\ntimestamp: TIMESTAMP\nproperties: {tokens: Tokens}\n'
    )
    tally.json(file, "--mapping", mapping, "--map", "idempotency_key=TIMESTAMP", "--property", "who=Customer")
    (stored,) = read_events(settings)
    assert stored.event["properties"] == {"tokens": "0", "who": "0"}
    assert stored.event["idempotency_key"].endswith("0")


def test_json_lines_are_sent_as_they_are(tally: Tally, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    event = {"account": "a", "event_type": "t", "timestamp": NOW.isoformat(), "idempotency_key": "k"}
    file.write_text(json.dumps(event | {"properties": {"n": 1.5}}))
    assert tally.json(file)["emitted"] == 1
    (stored,) = read_events(settings)
    assert stored.event["properties"] == {"n": "1.5"}


def test_old_usage_is_sent_with_a_warning(tally: Tally, tmp_path: Path) -> None:
    file = tmp_path / "old.csv"
    file.write_text("TIMESTAMP,Customer,Tokens\n2023-11-16 18:17:03.9799600,1,1\n")
    code, stdout, stderr = tally.run(file, *OPTIONS, "--json")
    assert code == 0
    assert json.loads(stdout)["outside_window"] == 1
    assert "too_old" in stderr


MISTAKES = {
    "no such file": (["none.csv"], 3, "expected a file"),
    "unknown kind of file": (["notes.txt"], 2, "say --format"),
    "mapping incomplete": (["usage.csv", "--type", "t"], 2, "--account or --map account=COLUMN"),
    "column not there": (["usage.csv", *OPTIONS, "--property", "x=Nope"], 2, "no column 'Nope'"),
    "map without a field": (["usage.csv", *OPTIONS, "--map", "x=Tokens"], 2, "expected a field of"),
    "property without a column": (["usage.csv", *OPTIONS, "--property", "x"], 2, "expected NAME=COLUMN"),
    "rate no number": (["usage.csv", *OPTIONS, "--rate", "fast"], 2, "events a second"),
    "mapping for JSON lines": (["usage.jsonl", "--type", "t"], 2, "a mapping is for CSV"),
    "mapping file with a typo": (["usage.csv", "--mapping", "typo.yaml"], 2, "acount: Extra inputs"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_explained(
    tally: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    csv_file(tmp_path / "usage.csv", 1)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "usage.jsonl").touch()
    (tmp_path / "typo.yaml").write_text("acount: x\n")
    returned, stdout, stderr = tally.run(*arguments)
    assert (returned, stdout) == (code, "")
    assert says in stderr
    assert "Traceback" not in stderr


def test_a_missing_topic_is_told(settings: Settings, tmp_path: Path) -> None:
    elsewhere = Tally(settings.model_copy(update={"topic_prefix": "not-there-"}))
    code, _, stderr = elsewhere.run(csv_file(tmp_path / "usage.csv", 1), *OPTIONS)
    assert code == 1
    assert "topic not-there-usage.events does not exist" in stderr
