"""The sink at work beside a test: in a thread, or in a process that dies at a step of its commit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

from psycopg.types.json import Jsonb

from pipeline.billing import sink
from pipeline.billing.commit import Reached, Step
from pipeline.core.charges import Charge
from pipeline.core.documents import kind_of, to_document
from pipeline.core.meters import Meter
from pipeline.core.periods import to_datetime
from pipeline.core.plans import Plan
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

#: Longest wait for something to happen, seconds: a group that lost a member waits out its session first.
_PATIENCE_S = 60.0


class SinkThread:
    """``sink.run`` in a thread; what it raises comes out of ``join``."""

    def __init__(self, settings: Settings, reached: Reached | None = None) -> None:
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(settings, reached), daemon=True)
        self._thread.start()

    def _run(self, settings: Settings, reached: Reached | None) -> None:
        try:
            sink.run(settings, self._stop, reached=reached)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self._error = error

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def wait(self, seconds: float) -> None:
        """Give it this long to do something it should not."""
        self._thread.join(seconds)
        self.check()

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive(), "the sink did not stop"
        self.check()


@contextmanager
def running_sink(settings: Settings, reached: Reached | None = None) -> Iterator[SinkThread]:
    thread = SinkThread(settings, reached)
    try:
        yield thread
    finally:
        thread.stop()


def wait_until(holds: Callable[[], bool], what: str, *threads: SinkThread) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not holds():
        for thread in threads:
            thread.check()
        assert time.monotonic() < until, f"waited {_PATIENCE_S:.0f} s for {what}"
        time.sleep(0.05)


def query(settings: Settings, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """As the owner, who may more than the program, but is held by the same triggers."""
    with connect(settings.dsn, application="test", autocommit=True, role=None) as connection:
        return connection.execute(statement, parameters).fetchall()


def tamper(settings: Settings, statement: str, *parameters: object) -> None:
    """As nobody may: past all triggers, to see that it is found out."""
    with connect(settings.dsn, application="test", role=None) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute(statement, parameters or None)


_INSERT_VERSION = """
INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
VALUES (%s, %s, %s, %s, %s, 'test')
"""


def publish(settings: Settings, *items: Plan | Meter) -> None:
    """Put versions into the catalog as they are, without the notice a publication must give."""
    with connect(settings.dsn, application="test") as connection:
        for item in items:
            key = (kind_of(item), item.id, item.version, to_datetime(item.valid_from_us))
            connection.execute(_INSERT_VERSION, [*key, Jsonb(to_document(item))])


def per_unit(version: int = 1, *, valid_from: int = 0, **prices: str) -> Plan:
    """A version of plan ``basic`` in USD: unit prices by charge."""
    charges = tuple(Charge(name, "tokens", "per_unit", Decimal(price)) for name, price in prices.items())
    return Plan("basic", version, "Basic", "USD", valid_from, charges)


def meter(version: int = 1, *, valid_from: int = 0) -> Meter:
    """A version of meter ``tokens``."""
    return Meter("tokens", version, "llm.request", "sum", "input_tokens", "token", (), False, valid_from)


def count(settings: Settings, table: str) -> int:
    return int(query(settings, f"SELECT count(*) FROM {table}")[0][0])


def start_dying_sink(settings: Settings, step: Step) -> "subprocess.Popen[bytes]":
    """A sink in a process of its own that kills itself with SIGKILL when it first reaches the step."""
    assert settings.kafka_bootstrap is not None
    environment = os.environ | {
        "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "TALLY_POSTGRES_DSN": settings.dsn,
        "TALLY_TOPIC_PREFIX": settings.topic_prefix,
        "TALLY_SESSION_TIMEOUT": str(settings.session_timeout),
        "TALLY_PARTITIONS": str(settings.partitions),
    }
    return subprocess.Popen([sys.executable, "-m", "tests.billing.running", str(int(step))], env=environment)


def _die_at(step: Step) -> None:
    def reached(now: Step) -> None:
        if now is step:
            os.kill(os.getpid(), signal.SIGKILL)

    sink.run(Settings(), threading.Event(), reached=reached)


if __name__ == "__main__":
    _die_at(Step(int(sys.argv[1])))
