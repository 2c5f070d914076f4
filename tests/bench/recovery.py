"""How long usage waits when a rater is killed: seconds from SIGKILL until each of its partitions commits again."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.infra.processes import Worker, WorkerGroup
from tests.integration.deployment import ROOT, Deployment

#: Longer than any of it should take, seconds.
_PATIENCE_S = 60.0
_RATER = (sys.executable, "-m", "pipeline.cli", "rater")


def restarted(deployment: Deployment) -> float:
    """One worker, killed and started again by its supervisor, as under ``tally up``."""
    return _killed(deployment, workers=1, restart=True)


def taken_over(deployment: Deployment) -> float:
    """Two workers; one is killed for good, and the other takes its partitions."""
    return _killed(deployment, workers=2, restart=False)


def _killed(deployment: Deployment, *, workers: int, restart: bool) -> float:
    """Measure with a trickle of events on every partition. ``deployment`` has topics and no raters yet."""
    deployment.publish_all(accounts=12)
    names = [f"rater-{number}" for number in range(1, workers + 1)]
    environment = deployment.environment() | {"PYTHONPATH": str(ROOT)}
    groups = [WorkerGroup([Worker(name, _RATER)], deployment.settings.data_dir, env=environment) for name in names]
    try:
        for group in groups:
            group.start()
        with _trickle(deployment):
            _await_all_joined(deployment, workers)
            victim = groups[0]
            (status,) = victim.statuses()
            assert status.pid is not None
            os.kill(status.pid, signal.SIGKILL)
            killed = time.monotonic()
            if not restart:
                victim.stop()
            before = deployment.positions(deployment.topics.events)
            _await_moved(deployment, before)
            return time.monotonic() - killed
    finally:
        for group in groups:
            group.stop()


@contextmanager
def _trickle(deployment: Deployment) -> Iterator[None]:
    """Events of every account, again and again."""
    stop = threading.Event()

    def stream() -> None:
        while not stop.wait(0.1):
            deployment.send(12)

    streaming = threading.Thread(target=stream)
    streaming.start()
    try:
        yield
    finally:
        stop.set()
        streaming.join()


def _await_all_joined(deployment: Deployment, workers: int) -> None:
    """Wait until all workers have partitions, and all partitions move."""
    deadline = time.monotonic() + _PATIENCE_S
    while len({receipt["worker"] for receipt in deployment.receipts()[-50:]}) < workers:
        assert time.monotonic() < deadline, f"{workers} workers did not all begin within {_PATIENCE_S:.0f} s"
        time.sleep(0.2)
    _await_moved(deployment, deployment.positions(deployment.topics.events))


def _await_moved(deployment: Deployment, before: dict[int, int]) -> None:
    """Wait until every partition that has events has committed more of them."""
    deadline = time.monotonic() + _PATIENCE_S
    waiting = set(before)
    while waiting:
        assert time.monotonic() < deadline, f"partitions {sorted(waiting)} stand still for {_PATIENCE_S:.0f} s"
        now = deployment.positions(deployment.topics.events)
        waiting = {partition for partition in waiting if now[partition] <= before[partition]}
        time.sleep(0.05)
