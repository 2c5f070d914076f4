"""Avro on the wire: the registry's framing, schema ids, and readers and writers of Tally's own shapes.

The rater's hot path does not come through here: it reads and splices bytes itself (``pipeline.rating.wire``). This is
for everything that handles hundreds of records, not millions.
"""

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import fastavro
from fastavro.types import Schema

from pipeline.infra.resources import schemas_dir
from pipeline.infra.wire import FRAME_BYTES

MAGIC = 0

Record = dict[str, Any]


class WireError(Exception):
    """A message that is not in the wire format, has an unknown schema id, or does not decode."""


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """One version of one shape, as listed in ``schemas/avro/ids.json``."""

    id: int
    subject: str
    version: int
    file: str
    #: For a rated-usage schema: the id of the usage-event schema it embeds.
    embeds: int | None = None

    def text(self) -> str:
        return (schemas_dir() / "avro" / self.file).read_text()

    def parsed(self) -> Schema:
        return fastavro.parse_schema(json.loads(self.text()))


def frame(schema_id: int) -> bytes:
    """The five bytes that go before an Avro body."""
    return bytes((MAGIC,)) + schema_id.to_bytes(4, "big")


class Schemas:
    """All known schema versions, by id and by subject (the newest of a subject writes)."""

    def __init__(self, versions: list[SchemaVersion]) -> None:
        self.versions = sorted(versions, key=lambda v: (v.subject, v.version))
        self._by_id = {v.id: v for v in self.versions}
        self._newest = {v.subject: v for v in self.versions}
        self._parsed = {v.id: v.parsed() for v in self.versions}

    def newest(self, subject: str) -> SchemaVersion:
        return self._newest[subject]

    def ids(self, subject: str) -> list[int]:
        """Ids of every version of a subject, oldest first."""
        return [v.id for v in self.versions if v.subject == subject]

    def rated_for(self, event_id: int) -> int:
        """Id of the newest rated-usage schema that embeds this usage-event schema. Raises KeyError without one."""
        for v in reversed(self.versions):
            if v.embeds == event_id:
                return v.id
        raise KeyError(event_id)

    def encode(self, subject: str, record: Record) -> bytes:
        """Framed bytes of a record in its subject's newest schema; what it lacks has the schema's default.

        Raises ValueError or TypeError if it does not fit.
        """
        version = self._newest[subject]
        out = io.BytesIO()
        out.write(frame(version.id))
        fastavro.schemaless_writer(out, self._parsed[version.id], record, strict_allow_default=True)
        return out.getvalue()

    def decode(self, data: bytes | None, subject: str) -> Record:
        """Record of framed bytes. Raises WireError, saying what was expected and what came."""
        if data is None or len(data) < FRAME_BYTES or data[0] != MAGIC:
            raise WireError(
                f"expected byte 0 and a 4-byte schema id, got {bytes(data or b'')[:FRAME_BYTES].hex() or 'nothing'}"
            )
        schema_id = int.from_bytes(data[1:FRAME_BYTES], "big")
        version = self._by_id.get(schema_id)
        if version is None or version.subject != subject:
            raise WireError(f"expected a schema of {subject} (ids {self.ids(subject)}), got id {schema_id}")
        body = io.BytesIO(data[FRAME_BYTES:])
        try:
            record = fastavro.schemaless_reader(body, self._parsed[schema_id], None)
        except Exception as error:
            raise WireError(f"does not decode as {subject} v{version.version}: {error!r}") from error
        if body.tell() != len(data) - FRAME_BYTES:
            raise WireError(
                f"{len(data) - FRAME_BYTES - body.tell()} bytes left over after {subject} v{version.version}"
            )
        return cast(Record, record)


EVENTS, RATED, RECEIPTS = "usage.events-value", "usage.rated-value", "usage.receipts-value"
DEAD_LETTER, CATALOG, CONTROLS = "usage.dead-letter-value", "billing.catalog-value", "usage.controls-value"
#: On usage.retry, beside parked events.
CORRECTIONS = "usage.corrections-value"
ALERTS = "billing.alerts-value"


def _listed(folder: Path) -> list[SchemaVersion]:
    return [SchemaVersion(**entry) for entry in json.loads((folder / "ids.json").read_text())]


@cache
def load_schemas(registry_url: str | None = None) -> Schemas:
    """The schemas with the registry's ids when a URL is given, else with those of ``ids.json``.

    With a registry, every version is registered (or found) under its subject, oldest first. Raises
    SchemaRegistryError when the registry refuses or is away.
    """
    listed = _listed(schemas_dir() / "avro")
    if registry_url is None:
        return Schemas(listed)
    from confluent_kafka.schema_registry import Schema as RegistrySchema  # an optional service: imported on use
    from confluent_kafka.schema_registry import SchemaRegistryClient

    client = SchemaRegistryClient({"url": registry_url})
    ids = {v.id: client.register_schema(v.subject, RegistrySchema(v.text(), "AVRO")) for v in listed}
    return Schemas(
        [
            SchemaVersion(ids[v.id], v.subject, v.version, v.file, None if v.embeds is None else ids[v.embeds])
            for v in listed
        ]
    )
