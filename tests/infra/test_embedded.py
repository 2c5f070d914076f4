"""The embedded services as their users meet them: started, found, killed, started again. Real processes throughout."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from pipeline.infra import embedded
from pipeline.infra.embedded import Endpoints
from pipeline.infra.processes import is_locked

#: Runs the services and says so; ends when its stdin does.
_PARENT = """
import sys
from pathlib import Path
from pipeline.infra import embedded
with embedded.running(Path(sys.argv[1])) as running:
    print(running.endpoints.kafka_bootstrap, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty data directory; whatever runs in it is stopped."""
    directory = tmp_path / "data"
    yield directory
    embedded.stop(directory)


def _processes_of(directory: Path) -> list[psutil.Process]:
    """Living processes with this directory on their command line or as their working directory, by pid."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            mine = any(str(directory) in argument for argument in process.cmdline())
            if (mine or process.cwd().startswith(str(directory))) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_for(condition: Callable[[], bool], what: str, timeout: float = 40.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not: {what}"
        time.sleep(0.1)


def _write(endpoints: Endpoints) -> None:
    """One record and one row, confirmed."""
    admin = AdminClient({"bootstrap.servers": endpoints.kafka_bootstrap})
    for future in admin.create_topics([NewTopic("kept", 1, 1)]).values():
        future.result(15)
    producer = Producer({"bootstrap.servers": endpoints.kafka_bootstrap})
    producer.produce("kept", b"value")
    assert producer.flush(15) == 0
    with psycopg.connect(endpoints.postgres_dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS value")


def _is_kept(endpoints: Endpoints) -> bool:
    with psycopg.connect(endpoints.postgres_dsn) as connection:
        row = connection.execute("SELECT value FROM kept").fetchone()
    topics = AdminClient({"bootstrap.servers": endpoints.kafka_bootstrap}).list_topics(timeout=15).topics
    return row == (1,) and "kept" in topics


def _broker_setting(endpoints: Endpoints, name: str) -> str | None:
    admin, broker = (
        AdminClient({"bootstrap.servers": endpoints.kafka_bootstrap}),
        ConfigResource(ResourceType.BROKER, "1"),
    )
    value: str | None = admin.describe_configs([broker])[broker].result(15)[name].value
    return value


def _cluster_id(endpoints: Endpoints) -> str:
    return str(AdminClient({"bootstrap.servers": endpoints.kafka_bootstrap}).list_topics(timeout=15).cluster_id)


def test_found_while_running_and_data_stays(data_dir: Path) -> None:
    assert embedded.find(data_dir) is None
    first, started = embedded.start(data_dir)
    assert started
    assert embedded.find(data_dir) == first
    assert embedded.start(data_dir) == (first, False)
    _write(first)
    cluster = _cluster_id(first)

    assert embedded.stop(data_dir)
    assert embedded.find(data_dir) is None
    assert not embedded.stop(data_dir)
    _wait_for(lambda: not _processes_of(data_dir), "all processes gone")

    with embedded.running(data_dir) as running:
        assert running.endpoints == first
        assert _cluster_id(running.endpoints) == cluster
        assert _is_kept(running.endpoints)
        assert _broker_setting(running.endpoints, "offsets.retention.minutes") == "86400"
    assert embedded.find(data_dir) is None


@contextlib.contextmanager
def _parent(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-c", _PARENT, str(directory)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("127.0.0.1:")
        try:
            yield process
        finally:
            process.kill()


def _service_processes(directory: Path) -> list[psutil.Process]:
    return [process for process in _processes_of(directory) if process.info["name"] in ("java", "postgres")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed parent", "Ctrl-C"])
def test_nothing_outlives_its_parent(data_dir: Path, number: signal.Signals) -> None:
    with _parent(data_dir) as parent:
        assert len(_service_processes(data_dir)) >= 2
        parent.send_signal(number)
        _wait_for(lambda: not _service_processes(data_dir), "services gone")
        _wait_for(lambda: not is_locked(data_dir / "services.lock"), "supervisor gone")


def test_nothing_outlives_a_killed_supervisor(data_dir: Path) -> None:
    embedded.start(data_dir)
    assert len(_service_processes(data_dir)) >= 2
    os.kill(embedded.supervisor_pid(data_dir), signal.SIGKILL)
    _wait_for(lambda: not _service_processes(data_dir), "services gone")
    assert embedded.find(data_dir) is None


def test_starts_again_at_once_after_everything_was_killed(data_dir: Path) -> None:
    first, _ = embedded.start(data_dir)
    _write(first)
    for process in (psutil.Process(embedded.supervisor_pid(data_dir)), *_service_processes(data_dir)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for(lambda: not is_locked(data_dir / "services.lock"), "supervisor gone")
    second, started = embedded.start(data_dir)
    assert started
    assert _is_kept(second)


def test_another_process_number_in_postmaster_pid_is_not_believed(data_dir: Path) -> None:
    with embedded.running(data_dir):
        content = (data_dir / "postgres" / "postmaster.pid").read_text()
    stale = "\n".join([str(os.getpid()), *content.split("\n")[1:]])
    (data_dir / "postgres" / "postmaster.pid").write_text(stale)
    with embedded.running(data_dir) as running:
        assert embedded.find(data_dir) == running.endpoints


def test_taken_port_is_named(data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(embedded.PortTaken, match=rf"port {port} on 127\.0\.0\.1 is in use.*--kafka-port"):
            embedded.start(data_dir, kafka_port=port)


def test_full_disk_is_said_before_anything_starts(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(data_dir.parent)
    monkeypatch.setattr(embedded, "FREE_BYTES_MIN", usage.free + 2**40)
    with pytest.raises(embedded.NoSpace, match="MiB free, expected at least"):
        embedded.start(data_dir)
    assert not (data_dir / "postgres").exists()


def test_unreachable_repository_gives_advice_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(embedded.DownloadFailed, match=r"after 3 attempts.*\n.*HTTPS_PROXY"):
        embedded.fetch_kafka(tmp_path, lambda step: None)
    assert not (tmp_path / f"kafka-{embedded.KAFKA_VERSION}").exists()


def test_a_service_that_dies_shows_the_end_of_its_log(data_dir: Path) -> None:
    with embedded.running(data_dir):
        pass
    (data_dir / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(embedded.ServiceDied, match=r'(?s)PostgreSQL ended with exit code 1.*"no_such_setting"'):
        embedded.start(data_dir)
    assert not _service_processes(data_dir)


def test_long_data_directory_still_gets_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with embedded.running(deep) as running, psycopg.connect(running.endpoints.postgres_dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        socket_dir = Path(str(psycopg.conninfo.conninfo_to_dict(running.endpoints.postgres_dsn)["host"]))
        assert socket_dir.is_dir() and not socket_dir.is_relative_to(deep)
    assert not socket_dir.exists()


def test_kept_services_stay_after_the_block(data_dir: Path) -> None:
    with embedded.running(data_dir) as running:
        running.keep()
    assert embedded.find(data_dir) == running.endpoints
    assert embedded.stop(data_dir)


def test_two_starts_at_once_give_one(data_dir: Path) -> None:
    code = "import sys; from pathlib import Path; from pipeline.infra import embedded; "
    code += "print(embedded.start(Path(sys.argv[1])))"
    argv = [sys.executable, "-c", code, str(data_dir)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert [answer.strip().endswith("True)") for answer in answers] == [False, True]
    assert answers[0].replace("False", "True") == answers[1]
