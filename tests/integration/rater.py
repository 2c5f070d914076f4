"""One rater in a process of its own, as ``tally rater`` runs it, with a hand on the steps of its commits.

Settings come from the environment; the first argument is a JSON object of hooks:
``die_at`` step and ``nth`` time (SIGKILL to itself there); ``freeze_at`` step (SIGSTOP, once both of two partitions
have committed, so that none is being taken); ``freeze_taking``: SIGSTOP inside the first ``init_transactions``;
``poison``: the meter raises on this quantity; ``never_commit``: batches are processed, but not committed;
``agent_fails``: Faust's agent raises on the nth fetched list; ``drop_list``: the nth fetched list is lost;
``stalls``: after the first commit, ``fetcher`` (it brings nothing any more), ``loop`` (the event loop hangs), or
``member`` (it leaves the group and does not join again).
"""

import asyncio
import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from confluent_kafka import Producer

from pipeline.core.meters import Meter, compile_measure
from pipeline.infra import logs
from pipeline.infra.settings import Settings
from pipeline.rating import app, commit, enrich
from pipeline.rating.app import RaterFailed, run
from pipeline.rating.commit import Committer
from pipeline.rating.faust_batches import BatchThread
from pipeline.rating.partition import PartitionRater


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # for a person who looks into one that hangs
    hooks = json.loads(sys.argv[1])
    settings = Settings()
    logs.configure(settings, worker=f"rater-{os.getpid()}")
    steps: Counter[str] = Counter()
    committed: set[str] = set()
    stalled = threading.Event()
    lock = threading.Lock()

    def on_step(step: str) -> None:
        with lock:
            steps[step] += 1
            if step == hooks.get("die_at") and steps[step] == hooks["nth"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == hooks.get("freeze_at") and len(committed) == 2:
                hooks.clear()
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == "applied":
                committed.add(threading.current_thread().name)
                stalled.set()

    if "poison" in hooks:
        _poison(hooks["poison"].encode())
    if hooks.get("never_commit"):
        Committer.commit = lambda *args: print("processed", args[1].next_offset, file=sys.stderr)  # type: ignore
    if "agent_fails" in hooks:
        _fail_agent(hooks["agent_fails"], ZeroDivisionError("a bug in the agent"))
    if "drop_list" in hooks:
        _fail_agent(hooks["drop_list"], None)
    if hooks.get("freeze_taking"):
        _freeze_taking()
    if "stalls" in hooks:
        _stall(hooks["stalls"], stalled)
    try:
        run(settings, on_step=on_step)
    except RaterFailed as error:
        print(f"RaterFailed: {error}", file=sys.stderr)
        return 1
    return 0


def _poison(quantity: bytes) -> None:
    """Put a bug into the meter."""

    def compiled(meter: Meter) -> Any:
        measure = compile_measure(meter)

        def measured(properties: Mapping[bytes, bytes]) -> Any:
            if properties.get(b"tokens") == quantity:
                raise ZeroDivisionError("a bug in the meter")
            return measure(properties)

        return measured

    enrich.compile_measure = compiled  # type: ignore[attr-defined]


def _fail_agent(nth: int, error: Exception | None) -> None:
    offer, calls = PartitionRater.offer, Counter[str]()

    def failing(self: PartitionRater, *args: Any) -> None:
        calls["offer"] += 1
        if calls["offer"] != nth:
            offer(self, *args)
        elif error is not None:
            raise error
        else:
            print("a list is dropped", file=sys.stderr)

    PartitionRater.offer = failing  # type: ignore[method-assign]


def _freeze_taking() -> None:
    calls = itertools.count()

    class Freezing(Producer):
        def init_transactions(self, *args: Any) -> None:
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            super().init_transactions(*args)

    commit.Producer = Freezing  # type: ignore[misc]


def _stall(what: str, now: threading.Event) -> None:
    """Something ends without a word once the event is set, while the process and its other threads go on."""
    if what == "loop":
        app._GONE_S = 2.0
    fetch = BatchThread._fetch_records

    async def fetching(self: BatchThread, consumer: Any, *args: Any, **kwargs: Any) -> Any:
        if not now.is_set():
            return await fetch(self, consumer, *args, **kwargs)
        if what == "loop":
            self.parent_loop.call_soon_threadsafe(time.sleep, 3600)
        if what == "member":
            await consumer._coordinator.close()
        return await asyncio.sleep(3600, {})

    BatchThread._fetch_records = fetching  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
