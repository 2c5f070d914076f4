"""Every Prometheus metric of Tally in one typed list, and the server that shows them.

Import a metric and use it; a misspelt one fails the type check. Update once per batch, never per event. Positions and
lags are per partition: call ``forget`` when a partition is taken away, or its last value stays on the wall.
"""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from pipeline.infra.settings import Settings

#: Upper bounds of the time histograms, seconds: from a local commit (about 5 ms) to the transaction timeout (15 s).
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15)
#: Upper bounds of the batch size histograms, records: to ``Settings.batch_records``'s usual values and above.
_RECORDS = (1, 10, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000)


def _counter(name: str, unit: str, text: str, labels: Sequence[str] = ()) -> Counter:
    return Counter(f"tally_{name}", text, labels, unit=unit)


def _gauge(name: str, unit: str, text: str, labels: Sequence[str] = ()) -> Gauge:
    return Gauge(f"tally_{name}", text, labels, unit=unit)


def _histogram(name: str, unit: str, text: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"tally_{name}", text, unit=unit, buckets=buckets)


_PARTITION = ("topic", "partition")

# fmt: off
# -- rater
RATER_EVENTS = _counter("rater", "events", "Events by outcome: rated, duplicate, parked, dead_lettered", ("outcome",))
RATER_ROWS = _counter("rater_rated", "rows", "Rated rows committed: one per event and charge")
RATER_BATCHES = _counter("rater_committed", "batches", "Batches committed: one Kafka transaction each")
RATER_COMMIT = _histogram("rater_commit", "seconds", "From beginning a transaction to its confirmed commit", _SECONDS)
RATER_BATCH = _histogram("rater_batch", "records", "Records in a committed batch", _RECORDS)
RATER_ABORTED = _counter("rater_aborted", "transactions", "Transactions aborted; their batches run again")
RATER_STOPPED = _gauge("rater_stopped", "partitions", "1 where dead-letter limits stopped the events", ("partition",))
RATER_LAG = _gauge("rater_lag", "records", "Read-committed end offset minus position, markers included", _PARTITION)
RATER_POSITION = _gauge("rater_position", "offset", "Next offset to be rated", _PARTITION)
RATER_SEEN = _gauge("rater_seen", "keys", "Event identities remembered on local disk", ("partition",))
RATER_CATALOG_POSITION = _gauge("rater_catalog_position", "offset", "Next offset to be read of billing.catalog")
RATER_CATALOG_AGE = _gauge("rater_catalog_age", "seconds", "Time since the catalog topic was last read to its end")
# -- sink
SINK_ROWS = _counter("sink_billed", "rows", "Rated rows that became billed rows")
SINK_QUARANTINED = _counter("sink_quarantined", "rows", "Rated rows put aside, by reason", ("reason",))
SINK_BATCHES = _counter("sink_committed", "batches", "Batches committed: one PostgreSQL transaction each")
SINK_COMMIT = _histogram("sink_commit", "seconds", "From a transaction's first statement to its commit", _SECONDS)
SINK_LAG = _gauge("sink_lag", "records", "Read-committed end offset minus position, markers included", _PARTITION)
SINK_POSITION = _gauge("sink_position", "offset", "Next offset to be written", _PARTITION)
# -- relay
RELAY_PUBLISHED = _counter("relay_published", "versions", "Catalog versions put on billing.catalog")
RELAY_PENDING = _gauge("relay_pending", "versions", "Catalog versions in the outbox, not yet on billing.catalog")
# -- alerts
ALERTS_SENT = _counter("alerts_sent", "alerts", "Thresholds reached, put on billing.alerts")
# fmt: on


def forget(topic: str, partition: int, *gauges: Gauge) -> None:
    """Remove a partition's values from gauges labelled by topic and partition; none there is fine."""
    for gauge in gauges:
        gauge.remove(topic, str(partition))


def serve(settings: Settings) -> int | None:
    """Start the metrics server in a thread; returns the port it listens on, None when metrics are off.

    Raises OSError when the port is taken.
    """
    if settings.metrics_port is None:
        return None
    server, _ = start_http_server(settings.metrics_port, settings.metrics_host)
    return int(server.server_port)
