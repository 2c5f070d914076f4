import urllib.request

import pytest

from pipeline.infra import metrics
from pipeline.infra.settings import Settings


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_off_unless_a_port_is_set() -> None:
    assert metrics.serve(Settings(metrics_port=None)) is None


def test_served_on_loopback_and_forgotten_with_the_partition() -> None:
    server = metrics.serve(Settings(metrics_port=0))
    assert server is not None and server > 0
    metrics.RATER_EVENTS.labels("rated").inc(3)
    metrics.RATER_LAG.labels("usage.events", 2).set(7)
    assert 'tally_rater_events_total{outcome="rated"} 3.0' in _scrape(server)
    assert 'tally_rater_lag_records{partition="2",topic="usage.events"} 7.0' in _scrape(server)
    metrics.forget("usage.events", 2, metrics.RATER_LAG, metrics.RATER_POSITION)
    assert 'partition="2"' not in _scrape(server)


def test_taken_port_is_an_error_at_the_start() -> None:
    port = metrics.serve(Settings(metrics_port=0))
    with pytest.raises(OSError, match="in use"):
        metrics.serve(Settings(metrics_port=port))
