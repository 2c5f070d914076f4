"""A worker that stands still leaves, a partition that refuses too much stops, a worker that is fenced comes back."""

import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from pipeline.infra.going_on import GoingOn
from pipeline.infra.processes import Worker, WorkerGroup
from pipeline.operations.stops import Stop, stops
from tests.integration.conftest import Deploy
from tests.integration.deployment import ROOT, Deployment
from tests.integration.test_rater import event, listening
from tests.rating.world import account, contract

# -- the watchdog

STALLS = {
    "fetcher": "has stood at offset",
    "loop": "has stood at offset",
    "member": "has not known this worker",
}


def _stall(deployment: Deployment, *, what: str) -> None:
    """A worker ceases to do something; nothing is wrong while there is nothing to do, and it leaves once there is."""
    deployment.publish_all()
    deployment.park(event("waits", "nobody-9"), offset=10**6, wait_s=3600)
    deployment.send(50)
    rater = deployment.rater(stalls=what)
    deployment.wait_done()
    time.sleep(2)  # the fetch that was under way is over
    if what != "member":
        time.sleep(7)
        assert rater.process.poll() is None, f"it left while nothing was to be done:\n{rater.text()[-3000:]}"
        deployment.send(50)
    assert rater.wait(45) == 1
    assert rater.says("rater_failed") == 1
    assert STALLS[what] in rater.text()
    assert rater.says("leaves as it is") == (what == "loop")
    deployment.send(50)
    deployment.rater()
    deployment.wait_done()


# -- the dead-letter limits


def _stops(deployment: Deployment) -> list[Stop]:
    return stops(deployment.settings, AdminClient(deployment.settings.kafka))


def _send_bad(deployment: Deployment, count: int) -> None:
    for _ in range(count):
        deployment.sent.messages += 1
        deployment.sent.dead["undecodable"] += 1
        deployment.send_raw(b"\xff" * 40, b"acct-00", partition=0)
    deployment.flush()


def _refuse(deployment: Deployment) -> None:
    """A partition gets 300 bad events in a row and stops, through two owners and until a person says go on."""
    deployment.publish_all()
    deployment.park(event("early", "acct-99"), offset=10**6, wait_s=0)
    _send_bad(deployment, 300)
    deployment.send(100)
    rater = deployment.rater()
    deployment.wait(lambda: rater.says("partition_stopped") == 1, "the partition to stop")
    assert "dead letters in a row (limit 50)" in rater.text() and "tally dlq resume 0" in rater.text()
    letters = len([letter for letter in deployment.dead() if letter["reason"] == "undecodable"])
    assert 50 < letters <= 70  # the batch that breaks the limit is written, and none after it
    position = deployment.positions(deployment.topics.events)[0]
    assert _stops(deployment) == [Stop(0, position, f"{letters} dead letters in a row (limit 50)")]

    [(_, port)] = listening(rater.pid)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert 'tally_rater_stopped_partitions{partition="0"} 1.0' in answer.read().decode()

    # The other partition goes on, and what was parked on this one.
    ends = deployment._ends()
    deployment.wait(lambda: deployment.positions(deployment.topics.events)[1] >= ends[1], "the other partition")

    # Another owner stays stopped, and writes nothing.
    rater.kill()
    heir = deployment.rater()
    deployment.wait(lambda: heir.says("partition_stopped") == 1, "the next owner to stay stopped")
    deployment.publish(account("acct-99"), contract("acct-99"))
    deployment.wait(lambda: any(r["resolutions"] for r in deployment.receipts()), "the parked event to be tried")
    time.sleep(2)
    assert deployment.positions(deployment.topics.events)[0] == position

    # A person lets it go on: it counts anew, and stops again.
    with closing(GoingOn(deployment.settings.kafka, deployment.topics)) as going_on:
        going_on.say(0, position)
        deployment.wait(lambda: heir.says("partition_stopped") == 2, "the partition to stop again")
        assert heir.says("partition_resumed") == 1
        [again] = _stops(deployment)
        assert position + 50 < again.next_offset <= position + 70

    # Without the limit, nothing holds it.
    assert heir.stop() == 0
    without = Deployment(deployment.settings.model_copy(update={"dead_letter_run_max": 0}))
    try:
        without.rater()
        without.wait(lambda: without.is_done(ends), "the rest to be rated")
        assert _stops(without) == []
    finally:
        without.close()
    assert len([one for one in deployment.dead() if one["reason"] == "undecodable"]) == 300


# -- fenced by a worker that wakes up late


def _fence(deployment: Deployment) -> None:
    """A worker freezes while it takes a partition; long after, its ``init_transactions`` fences who took it instead."""
    deployment.publish_all()
    folder = deployment.settings.data_dir / "supervised"
    zombie = deployment.rater(freeze_taking=True)
    zombie.may_die()
    deployment.wait(zombie.is_stopped, "the worker to freeze")
    argv = (sys.executable, "-m", "tests.integration.rater", "{}")
    environment = deployment.environment(folder) | {"PYTHONPATH": str(ROOT)}
    said: list[str] = []
    with WorkerGroup([Worker("rater-1", argv)], folder, env=environment, on_change=said.append) as group:
        deployment.send(200)
        deployment.wait_done()
        zombie.signal(signal.SIGCONT)
        woken = time.monotonic()
        while group.statuses()[0].restarts == 0 and time.monotonic() - woken < 30:
            deployment.send(20)  # who is fenced learns it from a commit
            time.sleep(0.2)
        deployment.send(200)
        deployment.wait_done()
    assert any("ended with exit code 1" in line for line in said)
    assert "fenced" in (folder / "rater-1.log").read_text()


# -- all at once: most of the time passes waiting

SCENARIOS: dict[str, tuple[Callable[[Deployment], None], dict[str, Any]]] = {
    **{what: (partial(_stall, what=what), {"partitions": 1, "progress_timeout": 5}) for what in STALLS},
    "limit": (_refuse, {"dead_letter_run_max": 50, "batch_records": 20, "metrics_port": 0}),
    "fenced": (_fence, {}),
}
Played = dict[str, tuple[Deployment, "Future[None]"]]


@pytest.fixture(scope="module")
def played(deploy: Deploy) -> Played:
    deployments = {name: deploy(**options) for name, (_, options) in SCENARIOS.items()}
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        return {name: (one, pool.submit(SCENARIOS[name][0], one)) for name, one in deployments.items()}


@pytest.mark.parametrize("what", STALLS)
def test_a_worker_that_stands_still_leaves_and_the_next_goes_on(played: Played, what: str) -> None:
    deployment, scenario = played[what]
    scenario.result()
    deployment.check()


def test_a_partition_that_refuses_too_much_stops_until_a_person_says_go_on(played: Played) -> None:
    played["limit"][1].result()


def test_a_healthy_worker_that_is_fenced_is_started_again_and_goes_on(played: Played) -> None:
    deployment, scenario = played["fenced"]
    scenario.result()
    deployment.check()
