"""How commands speak: one JSON object or a Rich table on stdout, everything else on stderr, fixed exit codes."""

import json
import sys
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

from confluent_kafka import KafkaException
from psycopg import OperationalError
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from pipeline.core.periods import Period, to_datetime
from pipeline.infra.embedded import EmbeddedError
from pipeline.infra.postgres import NotReady
from pipeline.infra.topics import TopicMismatch

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_FINDINGS = 1, 2, 3, 4

#: Data goes here; width is only limited on a terminal.
out = Console(soft_wrap=not sys.stdout.isatty())
#: Progress, hints and errors go here.
err = Console(stderr=True)


class CommandError(Exception):
    """An expected failure of a command: what was expected, what came, what to do; with the exit code."""

    def __init__(self, message: str, code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.code = code


def _plain(value: object) -> object:
    match value:
        case Decimal():
            return format(value, "f")
        case datetime() | date():
            return value.isoformat()
        case UUID():
            return str(value)
        case bytes():
            return value.hex()
        case Enum():
            return value.value
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def emit_json(value: Any) -> None:
    """Write one JSON value on stdout. Decimals become exact strings, times ISO 8601, bytes hex."""
    sys.stdout.write(json.dumps(value, default=_plain, indent=2) + "\n")


def service_days(period: Period, time_zone: str) -> str:
    """First and last day of a period, by the clock of a zone (IANA)."""
    zone = ZoneInfo(time_zone)
    first, last = (to_datetime(at_us).astimezone(zone) for at_us in (period.start_us, period.end_us - 1))
    same = (first.year, first.month) == (last.year, last.month)
    return f"{first:%Y-%m-%d}…{last:%d}" if same else f"{first:%Y-%m-%d}…{last:%Y-%m-%d}"


def fail(message: str, code: int = EXIT_ERROR) -> NoReturn:
    raise CommandError(message, code)


def run_reporting_errors(app: Callable[[], Any]) -> None:
    """Run the app; turn expected errors into one message on stderr and the right exit code."""
    try:
        app()
    except CommandError as error:
        _say(str(error))
        sys.exit(error.code)
    except ValidationError as error:
        for problem in error.errors():
            _say(f"{'.'.join(str(p) for p in problem['loc'])}: {problem['msg']}, got {problem['input']!r}")
        sys.exit(EXIT_USAGE)
    except (TopicMismatch, EmbeddedError, NotReady, TimeoutError, ValueError) as error:
        # Futures raise a TimeoutError without a word.
        _say(str(error) or "Kafka did not answer in time\nIs it running, or busy? `tally doctor` looks.")
        sys.exit(EXIT_ERROR)
    except OperationalError as error:
        _say(f"PostgreSQL does not answer: {str(error).strip()}\nIs it running? `tally doctor` looks.")
        sys.exit(EXIT_ERROR)
    except KafkaException as error:
        _say(f"Kafka refused or does not answer: {error.args[0]}\nIs it running? `tally doctor` looks.")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


def _say(message: str) -> None:
    err.print(
        f"[bold red]error:[/] {escape(message)}" if err.is_terminal else f"error: {message}",
        highlight=False,
        markup=err.is_terminal,
        soft_wrap=True,
    )


__all__ = [
    "EXIT_ERROR",
    "EXIT_FINDINGS",
    "EXIT_NOT_FOUND",
    "EXIT_USAGE",
    "CommandError",
    "emit_json",
    "err",
    "fail",
    "out",
]
