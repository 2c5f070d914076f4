"""A rater killed at each step of its commit, and started again: the same totals, whatever became of its disk."""

import shutil
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
CASES = [(step, lost) for step in STEPS for lost in (False, True)]


def _killed(deployment: Deployment, step: str, disk_lost: bool) -> Deployment:
    """Kill at the third occurrence: of two partitions, one or both have committed before."""
    deployment.rater(die_at=step, nth=3).wait()
    if disk_lost:
        shutil.rmtree(deployment.settings.data_dir / "rater")
    deployment.send(200)
    deployment.rater()
    deployment.wait_done()
    return deployment


@pytest.fixture(scope="module")
def killed(deploy: Deploy) -> dict[tuple[str, bool], Deployment]:
    """All cases at once: most of the time passes waiting for the dead worker's session to end."""
    deployments = [deploy(batch_records=100) for _ in CASES]
    for deployment in deployments:
        deployment.publish_all()
        deployment.send(800)
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(_killed, deployments, *zip(*CASES, strict=True))
        return dict(zip(CASES, done, strict=True))


@pytest.mark.parametrize(("step", "disk_lost"), CASES)
def test_killed_at_a_step_of_the_commit(killed: dict[tuple[str, bool], Deployment], step: str, disk_lost: bool) -> None:
    killed[step, disk_lost].check()
