"""One rater in a process of its own, as ``tally rater`` runs it, with a hand on the steps of its commits.

Settings come from the environment; the first argument is a JSON object of hooks:
``die_at`` step and ``nth`` time (SIGKILL to itself there); ``freeze_at`` step (SIGSTOP, once both of two partitions
have committed, so that none is being taken);
``poison``: the meter raises on this quantity; ``never_commit``: batches are processed, but not committed;
``agent_fails``: Faust's agent raises on the nth fetched list; ``drop_list``: the nth fetched list is lost.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.core.meters import Meter, compile_measure
from pipeline.infra import logs
from pipeline.infra.settings import Settings
from pipeline.rating import enrich
from pipeline.rating.app import RaterFailed, run
from pipeline.rating.commit import Committer
from pipeline.rating.partition import PartitionRater


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # for a person who looks into one that hangs
    hooks = json.loads(sys.argv[1])
    settings = Settings()
    logs.configure(settings, worker=f"rater-{os.getpid()}")
    steps: Counter[str] = Counter()
    committed: set[str] = set()
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

    if "poison" in hooks:
        _poison(hooks["poison"].encode())
    if hooks.get("never_commit"):
        Committer.commit = lambda *args: print("processed", args[1].next_offset, file=sys.stderr)  # type: ignore
    if "agent_fails" in hooks:
        _fail_agent(hooks["agent_fails"], ZeroDivisionError("a bug in the agent"))
    if "drop_list" in hooks:
        _fail_agent(hooks["drop_list"], None)
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


if __name__ == "__main__":
    sys.exit(main())
