"""Child processes that never outlive their parent, and groups of workers that are restarted when they end.

Owns starting, watching and stopping processes. What the processes are (services, raters, sinks) is the caller's.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_LAUNCH = Path(__file__).with_name("launch.py")
#: Wait before a worker's restart: doubles from the first to the last, back to the first after a steady run. Seconds.
_BACKOFF_FIRST, _BACKOFF_LAST, _STEADY = 1.0, 30.0, 60.0
#: How often the group looks at its workers, seconds. Bounds how late an exit is noticed.
_POLL = 0.1
#: A worker's log is turned over to ``.1`` at its start when larger. Bytes.
_LOG_BYTES_MAX = 20 * 1024 * 1024


def spawn(
    argv: Sequence[str],
    *,
    output: IO[bytes] | int,
    env: Mapping[str, str] | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
    user: str = "",
) -> "subprocess.Popen[bytes]":
    """Start ``argv`` in a session of its own; on Linux it gets ``death_signal`` when the calling *thread* ends.

    ``user`` (root only) runs it as that system user. ``argv[0]`` must be an absolute path.
    """
    launch = [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), str(int(death_signal)), user]
    return subprocess.Popen(
        [*launch, *argv],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(env) if env is not None else None,
        start_new_session=True,
    )


def end(
    processes: Sequence["subprocess.Popen[bytes]"], *, grace: float, first: signal.Signals = signal.SIGTERM
) -> None:
    """Ask all to end with ``first``, wait up to ``grace`` seconds for all, SIGKILL the rest."""
    for process in processes:
        process.send_signal(first)
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def disown(process: "subprocess.Popen[bytes]") -> None:
    """Let a process outlive this one: it is neither waited for nor warned about."""
    process.returncode = 0


@contextlib.contextmanager
def locked(path: Path, *, timeout: float) -> Iterator[None]:
    """Hold an exclusive lock on the file while in the block; the kernel gives it back when the process dies.

    Raises TimeoutError when another process holds it for longer than ``timeout`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process holds {path} for more than {timeout:g} s") from None
                time.sleep(0.05)
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_json(path: Path, value: Any) -> None:
    """Replace the file's content in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.touch(mode=0o600)
    new.write_text(json.dumps(value, indent=2) + "\n")
    new.replace(path)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log file; empty when there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


# -- Workers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process: its name (also its log's), its command line with an absolute program, its own environment."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Slot:
    worker: Worker
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    restart_at: float = 0.0
    backoff: float = _BACKOFF_FIRST
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What became of a worker. ``pid`` is None while it waits for its restart."""

    name: str
    pid: int | None
    restarts: int


@dataclass(slots=True)
class WorkerGroup:
    """Workers kept running: restarted with back-off when they end, stopped together, dead when this process dies.

    ``env`` is added to this process's environment, a worker's own on top. ``on_change`` is called from the group's
    thread with one line per state change. Use as a context manager, or ``start`` and ``stop``.
    """

    workers: Sequence[Worker]
    log_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    on_change: Callable[[str], None] = lambda line: None
    grace: float = 15.0
    _slots: list[_Slot] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _started: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start all workers; returns when each process exists, not when it is ready."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._slots = [_Slot(worker) for worker in self.workers]
        # One thread both starts and watches: the kernel ties a child's death signal to the thread that forked it.
        self._thread = threading.Thread(target=self._run, name="workers", daemon=True)
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """Stop all workers: SIGTERM, then SIGKILL after ``grace`` seconds. Safe to call twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def statuses(self) -> list[WorkerStatus]:
        """One status per worker, in the order given."""
        return [
            WorkerStatus(slot.worker.name, slot.process.pid if slot.process else None, slot.restarts)
            for slot in self._slots
        ]

    def __enter__(self) -> "WorkerGroup":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            for slot in self._slots:
                self._begin(slot)
            self._started.set()
            while not self._stopping.wait(_POLL):
                for slot in self._slots:
                    self._look(slot)
        finally:
            self._started.set()
            end([slot.process for slot in self._slots if slot.process is not None], grace=self.grace)
            for slot in self._slots:
                if slot.process is not None:
                    self.on_change(f"{slot.worker.name} stopped")
                    slot.process = None

    def _begin(self, slot: _Slot) -> None:
        log = self.log_dir / f"{slot.worker.name}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            slot.process = spawn(slot.worker.argv, output=output, env={**os.environ, **self.env, **slot.worker.env})
        slot.started = time.monotonic()
        self.on_change(f"{slot.worker.name} started, pid {slot.process.pid}")

    def _look(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.process is None:
            if now >= slot.restart_at:
                slot.restarts += 1
                self._begin(slot)
            return
        code = slot.process.poll()
        if code is None:
            return
        if now - slot.started >= _STEADY:
            slot.backoff = _BACKOFF_FIRST
        slot.process, slot.restart_at = None, now + slot.backoff
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.on_change(f"{slot.worker.name} {ended}, starts again in {slot.backoff:g} s")
        slot.backoff = min(slot.backoff * 2, _BACKOFF_LAST)


# -- A group that outlives the command that started it -----------------------------------------------------------------


def start_detached(workers: Sequence[Worker], run_dir: Path, *, log_dir: Path, env: Mapping[str, str]) -> int:
    """Start a supervisor process with these workers; it stays after this process. Returns its pid.

    Raises TimeoutError when a group already runs there. ``env`` reaches the supervisor through its environment, never a
    command line, which other users could read.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with (log_dir / "workers.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.infra.processes", str(run_dir), str(log_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **env},
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([[worker.name, worker.argv, dict(worker.env)] for worker in workers]).encode())
    process.stdin.close()
    if process.stdout.readline().strip() != b"started":
        process.stdout.close()
        process.wait()
        raise TimeoutError(f"the workers did not start:\n{tail(log_dir / 'workers.log')}")
    process.stdout.close()
    disown(process)
    return process.pid


def detached(run_dir: Path) -> list[WorkerStatus] | None:
    """The workers running there, or None when no supervisor lives."""
    state = run_dir / "workers.json"
    if not is_locked(run_dir / "workers.lock") or not state.exists():
        return None
    return [WorkerStatus(*status) for status in json.loads(state.read_text())["workers"]]


def stop_detached(run_dir: Path, *, timeout: float = 30.0) -> bool:
    """Stop the supervisor and its workers; False when none ran. Raises TimeoutError when it does not end."""
    if not is_locked(run_dir / "workers.lock"):
        return False
    state = run_dir / "workers.json"
    if state.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(state.read_text())["pid"], signal.SIGTERM)
    with locked(run_dir / "workers.lock", timeout=timeout):
        return True


def _supervise(run_dir: Path, log_dir: Path) -> None:
    """Body of the supervisor process: workers as JSON on stdin, ``started`` on stdout, ends on SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    workers = [Worker(name, tuple(argv), env) for name, argv, env in json.load(sys.stdin)]
    state = run_dir / "workers.json"

    def note(line: str) -> None:
        sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
        sys.stderr.flush()

    with locked(run_dir / "workers.lock", timeout=1.0):
        group = WorkerGroup(workers, log_dir, on_change=note)
        with group:
            known: list[WorkerStatus] = []
            ready = False
            while not stop.is_set():
                if (now := group.statuses()) != known:
                    known = now
                    rows = [(status.name, status.pid, status.restarts) for status in known]
                    write_json(state, {"pid": os.getpid(), "workers": rows})
                if not ready:
                    ready = True
                    with contextlib.suppress(BrokenPipeError):  # whoever started us may be gone already
                        sys.stdout.write("started\n")
                        sys.stdout.flush()
                stop.wait(0.2)
        state.unlink(missing_ok=True)


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), Path(sys.argv[2]))
