"""Events Kafka refused for good, one JSON object a line in ``rejected.jsonl`` of the spool folder.

A line has the event's fields as ``tally produce`` reads them, and ``rejected_at`` and ``rejected_because``: once the
cause is mended (say, the topic's size limit), ``tally produce rejected.jsonl`` sends them under their old keys.
"""

import io
import json
import os
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, cast

import fastavro
from fastavro.types import Schema

from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.infra.wire import FRAME_BYTES


@cache
def _schema() -> Schema:
    return load_schemas().newest(EVENTS).parsed()


def decode(value: bytes) -> dict[str, Any]:
    """The fields of a framed event of this version, whatever id the registry gave its schema."""
    return cast(dict[str, Any], fastavro.schemaless_reader(io.BytesIO(value[FRAME_BYTES:]), _schema(), None))


def write_rejected(folder: Path, value: bytes, reason: str) -> None:
    """Append one event; on disk before this returns."""
    line = decode(value) | {"rejected_at": datetime.now(UTC), "rejected_because": reason}
    text = json.dumps(line, ensure_ascii=False, default=datetime.isoformat)
    with (folder / "rejected.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def idempotency_key(value: bytes) -> str:
    """The idempotency key of a framed event: its first field."""
    at, size, shift = FRAME_BYTES, 0, 0
    while value[at] > 0x7F:
        size |= (value[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    size |= value[at] << shift
    return value[at + 1 : at + 1 + (size >> 1)].decode()
