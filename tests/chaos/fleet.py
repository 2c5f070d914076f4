"""The workers and producers of a run, each restarted when it ends by the product's own supervisor."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline.cli.services import worker_env
from pipeline.infra import processes
from pipeline.infra.processes import Worker, WorkerGroup
from pipeline.infra.settings import Settings
from tests.chaos.load import Load

#: A worker that starts while the broker is away may give up in seconds, but not so often. Seconds, times in a row.
_SHORT_LIFE_S, _SHORT_LIVES_MAX = 15.0, 15


class Fleet:
    """Workers by name: ``rater-1``, ``sink-2``, ``relay-1``, ``producer-1``."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        #: What producers send; set before the first of them is added.
        self.load: Load | None = None
        self._groups: dict[str, WorkerGroup] = {}
        self._leaving: list[threading.Thread] = []
        #: Times a worker ended that nobody had killed, by kind and how.
        self.exits: Counter[str] = Counter()
        self._started: dict[str, float] = {}
        self._short_lives: Counter[str] = Counter()
        # Killed every minute a worker would soon wait half a minute for its restart, and the run prove little.
        self._backoff, processes._BACKOFF_LAST = processes._BACKOFF_LAST, 2.0

    @property
    def names(self) -> list[str]:
        return list(self._groups)

    def add(self, name: str) -> None:
        kind = name.partition("-")[0]
        argv: tuple[str, ...] = (sys.executable, "-m", "pipeline.cli", kind)
        if kind == "producer":
            assert self.load is not None
            argv = (
                *(sys.executable, "-m", "tests.chaos.producer", name),
                *(json.dumps(asdict(self.load)), str(self.told(name))),
            )
        environment = worker_env(self._settings) | {
            "TALLY_DATA_DIR": str(self.state_dir(name)),
            "TALLY_SESSION_TIMEOUT": str(self._settings.session_timeout),
        }
        group = WorkerGroup(
            [Worker(name, argv, environment)], self._settings.data_dir / "logs", on_change=lambda line: self._on(line)
        )
        group.start()
        self._groups[name] = group

    def remove(self, name: str) -> None:
        """SIGTERM, and no restart. Returns at once."""
        leaving = threading.Thread(target=self._groups.pop(name).stop)
        leaving.start()
        self._leaving.append(leaving)

    def pid(self, name: str) -> int | None:
        """None while it waits for its restart."""
        return self._groups[name].statuses()[0].pid

    def signal(self, name: str, number: signal.Signals) -> bool:
        """False when there is no process to send it to."""
        pid = self.pid(name)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return True

    def wipe(self, name: str) -> bool:
        """Kill a rater and take away the disk it has (and another may share). False when it has no process."""
        if not self.signal(name, signal.SIGKILL):
            return False
        shutil.rmtree(self.state_dir(name) / "rater", ignore_errors=True)
        return True

    def state_dir(self, name: str) -> Path:
        """Raters 1 and 2 share a machine's disk, the others have one of their own."""
        if name == "rater-2":
            name = "rater-1"
        return self._settings.data_dir / name

    def told(self, name: str) -> Path:
        return self._settings.data_dir / f"{name}.json"

    def delivered(self, name: str) -> bool:
        """Has a producer delivered all it has to?"""
        try:
            told = json.loads(self.told(name).read_text())
        except FileNotFoundError:
            return False
        assert self.load is not None
        return bool(told["next"] > self.load.count and told["spooled"] == told["in_flight"] == 0)

    def stop(self) -> None:
        for name in self.names:
            self.signal(name, signal.SIGCONT)
            self.remove(name)
        for leaving in self._leaving:
            leaving.join()
        processes._BACKOFF_LAST = self._backoff

    def check(self) -> None:
        """Raises AssertionError when a worker cannot even start: nothing is proved by waiting for it."""
        for name, times in self._short_lives.items():
            log = self._settings.data_dir / "logs" / f"{name}.log"
            assert times < _SHORT_LIVES_MAX, f"{name} ended {times} times as soon as it was started: {log}"

    def _on(self, line: str) -> None:
        name, _, how = line.partition(" ")
        if how.startswith("started"):
            self._started[name] = time.monotonic()
        if "starts again" in line and "SIGKILL" not in line:
            self._short_lives[name] += 1
            if time.monotonic() - self._started[name] > _SHORT_LIFE_S:
                self._short_lives[name] = 0
            self.exits[f"{name.partition('-')[0]} {how.partition(',')[0]}"] += 1
            last = processes.tail(self._settings.data_dir / "logs" / f"{name}.log", 1)
            self._say(f"{line}: {last[:300]}")
