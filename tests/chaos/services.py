"""A broker and a database that can be killed one by one, and the proxy in front of the broker.

The product's supervisor of embedded services ends both when one dies; here each is started by itself, with the same
binaries and settings, but that the broker sends its clients to the proxy.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.infra.embedded import _Kafka, _Postgres, fetch_kafka
from pipeline.infra.processes import end, spawn, tail
from pipeline.infra.settings import default_cache_dir

_HOST = "127.0.0.1"
_READY_S = 60.0
#: PostgreSQL's sessions notice the death of their server at once, unless they are stopped.
_SESSIONS_GONE_S = 20.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


#: A restarted broker is let in again when the controller has given up the one before it. Measured from its start until
#: it answers, on two busy cores: 15 s with Kafka's 9 s, 6-8 s with 2 s. The run is about what happens after.
_SESSION_MS, _HEARTBEAT_MS = 3_000, 500


class _BehindProxy(_Kafka):
    """The embedded broker, but its clients are told to come through the proxy."""

    def __init__(self, data_dir: Path, jars: list[Path], ports: tuple[int, int], proxy_port: int) -> None:
        super().__init__(data_dir, jars, ports)
        self._proxy_port = proxy_port

    def _write_config(self, name: str, log_dirs: Path) -> Path:
        path = super()._write_config(name, log_dirs)
        with path.open("a") as file:  # of a setting given twice the last counts
            file.write(
                f"advertised.listeners=PLAINTEXT://{_HOST}:{self._proxy_port}\n"
                f"broker.session.timeout.ms={_SESSION_MS}\nbroker.heartbeat.interval.ms={_HEARTBEAT_MS}\n"
            )
        return path


class Services:
    """Kafka, PostgreSQL and the proxy, by name: ``broker``, ``postgres``, ``network``.

    All methods are called from one thread, which must live as long as they: the kernel ties them to it.
    """

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "logs").mkdir(exist_ok=True)
        self._data_dir, self._logs = data_dir, data_dir / "logs"
        self._kafka_port, controller_port, self._proxy_port = free_ports(3)
        jars = fetch_kafka(default_cache_dir(), lambda step: None)
        self._kafka = _BehindProxy(data_dir, jars, (self._kafka_port, controller_port), self._proxy_port)
        self._postgres = _Postgres(data_dir)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def kafka_bootstrap(self) -> str:
        return f"{_HOST}:{self._proxy_port}"

    @property
    def dsn(self) -> str:
        return self._postgres.dsn("tally")

    def start(self) -> None:
        """Create and start all three; returns when they answer."""
        for part in (self._postgres, self._kafka):
            making = part.create()
            if making is not None:
                assert making.wait() == 0, tail(part.log)
                part.created()
        for name in ("network", "broker", "postgres"):
            self.launch(name)
        deadline = time.monotonic() + _READY_S
        while not (self._kafka._is_ready() and self._postgres._is_ready()):
            assert time.monotonic() < deadline, tail(self._kafka.log) + tail(self._postgres.log)
            time.sleep(0.1)
        self._postgres.ensure_database()

    def launch(self, name: str) -> None:
        """Start one; returns before it answers."""
        if name == "network":
            argv = [sys.executable, "-m", "tests.chaos.proxy", str(self._proxy_port), str(self._kafka_port)]
            with (self._logs / "network.log").open("ab") as output:
                # By its environment it is found should it be left over.
                self._processes[name] = spawn(
                    argv, output=output, env=os.environ | {"TALLY_DATA_DIR": str(self._data_dir)}
                )
        elif name == "broker":
            self._processes[name] = self._kafka.launch().process
        else:
            # As the supervisor's sweep does: a number in here may be anybody's by now.
            (self._postgres.data / "postmaster.pid").unlink(missing_ok=True)
            self._postgres.socket.with_name(f"{self._postgres.socket.name}.lock").unlink(missing_ok=True)
            self._processes[name] = self._postgres.launch().process

    def kill(self, name: str) -> None:
        """SIGKILL; returns when nothing of it is left."""
        family = self._family(name)
        killed = self._processes.pop(name)
        killed.kill()
        killed.wait()
        _, left = psutil.wait_procs(family[1:], timeout=_SESSIONS_GONE_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal; SIGSTOP and SIGCONT also to PostgreSQL's sessions."""
        family = self._family(name)
        if number not in (signal.SIGSTOP, signal.SIGCONT):
            family = family[:1]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def crash_session(self, share: float) -> bool:
        """SIGKILL one of PostgreSQL's sessions: the server ends all others and recovers. False when there is none."""
        sessions = [process for process in self._family("postgres")[1:] if _is_session(process)]
        if not sessions:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            sessions[int(share * len(sessions))].kill()
        return True

    def ended(self) -> Iterator[str]:
        """Services that ended without having been killed."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                yield f"{name} ended with {process.returncode}: {tail(self._logs / f'{_LOG[name]}.log', 5)}"

    def stop(self) -> None:
        for name in list(self._processes):
            if self._processes[name].poll() is None:
                self.signal(name, signal.SIGCONT)
        end([self._processes.pop(name) for name in ("broker", "network") if name in self._processes], grace=30)
        if "postgres" in self._processes:
            end([self._processes.pop("postgres")], grace=30, first=signal.SIGINT)
        self._postgres.remove_socket_dir()

    def _family(self, name: str) -> list[psutil.Process]:
        """The service's process and those it started."""
        first = psutil.Process(self._processes[name].pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            return [first, *first.children(recursive=True)]
        return [first]


_LOG = {"network": "network", "broker": "kafka", "postgres": "postgres"}


def _is_session(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "postgres tally" in " ".join(process.cmdline())
    return False


def orphans(data_dir: Path) -> list[str]:
    """Living processes of a run, found by their command line, working directory and data directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            where = [*process.cmdline(), process.cwd(), process.environ().get("TALLY_DATA_DIR", "")]
            if any(str(data_dir) in text for text in where):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
    return found
