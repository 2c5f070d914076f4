"""``tally reconcile`` as a user types it."""

import pytest
from confluent_kafka import Producer

from pipeline.infra.settings import Settings
from tests.billing.rater import Rater
from tests.billing.records import rated_record, receipt_record
from tests.billing.running import meter, per_unit, publish, query, running_sink, tamper, wait_until

from .running import Tally


def arrive(settings: Settings, count: int) -> None:
    producer = Producer(settings.kafka)
    for _ in range(count):
        producer.produce(settings.topic_prefix + "usage.events", b"event", partition=0)
    assert producer.flush(10) == 0


@pytest.fixture
def tally(settings: Settings) -> Tally:
    """A deployment with three rated events."""
    rater = Rater(settings)
    publish(settings, per_unit(input="0.000003"), meter())
    arrive(settings, 3)
    with rater.transaction():
        rater.rated(rated_record(key=f"k{n}") for n in range(3))
        rater.receipt(receipt_record(settings.topic_prefix, count=3))
    with running_sink(settings) as thread:
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.rated_usage") == [(3,)], "rows", thread)
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.receipt") == [(1,)], "the receipt", thread)
    return Tally(settings)


def test_says_that_all_is_accounted_for(tally: Tally) -> None:
    found = tally.json("reconcile")
    assert found["reconciled"] is True
    assert {check["difference"].rstrip("0").rstrip(".") or "0" for check in found["checks"]} == {"0"}
    assert {lag["offsets"] for lag in found["lags"]} == {0}
    shown = tally("reconcile")
    assert "0.000009" in shown.stdout
    assert "Reconciled: no difference." in shown.stderr


def test_a_difference_is_exit_code_4(tally: Tally, settings: Settings) -> None:
    tamper(settings, "DELETE FROM billing.rated_usage WHERE idempotency_key = 'k1'")
    found = tally.json("reconcile", code=4)
    assert found["reconciled"] is False
    rows = next(check for check in found["checks"] if check["name"] == "rated rows in receipts = in PostgreSQL")
    assert (rows["left"], rows["right"], rows["difference"]) == ("3", "2", "1")
    shown = tally("reconcile", code=4)
    assert "line:1 holds 0.000009" in shown.stdout
    assert "Not reconciled" in shown.stderr


def test_a_quarantined_row_is_exit_code_4(tally: Tally, settings: Settings) -> None:
    rater = Rater(settings)
    with rater.transaction():
        rater.rated([rated_record(key="k1")])
    with running_sink(settings) as thread:
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.quarantine") == [(1,)], "the row", thread)
    assert "already_billed 1" in tally("reconcile", "--wait", 10, code=4).stdout


def test_offers_to_wait_for_workers(tally: Tally, settings: Settings) -> None:
    rater = Rater(settings)
    arrive(settings, 1)
    with rater.transaction():
        rater.rated([rated_record(key="later")])
        rater.receipt(receipt_record(settings.topic_prefix, first=3, count=1))
    shown = tally("reconcile", "--wait", 0.1)
    assert "sink by 3 on" in shown.stderr
    assert "tally reconcile --wait 60" in shown.stderr
    with running_sink(settings):
        assert "behind" not in tally("reconcile", "--wait", 30).stderr
