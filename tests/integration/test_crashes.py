"""Workers killed or frozen at the steps of a commit: the same totals, whatever became of their disk and of them."""

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.conftest import Deploy
from tests.integration.deployment import Deployment

STEPS = (
    "begun",
    "rows_produced",
    "receipt_produced",
    "changelogs_produced",
    "offsets_sent",
    "committed",
    "applied",
)
CASES = (
    *(("killed", step) for step in STEPS),
    ("killed, disk lost", "offsets_sent"),
    ("killed, disk lost", "committed"),
    ("frozen", "begun"),
    ("frozen", "changelogs_produced"),
    ("frozen", "offsets_sent"),
    ("frozen", "committed"),
)


def _crash(deployment: Deployment, case: tuple[str, str]) -> Deployment:
    fate, step = case
    deployment.publish_all()
    deployment.send(1200)
    if fate == "frozen":
        _freeze(deployment, step)
    else:
        _kill(deployment, step, disk_lost=fate == "killed, disk lost")
    deployment.wait_done()
    return deployment


def _kill(deployment: Deployment, step: str, *, disk_lost: bool) -> None:
    """At the third time: of two partitions, one or both have committed before."""
    deployment.rater(die_at=step, nth=3).wait()
    if disk_lost:
        shutil.rmtree(deployment.settings.data_dir / "rater")
    deployment.send(200)
    deployment.rater()


def _freeze(deployment: Deployment, step: str) -> None:
    """Stopped in a transaction until its partitions moved on: what it had begun must not count when it wakes up."""
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


@pytest.fixture(scope="module")
def crashed(deploy: Deploy) -> dict[tuple[str, str], Deployment]:
    """All cases at once: most of the time passes waiting for dead workers' sessions to end."""
    deployments = [deploy(batch_records=100) for _ in CASES]
    with ThreadPoolExecutor(5) as pool:
        return dict(zip(CASES, pool.map(_crash, deployments, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" at ".join)
def test_totals_are_exact_after(crashed: dict[tuple[str, str], Deployment], case: tuple[str, str]) -> None:
    crashed[case].check()
