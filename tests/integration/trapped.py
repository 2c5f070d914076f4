"""A rater that goes into a trap, named by the first argument's only key:

``overlaps``: every list begins with the records of the one before, as after a seek back;
``is_paused``: each partition is paused while the first lists of it are on their way, and goes on a moment later;
``dies_in_transaction``: SIGKILL in its first transaction, when all of it but the commit stands in the log.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from pipeline.infra import logs
from pipeline.infra.settings import Settings
from pipeline.rating.app import run
from pipeline.rating.batch import Source
from pipeline.rating.faust_batches import Fetched
from pipeline.rating.partition import PartitionRater


def main() -> None:
    [trap] = json.loads(sys.argv[1])
    settings = Settings()
    logs.configure(settings, worker="trapped")
    if trap == "overlaps":
        _overlap()
    if trap == "is_paused":
        _pause()
    run(settings, on_step=_die if trap == "dies_in_transaction" else lambda step: None)


def _overlap() -> None:
    offer = PartitionRater.offer
    last: dict[TP, Fetched] = {}

    def overlapping(self: PartitionRater, source: Source, fetched: Fetched) -> None:
        before = last.get(fetched.tp, fetched)
        last[fetched.tp] = fetched
        if before is not fetched:
            print("overlaps", file=sys.stderr)
            records = [*before.records, *fetched.records]
            fetched = Fetched(fetched.tp, before.from_offset, fetched.next_offset, records)
        offer(self, source, fetched)

    PartitionRater.offer = overlapping  # type: ignore[method-assign]


def _pause() -> None:
    fetch, paused = driver.Consumer._wait_next_records, Counter[TP]()

    async def fetching(self: Any, timeout: float) -> Any:
        records, active = await fetch(self, timeout)
        for tp in map(TP._make, records):
            paused[tp] += 1
            if paused[tp] <= 3:
                print("is paused", file=sys.stderr)
                self.pause_partitions({tp})
                self.loop.call_later(0.1, self.resume_partitions, {tp})
        return records, active

    driver.Consumer._wait_next_records = fetching


def _die(step: str) -> None:
    if step == "offsets_sent":
        time.sleep(1)  # what the client holds back for a moment is written by then
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
