"""``tally up``, ``down`` and ``doctor`` as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from pipeline.cli import services
from pipeline.cli.output import run_reporting_errors
from pipeline.infra.settings import Settings


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No services given, everything under the test's own directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}
    return {**kept, "TALLY_DATA_DIR": str(tmp_path / "data"), "NO_COLOR": "1"}


def _tally(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=180)


def _data(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_up_twice_and_down_twice(environment: dict[str, str]) -> None:
    try:
        first = _data(_tally(environment, "up", "--no-workers", "--json"))
        assert first["started"] and first["workers"] == []
        assert "usage.events" in first["topics_created"] and first["migrations_applied"]

        second = _data(_tally(environment, "up", "--no-workers", "--json"))
        assert not second["started"]
        assert second["kafka_bootstrap"] == first["kafka_bootstrap"]
        assert second["topics_created"] == [] and second["migrations_applied"] == []
        assert "was running already" in _tally(environment, "up", "--no-workers").stderr

        seen = _tally(environment, "doctor", "--json")
        assert seen.returncode == 4
        assert {finding["check"] for finding in json.loads(seen.stdout) if not finding["ok"]} == {"raters", "sinks"}
        assert _data(_tally(environment, "topics", "--json")) == {"created": []}
        assert _data(_tally(environment, "migrate", "--json")) == {"applied": []}
    finally:
        down = _tally(environment, "down", "--json")
    assert _data(down) == {"workers_stopped": False, "services_stopped": True}
    assert "nothing was running" in _tally(environment, "down").stderr


def test_taken_port_is_one_message_without_traceback(environment: dict[str, str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = _tally(environment, "up", "--kafka-port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: port ") and "Traceback" not in done.stderr


def test_workers_are_awaited_past_a_broker_that_answers_late(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that has just started may let the first questions time out: `up` asks again, for as long as it waits."""
    asked = []

    class Answer:
        members = ("one",)

        def result(self, timeout: float) -> "Answer":
            asked.append(timeout)
            if len(asked) < 3:
                raise TimeoutError
            return self

    monkeypatch.setattr(AdminClient, "describe_consumer_groups", lambda _, groups: {groups[0]: Answer()})
    services._await_members(settings, {"rater": 1})
    assert len(asked) == 3


def test_no_error_is_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    def silent() -> None:
        raise TimeoutError

    with pytest.raises(SystemExit):
        run_reporting_errors(silent)
    assert "Kafka did not answer in time" in capsys.readouterr().err
