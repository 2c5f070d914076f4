"""Workers come and go while usage streams in: the totals are exact at the end."""

import threading

from tests.integration.conftest import Deploy
from tests.integration.deployment import Rater


def test_one_to_five_workers_and_back_under_load(deploy: Deploy) -> None:
    """Each worker checks that it was assigned the same partitions of events and retry, and would leave if not."""
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
        for wanted in (1, 2, 3, 4, 5, 3, 1):
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
