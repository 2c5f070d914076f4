"""A rater that lost its disk begins with the snapshot of its state, and what was rated before it is not rated again."""

import shutil
import time
from pathlib import Path

from tests.integration.conftest import Deploy
from tests.rating.world import usage


def test_a_rater_without_its_disk_begins_with_the_snapshot(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy(snapshot_dir=tmp_path / "volume", snapshot_interval=0.1)
    deployment.publish_all()
    properties = {"tokens": "3", "model": "small"}
    now_us = time.time_ns() // 1000
    events = [
        usage(f"again-{n}", f"acct-{n % 12:02d}", timestamp=now_us, properties=properties, sequence=n)
        for n in range(300)
    ]
    for event in events:
        deployment.send_event(event)
    deployment.send(500)
    rater = deployment.rater()
    deployment.wait_done()
    volume = tmp_path / "volume"
    deployment.wait(lambda: len(list(volume.glob("*/*/manifest"))) == 2, "a snapshot of both partitions")
    rater.stop()
    shutil.rmtree(deployment.settings.data_dir / "rater")
    for event in events:
        deployment.send_event(event)
    heir = deployment.rater()
    deployment.wait_done()
    assert heir.says("snapshot_used") == 2
    deployment.check()
