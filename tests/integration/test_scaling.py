"""Workers come, go, die and freeze while usage streams in: the totals are exact at the end."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.conftest import Deploy
from tests.integration.deployment import Deployment, Rater


def test_one_to_five_workers_and_back_under_load(deploy: Deploy) -> None:
    deployment = deploy(partitions=4, batch_records=100)
    deployment.publish_all()
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            deployment.send(40)
            stop.wait(0.1)

    streaming = threading.Thread(target=stream)
    streaming.start()
    raters: list[Rater] = []
    try:
        for wanted in (1, 2, 5, 3, 1):
            gone, raters = raters[wanted:], raters[:wanted]
            before = {rater: rater.says("partitions_assigned") for rater in raters}
            while len(raters) < wanted:
                raters.append(deployment.rater())
            for rater in gone:
                assert rater.stop() == 0
            deployment.wait(
                lambda: all(rater.says("partitions_assigned") > before.get(rater, 0) for rater in raters),  # noqa: B023
                f"{wanted} workers to share the partitions",
            )
            progress = sum(deployment.positions(deployment.topics.events).values())
            deployment.wait(
                lambda: sum(deployment.positions(deployment.topics.events).values()) > progress + 100,  # noqa: B023
                f"{wanted} workers to go on",
            )
    finally:
        stop.set()
        streaming.join()
    deployment.wait_done()
    deployment.check()


FROZEN_AT = ("begun", "changelogs_produced", "offsets_sent", "committed")


def _frozen(deployment: Deployment, step: str) -> Deployment:
    zombie = deployment.rater(freeze_at=step)
    zombie.may_die()
    deployment.wait(lambda: zombie.is_stopped(), f"the worker to freeze at {step}")
    heir = deployment.rater()
    deployment.wait(lambda: heir.says("partition_taken") == 2, "the other worker to take both partitions")
    deployment.send(200)
    deployment.wait_done()
    zombie.signal(signal.SIGCONT)
    # It finds out and leaves, or joins the group again: either is fine, as long as everything goes on.
    deployment.send(200)
    deployment.wait_done()
    return deployment


@pytest.fixture(scope="module")
def frozen(deploy: Deploy) -> dict[str, Deployment]:
    deployments = [deploy(batch_records=100) for _ in FROZEN_AT]
    for deployment in deployments:
        deployment.publish_all()
        deployment.send(1500)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(FROZEN_AT, pool.map(_frozen, deployments, FROZEN_AT), strict=True))


@pytest.mark.parametrize("step", FROZEN_AT)
def test_a_worker_frozen_in_a_commit_wakes_up_too_late(frozen: dict[str, Deployment], step: str) -> None:
    """Stopped until its partitions moved on, in the middle of a transaction: what it had begun must not count."""
    frozen[step].check()
