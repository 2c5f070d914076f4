"""The command in a process of its own, as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.infra.settings import Settings


class Tally:
    """Runs ``tally`` with a deployment's settings in its environment."""

    def __init__(self, settings: Settings, **environment: str) -> None:
        self._environment = os.environ | {
            "TALLY_KAFKA_BOOTSTRAP": str(settings.kafka_bootstrap),
            "TALLY_POSTGRES_DSN": settings.dsn,
            "TALLY_TOPIC_PREFIX": settings.topic_prefix,
            "TALLY_DATA_DIR": str(settings.data_dir),
            "TALLY_ACTOR": "ada",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **environment,
        }

    def __call__(self, *arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        done = subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: object, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)

    @contextmanager
    def running(self, *command: str) -> "Iterator[subprocess.Popen[bytes]]":
        """A worker beside the test, told to stop at its end."""
        with subprocess.Popen([sys.executable, "-m", "pipeline.cli", *command], env=self._environment) as worker:
            try:
                yield worker
                assert worker.poll() is None, "the worker ended by itself"
            finally:
                worker.terminate()
                worker.wait(30)
