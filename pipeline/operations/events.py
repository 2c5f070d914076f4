"""A refused event opened for a person: read as it came, mended before it is replayed.

Times are microseconds since 1970 UTC, plain integers: events are refused for times that no calendar holds.
"""

import io
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import cast

import fastavro
from fastavro.types import Schema

from pipeline.core.periods import to_datetime, to_micros
from pipeline.infra.avro import EVENTS, Record, Schemas, frame
from pipeline.infra.wire import FRAME_BYTES

#: Fields of the event itself that a mend may set; every other name is a property.
MENDABLE = ("account", "event_type", "timestamp", "subject")
#: Never mended: the identity must stay, and transport says nothing about the use.
_KEPT = ("idempotency_key", "source", "sequence")


class NotAnEvent(Exception):
    """Bytes that are no usage event. Says what was expected and what came."""


@dataclass(frozen=True, slots=True)
class Mend:
    """What to set in an event before it is replayed."""

    fields: dict[str, str | int] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.fields or self.properties)

    def texts(self) -> dict[str, str]:
        """What is set, by the names ``parse_mend`` takes; for people and for the audit record."""
        fields = {name: to_datetime(v).isoformat() if isinstance(v, int) else v for name, v in self.fields.items()}
        return fields | {
            f"properties.{name}" if name in MENDABLE else name: value for name, value in self.properties.items()
        }


def parse_mend(settings: list[str]) -> Mend:
    """A mend from ``NAME=VALUE`` texts; ``properties.NAME`` names a property that is called like a field.

    Raises ValueError for anything else, for the idempotency key, which is kept, and for a time without zone.
    """
    mend = Mend()
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"expected NAME=VALUE, got {text!r}")
        if name in _KEPT:
            raise ValueError(f"{name} is never changed by a replay: under another one the event could be billed twice")
        if name == "timestamp":
            mend.fields[name] = to_micros(parse_time(value))
        elif name in MENDABLE:
            mend.fields[name] = value
        else:
            mend.properties[name.removeprefix("properties.")] = value
    return mend


def parse_time(text: str) -> datetime:
    """An ISO 8601 date or time; without a zone it is UTC. Raises ValueError."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"expected a date or time such as 2026-01-31 or 2026-01-31T12:00:00Z, got {text!r}") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def read_event(value: bytes | None, schemas: Schemas) -> Record:
    """The usage event in framed bytes, its timestamp in microseconds. Raises NotAnEvent."""
    if not value:
        raise NotAnEvent("expected a usage event, got a message without a value")
    schema = _plain_schemas(schemas).get(value[:FRAME_BYTES])
    if schema is None:
        raise NotAnEvent(f"expected the frame of a usage event, got {value[:FRAME_BYTES].hex(' ')}")
    body = io.BytesIO(value[FRAME_BYTES:])
    try:
        event = cast(Record, fastavro.schemaless_reader(body, schema, None))
    except (EOFError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise NotAnEvent(f"expected a usage event, got bytes that do not decode: {error!r}") from error
    if left := len(value) - FRAME_BYTES - body.tell():
        raise NotAnEvent(f"expected a usage event, got {left} bytes more after it")
    return event


def mended(value: bytes | None, mend: Mend, schemas: Schemas) -> bytes:
    """The event's framed bytes with the mend applied, in the newest schema. Raises NotAnEvent."""
    event = read_event(value, schemas)
    event |= mend.fields
    event["properties"] = {**event["properties"], **mend.properties}
    return schemas.encode(EVENTS, event)


@cache
def _plain_schemas(schemas: Schemas) -> dict[bytes, Schema]:
    """The usage event's schemas by framing bytes, with times as plain integers."""
    plain = {}
    for version in schemas.versions:
        if version.subject == EVENTS:
            schema = json.loads(version.text())
            for one in schema["fields"]:
                if isinstance(one["type"], dict) and "logicalType" in one["type"]:
                    one["type"] = one["type"]["type"]
            plain[frame(version.id)] = fastavro.parse_schema(schema)
    return plain
