"""Missing usage as a user meets it: a real producer, holes made on purpose, and what the commands say."""

from datetime import UTC, datetime

import pytest

from pipeline.infra.settings import Settings
from pipeline.producer import UsageProducer
from tests.billing.rater import Rater
from tests.billing.records import receipt_record, sequences
from tests.billing.running import query, running_sink, wait_until

from .running import Tally

_CLOSED = "SELECT 1 FROM billing.source WHERE closed_at IS NOT NULL"


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


@pytest.fixture
def source(settings: Settings) -> str:
    """A producer emitted 12 events and closed; the rater tells of 1 to 4 and 8 to 10."""
    with UsageProducer.from_settings(settings, source="svc") as producer:
        for row in range(12):
            producer.emit(
                account="acct-1",
                event_type="llm.request",
                properties={},
                timestamp=datetime.now(UTC),
                idempotency_key=f"k-{row}",
            )
    rater = Rater(settings)
    with rater.transaction():
        arrived = sequences(producer.source, 0, 1, 2, 3, 4, 8, 9, 10)
        rater.receipt(receipt_record(settings.topic_prefix, count=7, rated_rows=0, sequences=[arrived]))
    with running_sink(settings) as thread:
        wait_until(lambda: query(settings, "SELECT highest FROM billing.source") == [(10,)], "numbers", thread)
        wait_until(
            lambda: bool(query(settings, "SELECT 1 FROM billing.source WHERE closed_at > '-infinity'")),
            "totals",
            thread,
        )
    return producer.source


def test_nothing_missing(tally: Tally) -> None:
    assert tally.json("gaps", "list") == {"sequence_numbers": 0, "runs": 0, "sources": 0, "gaps": []}
    assert "no sequence numbers are missing" in tally("gaps", "list").stderr
    missing = tally.json("status")["missing"]
    assert missing == {
        "sequence_numbers": 0,
        "runs": 0,
        "sources": 0,
        "gaps": [],
        "short_hours": [],
        "silent_sources": [],
    }


def test_from_hole_to_decision(tally: Tally, settings: Settings, source: str) -> None:
    # Young, they are no finding yet.
    assert tally.json("gaps", "list")["runs"] == 0
    found = tally.json("gaps", "list", "--grace", 0, code=4)
    assert [(gap["first_missing"], gap["last_missing"]) for gap in found["gaps"]] == [(5, 7), (11, 12)]
    assert [gap["likely_cause"] for gap in found["gaps"]] == ["confirmed", "confirmed"]
    assert "Kafka confirmed it to the producer" in tally("gaps", "list", "--grace", 0, code=4).stdout

    # Older, status and reconcile show them.
    query(settings, "UPDATE billing.source SET updated_at = now() - interval '1 hour' RETURNING 1")
    query(settings, "UPDATE billing.control_total SET received_at = now() - interval '1 hour' RETURNING 1")
    status = tally.json("status")
    assert "5 sequence numbers are missing from 1 source" in status["headline"]
    assert (status["missing"]["sequence_numbers"], status["missing"]["runs"]) == (5, 2)
    (hour,) = status["missing"]["short_hours"]
    assert (hour["source"], hour["emitted"], hour["missing"]) == (source, 12, 5)
    shown = tally("status").stdout
    assert source in shown and "5-7" in shown and "11-12" in shown
    checks = {check["name"]: check for check in tally.json("reconcile", code=4)["checks"]}
    numbers, totals = checks["sequence numbers sent = arrived"], checks["events by control totals = arrived"]
    assert (numbers["left"], numbers["right"], totals["left"], totals["right"]) == ("12", "7", "12", "7")
    assert f"{source} misses 5-7 (emitted " in numbers["detail"]

    # A person decides: one run after a look, the other at once.
    said = ("--as", "lost", "--why", "the disk of svc died")
    tried = tally.json("gaps", "accept", source, "5-7", *said, "--dry-run")
    assert (tried["accepted"], tried["would_accept"]) == (0, 3)
    assert tally.json("gaps", "accept", source, "5-7", *said)["accepted"] == 3
    assert "2 numbers of" in tally("gaps", "accept", source, "--all", *said).stdout
    assert tally.json("gaps", "list")["runs"] == 0
    decided = tally.json("gaps", "list", "--accepted")["accepted"]
    assert [(one["first"], one["last"], one["verdict"], one["actor"]) for one in decided] == [
        (11, 12, "lost", "ada"),
        (5, 7, "lost", "ada"),
    ]
    assert "the disk of svc died" in tally("gaps", "list", "--accepted").stdout
    checks = {check["name"]: check for check in tally.json("reconcile", code=4)["checks"]}  # rows are not all there
    assert checks["sequence numbers sent = arrived"]["difference"] == "0"
    assert "5 accepted as missing" in checks["sequence numbers sent = arrived"]["detail"]
    assert checks["events by control totals = arrived"]["difference"] == "0"


def test_a_decision_says_what_is_wrong_with_it(tally: Tally) -> None:
    said = ("--as", "lost", "--why", "w")
    for arguments, code, says in [
        (("s", "7", "--as", "lost"), 2, "--why"),
        (("s", *said), 2, "--all"),
        (("s", "9-7", *said), 2, "got '9-7'"),
        (("s", "7", *said), 4, "expected numbers of s that are missing (none), got 7"),
        (("s", "--all", *said), 3, "no sequence numbers of s are missing"),
    ]:
        assert says in tally("gaps", "accept", *arguments, code=code).stderr
