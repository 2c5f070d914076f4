"""``tally produce``: usage from a file to Kafka, over as many runs as it takes."""

import hashlib
import json
import re
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, BinaryIO, Self, cast

import typer
import yaml
from confluent_kafka.admin import AdminClient
from pydantic import BaseModel, ConfigDict
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.producer import BufferFull, Usage, UsageProducer
from pipeline.producer.files import BadRow, ColumnMapping, MappingError, read_csv, read_jsonl
from pipeline.producer.load import AGE_MAX, Checkpoint, file_identity, load, read_checkpoint, write_checkpoint

_BAD_ROWS_SHOWN = 20
_REACH_SECONDS = 15
#: After Ctrl-C: what is not delivered by then waits in the spool for the next run.
_INTERRUPTED_CLOSE_SECONDS = 3.0
_FIELDS = {"account": "account", "event_type": "event_type", "idempotency_key": "key", "subject": "subject"}


class Format(StrEnum):
    CSV = "csv"
    JSONL = "jsonl"


class MappingFile(BaseModel):
    """A mapping as YAML: the fields of ColumnMapping, each optional so that options can add to it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    account: str | None = None
    event_type: str | None = None
    key: str | None = None
    timestamp: str | None = None
    subject: str | None = None
    timestamp_format: str | None = None
    time_zone: str | None = None
    properties: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Job:
    """One file to send, and where its checkpoint and spool are."""

    path: Path
    format: Format
    mapping: ColumnMapping | None
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.json"

    def rows(self, file: BinaryIO) -> "Rows":
        return Rows(read_jsonl(file) if self.mapping is None else read_csv(file, self.mapping))
