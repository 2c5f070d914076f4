"""Workers are restarted, stopped and never orphaned; shown with small Python children."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.infra import processes
from pipeline.infra.processes import Worker, WorkerGroup, locked

_SLEEPS = (sys.executable, "-c", "import time; time.sleep(600)")
_DEAF = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)",
)


def _wait_for(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not: {what}"
        time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_ended_worker_starts_again_after_growing_pauses(tmp_path: Path) -> None:
    said: list[str] = []
    worker = Worker("rater-1", (sys.executable, "-c", "print('here'); raise SystemExit(3)"))
    with WorkerGroup([worker], tmp_path, on_change=said.append):
        _wait_for(lambda: sum("ended" in line for line in said) == 2, "second end")
    assert [line for line in said if "ended" in line] == [
        "rater-1 ended with exit code 3, starts again in 1 s",
        "rater-1 ended with exit code 3, starts again in 2 s",
    ]
    assert (tmp_path / "rater-1.log").read_text().count("here") >= 2


def test_killed_worker_is_named_and_replaced(tmp_path: Path) -> None:
    said: list[str] = []
    with WorkerGroup([Worker("sink-1", _SLEEPS)], tmp_path, on_change=said.append) as group:
        (before,) = group.statuses()
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        _wait_for(lambda: group.statuses()[0].restarts == 1 and group.statuses()[0].pid, "replacement")
        (after,) = group.statuses()
        assert after.pid not in (None, before.pid)
    assert "sink-1 was killed by SIGKILL, starts again in 1 s" in said
    assert said[-1] == "sink-1 stopped"
    assert after.pid is not None and _is_gone(after.pid)


def test_worker_deaf_to_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    group = WorkerGroup([Worker("deaf", _DEAF)], tmp_path, grace=0.5)
    group.start()
    pid = group.statuses()[0].pid
    assert pid is not None
    _wait_for(lambda: (tmp_path / "deaf.log").read_text(), "worker runs")
    begin = time.monotonic()
    group.stop()
    assert 0.5 <= time.monotonic() - begin < 5
    assert _is_gone(pid)


def test_environment_reaches_the_worker(tmp_path: Path) -> None:
    argv = (
        sys.executable,
        "-c",
        "import os, time; print(os.environ['A'], os.environ['B'], flush=True); time.sleep(99)",
    )
    with WorkerGroup([Worker("w", argv, {"B": "own"})], tmp_path, env={"A": "group", "B": "group"}):
        _wait_for(lambda: (tmp_path / "w.log").read_text() == "group own\n", "environment printed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("argv", [_SLEEPS, _DEAF], ids=["usual", "deaf to SIGTERM"])
def test_workers_die_with_a_killed_parent(tmp_path: Path, argv: tuple[str, ...]) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.infra.processes import Worker, WorkerGroup\n"
        "group = WorkerGroup([Worker('w', tuple(sys.argv[2:]))], Path(sys.argv[1])); group.start()\n"
        "print(group.statuses()[0].pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *argv]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert not _is_gone(worker)
        parent.kill()
        _wait_for(lambda: _is_gone(worker), "worker gone")


def test_detached_group_is_found_and_stopped(tmp_path: Path) -> None:
    run_dir, log_dir = tmp_path / "run", tmp_path / "logs"
    assert processes.detached(run_dir) is None
    assert not processes.stop_detached(run_dir)
    processes.start_detached([Worker("w", _SLEEPS)], run_dir, log_dir=log_dir, env={})
    statuses = processes.detached(run_dir)
    assert statuses is not None
    (status,) = statuses
    assert status.name == "w" and status.pid is not None and not _is_gone(status.pid)

    with pytest.raises(TimeoutError, match="did not start"):
        processes.start_detached([Worker("w", _SLEEPS)], run_dir, log_dir=log_dir, env={})

    assert processes.stop_detached(run_dir)
    assert processes.detached(run_dir) is None
    assert _is_gone(status.pid)


def test_lock_names_its_file_when_held(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with (
        locked(path, timeout=0),
        pytest.raises(TimeoutError, match=r"x\.lock for more than 0.1 s"),
        locked(path, timeout=0.1),
    ):
        pass
    with locked(path, timeout=0):
        pass
