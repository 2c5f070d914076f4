"""What the sink read, decoded: rows, receipts, letters, control totals, and what could not be read."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias, cast

import fastavro
from confluent_kafka import Message
from fastavro.types import Schema

from pipeline.billing.rated import Malformed, Row, reader
from pipeline.billing.receipts import Receipt
from pipeline.billing.sequences import ControlTotal
from pipeline.billing.unrated import Letter, Resolution
from pipeline.core.periods import to_datetime
from pipeline.core.usage import SEQUENCE_BLOCK
from pipeline.infra.avro import CONTROLS, CORRECTIONS, DEAD_LETTER, RECEIPTS, Record, Schemas, frame
from pipeline.infra.topics import Topics
from pipeline.infra.wire import FRAME_BYTES

#: As far as missing numbers are looked for (``billing.due_sequences``): far from where a bigint ends.
_SEQUENCE_MAX = 10**18
#: Block of the last number of 64 bits, which a bigint just holds: events may carry it.
_BLOCK_MAX = (2**63 - 1) // SEQUENCE_BLOCK
#: Most bytes of a text that stands in an index, whose entries are bounded. The rater's are shorter: a source has 255.
_INDEXED_BYTES_MAX = 255
#: Characters of a problem that are kept: what came may be of any size.
_PROBLEM_MAX = 500
#: A topic and a partition of it.
Place: TypeAlias = tuple[str, int]


class RatedMessage(NamedTuple):
    """A rated row, where it stood, and its framed bytes."""

    partition: int
    offset: int
    row: Row
    value: bytes


class Poison(NamedTuple):
    """A message that is no record of its topic, and what was expected instead."""

    topic: str
    partition: int
    offset: int
    value: bytes
    problem: str


@dataclass(slots=True)
class Batch:
    """Messages of one fetch, decoded, and how each position moves: from the stored one to behind the last."""

    moves: dict[Place, tuple[int, int]] = field(default_factory=dict)
    rated: list[RatedMessage] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    controls: list[ControlTotal] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    resolutions: list[Resolution] = field(default_factory=list)
    poison: list[Poison] = field(default_factory=list)


class Intake:
    """Decodes messages. Holds the memory of the rated reader, so one per consumer."""

    def __init__(self, topics: Topics, schemas: Schemas) -> None:
        self._topics = topics
        self._read_rated = reader(schemas).read
        self._receipts = PlainReader(schemas, RECEIPTS)
        self._controls = PlainReader(schemas, CONTROLS)
        self._letters = PlainReader(schemas, DEAD_LETTER)
        self._corrections = frozenset(frame(schema_id) for schema_id in schemas.ids(CORRECTIONS))

    def sort(self, messages: Sequence[Message], positions: dict[Place, int]) -> Batch:
        """Decode messages that come in offset order per partition, none of them an error.

        ``positions`` holds the next offset of every partition read. What lies below is written already and left out,
        and so is what a rebalance in the middle of the fetch made the consumer read twice.
        """
        batch = Batch()
        rated_topic, read_rated, keep = self._topics.rated, self._read_rated, batch.rated.append
        following: dict[Place, int] = {}
        for message in messages:
            topic, partition, offset = _place(message)
            if offset < (following.get((topic, partition)) or positions[topic, partition]):
                continue
            following[topic, partition] = offset + 1
            value = message.value() or b""
            try:
                if topic == rated_topic:
                    keep(RatedMessage(partition, offset, read_rated(value), value))
                elif topic == self._topics.receipts:
                    self._add_receipt(batch, message, value)
                elif topic == self._topics.controls:
                    batch.controls.append(self._control_total(value))
                elif topic == self._topics.retry and value[:FRAME_BYTES] in self._corrections:
                    pass  # on its way to the rater; PostgreSQL, where it was decided, holds all of it
                else:
                    dead = topic == self._topics.dead_letter
                    batch.letters.append(Letter(topic, partition, offset, self._letter(value), dead))
            except Malformed as error:
                batch.poison.append(Poison(topic, partition, offset, value, str(error)[:_PROBLEM_MAX]))
        batch.moves = {place: (positions[place], offset) for place, offset in following.items()}
        return batch

    def _add_receipt(self, batch: Batch, message: Message, value: bytes) -> None:
        record = self._receipts.read(value)
        _check_ints(record["partition"], record["generation"])
        _check_ints(*(one["origin_partition"] for one in record["resolutions"]))
        _check_texts(record["topic"], record["worker"], *(one["source"] for one in record["sequences"]))
        if record["next_offset"] < record["first_offset"]:
            raise Malformed(f"expected offsets in order, got {record['first_offset']} to {record['next_offset']}")
        for one in record["sequences"]:
            numbers = int.from_bytes(one["bits"], "little").bit_length()
            if not (0 <= one["block"] <= _BLOCK_MAX and numbers <= SEQUENCE_BLOCK):
                raise Malformed(f"expected a block of {SEQUENCE_BLOCK} numbers, got {numbers} in block {one['block']}")
        latest_us = record["latest_event_at"]
        record.setdefault("corrections", 0)  # before there were any
        record["latest_event_at"] = None if latest_us is None else _instant(latest_us)
        committed_at = _instant(message.timestamp()[1] * 1000)
        batch.receipts.append(Receipt(*_place(message), value, record, committed_at))
        batch.resolutions += (
            Resolution(self._topics.events, one["origin_partition"], one["origin_offset"], one["outcome"])
            for one in record["resolutions"]
        )

    def _letter(self, value: bytes) -> Record:
        record = self._letters.read(value)
        _check_ints(record["origin_partition"], record["attempts"], record["replays"])
        _check_texts(record["origin_topic"], record["stage"], record["reason"])
        return record

    def _control_total(self, value: bytes) -> ControlTotal:
        record = self._controls.read(value)
        _check_texts(record["source"])
        first, last = record["first_sequence"], record["last_sequence"]
        if not 1 <= first <= last <= _SEQUENCE_MAX:
            raise Malformed(f"expected numbers from 1 to {_SEQUENCE_MAX}, got {first} to {last}")
        _check_nul(*(one["reason"] for one in record["rejections"]))
        return ControlTotal(record, _instant(record["hour"]), _instant(record["said_at"]))


class PlainReader:
    """Reads framed records of one subject with times as plain integers.

    Events are dead-lettered for times that no calendar holds; reading their letters must not fail over it.
    """

    def __init__(self, schemas: Schemas, subject: str) -> None:
        versions = [version for version in schemas.versions if version.subject == subject]
        self._subject = subject
        self._parsed: dict[bytes, Schema] = {
            frame(version.id): fastavro.parse_schema(_without_logical_types(json.loads(version.text())))
            for version in versions
        }

    def read(self, data: bytes) -> Record:
        """The record of one message. Raises Malformed, saying what was expected and what came."""
        schema = self._parsed.get(data[:FRAME_BYTES])
        if schema is None:
            raise Malformed(f"expected the frame of {self._subject}, got {data[:FRAME_BYTES].hex() or 'nothing'}")
        body = io.BytesIO(data[FRAME_BYTES:])
        try:
            record = fastavro.schemaless_reader(body, schema, None)
        except (EOFError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise Malformed(f"expected a record of {self._subject}, got bytes that do not decode: {error!r}") from error
        if left := len(data) - FRAME_BYTES - body.tell():
            raise Malformed(f"{left} bytes left over after a record of {self._subject}")
        return cast(Record, record)


def _place(message: Message) -> tuple[str, int, int]:
    return cast(tuple[str, int, int], (message.topic(), message.partition(), message.offset()))


def _check_ints(*numbers: int) -> None:
    """fastavro reads an int as the long it may be."""
    for number in numbers:
        if not -(2**31) <= number < 2**31:
            raise Malformed(f"expected an int of 32 bits, got {number}")


def _check_texts(*texts: str) -> None:
    """Texts that stand in an index."""
    _check_nul(*texts)
    for text in texts:
        if (size := len(text.encode())) > _INDEXED_BYTES_MAX:
            raise Malformed(f"expected a text of at most {_INDEXED_BYTES_MAX} bytes, got {size}: {text[:40]!r}")


def _check_nul(*texts: str) -> None:
    if "\0" in "".join(texts):
        raise Malformed("expected text without the character NUL, which PostgreSQL cannot hold")


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _without_logical_types(part) for name, part in schema.items() if name != "logicalType"}
    if isinstance(schema, list):
        return [_without_logical_types(part) for part in schema]
    return schema


def _instant(at_us: int) -> datetime:
    try:
        return to_datetime(at_us)
    except OverflowError:
        raise Malformed(f"expected a time in the years 1 to 9999, got {at_us} microseconds since 1970") from None
