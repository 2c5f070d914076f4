"""Logs of a process: structured, on stderr, one line per state change and none per event.

Tally's own lines come from ``structlog.get_logger()``; what libraries say through ``logging`` takes the same way out,
from level warning up.
"""

import logging
import sys

import structlog

from pipeline.infra.settings import Settings


def configure(settings: Settings, *, worker: str) -> None:
    """Set logging up for this process. Every line carries ``worker``; the format is ``settings.log_format``."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without the frames' variables: those hold customers' events and passwords.
    render: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(level)
    # While the broker is away it writes several lines a second; those who wait for the broker say it once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(worker=worker)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for a module: ``log = get_logger(__name__)``, then ``log.info("partition taken", partition=3)``."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger
