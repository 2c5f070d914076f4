"""``tally status`` as a user types it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from pipeline.infra.settings import Settings

from .running import Tally

FIELDS = [
    "at",
    "headline",
    "caught_up",
    "kafka",
    "postgres",
    "rater",
    "sink",
    "stopped",
    "relay",
    "dead_letters",
    "parked",
    "quarantined",
    "missing",
    "unbilled_voids",
]


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


def test_nothing_to_do(settings: Settings, tally: Tally) -> None:
    seen = tally.json("status")
    assert list(seen) == FIELDS
    assert seen["caught_up"] is True
    assert seen["headline"] == "all caught up; no rater is running; no sink is running"
    assert seen["kafka"] == seen["postgres"] == {"reachable": True, "problem": None}
    assert seen["unbilled_voids"] == 0
    assert seen["relay"] == {"pending_versions": 0, "oldest_at": None}
    assert seen["dead_letters"] == seen["parked"] == seen["quarantined"] == seen["stopped"] == []
    assert list(seen["rater"]) == ["lag", "waiting", "per_second", "seconds_left", "group", "partitions"]
    assert seen["rater"]["group"]["name"] == f"{settings.topic_prefix}rater"
    topics = [one["topic"].removeprefix(settings.topic_prefix) for one in seen["sink"]["partitions"]]
    names = ["usage.rated", "usage.receipts", "usage.retry", "usage.dead-letter", "usage.controls"]
    assert list(dict.fromkeys(topics)) == names
    assert len(topics) == 4 * settings.partitions + 1
    shown = tally("status").stdout
    assert shown.startswith("● all caught up; no rater is running")
    assert "nothing parked" in shown


def test_services_away_are_named_with_exit_code_1(settings: Settings) -> None:
    away = Tally(settings.model_copy(update={"kafka_bootstrap": "127.0.0.1:9"}))
    seen = away.json("status", code=1)
    assert not seen["kafka"]["reachable"] and "127.0.0.1:9" in seen["kafka"]["problem"]
    assert seen["postgres"]["reachable"] and seen["dead_letters"] == []
    assert seen["rater"] is None and seen["sink"] is None
    assert "127.0.0.1:9" in away("status", code=1).stdout


def test_watch_looks_again_until_interrupted(settings: Settings, tally: Tally) -> None:
    argv = [sys.executable, "-m", "pipeline.cli", "status", "--watch", "0.5", "--json"]
    environment = os.environ | {
        "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
        "TALLY_POSTGRES_DSN": settings.dsn,
        "TALLY_TOPIC_PREFIX": settings.topic_prefix,
    }
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = []
        while len(looks) < 2:
            text = ""
            while not text.endswith("\n}\n"):
                text += process.stdout.readline()
            looks.append(json.loads(text))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert looks[0]["at"] < looks[1]["at"]


def test_too_short_a_watch_is_wrong_usage(tally: Tally) -> None:
    assert "--watch" in tally("status", "--watch", "0", code=2).stderr
