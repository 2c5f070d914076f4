"""The broker goes away and comes back: the rater says so once, waits, and goes on."""

import secrets
import socket
from pathlib import Path

import pytest

from pipeline.infra import embedded
from pipeline.infra.settings import Settings
from pipeline.infra.topics import ensure_topics
from tests.integration.deployment import Deployment


@pytest.mark.skipif(bool(embedded.missing_packages()), reason="needs the packages of the embedded services")
def test_a_broker_that_restarts_under_a_working_rater(tmp_path: Path) -> None:
    """A broker of its own, stopped in the middle of the work and started again on the same data."""
    port = _free_port()
    services = tmp_path / "services"
    with embedded.running(services, kafka_port=port) as running:
        settings = Settings(
            kafka_bootstrap=running.endpoints.kafka_bootstrap,
            topic_prefix=f"t{secrets.token_hex(4)}-",
            data_dir=tmp_path / "data",
            partitions=2,
            batch_records=50,
            session_timeout=6,
        )
        ensure_topics(settings)
        deployment = Deployment(settings)
        deployment.publish_all()
        deployment.send(400)
        rater = deployment.rater()
        try:
            deployment.wait(lambda: sum(deployment.positions(deployment.topics.events).values()) > 0, "a first commit")
            deployment.send(400)
        except BaseException:
            deployment.close()
            raise
    try:
        with embedded.running(services, kafka_port=port):
            deployment.send(100)
            rater.may_die()
            deployment.wait(lambda: rater.process.poll() is not None or deployment.is_done(), "the rater to go on")
            if rater.process.poll() is not None:
                # librdkafka may hang in a call for ever; the worker notices and leaves, its supervisor starts it again.
                assert "the Kafka client has not come back from a call" in rater.text()
                deployment.rater()
            deployment.wait_done()
            deployment.check()
            assert rater.says("broker_away") <= 4  # once a partition and a step, not once a try
    finally:
        deployment.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
